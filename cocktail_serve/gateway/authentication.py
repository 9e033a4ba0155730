"""Who a request comes from: its key looked up, compared, and remembered for a few seconds."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cocktail_serve.config import ServerConfig
from cocktail_serve.errors import AuthenticationError, PermissionDeniedError
from cocktail_serve.tenants.keys import DEFAULT_SCOPES, DEFAULT_TENANT, SCOPES, Key, Scope, id_of, key_digest
from cocktail_serve.tenants.store import TenantStore
from cocktail_serve.usage.actor import Actor

logger = logging.getLogger(__name__)

CACHE_TTL_S = 5.0
"""How long a key is taken at its word. What this process revokes or changes holds at once; what another one does (the
command line, another gateway) is seen here after at most this time."""

CACHE_SIZE = 10_000

ADMIN_KEY_ID = "admin"
"""Stands for COCKTAIL_ADMIN_KEY where a key's id is shown."""

PLACEHOLDERS = frozenset({"none", "null", "empty", "dummy", "unused", "no-key", "not-needed", "-", "x"})
"""What people give to a client that insists on a key, for a server that asks for none. In lower case."""

_FORWARDING = frozenset({"forwarded", "via", "x-real-ip", "x-client-ip", "true-client-ip", "cf-connecting-ip"})
"""Headers that proxies add to what they forward, beside `x-forwarded-...`."""


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


OPERATOR = Caller(DEFAULT_TENANT, frozenset(SCOPES), ADMIN_KEY_ID)


class Authenticator:
    """Finds the caller of a request by its key.

    Args:
        server: whether requests need a key; `/admin` always does, and one that is sent is always looked at.
        admin_key: the operator's own, from the environment; None: there is none.
        pools_of: ids of the pools that are there for a tenant now; None: all.
        clock: seconds since the epoch.
        timer: monotonic seconds.
    """

    def __init__(
        self,
        store: TenantStore,
        *,
        server: ServerConfig,
        admin_key: str | None,
        pools_of: Callable[[str], frozenset[str] | None],
        clock: Callable[[], float] = time.time,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._reason_open = server.reason_open
        self._takes_forwarded = server.auth == "off"
        self._pools_of = pools_of
        self._admin_digest = None if admin_key is None else key_digest(admin_key.encode())
        self._clock = clock
        self._timer = timer
        self._known: OrderedDict[str, tuple[float, Key, Caller]] = OrderedDict()
        self._looking: dict[str, asyncio.Task[tuple[Key, Caller] | None]] = {}
        self._has_told_of_proxy = False

    async def caller(self, authorization: str, *, header_names: Iterable[str] = ()) -> Caller:
        """The sender of a request: by its key where it has one, else everybody, where no key is asked for.

        Args:
            authorization: that header; empty: none was sent.
            header_names: of all of the request's headers, in lower case.

        Raises:
            AuthenticationError: a key is required, and there is none; or one was sent that is not valid.
            PermissionDeniedError: a proxy forwards requests to a server that is open only to this machine.
            StorageError: the key could not be looked up.
        """
        if not self._reason_open or _sends_key(authorization):
            return await self._caller_with_key(authorization)
        if not self._takes_forwarded:
            self._refuse_forwarded(header_names)
        return Caller(DEFAULT_TENANT, frozenset(DEFAULT_SCOPES), pools=self._pools_of(DEFAULT_TENANT))

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

    def _refuse_forwarded(self, names: Iterable[str]) -> None:
        name = next((name for name in names if name in _FORWARDING or name.startswith("x-forwarded-")), None)
        if name is None:
            return
        reason = (
            f"the header {name!r} says that a proxy forwarded the request, and this server asks for no key "
            f"({self._reason_open}): whoever reaches the proxy could use it. Set server.auth: required, and send a "
            "key; or server.auth: off, if the proxy keeps strangers out"
        )
        if not self._has_told_of_proxy:
            self._has_told_of_proxy = True
            logger.warning("a request was refused, and those like it are: %s", reason)
        raise PermissionDeniedError(reason)

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
            raise AuthenticationError(f"the API key is not valid{self._how_without}")
        return found[1]

    @property
    def _how_without(self) -> str:
        """What else a client may send, where it need not send a key."""
        if not self._reason_open:
            return ""
        return "; this server asks for none: leave it out, or send 'none' where a client insists on one"

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


def _sends_key(authorization: str) -> bool:
    """Whether a header holds what is meant as a key of ours: not a placeholder, and not what a proxy checked."""
    scheme, _, presented = authorization.strip().partition(" ")
    if scheme.lower() != "bearer":
        presented = "" if presented else scheme  # the key alone, where its scheme was forgotten
    presented = presented.strip()
    return bool(presented) and presented.lower() not in PLACEHOLDERS
