"""The pool: a base model and the experts fine-tuned from it, each named by the content of its files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from cocktail_serve.digest import digest_of
from cocktail_serve.errors import NotFoundError

Kind = Literal["decoder", "encoder", "reranker", "encoder_decoder"]

BASE = "base"
"""What the base is called in `merging_weights` and `losses`; no expert may take the name."""

NAME_PATTERN = r"[a-z0-9][a-z0-9._-]{0,63}"
"""Names of pools, experts and cocktails."""


def with_article(kind: Kind) -> str:
    """A kind as messages name it: `a decoder`, `an encoder`."""
    return f"{'an' if kind.startswith('e') else 'a'} {kind}"


@dataclass(frozen=True, slots=True)
class Member:
    """A model of a pool: the base or an expert.

    Attributes:
        name: `base`, or the expert's name.
        path: folder with config, tokenizer and safetensors (or weights-only `.bin`).
        fingerprint: SHA-256 hex over names, dtypes, shapes and bytes of the tensors: what the parameters are,
            wherever the folder lies and however it is sharded.
        dtype: dtype of the floating tensors as stored: `float32`, `float16` or `bfloat16`.
        num_bytes: size of the parameters as stored.
    """

    name: str
    path: Path
    fingerprint: str
    dtype: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Pool:
    """A base and its experts: one architecture, one initialisation, one tokenizer. Defined by the operator.

    Attributes:
        text_digest: digest of what stands between text and parameters: tokenizer, chat template, pooling modules,
            prompts. Losses and embeddings depend on it, so it is part of every key they are kept under.
    """

    id: str
    kind: Kind
    base: Member
    experts: Mapping[str, Member]
    text_digest: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts", MappingProxyType(dict(sorted(self.experts.items()))))

    def __iter__(self) -> Iterator[Member]:
        """The base, then the experts by name."""
        yield self.base
        yield from self.experts.values()

    @property
    def members(self) -> dict[str, Member]:
        """All models by name, `base` first."""
        return {member.name: member for member in self}

    @property
    def folders(self) -> dict[str, Path]:
        """Folder of each model by fingerprint. Of several with the same parameters the first stands for all: the base
        before any expert, since servers are started on its folder."""
        return {member.fingerprint: member.path for member in reversed(list(self))}

    @property
    def fingerprint(self) -> str:
        """Digest of kind, text processing, base and experts by content and name."""
        return digest_of(
            {
                "kind": self.kind,
                "text": self.text_digest,
                "base": self.base.fingerprint,
                "experts": {name: member.fingerprint for name, member in self.experts.items()},
            }
        )

    def member(self, name: str, *, param: str | None = None) -> Member:
        """The base or an expert by name.

        Raises:
            NotFoundError: the pool has no such model; the message lists those it has.
        """
        if name == BASE:
            return self.base
        try:
            return self.experts[name]
        except KeyError:
            known = ", ".join(self.members)
            raise NotFoundError(
                f"pool {self.id!r} has no expert {name!r}; it has: {known}", param=param, code="expert_not_found"
            ) from None
