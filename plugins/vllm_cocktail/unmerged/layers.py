"""Where in vLLM's model the experts' factors belong, and how they are added there."""

from __future__ import annotations

import functools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cocktail_serve.checkpoints.reader import CheckpointReader
from cocktail_serve.errors import IncompatibleModelsError
from vllm_cocktail.unmerged.factors import FactorTensors
from vllm_cocktail.unmerged.kernel import Kernel, LayerShape

# a child of vLLM's logger, whose handlers and level it so shares
logger = logging.getLogger("vllm.cocktail.layers")

NUM_PROBED = 8
"""Rows, and columns of each output, by which a layer is held to the base's tensor of its name."""

TOLERANCE = 0.05
"""Relative error (root mean square) of a layer's product to that of the base's tensor: another tensor is off by 1.4,
rounding to bfloat16 by 0.004, of the rows to 8 bits by 0.01."""

Use = Literal["linear", "embedding", "head"]
"""What a layer does with the parameter: multiply the rows of a step, look its tokens up, multiply the rows that are
sampled from."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a parameter of the base is used.

    Attributes:
        module: name of the layer in vLLM's model.
        offset: the first of the layer's outputs that the parameter makes, where several are fused in it.
        widths: of all that are fused in the layer, in order.
        index: which of these it is.
    """

    module: str
    use: Use
    widths: tuple[int, ...]
    index: int

    @property
    def offset(self) -> int:
        return sum(self.widths[: self.index])

    @property
    def width(self) -> int:
        return self.widths[self.index]


class LayerFinder:
    """Finds the layers of vLLM's model that are made of the base's tensors, by name, and holds them to their bytes.

    vLLM fuses, renames and wraps: names alone would let factors land in another layer that fits. So a few outputs of
    each layer found are compared with what the base's own tensor makes of the same input.

    Args:
        model: vLLM's, loaded.
        base: its checkpoint, open.
        dtype: the engine's.
    """

    def __init__(self, model: nn.Module, base: CheckpointReader, dtype: torch.dtype) -> None:
        self._base = base
        self._dtype = dtype
        self._modules = dict(model.named_modules())
        self._by_end: dict[str, list[str]] = defaultdict(list)
        for name in self._modules:
            end = name
            while end:
                self._by_end[end].append(name)
                end = end.partition(".")[2]
        self._fused = _fused_layers(model)
        mapper: Any = getattr(model, "hf_to_vllm_mapper", None)
        # as for its own LoRA: by what renames alone, and not by what stacks
        self._rename: Callable[[str], str | None] = mapper.get_rename_mapper().map_name if mapper else str

    def find(self, stored: str, *, is_turned: bool) -> list[Place]:
        """The layers that a parameter of the base is used in: several, where an embedding is the output head too.

        Args:
            is_turned: whether a linear layer's is stored `[in, out]`, as transformers' Conv1D has it.

        Raises:
            IncompatibleModelsError: none, or one that computes something else than a product with it; names both.
        """
        from vllm.model_executor.layers.linear import LinearBase
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        name, _, part = stored.rpartition(".")
        found = self._module_of(name) if part == "weight" else None
        if found is None:
            raise self._refusal(stored, "no layer of vLLM's model has its name")
        module_name, place = found
        module = self._modules[module_name]
        places = []
        if isinstance(module, LinearBase):
            places = [place]
        elif isinstance(module, ParallelLMHead):
            places = [Place(module_name, "head", place.widths, place.index)]
        elif isinstance(module, VocabParallelEmbedding):
            places = [Place(module_name, "embedding", place.widths, place.index)]
            num_tokens = int(module.org_vocab_size)
            places += [Place(head, "head", (num_tokens,), 0) for head in self._heads_over(module_name)]
        else:
            raise self._refusal(stored, f"vLLM computes it in {module_name}, a {type(module).__name__}")
        for each in places:
            self.require_product(stored, each, is_turned=is_turned)
        return places

    def _module_of(self, name: str) -> tuple[str, Place] | None:
        """The layer that a module of the checkpoint became, with the outputs that are its."""
        wanted = self._rename(name) or name
        for candidate in dict.fromkeys((wanted, name)):
            for module_name in self._by_end.get(candidate, ()):
                width = _num_outputs(self._modules[module_name])
                if width is not None and len(self._by_end[candidate]) == 1:
                    return module_name, Place(module_name, "linear", (width,), 0)
            parent, _, last = candidate.rpartition(".")
            for fused, parts in self._fused.items():
                names = self._by_end.get(f"{parent}.{fused}" if parent else fused, ())
                if last not in parts or len(names) != 1:
                    continue
                widths = tuple(getattr(self._modules[names[0]], "output_partition_sizes", ()))
                if len(widths) == len(parts):
                    return names[0], Place(names[0], "linear", widths, parts[last])
        return None

    def _heads_over(self, embedding: str) -> Iterator[str]:
        """The output heads that share an embedding's parameter: layers of their own, or the embedding itself."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        weight = self._modules[embedding].weight
        heads = [
            name
            for name, module in self._modules.items()
            if isinstance(module, ParallelLMHead) and module.weight.data_ptr() == weight.data_ptr()
        ]
        has_head = any(isinstance(module, ParallelLMHead) for module in self._modules.values())
        if heads or has_head:
            yield from heads
        else:
            yield embedding

    def require_product(self, stored: str, place: Place, *, is_turned: bool) -> None:
        """Holds a layer to the base's parameter, dequantised where it is stored quantised, by some of its outputs.

        Raises:
            IncompatibleModelsError: it computes something else than a product with it; names both.
        """
        module: Any = self._modules[place.module]
        generator = torch.Generator().manual_seed(0)
        num_rows, num_columns = self._base.parameters[stored].shape
        is_turned = is_turned and place.use == "linear"
        if is_turned:
            num_rows, num_columns = num_columns, num_rows
        device, dtype = next(module.parameters()).device, self._dtype
        if place.use == "embedding":
            ids = torch.randint(0, num_rows, (NUM_PROBED,), generator=generator)
            found = module.quant_method.embedding(module, ids.to(device)).double().cpu()
            wanted = self._base.get_rows(stored, ids).to(dtype).double()
        else:
            rows = torch.randn(NUM_PROBED, num_columns, generator=generator).to(dtype)
            columns = torch.randint(0, num_rows, (NUM_PROBED,), generator=generator)
            weight = self._base.get(stored)[:, columns].T if is_turned else self._base.get_rows(stored, columns)
            product = module.quant_method.apply(module, rows.to(device), bias=None)
            found = product[:, place.offset + columns].double().cpu()
            wanted = rows.double() @ weight.to(dtype).double().T
        error = float((found - wanted).pow(2).mean().sqrt() / wanted.pow(2).mean().sqrt().clamp_min(1e-30))
        if not error <= TOLERANCE:
            raise self._refusal(
                stored, f"{place.module} of vLLM's model is no plain product with it (relative error {error:.2g})"
            )

    def _refusal(self, stored: str, why: str) -> IncompatibleModelsError:
        fix = "set engine.mode: merged" if self._base.quantisation is None else "leave out the experts that adapt it"
        return IncompatibleModelsError(
            f"parameter {stored} of {self._base.folder} is adapted, and {why}: coefficients by row cannot reach it; "
            f"{fix}"
        )


class Steps:
    """The rows of the step that is computed, as each use reads them.

    Attributes:
        tokens: a row for each token.
        samples: a row for each that is sampled from.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.tokens = kernel.new_step()
        self.samples = kernel.new_step()

    def set(self, coefficients: NDArray[np.float32], num_tokens: NDArray[np.int32]) -> None:
        """Lays out a step of requests, one after the other.

        Args:
            coefficients: `[num_requests, num_experts]`.
            num_tokens: `[num_requests]`, of each.
        """
        if coefficients.any():
            self.tokens.set(coefficients, num_tokens)
            self.set_samples(coefficients, np.ones_like(num_tokens))
        else:  # of the base alone, as most engines' steps are: no layer is to spend a thing on it
            self.clear()

    def set_samples(self, coefficients: NDArray[np.float32], num_rows: NDArray[np.int32]) -> None:
        """Lays out the rows that the output head computes, as `set`."""
        self.samples.set(coefficients, num_rows)

    def clear(self) -> None:
        """No row has coefficients."""
        for step in (self.tokens, self.samples):
            step.set(np.zeros((0, 0), dtype=np.float32), np.zeros(0, dtype=np.int32))


class _Adapted:
    """A layer with factors.

    Attributes:
        index: of the layer among all, by which a compiled graph names it.
        num_calls: how often it was computed; nought after a request means that vLLM computes past it.
    """

    def __init__(self, place: Place, shape: LayerShape, steps: Steps, index: int) -> None:
        self.place = place
        self.index = index
        self.num_calls = 0
        self.layer = steps.kernel.new_layer(shape)
        self._kernel = steps.kernel
        self._step = steps.samples if place.use == "head" else steps.tokens
        self._num_columns = shape.out_features if place.use == "head" else None  # a head has some for no token

    def around(self, compute: Callable[..., Tensor], module: nn.Module, rows: Tensor, *args: Any, **kw: Any) -> Tensor:
        """A layer's own product, and what the experts of the step's rows add to it."""
        product = compute(module, rows, *args, **kw)
        if torch.compiler.is_compiling():
            torch.ops.cocktail.add_factors(rows, product, self.index)
        else:
            self.add(rows, product)
        return product

    def add(self, rows: Tensor, product: Tensor) -> None:
        """What the experts add to the product, in place."""
        self.num_calls += 1
        if self._step.num_rows:
            if product.dim() > 2:  # a model of transformers has a batch of one
                rows, product = rows.flatten(0, product.dim() - 2), product.view(-1, product.shape[-1])
            if self._num_columns is not None:
                product = product[:, : self._num_columns]
            self._kernel.add(self._step, self.layer, rows, product)


class AdaptedLayers:
    """The layers of one model that experts adapt.

    Args:
        model: vLLM's, loaded.
        base: its checkpoint, open while experts are added.
        steps: what rows they compute; set before each step.
        dtype: the engine's.

    Attributes:
        num_bytes: of all factors.
    """

    def __init__(self, model: nn.Module, steps: Steps, *, dtype: torch.dtype) -> None:
        self._model = model
        self._steps = steps
        self._dtype = dtype
        self._adapted: dict[tuple[str, Use], _Adapted] = {}
        self._by_index: list[_Adapted] = []
        self._is_sealed = False
        self._define_operator()
        self.num_bytes = 0

    def add(self, expert: int, factors: Mapping[str, FactorTensors], base: CheckpointReader) -> None:
        """Adds an expert's factors. Between steps; what else is computed stays as it is.

        Args:
            expert: its column in the coefficients of a step.

        Raises:
            IncompatibleModelsError: as `LayerFinder.find`; nothing was added.
        """
        self._steps.clear()  # layers are tried out, for nobody's rows
        finder = LayerFinder(self._model, base, self._dtype)
        places = {stored: finder.find(stored, is_turned=factor.is_turned) for stored, factor in factors.items()}
        if self._is_sealed:
            self._require_adapted(place for found in places.values() for place in found)
        for stored, found in places.items():
            for place in found:
                self._take(expert, factors[stored], place)

    @property
    def names(self) -> list[str]:
        """The layers, in the order by which compiled graphs number them."""
        return [f"{adapted.place.module} {adapted.place.use}" for adapted in self._by_index]

    def seal(self) -> None:
        """The model was compiled: from now on, experts that adapt other layers are refused."""
        self._is_sealed = True

    def _require_adapted(self, places: Iterable[Place]) -> None:
        for place in places:
            if (place.module, place.use) not in self._adapted:
                raise IncompatibleModelsError(
                    f"it adapts {place.module}, which no expert did when vLLM compiled the model: restart the engine, "
                    "or serve without compiled graphs (engine.args.enforce-eager)"
                )

    def require_called(self) -> None:
        """After a request: raises IncompatibleModelsError for a layer that it did not come through."""
        for adapted in self._adapted.values():
            if not adapted.num_calls:
                raise IncompatibleModelsError(
                    f"{adapted.place.module} of vLLM's model is adapted, and vLLM computes past it: coefficients by "
                    "row cannot reach it; set engine.mode: merged"
                )

    def _take(self, expert: int, factors: FactorTensors, place: Place) -> None:
        adapted = self._adapted.get((place.module, place.use))
        if adapted is None:
            adapted = self._adapted[place.module, place.use] = self._adapt(place)
            self._by_index.append(adapted)
        # as the layer sees them: an embedding's product is turned, of rows that are looked up
        down, up = factors.down, factors.up
        if place.use != "linear" and factors.is_turned != (place.use == "embedding"):
            down, up = up.T, down.T
        adapted.layer.set_factors(expert, place.index, down, up, factors.scaling)
        self.num_bytes += down.nbytes + up.nbytes

    def _adapt(self, place: Place) -> _Adapted:
        """Puts the product between a layer and what it computes.

        On a copy of the layer's method, whose class is what vLLM tells layers apart by.
        """
        module: Any = self._model.get_submodule(place.module)
        num_inputs = {"linear": "input_size", "head": "embedding_dim", "embedding": "org_vocab_size"}[place.use]
        shape = LayerShape(getattr(module, num_inputs), place.widths, self._dtype, place.use == "embedding")
        adapted = _Adapted(place, shape, self._steps, index=len(self._adapted))
        method = copy(module.quant_method)
        name = "embedding" if place.use == "embedding" else "apply"
        setattr(method, name, functools.partial(adapted.around, getattr(module.quant_method, name)))
        module.quant_method = method
        return adapted

    def _define_operator(self) -> None:
        """Gives torch's compiler an operator for what is added, which it leaves as it is.

        A graph is made once for all steps, so that it can know neither the rows nor the factors that they have.
        """

        def add(rows: Tensor, product: Tensor, index: int) -> None:
            self._by_index[index].add(rows, product)

        library: Any = torch.library.Library("cocktail", "DEF")  # type: ignore[no-untyped-call]  # torch's own
        library.define("add_factors(Tensor rows, Tensor(a!) product, int index) -> ()")
        library.impl("add_factors", add, "CompositeExplicitAutograd")
        library.impl("add_factors", lambda rows, product, index: None, "Meta")
        self._library = library  # the operator is there for as long as it is


def _fused_layers(model: nn.Module) -> dict[str, dict[str, int]]:
    """Which layers of the checkpoint are one of vLLM's model, by the names of both, and the place of each.

    Told twice: for its own LoRA and for its loader. Models that know no LoRA tell the loader alone.
    """
    fused: dict[str, dict[str, int]] = {}
    for module in model.modules():
        mapper: Any = getattr(module, "hf_to_vllm_mapper", None)
        for part, (whole, shard) in getattr(mapper, "orig_to_new_stacked", {}).items():
            if isinstance(shard, int) or shard in _SHARDS:
                place = shard if isinstance(shard, int) else _SHARDS[shard]
                fused.setdefault(whole.strip("."), {})[part.strip(".")] = place
    for module in model.modules():
        packed: Mapping[str, Sequence[str]] = getattr(module, "packed_modules_mapping", None) or {}
        fused |= {whole: {part: place for place, part in enumerate(parts)} for whole, parts in packed.items()}
    return fused


_SHARDS = {"q": 0, "k": 1, "v": 2}
"""How loaders call the parts of a fused projection; of others, by number."""


def _num_outputs(module: nn.Module) -> int | None:
    """Of one of vLLM's layers with a weight; None of anything else."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    if isinstance(module, ParallelLMHead):
        return int(module.org_vocab_size)
    if isinstance(module, VocabParallelEmbedding):
        return int(module.embedding_dim)
    if isinstance(module, LinearBase):
        return int(module.output_size)
    return None
