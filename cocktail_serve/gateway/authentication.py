"""Who a request comes from: its key looked up, compared, and remembered for a few seconds."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from cocktail_serve.errors import AuthenticationError, PermissionDeniedError
from cocktail_serve.tenants.keys import DEFAULT_TENANT, SCOPES, Key, Scope, id_of, key_digest
from cocktail_serve.tenants.store import TenantStore
from cocktail_serve.usage.actor import Actor

CACHE_TTL_S = 5.0
"""How long a key is taken at its word. What this process revokes or changes holds at once; what another one does (the
command line, another gateway) is seen here after at most this time."""

CACHE_SIZE = 10_000

ADMIN_KEY_ID = "admin"
"""Stands for COCKTAIL_ADMIN_KEY where a key's id is shown."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request.

    Attributes:
        key_id: of the key; None where none is asked for.
        pools: ids of the pools that are there for the tenant; None: all.
    """

    tenant: str
    scopes: frozenset[Scope]
    key_id: str | None = None
    pools: frozenset[str] | None = None

    @property
    def actor(self) -> Actor:
        """Who does what the request asks for, as the audit log has it."""
        return Actor(self.tenant, self.key_id)

    def sees(self, pool_id: str) -> bool:
        """Whether a pool is there for the tenant."""
        return self.pools is None or pool_id in self.pools

    def require(self, scope: Scope) -> None:
        """Does nothing where the key has the scope; `create` contains `use`.

        Raises:
            PermissionDeniedError: it has not.
        """
        if scope in self.scopes or (scope == "use" and "create" in self.scopes):
            return
        raise PermissionDeniedError(f"this key lacks the scope {scope!r}; ask the operator for one that has it")


ANYONE = Caller(DEFAULT_TENANT, frozenset({"use", "create"}))
"""Everybody, where no key is asked for."""

OPERATOR = Caller(DEFAULT_TENANT, frozenset(SCOPES), ADMIN_KEY_ID)


class Authenticator:
    """Finds the caller of a request by its key.

    Args:
        required: whether requests need a key at all; `/admin` always does.
        admin_key: the operator's own, from the environment; None: there is none.
        clock: seconds since the epoch.
        timer: monotonic seconds.
    """

    def __init__(
        self,
        store: TenantStore,
        *,
        required: bool,
        admin_key: str | None,
        clock: Callable[[], float] = time.time,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._required = required
        self._admin_digest = None if admin_key is None else key_digest(admin_key.encode())
        self._clock = clock
        self._timer = timer
        self._known: OrderedDict[str, tuple[float, Key, Caller]] = OrderedDict()
        self._looking: dict[str, asyncio.Task[tuple[Key, Caller] | None]] = {}

    async def caller(self, authorization: str) -> Caller:
        """The sender of a request, by its `Authorization` header; empty: none was sent.

        Raises:
            AuthenticationError: a key is required, and there is none, or one that is not valid.
            StorageError: the key could not be looked up.
        """
        if not self._required:
            return ANYONE
        return await self._caller_with_key(authorization)

    async def admin(self, authorization: str) -> Caller:
        """The sender of a request to `/admin`: a key is asked for even where `server.auth` is off.

        Raises:
            As `caller`.
            PermissionDeniedError: a key without the scope `admin`.
        """
        caller = await self._caller_with_key(authorization)
        caller.require("admin")
        return caller

    def forget(self, key_id: str) -> None:
        """A key has changed: look it up again."""
        self._known.pop(key_id, None)
        self._looking.pop(key_id, None)

    def forget_tenant(self, tenant: str) -> None:
        """A tenant has changed: look its keys up again."""
        for key_id in [key_id for key_id, (_, key, _) in self._known.items() if key.tenant == tenant]:
            self.forget(key_id)
        self._looking.clear()  # whose those are is not known yet

    async def _caller_with_key(self, authorization: str) -> Caller:
        scheme, _, presented = authorization.partition(" ")
        presented = presented.strip()
        if scheme.lower() != "bearer" or not presented:
            raise AuthenticationError("an API key is required: send the header 'Authorization: Bearer <key>'")
        # headers are latin-1 on the wire, whatever was meant
        if self._admin_digest is not None and hmac.compare_digest(
            self._admin_digest, key_digest(presented.encode("latin-1"))
        ):
            return OPERATOR
        key_id = id_of(presented)
        found = None if key_id is None else await self._find(key_id)
        if found is None or not found[0].matches(presented) or not found[0].is_valid(self._clock()):
            # one message for all: which of them it is would help only who guesses
            raise AuthenticationError("the API key is not valid")
        return found[1]

    async def _find(self, key_id: str) -> tuple[Key, Caller] | None:
        known = self._known.get(key_id)
        if known is not None and self._timer() < known[0]:
            return known[1], known[2]
        # requests that come together look it up once; it goes on though the first of them leaves
        looking = self._looking.get(key_id)
        if looking is None:
            looking = asyncio.get_running_loop().create_task(self._look_up(key_id))
            self._looking[key_id] = looking
        return await asyncio.shield(looking)

    async def _look_up(self, key_id: str) -> tuple[Key, Caller] | None:
        is_latest = False
        try:
            row = await self._store.find(key_id)
        finally:
            # a key that was changed meanwhile is not remembered as it was
            if self._looking.get(key_id) is asyncio.current_task():
                is_latest = True
                del self._looking[key_id]
        if row is None:
            return None
        key, tenant = row
        caller = Caller(key.tenant, key.scopes, key.id, tenant.pools)
        if is_latest:
            self._known[key_id] = (self._timer() + CACHE_TTL_S, key, caller)
            self._known.move_to_end(key_id)
            while len(self._known) > CACHE_SIZE:
                self._known.popitem(last=False)
        return key, caller
