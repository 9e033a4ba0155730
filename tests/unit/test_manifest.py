"""The manifest: what is written is read back, and what is read is checked."""

from __future__ import annotations

import json
import math
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cocktail_serve.errors import ConfigError, InvalidMixError, NotFoundError
from cocktail_serve.pool import FileState, Member, Pool
from cocktail_serve.recipe import make_recipe, one_hot
from vllm_cocktail.manifest import MANIFEST_VARIABLE, Manifest


def member(name: str, digit: str) -> Member:
    files = (
        FileState(f"models/{name}/config.json", 1, 2, 3, 2**60 + 1, 5, digest="d"),
        FileState("w", 1, 3, 2**40, 6, 7),
    )
    return Member(name, Path("models") / name, digit * 64, "float32", 1000, files, 0.1 if digit == "0" else math.inf)


POOL = Pool("flan", "decoder", member("base", "0"), {"red": member("red", "1"), "green": member("green", "2")}, "t")
MANIFEST = Manifest.of_pool(POOL, dtype="bfloat16", cache_bytes=1024, managed=True)


def test_a_manifest_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path = MANIFEST.write(tmp_path / "pool.json")
    assert Manifest.read(path) == MANIFEST
    assert Manifest.from_environ({MANIFEST_VARIABLE: str(path)}) == MANIFEST
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_is_full_leaves_the_manifest_as_it_was(tmp_path: Path) -> None:
    path = MANIFEST.write(tmp_path / "pool.json")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            replace(MANIFEST, cache_bytes=7).write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Manifest.read(path) == MANIFEST
    assert list(tmp_path.iterdir()) == [path]


def test_the_manifest_of_a_pool_starts_with_the_base() -> None:
    assert MANIFEST.resident == one_hot(POOL, "base", dtype="bfloat16").digest
    assert MANIFEST.base == POOL.base.fingerprint
    assert MANIFEST.members == POOL.by_fingerprint
    twin = replace(POOL, experts={"red": member("red", "0")})
    of_twin = Manifest.of_pool(twin, dtype="bfloat16", cache_bytes=0, managed=True)
    assert of_twin.members == {POOL.base.fingerprint: POOL.base}, "servers are started on the base's folder"


def test_names_are_optional(tmp_path: Path) -> None:
    """The gateway sends recipes, so its manifests need none."""
    nameless = replace(MANIFEST, names={})
    value = {key: field for key, field in nameless.to_json().items() if key != "names"}
    (tmp_path / "pool.json").write_text(json.dumps(value))
    assert Manifest.read(tmp_path / "pool.json") == nameless
    with pytest.raises(InvalidMixError, match="names"):
        nameless.recipe({"base": 1.0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"members": {}}, "base"),
        ({"members": None}, "not a manifest"),
        ({"base": "f" * 64}, "base"),
        ({"dtype": "int8"}, "int8"),
        ({"resident": "f" * 64}, "resident"),
        ({"cache_bytes": -1}, "cache_bytes"),
        ({"cache_bytes": "much"}, "not a manifest"),
        ({"names": {"base": "0" * 64, "blue": "f" * 64}}, "names"),
        ({"names": {"red": "1" * 64}}, "names"),
        ({"expert_bytes": -1}, "expert_bytes"),
    ],
)
def test_a_manifest_that_is_none_is_refused_by_its_file_and_field(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "pool.json"
    path.write_text(json.dumps(MANIFEST.to_json() | change))
    with pytest.raises(ConfigError, match=message) as caught:
        Manifest.read(path)
    assert "pool.json" in caught.value.message


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "{}"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "pool.json").write_text(text)
    with pytest.raises(ConfigError, match="not a manifest"):
        Manifest.read(tmp_path / "pool.json")


def test_a_missing_file_or_variable_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.json"):
        Manifest.read(tmp_path / "absent.json")
    with pytest.raises(ConfigError, match=MANIFEST_VARIABLE):
        Manifest.from_environ({})


def test_weights_by_name_make_the_recipe_that_the_pool_makes() -> None:
    weights = {"base": 0.25, "red": 0.75}
    assert MANIFEST.recipe(weights) == make_recipe(POOL, weights, dtype="bfloat16")


def test_weights_by_name_are_checked() -> None:
    with pytest.raises(NotFoundError, match="blue"):
        MANIFEST.recipe({"blue": 1.0})
    with pytest.raises(InvalidMixError, match="sum"):
        MANIFEST.recipe({"red": 0.2})


def test_a_manifest_says_how_mixtures_reach_the_engine(tmp_path: Path) -> None:
    unmerged = Manifest.of_pool(replace(POOL, mode="unmerged"), dtype="bfloat16", cache_bytes=0, managed=True)
    assert Manifest.read(unmerged.write(tmp_path / "pool.json")) == unmerged
    assert (unmerged.mode, MANIFEST.mode) == ("unmerged", "merged")
    assert unmerged.resident == MANIFEST.resident, "the parameters that the server starts with are the base's"
    assert unmerged.recipe({"red": 1.0}).mode == "unmerged"


def test_a_manifest_of_an_earlier_release_is_of_merged_parameters(tmp_path: Path) -> None:
    path = MANIFEST.write(tmp_path / "pool.json")
    value = json.loads(path.read_text())
    del value["mode"]
    path.write_text(json.dumps(value))
    assert Manifest.read(path) == MANIFEST
    path.write_text(json.dumps(value | {"mode": "folded"}))
    with pytest.raises(ConfigError, match="mode 'folded' is not one of merged, unmerged"):
        Manifest.read(path)
