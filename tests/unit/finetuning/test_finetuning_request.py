"""A job's words and a cocktail's: what one means in the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cocktail_serve.cocktails.parsing import CocktailBody
from cocktail_serve.errors import InvalidRequestError, NotFoundError
from cocktail_serve.finetuning.request import JobBody, JobRequest, param_of_job
from cocktail_serve.pool import NAME_PATTERN, Member, Pool


def member(name: str) -> Member:
    return Member(name, Path("/models") / name, f"fp-{name}", "float32", 8)


def pool(pool_id: str) -> Pool:
    return Pool(pool_id, "decoder", member("base"), {name: member(name) for name in ("nq", "ag-news")}, "text")


LONG = "p" * 64
POOLS = {pool_id: pool(pool_id) for pool_id in ("flan", "bge", LONG)}


def asked(**fields: Any) -> JobRequest:
    return JobRequest.of(JobBody.model_validate({"model": "flan", "training_file": "file-1"} | fields))


def test_options_are_read_from_the_metadata_and_the_rest_is_kept() -> None:
    metadata = {
        "alpha": "0.5",
        "temperature": "1e-1",
        "weighting": "softmax",
        "method": "ties",
        "method_params": '{"density": 0.5}',
        "experts": "nq, ag-news",
        "budget": "12",
        "owner": "me",
    }
    body = asked(metadata=metadata, suffix="films", seed=3).cocktail(POOLS, visible=None)
    assert body == {
        "name": "films",
        "pool": "flan",
        "target": None,
        "seed": 3,
        "metadata": metadata,
        "alpha": 0.5,
        "temperature": 0.1,
        "weighting": "softmax",
        "method": "ties",
        "method_params": {"density": 0.5},
        "experts": ["nq", "ag-news"],
        "budget": 12,
    }
    assert body.keys() <= CocktailBody.model_fields.keys()


def test_a_name_that_is_not_given_is_of_the_pool_and_the_job_and_fits() -> None:
    names = [
        asked(model=model, seed=seed).cocktail(POOLS, visible=None)["name"]
        for model in (LONG, "flan")
        for seed in (0, 1)
    ]
    assert len(set(names)) == 4
    assert names[2] == f"flan-{asked().digest[:8]}"
    assert all(len(name) <= 64 for name in names), NAME_PATTERN


def test_hyperparameters_stand_in_either_place_and_the_method_counts() -> None:
    old = asked(hyperparameters={"n_epochs": 3})
    new = asked(method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}})
    assert old.digest == new.digest
    assert old.ignored == {"n_epochs": 3}
    both = asked(
        hyperparameters={"n_epochs": 1, "batch_size": 2},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}},
    )
    assert both.ignored == {"n_epochs": 3}
    assert asked(method={"type": "supervised"}, hyperparameters={"batch_size": 2}).ignored == {"batch_size": 2}


def test_the_digest_is_of_all_of_it() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"model": "flan/nq"},
        {"training_file": "file-2"},
        {"validation_file": "file-2"},
        {"suffix": "films"},
        {"metadata": {"a": "b"}},
        {"metadata": {}},
        {"hyperparameters": {"n_epochs": 1}},
        {"seed": 1},
    ]
    digests = [asked(**change).digest for change in changes]
    assert len(set(digests)) == len(changes)
    assert JobRequest(**asked(metadata={"a": "b"}).to_json()) == asked(metadata={"a": "b"})


@pytest.mark.parametrize(
    ("model", "named"),
    [("flax", "bge, flan"), ("flan/squad", "flan, flan/ag-news, flan/nq"), ("flan/", "bge, flan"), ("", "bge, flan")],
)
def test_a_model_that_is_not_there(model: str, named: str) -> None:
    with pytest.raises(NotFoundError, match=f"there are: {named}$") as caught:
        asked(model=model).cocktail(POOLS, visible={"flan", "bge"})
    assert caught.value.param == "model"


def test_a_pool_that_is_not_for_the_tenant_is_not_there() -> None:
    with pytest.raises(NotFoundError, match=r"there are: bge$"):
        asked().cocktail(POOLS, visible={"bge"})


def test_an_option_that_cannot_be_read_is_named() -> None:
    for name, text in (("alpha", "half"), ("budget", "1.5"), ("method_params", "[" * 100_000)):
        with pytest.raises(InvalidRequestError) as caught:
            asked(metadata={name: text}).cocktail(POOLS, visible=None)
        assert caught.value.param == f"metadata.{name}"


@pytest.mark.parametrize(
    ("param", "of_job"),
    [
        (None, None),
        ("name", "suffix"),
        ("examples", "training_file"),
        ("examples.3", "training_file"),
        ("validation_examples", "validation_file"),
        ("target", "model"),
        ("alpha", "metadata.alpha"),
        ("experts.1", "metadata.experts.1"),
        ("method_params.density", "metadata.method_params.density"),
        ("seed", "seed"),
        ("metadata", "metadata"),
    ],
)
def test_errors_name_the_field_of_the_job(param: str | None, of_job: str | None) -> None:
    assert param_of_job(param) == of_job
