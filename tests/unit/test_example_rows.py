"""Rows as other tools write them: each is the plain row that means the same, or is refused by what it says."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import pytest

from cocktail_serve.errors import InvalidExamplesError
from cocktail_serve.examples import ChatExample, Example, example_digest, parse_examples
from cocktail_serve.pool import Kind

SYSTEM = {"role": "system", "content": "s"}
USER = {"role": "user", "content": "u"}
ANSWER = {"role": "assistant", "content": "a"}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "UTC"}'}}


def parsed(row: Any, kind: Kind = "decoder") -> Example:
    """The one example of a row, beside another for contrast where it may need that."""
    rows = [row] if kind in ("decoder", "encoder_decoder") else [row, {"query": "x", "pos": ["y"], "neg": ["z"]}]
    return parse_examples(rows, kind).examples[0]


def refused(row: Any, kind: Kind = "decoder") -> str:
    other = {"query": "x", "pos": ["y"], "neg": ["z"]} if kind == "encoder" else {"input": "a", "output": "b"}
    with pytest.raises(InvalidExamplesError) as caught:
        parse_examples([other, row], kind)
    assert caught.value.row == 2
    return caught.value.message


def same(row: Any, plain: Any, kind: Kind = "decoder") -> None:
    """They are one example, and so their losses are kept under one digest."""
    assert parsed(row, kind) == parsed(plain, kind)
    assert example_digest(parsed(row, kind)) == example_digest(parsed(plain, kind))


class TestOpenAI:
    @pytest.mark.parametrize("weights", [(None, None), (1, 1), (0, 1), (0, None), (1, None), (None, 1.0)])
    def test_the_last_answer_with_weight_is_scored(self, weights: tuple[Any, Any]) -> None:
        first, last = weights
        turns = [SYSTEM, USER, ANSWER | {"weight": first}, USER, ANSWER | {"content": "b", "weight": last}]
        same({"messages": turns}, {"messages": [SYSTEM, USER, ANSWER, USER, ANSWER | {"content": "b"}]})

    def test_what_follows_the_scored_answer_is_left_out(self) -> None:
        turns = [USER, ANSWER, USER, ANSWER | {"content": "b", "weight": 0}]
        same({"messages": turns}, {"messages": [USER, ANSWER]})
        unlike = {"messages": [USER, ANSWER, USER, ANSWER | {"content": "b"}]}
        assert example_digest(parsed({"messages": turns})) != example_digest(parsed(unlike))

    def test_nothing_to_score(self) -> None:
        assert "weight 0" in refused({"messages": [USER, ANSWER | {"weight": 0}]})
        assert "weight 0" in refused({"messages": [USER, ANSWER | {"weight": 0}, USER, ANSWER | {"weight": 0}]})

    @pytest.mark.parametrize("weight", [0.5, 2, -1, True, "1", [1]])
    def test_other_weights(self, weight: Any) -> None:
        assert "messages[1].weight must be 0 or 1" in refused({"messages": [USER, ANSWER | {"weight": weight}]})

    def test_weights_of_others_decide_nothing(self) -> None:
        same({"messages": [USER | {"weight": 1}, ANSWER]}, {"messages": [USER, ANSWER]})
        same({"messages": [USER | {"weight": 0}, ANSWER]}, {"messages": [USER, ANSWER]})

    @pytest.mark.parametrize("role", ["system", "developer"])
    def test_instructions_may_be_empty(self, role: str) -> None:
        example = parsed({"messages": [{"role": role, "content": ""}, USER, ANSWER]})
        assert isinstance(example, ChatExample)
        assert example.messages[0] == (role, "")
        assert "is empty" in refused({"messages": [USER | {"content": ""}, ANSWER]})
        assert "is empty" in refused({"messages": [USER, ANSWER | {"content": ""}]})
        assert "must be a string" in refused({"messages": [USER, ANSWER | {"content": None}]})

    @pytest.mark.parametrize(
        "more", [{"tools": []}, {"tools": None}, {"parallel_tool_calls": False}, {"functions": None}, {"id": "x"}]
    )
    def test_fields_that_change_nothing(self, more: dict[str, Any]) -> None:
        same({"messages": [USER, ANSWER], **more}, {"messages": [USER, ANSWER]})
        empty = {"tool_calls": None, "refusal": None, "function_call": None, "audio": None, "name": None}
        same({"messages": [USER, ANSWER | empty]}, {"messages": [USER, ANSWER]})

    def test_tools_names_and_calls_are_kept_for_the_template(self) -> None:
        result = {"role": "tool", "tool_call_id": "c1", "content": ""}
        called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
        row = {"messages": [USER | {"name": "ann"}, called, result, ANSWER], "tools": [TOOL]}
        example = parsed(row)
        arguments = {"zone": "UTC"}
        assert example.to_json() == {
            "messages": [
                USER | {"name": "ann"},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [CALL | {"function": {"name": "now", "arguments": arguments}}],
                },
                result,
                ANSWER,
            ],
            "tools": [TOOL],
        }
        again = parsed(json.loads(json.dumps(example.to_json())))
        assert again == example
        assert example_digest(again) == example_digest(example)
        without = {key: value for key, value in row.items() if key != "tools"}
        assert len({example_digest(parsed(each)) for each in (row, without, {"messages": [USER, ANSWER]})}) == 3

    def test_a_call_may_be_the_answer(self) -> None:
        example = parsed({"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}], "tools": [TOOL]})
        assert isinstance(example, ChatExample)
        assert example.messages == (("user", "u"), ("assistant", ""))
        assert example.details[1]["tool_calls"][0]["function"]["name"] == "now"

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"messages": [USER, ANSWER], "functions": [{"name": "now"}]}, "say them as 'tools'"),
            (
                {"messages": [USER, ANSWER | {"function_call": {"name": "now"}}]},
                "messages[1].function_call is not served",
            ),
            ({"messages": [USER, ANSWER | {"refusal": "no"}]}, "messages[1].refusal is not served"),
            ({"messages": [USER, ANSWER | {"reasoning_content": "hm"}]}, "messages[1].reasoning_content is not served"),
            ({"messages": [USER | {"tool_calls": [CALL]}, ANSWER]}, "messages[0].tool_calls: only the assistant"),
            ({"messages": [USER, ANSWER | {"tool_calls": "x"}]}, "messages[1].tool_calls must be a list"),
            ({"messages": [USER, ANSWER | {"tool_calls": [{"type": "custom"}]}]}, "messages[1].tool_calls[0] must be"),
            (
                {"messages": [USER, ANSWER | {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
                "tool_calls[0].function.arguments is not JSON",
            ),
            (
                {"messages": [USER, ANSWER | {"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]},
                "tool_calls[0].function.arguments must be an object",
            ),
            ({"messages": [USER, ANSWER], "tools": "now"}, "'tools' must be a list"),
            ({"messages": [USER, ANSWER], "tools": [{"name": "now"}]}, "tools[0] must be"),
            ({"messages": [USER, ANSWER], "tools": [TOOL | {"x": float("nan")}]}, "tools[0] is not JSON"),
            ({"messages": [USER, ANSWER], "tools": [TOOL | {"x": "\ud800"}]}, "tools[0] is not JSON"),
            ({"messages": [USER | {"name": 1}, ANSWER]}, "'messages[0].name' must be a string"),
        ],
        ids=str,
    )
    def test_refused_by_name(self, row: Any, message: str) -> None:
        assert message in refused(row)

    def test_a_prompt_may_be_empty(self) -> None:
        assert parsed({"prompt": "", "completion": " a text"}).to_json() == {"input": "", "output": " a text"}
        assert "'input' is empty" in refused({"input": "", "output": "b"}, "encoder_decoder")
        assert "'completion' is empty" in refused({"prompt": "", "completion": ""})

    @pytest.mark.parametrize("weight", [0, 0.5, 2, "heavy"])
    def test_weights_of_rows(self, weight: Any) -> None:
        assert "all examples count the same" in refused({"input": "a", "output": "b", "weight": weight})
        same({"input": "a", "output": "b", "weight": 1.0}, {"input": "a", "output": "b"})


class TestFlagEmbedding:
    PLAIN: ClassVar[dict[str, Any]] = {"query": "q", "pos": ["p"], "neg": ["n", "m"]}

    @pytest.mark.parametrize("kind", ["encoder", "reranker"])
    @pytest.mark.parametrize(
        "more",
        [
            {"pos_scores": [98.1], "neg_scores": [1.5, 2]},
            {"pos_scores": None, "neg_scores": None, "prompt": None, "type": None},
            {"type": "normal", "prompt": ""},
            {"type": "only_1neg", "category": "math", "batch_size": 8, "train_group_size": 2},
        ],
    )
    def test_what_is_of_a_training_alone(self, kind: Kind, more: dict[str, Any]) -> None:
        same(self.PLAIN | more, self.PLAIN, kind)

    @pytest.mark.parametrize("type_", ["normal", "symmetric_class", "only_1neg", None])
    def test_a_prompt_goes_before_the_query(self, type_: str | None) -> None:
        same(self.PLAIN | {"prompt": "find: ", "type": type_}, self.PLAIN | {"query": "find: q"}, "encoder")

    @pytest.mark.parametrize("type_", ["symmetric_sts", "symmetric_clustering"])
    def test_and_before_the_passages_where_the_two_are_alike(self, type_: str) -> None:
        prompted = {"query": "same: q", "pos": ["same: p"], "neg": ["same: n", "same: m"]}
        same(self.PLAIN | {"prompt": "same: ", "type": type_}, prompted, "encoder")

    def test_prompts_of_cross_encoders(self) -> None:
        prompted = {"query": "Q: q", "pos": ["P: p"], "neg": ["P: n", "P: m"]}
        same(self.PLAIN | {"query_prompt": "Q: ", "passage_prompt": "P: "}, prompted, "reranker")
        same(self.PLAIN | {"prompt": "yes or no?"}, self.PLAIN, "reranker")

    def test_refusals(self) -> None:
        assert "'prompt' must be a string" in refused(self.PLAIN | {"prompt": 3}, "encoder")
        assert "'query' is empty" in refused(self.PLAIN | {"prompt": "find: ", "query": ""}, "encoder")
        assert "'query' must be a string" in refused(self.PLAIN | {"prompt": "find: ", "query": 3}, "encoder")
        assert "query_prompt" in refused(self.PLAIN | {"query_prompt": "Q: "}, "encoder")
        assert "unknown" in refused(self.PLAIN | {"unknown": 1}, "encoder")


class TestTriplets:
    @pytest.mark.parametrize("kind", ["encoder", "reranker"])
    def test_columns_of_sentence_transformers(self, kind: Kind) -> None:
        plain = {"query": "q", "pos": ["p"], "neg": ["n", "m"]}
        same({"anchor": "q", "positive": "p", "negative_1": "n", "negative_2": "m"}, plain, kind)
        same({"query": "q", "positive": "p", "negative": "n"}, plain | {"neg": ["n"]}, kind)

    def test_pairs(self) -> None:
        same({"anchor": "q", "positive": "p"}, {"query": "q", "pos": ["p"]}, "encoder")

    @pytest.mark.parametrize(
        "row",
        [
            {"positive": "p", "negative": "n"},
            {"anchor": "q", "query": "q", "positive": "p"},
            {"anchor": "q", "positive": ["p"], "negative": "n"},
            {"anchor": "q", "positive": "p", "negative": None},
            {"anchor": "q", "positive": "p", "label": 0.3},
        ],
    )
    def test_what_is_ambiguous(self, row: Any) -> None:
        assert "has the keys" in refused(row, "encoder")


class TestShareGPT:
    TURNS = ({"from": "human", "value": "u"}, {"from": "gpt", "value": "a"})

    def test_conversations_are_messages(self) -> None:
        same({"conversations": list(self.TURNS)}, {"messages": [USER, ANSWER]})
        same({"conversations": list(self.TURNS), "system": "s", "tools": ""}, {"messages": [SYSTEM, USER, ANSWER]})
        same(
            {"conversations": [{"from": "system", "value": "s"}, *self.TURNS], "id": 3},
            {"messages": [SYSTEM, USER, ANSWER]},
        )

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"conversations": [{"from": "observation", "value": "x"}]}, "conversations[0] needs 'from'"),
            ({"conversations": ["x"]}, "conversations[0] needs 'from'"),
            ({"conversations": "x"}, "must be a list of {from, value}"),
            ({"conversations": list(TURNS), "tools": "[{}]"}, "'tools' beside 'conversations'"),
            ({"conversations": [{"from": "human"}, TURNS[1]]}, "'messages[0].content' must be a string"),
            ({"conversations": list(TURNS), "images": ["a.png"]}, "has the keys ['images', 'messages']"),
        ],
        ids=str,
    )
    def test_refused(self, row: Any, message: str) -> None:
        assert message in refused(row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "i", "input": "x", "output": "o"}, "this is an Alpaca row"),
        ({"instruction": "i", "output": "o", "system": "s", "history": []}, "this is an Alpaca row"),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "a row of preferences"),
        ({"input": {"messages": []}, "preferred_output": [], "non_preferred_output": []}, "a row of preferences"),
        ({"text": "a document"}, "a row of text alone"),
    ],
    ids=str,
)
def test_other_forms_are_named_with_what_to_write(row: Any, message: str) -> None:
    told = refused(row)
    assert message in told
    assert "output" in told
