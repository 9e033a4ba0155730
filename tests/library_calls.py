"""Functions that tests have run in another process."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from cocktail_serve.errors import IncompatibleModelsError, InvalidExamplesError
from cocktail_serve.pool import Member, Pool


def sum_up(*numbers: int, more: int = 0) -> tuple[int, int]:
    print("what a library prints is no message")
    return sum(numbers) + more, os.getpid()


def report(progress: Callable[[str, int, int], None]) -> None:
    progress("base", 1, 2)
    logging.getLogger("cocktail_serve.tests").info("a line of %s", "ours")
    logging.getLogger("another").info("a line of a library's")
    progress("base", 2, 2)


def refuse(kind: str) -> None:
    if kind == "incompatible":
        raise IncompatibleModelsError("they do not fit", param="experts")
    if kind == "row":
        raise InvalidExamplesError("it is empty", row=3)
    raise ZeroDivisionError("a fault of ours")


def end(code: int) -> None:
    os._exit(code)


def sleep(file: str) -> None:
    Path(file).write_text(str(os.getpid()))
    time.sleep(60)


def make_pool() -> Pool:
    members = {name: Member(name, Path("b"), name * 4, "float32", 8) for name in ("base", "nq")}
    return Pool("flan", "decoder", members["base"], {"nq": members["nq"]}, "text", ("warned",))
