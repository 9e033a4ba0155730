"""One way to turn a value into a digest, so that what outlives a process is never named by `hash()`."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def canonical_json(value: Any) -> bytes:
    """The one byte string of a JSON value: sorted keys, no spaces, floats by `repr` (exact for float64).

    Raises:
        ValueError: a float is not finite.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(value: Any) -> str:
    """SHA-256 of `canonical_json(value)`, 64 hex characters."""
    return hashlib.sha256(canonical_json(value)).hexdigest()
