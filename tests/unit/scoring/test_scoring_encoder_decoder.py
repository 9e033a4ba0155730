"""The loss of an encoder-decoder against transformers' own, one example at a time."""

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from cocktail_serve.errors import ContextLengthError, InvalidExamplesError
from cocktail_serve.examples import parse_examples
from cocktail_serve.scoring.encoder_decoder import score_encoder_decoder, tokenize_pairs
from tests.models import make_encoder_decoder

ROWS = [
    {"input": "the capital of france is", "output": "paris"},
    {"input": "my card was stolen", "output": "please open a new account at the bank, and then another one"},
    {"prompt": "a film", "completion": "was a joy"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_encoder_decoder(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def examples_of(rows):
    return parse_examples(rows, "encoder_decoder")


@pytest.mark.parametrize("batch_tokens", [1, 2048])
def test_losses_are_transformers_own(folder, tokenizer, monkeypatch, batch_tokens):
    monkeypatch.setattr("cocktail_serve.scoring.decoder.MAX_BATCH_TOKENS", batch_tokens)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    want = []
    for row in ROWS:
        source, target = row.values()
        encoded = tokenizer(source, text_target=target, return_tensors="pt")
        with torch.inference_mode():
            want.append(model(**encoded).loss.item())
    got = score_encoder_decoder(model, tokenize_pairs(tokenizer, examples_of(ROWS), max_tokens=None))
    assert got == pytest.approx(want, rel=1e-5)
    assert len(set(want)) == len(ROWS)


def test_the_output_is_closed_by_eos(tokenizer):
    (pair,) = tokenize_pairs(tokenizer, examples_of(ROWS[:1]), max_tokens=None)
    assert pair.labels[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(pair.labels[:-1]) == "paris"


@pytest.mark.parametrize("what", ["input", "output"])
def test_what_is_too_long_names_its_row(tokenizer, what):
    rows = [{"input": "a", "output": "b"}, {"input": "a", "output": "b"} | {what: "word " * 50}]
    with pytest.raises(ContextLengthError, match=rf"row 2: the {what} has \d+ tokens.*at most 20"):
        tokenize_pairs(tokenizer, examples_of(rows), max_tokens=20)
    assert len(tokenize_pairs(tokenizer, examples_of(rows[:1]), max_tokens=20)) == 1


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"query": "q", "pos": ["p"], "neg": ["n"]},
    ],
)
def test_other_forms_are_refused(row):
    with pytest.raises(InvalidExamplesError, match="an encoder_decoder pool takes"):
        examples_of([row])
