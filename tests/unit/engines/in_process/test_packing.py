from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel, XLMRobertaConfig, XLMRobertaModel

from cocktail_serve.engines.in_process.packing import Packing

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
    module: torch.nn.Module = model(config(**(SHAPE | options))).eval().requires_grad_(False)
    return module


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
def test_gives_each_text_what_it_gets_alone(kind: str) -> None:
    model = make(kind)
    packing = Packing.of(model)
    assert packing is not None
    rng = np.random.default_rng(0)
    token_ids = [rng.integers(5, 99, length).tolist() for length in LENGTHS]
    packed = packing.token_embeddings(token_ids)
    assert packed.shape == (4, 17, 32)
    for row, ids in zip(packed, token_ids, strict=True):
        alone = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(row[: len(ids)], alone, rtol=1e-4, atol=1e-5)
        assert not row[len(ids) :].any()


def test_a_row_may_be_longer_than_the_model_has_positions() -> None:
    model = make("bert")
    packing = Packing.of(model)
    assert packing is not None
    token_ids = [[*range(5, 45)], [50, 51], [52]]
    assert packing.rows_of([40, 2, 1]) == [[0, 1, 2]]
    alone = model(input_ids=torch.tensor(token_ids[:1])).last_hidden_state[0]
    torch.testing.assert_close(packing.token_embeddings(token_ids)[0], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
def test_a_padding_token_in_a_text_has_the_place_that_the_model_gives_it(kind: str) -> None:
    model = make(kind)
    packing = Packing.of(model)
    assert packing is not None
    pad = model.config.pad_token_id  # type: ignore[union-attr]
    text = [7, pad, 8, 9, pad]
    alone = model(input_ids=torch.tensor([text]), attention_mask=torch.ones(1, 5)).last_hidden_state[0]
    torch.testing.assert_close(packing.token_embeddings([[5, 6], text])[1], alone, rtol=1e-4, atol=1e-5)


def test_a_model_that_returns_tuples_is_packed() -> None:
    model = make("bert", return_dict=False)
    packing = Packing.of(model)
    assert packing is not None
    alone = model(input_ids=torch.tensor([[7, 8]]))[0][0]
    torch.testing.assert_close(packing.token_embeddings([[5], [7, 8]])[1], alone, rtol=1e-4, atol=1e-5)


def test_other_attention_or_another_architecture_is_left_alone() -> None:
    assert Packing.of(make("bert", attn_implementation="eager")) is None
    assert Packing.of(make("bert", is_decoder=True)) is None
    assert Packing.of(make("bert", chunk_size_feed_forward=2)) is None
    other = make("bert")
    other.config.model_type = "modernbert"
    assert Packing.of(other) is None


def test_runs_as_torchscript_with_whatever_the_parameters_are_bound_to() -> None:
    model = make("bert")
    packing = Packing.of(model)
    assert packing is not None
    assert isinstance(packing._forward, torch.jit.ScriptModule)
    token_ids = [[7, 8, 9], [10, 11]]
    before = packing.token_embeddings(token_ids)
    own = [parameter.data for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter)
    other = packing.token_embeddings(token_ids)
    torch.testing.assert_close(other[0], model(input_ids=torch.tensor([[7, 8, 9]])).last_hidden_state[0])
    assert not torch.allclose(other, before)
    for parameter, tensor in zip(model.parameters(), own, strict=True):
        parameter.data = tensor
    assert torch.equal(packing.token_embeddings(token_ids), before)


def test_a_model_whose_trace_is_another_function_runs_as_it_is() -> None:
    model = make("bert")
    whole = model.forward

    def forward(**inputs: Any) -> Any:
        output = whole(**inputs)
        if inputs["input_ids"].shape[1] > 5:  # what a trace with a shorter row does not see
            output.last_hidden_state = output.last_hidden_state + 1
        return output

    model.forward = forward
    packing = Packing.of(model)
    assert packing is not None
    assert not isinstance(packing._forward, torch.jit.ScriptModule)
    alone = whole(input_ids=torch.arange(5, 12)[None]).last_hidden_state
    torch.testing.assert_close(packing.token_embeddings([[*range(5, 12)]]), alone + 1)


def test_a_torch_without_tracing_runs_the_model_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.jit, "trace")
    packing = Packing.of(make("bert"))
    assert packing is not None
    assert packing.token_embeddings([[7, 8, 9], [10]]).shape == (2, 3, 32)


def rows_of(lengths: list[int]) -> list[list[int]]:
    packing = Packing.of(make("bert", hidden_size=384, num_attention_heads=12))
    assert packing is not None
    return packing.rows_of(lengths)


@pytest.mark.parametrize("lengths", [[10], [140] * 6 + [120], [100, 100]])
def test_texts_have_rows_of_their_own_where_sharing_would_not_pay(lengths: list[int]) -> None:
    assert rows_of(lengths) == [[index] for index in range(len(lengths))]


def test_long_texts_are_left_to_the_model() -> None:
    packing = Packing.of(make("bert"))
    assert packing is not None
    assert packing.is_worth_it([512, 3])
    assert not packing.is_worth_it([513, 3])


def test_short_texts_fill_rows_evenly() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(6, 15, 32).tolist()
    rows = rows_of(lengths)
    assert sorted(index for row in rows for index in row) == list(range(32))
    sums = [sum(lengths[index] for index in row) for row in rows]
    assert max(sums) < 64
    assert max(sums) - min(sums) <= 14
    assert len(rows) * max(sums) < 1.1 * sum(lengths)
    assert len(rows_of([10] * 8)) < 8


def test_short_texts_share_what_a_long_one_leaves() -> None:
    assert rows_of([512, 200, 200]) == [[0], [1, 2]]
