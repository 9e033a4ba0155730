"""What keeps factors out of an engine before any of them is read, or before they are used."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch

from cocktail_serve.checkpoints.opening import open_pool
from cocktail_serve.config import PoolConfig
from cocktail_serve.errors import ConfigError, IncompatibleModelsError, ModelChangedError, NotFiniteError
from cocktail_serve.pool import Member
from tests.adapters import train_adapter
from tests.models import make_decoder, pool_section
from vllm_cocktail.manifest import Manifest
from vllm_cocktail.unmerged.experts import UnmergedExperts, require_room
from vllm_cocktail.unmerged.factors import read_factors


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_decoder(tmp_path_factory.mktemp("base"))


def opened(base: Path, expert: Path) -> tuple[Member, Member]:
    """A base and an expert as a pool's opening finds them."""
    folders = {"base": base, "red": expert}
    section = pool_section("pico", "decoder", folders, {"type": "vllm", "mode": "merged"})
    pool = open_pool(PoolConfig.model_validate(section), cache_dir=expert.parent / "cache")
    return pool.base, pool.experts["red"]


def test_factors_that_do_not_fit_are_refused_with_their_size(tmp_path: Path) -> None:
    experts = [Member(name, tmp_path, name, "float32", 2**20) for name in ("a", "b", "c")]
    require_room(experts, 3 * 2**20)
    with pytest.raises(ConfigError, match="3 experts take 3 MiB, more than the 3 MiB of free memory"):
        require_room(experts, 3 * 2**20 - 1)


def test_what_a_failed_expert_left_behind_is_in_nobodys_column(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []

    class Layers:
        num_bytes = 0

        def add(self, expert: int, *_: object) -> None:
            taken.append(expert)
            if len(taken) == 2:
                raise MemoryError

    one, two = (opened(base, train_adapter(base, tmp_path / f"{seed}" / "red", seed=seed).folder) for seed in (1, 2))
    members = {member.fingerprint: member for member in (*one, *two)}
    manifest = Manifest(members, one[0].fingerprint, "float32", "", cache_bytes=0, managed=True, mode="unmerged")
    experts = UnmergedExperts.__new__(UnmergedExperts)
    experts.manifest, experts._reread = manifest, lambda: manifest
    experts._columns, experts._num_columns = {}, 0
    experts._layers, experts._device = Layers(), torch.device("cpu")  # type: ignore[assignment]  # it only counts
    first, second = one[1].fingerprint, two[1].fingerprint
    experts.load([first])
    with pytest.raises(MemoryError):
        experts.load([second])
    assert experts.fingerprints == [first]
    experts.load([second])
    assert taken == [0, 1, 2]
    assert experts._columns == {first: 0, second: 2}


def test_factors_are_copies_in_the_engines_dtype(base: Path, tmp_path: Path) -> None:
    trained = train_adapter(base, tmp_path / "red", r=3, target_modules=["q_proj"], use_rslora=True)
    factors = read_factors(*opened(base, trained.folder), dtype="bfloat16")
    assert set(factors) == {f"model.layers.{index}.self_attn.q_proj.weight" for index in range(2)}
    before = {name: factor.down.clone() for name, factor in factors.items()}
    stored = tmp_path / "red" / "adapter_model.safetensors"
    stored.write_bytes(bytes(stored.stat().st_size))
    for name, factor in factors.items():
        assert (factor.down.dtype, factor.up.dtype) == (torch.bfloat16, torch.bfloat16)
        assert factor.down.shape == (3, 64)
        assert factor.scaling == pytest.approx(12 / math.sqrt(3))
        assert not factor.is_turned
        assert factor.down.equal(before[name])


def test_the_base_by_another_name_has_no_factors(base: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(base, copied)
    assert read_factors(*opened(base, copied), dtype="float32") == {}


def test_a_full_model_is_no_adapter(base: Path, tmp_path: Path) -> None:
    full = make_decoder(tmp_path / "full", perturbation_seed=1)
    with pytest.raises(IncompatibleModelsError, match="full model"):
        read_factors(*opened(base, full), dtype="float32")


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 5]}],
    ids=lambda options: next(iter(options)),
)
def test_what_is_more_than_two_factors_is_refused(base: Path, tmp_path: Path, options: dict[str, object]) -> None:
    trained = train_adapter(base, tmp_path / "red", target_modules=["q_proj", "v_proj"], **options)
    with pytest.raises(IncompatibleModelsError, match=r"engine\.mode: merged"):
        read_factors(*opened(base, trained.folder), dtype="float32")


def test_a_factor_that_the_engines_dtype_cannot_hold_is_named(base: Path, tmp_path: Path) -> None:
    trained = train_adapter(base, tmp_path / "red", target_modules=["q_proj"])
    with torch.no_grad():
        for name, parameter in trained.model.named_parameters():
            if "lora_B" in name:
                parameter[0, 0] = 1e6
    trained.model.save_pretrained(tmp_path / "red")
    members = opened(base, tmp_path / "red")
    read_factors(*members, dtype="float32")
    with pytest.raises(NotFiniteError, match="lora_B"):
        read_factors(*members, dtype="float16")


def test_files_that_changed_are_not_taken_for_the_expert(base: Path, tmp_path: Path) -> None:
    train_adapter(base, tmp_path / "red", seed=1)
    members = opened(base, tmp_path / "red")
    assert len(read_factors(*members, dtype="float32")) == 14
    train_adapter(base, tmp_path / "red", seed=2)
    with pytest.raises(ModelChangedError):
        read_factors(*members, dtype="float32")
