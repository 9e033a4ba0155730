"""The tokenizer of a folder: the model's own, or none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cocktail_serve.errors import ConfigError
from cocktail_serve.scoring.tokenizer import load_fast_tokenizer
from tests.models import make_decoder_tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2", "gemma2"])
def test_a_folder_without_tokenizer(tmp_path: Path, model_type: str) -> None:
    """For some architectures transformers raises; for others it makes one up that turns every text into nothing."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ConfigError, match=r"copy tokenizer\.json and tokenizer_config\.json there") as caught:
        load_fast_tokenizer(tmp_path)
    assert not caught.value.message.rstrip().endswith(":"), "a list that was cut off is told as such"
    made_of = make_decoder_tokenizer()
    made_of.save_pretrained(tmp_path / "original")
    for file in FILES:
        shutil.copy(tmp_path / "original" / file, tmp_path / file)
    assert load_fast_tokenizer(tmp_path)("a dog")["input_ids"] == made_of("a dog")["input_ids"]


def test_one_that_does_not_tell_where_a_token_starts(tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no fast tokenizer"):
        load_fast_tokenizer(tmp_path)
