"""Experts in the engine's layout: a model with fused, padded, transposed and derived parameters, reloaded by us."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cocktail_serve.dtypes import DType
from cocktail_serve.merging.linear import merge_param
from cocktail_serve.recipe import Recipe
from vllm_cocktail.captured import CapturedExperts, capture

MEMBERS = ("0" * 64, "1" * 64, "2" * 64)
BASE, RED, GREEN = MEMBERS
HIDDEN, VOCAB, PADDED = 8, 10, 16


def make_checkpoint(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    names = ("q", "k", "v", "o")
    return {
        "embed": draw(VOCAB, HIDDEN),
        "norm": draw(HIDDEN),
        **{name: draw(HIDDEN, HIDDEN) for name in names},
        "scale": draw(HIDDEN),
    }


class Attention(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.zeros(3 * HIDDEN, HIDDEN, dtype=dtype), requires_grad=False)
        # stored the other way round, as some kernels want it
        self.out = nn.Parameter(torch.zeros(HIDDEN, HIDDEN, dtype=dtype).t(), requires_grad=False)
        self.kv_cache = torch.zeros(1000, dtype=dtype)
        self.register_buffer("rotary", torch.arange(12, dtype=torch.float32).cos())


class Engine(nn.Module):
    """Its parameters in a layout of its own, and `load`, which streams a recipe into it as a reload would.

    Attributes:
        after_load: what a layer further does with its parameters.
    """

    def __init__(self, dtype: DType = "bfloat16") -> None:
        super().__init__()
        self.dtype: DType = dtype
        kind: torch.dtype = getattr(torch, dtype)
        self.embed = nn.Parameter(torch.zeros(PADDED, HIDDEN, dtype=kind), requires_grad=False)
        self.head = self.embed  # tied
        self.norm = nn.Parameter(torch.zeros(HIDDEN, dtype=kind), requires_grad=False)
        self.scale = nn.Parameter(torch.zeros(HIDDEN, dtype=torch.float32), requires_grad=False)
        self.attention = Attention(kind)
        self.checkpoints = SimpleNamespace(of={f: make_checkpoint(i, kind) for i, f in enumerate(MEMBERS)})
        self.loaded: list[Recipe] = []
        self.after_load: Callable[[Engine], None] = lambda engine: None

    def load(self, recipe: Recipe) -> None:
        self.loaded.append(recipe)
        models = [self.checkpoints.of[fingerprint] for fingerprint, _ in recipe.coefficients]
        weights = [weight for _, weight in recipe.coefficients]
        merged = {
            name: merge_param([model[name] for model in models], weights, out_dtype=getattr(torch, recipe.dtype))
            for name in models[0]
        }
        self.embed[:VOCAB] = merged["embed"]
        self.norm.copy_(merged["norm"])
        self.scale.copy_(merged["scale"])
        self.attention.qkv.copy_(torch.cat([merged[name] for name in "qkv"]))
        self.attention.out.copy_(merged["o"])
        self.after_load(self)

    def contents(self) -> dict[str, Tensor]:
        return {name: parameter.clone() for name, parameter in self.named_parameters()}


def captured(engine: Engine, *, max_bytes: int = 2**20, members: tuple[str, ...] = MEMBERS) -> CapturedExperts | str:
    return capture(
        engine,
        members,
        base=BASE,
        dtype=engine.dtype,
        load=engine.load,
        max_bytes=max_bytes,
        # where the checkpoints of these tests lie is no part of the model either
        excluded=[engine.attention.kv_cache, *_checkpoint_tensors(engine)],
    )


def _checkpoint_tensors(engine: Engine) -> Iterator[Tensor]:
    for checkpoint in engine.checkpoints.of.values():
        yield from checkpoint.values()


def recipe_of(*coefficients: tuple[str, float], dtype: DType = "bfloat16", **changes: Any) -> Recipe:
    return Recipe(BASE, coefficients, dtype, **changes)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_sum_in_place_gives_the_bits_of_a_reload(dtype: DType, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    engine = Engine(dtype).to(device)
    experts = captured(engine)
    assert isinstance(experts, CapturedExperts)
    assert experts.fingerprints == list(MEMBERS)
    addresses = {name: parameter.data_ptr() for name, parameter in engine.named_parameters()}
    for recipe in (
        recipe_of((BASE, 0.3), (RED, 0.3), (GREEN, 0.4), dtype=dtype),
        recipe_of((RED, 1.7), (GREEN, -0.7), dtype=dtype),
        recipe_of((GREEN, 1.0), dtype=dtype),
    ):
        assert experts.holds(recipe)
        engine.load(recipe)
        streamed = engine.contents()
        engine.load(recipe_of((BASE, 1.0), dtype=dtype))
        experts.mix(recipe)
        in_place = engine.contents()
        assert all(torch.equal(in_place[name], streamed[name]) for name in streamed)
    assert {name: parameter.data_ptr() for name, parameter in engine.named_parameters()} == addresses
    assert torch.equal(engine.attention.rotary.cpu(), torch.arange(12, dtype=torch.float32).cos())
    assert not engine.attention.kv_cache.any()


def test_every_model_is_reloaded_once_and_a_mixture_of_all() -> None:
    engine = Engine()
    captured(engine)
    first, *alone, mixture = [dict(recipe.coefficients) for recipe in engine.loaded]
    assert first == {BASE: 1.0}
    assert alone == [{RED: 1.0}, {GREEN: 1.0}]
    assert set(mixture) == set(MEMBERS)
    assert min(mixture.values()) < 0
    assert sum(mixture.values()) == pytest.approx(1.0)


def test_what_fits_is_kept_and_the_rest_streams() -> None:
    engine = Engine()
    one = sum(parameter.nbytes for parameter in engine.parameters())
    experts = captured(engine, max_bytes=int(2.5 * one))
    assert isinstance(experts, CapturedExperts)
    assert experts.fingerprints == [BASE, RED]
    assert experts.num_bytes == 2 * one
    assert experts.holds(recipe_of((BASE, 0.5), (RED, 0.5)))
    assert not experts.holds(recipe_of((BASE, 0.5), (GREEN, 0.5)))


def test_other_methods_are_no_sums() -> None:
    experts = captured(Engine())
    assert isinstance(experts, CapturedExperts)
    assert not experts.holds(recipe_of((BASE, 1.0), (RED, 0.5), method="ties"))


def test_less_memory_than_two_models_streams() -> None:
    assert "holds less than two models" in str(captured(Engine(), max_bytes=1000))


def test_what_an_expert_shares_with_the_base_is_kept_once() -> None:
    engine = Engine()
    engine.checkpoints.of[RED] = engine.checkpoints.of[BASE] | {"norm": engine.checkpoints.of[RED]["norm"]}
    experts = captured(engine, members=(BASE, RED))
    assert isinstance(experts, CapturedExperts)
    assert experts.num_bytes == sum(p.nbytes for p in engine.parameters()) + engine.norm.nbytes


def test_a_tensor_derived_linearly_moves_along() -> None:
    engine = Engine()
    engine.attention.absorbed = torch.zeros(HIDDEN, dtype=torch.bfloat16)
    engine.after_load = lambda e: e.attention.absorbed.copy_(e.norm).mul_(2.0)  # exact
    experts = captured(engine)
    assert isinstance(experts, CapturedExperts)
    experts.mix(recipe_of((RED, 0.5), (GREEN, 0.5)))
    assert torch.equal(engine.attention.absorbed, engine.norm * 2.0)


class Handle:
    """What a library made of a parameter: nothing but a number leads there."""

    def __init__(self, parameter: Tensor) -> None:
        self.packed = torch.tensor(hash(tuple(parameter.flatten().tolist())))


def _derives_a_square(engine: Engine) -> None:
    engine.attention.squared.copy_(engine.norm.float().square())


def _takes_the_logarithm(engine: Engine) -> None:
    engine.scale.copy_(-engine.scale.exp())


def _moves_a_parameter(engine: Engine) -> None:
    engine.norm = nn.Parameter(engine.norm.clone(), requires_grad=False)


def _packs_behind_a_closure(engine: Engine) -> None:
    handle = Handle(engine.attention.qkv)
    engine.attention.linear = lambda x: (x, handle)


def _derives_elsewhere(engine: Engine) -> None:
    engine.attention.squared = engine.norm * 2


def _derives_now_and_then(engine: Engine) -> None:
    if len(engine.loaded) > 1:
        engine.attention.late = engine.norm * 2


def _packs_in_place(engine: Engine) -> None:
    engine.attention.handle.copy_(Handle(engine.attention.qkv).packed)


def _empties_a_parameter(engine: Engine) -> None:
    engine.attention.packed = nn.Parameter(torch.empty(0), requires_grad=False)


@pytest.mark.parametrize(
    ("after_load", "reason"),
    [
        (_derives_a_square, "squared is not a linear image"),
        (_takes_the_logarithm, "scale is not a linear image"),
        (_moves_a_parameter, "elsewhere in memory"),
        (_packs_behind_a_closure, "packed is made anew"),
        (_derives_elsewhere, "elsewhere in memory"),
        (_derives_now_and_then, "after one reload and not after another"),
        (_packs_in_place, "handle is made anew"),
        (_empties_a_parameter, "packed is packed by its layer"),
    ],
)
def test_what_is_no_linear_image_of_the_checkpoint_streams(after_load: Callable[[Engine], None], reason: str) -> None:
    engine = Engine()
    engine.attention.squared = torch.zeros(HIDDEN)
    engine.attention.handle = torch.zeros((), dtype=torch.int64)
    engine.after_load = after_load
    assert reason in str(captured(engine))


def test_a_constant_may_be_made_anew() -> None:
    engine = Engine()
    engine.after_load = lambda e: setattr(e.attention, "one", torch.ones(3))
    assert isinstance(captured(engine), CapturedExperts)


def test_a_tensor_that_only_a_mixture_changes_streams() -> None:
    engine = Engine()
    engine.attention.constant = torch.zeros(1)
    engine.after_load = lambda e: e.attention.constant.fill_(len(e.loaded[-1].coefficients) > 1)
    assert "constant is made anew" in str(captured(engine))


def test_memory_seen_as_two_dtypes_streams() -> None:
    engine = Engine()
    engine.attention.bits = engine.norm.data.view(torch.int16)
    assert "another dtype" in str(captured(engine))


def test_an_integer_parameter_streams() -> None:
    engine = Engine()
    engine.attention.index = nn.Parameter(torch.arange(3), requires_grad=False)
    assert "index is torch.int64" in str(captured(engine))


def test_no_room_on_the_device_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()

    def full(*args: Any, **kwargs: Any) -> Tensor:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(Tensor, "to", full)
    assert "no room for the experts" in str(captured(engine))


def test_a_failed_reload_is_no_reason_to_stream() -> None:
    engine = Engine()

    def fail(engine: Engine) -> None:
        raise torch.OutOfMemoryError("full")

    engine.after_load = fail
    with pytest.raises(torch.OutOfMemoryError):
        captured(engine)
