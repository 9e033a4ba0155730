"""Tenants of a server under load: what their clients send, and how long each answer takes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

WORDS = "the quick brown fox film card bank paris capital joy bore answer input lazy dog account stolen".split()


@dataclass(frozen=True)
class Ask:
    """What a client sends: a path and the bodies it picks from, and how long it waits after each answer.

    Attributes:
        pause_s: at least and at most; drawn anew each time.
    """

    path: str
    bodies: Sequence[bytes]
    pause_s: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def chat(cls, model: str, *, max_tokens: int, num_words: int = 8, num_questions: int = 50, **options: Any) -> Ask:
        """So many questions of so many words, each answered with exactly so many tokens."""
        body = {"model": model, "temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, **options}
        messages = [[{"role": "user", "content": words(number, num_words)}] for number in range(num_questions)]
        return cls("/v1/chat/completions", [json.dumps({**body, "messages": each}).encode() for each in messages])

    @classmethod
    def embed(cls, model: str, *, num_texts: int, num_words: int) -> Ask:
        """Batches of texts."""
        batches = [[words(50 * number + n, num_words) for n in range(num_texts)] for number in range(50)]
        bodies = [{"model": model, "input": batch, "encoding_format": "base64"} for batch in batches]
        return cls("/v1/embeddings", [json.dumps(body).encode() for body in bodies])


def words(seed: int, count: int) -> str:
    """A text of so many words; the same for the same seed."""
    return " ".join(random.Random(seed).choices(WORDS, k=count))


class Tenant:
    """A tenant's clients."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def ask(self, ask: Ask, number: int) -> tuple[float, float]:
        """Sends one body; seconds to the first bytes of the answer and to its end.

        Raises:
            RuntimeError: another status than 200.
        """
        started = time.perf_counter()
        async with self._session.post(ask.path, data=ask.bodies[number % len(ask.bodies)]) as response:
            text = await response.content.readany()
            first = time.perf_counter() - started
            text += await response.read()
            if response.status != 200:
                raise RuntimeError(f"{response.url} answered {response.status}: {text[:500]!r}")
        return first, time.perf_counter() - started

    async def make(self, body: Any) -> dict[str, Any]:
        """A cocktail, once it is ready.

        Raises:
            RuntimeError: it did not become ready.
        """
        async with self._session.post("/v1/cocktails?wait=60", json=body) as response:
            made: dict[str, Any] = await response.json()
        if made.get("status") != "ready":
            raise RuntimeError(f"the cocktail did not become ready: {made}")
        return made

    async def loop(self, ask: Ask, *, until: float) -> list[float]:
        """One client; seconds of each answer."""
        latencies = []
        rng = random.Random(0)
        for number in itertools.count():
            if time.perf_counter() >= until:
                break
            latencies.append((await self.ask(ask, number))[1])
            if ask.pause_s[1]:
                await asyncio.sleep(rng.uniform(*ask.pause_s))
        return latencies

    async def flood(self, asks: Sequence[Ask], *, clients: int, until: float) -> int:
        """Many clients, the asks dealt out among them; how many answers they got."""
        loops = (self.loop(asks[number % len(asks)], until=until) for number in range(clients))
        return sum(map(len, await asyncio.gather(*loops)))


@contextlib.asynccontextmanager
async def keyless(url: str) -> AsyncIterator[Tenant]:
    """Whoever asks a server that asks for no key."""
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession(url, headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:
        yield Tenant(session)


@contextlib.asynccontextmanager
async def tenants(url: str, admin_key: str, names: Sequence[str]) -> AsyncIterator[list[Tenant]]:
    """Tenants, each with a key of its own."""
    async with contextlib.AsyncExitStack() as stack:
        made = []
        admin = await stack.enter_async_context(aiohttp.ClientSession(url, headers=_headers(admin_key)))
        for name in names:
            async with admin.post("/admin/keys", json={"tenant": name, "scopes": ["use", "create"]}) as response:
                key = (await response.json())["key"]
            session = aiohttp.ClientSession(url, headers=_headers(key), connector=aiohttp.TCPConnector(limit=0))
            made.append(Tenant(await stack.enter_async_context(session)))
        yield made


def _headers(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
