"""The pools that models found in folders make: which is whose base, and what the configuration of each says."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cocktail_serve.checkpoints.compatibility import compare
from cocktail_serve.checkpoints.model_config import open_model_config
from cocktail_serve.checkpoints.model_folders import LeftOut, ModelFolder
from cocktail_serve.checkpoints.reader import CheckpointReader
from cocktail_serve.checkpoints.tokenizer import FolderTokenizer
from cocktail_serve.errors import CocktailError, ConfigError
from cocktail_serve.pool import BASE, NAME_PATTERN, Kind
from cocktail_serve.progress import OnProgress

if TYPE_CHECKING:
    from torch import Tensor

MAX_CONTEXT = 8192
"""Longest context in tokens that is proposed: of 128k tokens one alone may fill the KV cache of a small machine."""

_ENGINES: Mapping[Kind, str] = {
    "decoder": "vllm",
    "encoder": "sentence_transformers",
    "reranker": "sentence_transformers",
}

_SAMPLED_TENSORS = 8
_SAMPLED_NUMEL = 1 << 22
"""Tensors, and elements of each at most, that distances between models are measured on."""

_MARGIN = 0.1
"""Least difference of mean cosines by which the middle of some models is told from the others."""


@dataclass(slots=True)
class ProposedPool:
    """A base and what was fine-tuned from it.

    Attributes:
        why: what says that this one is the base.
        experts: by name.
    """

    id: str
    kind: Kind
    base: ModelFolder
    why: str
    experts: dict[str, ModelFolder] = field(default_factory=dict)

    def section(self, beside: Path, *, gpu_share: float | None = None) -> dict[str, Any]:
        """Its entry of `pools`; paths are relative to a folder that they lie under, and whole otherwise.

        Args:
            beside: where the configuration will lie.
            gpu_share: of a GPU's memory, for a decoder pool among several; None: vLLM's own default.

        Raises:
            CheckpointError: transformers cannot read the base's configuration.
        """
        engine: dict[str, Any] = {"type": _ENGINES[self.kind]}
        if self.kind == "decoder":
            own = getattr(open_model_config(self.base.folder).get_text_config(), "max_position_embeddings", None)
            if isinstance(own, int) and own > MAX_CONTEXT:
                engine["max_model_len"] = MAX_CONTEXT
            if gpu_share is not None:
                engine["args"] = {"gpu-memory-utilization": gpu_share}
        return {
            "id": self.id,
            "kind": self.kind,
            "base": _path_from(beside, self.base.folder),
            "experts": {name: _path_from(beside, model.folder) for name, model in self.experts.items()},
            "engine": engine,
        }


@dataclass(slots=True)
class Proposal:
    """Pools, and the models that are in none.

    Attributes:
        warnings: what the operator should look at, for what is in a pool.
    """

    pools: list[ProposedPool]
    left_out: list[LeftOut]
    warnings: list[str]


def propose(models: Sequence[ModelFolder], *, bases: Sequence[Path] = (), report: OnProgress) -> Proposal:
    """Sorts models into pools. Full models are in one where they can be mixed; which of them is the base is told, in
    this order, by the operator, by what the others' files name, and, of three and more, by where they lie: experts that
    were trained apart lie around what they were trained from.

    Args:
        bases: folders that the operator says are bases.

    Raises:
        ConfigError: one of `bases` is none of the full models.
    """
    said = {folder.resolve() for folder in bases}
    if unknown := said - {model.folder for model in models if not model.is_adapter}:
        raise ConfigError(f"--base {min(unknown)} is no model of these folders that could be a base", param="base")
    return _Sorter(models, said, report).sort()


class _Sorter:
    def __init__(self, models: Sequence[ModelFolder], said: set[Path], report: OnProgress) -> None:
        self._full = [model for model in models if not model.is_adapter]
        self._adapters = [model for model in models if model.is_adapter]
        self._said = said
        self._report = report
        self._left_out: list[LeftOut] = []
        self._warnings: list[str] = []
        self._tokenizers: dict[Path, FolderTokenizer] = {}
        self._num_compared = 0

    def sort(self) -> Proposal:
        pools: list[ProposedPool] = []
        for group in self._groups():
            chosen = self._base_of(group)
            if chosen is None:
                names = " and ".join(str(model.folder) for model in group[:2])
                self._leave_out(group, f"nothing says which is the base of {names}: name it with --base")
                continue
            base, why = chosen
            assert base.kind is not None
            pool = ProposedPool(_free(base.name, "pool", {each.id for each in pools}), base.kind, base, why)
            for model in group:
                if model is not base:
                    self._add(pool, model)
            pools.append(pool)
        for adapter in self._adapters:
            self._place(adapter, pools)
        for pool in pools:
            if not pool.experts:
                self._leave_out([pool.base], "nothing among these folders was fine-tuned from it")
        self._report("comparing models", self._num_compared, self._num_compared)
        return Proposal([pool for pool in pools if pool.experts], self._left_out, self._warnings)

    def _groups(self) -> Iterator[list[ModelFolder]]:
        """Full models that can be mixed with each other, bases that are named first."""
        groups: list[list[ModelFolder]] = []
        for model in sorted(self._full, key=lambda model: (-self._votes(model), str(model.folder))):
            if model.kind == "encoder_decoder":
                why = "no engine serves encoder-decoders: see `weigh` and `mix`, with engine.type offline"
                self._leave_out([model], why)
                continue
            for group in groups:
                if group[0].kind == model.kind and self._why_unlike(group[0], model) is None:
                    group.append(model)
                    break
            else:
                groups.append([model])
        yield from groups

    def _votes(self, model: ModelFolder) -> int:
        """How many others' files name it as what they were made of; the operator's word is more than all of them."""
        others = (other for other in (*self._full, *self._adapters) if other is not model)
        named = sum(any(map(model.is_called, other.made_of)) for other in others)
        return len(self._full) + len(self._adapters) if model.folder in self._said else named

    def _base_of(self, group: Sequence[ModelFolder]) -> tuple[ModelFolder, str] | None:
        if len(group) == 1:
            return group[0], "no other full model is like it"
        votes = {model.folder: self._votes(model) for model in group}
        first, second = sorted(group, key=lambda model: -votes[model.folder])[:2]
        if votes[first.folder] > votes[second.folder]:
            return first, "as --base says" if first.folder in self._said else f"named by {votes[first.folder]} of them"
        called = [model for model in group if model.folder.name == BASE]
        if len(called) == 1:
            return called[0], "its folder is called base"
        middle = self._middle_of(group) if len(group) > 2 else None
        return None if middle is None else (middle, "the others lie around it")

    def _middle_of(self, group: Sequence[ModelFolder]) -> ModelFolder | None:
        """The model from which the differences to the others are nearly at right angles; None: none stands out."""
        distances = self._distances(group)

        def mean_cosine(center: ModelFolder) -> float:
            others = [model for model in group if model is not center]
            cosines = []
            for one, other in itertools.combinations(others, 2):
                a, b, c = (distances[_pair(*p)] for p in ((center, one), (center, other), (one, other)))
                cosines.append((a + b - c) / (2 * (a * b) ** 0.5) if a and b else 1.0)
            return sum(cosines) / len(cosines)

        by_cosine = sorted((mean_cosine(model), index) for index, model in enumerate(group))
        return group[by_cosine[0][1]] if by_cosine[1][0] - by_cosine[0][0] >= _MARGIN else None

    def _distances(self, group: Sequence[ModelFolder]) -> dict[frozenset[Path], float]:
        """Squared distances of each two models, on a sample of their tensors."""
        with CheckpointReader(group[0].folder) as first:
            names = [n for n, i in first.parameters.items() if i.is_floating and 1 < i.num_elements <= _SAMPLED_NUMEL]
            names = [name for name in names if len(first.parameters[name].shape) > 1] or names
            names = names[:: max(1, len(names) // _SAMPLED_TENSORS)][:_SAMPLED_TENSORS]
            sums = dict.fromkeys((_pair(*pair) for pair in itertools.combinations(group, 2)), 0.0)
            for done, name in enumerate(names, start=1):
                tensors = {model.folder: _tensor(model, name, first) for model in group}
                for one, other in itertools.combinations(group, 2):
                    difference = tensors[one.folder] - tensors[other.folder]
                    sums[_pair(one, other)] += difference.square().sum().item()
                self._report("looking for the base", done, len(names))
        return sums

    def _place(self, adapter: ModelFolder, pools: Sequence[ProposedPool]) -> None:
        """Puts an adapter into the pool whose base its files name, else into the one that it fits."""
        named = [pool for pool in pools if any(map(pool.base.is_called, adapter.made_of))]
        if not named:
            over = next((model for model in self._full if any(map(model.is_called, adapter.made_of))), None)
            if over is not None:
                self._leave_out([adapter], f"it was trained over {over.folder}, which is no base here")
                return
        tried = named or pools
        refusals = [(pool, self._why_unlike(pool.base, adapter)) for pool in tried]
        fitting = [pool for pool, why in refusals if why is None]
        if len(fitting) == 1:
            self._add(fitting[0], adapter, is_checked=True)
            if adapter.made_of and not named:
                self._warnings.append(
                    f"{adapter.folder} says that it was trained over {adapter.made_of[0]}; it has the form of "
                    f"{fitting[0].base.folder} and is taken for one of its adapters: make sure that it is one"
                )
            return
        made_of = f"it was trained over {adapter.made_of[0]}" if adapter.made_of else "it does not say over which base"
        if fitting:
            names = ", ".join(pool.base.folder.name for pool in fitting)
            why = f"{made_of}, and fits several: {names}; leave the others out, or rename the right one's folder so"
        elif len(refusals) == 1:
            why = str(refusals[0][1])
        else:
            why = f"{made_of}, and no base among these folders takes it"
        self._leave_out([adapter], why)

    def _add(self, pool: ProposedPool, model: ModelFolder, *, is_checked: bool = False) -> None:
        why = None if is_checked else self._why_unlike(pool.base, model)
        if why is None:
            pool.experts[_free(model.name, "expert", {BASE, *pool.experts})] = model
        else:
            self._leave_out([model], why)

    def _why_unlike(self, base: ModelFolder, model: ModelFolder) -> str | None:
        """Why a model cannot be mixed with a base; None: it can."""
        self._num_compared += 1
        self._report("comparing models", self._num_compared, self._num_compared + 1)
        try:
            tokenizer = self._tokenizers.setdefault(base.folder, FolderTokenizer(base.folder))
            problems = compare(base.folder, model.folder, tokenizer=tokenizer).problems
        except CocktailError as error:
            return error.message
        return None if not problems else f"not like {base.folder.name}: {problems[0]}"

    def _leave_out(self, models: Sequence[ModelFolder], why: str) -> None:
        self._left_out += [LeftOut(model.folder, why) for model in models]


def _tensor(model: ModelFolder, name: str, first: CheckpointReader) -> Tensor:
    """In float32, by its name in the first model of the group."""
    with CheckpointReader(model.folder) as reader:
        return reader.named_as(first).get(name).float()


def _pair(one: ModelFolder, other: ModelFolder) -> frozenset[Path]:
    return frozenset((one.folder, other.folder))


def _free(name: str, fallback: str, taken: set[str]) -> str:
    """A name as the configuration has them, that none of its kind has yet."""
    kept = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")[:60].rstrip("-._")
    kept = kept if re.fullmatch(NAME_PATTERN, kept) and kept != BASE else fallback
    numbered = (f"{kept}-{number}" for number in itertools.count(2))
    return next(each for each in itertools.chain([kept], numbered) if each not in taken)


def _path_from(beside: Path, folder: Path) -> str:
    beside = beside.resolve()
    return os.path.relpath(folder, beside) if folder.is_relative_to(beside) else str(folder)
