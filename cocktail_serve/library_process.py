"""Where functions run that may import torch and transformers, half a gigabyte that a gateway would keep.

A gateway that computes nothing itself has them run in a process that ends when they are done: what was imported, mapped
and built goes with it. A process that has torch already runs them itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from typing import IO, Any, ParamSpec, Protocol, TypeVar

from cocktail_serve.errors import ServerError

_P = ParamSpec("_P")
_T = TypeVar("_T")


class LibraryCall(Protocol):
    """Runs a function of some module with these arguments, and returns or raises what it does.

    An argument `progress` that can be called is told what the function says, as it says it.
    """

    def __call__(self, function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T: ...


def call_here(function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """A `LibraryCall` in this process."""
    return function(*args, **kwargs)


class LibraryProcess:
    """A process for functions that import such libraries, begun by the first call and ended with the block.

    None is begun where torch is loaded already. Messages are pickles: a function and its arguments go in; what it logs,
    how far it is, and how it ended come out. One thread calls; any may close.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._calling = threading.Lock()

    def __enter__(self) -> LibraryProcess:
        return self

    def __exit__(self, *_raised: object) -> None:
        self.close()

    def call(self, function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """A `LibraryCall`.

        Raises:
            ServerError: the process ended before the function did.
        """
        if "torch" in sys.modules:
            return function(*args, **kwargs)
        with self._calling:
            return self._call(function, args, dict(kwargs))

    def _call(self, function: Callable[..., _T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _T:
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        progress: Any = kwargs.pop("progress", None)
        try:
            _send(process.stdin, pickle.dumps((function, args, kwargs, progress is not None)))
            while True:
                kind, value = pickle.load(process.stdout)
                if kind == "log":
                    _log(value)
                elif kind == "progress":
                    progress(*value)
                else:
                    break
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            code = process.wait()
            ended = f"by signal {-code}" if code < 0 else f"with code {code}"
            raise ServerError(
                f"the process that reads models ended {ended} before it was done; is the machine short of memory?"
            ) from error
        if kind == "raised":
            raise value
        result: _T = value
        return result

    def close(self) -> None:
        """Ends the process, whatever it is doing. May be called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        with self._calling:  # who reads an answer sees the end of it
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(OSError):  # what was not sent to a process that had ended
                    pipe.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        return self._process


def _log(record: logging.LogRecord) -> None:
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)


class _LogSender(logging.Handler):
    def __init__(self, answers: IO[bytes]) -> None:
        super().__init__()
        self._answers = answers

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args, record.exc_info = record.getMessage(), None, None
        _send(self._answers, ("log", record))


_sending = threading.Lock()


def _send(stream: IO[bytes], message: Any) -> None:
    content = pickle.dumps(message)
    with _sending:
        stream.write(content)
        stream.flush()


def _serve() -> None:
    """In the child: runs what it is told to until its owner closes the pipe, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the owner decides what ends
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no message
    logging.getLogger().addHandler(_LogSender(answers))
    logging.getLogger("cocktail_serve").setLevel(logging.INFO)
    asked: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(asked,), daemon=True).start()
    while True:
        request = asked.get()
        try:
            function, args, kwargs, wants_progress = pickle.loads(request)
            if wants_progress:
                kwargs["progress"] = lambda *told: _send(answers, ("progress", told))
            ended = ("returned", function(*args, **kwargs))
        except Exception as error:  # noqa: BLE001  raised again by the caller
            error.add_note(f"in the process that reads models:\n{traceback.format_exc()}")
            ended = ("raised", error)
        _send(answers, ended)


def _listen(asked: queue.SimpleQueue[bytes]) -> None:
    with open(0, "rb", closefd=False) as requests:
        while True:
            try:
                asked.put(pickle.load(requests))  # bytes, which are no code yet
            except EOFError:
                os._exit(0)


if __name__ == "__main__":
    _serve()
