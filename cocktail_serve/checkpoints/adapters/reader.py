"""A LoRA adapter read as the full model it makes of its base: what it changes is computed as it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from cocktail_serve.checkpoints.adapters.changes import Change, ChangeFinder, why_merged
from cocktail_serve.checkpoints.adapters.config import AdapterConfig
from cocktail_serve.checkpoints.layout import ADAPTER_CONFIG, MODULES, model_folder, module_files, read_modules
from cocktail_serve.checkpoints.mapping import settings_state
from cocktail_serve.checkpoints.quantisation import refusal
from cocktail_serve.checkpoints.reader import CheckpointReader
from cocktail_serve.checkpoints.tensor_files import TensorInfo, TensorSource, open_tensors, open_weights, tensor_bytes
from cocktail_serve.errors import CheckpointError
from cocktail_serve.merging.threads import in_parallel
from cocktail_serve.pool import FileState

if TYPE_CHECKING:
    from torch import Tensor

_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

FOLD_NUMEL = 1 << 17
"""Elements folded at a time: the float64 sum and one outer product, 1 MB each, stay in cache."""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter instead of a full checkpoint."""
    return (model_folder(folder) / ADAPTER_CONFIG).is_file()


def read_expert(folder: Path, base: CheckpointReader) -> CheckpointReader | AdapterReader:
    """Opens a model that is to be mixed with a base: a full checkpoint under the base's names, or an adapter over it.

    Raises:
        CheckpointError, IncompatibleModelsError: as the readers.
    """
    return AdapterReader(folder, base) if is_adapter(folder) else CheckpointReader(folder).named_as(base)


def adapter_file(folder: Path) -> Path:
    """The file of an adapter's factors.

    Raises:
        CheckpointError: there is none.
    """
    for name in _ADAPTER_FILES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder} holds no factors: expected {' or '.join(_ADAPTER_FILES)}")


class AdapterReader:
    """Reads a folder of peft as a full checkpoint, behind the methods of `CheckpointReader`.

    A parameter with factors is `W + scaling * B @ A`, in float32: every product of the factors' elements exact in
    float64, summed over the rank in its order, scaled, added and rounded once. So the bits depend on neither threads
    nor library. What was trained and saved whole, modules of sentence-transformers beside the adapter included, takes
    the base's place. All else is the base's own.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`, tensors alone).
        base: open for as long as this reader is used.

    Attributes:
        tensors: the base's, those that are computed as float32, those saved whole as they are stored.
        files: the adapter's own files, the configuration first, as they were opened.

    Raises:
        CheckpointError: the folder cannot be read, or is a kind of adapter that no one set of parameters is equal to.
        IncompatibleModelsError: what is changed is a parameter that the base lacks, or has in another shape.
    """

    def __init__(self, folder: Path, base: CheckpointReader) -> None:
        self.folder = Path(folder)
        self._base = base
        root = model_folder(self.folder)
        config = AdapterConfig(root)
        try:
            settings = settings_state(config.path)
        except OSError as error:
            raise CheckpointError(f"cannot read {config.path}: {error.strerror}") from error
        self._sources: list[TensorSource] = []
        self._stored: dict[str, tuple[TensorSource, str]] = {}
        self._infos: dict[str, TensorInfo] = {}
        source = open_tensors(adapter_file(root))
        self._take(source)
        self._changes = ChangeFinder(self.folder, config, source, base).find()
        self._take_modules()
        self.files: tuple[FileState, ...] = (settings, *(source.file.state for source in self._sources))
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {name: self._info_of(name) for name in [*base.parameters, *(self._changes.keys() - base.parameters.keys())]}
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the adapter's files; the base stays open."""
        self._stored.clear()
        for source in self._sources:
            source.file.close()

    def check_unwritten(self) -> None:
        """As `CheckpointReader.check_unwritten`, of the adapter's own files."""
        for source in self._sources:
            source.file.check_unwritten()

    @property
    def dtype(self) -> str:
        """The base's: what the adapter was trained over."""
        return self._base.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the adapter as stored."""
        return sum(info.num_bytes for info in self._infos.values())

    @property
    def merged_only(self) -> str | None:
        """Why it cannot be served unmerged, as `Member.merged_only` says it; names the parameter."""
        found = ((name, why_merged(name, change, self.tensors[name].shape)) for name, change in self.changes.items())
        return next((f"{why}: {name}" for name, why in found if why is not None), None)

    def get(self, name: str) -> Tensor:
        """The parameter of that name, as the adapter makes it. Called by one thread at a time.

        Raises:
            CheckpointError: neither adapter nor base has such a tensor, or the base stores it quantised.
        """
        if name in self._base.quantised:
            raise CheckpointError(refusal(self._base.folder))
        change = self._changes.get(name)
        if change is None:
            return self._base.get(name)
        tensor = self._base.get(name) if change.whole is None else self._tensor(change.whole)
        if change.rows is not None:
            stored, rows = change.rows
            tensor = tensor.float()
            tensor = tensor.index_copy(0, tensor.new_tensor(rows).long(), self._tensor(stored).float())
        if change.bias is not None:
            stored, scaling = change.bias
            tensor = (tensor.double() + scaling * self._tensor(stored).double()).float()
        if change.pair is not None:
            pair = change.pair
            tensor = fold(
                tensor,
                self._tensor(pair.down),
                self._tensor(pair.up),
                pair.scaling,
                magnitude=None if pair.magnitude is None else self._tensor(pair.magnitude),
                is_turned=pair.is_turned,
            )
        return tensor

    def get_bytes(self, name: str) -> memoryview:
        """The elements of `get`, in C order."""
        return tensor_bytes(self.get(name))

    @cached_property
    def changes(self) -> Mapping[str, Change]:
        """What becomes of the base's parameters, by stored name; all others are the base's own.

        What was saved whole and is the base's own is no change: peft saves embeddings so beside the factors over them.
        """
        changes = {
            name: replace(change, whole=None) if change.whole and self._is_of_base(name, change.whole) else change
            for name, change in self._changes.items()
        }
        return MappingProxyType({name: change for name, change in changes.items() if change != Change()})

    def factor(self, stored: str) -> Tensor:
        """What is stored under a name of `factors`, as long as the file is open."""
        return self._tensor(stored)

    @property
    def factors(self) -> Mapping[str, TensorInfo]:
        """What is stored, by its own name; that of modules beside the adapter behind their folder, as `2_Dense/`."""
        return MappingProxyType(self._infos)

    def factor_bytes(self, name: str) -> memoryview:
        """The elements of a factor as they are stored."""
        source, key = self._stored[name]
        return source.get_bytes(key)

    def identity(self) -> dict[str, Any]:
        """All that decides what the adapter makes of a base, but the stored bytes, as a JSON value."""
        changes = sorted(self._changes.items())
        pairs = [(name, change.pair) for name, change in changes if change.pair is not None]
        others = {
            "magnitudes": [[name, pair.magnitude] for name, pair in pairs if pair.magnitude],
            "wholes": [[name, change.whole] for name, change in changes if change.whole],
            "rows": [
                [name, stored, list(rows)] for name, change in changes if change.rows for stored, rows in [change.rows]
            ],
            "biases": [[name, *change.bias] for name, change in changes if change.bias],
        }
        return {
            "pairs": [[name, pair.down, pair.up, pair.scaling] for name, pair in pairs],
            "fan_in_fan_out": any(pair.is_turned for _, pair in pairs),
            **{kind: value for kind, value in others.items() if value},
        }

    def largest(self, of_base: float, of_factors: Mapping[str, float]) -> float:
        """Bound of the magnitudes of all parameters, given those of the base and of each factor."""

        def bound(change: Change) -> float:
            reached = of_base if change.whole is None else of_factors[change.whole]
            if change.rows is not None:
                reached = max(reached, of_factors[change.rows[0]])
            if change.bias is not None:
                reached += abs(change.bias[1]) * of_factors[change.bias[0]]
            if (pair := change.pair) is None:
                return reached
            if pair.magnitude is not None:  # a norm, which no element exceeds
                return of_factors[pair.magnitude]
            rank = self._infos[pair.down].shape[0]
            return reached + abs(pair.scaling) * rank * of_factors[pair.down] * of_factors[pair.up]

        return max([of_base, *map(bound, self._changes.values())])

    def _take(self, source: TensorSource, prefix: str = "") -> None:
        self._sources.append(source)
        for name, info in source.infos.items():
            self._infos[prefix + name] = info
            self._stored[prefix + name] = (source, name)

    def _take_modules(self) -> None:
        """Takes what sentence-transformers saved beside the adapter: modules that were trained with it."""
        files = module_files(self.folder)
        for file in files:
            source = open_weights(file)
            self._take(source, file.prefix)
            for name in source.infos:
                self._changes[file.prefix + name] = Change(whole=file.prefix + name)
        held = {file.prefix for file in files}
        for module in read_modules(self.folder):
            prefix = f"{module.path}/"
            if prefix not in held and any(name.startswith(prefix) for name in self._base.parameters):
                raise CheckpointError(
                    f"{self.folder / MODULES} names {module.path}, which holds no parameters there and does in the "
                    f"base: the download is incomplete, fetch it again"
                )

    def _info_of(self, name: str) -> TensorInfo:
        change = self._changes.get(name)
        if change is None:
            return self._base.parameters[name]
        stored = self._base.parameters[name] if change.whole is None else self._infos[change.whole]
        return TensorInfo("float32", stored.shape) if change.is_computed else stored

    def _is_of_base(self, name: str, stored: str) -> bool:
        kept, own = self._infos[stored], self._base.parameters.get(name)
        if own is None or kept.shape != own.shape or not (kept.is_floating and own.is_floating):
            return False
        if name in self._base.quantised:
            return False
        return bool((self._tensor(stored).double() == self._base.get(name).double()).all())

    def _tensor(self, stored: str) -> Tensor:
        source, key = self._stored[stored]
        return source.get_tensor(key)


def fold(
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    scaling: float,
    *,
    magnitude: Tensor | None = None,
    is_turned: bool = False,
) -> Tensor:
    """weight + scaling * up @ down (LoRA, arXiv 2106.09685), rounded once to float32.

    With `magnitude` each output's weights are then brought to that norm (DoRA, arXiv 2402.09353), before rounding.

    Args:
        weight: `[out, in]`, floating; `[in, out]` where turned. Left unchanged.
        down: A, `[rank, in]`.
        up: B, `[out, rank]`.
        magnitude: `[out]`.
        is_turned: the weight is stored transposed.

    Returns:
        float32 of the weight's shape, the same bits whatever the threads.
    """
    import torch

    if is_turned and magnitude is not None:  # norms are of rows
        return fold(weight.T, down, up, scaling, magnitude=magnitude).T.contiguous()
    if is_turned:
        down, up = up.T, down.T
    folded = torch.empty(weight.shape, dtype=torch.float32)
    wide_down, wide_up = down.double().contiguous(), up.double().contiguous()
    norms = None if magnitude is None else magnitude.double()

    def fold_rows(begin: int, end: int) -> None:
        total = torch.zeros(end - begin, weight.shape[1], dtype=torch.float64)
        term = torch.empty_like(total)
        for rank in range(wide_down.shape[0]):
            total.add_(torch.mul(wide_up[begin:end, rank, None], wide_down[rank], out=term))
        total.mul_(scaling).add_(weight[begin:end].double())
        if norms is not None:
            total.mul_((norms[begin:end] / _row_sums(total * total).sqrt())[:, None])
        folded[begin:end] = total

    in_parallel(fold_rows, weight.shape[0], max(1, FOLD_NUMEL // max(1, weight.shape[1])))
    return folded


def _row_sums(values: Tensor) -> Tensor:
    """Sums of rows, halves added to halves: in an order of its own, unlike a reduction of torch."""
    while values.shape[1] > 1:
        half = values.shape[1] // 2
        rest = values[:, 2 * half :]
        values = values[:, :half] + values[:, half : 2 * half]
        values[:, : rest.shape[1]] += rest
    return values[:, 0]
