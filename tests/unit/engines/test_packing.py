from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel, XLMRobertaConfig, XLMRobertaModel

from cocktail_serve.engines.packing import Packing

SHAPE: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}
LENGTHS = [3, 17, 1, 9]


def make(kind: str, **options: Any) -> torch.nn.Module:
    classes: dict[str, Any] = {
        "bert": (BertConfig, BertModel),
        "roberta": (RobertaConfig, RobertaModel),
        "xlm-roberta": (XLMRobertaConfig, XLMRobertaModel),
    }
    config, model = classes[kind]
    torch.manual_seed(0)
    module: torch.nn.Module = model(config(**SHAPE, **options)).eval().requires_grad_(False)
    return module


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
def test_gives_each_text_what_it_gets_alone(kind: str) -> None:
    model = make(kind)
    packing = Packing.of(model)
    assert packing is not None
    rng = np.random.default_rng(0)
    token_ids = [rng.integers(5, 99, length).tolist() for length in LENGTHS]
    packed = packing.token_embeddings(model, token_ids)
    assert packed.shape == (4, 17, 32)
    for row, ids in zip(packed, token_ids, strict=True):
        alone = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(row[: len(ids)], alone, rtol=1e-4, atol=1e-5)
        assert not row[len(ids) :].any()


def test_other_attention_or_another_architecture_is_left_alone() -> None:
    assert Packing.of(make("bert", attn_implementation="eager")) is None
    assert Packing.of(make("bert", is_decoder=True)) is None
    other = make("bert")
    other.config.model_type = "modernbert"
    assert Packing.of(other) is None


def test_is_worth_it_where_padding_costs_more_than_longer_rows() -> None:
    packing = Packing(first_position=0, width=384)
    assert packing.is_worth_it([14, 6, 6, 6])
    assert not packing.is_worth_it([10, 10, 10])
    assert not packing.is_worth_it([10])
    assert not packing.is_worth_it([140] * 6 + [120])  # hardly any padding, and rows of 960
