"""What becomes of a base's parameters under an adapter: told from names, shapes and configuration, before any sum."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cocktail_serve.checkpoints.adapters.config import AdapterConfig
from cocktail_serve.checkpoints.adapters.names import BaseNames
from cocktail_serve.checkpoints.adapters.tensors import AdapterPart, sort_tensors
from cocktail_serve.checkpoints.layout import read_config
from cocktail_serve.checkpoints.reader import CheckpointReader, ties_embeddings
from cocktail_serve.checkpoints.tensor_files import TensorSource
from cocktail_serve.errors import CheckpointError, IncompatibleModelsError

CONV1D_MODEL_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
CONV1D_MODULES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})
"""Where transformers has `Conv1D`, a linear layer whose weight is `[in, out]`: modules of these names in models of
these types."""

_IN_A_LAYER = re.compile(r".*\.\d+\..*")
"""Names of parameters that are not tied to others."""


_NOT_PLAIN = {
    re.compile(r"\.experts\."): "it changes experts of a mixture (MoE), which engines compute in one fused product",
    re.compile(r"\.kv_b_proj\."): "it changes a projection of latent attention (MLA), which engines absorb in others",
}
"""Parameters whose layers are no plain products inside an engine, by name, and why."""


@dataclass(frozen=True, slots=True)
class FactorPair:
    """What is added to one parameter: `scaling * up @ down`.

    Attributes:
        down, up: stored names of the factors A and B.
        is_turned: the parameter is `[in, out]`, so the transposed product is added.
        magnitude: DoRA: stored name of the norm that each output's weights are given after the sum.
    """

    down: str
    up: str
    scaling: float
    is_turned: bool
    magnitude: str | None


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of one parameter, in this order.

    Attributes:
        whole: stored name of what takes its place.
        rows: stored name of what takes the place of some of its rows, and which.
        bias: stored name of what is added to it, and the factor.
        pair: what is added as a product.
    """

    whole: str | None = None
    rows: tuple[str, tuple[int, ...]] | None = None
    bias: tuple[str, float] | None = None
    pair: FactorPair | None = None

    @property
    def is_computed(self) -> bool:
        """Whether it is computed, in float32, instead of read as it is stored."""
        return bool(self.rows or self.bias or self.pair)

    @property
    def is_low_rank(self) -> bool:
        """Whether it is a product of two factors that is added, and nothing else."""
        return self.pair is not None and self == Change(pair=replace(self.pair, magnitude=None))


def why_merged(parameter: str, change: Change, shape: tuple[int, ...]) -> str | None:
    """Why a change can only be served merged into the base; None: it is a product beside that of a plain layer.

    Args:
        parameter: the base's stored name.
        shape: the parameter's.
    """
    if change.bias is not None or parameter.endswith(".bias"):
        return "it trained biases"
    if change.whole is not None:
        return "it brings a module trained whole (modules_to_save)"
    if change.rows is not None:
        return "it brings trained tokens (trainable_token_indices)"
    if change.pair is not None and change.pair.magnitude is not None:
        return "it is DoRA, which is no sum of products"
    if len(shape) != 2:
        return "it changes a parameter that is no matrix"
    return next((why for pattern, why in _NOT_PLAIN.items() if pattern.search(parameter)), None)


class ChangeFinder:
    """Finds what an adapter changes.

    Args:
        folder: the adapter's, for messages.
        source: its open file of tensors.
        base: open, too.
    """

    def __init__(
        self,
        folder: Path,
        config: AdapterConfig,
        source: TensorSource,
        base: CheckpointReader,
    ) -> None:
        self._folder = folder
        self._config = config
        self._source = source
        self._infos = source.infos
        self._base = base
        self._names = BaseNames(folder, base)
        self._changes: dict[str, Change] = {}
        self._stored_as: dict[str, str] = {}

    def find(self) -> dict[str, Change]:
        """The changes by the base's parameter.

        Raises:
            CheckpointError: a tensor that is nothing of LoRA, or that the configuration contradicts.
            IncompatibleModelsError: the base lacks a parameter, has it in another shape, or cannot hold what it
                becomes.
        """
        wholes, modules = sort_tensors(self._folder, self._infos)
        for stored, name in wholes.items():
            self._take_whole(self._parameter_of(name), stored)
        for module, parts in modules.items():
            self._take_parts(module, parts)
        self._require_saved_modules(set(wholes.values()))
        for stored in dict.fromkeys(self._stored_as[name] for name in self._changes):
            self._tie(stored)
        return self._changes

    def _take_whole(self, parameter: str, stored: str) -> None:
        before = self._changes.get(parameter, Change()).whole
        if before is not None and not self._is_equal(before, stored):
            raise CheckpointError(f"{self._folder} holds {parameter} twice and differently: {before!r} and {stored!r}")
        self._change(parameter, whole=before or stored)

    def _take_parts(self, module: str, parts: Mapping[AdapterPart, str]) -> None:
        parameter = self._parameter_of(f"{module}.weight")
        if "rows" in parts:
            self._change(parameter, rows=(parts["rows"], self._tokens_of(module, parameter, parts["rows"])))
        if parts.keys() - {"rows"}:
            self._require_parts(module, parts)
            self._change(parameter, pair=self._pair_of(module, parameter, parts))
        if "bias" in parts:
            bias = self._parameter_of(f"{module}.bias")
            if self._infos[parts["bias"]].shape != self._shape_of(bias):
                raise self._misfit(bias, parts["bias"])
            self._change(bias, bias=(parts["bias"], self._config.scaling_of(module)))

    def _change(self, parameter: str, **part: Any) -> None:
        change = self._changes.get(parameter, Change())
        if any(getattr(change, field) not in (None, value) for field, value in part.items()):
            raise CheckpointError(f"{self._folder} changes {parameter} twice, under two names; save it with peft again")
        self._changes[parameter] = replace(change, **part)

    def _require_parts(self, module: str, parts: Mapping[AdapterPart, str]) -> None:
        """peft fills in what a file lacks with random numbers, and passes over what the configuration lacks."""
        if not {"down", "up"} <= parts.keys():
            raise CheckpointError(f"{self._folder}: {module} has only one of the factors lora_A and lora_B")
        is_embedding = parts["down"].endswith("lora_embedding_A")
        wanted: tuple[tuple[AdapterPart, str, bool], ...] = (
            ("magnitude", "use_dora", self._config.is_dora),
            ("bias", "lora_bias", self._config.has_lora_bias and not is_embedding),
        )
        for part, field, is_set in wanted:
            if is_set != (part in parts):
                raise CheckpointError(
                    f"{self._folder}: {self._config.path.name} has {field} {'set' if is_set else 'unset'}, and "
                    f"{module} has {parts.get(part) or 'no such tensor'}; save the adapter with peft again"
                )

    def _pair_of(self, module: str, parameter: str, parts: Mapping[AdapterPart, str]) -> FactorPair:
        down, up = self._infos[parts["down"]].shape, self._infos[parts["up"]].shape
        if not (len(down) == len(up) == 2 and up[1] == down[0]):
            raise self._misfit(parameter, parts["up"], parts["down"])
        rank = self._config.rank_of(module)
        if down[0] != rank:
            raise CheckpointError(
                f"{self._folder}: {self._config.path.name} says rank {rank} for {module}, and its factors have rank "
                f"{down[0]}; peft cannot load it either: set r (or rank_pattern) to what was trained"
            )
        made, weight = (up[0], down[1]), self._shape_of(parameter)
        is_turned = parts["down"].endswith("lora_embedding_A") or self._is_conv1d(module, is_turned_only=made != weight)
        if (made[::-1] if is_turned else made) != weight:
            raise self._misfit(parameter, parts["up"], parts["down"])
        magnitude = parts.get("magnitude")
        if magnitude is not None and self._infos[magnitude].shape != (up[0],):
            raise self._misfit(parameter, magnitude)
        return FactorPair(parts["down"], parts["up"], self._config.scaling_of(module), is_turned, magnitude)

    def _is_conv1d(self, module: str, *, is_turned_only: bool) -> bool:
        """peft looks at the layer and corrects a flag that says otherwise, so the flag decides for no known layer."""
        if self._base_config.get("model_type") in CONV1D_MODEL_TYPES:
            return module.rpartition(".")[2] in CONV1D_MODULES
        return self._config.fan_in_fan_out and is_turned_only

    def _tokens_of(self, module: str, parameter: str, stored: str) -> tuple[int, ...]:
        tokens, rows, weight = self._config.token_indices(module), self._infos[stored].shape, self._shape_of(parameter)
        if tokens is None or not len(tokens) == len(set(tokens)) == rows[0]:
            raise CheckpointError(
                f"{self._folder}: trainable_token_indices of {self._config.path.name} must name a token for each of "
                f"the {rows[0]} rows of {stored!r}; save the adapter with peft again"
            )
        if any(not 0 <= token < weight[0] for token in tokens):
            raise IncompatibleModelsError(
                f"{self._folder} trained token {max(tokens)}, and {parameter} of the base {self._base.folder} has "
                f"{weight[0]}: give the base the same tokens (resize_token_embeddings) and save it"
            )
        if rows[1:] != weight[1:]:
            raise self._misfit(parameter, stored)
        return tuple(tokens)

    def _require_saved_modules(self, names: set[str]) -> None:
        for module in self._config.saved_modules:
            held, saved = (
                any(f".{module}." in f".{name}" for name in group) for group in (self._base.parameters, names)
            )
            if held and not saved:
                raise CheckpointError(
                    f"{self._folder}: {self._config.path.name} says that {module} was trained and saved whole "
                    "(modules_to_save), but the file does not hold it; save the adapter with peft again"
                )

    def _tie(self, stored: str) -> None:
        """What the model ties must become the same in each of its places, for the base has it once."""
        places = [name for name in self._changes if self._stored_as[name] == stored]
        if places == [stored] and _IN_A_LAYER.fullmatch(stored):
            return
        tied = self._names.library.sharing(stored)
        changes = [self._changes.pop(name) for name in places]
        if len(changes) < len(tied) and not self._is_tied_by_peft(places, changes[0]):
            apart = f"{', '.join(places)} apart from what it is tied to ({', '.join(tied)})"
        elif all(self._is_same(changes[0], other) for other in changes[1:]):
            self._changes[stored] = changes[0]
            return
        else:
            apart = f"{' and '.join(places)} differently"
        raise IncompatibleModelsError(
            f"{self._folder} changes {apart}, and the base {self._base.folder} has one parameter for all: "
            + (
                "name a base that holds both (load it with transformers, give lm_head.weight a copy of its own, set "
                "tie_word_embeddings to false in its config and save it), or train with ensure_weight_tying"
                if len(tied) == 2
                else "train it without its embeddings"
            )
        )

    def _is_tied_by_peft(self, places: list[str], change: Change) -> bool:
        """Rows of input embeddings alone: peft changes them wherever the configuration ties these."""
        names = self._names.library
        is_input = [names.name_of(place) for place in places] == [names.input_embeddings]
        return is_input and change == Change(rows=change.rows) and ties_embeddings(self._base.folder)

    def _is_same(self, one: Change, other: Change) -> bool:
        """Whether two places of one parameter become equal."""
        mine, theirs = one.pair, other.pair
        if mine and theirs and (mine.scaling != theirs.scaling or mine.magnitude or theirs.magnitude):
            return False
        if (one.rows and one.rows[1]) != (other.rows and other.rows[1]):
            return False
        # an embedding's factors are those of a linear layer transposed, A for B
        turn = bool(mine and theirs and mine.is_turned != theirs.is_turned)
        down, up = (theirs.down, theirs.up) if theirs else (None, None)
        if turn:
            down, up = up, down
        twins: tuple[tuple[str | None, str | None, bool], ...] = (
            (one.whole, other.whole, False),
            (one.rows[0] if one.rows else None, other.rows[0] if other.rows else None, False),
            (mine.down if mine else None, down, turn),
            (mine.up if mine else None, up, turn),
        )
        return all(
            stored is twin is None
            or (stored is not None and twin is not None and self._is_equal(stored, twin, is_turned=turned))
            for stored, twin, turned in twins
        )

    def _is_equal(self, stored: str, other: str, *, is_turned: bool = False) -> bool:
        one, two = self._source.get_tensor(stored), self._source.get_tensor(other)
        return one.equal(two.T if is_turned else two)

    def _parameter_of(self, name: str) -> str:
        """Where the base has what the model calls so; of what it ties to another, the model's name."""
        place = self._names.place_of(name)
        self._stored_as[place.name] = place.stored
        return place.name

    def _shape_of(self, place: str) -> tuple[int, ...]:
        whole = self._changes.get(place, Change()).whole
        return self._base.parameters[self._stored_as[place]].shape if whole is None else self._infos[whole].shape

    @cached_property
    def _base_config(self) -> Mapping[str, Any]:
        return read_config(self._base.folder)

    def _misfit(self, parameter: str, *stored: str) -> IncompatibleModelsError:
        shapes = " and ".join(f"{list(self._infos[name].shape)} ({name})" for name in stored)
        return IncompatibleModelsError(
            f"tensor {parameter}: the base has {list(self._shape_of(parameter))}, the adapter {self._folder} has "
            f"{shapes}; it is the adapter of another model"
        )
