"""Engines and experts as the operator sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from cocktail_serve.cocktails.experts import Added
from cocktail_serve.config import EngineConfig
from cocktail_serve.engines.scheduler_snapshot import Phase, Queue, WaitReason
from cocktail_serve.engines.snapshot import EngineSnapshot, EngineState, RestartProgress
from cocktail_serve.pool import Kind, Member, Mode, Pool
from cocktail_serve.tenants.keys import DEFAULT_TENANT

Names = Mapping[str, Sequence[tuple[str | None, str]]]
"""Tenant and model id of all that a recipe is served as, by its digest."""


class EngineBody(BaseModel):
    """Body of `POST /admin/engines/{id}`: what is left out stays as it is."""

    model_config = ConfigDict(extra="forbid", strict=True)

    drain: bool | None = Field(
        None, description="true: what is in flight finishes, and nobody is let in (503); false: requests are let in."
    )
    pin: str | None = Field(
        None,
        description="Model id of the pool that keeps its turn, while requests for others get 503; null: turns again.",
    )
    tenant: str = Field(DEFAULT_TENANT, description="Whose cocktail `pin` names.")
    replica: int | None = Field(None, ge=0, description="Number of the one replica that is meant; omitted: all.")


class RestartBody(BaseModel):
    """Body of `POST /admin/engines/{id}/restart`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    drain_s: float = Field(
        600.0,
        ge=0,
        le=86_400,
        description="How long what a replica has in flight may take before it is ended with an error, seconds.",
    )


class ExpertBody(BaseModel):
    """Body of `POST /admin/pools/{id}/experts`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(description="Name of the expert; requests then name `<pool>/<name>`.")
    path: str = Field(
        max_length=4096,
        description="Folder of the model: absolute, or relative to one of the folders of server.expert_roots.",
    )


class NamedModel(BaseModel):
    id: str
    tenant: str | None = Field(description="Whose cocktail it is; null: a model of the pool.")


class EngineRecipeView(BaseModel):
    recipe: str = Field(description="Digest of the recipe.")
    models: list[NamedModel] = Field(description="What it is served as; empty: it is only scored.")

    @classmethod
    def of(cls, digest: str, names: Names) -> Self:
        return cls(recipe=digest, models=[NamedModel(id=name, tenant=tenant) for tenant, name in names.get(digest, ())])


class QueueView(EngineRecipeView):
    waiting: int = Field(description="Requests.")
    background: int = Field(description="Scoring and mixing ahead.")
    oldest_s: float = Field(description="How long the first of them has waited, seconds.")
    reason: WaitReason = Field(description="Why they wait.")

    @classmethod
    def of_queue(cls, queue: Queue, names: Names) -> Self:
        return cls(
            **dict(EngineRecipeView.of(queue.recipe_digest, names)),
            waiting=queue.num_waiting,
            background=queue.num_background,
            oldest_s=round(queue.oldest_s, 3),
            reason=queue.reason,
        )


class EngineActivity(BaseModel):
    """What one engine does, or all engines of a pool together."""

    state: EngineState
    detail: dict[str, Any] = Field(
        description="Why it is not ready, with the last lines of a server that did not start; or its mixing path."
    )
    phase: Phase | None = Field(description="Of the turn; null where recipes take none, or each replica has its own.")
    resident: EngineRecipeView | None = Field(
        description="What is in the engine now, where it holds one recipe at a time."
    )
    turn_s: float | None = Field(description="Age of the turn, seconds.")
    in_flight: int
    queues: list[QueueView] = Field(description="Who waits, by recipe, the longest waiting first.")
    pinned: EngineRecipeView | None
    drained: bool
    swaps: int = Field(description="Mixes that made another recipe resident, since the gateway started.")
    last_swap_s: float | None = Field(description="Seconds of the last of them.")
    restarts: int = Field(description="Times that it was lost and started again.")

    @staticmethod
    def fields_of(snapshot: EngineSnapshot, names: Names) -> dict[str, Any]:
        scheduler, counters = snapshot.scheduler, snapshot.counters
        return {
            "state": snapshot.state,
            "detail": dict(snapshot.detail),
            "phase": scheduler.phase,
            "resident": None if scheduler.resident is None else EngineRecipeView.of(scheduler.resident, names),
            "turn_s": None if scheduler.turn_s is None else round(scheduler.turn_s, 3),
            "in_flight": scheduler.num_in_flight,
            "queues": [QueueView.of_queue(queue, names) for queue in scheduler.queues],
            "pinned": None if scheduler.pinned is None else EngineRecipeView.of(scheduler.pinned, names),
            "drained": scheduler.is_drained,
            "swaps": counters.swap.count,
            "last_swap_s": counters.last_swap_s,
            "restarts": counters.num_restarts,
        }


class ReplicaView(EngineActivity):
    replica: int = Field(description="Its number, from 0.")
    node: str = Field(description="Name of its machine; empty: it computes in the gateway's process.")

    @classmethod
    def of(cls, number: int, snapshot: EngineSnapshot, names: Names) -> Self:
        return cls(replica=number, node=snapshot.node, **cls.fields_of(snapshot, names))


class RestartView(BaseModel):
    """How far the last restart is."""

    done: int = Field(description="Replicas that were started again.")
    total: int
    replica: int | None = Field(description="The one that is being restarted; null: it has ended.")
    error: str | None = Field(description="Why it was given up; null: it was not.")

    @classmethod
    def of(cls, progress: RestartProgress) -> Self:
        return cls(done=progress.num_done, total=progress.num_total, replica=progress.replica, error=progress.error)


class EngineView(EngineActivity):
    object: Literal["engine"] = "engine"
    id: str = Field(description="Id of its pool.")
    kind: Kind
    type: str
    mode: Mode = Field(description="How mixtures reach it: merged, one recipe at a time, or unmerged, in one batch.")
    mode_reason: str | None = Field(description="Why it is this one; null where there is no other.")
    replicas: list[ReplicaView] = Field(description="Each engine of the pool; what is said above is of all together.")
    restart: RestartView | None = Field(description="Of the replicas, one after the other; null: there was none.")

    @classmethod
    def of(cls, pool: Pool, config: EngineConfig, *, snapshot: EngineSnapshot, names: Names) -> Self:
        return cls(
            id=pool.id,
            kind=pool.kind,
            type=config.type,
            mode=pool.mode,
            mode_reason=config.reason_of_mode(pool),
            replicas=[ReplicaView.of(number, one, names) for number, one in enumerate(snapshot.each)],
            restart=None if snapshot.restart is None else RestartView.of(snapshot.restart),
            **cls.fields_of(snapshot, names),
        )


class EngineList(BaseModel):
    object: Literal["list"] = "list"
    data: list[EngineView]


class ExpertView(BaseModel):
    object: Literal["expert"] = "expert"
    id: str = Field(description="What requests name as `model`.")
    pool: str
    name: str
    path: str = Field(description="Folder of the model on the server.")
    fingerprint: str = Field(description="SHA-256 over the parameters.")
    dtype: str
    num_bytes: int
    source: Literal["config", "admin"] = Field(description="How it came in; only the latter can be deleted.")
    added_at: int | None = Field(description="Unix time, seconds.")

    @classmethod
    def of(cls, pool_id: str, member: Member, added: Added | None) -> Self:
        return cls(
            id=f"{pool_id}/{member.name}",
            pool=pool_id,
            name=member.name,
            path=str(member.path),
            fingerprint=member.fingerprint,
            dtype=member.dtype,
            num_bytes=member.num_bytes,
            source="config" if added is None else "admin",
            added_at=None if added is None else int(added.added_at),
        )


class ExpertList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ExpertView]


class DeletedExpert(BaseModel):
    object: Literal["expert.deleted"] = "expert.deleted"
    id: str
    deleted: Literal[True] = True
