"""Experts kept as the engine holds them, so that a mixture is a sum straight into the live parameters. Knows no vLLM.

Mixing is linear, so it may happen in the engine's own layout (fused, sharded, transposed, padded) as well as in the
checkpoint's, if that layout is a linear image of the checkpoint. Nobody can tell from outside: layers pack parameters
into opaque handles, derive matrices from them, add offsets. So nothing is assumed. Each model goes once through the
engine's own reload, every tensor that the model reaches is watched meanwhile, and a random mixture is compared with
its streamed reload bit by bit. Any doubt, and the engine streams.
"""

from __future__ import annotations

import functools
import math
import random
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from cocktail_serve.dtypes import DType
from cocktail_serve.merging.linear import merge_param
from cocktail_serve.recipe import Recipe

Load = Callable[[Recipe], object]
"""Puts a recipe into the engine through its own reload."""


_MODULE_TABLES = frozenset({"_parameters", "_buffers", "_modules"})

_SEARCHED_NOWHERE = frozenset({"torch", "numpy", "triton", "transformers", "pydantic", "ray"})
"""Libraries whose objects hold no parameters of a model, modules of torch aside."""


class _NotPlainError(Exception):
    """What keeps a mixture from being a sum over the live parameters."""


class CapturedExperts:
    """Models of one pool in the engine's layout.

    Args:
        live: the engine's own storages by path, flat; `mix` writes them.
        experts: by fingerprint the contents of the same storages, of the same dtypes, under that model.
        dtype: what every mixture is rounded to, in whatever dtype a storage then holds it.
    """

    def __init__(self, live: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], dtype: DType) -> None:
        self._live = live
        self._experts = experts
        self._dtype: torch.dtype = getattr(torch, dtype)

    @property
    def fingerprints(self) -> list[str]:
        """The models that are kept."""
        return list(self._experts)

    @property
    def num_bytes(self) -> int:
        """Size of what is kept; a tensor that an expert shares with the base counts once."""
        kept = {id(tensor): tensor.nbytes for expert in self._experts.values() for tensor in expert.values()}
        return sum(kept.values())

    def holds(self, recipe: Recipe) -> bool:
        """Whether `mix` can make it: a linear mixture of models that are kept."""
        return recipe.method == "linear" and all(f in self._experts for f, _ in recipe.coefficients)

    @torch.inference_mode()
    def mix(self, recipe: Recipe) -> None:
        """Writes sum_i w_i * theta_i over the live parameters, as `merge_param` defines it, at their addresses."""
        for path in self._live:
            self._sum(path, recipe)

    def _sum(self, path: str, recipe: Recipe) -> None:
        live = self._live[path]
        params = [self._experts[fingerprint][path] for fingerprint, _ in recipe.coefficients]
        weights = [coefficient for _, coefficient in recipe.coefficients]
        if live.dtype == self._dtype:
            merge_param(params, weights, out_dtype=live.dtype, out=live)
        else:  # the reload rounds to the mixture's dtype before the layer converts it
            live.copy_(merge_param(params, weights, out_dtype=self._dtype))

    @torch.inference_mode()
    def verify(self, recipe: Recipe) -> None:
        """Sums a recipe over its own streamed reload, which the engine holds, one storage at a time.

        Raises:
            _NotPlainError: a bit changed.
        """
        for path, live in self._live.items():
            streamed = live.clone()
            self._sum(path, recipe)
            if not _same_bits(streamed, live):
                raise _NotPlainError(f"{path} is not a linear image of the checkpoint")


def capture(
    model: nn.Module,
    members: Sequence[str],
    *,
    base: str,
    dtype: DType,
    load: Load,
    max_bytes: int,
    excluded: Iterable[Tensor] = (),
) -> CapturedExperts | str:
    """Keeps as many models as fit, the base first, or says why mixtures must be streamed.

    Reloads every model once, and a random mixture of all. Afterwards the engine holds some mixture of the pool, whole:
    the caller loads what it wants there.

    Args:
        members: fingerprints, in the order of their claim to the memory.
        max_bytes: bound of what is kept, on the device of the parameters.
        excluded: tensors that the model reaches and that are no part of it: the KV cache.

    Raises:
        whatever `load` raises; the engine is then lost.
    """
    try:
        return _capture(model, members, base=base, dtype=dtype, load=load, max_bytes=max_bytes, excluded=list(excluded))
    except _NotPlainError as error:
        return str(error)


@torch.inference_mode()
def _capture(
    model: nn.Module,
    members: Sequence[str],
    *,
    base: str,
    dtype: DType,
    load: Load,
    max_bytes: int,
    excluded: Sequence[Tensor],
) -> CapturedExperts:
    load(_alone(base, base, dtype))
    live = reachable_tensors(model, excluded)
    parameters = _parameter_paths(model, live)
    num_bytes = sum(live[path].nbytes for path in parameters)
    order = [base, *(member for member in members if member != base)][: max_bytes // num_bytes]
    if len(order) < 2:
        raise _NotPlainError(
            f"engine.expert_memory of {max_bytes:,} bytes holds less than two models of {num_bytes:,} bytes"
        )
    cpu = torch.device("cpu")
    first = {path: _copy(tensor, tensor.device if path in parameters else cpu) for path, tensor in live.items()}
    experts = {base: first}
    for fingerprint in order[1:]:
        load(_alone(fingerprint, base, dtype))
        now = _reloaded(model, live, parameters, excluded)
        experts[fingerprint] = {path: _kept(path, tensor, first[path]) for path, tensor in now.items()}
    # rotary tables and the like stay as they are; what a layer derived from its parameters is mixed with them
    derived = {
        path for path in live if path not in parameters and any(e[path] is not first[path] for e in experts.values())
    }
    mixed = {path: tensor for path, tensor in live.items() if path in parameters or path in derived}
    for path in derived:
        for expert in experts.values():
            expert[path] = _copy(expert[path], live[path].device)
    captured = CapturedExperts(
        mixed, {f: {path: expert[path] for path in mixed} for f, expert in experts.items()}, dtype
    )
    if captured.num_bytes > max_bytes:
        raise _NotPlainError(f"the models take {captured.num_bytes:,} bytes with what their layers derive")
    recipe = _some_mixture(order, base, dtype)
    load(recipe)
    now = _reloaded(model, live, mixed, excluded)
    for path in now.keys() - mixed.keys():
        _kept(path, now[path], first[path], may_vary=False)
    captured.verify(recipe)
    return captured


def reachable_tensors(model: nn.Module, excluded: Iterable[Tensor] = ()) -> dict[str, Tensor]:
    """Every storage that a tensor reachable from the model lies in, whole and flat, by the path it was found at.

    Looks into modules, containers, closures and whatever objects they hold, since layers keep what they made of their
    parameters in any of these.

    Raises:
        _NotPlainError: tensors of two dtypes share a storage.
    """
    found: dict[int, tuple[str, Tensor]] = {}
    not_searched = {_address(tensor) for tensor in excluded}
    seen: dict[int, Any] = {}  # holds what was seen, so that no id is used twice
    waiting: list[tuple[str, Any]] = [("model", model)]
    while waiting:
        path, value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if not isinstance(value, Tensor):
            # in one order, whatever the order they came in: the same storage is found by the same path again
            waiting.extend((f"{path}.{name}", child) for name, child in sorted(_children(value), key=itemgetter(0)))
            continue
        waiting.extend((f"{path}.{name}", child) for name, child in sorted(vars(value).items(), key=itemgetter(0)))
        if not value.is_meta and value.layout == torch.strided and _address(value) not in {0, *not_searched}:
            _, known = found.setdefault(_address(value), (path, value))
            if known.dtype != value.dtype:
                raise _NotPlainError(f"{path} shares its memory with another dtype")
    return {
        path: torch.empty(0, dtype=value.dtype, device=value.device).set_(value.untyped_storage())
        for path, value in found.values()
    }


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds, by name; nothing of types, modules of code, and objects of libraries below the model's."""
    if isinstance(value, nn.Module):
        plain = {name: child for name, child in vars(value).items() if name not in _MODULE_TABLES}
        for table in (value._parameters, value._buffers, value._modules, plain):
            yield from table.items()
    elif isinstance(value, Mapping):
        yield from ((str(key), child) for key, child in value.items())
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((str(index), child) for index, child in enumerate(value))
    elif isinstance(value, FunctionType):
        yield from (("closure", cell.cell_contents) for cell in value.__closure__ or () if _is_filled(cell))
        yield from (("default", child) for child in value.__defaults__ or ())
        yield from (value.__kwdefaults__ or {}).items()
    elif isinstance(value, MethodType):
        yield from (("self", value.__self__), ("function", value.__func__))
    elif isinstance(value, functools.partial):
        yield from (("function", value.func), ("arguments", value.args), ("keywords", value.keywords))
    elif _may_hold_tensors(value):
        yield from getattr(value, "__dict__", {}).items()
        for kind in type(value).__mro__:
            for name in getattr(kind, "__slots__", ()):
                if isinstance(name, str) and hasattr(value, name):
                    yield name, getattr(value, name)


def _may_hold_tensors(value: Any) -> bool:
    """Whether it is an object of the engine's own code, or of a plugin's."""
    if isinstance(value, type | ModuleType | BuiltinFunctionType):
        return False
    library = type(value).__module__.partition(".")[0]
    return library not in _SEARCHED_NOWHERE and library not in sys.stdlib_module_names


def _is_filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _parameter_paths(model: nn.Module, live: Mapping[str, Tensor]) -> frozenset[str]:
    """Where the parameters lie.

    Raises:
        _NotPlainError: a parameter has no elements, so its layer keeps it in another form, or it is not floating.
    """
    addresses = set()
    for name, parameter in model.named_parameters():
        if not parameter.numel():
            raise _NotPlainError(f"{name} is packed by its layer")
        if not parameter.is_floating_point():
            raise _NotPlainError(f"{name} is {parameter.dtype}")
        addresses.add(_address(parameter))
    return frozenset(path for path, tensor in live.items() if _address(tensor) in addresses)


def _reloaded(
    model: nn.Module, live: Mapping[str, Tensor], mixed: Collection[str], excluded: Iterable[Tensor]
) -> dict[str, Tensor]:
    """What the model reaches after a reload. A constant may be made anew, what is mixed must lie where it lay.

    Raises:
        _NotPlainError: it does not, or there are other tensors than before.
    """
    now = reachable_tensors(model, excluded)
    if odd := now.keys() ^ live.keys():
        raise _NotPlainError(f"{min(odd)} is there after one reload and not after another")
    for path in mixed:
        if _place(now[path]) != _place(live[path]):
            raise _NotPlainError(f"a reload puts {path} elsewhere in memory")
    return now


def _place(tensor: Tensor) -> tuple[int, int, torch.dtype]:
    return _address(tensor), tensor.numel(), tensor.dtype


def _kept(path: str, tensor: Tensor, first: Tensor, *, may_vary: bool = True) -> Tensor:
    """A copy beside the base's, or the base's own where they are equal.

    Raises:
        _NotPlainError: it is another and may not be, or cannot be summed.
    """
    if _same_bits(tensor.to(first.device), first):
        return first
    if not may_vary or not tensor.is_floating_point():
        raise _NotPlainError(f"{path} is made anew by each reload and cannot be summed")
    return _copy(tensor, first.device)


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    try:
        return tensor.to(device, copy=True)
    except torch.OutOfMemoryError as error:
        raise _NotPlainError(
            "the device has no room for the experts: bound the KV cache, see engine.expert_memory"
        ) from error


def _same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _alone(fingerprint: str, base: str, dtype: DType) -> Recipe:
    return Recipe(base, ((fingerprint, 1.0),), dtype)


def _some_mixture(fingerprints: Sequence[str], base: str, dtype: DType) -> Recipe:
    """All models with weights of either sign that sum to 1."""
    drawn = random.Random(0)
    weights = [drawn.uniform(0.1, 0.5) * (-1) ** index for index in range(1, len(fingerprints))]
    return Recipe(base, ((base, 1.0 - math.fsum(weights)), *zip(fingerprints[1:], weights, strict=True)), dtype)
