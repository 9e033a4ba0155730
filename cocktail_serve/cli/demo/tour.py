"""What the demo does over HTTP, as any client could: make a cocktail of each kind, and compare it with the base."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from openai import OpenAI

from cocktail_serve.cli.demo.pools import DECODER_EXPERTS, DECODER_POOL, ENCODER_POOL, DemoPools, Search
from cocktail_serve.errors import ServerError

TRAVEL = "travel-desk"
OFFICE = "office-search"
TRAVEL_TEMPERATURE = 0.2
OFFICE_TEMPERATURE = 2.0
"""tau of the two cocktails. The paper's 5.0 makes weights nearly uniform unless losses differ by many nats, as those
of a contrastive loss, whose scores are divided by 0.05, may do."""

MAX_TOKENS = 24
CLIENTS = 8


@dataclass(frozen=True, slots=True)
class Made:
    """A cocktail as the server describes it, and how long it took to make."""

    cocktail: dict[str, Any]
    seconds: float


@dataclass(frozen=True, slots=True)
class Answered:
    """A question that is no example: what is right, what the base says and what the cocktail says."""

    question: str
    expected: str
    base: str
    cocktail: str


@dataclass(frozen=True, slots=True)
class Answers:
    """All questions, and how the experts fare alone.

    Attributes:
        expert_accuracy: share of right answers of each expert.
    """

    answered: list[Answered]
    expert_accuracy: dict[str, float]

    @property
    def base_accuracy(self) -> float:
        return _share(a.base == a.expected for a in self.answered)

    @property
    def cocktail_accuracy(self) -> float:
        return _share(a.cocktail == a.expected for a in self.answered)


@dataclass(frozen=True, slots=True)
class Ranking:
    """One query's documents, best first, under the base and under the cocktail.

    Attributes:
        expected: index of the document that answers it.
        base: `(index of the document, similarity)`.
    """

    query: str
    expected: int
    base: list[tuple[int, float]]
    cocktail: list[tuple[int, float]]

    @property
    def base_rank(self) -> int:
        return _rank(self.base, self.expected)

    @property
    def cocktail_rank(self) -> int:
        return _rank(self.cocktail, self.expected)


class Tour:
    """Runs the demo's steps against a server.

    Raises (each step):
        ServerError: the server answered with an error.
    """

    def __init__(self, url: str, pools: DemoPools) -> None:
        self._pools = pools
        self._http = httpx.Client(base_url=url, timeout=120)
        # the client insists on a key; a server on loopback asks for none
        self._openai = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120)

    def close(self) -> None:
        self._http.close()
        self._openai.close()

    def make_travel(self) -> Made:
        return self._make(TRAVEL, DECODER_POOL, self._pools.decoder_examples, temperature=TRAVEL_TEMPERATURE)

    def make_office(self) -> Made:
        return self._make(OFFICE, ENCODER_POOL, self._pools.encoder_examples, temperature=OFFICE_TEMPERATURE)

    def ask(self) -> Answers:
        """Puts every held-out question to the base, the cocktail and each expert in turn, greedily."""
        questions, right = zip(*self._pools.questions, strict=True)
        said = {model: self._chat(model, questions) for model in (DECODER_POOL, TRAVEL)}
        alone = {name: self._chat(f"{DECODER_POOL}/{name}", questions) for name in DECODER_EXPERTS}
        return Answers(
            [
                Answered(question, expected, base, cocktail)
                for (question, expected), base, cocktail in zip(
                    self._pools.questions, said[DECODER_POOL], said[TRAVEL], strict=True
                )
            ],
            {name: _share(map(str.__eq__, answers, right)) for name, answers in alone.items()},
        )

    def search(self) -> list[Ranking]:
        """Ranks the documents for every held-out query with the base's embeddings, then with the cocktail's."""
        search = self._pools.search
        ranked = {model: self._rank(model, search) for model in (ENCODER_POOL, OFFICE)}
        return [
            Ranking(query, expected, base, cocktail)
            for (query, expected), base, cocktail in zip(
                search.queries, ranked[ENCODER_POOL], ranked[OFFICE], strict=True
            )
        ]

    def _make(self, name: str, pool: str, examples: Sequence[Any], *, temperature: float) -> Made:
        started_at = time.monotonic()
        answer = self._http.post(
            "/v1/cocktails",
            params={"wait": 60},
            json={"name": name, "pool": pool, "examples": examples, "temperature": temperature},
        )
        body = answer.json()
        if answer.is_error:
            raise ServerError(f"the server refused the cocktail {name!r}: {body['error']['message']}")
        if body["status"] != "ready":
            raise ServerError(f"the cocktail {name!r} was not ready in a minute: it is {body['status']}")
        return Made(body, time.monotonic() - started_at)

    def _chat(self, model: str, questions: Sequence[str]) -> list[str]:
        def ask(question: str) -> str:
            completion = self._openai.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": question}],
                temperature=0,
                max_completion_tokens=MAX_TOKENS,
            )
            return (completion.choices[0].message.content or "").strip()

        with ThreadPoolExecutor(CLIENTS) as clients:
            return list(clients.map(ask, questions))

    def _rank(self, model: str, search: Search) -> list[list[tuple[int, float]]]:
        texts = [*search.documents, *(query for query, _ in search.queries)]
        embeddings = self._openai.embeddings.create(model=model, input=texts)
        vectors = np.array([item.embedding for item in embeddings.data])
        documents, queries = np.split(vectors, [len(search.documents)])
        return [
            [(int(index), float(row[index])) for index in np.argsort(-row, kind="stable")]
            for row in queries @ documents.T
        ]


def _share(judged: Iterable[bool]) -> float:
    judged = list(judged)
    return sum(judged) / len(judged)


def _rank(ranked: Sequence[tuple[int, float]], wanted: int) -> int:
    """Place of a document, from 1."""
    return 1 + [index for index, _ in ranked].index(wanted)
