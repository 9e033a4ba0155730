"""Whether the server takes work, and how much of it is open: what a graceful end needs to know."""

from __future__ import annotations

PROBE_PATHS = frozenset({"/health", "/ready", "/metrics"})
"""Paths that answer to the end, so that probes see what is going on; exact, as they are routed."""


class Lifecycle:
    """One server's.

    Attributes:
        is_stopping: told to end: what is open may finish, and nothing new begins.
        num_open: requests that have not been answered to their end, those of `PROBE_PATHS` left out.
    """

    __slots__ = ("is_stopping", "num_open")

    def __init__(self) -> None:
        self.is_stopping = False
        self.num_open = 0
