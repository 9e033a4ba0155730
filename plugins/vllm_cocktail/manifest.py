"""The manifest: which folders the plugin may mix, and what is resident when the server starts.

Written by the owner of the vLLM process, read by the plugin in every process of the server. Imports no vLLM.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from cocktail_serve.dtypes import MIXED_AS, DType
from cocktail_serve.errors import ConfigError, InvalidMixError
from cocktail_serve.pool import BASE, FileState, Member, Mode, Pool
from cocktail_serve.recipe import Recipe, make_recipe, one_hot

MANIFEST_VARIABLE = "VLLM_COCKTAIL_MANIFEST"
"""Environment variable with the path of the manifest."""

OWNER_VARIABLE = "VLLM_COCKTAIL_OWNER_PID"
"""Environment variable with the process that the server dies with."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Models that one vLLM server may mix.

    Attributes:
        members: by fingerprint, the base among them, each with its files as they were when it was named so.
        base: fingerprint of the base, the model that the server is started with.
        dtype: dtype of the engine's parameters, which every recipe must round to.
        resident: digest of the recipe whose parameters the server starts with: the base alone.
        cache_bytes: bound of the merged parameters kept in memory, over all ranks of the server together.
        managed: whether a gateway owns the server. Then every request names its recipe and salts its KV blocks;
            otherwise requests may come without, and every mix drops the prefix cache.
        expert_bytes: bound of the models kept in the engine's layout, over all ranks together; 0 keeps none.
        names: fingerprint by name, for recipes written by hand; `base` and the experts' names.
        mode: how mixtures reach the engine. Where they are unmerged, `resident` stays what it is: the parameters beside
            which the experts' factors are.
    """

    members: Mapping[str, Member]
    base: str
    dtype: DType
    resident: str
    cache_bytes: int
    managed: bool
    expert_bytes: int = 0
    names: Mapping[str, str] = field(default_factory=dict)
    mode: Mode = "merged"

    @classmethod
    def of_pool(cls, pool: Pool, *, dtype: DType, cache_bytes: int, managed: bool, expert_bytes: int = 0) -> Manifest:
        """The manifest of a pool whose server is started with its base."""
        return cls(
            members=pool.by_fingerprint,
            base=pool.base.fingerprint,
            dtype=dtype,
            resident=one_hot(pool, pool.base.name, dtype=dtype, mode="merged").digest,
            cache_bytes=cache_bytes,
            managed=managed,
            expert_bytes=expert_bytes,
            names={member.name: member.fingerprint for member in pool},
            mode=pool.mode,
        )

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Reads what `write` wrote.

        Raises:
            ConfigError: no such file, or one that is not a manifest; names the field.
        """
        try:
            value = json.loads(path.read_text())
            manifest = cls(
                members={member.fingerprint: member for member in map(_read_member, value["members"])},
                base=str(value["base"]),
                dtype=value["dtype"],
                resident=str(value["resident"]),
                cache_bytes=int(value["cache_bytes"]),
                managed=bool(value["managed"]),
                expert_bytes=int(value.get("expert_bytes", 0)),
                names={str(name): str(f) for name, f in value.get("names", {}).items()},
                mode=value.get("mode", "merged"),
            )
        except OSError as error:
            raise ConfigError(f"cannot read the manifest {path}: {error}") from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path} is not a manifest of vllm_cocktail: {error!r}") from error
        manifest._check(path)
        return manifest

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> Manifest:
        """The manifest that this process was started with.

        Raises:
            ConfigError: the variable is not set, or the file is not a manifest.
        """
        path = environ.get(MANIFEST_VARIABLE)
        if not path:
            raise ConfigError(
                f"{MANIFEST_VARIABLE} is not set: it must hold the path of a manifest; "
                "write one with `python -m vllm_cocktail --out pool.json ...`"
            )
        return cls.read(Path(path))

    def write(self, path: Path) -> Path:
        """Writes the file that `read` reads; in one step, so that no process sees half of it."""
        partial = path.with_name(path.name + ".partial")
        try:
            partial.write_text(json.dumps(self.to_json(), indent=2) + "\n")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    def to_json(self) -> dict[str, Any]:
        """The JSON value that stands in the file."""
        return {
            "members": [{**asdict(member), "path": str(member.path)} for member in self.members.values()],
            "base": self.base,
            "dtype": self.dtype,
            "resident": self.resident,
            "cache_bytes": self.cache_bytes,
            "managed": self.managed,
            "expert_bytes": self.expert_bytes,
            "names": dict(self.names),
            "mode": self.mode,
        }

    def recipe(
        self,
        merging_weights: Mapping[str, float],
        *,
        method: str = "linear",
        method_params: Mapping[str, Any] | None = None,
    ) -> Recipe:
        """The recipe of weights given by name.

        Raises:
            NotFoundError: a name is not in the manifest; lists those that are.
            InvalidMixError: as `make_recipe`; or a manifest without names.
        """
        members = {name: replace(self.members[f], name=name) for name, f in self.names.items()}
        base = members.pop(BASE, None)
        if base is None:
            raise InvalidMixError(
                "the manifest gives no names; send a recipe instead of merging_weights", param="recipe"
            )
        pool = Pool(id="manifest", kind="decoder", base=base, experts=members, text_digest="", mode=self.mode)
        return make_recipe(pool, merging_weights, dtype=self.dtype, method=method, method_params=method_params)

    def _check(self, path: Path) -> None:
        if self.dtype not in get_args(DType):
            raise ConfigError(f"{path}: dtype {self.dtype!r} is not one of {', '.join(get_args(DType))}")
        if self.mode not in get_args(Mode):
            raise ConfigError(f"{path}: mode {self.mode!r} is not one of {', '.join(get_args(Mode))}")
        if self.base not in self.members:
            raise ConfigError(f"{path}: the base {self.base!r} is not among the members")
        if unknown := sorted(set(self.names.values()) - set(self.members)):
            raise ConfigError(f"{path}: names refer to {unknown[0]!r}, which is not among the members")
        alone = Recipe(base=self.base, coefficients=((self.base, 1.0),), dtype=self.dtype).digest
        if self.resident != alone:
            raise ConfigError(f"{path}: resident must be {alone}, the recipe of the base alone, got {self.resident!r}")
        if self.names and self.names.get(BASE) != self.base:
            raise ConfigError(f"{path}: names must call the base {BASE!r}")
        for name in ("cache_bytes", "expert_bytes"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{path}: {name} must not be negative, got {getattr(self, name)}")


def _read_member(value: Mapping[str, Any]) -> Member:
    """Raises AttributeError, KeyError, TypeError or ValueError where it is none."""
    return Member(
        name=str(value["name"]),
        path=Path(value["path"]),
        fingerprint=str(value["fingerprint"]),
        dtype=MIXED_AS[value["dtype"]],
        num_bytes=int(value["num_bytes"]),
        files=tuple(FileState(**file) for file in value["files"]),
        largest=float(value["largest"]),
        quantisation=value.get("quantisation"),
    )
