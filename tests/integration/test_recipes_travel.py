"""A mixture goes from one server to another, and to a folder, as its recipe: bit for bit, or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from cocktail_serve.engines.vllm.fake import fake_text
from tests.command_line import answer, refusal, run
from tests.gateways import EXAMPLES, PAIRS, LiveGateway, live_gateway
from tests.models import pool_section

UNMERGED = {"mode": "unmerged", "max_concurrency": 4}

TEXT_BY_TEXT = {"type": "sentence_transformers", "dtype": "float32", "max_batch_tokens": 64}
"""An engine in whose passes no text of `LONG_PAIRS` shares its rounding with another: each has 38 tokens or more."""

LONG_PAIRS = [
    {
        "query": " ".join(islice(cycle(row["query"].split()), 36)),
        **{side: [" ".join(islice(cycle(text.split()), 36)) for text in row[side]] for side in ("pos", "neg")},
    }
    for row in PAIRS
]


@pytest.fixture(scope="module")
def unmerged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    with live_gateway(tmp_path_factory.mktemp("unmerged"), engine=UNMERGED) as live:
        yield live


@pytest.fixture(scope="module")
def unmerged_too(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    with live_gateway(tmp_path_factory.mktemp("unmerged-too"), engine=UNMERGED) as live:
        yield live


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    with live_gateway(tmp_path_factory.mktemp("merged"), encoder={"engine": TEXT_BY_TEXT}) as live:
        yield live


def make(server: LiveGateway, status: int = 201, **body: Any) -> dict[str, Any]:
    answered = httpx.post(f"{server.url}/v1/cocktails?wait=30", json={"pool": "flan", **body}, timeout=60)
    assert answered.status_code == status, answered.text
    made: dict[str, Any] = answered.json()
    return made


def exported(server: LiveGateway, ref: str) -> dict[str, Any]:
    answered = httpx.get(f"{server.url}/v1/cocktails/{ref}/recipe").raise_for_status()
    recipe: dict[str, Any] = answered.json()
    return recipe


@pytest.mark.parametrize(
    ("source", "target", "form"), [("gateway", "merged", "merged"), ("unmerged", "unmerged_too", "unmerged")]
)
def test_another_server_answers_by_the_same_recipe(
    source: str, target: str, form: str, request: pytest.FixtureRequest
) -> None:
    here, there = request.getfixturevalue(source), request.getfixturevalue(target)
    made = make(here, name=f"travels-{form}", examples=EXAMPLES, temperature=0.7)
    recipe = exported(here, made["id"])
    assert recipe["form"] == form
    assert recipe["names"].keys() == {fingerprint for fingerprint, _ in recipe["coefficients"]}
    arrived = make(there, name="arrived", recipe=recipe)
    assert arrived["status"] == "ready"
    assert arrived["recipe"] == recipe
    assert (arrived["merging_weights"], arrived["losses"]) == (made["merging_weights"], {})
    assert make(there, 200, name="arrived", recipe=recipe)["id"] == arrived["id"]
    # the same request in other words
    assert make(there, 200, name="arrived", merging_weights=made["merging_weights"])["id"] == arrived["id"]
    for model, more in (("arrived", {}), ("flan", {"cocktail": {"recipe": recipe}})):
        asked = {"model": model, "prompt": "hello", "max_tokens": 20, **more}
        answered = httpx.post(f"{there.url}/v1/completions", json=asked, timeout=60)
        assert answered.json()["choices"][0]["text"] == fake_text(recipe["digest"], "hello", num_tokens=20)


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"base": "0" * 64}, 400, "recipe.base"),
        ({"coefficients": [["0" * 64, 1.0]]}, 400, "recipe.coefficients"),
        ({"dtype": "bfloat16"}, 400, "recipe.dtype"),
        ({"form": "unmerged"}, 400, "recipe.form"),
        ({"version": 1}, 400, "recipe"),
    ],
    ids=str,
)
def test_what_would_be_other_bits_is_refused(
    merged: LiveGateway, gateway: LiveGateway, changes: Mapping[str, Any], status: int, param: str
) -> None:
    recipe = exported(gateway, make(gateway, name="refused", merging_weights={"base": 0.5, "nq": 0.5})["id"])
    changed = {key: value for key, value in {**recipe, **changes}.items() if key != "digest"}
    error = make(merged, status, name="refused-there", recipe=changed)["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    if param != "recipe":
        assert "operator" in error["message"]
    assert httpx.get(f"{merged.url}/v1/cocktails/refused-there").status_code == 404
    httpx.delete(f"{gateway.url}/v1/cocktails/refused").raise_for_status()


def test_an_unmerged_pool_takes_no_recipe_of_a_method_that_is_merged(
    gateway: LiveGateway, unmerged: LiveGateway
) -> None:
    made = make(gateway, name="ties", merging_weights={"nq": 0.5}, method="ties")
    error = make(unmerged, 422, name="ties", recipe=exported(gateway, made["id"]))["error"]
    assert (error["code"], error["param"]) == ("method_not_served", "recipe.method")


@pytest.mark.parametrize("other", [{"examples": EXAMPLES}, {"method": "ties"}, {"merging_weights": {}}, {"alpha": 0.5}])
def test_a_recipe_excludes_all_else_that_decides(gateway: LiveGateway, other: Mapping[str, Any]) -> None:
    error = make(gateway, 400, name="both", recipe={}, **other)["error"]
    assert error["param"] == next(iter(other))
    assert "excludes" in error["message"]


def write_config(path: Path, folders: Mapping[str, Path], **engine: Any) -> Path:
    """Of the pool `bge` alone, in whatever dtype its base is stored unless `engine` says."""
    section = pool_section("bge", "encoder", folders, {"type": "sentence_transformers", **engine})
    path.write_text(yaml.safe_dump({"store": {"cache_dir": "cache"}, "pools": [section]}))
    return path


def test_a_folder_holds_what_the_server_computes_with(
    gateway: LiveGateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a real model, mixed by examples, to the last bit."""
    made = make(gateway, name="to-a-folder", pool="bge", examples=PAIRS, temperature=2.0)
    recipe = exported(gateway, made["id"])
    (tmp_path / "exported.json").write_text(json.dumps(recipe))
    base = Path(gateway.settings.pool("bge").base.path)
    config = write_config(
        tmp_path / "config.yaml", {name: base.parent / name for name in ("base", "hotpotqa", "quora")}
    )
    out = tmp_path / "folder"
    told = answer(capsys, "mix", config, "--pool", "bge", "--recipe", tmp_path / "exported.json", "--out", out)
    assert told["recipe"]["digest"] == recipe["digest"]
    # what the engine answers by now, and nothing else
    computed = gateway.app.state.gateway.engines["bge"]._cache._listed[recipe["digest"]].params
    loaded = SentenceTransformer(str(out), device="cpu")[0].auto_model.state_dict()
    assert len(computed) > 10
    for name, tensor in computed.items():
        assert torch.equal(loaded[name.removeprefix("0.")], tensor), name

    # and back: the folder's own file makes the same mixture
    back = make(gateway, name="back", pool="bge", recipe=json.loads((out / "recipe.json").read_text()))
    assert back["recipe"] == recipe


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_same_examples_give_one_digest_with_a_server_and_without(
    merged: LiveGateway, tmp_path: Path, capsys: pytest.CaptureFixture[str], temperature: float
) -> None:
    made = make(merged, name="served", pool="bge", examples=LONG_PAIRS, temperature=temperature)
    section = merged.settings.pool("bge")
    folders = {"base": Path(section.base.path), **{name: Path(e.path) for name, e in section.experts.items()}}
    config = write_config(tmp_path / "config.yaml", folders, **TEXT_BY_TEXT)
    examples = tmp_path / "examples.jsonl"
    examples.write_text("".join(f"{json.dumps(row)}\n" for row in LONG_PAIRS))
    asked = ("--pool", "bge", "--examples", examples, "--temperature", temperature)
    told = answer(capsys, "weigh", config, *asked)
    assert (told["losses"], told["merging_weights"]) == (made["losses"], made["merging_weights"])
    assert len(set(made["losses"].values())) == 3, "weights that say something"
    mixed = answer(capsys, "mix", config, *asked, "--out", tmp_path / "mixed")
    assert mixed["recipe"]["digest"] == exported(merged, made["id"])["digest"]
    # and by the weights alone, where something else scored the examples
    weights = ",".join(f"{name}={weight!r}" for name, weight in made["merging_weights"].items())
    by_hand = answer(capsys, "mix", config, "--pool", "bge", "--weights", weights, "--out", tmp_path / "by-hand")
    assert by_hand["recipe"] == mixed["recipe"]


def test_a_folder_is_of_the_recipes_dtype_and_lacks_no_model(
    gateway: LiveGateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Path(gateway.settings.pool("bge").base.path)
    made = make(gateway, name="halves", pool="bge", merging_weights={"base": 0.5, "quora": 0.5})
    recipe = exported(gateway, made["id"])
    half = {key: value for key, value in recipe.items() if key != "digest"} | {"dtype": "bfloat16", "form": "unmerged"}
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(half))
    config = write_config(tmp_path / "config.yaml", {name: base.parent / name for name in ("base", "quora")})
    words = ("mix", config, "--pool", "bge", "--recipe", path, "--out", tmp_path / "folder")
    code, _, err = run(capsys, *words)
    assert code == 0, err
    assert "unmerged, and a folder holds merged parameters" in err
    written = json.loads((tmp_path / "folder" / "recipe.json").read_text())["recipe"]
    assert "form" not in written
    stored = load_file(tmp_path / "folder" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {torch.bfloat16}

    config = write_config(tmp_path / "lacks.yaml", {"base": base, "hotpotqa": base.parent / "hotpotqa"})
    words = ("mix", config, "--pool", "bge", "--recipe", path, "--out", tmp_path / "refused")
    assert "lacks what the recipe mixes: 'quora'" in refusal(capsys, *words)
    write_config(config, {"base": base.parent / "hotpotqa"})
    assert "name a pool of the recipe's base" in refusal(capsys, *words)
    assert not (tmp_path / "refused").exists()
    path.write_text("{")
    assert "holds no recipe" in refusal(capsys, *words)
    path.write_text("{}")
    assert "not a recipe" in refusal(capsys, *words)
