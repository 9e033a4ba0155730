"""load_kernel: built once, from nobody else's folder, and where it cannot be built it says why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from cocktail_serve.dtypes import FLOATING
from cocktail_serve.merging import native
from cocktail_serve.merging.linear import merge_param
from cocktail_serve.merging.native import Kernel, load_kernel
from vllm_cocktail.unmerged.kernel import self_check
from vllm_cocktail.unmerged.native_kernel import NativeKernel, load_native


@pytest.fixture(autouse=True)
def anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_BUILD_TIMEOUT_S", 500.0)  # other tests may have the cores
    load_kernel.cache_clear()
    yield
    load_kernel.cache_clear()


@pytest.fixture
def compiler() -> None:
    if native.find_compiler() is None:
        pytest.skip("no C compiler")


@pytest.mark.usefixtures("compiler")
def test_it_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(load_kernel(), Kernel)
    (built,) = (tmp_path / "cocktail-serve" / "kernels").iterdir()
    assert built.suffix == ".so"
    monkeypatch.setattr(native, "build", lambda *args: pytest.fail("built twice"))
    load_kernel.cache_clear()
    assert isinstance(load_kernel(), Kernel)


@pytest.mark.usefixtures("compiler")
def test_code_that_others_could_have_written_is_not_loaded(tmp_path: Path) -> None:
    load_kernel()
    folder = tmp_path / "cocktail-serve" / "kernels"
    (built,) = folder.iterdir()
    built.unlink()  # this process has it mapped
    built.write_bytes(b"no library")
    for path in (folder, built):
        path.chmod(0o777)
        load_kernel.cache_clear()
        assert isinstance(load_kernel(), Kernel)  # built elsewhere
        path.chmod(0o700)
    assert built.read_bytes() == b"no library"


@pytest.mark.usefixtures("compiler")
def test_a_home_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert isinstance(load_kernel(), Kernel)


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert load_kernel() == "there is no C compiler (cc, gcc or clang)"


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho 'no such header' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert load_kernel() == f"{broken} cannot build it: no such header"


def test_a_compiler_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "slow-cc"
    slow.write_text("#!/bin/sh\necho 'a warning' >&2\nexec sleep 600\n")
    slow.chmod(0o755)
    monkeypatch.setenv("CC", str(slow))
    monkeypatch.setattr(native, "_BUILD_TIMEOUT_S", 0.5)
    assert load_kernel() == f"{slow} did not build it within 0.5 s"


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("architecture", ["x86-64", "haswell"])
def test_older_machines_compute_the_same_bits(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in for AVX-512 and half precision conversions, on all bit patterns of 16 bits and odd sizes."""
    if native.platform.machine() != "x86_64":
        pytest.skip("for x86 alone")
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "bfloat16": patterns.view(torch.bfloat16),
        "float16": patterns.view(torch.float16),
        "float32": torch.randint(-(2**31), 2**31 - 1, (2**16,), generator=generator, dtype=torch.int64)
        .to(torch.int32)
        .view(torch.float32),
        "float64": torch.randn(2**16, generator=generator, dtype=torch.float64) * 1e-38,
    }
    assert inputs.keys() == FLOATING
    pairs = [[inputs[a][:65_529], inputs[b].flip(0)[:65_529]] for a in inputs for b in inputs]

    def merged() -> list[np.ndarray]:
        dtypes = (torch.bfloat16, torch.float16, torch.float32)
        return [merge_param(pair, [0.3, 0.7], out_dtype=t).float().numpy() for pair in pairs for t in dtypes]

    own = merged()
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, f"-march={architecture}"))
    load_kernel.cache_clear()
    assert isinstance(load_kernel(), Kernel)
    for mine, theirs in zip(own, merged(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("architecture", ["x86-64", "haswell"])
def test_older_machines_compute_the_product_of_a_step(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native.platform.machine() != "x86_64":
        pytest.skip("for x86 alone")
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, f"-march={architecture}"))
    library = load_native.__wrapped__()
    assert not isinstance(library, str)
    assert len(list((tmp_path / "cocktail-serve" / "kernels").iterdir())) == 1
    assert self_check(NativeKernel(library)) is None
