"""API keys: how they are made, read and compared. Only a digest of a key is ever kept."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, get_args

from cocktail_serve.errors import InvalidRequestError
from cocktail_serve.pool import NAME_PATTERN

Scope = Literal["use", "create", "admin"]
"""`use`: ask models and read what is the tenant's own. `create`: that, and make, change and delete cocktails.
`admin`: `/admin`, and nothing of a tenant's."""

SCOPES: tuple[Scope, ...] = get_args(Scope)

DEFAULT_SCOPES: tuple[Scope, ...] = ("use", "create")

DEFAULT_TENANT = "default"
"""Whose everything is where no keys are asked for, and whom the operator's own key acts for."""

SECRET_BYTES = 32

_PRESENTED = re.compile(r"ck-([0-9a-f]{12})-[A-Za-z0-9_-]{43}")


@dataclass(frozen=True, slots=True)
class Key:
    """What is kept of a key.

    Attributes:
        id: the visible part: names the key in lists, logs and the ledger.
        digest: SHA-256 of the whole key, hexadecimal. A slow hash would protect a guessable password; 256 random bits
            cannot be guessed at any speed, and every request computes this.
        created_at: seconds since the epoch, as the others.
        expires_at: from then on it is not valid; None: it does not expire.
        revoked_at: since then it is not valid.
    """

    id: str
    tenant: str
    scopes: frozenset[Scope]
    digest: str = field(repr=False)
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None

    def is_valid(self, now: float) -> bool:
        """Whether it opens anything at a moment (seconds since the epoch)."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)

    def matches(self, presented: str) -> bool:
        """Whether a presented key, of the form that `id_of` knows, is this one; takes as long wherever
        they differ."""
        return hmac.compare_digest(self.digest, key_digest(presented.encode("ascii")))


def make_key() -> tuple[str, str]:
    """A new key's id, and the key itself: `ck-<id>-<256 random bits>`."""
    key_id = secrets.token_hex(6)
    return key_id, f"ck-{key_id}-{secrets.token_urlsafe(SECRET_BYTES)}"


def key_digest(key: bytes) -> str:
    """What is kept of a key, or compared with it."""
    return hashlib.sha256(key).hexdigest()


def id_of(presented: str) -> str | None:
    """The id in a presented key; None where it has not the form of one."""
    form = _PRESENTED.fullmatch(presented)
    return form[1] if form else None


def check_scopes(scopes: Iterable[str]) -> frozenset[Scope]:
    """Scopes by name.

    Raises:
        InvalidRequestError: none, or an unknown one.
    """
    wanted = frozenset(scopes)
    if not wanted or not wanted <= set(SCOPES):
        raise InvalidRequestError(
            f"scopes must be some of {', '.join(SCOPES)}; got {', '.join(sorted(wanted)) or 'none'}", param="scopes"
        )
    return frozenset(scope for scope in SCOPES if scope in wanted)


def check_tenant(name: str) -> str:
    """A tenant's name.

    Raises:
        InvalidRequestError: not a name.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise InvalidRequestError(f"{name!r} is not a tenant's name: use {NAME_PATTERN}", param="tenant")
    return name
