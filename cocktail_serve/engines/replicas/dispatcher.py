"""Sends requests to the engines of one pool, and those in line on to another where that has become better."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from cocktail_serve.engines.line_place import LinePlace, RecalledError
from cocktail_serve.engines.load import EngineLoad
from cocktail_serve.engines.replicas.placement import (
    DEFAULT_REQUEST_S,
    PlacedRequest,
    Placement,
    idle,
    open_to,
)
from cocktail_serve.errors import EngineError

_T = TypeVar("_T")

LOOK_S = 0.05
"""Between two looks at the lines, while there are any."""

MAX_LOOKED_AT = 64
"""Requests in line, the oldest, that a look considers for engines that are idle."""

MAX_BOUND = 1024
"""Recipes of which it is remembered that engines were lost in their mix."""

SMOOTHING = 0.05
"""Weight of the newest request in the average of how long one takes."""


class Loaded(Protocol):
    """An engine, as far as it is chosen."""

    def load(self) -> EngineLoad: ...


@dataclass(eq=False, slots=True)
class _Sent:
    """A request that was sent to an engine, and waits there, or is let in.

    Attributes:
        at: name of the engine.
        since: when it was sent there.
        next: name of the engine that it is called away to; None: whichever is chosen then.
    """

    request: PlacedRequest
    place: LinePlace
    at: str
    since: float
    next: str | None = None


class Dispatcher:
    """Knows what it sent where, and until it is let in has it wait elsewhere. Lives on one event loop.

    Args:
        engines: by the names that homes are found by.
        placement: chooses between them.
    """

    def __init__(self, engines: Mapping[str, Loaded], placement: Placement) -> None:
        self._engines = engines
        self._placement = placement
        self._sent: dict[_Sent, None] = {}
        self._look: asyncio.TimerHandle | None = None
        self._request_s = DEFAULT_REQUEST_S
        # engines by the digests of recipes that lost more than one: they are tried there alone until it goes well
        self._bound: dict[str, str] = {}

    async def send(self, request: PlacedRequest, attempt: Callable[[str, LinePlace], Awaitable[_T]]) -> _T:
        """What the attempt at the engine that is chosen comes to; while it is in line it may be made at another.

        Args:
            attempt: given the name of an engine, and the request's place in its line; returns once it was let in.
        """
        place = LinePlace()
        loop = asyncio.get_running_loop()
        at: str | None = None
        while True:
            at = at or self._choose(request)
            sent = _Sent(request, place, at, since=loop.time())
            self._sent[sent] = None
            if self._look is None:
                self._look = loop.call_later(LOOK_S, self._look_at_lines)
            try:
                answer = await attempt(at, place)
            except RecalledError:
                at = sent.next
            except EngineError:
                if place.num_lost_mixes > 1:
                    self._bind(sent)
                raise
            else:
                self._bound.pop(request.recipe_digest, None)
                return answer
            finally:
                del self._sent[sent]

    def observe(self, seconds: float) -> None:
        """A request held its slot so long."""
        self._request_s += SMOOTHING * (seconds - self._request_s)

    def loads(self) -> dict[str, EngineLoad]:
        """What each engine does now."""
        return {name: engine.load() for name, engine in self._engines.items()}

    def recall(self, at: str, *, but: str | None = None) -> None:
        """Calls requests in line at an engine away: all, or all but those for one recipe, named by its digest."""
        for sent in list(self._sent):
            if sent.at == at and sent.request.recipe_digest != but:
                sent.place.recall()

    def close(self) -> None:
        """Looks no more."""
        if self._look is not None:
            self._look.cancel()
            self._look = None

    def _choose(self, request: PlacedRequest) -> str:
        loads = self.loads()
        bound = self._bound.get(request.recipe_digest)
        if bound is not None and not loads[bound].keeps_out(request.recipe_digest):
            return bound
        return self._placement.choose(request, loads, request_s=self._request_s)

    def _bind(self, sent: _Sent) -> None:
        """The recipe is tried at this engine alone from now on: others would be lost to it too."""
        self._bound[sent.request.recipe_digest] = sent.at
        if len(self._bound) > MAX_BOUND:
            del self._bound[next(iter(self._bound))]

    def _look_at_lines(self) -> None:
        in_line = [sent for sent in self._sent if sent.place.is_in_line]
        self._look = asyncio.get_running_loop().call_later(LOOK_S, self._look_at_lines) if self._sent else None
        if not in_line:
            return
        loads = self.loads()
        staying = []
        for sent in in_line:
            digest, load = sent.request.recipe_digest, loads[sent.at]
            if self._bound.get(digest) == sent.at:
                continue
            if load.is_up and not load.keeps_out(digest):
                staying.append(sent)
            elif sent.at not in open_to(sent.request, loads):  # the engine has gone, and another is there
                sent.place.recall()
        self._shorten_lines(staying, loads)

    def _shorten_lines(self, in_line: list[_Sent], loads: dict[str, EngineLoad]) -> None:
        """Sends who does better there to engines that are idle, those who have waited longest first."""
        now = asyncio.get_running_loop().time()
        for to in list(idle(loads)):
            for sent in in_line[:MAX_LOOKED_AT]:
                may_go = sent.at != to and not loads[to].keeps_out(sent.request.recipe_digest)
                if may_go and self._should_move(sent, to, loads, now):
                    in_line.remove(sent)
                    loads[sent.at] = _with(loads[sent.at], sent.request, -1)
                    loads[to] = _with(loads[to], sent.request, 1)
                    sent.next = to
                    sent.place.recall()

    def _should_move(self, sent: _Sent, to: str, loads: dict[str, EngineLoad], now: float) -> bool:
        return self._placement.should_move(
            sent.request, sent.at, to, loads, request_s=self._request_s, waited_s=now - sent.since
        )


def _with(load: EngineLoad, request: PlacedRequest, num: int) -> EngineLoad:
    """What an engine has to do with so many requests like this one more in line."""
    line = dict(load.background if request.is_background else load.waiting)
    line[request.recipe_digest] = line.get(request.recipe_digest, 0) + num
    if line[request.recipe_digest] <= 0:
        del line[request.recipe_digest]
    return replace(load, background=line) if request.is_background else replace(load, waiting=line)
