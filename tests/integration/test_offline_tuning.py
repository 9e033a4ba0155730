"""An adapter tuned on a handful of examples: as far as folds allow, and the base is left as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cocktail_serve.examples import ExampleSet, TextExample
from cocktail_serve.offline import tuning
from cocktail_serve.offline.tuning import Factors, Tuned, applied, tune
from cocktail_serve.scoring.decoder import TokenizedExample, score_with_transformers, tokenize_examples
from tests.models import make_decoder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_decoder(tmp_path_factory.mktemp("tuning") / "base")


@pytest.fixture
def model(base: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(base).eval()


def tokenized(base: Path, *pairs: tuple[str, str]) -> list[TokenizedExample]:
    examples = ExampleSet.of(TextExample(text, output) for text, output in pairs)
    return tokenize_examples(AutoTokenizer.from_pretrained(base), examples, max_tokens=99)


def capitals(base: Path, *places: str) -> list[TokenizedExample]:
    return tokenized(base, *((f"the capital of {place} is", "paris") for place in places))


def tuned_on(model: torch.nn.Module, examples: list[TokenizedExample], *, seed: int = 0) -> Tuned:
    return tune(model, examples, seed=seed)


def test_what_was_tuned_loses_less_on_rows_that_it_did_not_see(base: Path, model: torch.nn.Module) -> None:
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    tuned = tuned_on(model, capitals(base, *"abcdef"))
    assert tuned.num_steps > 0
    assert len(tuned.held_out) == tuning.STEPS + 1
    assert tuned.held_out[tuned.num_steps] == min(tuned.held_out) < tuned.held_out[0]
    unseen = capitals(base, *"xyz")
    of_base = score_with_transformers(model, unseen)
    with applied(model, tuned.factors):
        of_tuned = score_with_transformers(model, unseen)
    assert all(ours < theirs for ours, theirs in zip(of_tuned, of_base, strict=True))
    assert score_with_transformers(model, unseen) == of_base, "the hooks are gone"
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == {
        name: parameter.shape for name, parameter in before.items()
    }
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_the_held_out_loss_of_no_steps_is_the_bases(base: Path, model: torch.nn.Module) -> None:
    examples = capitals(base, *"abcd")
    tuned = tuned_on(model, examples)
    assert tuned.held_out[0] == pytest.approx(np.mean(score_with_transformers(model, examples)))


def test_the_same_examples_and_seed_give_the_same_adapter(base: Path, model: torch.nn.Module) -> None:
    examples = capitals(base, *"abc")
    first, second, other = (tuned_on(model, examples, seed=seed) for seed in (3, 3, 4))
    assert first.held_out == second.held_out != other.held_out
    for name, of_layer in first.factors.items():
        assert all(torch.equal(one, another) for one, another in zip(of_layer, second.factors[name], strict=True))
    assert set(first.factors) == {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def test_rows_that_teach_nothing_of_each_other_leave_the_base(base: Path, model: torch.nn.Module) -> None:
    """Each says of one prompt what no other says, so that a step on the others makes it worse."""
    outputs = ["paris", "berlin", "madrid", "a dog", "a cat"]
    examples = tokenized(base, *(("it is", output) for output in outputs))
    order = np.argsort(score_with_transformers(model, examples))
    tuned = tuned_on(model, [examples[order[0]], examples[order[-1]]])
    assert tuned.held_out[tuned.num_steps] == min(tuned.held_out)


def test_one_example_leaves_nothing_to_hold_out(base: Path, model: torch.nn.Module) -> None:
    examples = capitals(base, "a")
    tuned = tuned_on(model, examples)
    assert (tuned.num_steps, tuned.held_out) == (0, ())
    with applied(model, tuned.factors):
        of_tuned = score_with_transformers(model, examples)
    assert of_tuned == score_with_transformers(model, examples)


def test_factors_add_to_a_layer_what_peft_merges_into_it(model: torch.nn.Module) -> None:
    torch.manual_seed(0)
    name = "model.layers.0.mlp.up_proj"
    layer = model.get_submodule(name)
    down, up = torch.randn(8, layer.in_features), torch.randn(layer.out_features, 8)
    ids = torch.arange(5, 15)[None]
    with torch.inference_mode():
        with applied(model, {name: Factors(down, up)}):
            beside = model(input_ids=ids).logits
        layer.weight += up @ down
        merged = model(input_ids=ids).logits
    torch.testing.assert_close(beside, merged, atol=1e-3, rtol=1e-3)
