"""The models people have, mixed into a folder and weighed: every family of the zoo, in every form.

What must come out is made apart: each library's own parameters, averaged by name in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from cocktail_serve.checkpoints.compatibility import compare
from cocktail_serve.checkpoints.folder import save_mixture
from cocktail_serve.checkpoints.opening import open_pool
from cocktail_serve.config import PoolConfig, Settings
from cocktail_serve.errors import CheckpointError, IncompatibleModelsError
from cocktail_serve.examples import ExampleSet, parse_examples
from cocktail_serve.offline.weighing import weigh_offline
from cocktail_serve.recipe import make_recipe
from cocktail_serve.scoring.contrastive import contrastive_losses, texts_of
from cocktail_serve.scoring.decoder import tokenize_examples
from cocktail_serve.scoring.ranking import pairs_of, ranking_losses
from tests.zoo.families import MAX_MODEL_LEN, Family, Zoo, cases
from tests.zoo.making import BASE, BASE_RESAVED_BY_4, BASE_RESAVED_BY_5, FULL, LORA, RESAVED_BY_4, RESAVED_BY_5
from tests.zoo.reference import answers
from tests.zoo.specimens import SPECIMENS, Specimen

TEXTS = ["what is the capital of france", "paris", "my card was stolen ①ﬁ  é"]

TEXT_EXAMPLES = [
    {"input": "the capital of france is", "output": "paris"},
    {"input": "the film was", "output": "a joy"},
]
RETRIEVAL_EXAMPLES = [
    {"query": "what is the capital of france", "pos": ["paris"], "neg": ["berlin", "the dog"]},
    {"query": "my card was stolen", "pos": ["lost card"], "neg": ["open an account"]},
]

ROUNDING = 1e-5
"""Of float32 parameters, whose largest are near 4."""

TOLERANCE = 1e-3
"""Of outputs: logits of the decoders reach tens, and one rounding at each end of a layer shows."""


@pytest.fixture
def family(specimen: Specimen, zoo: Zoo) -> Family:
    return zoo.family(specimen)


def assert_same_parameters(
    ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], *, atol: float = ROUNDING
) -> None:
    assert ours.keys() == theirs.keys()
    far = {
        name: float((ours[name].double() - theirs[name].double()).abs().max())
        for name in ours
        if not torch.allclose(ours[name].double(), theirs[name].double(), rtol=0, atol=atol)
    }
    assert not far


@pytest.mark.parametrize("specimen", cases(SPECIMENS))
def test_a_family_is_what_it_says(family: Family) -> None:
    """Every form of a model is loaded into the same parameters, and every expert answers something else."""
    reference, specimen = family.reference, family.specimen
    for member, original in (
        (RESAVED_BY_4, FULL),
        (RESAVED_BY_5, FULL),
        (BASE_RESAVED_BY_4, BASE),
        (BASE_RESAVED_BY_5, BASE),
    ):
        if member in family.folders:
            assert_same_parameters(reference.state(member), reference.state(original), atol=0)
    tokenizer = AutoTokenizer.from_pretrained(family.folders[BASE]) if specimen.kind == "decoder" else None
    said = [answers(specimen, reference.mixed({name: 1.0}), TEXTS, tokenizer) for name in (BASE, FULL, LORA)]
    assert all(np.isfinite(answer).all() for answer in said)
    assert np.abs(said[1] - said[0]).max() > 0.1
    assert np.abs(said[2] - said[0]).max() > 0.1


@pytest.mark.parametrize(("specimen", "member"), cases(SPECIMENS, (FULL,), (LORA,), (RESAVED_BY_4,), (RESAVED_BY_5,)))
def test_an_expert_can_be_mixed_in_every_form(family: Family, member: str) -> None:
    assert compare(family.folders[BASE], family.folder(member)).problems == ()


@pytest.mark.parametrize(
    ("specimen", "member"),
    [
        pytest.param(specimen, member, id=f"{specimen}-{member}")
        for specimen in SPECIMENS
        for member in specimen.refused
    ],
)
def test_what_is_refused_says_why(family: Family, member: str) -> None:
    with pytest.raises((IncompatibleModelsError, CheckpointError), match=family.specimen.refused[member].says):
        compare(family.folders[BASE], family.folder(member)).raise_if_incompatible()


@pytest.mark.parametrize(
    ("specimen", "base", "expert"),
    cases(
        SPECIMENS,
        (BASE_RESAVED_BY_4, FULL),
        (BASE_RESAVED_BY_5, FULL),
        (BASE_RESAVED_BY_4, RESAVED_BY_5),
        (BASE_RESAVED_BY_5, RESAVED_BY_4),
        (BASE_RESAVED_BY_4, LORA),
        (BASE_RESAVED_BY_5, LORA),
    ),
)
def test_a_base_may_be_saved_anew(family: Family, base: str, expert: str, tmp_path: Path) -> None:
    folders = [family.folder(base), family.folder(expert)]
    assert compare(*folders).problems == ()
    pool = open_pool(family.pool([expert], base=folders[0]), cache_dir=tmp_path / "cache")
    weights = {BASE: 0.4, expert: 0.6}
    save_mixture(make_recipe(pool, weights, dtype="float32"), pool, tmp_path / "mixed")
    mixed = family.reference.loaded(tmp_path / "mixed")
    assert_same_parameters(mixed.state_dict(), family.reference.mixed(weights).state_dict())


@pytest.mark.parametrize("specimen", cases(SPECIMENS))
def test_a_mixture_is_a_folder_that_its_library_loads(family: Family, tmp_path: Path) -> None:
    pool = open_pool(family.pool(), cache_dir=tmp_path / "cache")
    weights = {BASE: 0.25} | dict.fromkeys(family.experts, 0.75 / len(family.experts))
    save_mixture(make_recipe(pool, weights, dtype="float32"), pool, tmp_path / "mixed")
    reference, specimen = family.reference, family.specimen
    mixed, expected = reference.loaded(tmp_path / "mixed"), reference.mixed(weights)
    assert_same_parameters(mixed.state_dict(), expected.state_dict())
    tokenizers: list[Any] = [None, None]
    if specimen.kind == "decoder":
        tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "mixed", family.folders[BASE])]
    said = [answers(specimen, model, TEXTS, text) for model, text in zip((mixed, expected), tokenizers, strict=True)]
    np.testing.assert_allclose(*said, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("specimen", cases(SPECIMENS))
def test_losses_are_those_of_the_library(family: Family, tmp_path: Path) -> None:
    experts = [name for name in (FULL, LORA) if name in family.experts]
    config = family.pool(experts)
    rows = TEXT_EXAMPLES if family.specimen.kind == "decoder" else RETRIEVAL_EXAMPLES
    settings = Settings.model_validate({"store": {"cache_dir": str(tmp_path / "cache")}, "pools": [dump(config)]})
    weighed = weigh_offline(settings, "zoo", {"examples": rows}, lambda *_, **__: None)
    examples = parse_examples(rows, family.specimen.kind, max_examples=100)
    expected = {name: mean_loss(family, {name: 1.0}, examples) for name in (BASE, *experts)}
    assert dict(weighed.weighing.losses) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert weighed.mixed_loss == pytest.approx(
        mean_loss(family, weighed.weighing.merging_weights, examples), rel=1e-4, abs=1e-4
    )
    assert len(set(expected.values())) == len(expected)


def dump(config: PoolConfig) -> dict[str, Any]:
    section: dict[str, Any] = config.model_dump(exclude_unset=True, mode="json")
    return section


def mean_loss(family: Family, merging_weights: Mapping[str, float], examples: ExampleSet) -> float:
    """Mean loss (nats) of a mixture in its own library, one text at a time."""
    model = family.reference.mixed(merging_weights)
    if family.specimen.kind == "decoder":
        tokenizer = AutoTokenizer.from_pretrained(family.folders[BASE])
        losses = []
        for example in tokenize_examples(tokenizer, examples, max_tokens=MAX_MODEL_LEN - 1):
            ids = torch.tensor([example.token_ids])
            with torch.inference_mode():
                log_probs = model(ids).logits[0, :-1].double().log_softmax(-1)
            taken = log_probs.gather(1, ids[0, 1:, None])[example.output_start - 1 :]
            losses.append(-float(taken.mean()))
    elif family.specimen.kind == "encoder":
        texts = texts_of(examples)
        vectors = answers(family.specimen, model, texts)
        losses = contrastive_losses(examples, dict(zip(texts, vectors, strict=True)))
    else:
        logits = [
            answers(family.specimen, model, [query, document])[0, 0]
            for example in examples
            for query, document in pairs_of(example)
        ]
        losses = ranking_losses(examples, logits)
    return sum(losses) / len(losses)
