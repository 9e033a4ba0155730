"""Usage and the audit log, as they are shown."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, Field

from cocktail_serve.gateway.schemas.pages import Listed, PageView
from cocktail_serve.usage.audit import Action, AuditEvent
from cocktail_serve.usage.store import AMOUNTS, Group, UsageRow


class UsageView(BaseModel):
    """A sum; what it was not kept apart by is null."""

    object: Literal["usage"] = "usage"
    day: str | None = Field(description="UTC, as 2026-01-31.")
    tenant: str | None
    key: str | None = Field(description="Id of the key; empty where none was asked for.")
    model: str | None = Field(description="The model that answered: a cocktail's is `name@digest8`.")
    pool: str | None
    requests: int = Field(description="Answers, those that broke off too.")
    tokens_in: int = Field(description="Tokens read, as the engine said.")
    tokens_out: int = Field(description="Tokens generated, likewise; of embeddings and reranking none.")
    scoring_s: float = Field(description="Seconds that scoring examples held the engine.")
    mixing_s: float = Field(description="Seconds of mixing for jobs.")

    @classmethod
    def of(cls, row: UsageRow) -> Self:
        return cls(
            day=None if row.day is None else row.day.isoformat(),
            tenant=row.tenant,
            key=row.key,
            model=row.model,
            pool=row.pool,
            requests=row.use.requests,
            tokens_in=row.use.tokens_in,
            tokens_out=row.use.tokens_out,
            scoring_s=round(row.use.scoring_s, 3),
            mixing_s=round(row.use.mixing_s, 3),
        )


class UsageList(BaseModel):
    object: Literal["list"] = "list"
    data: list[UsageView]


def usage_csv(rows: Iterable[UsageRow], group_by: Sequence[Group]) -> str:
    """Usage as CSV: a line of names, then one for each sum."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*dict.fromkeys(group_by), *AMOUNTS], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(UsageView.of(row).model_dump() for row in rows)
    return text.getvalue()


class ActorView(BaseModel):
    tenant: str | None = Field(description="Whose key it was.")
    key: str | None = Field(
        description="Id of the key: `admin` is the operator's own, `cli` the command line, `server` the server by "
        "itself; null where none was asked for."
    )


class AuditEventView(Listed):
    """A change: who made it, to what, when."""

    object: Literal["audit.event"] = "audit.event"
    created_at: float = Field(description="Unix time, seconds.")
    actor: ActorView
    action: Action
    tenant: str | None = Field(description="Whom it concerns; null: all.")
    subject: str = Field(description="What was changed: a version, a name, a key, a tenant, an expert.")
    detail: dict[str, Any] = Field(description="Digests, experts and coefficients of a cocktail, and the like.")

    @classmethod
    def of(cls, event: AuditEvent) -> Self:
        return cls(
            id=event.id,
            created_at=event.at,
            actor=ActorView(tenant=event.actor.tenant, key=event.actor.key_id),
            action=event.action,
            tenant=event.tenant,
            subject=event.subject,
            detail=dict(event.detail),
        )


class AuditEventList(PageView[AuditEventView]):
    """The newest first, unless asked otherwise."""
