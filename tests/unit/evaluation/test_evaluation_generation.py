"""Greedy answers end where the mixture's models end theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from cocktail_serve.evaluation.generation import generate_texts
from tests.models import CHAIN_TOKENS, make_chain_decoder


@pytest.mark.parametrize(
    ("stops", "answer"), [((2, 3), "one two three four"), ((), "one two three four one two three")], ids=str
)
def test_answers_end_at_the_tokens_given(tmp_path: Path, stops: tuple[int, ...], answer: str) -> None:
    folder = make_chain_decoder(tmp_path, end="<|im_end|>")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = 2  # as a mixture's, which is loaded with the base's configuration
    prompts = [[CHAIN_TOKENS.index("<|assistant|>")]]
    said = generate_texts([model], [1.0], tokenizer, prompts, max_new_tokens=8, max_tokens=64, stop_token_ids=stops)
    assert said == [answer]
