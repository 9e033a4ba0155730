"""The product of a step against float64, compiled and in torch: shapes, ranks, rows, strides, experts that come."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_cocktail.unmerged import native_kernel
from vllm_cocktail.unmerged.kernel import (
    DTYPES,
    Factors,
    Kernel,
    LayerShape,
    Limits,
    exact_sum,
    load_kernel,
    self_check,
)
from vllm_cocktail.unmerged.native_kernel import NativeKernel, load_native
from vllm_cocktail.unmerged.torch_kernel import StackedKernel, TorchKernel

CPU = torch.device("cpu")
LIMITS = Limits(max_rows=430, max_experts=6, max_ranks=360)
"""Of six requests of 70 rows and padding, and of five experts of rank 70: the largest of `cases`."""


def make_kernel(name: str) -> Kernel:
    if name == "torch":
        return TorchKernel("asked for")
    if name == "stacked":
        return StackedKernel(CPU, LIMITS)
    library = load_native()
    if isinstance(library, str):
        pytest.skip(library)
    return NativeKernel(library)


@pytest.fixture(params=["compiled", "torch"])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return make_kernel(request.param)


@pytest.fixture(params=[1, 2, 3], ids=lambda count: f"{count}-threads")
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


class Case:
    """A layer with its factors, a step, and rows that are parts of wider tensors filled with NaN."""

    def __init__(
        self, shape: LayerShape, ranks: dict[tuple[int, int], int], lengths: list[int], padding: int, seed: int
    ):
        self.shape, self.lengths = shape, np.array(lengths, dtype=np.int32)
        generator, numbers = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
        num_rows, num_experts = sum(lengths) + padding, 1 + max((expert for expert, _ in ranks), default=0)
        self.factors: Factors = {
            (expert, index): (
                torch.randn(rank, shape.in_features, generator=generator).to(shape.dtype),
                torch.randn(shape.output_sizes[index], rank, generator=generator).to(shape.dtype),
                float(numbers.uniform(-2, 2)),
            )
            for (expert, index), rank in ranks.items()
        }
        self.coefficients = numbers.standard_normal((len(lengths), num_experts)).astype(np.float32)
        self.coefficients[numbers.random(self.coefficients.shape) < 0.5] = 0
        wide = torch.full((num_rows, shape.in_features + 3), float("nan"), dtype=shape.dtype)
        self.x = wide[:, 1:-2]
        self.x[:] = torch.randn(num_rows, shape.in_features, generator=generator)
        if shape.is_embedding:
            self.x = torch.randint(
                shape.in_features, (num_rows,), generator=generator, dtype=(torch.int32, torch.int64)[seed % 2]
            )
        self.wide_y = torch.full((num_rows, shape.out_features + 5), float("nan"), dtype=shape.dtype)
        self.y = self.wide_y[:, 2:-3]
        self.y[:] = torch.randn(num_rows, shape.out_features, generator=generator)
        self.y[self.y.abs() < 0.1] = -0.0  # added to a positive zero it would lose its sign

    def __repr__(self) -> str:
        ranks = {place: len(lora_a) for place, (lora_a, *_) in self.factors.items()}
        return f"{self.shape}, ranks {ranks}, lengths {self.lengths.tolist()} of {len(self.x)} rows"

    def rows(self) -> np.ndarray:
        rows = np.repeat(self.coefficients, self.lengths, axis=0)
        return np.concatenate([rows, np.zeros((len(self.x) - len(rows), rows.shape[1]), np.float32)])

    def add(self, kernel: Kernel) -> None:
        layer, step = kernel.new_layer(self.shape), kernel.new_step()
        for (expert, index), (lora_a, lora_b, scaling) in self.factors.items():
            layer.set_factors(expert, index, lora_a, lora_b, scaling)
        step.set(self.coefficients, self.lengths)
        # torch's own bfloat16 product on a CPU with AMX brings in what lies beside a row of odd length
        # (findings/torch_amx_product_reads_beside_a_view.sh): not of rows that lie close together, as engines give them
        x = self.x.contiguous() if isinstance(kernel, StackedKernel) else self.x
        kernel.add(step, layer, x, self.y)

    def check(self, kernel: Kernel, slack: float = 0) -> None:
        """Holds a kernel to the exact sum.

        Args:
            slack: by which part of the magnitudes of all that is added it may be off besides: they can be far more than
                what comes out.
        """
        exact, bound = exact_sum(self.shape, self.factors, self.coefficients, self.lengths, x=self.x, y=self.y)
        before = self.wide_y.clone()
        unit = torch.finfo(self.shape.dtype)
        rounded = exact.abs().clamp_min(unit.tiny) * unit.eps / 2 * 1.01
        added = self.y.double().abs() + (bound - rounded) * 2.0**20  # as `exact_sum` bounds the sums of float32
        self.add(kernel)
        assert bool(((self.y.double() - exact).abs() <= bound + slack * added).all())
        if isinstance(kernel, StackedKernel):
            return
        is_added = torch.zeros(self.wide_y.shape, dtype=torch.bool)
        begins = np.cumsum((0, *self.shape.output_sizes)) + 2
        for (expert, index), (lora_a, *_) in self.factors.items():
            if len(lora_a):
                is_used = torch.from_numpy(self.rows()[:, expert] != 0)
                is_added[is_used, begins[index] : begins[index + 1]] = True
        integer = torch.int32 if self.shape.dtype is torch.float32 else torch.int16
        same = self.wide_y.view(integer) == before.view(integer)
        assert bool(same[~is_added].all())


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Case:
    sizes = tuple(draw(st.lists(st.integers(1, 200), min_size=1, max_size=3)))
    shape = LayerShape(draw(st.integers(1, 300)), sizes, draw(st.sampled_from(dtypes)), draw(st.booleans()))
    places = st.tuples(st.integers(0, 4), st.integers(0, len(sizes) - 1))
    ranks = draw(st.dictionaries(places, st.integers(0, 70), max_size=8))
    lengths = draw(st.lists(st.integers(0, 9) | st.integers(60, 70), min_size=1, max_size=6))
    return Case(shape, ranks, lengths, draw(st.integers(0, 3)), draw(st.integers(0, 2**16)))


@pytest.mark.usefixtures("threads")
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_compiled_is_the_sum_in_float64(case: Case) -> None:
    case.check(make_kernel("compiled"))


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_torch_is_the_sum_in_float64(case: Case) -> None:
    case.check(make_kernel("torch"))


@settings(max_examples=30, deadline=None)
@given(case=cases(dtypes=(torch.float32,)))
def test_stacked_is_the_sum_in_float64(case: Case) -> None:
    case.check(make_kernel("stacked"))


@settings(max_examples=30, deadline=None)
@given(case=cases(dtypes=(torch.bfloat16,)))
def test_stacked_rounds_twice_more(case: Case) -> None:
    case.check(make_kernel("stacked"), slack=2**-5)


def simple_case(dtype: torch.dtype = torch.bfloat16) -> Case:
    ranks = {(expert, index): 4 for expert in range(4) for index in range(2)}
    return Case(LayerShape(64, (96, 32), dtype), ranks, [2, 1, 3], 1, seed=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    """On however many threads, and beside whatever rows."""
    kernel = make_kernel("compiled")
    ranks = {(expert, 0): 9 for expert in range(5)}
    whole = Case(LayerShape(576, (1000,), dtype), ranks, [1] * 90, 0, seed=1)
    before = whole.y.clone()
    whole.add(kernel)
    for row in (0, 3, 63, 64, 89):
        alone = Case(LayerShape(576, (1000,), dtype), ranks, [1] * 90, 0, seed=1)
        alone.coefficients, alone.lengths = alone.coefficients[row : row + 1], alone.lengths[:1]
        alone.x, alone.y = alone.x[row : row + 1], before[row : row + 1].clone()
        alone.add(kernel)
        assert torch.equal(alone.y[0], whole.y[row])


def test_factors_that_no_row_uses_do_not_leak(kernel: Kernel) -> None:
    case = simple_case()
    case.coefficients[:, 1] = 0
    lora_a, lora_b, _ = case.factors[1, 0]
    case.factors[1, 0] = torch.full_like(lora_a, float("nan")), torch.full_like(lora_b, float("inf")), float("nan")
    expected = simple_case()
    expected.coefficients = case.coefficients
    expected.add(kernel)
    case.add(kernel)
    assert torch.equal(case.y, expected.y)


def test_a_row_that_does_not_use_an_expert_gets_nothing_of_it(kernel: Kernel) -> None:
    case = simple_case()
    case.coefficients[:] = np.eye(3, 4)
    lora_a, lora_b, scaling = case.factors[0, 0]
    case.factors[0, 0] = lora_a, torch.full_like(lora_b, float("nan")), scaling
    before = case.y.clone()
    case.add(kernel)
    assert bool(case.y[:2, :96].isnan().all())
    assert not bool(case.y[2:].isnan().any())
    assert not torch.equal(case.y[2:6], before[2:6])


@pytest.mark.parametrize("name", ["compiled", "torch", "stacked"])
def test_experts_come_and_change_while_others_stay(name: str) -> None:
    kernel, case = make_kernel(name), simple_case(torch.float32)
    layer, step = kernel.new_layer(case.shape), kernel.new_step()
    step.set(case.coefficients, case.lengths)
    given: Factors = {}
    for seed, (expert, index, rank) in enumerate([(3, 0, 4), (0, 1, 2), (5, 0, 70), (3, 0, 4), (3, 0, 6), (0, 0, 1)]):
        width = case.shape.output_sizes[index]
        generator = torch.Generator().manual_seed(seed)
        given[expert, index] = (
            torch.randn(rank, 64, generator=generator),
            torch.randn(width, rank, generator=generator),
            0.5,
        )
        layer.set_factors(expert, index, *given[expert, index])
        used = {place: factors for place, factors in given.items() if place[0] < case.coefficients.shape[1]}
        y = case.y.clone()
        exact, bound = exact_sum(case.shape, used, case.coefficients, case.lengths, x=case.x, y=y)
        kernel.add(step, layer, case.x, y)
        assert bool(((y.double() - exact).abs() <= bound).all())


def test_a_step_follows_another(kernel: Kernel) -> None:
    """Longer, shorter, empty: nothing of an earlier one is left."""
    step, layer = kernel.new_step(), kernel.new_layer(LayerShape(16, (16,), torch.float32))
    layer.set_factors(0, 0, torch.eye(16), torch.eye(16), 1.0)
    x = torch.ones(400, 16)
    y = torch.zeros(400, 16)
    kernel.add(step, layer, x, y)
    assert not bool(y.any())
    for lengths in ([1, 1], [130, 0, 200], [3], [0, 0], []):
        step.set(np.ones((len(lengths), 1), np.float32), lengths)
        assert step.num_rows == sum(lengths)
        y.zero_()
        kernel.add(step, layer, x, y)
        assert bool((y[: sum(lengths)] == 1).all())
        assert not bool(y[sum(lengths) :].any())


def test_not_a_number_in_y_stays_one(kernel: Kernel) -> None:
    case = simple_case()
    case.coefficients[:] = 1
    case.y[0] = float("nan")
    case.y[1] = float("inf")
    case.add(kernel)
    assert bool(case.y[0].isnan().all())
    assert bool(case.y[1].isinf().all())
    assert bool(case.y[2:].isfinite().all())


def test_handles_stand_for_steps_and_layers(kernel: Kernel) -> None:
    case, other = simple_case(), simple_case()
    case.add(kernel)
    layer, step = kernel.layers[-1], kernel.steps[-1]
    kernel.new_layer(case.shape)
    kernel.new_step()
    kernel.add_by_handle(other.x, other.y, layer.handle, step.handle)
    assert torch.equal(other.y, case.y)


@pytest.mark.parametrize("name", ["compiled", "torch", "stacked"])
def test_what_does_not_fit_is_refused(name: str) -> None:
    kernel, case = make_kernel(name), simple_case()
    case.add(kernel)
    layer, step = kernel.layers[-1], kernel.steps[-1]
    y = case.y.clone()
    for wrong_x, wrong_y in [
        (case.x[:5], y[:5]),
        (case.x, y[:-1]),
        (case.x[:, :-1], y),
        (case.x, y[:, :-1]),
        (case.x.float(), y),
        (case.x, y.float()),
        (case.x.T.contiguous().T, y),
        (case.x, y.T.contiguous().T),
        (case.x[:, 0], y),
    ]:
        with pytest.raises(ValueError, match="are not rows of"):
            kernel.add(step, layer, wrong_x, wrong_y)
    for lora_a, lora_b in [((4, 63), (96, 4)), ((4, 64), (95, 4)), ((4, 64), (96, 3)), ((4, 64), (4, 96))]:
        with pytest.raises(ValueError, match="slice 0 of this layer takes"):
            layer.set_factors(0, 0, torch.zeros(lora_a), torch.zeros(lora_b), 1.0)
    with pytest.raises(ValueError, match="must not be negative"):
        layer.set_factors(-1, 0, torch.zeros(4, 64), torch.zeros(96, 4), 1.0)
    for lengths in ([1], [1, 1, -1]):
        with pytest.raises(ValueError, match="lengths >= 0"):
            step.set(case.coefficients, lengths)
    assert step.num_rows == 6
    assert torch.equal(y, case.y)


def test_a_layer_must_have_sizes_and_a_known_dtype() -> None:
    for shape in ((0, (1,)), (1, ()), (1, (4, 0))):
        with pytest.raises(ValueError, match="all must be positive"):
            LayerShape(*shape, torch.float32)
    with pytest.raises(ValueError, match="float64"):
        LayerShape(1, (1,), torch.float64)


def test_buffers_that_do_not_move_have_limits() -> None:
    kernel = make_kernel("stacked")
    layer, step = kernel.new_layer(LayerShape(8, (8,), torch.float32)), kernel.new_step()
    addresses = [layer.a.data_ptr(), layer.b[0].data_ptr(), step.coefficients.data_ptr()]  # type: ignore[attr-defined]
    layer.set_factors(0, 0, torch.zeros(LIMITS.max_ranks, 8), torch.zeros(8, LIMITS.max_ranks), 1.0)
    for expert, rank in ((1, 1), (6, 0)):
        with pytest.raises(ValueError, match="beyond Limits"):
            layer.set_factors(expert, 0, torch.zeros(rank, 8), torch.zeros(8, rank), 1.0)
    for num_rows, num_experts in ((LIMITS.max_rows + 1, 1), (1, 7)):
        with pytest.raises(ValueError, match="beyond Limits"):
            step.set(np.ones((1, num_experts), np.float32), [num_rows])
    step.set(np.ones((1, 6), np.float32), [LIMITS.max_rows])
    assert addresses == [layer.a.data_ptr(), layer.b[0].data_ptr(), step.coefficients.data_ptr()]  # type: ignore[attr-defined]


def test_threads_are_those_of_torch() -> None:
    """A second OpenMP runtime in the process would fight with torch's over the cores."""
    kernel = make_kernel("compiled")
    Case(LayerShape(576, (2000,), torch.float32), {(0, 0): 64}, [40], 0, seed=3).add(kernel)
    torch.ones(2000, 2000) @ torch.ones(2000, 2000)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc")
    files = {Path(line.split(maxsplit=5)[5]) for line in maps.read_text().splitlines() if "/" in line}
    assert len([file for file in files if file.name.startswith(("libgomp.so", "libomp", "libiomp"))]) == 1


def test_the_compiled_one_is_chosen_where_it_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    make_kernel("compiled")
    kernel = load_kernel(CPU, LIMITS)
    assert (kernel.name, kernel.reason) == ("compiled", None)
    assert not kernel.layers
    monkeypatch.setattr(native_kernel.NativeKernel, "_add", lambda self, step, layer, x, y: y[0].add_(1e-2))
    kernel = load_kernel(CPU, LIMITS)
    assert kernel.name == "torch"
    assert "does not compute what it should: LayerShape(in_features=48" in str(kernel.reason)
    assert "is off by" in str(kernel.reason)


def test_a_kernel_that_writes_where_it_should_not_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def add_and_touch(self: TorchKernel, *arguments: object) -> None:
        original(self, *arguments)  # type: ignore[arg-type]
        y = arguments[-1]
        assert isinstance(y, torch.Tensor)
        y[-1] = torch.nextafter(y[-1].float(), torch.tensor(9.0)).to(y.dtype)

    original = TorchKernel._add
    monkeypatch.setattr(TorchKernel, "_add", add_and_touch)
    assert "touches rows without coefficients" in str(self_check(TorchKernel()))


def test_without_a_compiler_it_is_torch_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_kernel, "load_native", lambda: "there is no C compiler (cc, gcc or clang)")
    kernel = load_kernel(CPU, LIMITS)
    assert (kernel.name, kernel.reason) == ("torch", "there is no C compiler (cc, gcc or clang)")
    assert self_check(kernel) is None


def test_a_gpu_gets_what_graphs_can_capture() -> None:
    kernel = load_kernel(torch.device("meta"), LIMITS)
    assert isinstance(kernel, StackedKernel)
    assert (kernel.name, kernel.reason) == ("torch", None)
