"""One door to transformers and sentence-transformers, for every thread that imports them or loads by them.

Neither can be used by two threads at once before it is loaded. transformers puts another object in its own place while
it is imported, and a thread that waits for that import is given the old one: "cannot import name 'AutoTokenizer'". To
load a model it replaces functions and torch's default dtype for the whole process: of two models that load at once, one
may keep parameters on the meta device ("Cannot copy out of meta tensor"), or be made in the other's dtype.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from cocktail_serve.errors import ConfigError

logger = logging.getLogger(__name__)

PATIENCE_S = 60.0
"""How long a thread waits for its turn before the log says for whom, and again each time: a large model takes as long,
a disk that does not answer takes for ever."""


class _LibraryLock:
    """A reentrant lock that tells who keeps the others waiting."""

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


library_loading = _LibraryLock()
"""Held by a thread while it imports these libraries, or has them load a configuration, a tokenizer or a model.

Reentrant: what loads a model loads its configuration too. A model that is loaded computes without it."""


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
