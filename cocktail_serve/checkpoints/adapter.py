"""A LoRA adapter read as the full model it makes of its base: factors folded into parameters as they are asked for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from cocktail_serve.checkpoints.layout import read_json
from cocktail_serve.checkpoints.mapping import settings_state
from cocktail_serve.checkpoints.reader import CheckpointReader, TensorInfo, open_tensors, tensor_bytes
from cocktail_serve.errors import CheckpointError, IncompatibleModelsError
from cocktail_serve.merging.threads import in_parallel
from cocktail_serve.pool import FileState

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_CONFIG = "adapter_config.json"

_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")

FOLD_NUMEL = 1 << 17
"""Elements folded at a time: the float64 sum and one outer product, 1 MB each, stay in cache."""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter instead of a full checkpoint."""
    return (folder / ADAPTER_CONFIG).is_file()


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


@dataclass(frozen=True, slots=True)
class _Pair:
    """What is added to one parameter: `scaling * B @ A`, or its transpose."""

    down: str
    up: str
    scaling: float


class AdapterReader:
    """Reads a folder of peft as a full checkpoint, behind the methods of `CheckpointReader`.

    A parameter with factors is `W + scaling * B @ A`, in float32: every product of the factors' elements exact in
    float64, summed over the rank in its order, scaled, added and rounded once. So the bits depend on neither threads
    nor library. What has no factors is the base's own.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`, tensors alone).
        base: open for as long as this reader is used.

    Attributes:
        tensors: the base's, those with factors as float32.
        files: the adapter's own files, the configuration first, as they were opened.

    Raises:
        CheckpointError: the folder cannot be read, or is a kind of adapter that is no sum: DoRA, trained biases,
            modules saved whole.
        IncompatibleModelsError: factors for a parameter that the base lacks, or has in another shape.
    """

    def __init__(self, folder: Path, base: CheckpointReader) -> None:
        self.folder = Path(folder)
        self._base = base
        self._config = read_json(self.folder / ADAPTER_CONFIG)
        _check_kind(self.folder, self._config)
        try:
            config = settings_state(self.folder / ADAPTER_CONFIG)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.folder / ADAPTER_CONFIG}: {error.strerror}") from error
        self._source = open_tensors(adapter_file(self.folder))
        self._infos = self._source.infos
        self.files: tuple[FileState, ...] = (config, self._source.file.state)
        self._pairs = self._find_pairs()
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {
                name: TensorInfo("float32", info.shape) if name in self._pairs else info
                for name, info in base.tensors.items()
            }
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the factors; the base stays open."""
        self._pairs.clear()
        self._source.file.close()

    def check_unwritten(self) -> None:
        """As `CheckpointReader.check_unwritten`, of the adapter's own files."""
        self._source.file.check_unwritten()

    @property
    def dtype(self) -> str:
        """The base's: what the adapter was trained over."""
        return self._base.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the factors as stored."""
        return sum(info.num_bytes for info in self._infos.values())

    def get(self, name: str) -> Tensor:
        """The parameter of that name, folded if it has factors. Called by one thread at a time.

        Raises:
            CheckpointError: the base has no such tensor.
        """
        weight = self._base.get(name)
        pair = self._pairs.get(name)
        if pair is None:
            return weight
        down, up = self._source.get_tensor(pair.down), self._source.get_tensor(pair.up)
        if self._config.get("fan_in_fan_out"):
            down, up = up.T, down.T
        return fold(weight, down, up, pair.scaling)

    def get_bytes(self, name: str) -> memoryview:
        """The elements of `get`, in C order."""
        return tensor_bytes(self.get(name))

    @property
    def factors(self) -> Mapping[str, TensorInfo]:
        """What is stored, by its own name."""
        return MappingProxyType(self._infos)

    def factor_bytes(self, name: str) -> memoryview:
        """The elements of a factor as they are stored."""
        return self._source.get_bytes(name)

    def identity(self) -> dict[str, Any]:
        """All that decides what the adapter adds to a base, but the factors' bytes, as a JSON value."""
        return {
            "pairs": sorted([name, pair.down, pair.up, pair.scaling] for name, pair in self._pairs.items()),
            "fan_in_fan_out": bool(self._config.get("fan_in_fan_out")),
        }

    def largest(self, of_base: float, of_factors: Mapping[str, float]) -> float:
        """Bound of the magnitudes of all parameters, given those of the base and of each factor."""
        added = (
            abs(pair.scaling) * self._infos[pair.down].shape[0] * of_factors[pair.down] * of_factors[pair.up]
            for pair in self._pairs.values()
        )
        return of_base + max(added, default=0.0)

    def _find_pairs(self) -> dict[str, _Pair]:
        factors: dict[str, dict[str, str]] = {}
        for stored in self._infos:
            matched = _FACTOR.fullmatch(stored)
            if matched is None:
                raise CheckpointError(
                    f"{self.folder}: tensor {stored!r} is no factor of a linear layer; only plain LoRA can be folded: "
                    "merge the adapter into its base with peft (merge_and_unload) and name the result"
                )
            factors.setdefault(matched["module"], {})[matched["factor"]] = stored
        pairs: dict[str, _Pair] = {}
        for module, found in factors.items():
            if found.keys() != {"A", "B"}:
                raise CheckpointError(f"{self.folder}: {module} has only one of the factors lora_A and lora_B")
            name = self._parameter_of(module)
            pairs[name] = _Pair(found["A"], found["B"], self._scaling_of(module))
            self._check_shapes(name, pairs[name])
        return pairs

    def _parameter_of(self, module: str) -> str:
        """The base's name: the adapter's, or one that differs by a prefix such as `model.`, which classes add."""
        name = f"{module}.weight"
        names = [name] if name in self._base.tensors else []
        names = names or [n for n in self._base.tensors if n.endswith(f".{name}") or name.endswith(f".{n}")]
        if len(names) != 1:
            raise IncompatibleModelsError(
                f"{self.folder} has factors for {name}, which the base {self._base.folder} "
                + ("does not hold: it is the adapter of another model" if not names else f"holds as {names}")
            )
        return names[0]

    def _check_shapes(self, name: str, pair: _Pair) -> None:
        down, up, weight = self._infos[pair.down].shape, self._infos[pair.up].shape, self._base.tensors[name].shape
        made = (up[0], down[1]) if len(down) == len(up) == 2 and up[1] == down[0] else None
        if self._config.get("fan_in_fan_out") and made:
            made = made[::-1]
        if made != weight:
            raise IncompatibleModelsError(
                f"tensor {name}: the base has {list(weight)}, the adapter {self.folder} has factors of "
                f"{list(up)} and {list(down)}; it is the adapter of another model"
            )

    def _scaling_of(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r), as peft's `rank_pattern` and `alpha_pattern` set them for the module."""
        rank = _of_module(module, self._config.get("rank_pattern"), self._config.get("r"))
        alpha = _of_module(module, self._config.get("alpha_pattern"), self._config.get("lora_alpha"))
        try:
            rank, alpha = float(rank), float(alpha)
            scaling = alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)
        except (TypeError, ValueError, ZeroDivisionError):
            raise CheckpointError(f"{self.folder / ADAPTER_CONFIG}: r and lora_alpha must be numbers above 0") from None
        if not (rank > 0 and math.isfinite(scaling)):
            raise CheckpointError(f"{self.folder / ADAPTER_CONFIG}: r and lora_alpha must be numbers above 0")
        return scaling


def fold(weight: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """weight + scaling * up @ down (LoRA, arXiv 2106.09685), rounded once to float32.

    Args:
        weight: `[out, in]`, floating. Left unchanged.
        down: A, `[rank, in]`.
        up: B, `[out, rank]`.

    Returns:
        float32 `[out, in]`, the same bits whatever the threads.
    """
    import torch

    folded = torch.empty(weight.shape, dtype=torch.float32)
    wide_down, wide_up = down.double().contiguous(), up.double().contiguous()

    def fold_rows(begin: int, end: int) -> None:
        total = torch.zeros(end - begin, weight.shape[1], dtype=torch.float64)
        term = torch.empty_like(total)
        for rank in range(wide_down.shape[0]):
            total.add_(torch.mul(wide_up[begin:end, rank, None], wide_down[rank], out=term))
        folded[begin:end] = total.mul_(scaling).add_(weight[begin:end].double())

    in_parallel(fold_rows, weight.shape[0], max(1, FOLD_NUMEL // max(1, weight.shape[1])))
    return folded


def _check_kind(folder: Path, config: Mapping[str, Any]) -> None:
    reasons = {
        f"its peft_type is {config.get('peft_type')!r}, not LORA": config.get("peft_type") != "LORA",
        "it is DoRA (use_dora)": config.get("use_dora"),
        "it trained biases (bias)": config.get("bias", "none") != "none" or config.get("lora_bias"),
        "it saved whole modules (modules_to_save)": config.get("modules_to_save"),
    }
    if found := [reason for reason, applies in reasons.items() if applies]:
        raise CheckpointError(
            f"{folder} is an adapter that cannot be folded: {found[0]}; merge it into its base with peft "
            "(merge_and_unload) and name the result"
        )


def _of_module(module: str, pattern: Any, default: Any) -> Any:
    """peft's rule: the first key that the module's name ends with, as a regular expression, decides."""
    if not isinstance(pattern, Mapping):
        return default
    for key, value in pattern.items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error:
            continue
    return default
