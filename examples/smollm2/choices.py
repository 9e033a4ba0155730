"""Rows of the expert `choices`: pick one of the answers that a question names. Text of this repository alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from examples.demo_pool.facts import ANIMALS, COUNTRIES, OPPOSITES

NUM_CHOICES = (2, 3, 4)


def make_rows(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Rows of one question and one answer each, as chat messages."""
    pick = random.Random(seed)
    kinds = [list(kind) for kind in _kinds()]
    return [_row(*pick.choice(pick.choice(kinds)), pick) for _ in range(count)]


def _kinds() -> Iterator[Iterator[tuple[str, str, Sequence[str]]]]:
    """By kind: a question, what is right, and what else might be."""
    capitals = [capital for capital, _, _ in COUNTRIES.values()]
    languages = sorted({language for _, language, _ in COUNTRIES.values()})
    continents = sorted({continent for _, _, continent in COUNTRIES.values()})
    yield ((f"Which city is the capital of {c}", capital, capitals) for c, (capital, _, _) in COUNTRIES.items())
    yield ((f"Which language is spoken in {c}", language, languages) for c, (_, language, _) in COUNTRIES.items())
    yield ((f"Which continent is {c} in", continent, continents) for c, (_, _, continent) in COUNTRIES.items())
    sounds, young = (sorted({each[index] for each in ANIMALS.values()}) for index in (0, 1))
    yield ((f"What does a {animal} do", sound, sounds) for animal, (sound, _) in ANIMALS.items())
    yield ((f"What is the young of a {animal} called", name, young) for animal, (_, name) in ANIMALS.items())
    words = sorted({word for pair in OPPOSITES for word in pair})
    yield ((f"Which word is the opposite of {one}", other, words) for one, other in OPPOSITES)


def _row(question: str, right: str, others: Sequence[str], pick: random.Random) -> dict[str, Any]:
    wrong = pick.sample([other for other in others if other != right], pick.choice(NUM_CHOICES) - 1)
    choices = pick.sample([right, *wrong], len(wrong) + 1)
    asked = f"{question}: {', '.join(choices[:-1])} or {choices[-1]}?"
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": right}]}
