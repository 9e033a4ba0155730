"""What the worker feeds into the engine, and what it keeps in memory: real files, no vLLM."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cocktail_serve.checkpoints.mixture import iter_mixture
from cocktail_serve.checkpoints.opening import open_pool
from cocktail_serve.config import PoolConfig
from cocktail_serve.errors import ConfigError, InvalidMixError, ModelChangedError, NotFiniteError
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import Recipe, make_recipe
from tests.merging import merged
from tests.models import pool_section
from tests.plugin import make_plugin_pool, recipe_of
from vllm_cocktail import buffers
from vllm_cocktail import mixer as mixing
from vllm_cocktail.cache import MergedParams
from vllm_cocktail.manifest import Manifest
from vllm_cocktail.mixer import Mixer


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return make_plugin_pool(tmp_path_factory.mktemp("pool"))


def mixer_of(pool: Pool, *, cache_bytes: int = 2**30) -> Mixer:
    manifest = Manifest.of_pool(pool, dtype="float32", cache_bytes=cache_bytes, managed=True)
    return Mixer(manifest, cache_bytes=cache_bytes)


def test_the_second_time_comes_from_memory_with_the_same_bits(pool: Pool) -> None:
    mixer, recipe = mixer_of(pool), recipe_of(pool, base=0.3, red=0.7)
    fresh, source = mixer.params(recipe)
    first = dict(fresh)
    assert source == "files"
    kept, source = mixer.params(recipe)
    assert source == "cache"
    again = dict(kept)
    assert list(again) == list(first)
    assert set(again) == mixer.tensor_names
    for name, tensor in iter_mixture(recipe, mixer.manifest.members):
        assert torch.equal(tensor, again[name])


def test_any_method_is_mixed_and_kept(pool: Pool) -> None:
    mixer, weights = mixer_of(pool), {"red": 0.8, "green": 0.5}
    recipe = make_recipe(pool, weights, dtype="float32", method="ties", method_params={"density": 0.3})
    fresh, _ = mixer.params(recipe)
    params = dict(fresh)
    stored = {name: load_file(pool.member(name).path / "model.safetensors") for name in ("base", *weights)}
    assert params.keys() == stored["base"].keys()
    for key, param in params.items():
        exact = merged("ties", {name: s[key].double().numpy() for name, s in stored.items()}, weights, density=0.3)
        torch.testing.assert_close(param.double(), torch.from_numpy(exact), rtol=1e-6, atol=1e-5)
    again, source = mixer.params(recipe)
    kept = dict(again)
    assert (source, kept.keys()) == ("cache", params.keys())
    assert all(torch.equal(tensor, params[name]) for name, tensor in kept.items())


def test_half_a_mixture_is_not_kept(pool: Pool) -> None:
    mixer, recipe = mixer_of(pool), recipe_of(pool, base=0.3, red=0.7)
    params, _ = mixer.params(recipe)
    next(params)
    params.close()  # type: ignore[attr-defined]  # a generator
    assert recipe.digest not in mixer.cache
    assert mixer.cache.num_bytes == 0


def test_a_model_of_the_pool_is_read_from_its_files_every_time(pool: Pool) -> None:
    mixer, recipe = mixer_of(pool), recipe_of(pool, red=1.0)
    for _ in range(2):
        params, source = mixer.params(recipe)
        assert source == "files"
        list(params)
    assert mixer.cache.digests == []


def test_memory_stays_within_its_budget(pool: Pool) -> None:
    recipes = [recipe_of(pool, base=1 - w, red=w) for w in (0.1, 0.2, 0.3)]
    one = sum(tensor.nbytes for _, tensor in iter_mixture(recipes[0], mixer_of(pool).manifest.members))
    mixer = mixer_of(pool, cache_bytes=2 * one)
    for recipe in [recipes[0], recipes[1], recipes[0], recipes[2]]:
        list(mixer.params(recipe)[0])
        assert mixer.cache.num_bytes <= 2 * one
    assert mixer.cache.digests == [recipes[0].digest, recipes[2].digest]  # the second was least recently used
    list(mixer_of(pool, cache_bytes=one - 1).params(recipes[0])[0])
    too_small = mixer_of(pool, cache_bytes=one - 1)
    list(too_small.params(recipes[0])[0])
    assert too_small.cache.digests == []


def test_memory_is_used_again_when_nobody_holds_it(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "SMALLEST", 1)
    mixer, recipes = mixer_of(pool), [recipe_of(pool, base=1 - w, red=w) for w in (0.1, 0.2, 0.3)]
    kept = dict(mixer.params(recipes[0])[0])
    addresses = {tensor.data_ptr() for tensor in kept.values()}
    held, tensor = max(kept.items(), key=lambda item: item[1].numel())
    view, content = tensor[:1], tensor[:1].clone()  # as vLLM may hold a part of a layer
    mixer.cache.forget(recipes[0].digest)
    del kept, tensor
    second, third = (dict(mixer.params(recipe)[0]) for recipe in recipes[1:])
    assert {tensor.data_ptr() for tensor in second.values()} >= addresses - {view.data_ptr()}
    assert view.data_ptr() not in {tensor.data_ptr() for tensor in (*second.values(), *third.values())}
    assert torch.equal(view, content)
    for recipe, params in zip(recipes[1:], (second, third), strict=True):
        for name, expected in iter_mixture(recipe, mixer.manifest.members):
            assert torch.equal(params[name], expected)
    assert second[held].data_ptr() != third[held].data_ptr()


def broken(pool: Pool) -> Iterator[tuple[Recipe, str]]:
    good = recipe_of(pool, base=0.5, red=0.5)
    yield replace(good, base=pool.experts["red"].fingerprint), "base"
    yield replace(good, dtype="bfloat16"), "bfloat16"
    yield replace(good, method="fisher"), "fisher"
    yield replace(good, coefficients=()), "no coefficients"
    yield replace(good, coefficients=(("f" * 64, 1.0),)), "ffff"


def test_a_recipe_that_does_not_fit_is_refused_before_the_first_tensor(pool: Pool) -> None:
    mixer = mixer_of(pool)
    for recipe, message in broken(pool):
        with pytest.raises(InvalidMixError, match=message):
            mixer.check(recipe)
        with pytest.raises(InvalidMixError, match=message):
            mixer.params(recipe)


def test_files_that_no_longer_fit_are_found_before_the_first_tensor(pool: Pool, tmp_path: Path) -> None:
    recipe = recipe_of(pool, base=0.5, red=0.5)
    red = tmp_path / "red"
    red.mkdir()
    for file in pool.experts["red"].path.iterdir():
        (red / file.name).write_bytes(file.read_bytes())
    mixer = mixer_of(replace(pool, experts={**pool.experts, "red": replace(pool.experts["red"], path=red)}))
    mixer.check(recipe)
    save_file({"model.norm.weight": torch.zeros(3)}, red / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelChangedError, match="red"):
        mixer.check(recipe)
    (red / "model.safetensors").unlink()
    with pytest.raises(ModelChangedError, match="red"):
        mixer.check(recipe)


def test_what_is_kept_needs_no_files(pool: Pool, tmp_path: Path) -> None:
    recipe = recipe_of(pool, base=0.5, red=0.5)
    red = tmp_path / "red"
    shutil.copytree(pool.experts["red"].path, red)
    mixer = mixer_of(replace(pool, experts={**pool.experts, "red": replace(pool.experts["red"], path=red)}))
    params = dict(mixer.params(recipe)[0])
    shutil.rmtree(red)
    mixer.check(recipe)
    again, source = mixer.params(recipe)
    kept = dict(again)
    assert (source, kept.keys()) == ("cache", params.keys())
    assert all(torch.equal(tensor, params[name]) for name, tensor in kept.items())
    mixer.cache.forget(recipe.digest)
    with pytest.raises(ModelChangedError, match="red"):
        mixer.check(recipe)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not say what is mapped")
def test_files_stay_mapped_once_between_mixes(pool: Pool, tmp_path: Path) -> None:
    """Mapped again for every mix, each of their pages would fault again."""
    red = tmp_path / "red"
    shutil.copytree(pool.experts["red"].path, red)

    def mapped() -> list[str]:
        maps = Path("/proc/self/maps").read_text().splitlines()
        return [line.split()[0] for line in maps if line.endswith(str(red / "model.safetensors"))]

    mixer = mixer_of(replace(pool, experts={**pool.experts, "red": replace(pool.experts["red"], path=red)}))
    dict(mixer.params(recipe_of(pool, base=0.5, red=0.5))[0])
    first = mapped()
    assert len(first) == 1
    dict(mixer.params(recipe_of(pool, base=0.2, red=0.8))[0])
    dict(mixer.params(recipe_of(pool, green=1.0))[0])
    assert mapped() == first
    del mixer
    gc.collect()
    assert mapped() == []


def test_a_cache_of_nothing_keeps_nothing() -> None:
    cache = MergedParams(0)
    cache.put("a", [("x", torch.zeros(1))])
    assert cache.digests == []
    cache.forget("a")
    assert cache.num_bytes == 0


def test_putting_again_replaces() -> None:
    cache = MergedParams(100)
    for _ in range(3):
        cache.put("a", [("x", torch.zeros(10))])
    assert cache.num_bytes == 40
    cache.forget("a")
    assert (cache.num_bytes, cache.get("a")) == (0, None)


def test_models_that_are_stored_in_another_dtype_are_not_captured(pool: Pool) -> None:
    def why_not(**changes: Any) -> str | None:
        manifest = Manifest.of_pool(pool, dtype="float32", cache_bytes=0, managed=True, expert_bytes=2**30)
        return Mixer(replace(manifest, **changes), cache_bytes=0).why_not_captured(list(manifest.members))

    assert why_not() is None
    assert why_not(expert_bytes=0) == "engine.expert_memory is 0"
    assert "holds float32, the engine bfloat16" in str(why_not(dtype="bfloat16"))


class TestModelsAddedLater:
    def test_they_are_found_in_the_manifest_as_it_stands_now(self, pool: Pool) -> None:
        whole = Manifest.of_pool(pool, dtype="float32", cache_bytes=0, managed=True)
        green = pool.experts["green"].fingerprint
        before = replace(whole, members={f: path for f, path in whole.members.items() if f != green})
        recipe = recipe_of(pool, base=0.5, green=0.5)
        with pytest.raises(InvalidMixError):
            Mixer(before, cache_bytes=0).check(recipe)
        params, _ = Mixer(before, cache_bytes=0, reread=lambda: whole).params(recipe)
        assert dict(params).keys() == Mixer(whole, cache_bytes=0).tensor_names

    @pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"base": "another"}])
    def test_another_engines_manifest_is_refused(self, pool: Pool, change: dict[str, str]) -> None:
        manifest = Manifest.of_pool(pool, dtype="float32", cache_bytes=0, managed=True)
        mixer = Mixer(manifest, cache_bytes=0, reread=lambda: replace(manifest, **change))
        mixer.check(recipe_of(pool, red=1.0))  # nothing is unknown, so nothing is read
        unknown = replace(recipe_of(pool, red=1.0), coefficients=(("new", 1.0),))
        with pytest.raises(InvalidMixError, match="another engine's"):
            mixer.check(unknown)

    def test_a_manifest_that_is_gone_refuses_the_recipe_alone(self, pool: Pool) -> None:
        def gone() -> Manifest:
            raise ConfigError("no such file")

        mixer = Mixer(Manifest.of_pool(pool, dtype="float32", cache_bytes=0, managed=True), cache_bytes=0, reread=gone)
        with pytest.raises(InvalidMixError, match="no such file"):
            mixer.check(replace(recipe_of(pool, red=1.0), coefficients=(("new", 1.0),)))
        mixer.check(recipe_of(pool, red=1.0))


@pytest.fixture
def own_pool(tmp_path: Path) -> Pool:
    """A pool whose files a test may change."""
    return make_plugin_pool(tmp_path / "pool")


def overwrite(pool: Pool, name: str, other: str) -> bytes:
    """Puts another model's parameters into a model's file; returns what was there."""
    place = pool.member(name).path / "model.safetensors"
    before = place.read_bytes()
    place.write_bytes((pool.member(other).path / "model.safetensors").read_bytes())
    return before


class TestFilesThatChange:
    def test_only_what_needs_them_is_refused(self, own_pool: Pool) -> None:
        mixer, kept, other = mixer_of(own_pool), recipe_of(own_pool, base=0.5, red=0.5), recipe_of(own_pool, red=1.0)
        expected = dict(mixer.params(kept)[0])
        before = overwrite(own_pool, "red", "green")
        mixer.check(kept)
        found, source = mixer.params(kept)
        again = dict(found)
        assert (source, again.keys()) == ("cache", expected.keys())
        assert all(torch.equal(tensor, expected[name]) for name, tensor in again.items())
        with pytest.raises(ModelChangedError, match=r"'red' are not what they were: .*red/model\.safetensors"):
            mixer.check(other)
        with pytest.raises(ModelChangedError):
            mixer.params(other)
        mixer.check(other, needs_files=False)  # the engine keeps the models themselves
        mixer.check(recipe_of(own_pool, green=1.0))
        (own_pool.experts["red"].path / "model.safetensors").write_bytes(before)
        mixer.check(other)

    def test_a_model_that_changed_before_the_start_is_left_out(self, own_pool: Pool) -> None:
        overwrite(own_pool, "red", "green")
        assert mixer_of(own_pool).keepable() == [own_pool.base.fingerprint, own_pool.experts["green"].fingerprint]
        overwrite(own_pool, "base", "green")
        with pytest.raises(ModelChangedError, match="'base'"):
            mixer_of(own_pool).keepable()

    def test_what_is_written_to_while_it_is_mixed_is_not_kept(
        self, own_pool: Pool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(mixing, "BYTES_AHEAD", 1)
        mixer, recipe = mixer_of(own_pool), recipe_of(own_pool, base=0.5, red=0.5)
        fresh, _ = mixer.params(recipe)
        next(fresh)
        overwrite(own_pool, "red", "green")
        with pytest.raises(ModelChangedError, match="thrown away"):
            list(fresh)
        assert recipe.digest not in mixer.cache


def test_a_mixture_beyond_the_dtype_is_found_before_the_engine_is_touched(own_pool: Pool) -> None:
    place = own_pool.experts["red"].path / "model.safetensors"
    tensors = load_file(place)
    tensors["lm_head.weight"][0, 0] = 3e38
    save_file(tensors, place, metadata={"format": "pt"})
    folders = {name: member.path for name, member in own_pool.members.items()}
    config = PoolConfig.model_validate(pool_section("pico", "decoder", folders, {"type": "vllm"}))
    pool = open_pool(config, cache_dir=place.parents[2] / "cache")
    mixer = mixer_of(pool)
    recipe = make_recipe(pool, {"red": 2.0, "green": -1.0}, dtype="float32")
    for needs_files in (True, False):
        with pytest.raises(NotFiniteError, match=r"tensor 'lm_head\.weight' of the mixture \(linear: .*2 red\)"):
            mixer.check(recipe, needs_files=needs_files)
    # the bound is passed, and the mixture is not
    mixer.check(make_recipe(pool, {"red": 1.0, "green": -1.0, "base": 1.0}, dtype="float32"))
