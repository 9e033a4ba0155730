"""What the demo does over HTTP, as any client could: make a cocktail of each kind, and compare it with the base."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from openai import OpenAI

from cocktail_serve.cli.demo.pools import (
    CHAT_EXPERTS,
    CHAT_POOL,
    DECODER_EXPERTS,
    DECODER_POOL,
    ENCODER_POOL,
    ChatTask,
    DemoPools,
    Search,
    question_of,
)
from cocktail_serve.errors import ServerError
from cocktail_serve.pool import BASE

TRAVEL = "travel-desk"
OFFICE = "office-search"
DESK = "helpdesk"
TRAVEL_TEMPERATURE = 0.2
OFFICE_TEMPERATURE = 2.0
DESK_TEMPERATURE = 0.2
"""tau of the cocktails. The paper's 5.0 makes weights nearly uniform unless losses differ by many nats, as those
of a contrastive loss, whose scores are divided by 0.05, may do."""

MAX_TOKENS = 24
CLIENTS = 8
NUM_TENANTS = 8
TENANTS_TOKENS = 32


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


@dataclass(frozen=True, slots=True)
class ChatAnswers:
    """Questions that are no examples, and the loss of what is right.

    Attributes:
        losses: by model of the pool, nats.
        cocktail_loss: the cocktail's.
    """

    answered: list[Answered]
    losses: dict[str, float]
    cocktail_loss: float

    @property
    def best_expert(self) -> str:
        return min((name for name in self.losses if name != BASE), key=self.losses.__getitem__)


@dataclass(frozen=True, slots=True)
class Together:
    """As many cocktails as tenants, asked at once.

    Attributes:
        making_s: how long one takes to be made, on average.
        tokens_per_s: of all answers together.
        base_tokens_per_s: of as many requests for the base.
    """

    num_cocktails: int
    making_s: float
    tokens_per_s: float
    base_tokens_per_s: float


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

    def make_desk(self, task: ChatTask) -> Made:
        """With its loss on the held-out questions, which decide nothing."""
        return self._make(
            DESK, CHAT_POOL, task.examples, temperature=DESK_TEMPERATURE, validation_examples=task.questions
        )

    def ask(self) -> Answers:
        """Puts every held-out question to the base, the cocktail and each expert in turn, greedily."""
        questions, right = zip(*self._pools.questions, strict=True)
        alone = {name: self._chat(f"{DECODER_POOL}/{name}", questions) for name in DECODER_EXPERTS}
        return Answers(
            self._answered(DECODER_POOL, TRAVEL, self._pools.questions),
            {name: _share(map(str.__eq__, answers, right)) for name, answers in alone.items()},
        )

    def ask_desk(self, task: ChatTask, made: Made) -> ChatAnswers:
        """Puts the held-out questions to the base and the cocktail, and has the pool's models scored on them."""
        weighed = self._post("held-out", CHAT_POOL, {"examples": task.questions}, dry_run=True)
        asked = [question_of(row) for row in task.questions]
        return ChatAnswers(self._answered(CHAT_POOL, DESK, asked), weighed["losses"], made.cocktail["validation_loss"])

    def ask_together(self, task: ChatTask) -> Together:
        """Makes a cocktail for each tenant by writing numbers down, and asks all of them at once; then the base."""
        pick = random.Random(0)
        started_at = time.monotonic()
        made = []
        for number in range(NUM_TENANTS):
            weights = {name: pick.random() for name in ("base", *CHAT_EXPERTS)}
            body = {"merging_weights": {name: weight / sum(weights.values()) for name, weight in weights.items()}}
            made.append(self._post(f"tenant-{number + 1}", CHAT_POOL, body)["id"])
        making_s = (time.monotonic() - started_at) / NUM_TENANTS
        questions = [question_of(row)[0] for row in task.questions[:NUM_TENANTS]]
        speeds = []
        for models in (made, NUM_TENANTS * [CHAT_POOL]):
            # once unmeasured: whoever comes first waits for what is compiled for this many rows
            self._tokens_per_s(models, questions)
            speeds.append(self._tokens_per_s(models, questions))
        return Together(NUM_TENANTS, making_s, *speeds)

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

    def _answered(self, pool: str, cocktail: str, asked: Sequence[tuple[str, str]]) -> list[Answered]:
        said = [self._chat(model, [question for question, _ in asked]) for model in (pool, cocktail)]
        return [
            Answered(question, expected, *answers) for (question, expected), *answers in zip(asked, *said, strict=True)
        ]

    def _make(self, name: str, pool: str, examples: Sequence[Any], **options: Any) -> Made:
        started_at = time.monotonic()
        body = self._post(name, pool, {"examples": examples, **options})
        if body["status"] != "ready":
            raise ServerError(f"the cocktail {name!r} was not ready in a minute: it is {body['status']}")
        return Made(body, time.monotonic() - started_at)

    def _post(self, name: str, pool: str, how: Mapping[str, Any], *, dry_run: bool = False) -> dict[str, Any]:
        answer = self._http.post(
            "/v1/cocktails", params={"wait": 60, "dry_run": dry_run}, json={"name": name, "pool": pool, **how}
        )
        body: dict[str, Any] = answer.json()
        if answer.is_error:
            raise ServerError(f"the server refused the cocktail {name!r}: {body['error']['message']}")
        return body

    def _tokens_per_s(self, models: Sequence[str], questions: Sequence[str]) -> float:
        """Of one question to each model, all at once."""

        def ask(model: str, question: str) -> int:
            completion = self._openai.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": question}],
                temperature=0,
                max_completion_tokens=TENANTS_TOKENS,
                extra_body={"ignore_eos": True},
            )
            return completion.usage.completion_tokens if completion.usage else 0

        started_at = time.monotonic()
        with ThreadPoolExecutor(len(models)) as clients:
            return sum(clients.map(ask, models, questions)) / (time.monotonic() - started_at)

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
