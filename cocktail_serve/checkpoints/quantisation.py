"""Weights that a checkpoint stores quantised: which they are, and what numbers their bits stand for.

They are never mixed: what a weight was rounded to is its own. Adapters beside them need their names and shapes, and an
engine's layers are told apart by some of their rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from cocktail_serve.checkpoints.layout import CONFIG, read_config
from cocktail_serve.checkpoints.tensor_files import TensorInfo
from cocktail_serve.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    GetTensor = Callable[[str], Tensor]

Shape = tuple[int, ...]

_WORD_BITS = 32


class QuantisedWeight(ABC):
    """The weight of a linear layer as one format stores it.

    Args:
        parts: stored names, by what the format calls them.
        shapes: theirs.
        settings: what the configuration says of the quantisation.
        get: gives what is stored under a name: what says a shape is read with it.

    Attributes:
        shape: of the weight, `[out, in]`.
        num_bits: of an element.

    Raises:
        ValueError: the parts do not make a weight.
    """

    method: ClassVar[str]
    """`quant_method` of the configuration."""

    required: ClassVar[frozenset[str]]
    optional: ClassVar[frozenset[str]] = frozenset()
    """What the tensors are called that make a weight."""

    bits: ClassVar[tuple[int, ...]] = (4, 8)
    """What an element may have."""

    is_packed: ClassVar[bool] = True
    """Whether several elements are in one word. Engines unpack them into float16 or bfloat16, and nothing else."""

    def __init__(
        self, parts: Mapping[str, str], shapes: Mapping[str, Shape], settings: Mapping[str, Any], get: GetTensor
    ) -> None:
        self.parts = parts
        self._settings = settings
        if any(0 in shape for shape in shapes.values()):
            raise ValueError("a part is empty")
        self.shape = self._shape(shapes, lambda part: get(parts[part]))
        self.num_bits = next((bits for bits in self.bits if self._fits(shapes, bits)), 0)
        if not self.num_bits:
            raise ValueError("the parts do not fit each other")

    def rows(self, get: GetTensor, rows: Tensor) -> Tensor:
        """Some rows of the weight, by the format's rule: (element - zero point) * scale.

        Args:
            get: gives what is stored under a name.
            rows: indices, `[num_rows]`.

        Returns:
            float32 `[num_rows, in]`.
        """
        import torch

        parts = {part: get(name) for part, name in self.parts.items()}
        elements, zeros, scales = self._stored_rows(parts, rows)
        groups = next((parts[part].long() for part in ("g_idx", "weight_g_idx") if part in parts), None)
        if groups is None:
            groups = torch.arange(scales.shape[1]).repeat_interleave(self.shape[1] // scales.shape[1])
        return (elements - zeros[:, groups]) * scales.float()[:, groups]

    def _fits(self, shapes: Mapping[str, Shape], num_bits: int) -> bool:
        wanted = self._shapes(shapes, num_bits)
        return all(shape == wanted[part] for part, shape in shapes.items())

    @abstractmethod
    def _shape(self, shapes: Mapping[str, Shape], get: GetTensor) -> tuple[int, int]:
        """The weight's, told from some of the parts.

        Raises:
            IndexError, ValueError: they are of other forms.
        """

    @abstractmethod
    def _shapes(self, shapes: Mapping[str, Shape], num_bits: int) -> Mapping[str, Shape]:
        """What all parts have then."""

    @abstractmethod
    def _stored_rows(self, parts: Mapping[str, Tensor], rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Elements as float32 `[num_rows, in]`; zero points and scales, `[num_rows, groups]`."""


class _Int8(QuantisedWeight):
    """`int-quantized` of compressed-tensors: a scale for each output, or one for all."""

    method = "compressed-tensors"
    required = frozenset({"weight", "weight_scale"})
    optional = frozenset({"weight_zero_point"})
    bits = (8,)
    is_packed = False

    def _shape(self, shapes: Mapping[str, Shape], get: GetTensor) -> tuple[int, int]:
        out, inputs = shapes["weight"]
        return out, inputs

    def _shapes(self, shapes: Mapping[str, Shape], num_bits: int) -> Mapping[str, Shape]:
        of_all, of_outputs = (1,), (self.shape[0], 1)
        scale = of_outputs if shapes["weight_scale"] == of_outputs else of_all
        return {"weight": self.shape, "weight_scale": scale, "weight_zero_point": scale}

    def _stored_rows(self, parts: Mapping[str, Tensor], rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scales = parts["weight_scale"].expand(self.shape[0], 1)[rows]
        zeros = parts.get("weight_zero_point", scales.new_zeros(1)).expand(self.shape[0], 1)[rows]
        return parts["weight"][rows].float(), zeros.float(), scales


class _Packed(QuantisedWeight):
    """`pack-quantized` of compressed-tensors: words of inputs, and of the zero points of outputs, from the lowest."""

    method = "compressed-tensors"
    required = frozenset({"weight_packed", "weight_scale", "weight_shape"})
    optional = frozenset({"weight_zero_point", "weight_g_idx"})

    def _shape(self, shapes: Mapping[str, Shape], get: GetTensor) -> tuple[int, int]:
        if shapes["weight_shape"] != (2,):
            raise ValueError("the shape is none of a matrix")
        out, inputs = get("weight_shape").tolist()
        return out, inputs

    def _shapes(self, shapes: Mapping[str, Shape], num_bits: int) -> Mapping[str, Shape]:
        out, inputs = self.shape
        groups = shapes["weight_scale"][-1]
        return {
            "weight_packed": (out, _num_words(inputs, num_bits)),
            "weight_scale": (out, groups if inputs % groups == 0 else 1),
            "weight_shape": (2,),
            "weight_zero_point": (_num_words(out, num_bits), groups),
            "weight_g_idx": (inputs,),
        }

    def _stored_rows(self, parts: Mapping[str, Tensor], rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        import torch

        lowest, scales = 2 ** (self.num_bits - 1), parts["weight_scale"][rows]
        elements = unpacked(parts["weight_packed"][rows], self.num_bits)[:, : self.shape[1]] - lowest
        if "weight_zero_point" not in parts:
            return elements, torch.zeros(scales.shape), scales
        return elements, unpacked(parts["weight_zero_point"].T, self.num_bits).T[rows] - lowest, scales


class _GPTQ(QuantisedWeight):
    """GPTQ: words of inputs, and of the zero points of outputs, which its first version stores one less."""

    method = "gptq"
    required = frozenset({"qweight", "qzeros", "scales", "g_idx"})

    def _shape(self, shapes: Mapping[str, Shape], get: GetTensor) -> tuple[int, int]:
        return shapes["scales"][1], shapes["g_idx"][0]

    def _shapes(self, shapes: Mapping[str, Shape], num_bits: int) -> Mapping[str, Shape]:
        (out, inputs), groups = self.shape, shapes["scales"][0]
        return {
            "qweight": (_num_words(inputs, num_bits), out),
            "qzeros": (groups, _num_words(out, num_bits)),
            "scales": (groups, out),
            "g_idx": (shapes["qweight"][0] * _WORD_BITS // num_bits,),
        }

    def _stored_rows(self, parts: Mapping[str, Tensor], rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        import torch

        elements = unpacked(parts["qweight"].T[rows], self.num_bits)[:, : self.shape[1]]
        scales = parts["scales"].T[rows]
        if self._settings.get("sym", True):
            return elements, torch.full(scales.shape, 2.0 ** (self.num_bits - 1)), scales
        one_less = self._settings.get("checkpoint_format") != "gptq_v2"
        return elements, unpacked(parts["qzeros"], self.num_bits).T[rows] + one_less, scales


class _AWQ(QuantisedWeight):
    """AWQ: words of outputs, in an order of their own, and of their zero points."""

    method = "awq"
    required = frozenset({"qweight", "qzeros", "scales"})
    bits = (4,)

    places = (0, 4, 1, 5, 2, 6, 3, 7)
    """Where in its word each of eight outputs lies."""

    def _shape(self, shapes: Mapping[str, Shape], get: GetTensor) -> tuple[int, int]:
        return shapes["scales"][1], shapes["qweight"][0]

    def _shapes(self, shapes: Mapping[str, Shape], num_bits: int) -> Mapping[str, Shape]:
        (out, inputs), groups = self.shape, shapes["scales"][0]
        return {
            "qweight": (inputs, _num_words(out, num_bits)),
            "qzeros": (groups, _num_words(out, num_bits)),
            "scales": (groups if inputs % groups == 0 else 1, out),
        }

    def _stored_rows(self, parts: Mapping[str, Tensor], rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stored = rows // len(self.places) * len(self.places) + rows.new_tensor(self.places)[rows % len(self.places)]
        elements, zeros = (unpacked(parts[part], self.num_bits).T[stored] for part in ("qweight", "qzeros"))
        return elements, zeros, parts["scales"].T[rows]


_FORMATS: tuple[type[QuantisedWeight], ...] = (_Int8, _Packed, _GPTQ, _AWQ)
METHODS = tuple(dict.fromkeys(each.method for each in _FORMATS))
"""What `quant_method` may say of a base that is served with adapters."""


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How a checkpoint is quantised.

    Attributes:
        settings: all that the configuration says: the same bits are other numbers under others.
    """

    folder: Path
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path) -> Quantisation | None:
        """The quantisation of a model folder; None where it has none.

        Raises:
            CheckpointError: it is of a method that is not known here.
        """
        if not (settings := quantisation_settings(folder)):
            return None
        method = settings.get("quant_method") if isinstance(settings, Mapping) else None
        if method not in METHODS:
            raise CheckpointError(
                f"{refusal(folder)}. Its quant_method is {method!r}; a base can be served with adapters beside it "
                f"where that is one of {', '.join(METHODS)}"
            )
        return cls(folder, settings)

    @property
    def method(self) -> str:
        """`quant_method` of the configuration."""
        return str(self.settings["quant_method"])

    def find(self, tensors: Mapping[str, TensorInfo], get: GetTensor) -> dict[str, QuantisedWeight]:
        """The weights that are stored quantised, by the name of the parameter.

        Args:
            tensors: what the checkpoint stores.
            get: gives what is stored under a name.

        Raises:
            CheckpointError: there are none, or one whose parts do not make a weight.
        """
        formats = [each for each in _FORMATS if each.method == self.method]
        known = frozenset().union(*(each.required | each.optional for each in formats))
        modules: dict[str, dict[str, str]] = {}
        for name, info in tensors.items():
            module, _, part = name.rpartition(".")
            if part in known and not (part == "weight" and info.is_floating):
                modules.setdefault(module, {})[part] = name
        if not modules:
            raise CheckpointError(f"{refusal(self.folder)}. No tensor of it is stored as {self.method} stores weights")
        return {
            f"{module}.weight": self._weight_of(module, parts, formats, tensors, get)
            for module, parts in modules.items()
        }

    def _weight_of(
        self,
        module: str,
        parts: Mapping[str, str],
        formats: list[type[QuantisedWeight]],
        tensors: Mapping[str, TensorInfo],
        get: GetTensor,
    ) -> QuantisedWeight:
        shapes = {part: tensors[name].shape for part, name in parts.items()}
        for each in formats:
            if each.required <= parts.keys() <= each.required | each.optional:
                try:
                    return each(parts, shapes, self.settings, get)
                except (IndexError, ValueError):
                    break
        held = ", ".join(f"{part} {tensors[name]}" for part, name in sorted(parts.items()))
        raise CheckpointError(
            f"{self.folder}: {module} is stored as {held}, which is no weight of {self.method} with 4 or 8 bits: the "
            "checkpoint is incomplete, or of a format that is not known here"
        )


def quantisation_settings(folder: Path) -> Any:
    """What a model's configuration says of its quantisation; nothing where it has none."""
    config = read_config(folder)
    return config.get("quantization_config") or config.get("compression_config")


def refusal(folder: Path) -> str:
    """Why a quantised checkpoint is not mixed, and what to do."""
    return (
        f"{folder} is quantised ({CONFIG} has quantization_config); quantised parameters cannot be averaged: "
        "use the float32, float16 or bfloat16 checkpoint that it was made from"
    )


def unpacked(words: Tensor, num_bits: int) -> Tensor:
    """The elements of words, the lowest bits first.

    Args:
        words: int32 `[..., n]`.

    Returns:
        float32 `[..., n * 32 / num_bits]`, from 0 up.
    """
    import torch

    shifts = torch.arange(0, _WORD_BITS, num_bits)
    elements: Tensor = (words.long()[..., None] >> shifts) & (2**num_bits - 1)
    return elements.flatten(-2).float()


def _num_words(num_elements: int, num_bits: int) -> int:
    return -(-num_elements * num_bits // _WORD_BITS)
