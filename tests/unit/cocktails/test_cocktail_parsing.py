"""What a request means, what it is named, and how a wrong one is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cocktail_serve.cocktails.options import CocktailOptions, CocktailRequest
from cocktail_serve.cocktails.parsing import InlineBody, parse_inline, parse_request
from cocktail_serve.config import TEMPERATURES, Settings
from cocktail_serve.errors import (
    CocktailError,
    ConflictError,
    InvalidExamplesError,
    InvalidMixError,
    InvalidRequestError,
    MethodNotServedError,
    NotFoundError,
    WeightingNotServedError,
)
from cocktail_serve.pool import Member, Pool

EXAMPLES = [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]


def member(name: str) -> Member:
    return Member(name, Path("/models") / name, f"fp-{name}", "float32", 8)


POOLS = {"flan": Pool("flan", "decoder", member("base"), {n: member(n) for n in ("nq", "ag-news", "squad")}, "text")}


def make_settings(**defaults: Any) -> Settings:
    return Settings.model_validate(
        {
            "defaults": defaults,
            "pools": [{"id": "flan", "kind": "decoder", "base": "b", "engine": {"type": "fake"}, "max_examples": 3}],
        }
    )


def parse(body: Mapping[str, Any], **defaults: Any) -> CocktailRequest:
    body = {"name": "films", "pool": "flan", **body}
    return parse_request(body, settings=make_settings(**defaults), pools=POOLS)


def test_what_is_left_out_is_the_servers_default_and_recorded() -> None:
    options = parse({"examples": EXAMPLES}).options
    assert (options.weighting, options.temperature, options.alpha, options.seed) == (
        "softmax",
        TEMPERATURES["decoder"],
        None,
        0,
    )
    assert options.peers == options.scored == ("base", "ag-news", "nq", "squad")
    tuned = parse({"examples": EXAMPLES, "target": "nq"}, weighting="uniform", alpha=0.25).options
    assert (tuned.weighting, tuned.temperature, tuned.alpha) == ("uniform", None, 0.25)
    assert tuned.peers == ("base", "ag-news", "squad")
    assert tuned.scored == ("base", "ag-news", "squad", "nq")


def test_the_temperature_that_is_left_out_is_the_kinds_unless_configured() -> None:
    pairs = [{"query": "red fish", "pos": ["a fish"]}, {"query": "good dog", "pos": ["a dog"]}]
    encoders = replace(POOLS["flan"], kind="encoder")
    engine = {"type": "sentence_transformers"}
    described = {"id": "flan", "kind": "encoder", "base": "b", "engine": engine}
    settings = Settings.model_validate({"pools": [described]})
    inline = parse_inline({"examples": pairs}, pool=encoders, settings=settings)
    assert inline.options.temperature == TEMPERATURES["encoder"] != TEMPERATURES["decoder"]
    configured = Settings.model_validate({"pools": [described], "defaults": {"temperature": 3.0}})
    assert parse_inline({"examples": pairs}, pool=encoders, settings=configured).options.temperature == 3.0
    assert parse({"examples": EXAMPLES}, temperature=3.0).options.temperature == 3.0


def test_null_means_left_out() -> None:
    nulls = dict.fromkeys(InlineBody.model_fields.keys() - {"examples"})
    assert parse({"examples": EXAMPLES, **nulls}) == parse({"examples": EXAMPLES})


def test_the_paper_is_softmax_with_its_own_settings() -> None:
    paper = parse({"examples": EXAMPLES, "target": "nq", "weighting": "paper"}, temperature=1.0, alpha=0.1)
    assert (paper.options.weighting, paper.options.temperature, paper.options.alpha) == ("paper", 5.0, 0.5)
    same = parse({"examples": EXAMPLES, "target": "nq", "weighting": "softmax", "temperature": 5, "alpha": 0.5})
    assert paper.digest == same.digest
    with pytest.raises(InvalidMixError, match="'paper' means temperature 5") as caught:
        parse({"examples": EXAMPLES, "weighting": "paper", "temperature": 1.0})
    assert caught.value.param == "temperature"
    chosen = parse({"examples": EXAMPLES, "temperature": 1.0}, weighting="paper").options
    assert (chosen.weighting, chosen.temperature) == ("softmax", 1.0)


@pytest.mark.parametrize(
    "other",
    [
        {"examples": [*EXAMPLES, {"input": "e", "output": "f"}]},
        {"examples": EXAMPLES[::-1]},
        {"examples": [{"prompt": "a", "completion": "b"}, EXAMPLES[1]]},
        {"temperature": 4.0},
        {"weighting": "uniform"},
        {"target": "nq"},
        {"target": "nq", "alpha": 0.4},
        {"experts": ["nq"]},
        {"seed": 1},
        {"method": "task_arithmetic"},
        {"method": "slerp", "experts": ["nq"]},
        {"examples": None, "merging_weights": {"base": 0.5, "nq": 0.5}},
    ],
)
def test_whatever_decides_the_mixture_is_in_the_digest(other: dict[str, Any]) -> None:
    assert parse({"examples": EXAMPLES, **other}).digest != parse({"examples": EXAMPLES}).digest


@pytest.mark.parametrize(
    "other",
    [
        {"name": "other"},
        {"metadata": {"a": "b"}},
        {"alpha": 0.9},
        {"experts": ["squad", "nq", "ag-news"]},
        {"temperature": TEMPERATURES["decoder"]},
        {"method": "linear", "method_params": {}},
        {"examples": [{"input": "a", "output": "b", "score": 3}, {"input": "c", "output": "d", "id": 7}]},
    ],
)
def test_what_does_not_decide_the_mixture_is_not_in_the_digest(other: dict[str, Any]) -> None:
    assert parse({"examples": EXAMPLES, **other}).digest == parse({"examples": EXAMPLES}).digest


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ({}, {"density": 0.5}, True),
        ({"lambda": 1}, {"lambda": 1.0}, True),
        ({}, {"density": 0.4}, False),
        ({}, {"rescale": False}, False),
        ({"seed": 3}, {"seed": 4}, False),
    ],
)
def test_parameters_of_the_method_are_in_the_digest(one: dict[str, Any], other: dict[str, Any], is_same: bool) -> None:
    digests = {parse({"examples": EXAMPLES, "method": "dare_linear", "method_params": p}).digest for p in (one, other)}
    assert (len(digests) == 1) == is_same


def test_dares_seed_is_the_requests_unless_it_has_its_own() -> None:
    body = {"examples": EXAMPLES, "method": "dare_ties", "seed": 5}
    assert parse(body).options.method_params["seed"] == 5
    assert parse({**body, "method_params": {"seed": 6}}).options.method_params["seed"] == 6


def test_by_hand_the_base_of_task_vectors_is_1_or_left_out() -> None:
    bodies = [{"merging_weights": weights, "method": "ties"} for weights in ({"nq": -2.5}, {"base": 1, "nq": -2.5})]
    first, second = (parse(body) for body in bodies)
    assert first.digest == second.digest
    assert first.options.merging_weights == {"base": 1.0, "nq": -2.5}
    with pytest.raises(InvalidMixError, match="always 1") as caught:
        parse({"merging_weights": {"base": 0.5, "nq": 0.5}, "method": "ties"})
    assert caught.value.param == "merging_weights.base"


def test_slerp_counts_parameters_not_names() -> None:
    pool = POOLS["flan"]
    twins = Pool("flan", "decoder", pool.base, {"copy": replace(pool.base, name="copy")}, "text")
    body = {"name": "films", "pool": "flan", "examples": EXAMPLES, "method": "slerp"}
    with pytest.raises(InvalidMixError, match="2 different models"):
        parse_request(body, settings=make_settings(), pools={"flan": twins})


def test_a_limit_of_experts_counts_where_it_leaves_one_out() -> None:
    plain = parse({"examples": EXAMPLES})
    limited = parse({"examples": EXAMPLES, "max_experts": 2})
    assert (plain.options.max_experts, limited.options.max_experts) == (None, 2)
    assert limited.digest != plain.digest
    for too_many in (3, 50):
        assert parse({"examples": EXAMPLES, "max_experts": too_many}) == plain
    assert CocktailOptions.from_json(json.loads(json.dumps(limited.options.to_json()))) == limited.options
    for body in ({"target": "nq"}, {"examples": EXAMPLES, "weighting": "blackbox"}):
        with pytest.raises(InvalidMixError, match="max_experts leaves out") as raised:
            parse({**body, "max_experts": 1})
        assert raised.value.param == "max_experts"


def test_the_digest_follows_the_pools_content() -> None:
    pool = POOLS["flan"]
    retrained = Pool("flan", "decoder", pool.base, {**pool.experts, "nq": member("nq-2")}, "text")
    body = {"name": "films", "pool": "flan", "examples": EXAMPLES}
    changed = parse_request(body, settings=make_settings(), pools={"flan": retrained})
    assert changed.digest != parse({"examples": EXAMPLES}).digest


def test_a_cocktail_fits_while_its_own_models_are_there() -> None:
    pool = POOLS["flan"]
    options = parse({"examples": EXAMPLES, "experts": ["nq"]}).options
    without = {name: one for name, one in pool.experts.items() if name != "squad"}
    replaced = {**pool.experts, "nq": replace(pool.experts["nq"], fingerprint="fp-other")}
    assert options.fits(pool)
    assert options.fits(replace(pool, experts={**pool.experts, "new": member("new")})), "one more"
    assert options.fits(replace(pool, experts=without)), "one less that it has nothing of"
    assert not options.fits(replace(pool, experts=replaced)), "one of its own is another"
    assert not options.fits(replace(pool, experts=without, text_digest="other")), "the texts mean something else"
    by_earlier_release = replace(options, members={})
    assert by_earlier_release.fits(pool)
    assert not by_earlier_release.fits(replace(pool, experts=without)), "its models are not known"


def test_the_digest_is_the_same_in_every_release_of_this_version() -> None:
    digest = parse({"examples": EXAMPLES, "temperature": 0.5, "seed": 7}).digest
    assert digest == "62fcaf62eb6adcb3a1b7c3602422de9e44d8fb4a140453f2a9645491458eed20"


def test_options_come_back_from_json_equal() -> None:
    for body in (
        {"examples": EXAMPLES, "target": "nq", "experts": ["squad"], "metadata": {"a": "b"}},
        {"merging_weights": {"nq": 0.25, "base": 0.75}},
        {"target": "nq"},
        {"merging_weights": {"nq": 3}, "method": "dare_ties", "method_params": {"density": 0.1}, "seed": 9},
    ):
        options = parse(body).options
        back = CocktailOptions.from_json(json.loads(json.dumps(options.to_json())))
        assert back == options
        assert back.digest == options.digest


def test_more_examples_than_the_pool_takes_are_sampled() -> None:
    rows = [{"input": str(number), "output": "x"} for number in range(8)]
    request = parse({"examples": rows, "seed": 2})
    assert (request.options.num_examples, request.options.num_examples_given) == (3, 8)
    assert request.digest == parse({"examples": rows, "seed": 2}).digest
    assert request.examples != parse({"examples": rows, "seed": 3}).examples


@pytest.mark.parametrize(
    ("body", "error", "param", "text"),
    [
        ({"name": "Films"}, InvalidRequestError, "name", "lower-case"),
        ({"name": "-films"}, InvalidRequestError, "name", "lower-case"),
        ({"name": "films\n"}, InvalidRequestError, "name", "lower-case"),
        ({"name": "a" * 65}, InvalidRequestError, "name", "at most 64"),
        ({"name": "films@12345678"}, InvalidRequestError, "name", "lower-case"),
        ({"name": ""}, InvalidRequestError, "name", "lower-case"),
        ({"name": 7}, InvalidRequestError, "name", "string"),
        ({"name": "base"}, InvalidRequestError, "name", "reserved"),
        ({"name": "flan"}, ConflictError, "name", "taken by a pool"),
        ({"pool": "none"}, NotFoundError, "pool", "there are: flan"),
        ({"colour": "red"}, InvalidRequestError, "colour", "unknown field 'colour'"),
        ({"target": "none"}, NotFoundError, "target", "it has: base, ag-news, nq, squad"),
        ({"target": "base"}, InvalidMixError, "target", "takes part in every mixture"),
        ({"target": "nq", "experts": ["nq"]}, InvalidMixError, "target", "name it once"),
        ({"experts": ["nq", "none"]}, NotFoundError, "experts.1", "no expert 'none'"),
        ({"experts": ["base"]}, InvalidMixError, "experts.0", "always takes part"),
        ({"experts": ["nq", "nq"]}, InvalidMixError, "experts", "twice"),
        ({"experts": "nq"}, InvalidRequestError, "experts", "list"),
        ({"alpha": -0.1}, InvalidMixError, "alpha", "between 0 and 1"),
        ({"alpha": 1.1}, InvalidMixError, "alpha", "between 0 and 1"),
        ({"alpha": float("nan")}, InvalidMixError, "alpha", "between 0 and 1"),
        ({"alpha": "half"}, InvalidRequestError, "alpha", "number"),
        ({"alpha": True}, InvalidRequestError, "alpha", "number"),
        ({"temperature": 0}, InvalidMixError, "temperature", "above 0"),
        ({"temperature": -1}, InvalidMixError, "temperature", "above 0"),
        ({"temperature": float("inf")}, InvalidMixError, "temperature", "above 0"),
        ({"weighting": "best"}, InvalidRequestError, "weighting", "'uniform', 'search' or 'blackbox'"),
        ({"method": "fisher"}, InvalidRequestError, "method", "'linear'"),
        ({"method": "ties", "method_params": {"density": 0}}, InvalidMixError, "method_params.density", "above 0"),
        ({"method": "ties", "method_params": {"sparsity": 0.5}}, InvalidMixError, "method_params.sparsity", "density"),
        ({"method": "slerp"}, InvalidMixError, "experts", "mixes 2 different models"),
        ({"method": "slerp", "target": "nq"}, InvalidMixError, "experts", "mixes 2 different models"),
        ({"method_params": {"density": 0.5}}, InvalidMixError, "method_params", "no parameters"),
        ({"weighting": "search", "temperature": 1.0}, InvalidMixError, "temperature", "chooses temperature itself"),
        ({"weighting": "blackbox", "alpha": 0.5, "target": "nq"}, InvalidMixError, "alpha", "chooses alpha itself"),
        ({"weighting": "search", "budget": 9}, InvalidMixError, "budget", "'blackbox'"),
        ({"weighting": "blackbox", "budget": 0}, InvalidRequestError, "budget", "greater than or equal to 1"),
        ({"seed": 1.5}, InvalidRequestError, "seed", "integer"),
        ({"seed": 2**63}, InvalidRequestError, "seed", "less than"),
        ({"metadata": {"a": 1}}, InvalidRequestError, "metadata.a", "string"),
        ({"metadata": {str(n): "x" for n in range(17)}}, InvalidRequestError, "metadata", "at most 16"),
        ({"metadata": {"k" * 65: "x"}}, InvalidRequestError, "metadata", "64"),
        ({"metadata": {"k": "x" * 513}}, InvalidRequestError, "metadata", "512"),
        ({"metadata": {"k": "\ud800"}}, InvalidRequestError, "metadata", "surrogate"),
        ({"examples": []}, InvalidExamplesError, "examples", "no examples"),
        ({"examples": "a"}, InvalidExamplesError, "examples", "list"),
        ({"examples": [EXAMPLES[0], {"input": "x"}]}, InvalidExamplesError, "examples", "row 2"),
        ({"examples": None}, InvalidMixError, "examples", "nothing to mix"),
        ({"examples": None, "target": "nq", "experts": ["squad"]}, InvalidMixError, "experts", "give examples"),
    ],
)
def test_a_wrong_request_is_refused_with_the_field_at_fault(
    body: dict[str, Any], error: type[CocktailError], param: str, text: str
) -> None:
    with pytest.raises(error) as caught:
        parse({"examples": EXAMPLES, **body})
    assert type(caught.value) is error
    assert caught.value.param == param
    assert text in caught.value.message


@pytest.mark.parametrize(
    ("weights", "error", "param"),
    [
        ({"base": 0.5, "nq": 0.4}, InvalidMixError, "merging_weights"),
        ({}, InvalidMixError, "merging_weights"),
        ({"base": 0.2, "none": 0.8}, NotFoundError, "merging_weights.none"),
        ({"base": float("nan"), "nq": 1.0}, InvalidMixError, "merging_weights.base"),
        ({"base": "1"}, InvalidRequestError, "merging_weights.base"),
        ([0.5, 0.5], InvalidRequestError, "merging_weights"),
    ],
)
def test_weights_off_their_rule_are_refused(weights: Any, error: type[CocktailError], param: str) -> None:
    with pytest.raises(error) as caught:
        parse({"merging_weights": weights})
    assert caught.value.param == param


@pytest.mark.parametrize(
    "other",
    [
        {"examples": EXAMPLES},
        {"target": "nq"},
        {"alpha": 0.5},
        {"experts": ["nq"]},
        {"temperature": 5.0},
        {"weighting": "softmax"},
    ],
)
def test_weights_by_hand_exclude_what_they_replace(other: dict[str, Any]) -> None:
    with pytest.raises(InvalidMixError, match="cover the whole mixture") as caught:
        parse({"merging_weights": {"base": 1.0}, **other})
    assert caught.value.param == next(iter(other))


def test_weights_by_hand_are_in_the_pools_order() -> None:
    weights = parse({"merging_weights": {"squad": 0.25, "base": 0.5, "ag-news": 0.25}}).options.merging_weights
    assert list(weights or ()) == ["base", "ag-news", "squad"]


@pytest.mark.parametrize("missing", ["name", "pool"])
def test_name_and_pool_are_required(missing: str) -> None:
    body = {"name": "films", "pool": "flan", "examples": EXAMPLES}
    del body[missing]
    with pytest.raises(InvalidRequestError, match="required") as caught:
        parse_request(body, settings=make_settings(), pools=POOLS)
    assert caught.value.param == missing


def test_an_inline_cocktail_is_named_by_its_pool_and_errors_point_into_it() -> None:
    settings = make_settings()
    inline = parse_inline({"examples": EXAMPLES}, pool=POOLS["flan"], settings=settings)
    assert (inline.options.name, inline.options.inline) == ("flan", True)
    assert inline.digest == parse({"examples": EXAMPLES}).digest
    for body, param in (
        ({"examples": [{}]}, "cocktail.examples"),
        ({"examples": EXAMPLES, "name": "films"}, "cocktail.name"),
        ({"examples": EXAMPLES, "experts": ["none"]}, "cocktail.experts.0"),
        ([], "cocktail"),
    ):
        with pytest.raises((InvalidRequestError, NotFoundError)) as caught:
            parse_inline(body, pool=POOLS["flan"], settings=settings)
        assert caught.value.param == param


def test_what_a_search_chooses_is_left_open_and_its_options_are_in_the_digest() -> None:
    searched = parse({"examples": EXAMPLES, "weighting": "search", "target": "nq"}).options
    assert (searched.temperature, searched.alpha, searched.budget) == (None, None, None)
    assert parse({"examples": EXAMPLES, "weighting": "search", "target": "nq", "alpha": 0.3}).options.alpha == 0.3
    assert parse({"weighting": "search", "target": "nq"}).options.alpha == 0.5, "Eq. 3 has nothing to search with"
    boxed = parse({"examples": EXAMPLES, "weighting": "blackbox"}).options
    assert boxed.budget == 40
    bodies: list[dict[str, Any]] = [
        {"weighting": "softmax"},
        {"weighting": "search"},
        {"weighting": "search", "seed": 1},
        {"weighting": "blackbox"},
        {"weighting": "blackbox", "budget": 41},
        {"weighting": "blackbox", "seed": 1},
    ]
    assert len({parse({"examples": EXAMPLES, **body}).digest for body in bodies}) == len(bodies)
    assert parse({"examples": EXAMPLES, "weighting": "blackbox", "budget": 40}).digest == boxed.digest


UNMERGED = {"flan": replace(POOLS["flan"], mode="unmerged")}


def learned(body: Mapping[str, Any]) -> CocktailRequest:
    """A request for learned coefficients of a pool that serves them."""
    body = {"name": "films", "pool": "flan", "examples": EXAMPLES, "weighting": "gradient", **body}
    return parse_request(body, settings=make_settings(), pools=UNMERGED)


def test_learned_coefficients_begin_at_a_temperature_and_choose_alpha_themselves() -> None:
    request = learned({"target": "nq"})
    assert (request.options.weighting, request.options.temperature) == ("gradient", TEMPERATURES["decoder"])
    assert (request.options.alpha, request.options.budget) == (None, None)
    assert request.options.searches
    assert CocktailOptions.from_json(json.loads(json.dumps(request.options.to_json()))) == request.options
    bodies: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"seed": 1},
        {"experts": ["nq"]},
        {"method": "task_arithmetic"},
        {"weighting": "softmax"},
    ]
    assert len({learned(body).digest for body in bodies}) == len(bodies)
    assert learned({"temperature": TEMPERATURES["decoder"]}).digest == learned({}).digest


@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        ({"alpha": 0.5, "target": "nq"}, "alpha", "chooses alpha itself"),
        ({"max_experts": 1}, "max_experts", "'gradient' chooses every coefficient itself"),
        ({"budget": 9}, "budget", "'gradient' takes none"),
        ({"method": "task_arithmetic", "method_params": {"lambda": 0.5}}, "method_params.lambda", "leave lambda out"),
        ({"merging_weights": {"nq": 1.0}, "examples": None}, "weighting", "exclude 'weighting'"),
    ],
)
def test_what_learned_coefficients_do_not_go_with(body: dict[str, Any], param: str, text: str) -> None:
    with pytest.raises(InvalidMixError) as caught:
        learned(body)
    assert caught.value.param == param
    assert text in caught.value.message


def test_coefficients_are_learned_of_sums_and_not_in_engines_that_would_merge_each_step() -> None:
    flan = POOLS["flan"]
    body: dict[str, Any] = {"examples": EXAMPLES, "weighting": "gradient"}
    for method in ("ties", "dare_linear", "slerp"):
        one = {**body, "method": method, "experts": ["nq"]}
        with pytest.raises(InvalidMixError, match="is none; use 'linear' or 'task_arithmetic'") as caught:
            parse_inline(one, pool=flan, settings=make_settings(), is_served=False)
        assert caught.value.param == "cocktail.method"
    with pytest.raises(WeightingNotServedError) as refused:
        parse({**body})
    assert (refused.value.param, refused.value.code) == ("weighting", "weighting_not_served")
    assert "engine.mode: unmerged" in refused.value.message
    with pytest.raises(WeightingNotServedError):
        parse_inline(body, pool=flan, settings=make_settings())
    parse_inline(body, pool=flan, settings=make_settings(), is_served=False)
    parse_inline(body, pool=UNMERGED["flan"], settings=make_settings())
    assert parse({"target": "nq", "weighting": "gradient"}).options.weighting is None, "nothing is weighed"


def test_an_unmerged_pool_takes_no_method_that_needs_merged_parameters() -> None:
    pools = {"flan": replace(POOLS["flan"], mode="unmerged")}
    body = {"name": "films", "pool": "flan", "examples": EXAMPLES}
    for method in ("linear", "task_arithmetic"):
        parse_request({**body, "method": method}, settings=make_settings(), pools=pools)
    with pytest.raises(MethodNotServedError) as caught:
        parse_request({**body, "method": "ties"}, settings=make_settings(), pools=pools)
    assert caught.value.param == "method"
    with pytest.raises(MethodNotServedError) as caught:
        parse_inline({"examples": EXAMPLES, "method": "slerp"}, pool=pools["flan"], settings=make_settings())
    assert caught.value.param == "cocktail.method"


def test_the_pools_separator_joins_the_rows_that_do_not_say() -> None:
    section = {"id": "flan", "kind": "decoder", "base": "b", "engine": {"type": "fake"}, "example_separator": "\n"}
    settings = Settings.model_validate({"pools": [section]})
    rows = [EXAMPLES[0], {"prompt": "c", "completion": "d"}, {**EXAMPLES[0], "separator": ": "}]
    body = {"name": "films", "pool": "flan", "examples": rows, "validation_examples": rows}
    request = parse_request(body, settings=settings, pools=POOLS)
    for given in (request.examples, request.validation):
        assert given is not None
        assert [example.text for example in given] == ["a\nb", "cd", "a: b"]  # type: ignore[union-attr]
    plain = parse({"examples": rows[:1]})
    assert plain.digest != parse_request({**body, "examples": rows[:1]}, settings=settings, pools=POOLS).digest
    with pytest.raises(ValidationError):
        Settings.model_validate({"pools": [{**section, "example_separator": "x" * 17}]})
