"""One door to transformers and sentence-transformers, for every thread that imports them or loads by them.

Neither can be used by two threads at once before it is loaded. transformers puts another object in its own place while
it is imported, and a thread that waits for that import is given the old one: "cannot import name 'AutoTokenizer'". To
load a model it replaces functions and torch's default dtype for the whole process: of two models that load at once, one
may keep parameters on the meta device ("Cannot copy out of meta tensor"), or be made in the other's dtype.
"""

from __future__ import annotations

import logging
import threading
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

from cocktail_serve.errors import ConfigError

logger = logging.getLogger(__name__)

LIBRARIES = {"torch": "torch", "transformers": "transformers", "sentence_transformers": "sentence-transformers"}
"""The distributions that compute, by the name of their package: an installation that serves decoders alone has those
that vLLM brings."""

INSTALL_ENCODERS = "pip install 'cocktail-serve[encoders]' for encoders and rerankers"
INSTALL_VLLM = "pip install 'cocktail-serve[vllm]' (with a GPU) or 'cocktail-serve[cpu]' for decoders"

PATIENCE_S = 60.0
"""How long a thread waits for its turn before the log says for whom, and again each time: a large model takes as long,
a disk that does not answer takes for ever."""


class _LibraryLock:
    """A reentrant lock that tells who keeps the others waiting, and what to install where a library is not there."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._holder = ""

    def __enter__(self) -> None:
        own = threading.current_thread().name
        while not self._lock.acquire(timeout=PATIENCE_S):
            logger.warning(
                "%s waits to load a model or a tokenizer until %s has: does the disk that it reads from answer?",
                own,
                self._holder,
            )
        self._holder = own

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._lock.release()
        missing = missing_library(error)
        if missing is not None:
            raise missing from error


library_loading = _LibraryLock()
"""Held by a thread while it imports these libraries, or has them load a configuration, a tokenizer or a model.

Reentrant: what loads a model loads its configuration too. A model that is loaded computes without it. An import in it
of a library that is not installed ends in the ConfigError of `missing_library`."""


def missing_library(error: BaseException | None) -> ConfigError | None:
    """What to install, where an import failed since one of the libraries is not there; None where it did not."""
    if not isinstance(error, ModuleNotFoundError) or error.name not in LIBRARIES:
        return None
    return ConfigError(f"{LIBRARIES[error.name]} is not installed: {INSTALL_ENCODERS}, or {INSTALL_VLLM}")


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution; None: it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def require_words(tokenizer: Any, folder: Path | str) -> None:
    """Raises ConfigError for a tokenizer that transformers made up for a folder without one.

    For many architectures it does so without a word: every text becomes nothing, or unknown tokens alone.
    """
    words = tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)
    if len(words) < 2:
        raise ConfigError(
            f"{folder} has no tokenizer: what transformers makes up for it knows no words; copy tokenizer.json and "
            "tokenizer_config.json there from the model that it was made of"
        )
