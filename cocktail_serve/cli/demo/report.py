"""How the demo tells what it does: tables on a console, and the same as one JSON value."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.text import Text

from cocktail_serve.cli.demo.pools import DECODER_POOL, ENCODER_POOL, DemoPools
from cocktail_serve.cli.demo.tour import MAX_TOKENS, OFFICE, TRAVEL, TRAVEL_TEMPERATURE, Answers, Made, Ranking
from cocktail_serve.cli.terminal import ResultTable, weighing_table

NUM_QUESTIONS_SHOWN = 4
NUM_DOCUMENTS_SHOWN = 3


class Narrator:
    """Prints each step when it is done."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def decoder_task(self, pools: DemoPools) -> None:
        self._heading("A task that no expert was tuned on, told by five examples")
        for row in pools.decoder_examples:
            *before, answer = row["messages"]
            self._example(before[-1]["content"], answer["content"])

    def encoder_task(self, pools: DemoPools) -> None:
        self._heading("The same for search")
        for row in pools.encoder_examples:
            self._example(row["query"], row["pos"][0])

    def made(self, made: Made) -> None:
        cocktail = made.cocktail
        print_ = self._console.print
        print_()
        print_(weighing_table(cocktail["losses"], cocktail["merging_weights"]))
        print_(
            f"[bold]{cocktail['id']}[/] is served: ready in {made.seconds:.1f} s, loss of the mixture "
            f"{cocktail['mixed_loss']:.3f}, temperature {cocktail['temperature']:g}"
        )

    def answers(self, answers: Answers) -> None:
        table = ResultTable()
        table.add_column("asked of both")
        table.add_column(f"base ({DECODER_POOL})")
        table.add_column(f"cocktail ({TRAVEL})")
        for row in sorted(answers.answered, key=lambda a: a.base == a.expected)[:NUM_QUESTIONS_SHOWN]:
            table.add_row(row.question, _judged(row.base, row.expected), _judged(row.cocktail, row.expected))
        self._console.print()
        self._console.print(table)
        self._console.print(
            f"right on {len(answers.answered)} questions that are no examples: "
            f"base {answers.base_accuracy:.0%}, cocktail [bold]{answers.cocktail_accuracy:.0%}[/]"
        )
        alone = ", ".join(f"{name} {accuracy:.0%}" for name, accuracy in answers.expert_accuracy.items())
        self._console.print(f"the experts alone: {alone}")

    def rankings(self, rankings: Sequence[Ranking], documents: Sequence[str]) -> None:
        shown = max(rankings, key=lambda ranking: ranking.base_rank - ranking.cocktail_rank)
        table = ResultTable(title=f"search: {shown.query}")
        table.add_column(f"base ({ENCODER_POOL})")
        table.add_column(f"cocktail ({OFFICE})")
        for base, cocktail in zip(shown.base[:NUM_DOCUMENTS_SHOWN], shown.cocktail[:NUM_DOCUMENTS_SHOWN], strict=True):
            table.add_row(_ranked(base, shown.expected, documents), _ranked(cocktail, shown.expected, documents))
        self._console.print()
        self._console.print(table)
        base_first, cocktail_first = _first_places(rankings)
        self._console.print(
            f"right document first on {len(rankings)} searches that are no examples: "
            f"base {base_first:.0%}, cocktail [bold]{cocktail_first:.0%}[/]"
        )

    def what_next(self, url: str, pools: DemoPools) -> None:
        question = pools.questions[0][0]
        messages = [{"role": "user", "content": question}]
        body = json.dumps({"model": TRAVEL, "temperature": 0, "max_tokens": MAX_TOKENS, "messages": messages})
        self._heading("Go on while the server runs (make serve keeps it)")
        lines = (
            f"curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'",
            "",
            "from openai import OpenAI",
            f'client = OpenAI(base_url="{url}/v1", api_key="none")',
            f'client.embeddings.create(model="{OFFICE}", input=["Who signs my VWK?"])',
            "",
            f"curl {url}/v1/cocktails -H 'content-type: application/json' -d "
            f'\'{{"name": "mine", "pool": "{DECODER_POOL}", "temperature": {TRAVEL_TEMPERATURE:g}, '
            '"examples": [{"input": "Say hello", "output": "Hello"}]}\'',
        )
        self._console.print(Group(*(Text(line) for line in lines)), soft_wrap=True)

    def serving(self, url: str) -> None:
        self._console.print()
        self._console.print(f"serving on {url}; Ctrl-C ends it", style="bold", highlight=False)

    def _example(self, given: str, wanted: str) -> None:
        self._console.print(Text.assemble("  ", given, ("  →  ", "dim"), wanted))

    def _heading(self, text: str) -> None:
        self._console.print()
        self._console.rule(f"[bold]{text}", align="left", style="dim")


def as_json(
    travel: Made, answers: Answers, office: Made, rankings: Sequence[Ranking], documents: Sequence[str]
) -> dict[str, Any]:
    """All that was shown, and the rest of it."""
    base_first, cocktail_first = _first_places(rankings)
    return {
        "object": "demo",
        "decoder": {
            "cocktail": travel.cocktail,
            "seconds": round(travel.seconds, 3),
            "base_accuracy": answers.base_accuracy,
            "cocktail_accuracy": answers.cocktail_accuracy,
            "expert_accuracy": answers.expert_accuracy,
            "answers": [
                {"question": a.question, "expected": a.expected, "base": a.base, "cocktail": a.cocktail}
                for a in answers.answered
            ],
        },
        "encoder": {
            "cocktail": office.cocktail,
            "seconds": round(office.seconds, 3),
            "base_right_first": base_first,
            "cocktail_right_first": cocktail_first,
            "rankings": [
                {
                    "query": ranking.query,
                    "expected": documents[ranking.expected],
                    "base_rank": ranking.base_rank,
                    "cocktail_rank": ranking.cocktail_rank,
                }
                for ranking in rankings
            ],
        },
    }


def _first_places(rankings: Sequence[Ranking]) -> tuple[float, float]:
    """Share of searches whose right document comes first: base, cocktail."""
    return (
        sum(ranking.base_rank == 1 for ranking in rankings) / len(rankings),
        sum(ranking.cocktail_rank == 1 for ranking in rankings) / len(rankings),
    )


def _judged(answer: str, expected: str) -> Text:
    right = answer == expected
    return Text(f"{'✓' if right else '✗'} {answer}", style="green" if right else "red")


def _ranked(place: tuple[int, float], expected: int, documents: Sequence[str]) -> Text:
    index, similarity = place
    right = index == expected
    return Text(f"{'✓' if right else ' '} {similarity:.2f}  {documents[index]}", style="green" if right else "")
