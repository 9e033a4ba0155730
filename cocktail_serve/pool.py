"""The pool: a base model and the experts fine-tuned from it, each named by the content of its files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from cocktail_serve.digest import digest_of
from cocktail_serve.dtypes import DType
from cocktail_serve.errors import NotFoundError
from cocktail_serve.generation_settings import (
    NO_OPTIONS,
    NO_SETTINGS,
    ChatTemplate,
    GenerationOptions,
    GenerationSettings,
)
from cocktail_serve.suggestions import did_you_mean

Kind = Literal["decoder", "encoder", "reranker", "encoder_decoder"]

Mode = Literal["merged", "unmerged"]
"""How a mixture reaches the engine. merged: its parameters are summed first, and one recipe is in the engine at a time;
unmerged: the experts' factors stay apart, beside the base's parameters, and each request brings its coefficients."""

BASE = "base"
"""What the base is called in `merging_weights` and `losses`; no expert may take the name."""

NAME_PATTERN = r"[a-z0-9][a-z0-9._-]{0,63}"
"""Names of pools, experts and cocktails."""


def with_article(kind: Kind) -> str:
    """A kind as messages name it: `a decoder`, `an encoder`."""
    return f"{'an' if kind.startswith('e') else 'a'} {kind}"


@dataclass(frozen=True, slots=True)
class FileState:
    """A file as it was when it was read: what a write to it, or another file in its place, changes.

    Attributes:
        changed_ns: the change time, which nobody can set back: copies that keep the modification time move it too.
        digest: BLAKE3 hex of the bytes of a file of settings (`config.json`); empty for one of parameters, whose bytes
            the model's fingerprint is of.
    """

    path: str
    device: int
    inode: int
    num_bytes: int
    modified_ns: int
    changed_ns: int
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Member:
    """A model of a pool: the base or an expert.

    Attributes:
        name: `base`, or the expert's name.
        path: folder with config, tokenizer and safetensors (or weights-only `.bin`).
        fingerprint: SHA-256 hex over names, dtypes, shapes and bytes of the tensors: what the parameters are,
            wherever the folder lies and however it is sharded.
        dtype: what its floating tensors are mixed to where nothing else is said: as they are stored.
        num_bytes: size of the parameters as stored.
        files: the files that the fingerprint is of, as they were then; empty where nobody has looked.
        largest: bound of the magnitudes of its parameters, all of them finite; infinite where it is not known.
        generation: how its folder says that it is called, alone; of decoders.
        quantisation: of a base, how its weights are stored quantised, as `gptq`; None: they are not. Nothing is merged
            into such a base.
        merged_only: of an expert, why no engine can serve it unmerged; None: it is a LoRA adapter that changes nothing
            but products.
    """

    name: str
    path: Path
    fingerprint: str
    dtype: DType
    num_bytes: int
    files: tuple[FileState, ...] = ()
    largest: float = math.inf
    generation: GenerationSettings = NO_SETTINGS
    quantisation: str | None = None
    merged_only: str | None = "nobody has looked whether it is an adapter"


@dataclass(frozen=True, slots=True)
class Pool:
    """A base and its experts: one architecture, one initialisation, one tokenizer. Defined by the operator.

    Attributes:
        text_digest: digest of what stands between text and parameters: tokenizer, chat template, pooling modules,
            prompts. Losses and embeddings depend on it, so it is part of every key they are kept under.
        warnings: what was noticed of its models that does not keep them from being mixed, for the operator.
        chat_template: what messages are rendered by for scoring, for every mixture, and for models that have none of
            their own. Experts that are added later do not change it.
        generation_options: what the operator lays down for all models, those that are added later too.
        mode: how its mixtures reach the engine that serves it. What is known of its models does not depend on it.
    """

    id: str
    kind: Kind
    base: Member
    experts: Mapping[str, Member]
    text_digest: str
    warnings: tuple[str, ...] = field(default=(), compare=False)
    chat_template: ChatTemplate | None = None
    generation_options: GenerationOptions = NO_OPTIONS
    mode: Mode = "merged"

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts", MappingProxyType(dict(sorted(self.experts.items()))))

    def __reduce__(self) -> tuple[Callable[[], Pool], tuple[()]]:
        """Pools travel between processes, and a mapping proxy does not."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return partial(Pool, **{**values, "experts": dict(self.experts)}), ()

    def __iter__(self) -> Iterator[Member]:
        """The base, then the experts by name."""
        yield self.base
        yield from self.experts.values()

    @property
    def members(self) -> dict[str, Member]:
        """All models by name, `base` first."""
        return {member.name: member for member in self}

    @property
    def by_fingerprint(self) -> dict[str, Member]:
        """All models by content, `base` first. Of two names of the same parameters, the first."""
        members: dict[str, Member] = {}
        for member in self:
            members.setdefault(member.fingerprint, member)
        return members

    @property
    def merged_only(self) -> str | None:
        """Why the pool cannot be served unmerged: its first expert of those that cannot; None: it can."""
        for name, member in self.experts.items():
            if member.merged_only is not None:
                return f"expert {name!r}: {member.merged_only}"
        return None

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

    def generation_of(self, member: Member) -> GenerationSettings:
        """How a model of the pool is called alone: as its own folder says, and ended by the base's end tokens too.

        The engine runs the base's folder, whose end tokens it cannot forget: a grammar ends with them, for one.
        """
        own, base = member.generation, self.base.generation
        return replace(
            own,
            stop_token_ids=tuple(sorted({*own.stop_token_ids, *base.stop_token_ids})),
            chat_template=own.chat_template or self.chat_template,
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
                f"pool {self.id!r} has no expert {name!r}; it has: {known}{did_you_mean(name, self.members)}",
                param=param,
                code="expert_not_found",
            ) from None
