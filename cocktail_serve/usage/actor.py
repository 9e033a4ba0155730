"""Who does something: what the audit log writes beside each change."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Actor:
    """Who does something.

    Attributes:
        tenant: whose key it is; None: nobody's, the operator works on the store itself.
        key_id: None where no key was asked for; `admin` is COCKTAIL_ADMIN_KEY, `cli` the command line, `server` the
            server by itself.
    """

    tenant: str | None
    key_id: str | None


SERVER = Actor(None, "server")

CLI = Actor(None, "cli")
