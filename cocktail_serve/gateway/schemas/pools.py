"""Pools as the API shows them: what they are made of, never where that lies on the server's disk."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, Field

from cocktail_serve.config import PoolConfig
from cocktail_serve.gateway.schemas.generation_settings import GenerationView
from cocktail_serve.pool import BASE, Kind, Member, Mode, Pool


class MemberView(BaseModel):
    id: str = Field(description="What requests name as `model`.")
    fingerprint: str = Field(description="SHA-256 over the parameters.")
    dtype: str
    num_bytes: int
    generation: GenerationView | None = Field(
        description="End tokens, sampling defaults and the chat template's digest, where a request does not say; of "
        "decoders."
    )

    @classmethod
    def of(cls, member: Member, pool: Pool) -> Self:
        return cls(
            id=pool.id if member.name == BASE else f"{pool.id}/{member.name}",
            fingerprint=member.fingerprint,
            dtype=member.dtype,
            num_bytes=member.num_bytes,
            generation=GenerationView.of(pool.generation_of(member)) if pool.kind == "decoder" else None,
        )


class PoolView(BaseModel):
    object: Literal["pool"] = "pool"
    id: str
    kind: Kind
    fingerprint: str = Field(description="Digest of kind, text processing, base and experts.")
    base: MemberView
    experts: dict[str, MemberView]
    engine: str = Field(description="Type of the engine.")
    mode: Mode = Field(
        description="How mixtures reach the engine. unmerged: they share a batch, and methods are linear alone."
    )
    dtype: str = Field(description="dtype that mixtures round to.")
    max_examples: int
    prompts: list[str] = Field(description="What `prompt_name` can be.")
    matryoshka_dimensions: list[int]

    @classmethod
    def of(cls, pool: Pool, config: PoolConfig, *, dtype: str) -> Self:
        return cls(
            id=pool.id,
            kind=pool.kind,
            fingerprint=pool.fingerprint,
            base=MemberView.of(pool.base, pool),
            experts={name: MemberView.of(member, pool) for name, member in pool.experts.items()},
            engine=config.engine.type,
            mode=pool.mode,
            dtype=dtype,
            max_examples=config.max_examples,
            prompts=sorted(config.prompts),
            matryoshka_dimensions=config.matryoshka_dimensions,
        )


class PoolList(BaseModel):
    object: Literal["list"] = "list"
    data: list[PoolView]
