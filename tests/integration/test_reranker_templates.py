"""Rerankers made of instruct models: sentence-transformers reads a pair through the tokenizer's chat template."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from transformers import AutoTokenizer

from cocktail_serve.engines.in_process.reranker_model import Reranker
from cocktail_serve.errors import ConfigError, InvalidRequestError
from tests.models import make_decoder_reranker

BY_ROLE = (
    "{% for m in messages %}{{ 'find: ' if m.role == 'query' else 'in: ' if m.role == 'document' else 'do: ' }}"
    "{{ m.content }}\n{% endfor %}end"
)
WITHOUT_ROLES = "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.content }}{% endfor %}"
PAIRS = [("what is the capital", "paris"), ("my card was stolen", "the bank opens a new account for you " * 3)]


def served(folder: Path) -> Reranker:
    return Reranker(folder, dtype="float32", device=torch.device("cpu"))


def make(folder: Path, template: str) -> Path:
    make_decoder_reranker(folder, pad_token_id=0)
    (folder / "chat_template.jinja").write_text(template)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<pad>"}))
    return folder


def of_library(folder: Path, **options: int) -> np.ndarray:
    model = CrossEncoder(str(folder), device="cpu", **options)
    scores: np.ndarray = model.predict(PAIRS, activation_fn=torch.nn.Identity(), batch_size=1)
    return scores


def test_scores_are_those_of_the_library(tmp_path: Path) -> None:
    folder = make(tmp_path / "reranker", BY_ROLE)
    reranker = served(folder)
    ids, types = reranker.tokenize(PAIRS)
    assert reranker._model.tokenizer.decode(ids[0]) == "find: what is the capital\nin: paris\nend"
    assert np.allclose(reranker.forward(ids, types)[:, 0], of_library(folder), atol=1e-5)


def test_a_pair_is_cut_as_the_library_cuts_it(tmp_path: Path) -> None:
    folder = make(tmp_path / "reranker", BY_ROLE)
    reranker = served(folder)
    whole, _ = reranker.tokenize(PAIRS)
    cut, types = reranker.tokenize(PAIRS, truncate_to=40)
    assert len(whole[1]) > 40
    assert len(cut[1]) == 40
    assert np.allclose(reranker.forward(cut, types)[:, 0], of_library(folder, max_length=40), atol=1e-5)


def test_a_template_that_knows_no_pairs_is_refused_and_may_be_taken_away(tmp_path: Path) -> None:
    folder = make(tmp_path / "reranker", WITHOUT_ROLES)
    with pytest.raises(ConfigError, match=r"take chat_template\.jinja") as caught:
        served(folder).tokenize(PAIRS)
    assert "fails: " in caught.value.message
    (folder / "chat_template.jinja").unlink()
    reranker = served(folder)
    assert np.allclose(reranker.forward(*reranker.tokenize(PAIRS))[:, 0], of_library(folder), atol=1e-5)


def test_a_token_that_the_model_has_no_embedding_for_never_reaches_it(tmp_path: Path) -> None:
    folder = make(tmp_path / "reranker", BY_ROLE)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<added>"]})
    tokenizer.save_pretrained(folder)
    reranker = served(folder)
    with pytest.raises(InvalidRequestError, match="'<added>'") as caught:
        reranker.tokenize([PAIRS[0], ("where is it", "here <added> there")])
    assert caught.value.param == "documents.1"
    assert len(reranker.tokenize(PAIRS)[0]) == 2
