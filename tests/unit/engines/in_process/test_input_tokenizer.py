"""Token ids of texts: none that the model does not know."""

from __future__ import annotations

import pytest

from cocktail_serve.engines.in_process.input_tokenizer import InputTokenizer
from cocktail_serve.errors import ConfigError
from tests.models import make_encoder_tokenizer


def test_an_added_token_that_the_model_was_not_resized_for_is_plain_text() -> None:
    plain, added = make_encoder_tokenizer(), make_encoder_tokenizer()
    size = len(plain)
    added.add_special_tokens({"pad_token": "<more>"})
    assert added.convert_tokens_to_ids("<more>") == size
    texts = ["a dog <more> cat", "a [MASK] dog"]
    made = InputTokenizer(added, max_length=64, vocab_size=size)
    assert made.encode(texts) == InputTokenizer(plain, max_length=64, vocab_size=size).encode(texts)
    grown = InputTokenizer(added, max_length=64, vocab_size=size + 1)
    assert size in grown.encode(texts)[0]


def test_words_that_the_model_has_no_embeddings_for_are_refused() -> None:
    tokenizer = make_encoder_tokenizer()
    with pytest.raises(ConfigError, match=f"the id {len(tokenizer) - 1}, but the model has embeddings for 100 ids"):
        InputTokenizer(tokenizer, max_length=64, vocab_size=100)
