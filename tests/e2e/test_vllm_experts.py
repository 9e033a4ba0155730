"""Experts kept in the engine's own layout: real vLLM with plain parameters, and with packed ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.plain_linear import plain_parameters
from cocktail_serve.checkpoints.folder import save_mixture
from cocktail_serve.recipe import make_recipe
from tests.e2e.conftest import VLLMServer, running_vllm
from tests.e2e.reference import assert_greedy_of, load_reference, reference
from vllm_cocktail.launch import is_cpu_build

pytestmark = pytest.mark.vllm

PROMPT = [1, 40, 41, 42, 43]
MIXTURES = [
    {"red": 1.0},
    {"base": 1.0},
    {"base": 0.2, "red": 0.3, "green": 0.5},
    {"red": 1.5, "green": -0.5},
]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServer]:
    folder = tmp_path_factory.mktemp("plain")
    environ = plain_parameters(folder) if is_cpu_build() else {}
    with running_vllm(folder, tied=request.param, managed=True, environ=environ) as server:
        yield server


def answer_of(server: VLLMServer) -> list[float]:
    choice: dict[str, Any] = server.complete(PROMPT)
    return [*choice["token_ids"], *choice["logprobs"]["token_logprobs"]]


def test_experts_are_captured_where_parameters_are_plain(plain: VLLMServer) -> None:
    status = plain.status()
    assert (status["mixing_path"], status["streams_because"]) == ("in_place", None)
    assert set(status["captured"]) == {member.fingerprint for member in plain.pool}
    assert 0 < status["captured_bytes"] <= 64 * 1024**2
    assert status["resident"] == status["weight_version"] == plain.recipe(base=1.0).digest


@pytest.mark.parametrize("merging_weights", MIXTURES, ids=str)
def test_a_mixture_in_place_answers_as_transformers_does(plain: VLLMServer, merging_weights: dict[str, float]) -> None:
    plain.mix(plain.recipe(green=1.0))
    assert plain.mix(plain.recipe(**merging_weights))["source"] == "experts"
    assert_greedy_of(reference(plain, merging_weights), PROMPT, plain.complete(PROMPT))


def test_what_is_kept_and_what_is_streamed_take_turns(plain: VLLMServer) -> None:
    recipe = plain.recipe(base=0.2, red=0.3, green=0.5)
    plain.mix(recipe)
    before = answer_of(plain)
    ties = make_recipe(plain.pool, {"red": 0.5}, dtype="float32", method="ties")
    assert plain.mix(ties)["source"] == "files"
    assert answer_of(plain) != before
    assert plain.mix(recipe)["source"] == "experts"
    assert answer_of(plain) == before


@pytest.mark.full
def test_a_folder_that_mix_wrote_is_served_as_it_is(plain: VLLMServer, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    save_mixture(plain.recipe(base=0.2, red=0.3, green=0.5), plain.pool, mixed)
    with running_vllm(tmp_path, tied=False, managed=True, folders={"base": mixed}) as server:
        assert_greedy_of(load_reference(mixed), PROMPT, server.complete(PROMPT))
