"""Starts that failed: why, and whether another may go better."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cocktail_serve.suggestions import with_options_meant

BACKOFF_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Pauses before starts that follow failures in a row; the last one repeats."""

REMEDY = "mend it and start the server again; `cocktail-serve doctor CONFIG` checks what can be told without it"
"""What clears a failure that no other start would pass by."""

_USAGE_EXIT = 2
"""How Python's argument parsers end a process that was given what they do not know."""

_CAUSES_IN_INPUT = frozenset(
    {
        "AssertionError", "AttributeError", "IndexError", "KeyError", "NotImplementedError", "TypeError",
        "ValidationError", "ValueError", "ConfigError", "CheckpointError", "IncompatibleModelsError", "NotFiniteError",
    }
)  # fmt: skip
"""What Python raises for what it was given. An OSError or a RuntimeError may be the machine's: a disk, a GPU; and a
ModelChangedError passes once the files are put back."""

_SHORT_OF_MEMORY = re.compile(r"out of memory|allocate memory|\bfree memory\b|available memory", re.IGNORECASE)
"""How libraries say that memory is short now. Who else uses it may be gone soon."""

_PREFIX = re.compile(r"^(\([^()]*\bpid=\d+\)\s*)?((INFO|WARNING|ERROR|DEBUG)\b[^\]]*\]\s?)?")
"""What vLLM puts before a line: the process, then level, time and place."""

_RAISED = re.compile(r"^(?:[a-z_]\w*\.)*(?P<kind>[A-Z]\w*(?:Error|Exception|Interrupt))(?:: ?(?P<message>.*))?$")
"""The line that ends a traceback."""

_USAGE_ERROR = re.compile(r"^[\w.\- ]+: error: (?P<message>.*)$")

_SAYS_NOTHING = re.compile(r"Engine core initialization failed|WorkerProc initialization failed|See (root|stack)")
"""Errors of processes that only saw another end."""


@dataclass(frozen=True, slots=True)
class Exit:
    """How a server's process ended.

    Attributes:
        returncode: negative: by that signal.
        reason: of `reason_in`.
    """

    returncode: int
    reason: str | None

    def __str__(self) -> str:
        how = f"signal {-self.returncode}" if self.returncode < 0 else f"code {self.returncode}"
        return f"the engine's server exited with {how}"

    @property
    def is_refusal(self) -> bool:
        """Whether the server refused its arguments as such, as it will at every start."""
        return self.returncode == _USAGE_EXIT and self.reason is not None

    @property
    def is_of_its_input(self) -> bool:
        """Whether the reason seems to lie in what the server was given, and not in the machine's state.

        A guess: only where start after start ends in the same one will the next. Never of a server that was killed,
        whatever it logged before: by the kernel, say, which was short of memory.
        """
        if self.returncode < 0 or self.reason is None or _SHORT_OF_MEMORY.search(self.reason):
            return False
        return self.is_refusal or self.reason.partition(":")[0] in _CAUSES_IN_INPUT


def backoff_s(num_failures: int) -> float:
    """The pause after so many failures in a row, 1 or more."""
    return BACKOFF_S[min(num_failures, len(BACKOFF_S)) - 1]


def may_pass(error: BaseException) -> bool:
    """Whether what a model's loading ended in may be gone at another try: memory was short, the disk did not answer."""
    import torch

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(seen, OSError) and seen.errno is not None:  # libraries raise it without, for files they miss
            return True
        if isinstance(seen, RuntimeError) and _SHORT_OF_MEMORY.search(str(seen)):
            return True
        seen = seen.__cause__
    return False


def reason_in(log: Sequence[str]) -> str | None:
    """Why a server's process ended, in one line of the last part of its log; None where that does not say.

    The last exception that one of its processes raised, those left out that only say that another process has ended.
    """
    found = None
    for kind, message in _raised_in(log):
        if not _SAYS_NOTHING.search(message):
            found = f"{kind}: {message}" if kind else message
    return found


def _raised_in(log: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Kind and message of each exception; the kind is empty for a command line that was refused."""
    lines = [_PREFIX.sub("", line) for line in log]
    for number, line in enumerate(lines):
        if (usage := _USAGE_ERROR.match(line)) is not None:
            yield "", with_options_meant(usage["message"], "\n".join(lines[:number]))
        elif (raised := _RAISED.match(line)) is not None:
            message = raised["message"] or _code_above(lines[:number])
            if raised["kind"] == "ValidationError":  # pydantic says what is wrong in the lines that follow
                details = [text.strip() for text in lines[number + 1 : number + 4] if text.startswith("  ")]
                message = next((text for text in details if text), message)
                message = message.removeprefix("Value error, ").partition(" [type=")[0]
            yield raised["kind"], message.strip()


def _code_above(lines: Sequence[str]) -> str:
    """The line of code that a traceback ends with: all that is known of an exception without a message."""
    code = [line.strip() for line in lines[-3:] if line.startswith("    ") and not set(line) <= set(" ~^")]
    return code[-1] if code else ""
