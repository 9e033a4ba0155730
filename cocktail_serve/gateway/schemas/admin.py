"""Keys and tenants as the operator sees them."""

from __future__ import annotations

import time
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from cocktail_serve.config import Limits
from cocktail_serve.tenants.keys import DEFAULT_SCOPES, Key, Scope
from cocktail_serve.tenants.store import Tenant

MAX_LIFETIME_S = 10 * 366 * 86400.0


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class KeyBody(_Body):
    """Body of `POST /admin/keys`."""

    tenant: str = Field(description="Whose it is; made if there is none of that name.")
    scopes: list[Scope] = Field(list(DEFAULT_SCOPES), min_length=1, description="What it may do.")
    expires_in_s: float | None = Field(
        None, gt=0, le=MAX_LIFETIME_S, allow_inf_nan=False, description="Seconds that it is valid; null: no end."
    )


class RotationBody(_Body):
    """Body of `POST /admin/keys/{id}/rotate`."""

    overlap_s: float = Field(
        86400.0,
        ge=0,
        le=MAX_LIFETIME_S,
        allow_inf_nan=False,
        description="Seconds that the old key stays valid, so that clients can change over; 0 ends it at once.",
    )


class TenantBody(_Body):
    """Body of `PUT /admin/tenants/{name}`. What is left out stays as it is."""

    pools: list[str] | None = Field(None, description="Ids of the pools it may use; null: all.")
    limits: Limits | None = Field(
        None,
        description="Limits that are not the configuration's: a number, or null for none. Limits left out of it, and "
        "all with null, are the configuration's.",
    )

    @property
    def changes(self) -> dict[str, Any]:
        """What is to be changed, as `TenantStore.change_tenant` takes it."""
        changes: dict[str, Any] = {}
        if "pools" in self.model_fields_set:
            changes["pools"] = self.pools
        if "limits" in self.model_fields_set:
            changes["limits"] = None if self.limits is None else self.limits.model_dump(exclude_unset=True)
        return changes


class KeyView(BaseModel):
    object: Literal["key"] = "key"
    id: str = Field(description="The visible part: `ck-<id>-...`.")
    tenant: str
    scopes: list[Scope]
    status: Literal["active", "expired", "revoked"]
    created_at: int = Field(description="Unix time, seconds.")
    expires_at: int | None
    revoked_at: int | None

    @classmethod
    def of(cls, key: Key) -> Self:
        status: Literal["active", "expired", "revoked"] = "revoked" if key.revoked_at is not None else "expired"
        return cls(
            id=key.id,
            tenant=key.tenant,
            scopes=sorted(key.scopes),
            status="active" if key.is_valid(time.time()) else status,
            created_at=int(key.created_at),
            expires_at=None if key.expires_at is None else int(key.expires_at),
            revoked_at=None if key.revoked_at is None else int(key.revoked_at),
        )


class CreatedKey(KeyView):
    key: str = Field(description="The key itself, shown this once.")

    @classmethod
    def made(cls, key: Key, secret: str) -> Self:
        return cls(**KeyView.of(key).model_dump(), key=secret)


class KeyList(BaseModel):
    object: Literal["list"] = "list"
    data: list[KeyView]


class TenantView(BaseModel):
    object: Literal["tenant"] = "tenant"
    name: str
    pools: list[str] | None = Field(description="Ids of the pools it may use; null: all.")
    limits: dict[str, int | None] = Field(description="Its limits; null: none.")
    own_limits: list[str] = Field(description="Those of them that are not the configuration's.")
    created_at: int = Field(description="Unix time, seconds.")

    @classmethod
    def of(cls, tenant: Tenant, limits: Limits) -> Self:
        return cls(
            name=tenant.name,
            pools=None if tenant.pools is None else sorted(tenant.pools),
            limits=limits.model_dump(),
            own_limits=sorted(tenant.limits or ()),
            created_at=int(tenant.created_at),
        )


class TenantList(BaseModel):
    object: Literal["list"] = "list"
    data: list[TenantView]
