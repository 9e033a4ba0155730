"""Few-shot examples: every form, and every way a row can be wrong, with its number."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cocktail_serve.errors import InvalidExamplesError
from cocktail_serve.examples import (
    ChatExample,
    ExampleSet,
    RetrievalExample,
    TextExample,
    example_digest,
    parse_examples,
    read_jsonl,
    read_rows,
)
from cocktail_serve.pool import Kind

CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]


def test_text_forms_are_one_but_for_what_joins_them() -> None:
    rows = [{"input": "a", "output": "b"}, {"prompt": "a", "completion": "b"}, {"prompt": "a ", "completion": "b"}]
    given = parse_examples(rows, "decoder")
    assert given.examples == (TextExample("a", "b"), TextExample("a", "b", ""), TextExample("a ", "b", ""))
    assert [example.text for example in given] == ["a b", "ab", "a b"]  # type: ignore[union-attr]
    # an encoder-decoder reads the two apart
    one, other = parse_examples(rows[:2], "encoder_decoder")
    assert one == other == TextExample("a", "b")


@pytest.mark.parametrize(
    ("row", "pools", "text"),
    [
        ({"input": "a", "output": "b"}, None, "a b"),
        ({"input": "a ", "output": "b"}, None, "a b"),
        ({"input": "a:\n", "output": "b"}, None, "a:\nb"),
        ({"input": "a\u00a0", "output": "b"}, None, "a\u00a0b"),
        ({"input": "a", "output": " b"}, None, "a  b"),
        ({"input": "a ", "output": "b"}, " ", "a  b"),
        ({"input": "a", "output": "b"}, "", "ab"),
        ({"input": "a", "output": "b"}, "\n->", "a\n->b"),
        ({"input": "a", "output": "b", "separator": ": "}, "\n", "a: b"),
        ({"prompt": "a", "completion": " b"}, "\n", "a b"),
        ({"input": "", "output": "b"}, "\n", "b"),
        ({"prompt": "", "completion": " b"}, None, " b"),
    ],
    ids=str,
)
def test_what_joins_input_and_output(row: dict[str, str], pools: str | None, text: str) -> None:
    given = parse_examples([row], "decoder", separator=pools)
    (example,) = given
    assert isinstance(example, TextExample)
    assert example.text == text
    assert example.text[example.output_start :] == example.output
    # what is kept is read as it was, whatever the pool says by then
    assert parse_examples(json.loads(json.dumps(given.to_json())), "decoder", separator=" ") == given


def test_kept_rows_are_read_as_they_were() -> None:
    """By a release that put a space behind white space too, or by a pool that does."""
    (kept,) = parse_examples([{"input": "a ", "output": "b"}], "decoder", separator=" ")
    assert kept.to_json() == {"input": "a ", "output": "b"}
    (new,) = parse_examples([{"input": "a ", "output": "b"}], "decoder")
    assert example_digest(kept) != example_digest(new)


@pytest.mark.parametrize("separator", [None, 1, "x" * 17, "\ud800"])
def test_a_separator_that_is_none(separator: Any) -> None:
    with pytest.raises(InvalidExamplesError, match="row 1: 'separator'"):
        parse_examples([{"input": "a", "output": "b", "separator": separator}], "decoder")


def test_chat_form_and_text_parts() -> None:
    parts = [CHAT[0], CHAT[1] | {"content": [{"type": "text", "text": "u"}, {"type": "text", "text": "v"}]}, CHAT[2]]
    assert parse_examples([{"messages": parts}], "decoder").examples == (
        ChatExample((("system", "s"), ("user", "uv"), ("assistant", "a"))),
    )


@pytest.mark.parametrize("kind", ["encoder", "reranker"])
def test_retrieval_form(kind: Kind) -> None:
    row = {"query": "q", "pos": ["p"], "neg": ["n", "m"]}
    assert parse_examples([row], kind).examples == (RetrievalExample("q", ("p",), ("n", "m")),)


def test_negatives_may_be_left_out_or_null_where_other_rows_give_the_contrast() -> None:
    rows = [{"query": "q", "pos": ["p"]}, {"query": "r", "pos": ["s"], "neg": None}]
    assert [example.neg for example in parse_examples(rows, "encoder")] == [(), ()]  # type: ignore[union-attr]


def test_keys_that_data_sets_carry_beside_the_text_are_left_aside() -> None:
    row = {"input": "a", "output": "b", "score": 0.3, "id": 7, "choices": ["b"], "weight": 1, "references": []}
    assert parse_examples([row], "decoder").examples == (TextExample("a", "b"),)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("text", "expected an object"),
        ({}, "has the keys"),
        ({"input": "a"}, "has the keys"),
        ({"input": "a", "output": "b", "extra": 1}, "has the keys"),
        ({"input": "a", "completion": "b"}, "has the keys"),
        ({"query": "q", "pos": ["p"], "neg": ["n"]}, "a decoder pool takes"),
        ({"input": 1, "output": "b"}, "'input' must be a string, got int"),
        ({"input": None, "output": "b"}, "'input' must be a string, got NoneType"),
        ({"input": " \n", "output": "b"}, "'input' is empty"),
        ({"input": "a", "output": ""}, "'output' is empty"),
        ({"input": "a", "output": "\ud800"}, "lone surrogate"),
        ({"messages": []}, "non-empty list"),
        ({"messages": "hello"}, "non-empty list"),
        ({"messages": [CHAT[2]]}, "no message before"),
        ({"messages": CHAT[:2]}, "last message must be the assistant's"),
        ({"messages": [{"role": "function", "content": "x"}, CHAT[2]]}, r"messages\[0\] needs a role"),
        ({"messages": [{"role": ["user"], "content": "x"}, CHAT[2]]}, r"messages\[0\] needs a role"),
        ({"messages": ["x", CHAT[2]]}, r"messages\[0\] needs a role"),
        ({"messages": [{"role": "user"}, CHAT[2]]}, "must be a string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, CHAT[2]]}, "only text content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}, CHAT[2]]}, "must be a string"),
    ],
    ids=str,
)
def test_a_malformed_row_is_named_by_its_number(row: Any, message: str) -> None:
    with pytest.raises(InvalidExamplesError, match=message) as caught:
        parse_examples([{"input": "a", "output": "b"}, row], "decoder")
    assert caught.value.row == 2
    assert str(caught.value).startswith("row 2: ")
    assert caught.value.param == "examples"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input": "a", "output": "b"}, "an? encoder pool takes"),
        ({"query": "q", "pos": []}, "'pos' is empty"),
        ({"query": "q", "pos": "p"}, "'pos' must be a list"),
        ({"query": "q", "pos": {"a": "b"}}, "'pos' must be a list"),
        ({"query": "q", "pos": ["p", 3]}, r"'pos\[1\]' must be a string"),
        ({"query": "q", "pos": ["p"], "neg": ""}, "'neg' must be a list"),
        ({"query": "q", "pos": ["p"], "neg": [""]}, r"'neg\[0\]' is empty"),
        ({"query": "", "pos": ["p"]}, "'query' is empty"),
    ],
    ids=str,
)
def test_a_malformed_retrieval_row(row: Any, message: str) -> None:
    with pytest.raises(InvalidExamplesError, match=message) as caught:
        parse_examples([row], "encoder")
    assert caught.value.row == 1


@pytest.mark.parametrize("rows", [[], (), iter([])])
def test_no_examples(rows: Any) -> None:
    with pytest.raises(InvalidExamplesError, match="there are no examples"):
        parse_examples(rows, "decoder")


@pytest.mark.parametrize("rows", [{"input": "a", "output": "b"}, "text", b"bytes", 3, None])
def test_examples_that_are_no_list(rows: Any) -> None:
    with pytest.raises(InvalidExamplesError, match="must be a list of objects"):
        parse_examples(rows, "decoder")


def test_one_retrieval_example_without_negatives_says_nothing() -> None:
    with pytest.raises(InvalidExamplesError, match="loss 0 for every model"):
        parse_examples([{"query": "q", "pos": ["p"]}], "encoder")


def test_every_example_of_a_reranker_needs_negatives() -> None:
    rows = [{"query": "q", "pos": ["p"], "neg": ["n"]}, {"query": "q", "pos": ["p"]}]
    with pytest.raises(InvalidExamplesError, match="needs negatives") as caught:
        parse_examples(rows, "reranker")
    assert caught.value.row == 2


def numbered(count: int) -> list[dict[str, str]]:
    return [{"input": f"i{n}", "output": f"o{n}"} for n in range(count)]


def test_too_many_examples_are_sampled_by_the_seed_in_their_order() -> None:
    first = parse_examples(numbered(50), "decoder", max_examples=10, seed=1)
    assert len(first) == 10
    assert first.num_given == 50
    places = [int(example.input[1:]) for example in first]  # type: ignore[union-attr]
    assert places == sorted(set(places))
    assert parse_examples(numbered(50), "decoder", max_examples=10, seed=1) == first
    assert parse_examples(numbered(50), "decoder", max_examples=10, seed=2) != first
    assert parse_examples(numbered(10), "decoder", max_examples=10).num_given == 10


def test_a_row_is_checked_even_if_it_would_not_be_sampled() -> None:
    for place in range(4):
        rows: list[Any] = [*numbered(place), {"input": "a"}, *numbered(3 - place)]
        with pytest.raises(InvalidExamplesError) as caught:
            parse_examples(rows, "decoder", max_examples=1)
        assert caught.value.row == place + 1


def test_digests_follow_content_and_order() -> None:
    a, b = parse_examples(numbered(2), "decoder")
    assert example_digest(a) == example_digest(TextExample("i0", "o0")) != example_digest(b)
    assert ExampleSet((a, b), 2).digest == ExampleSet((a, b), 99).digest
    assert ExampleSet((a, b), 2).digest != ExampleSet((b, a), 2).digest
    assert example_digest(TextExample("ab", "c")) != example_digest(TextExample("a", "bc"))


@pytest.mark.parametrize(
    ("kind", "row", "digest"),
    [
        ("decoder", {"input": "a", "output": "b", "weight": 1}, "f245cdedc115600cedd8b474dfb3296469364ba2e62"),
        ("decoder", {"messages": CHAT}, "6e2f7d5377f0508f4740cddb799ebc1c48935c5cb9ea7fd5f735bef8dd986021"),
        ("encoder", {"query": "q", "pos": ["p"], "neg": ["n"]}, "d5d941081954a7922e0e45bef4ad06acff3ad9c168b82956"),
    ],
)
def test_digests_are_those_of_earlier_releases(kind: Kind, row: dict[str, Any], digest: str) -> None:
    """Losses are kept under them in databases that exist."""
    assert example_digest(parse_examples([row], kind).examples[0]).startswith(digest)


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("decoder", {"input": "a", "output": "b"}),
        ("decoder", {"prompt": "a", "completion": "b"}),
        ("decoder", {"input": "a ", "output": "b"}),
        ("decoder", {"input": "a", "output": "b", "separator": "\n"}),
        ("decoder", {"messages": CHAT}),
        ("encoder", {"query": "q", "pos": ["p"], "neg": ["n"]}),
    ],
)
def test_json_parses_back_to_the_same_examples(kind: Kind, row: dict[str, Any]) -> None:
    given = parse_examples([row], kind)
    assert parse_examples(json.loads(json.dumps(given.to_json())), kind) == given


def test_jsonl_skips_blank_lines_and_a_byte_order_mark() -> None:
    assert read_jsonl('\ufeff{"a": 1}\r\n\n  \n{"b": 2}') == [{"a": 1}, {"b": 2}]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_jsonl_is_cut_at_line_feeds_alone(separator: str) -> None:
    rows = [{"input": f"one{separator}two", "output": "three"}]
    assert read_jsonl(json.dumps(rows[0], ensure_ascii=False)) == rows


def test_rows_may_be_one_array() -> None:
    rows = [{"a": 1}, {"b": [2]}]
    for text in (json.dumps(rows), "\ufeff\n " + json.dumps(rows, indent=2), '{"a": 1}\n{"b": [2]}\n'):
        assert read_rows(text) == rows
    for text in ('[{"a": 1}', '[{"a": 1}]\n[{"b": [2]}]', "[" * 100_000):
        with pytest.raises(InvalidExamplesError, match="begins as a JSON array"):
            read_rows(text)


def test_jsonl_shows_how_the_wrong_line_begins() -> None:
    with pytest.raises(InvalidExamplesError, match=r"the line begins with 'input,output'$"):
        read_jsonl("input,output\nis a fig a fruit?,yes")


@pytest.mark.parametrize("line", ["{", "{'a': 1}", "[" * 100_000, "1" * 5000, '{"a": 1} x'])
def test_jsonl_names_the_line_that_is_no_json(line: str) -> None:
    with pytest.raises(InvalidExamplesError, match="not a JSON object") as caught:
        read_jsonl('{"a": 1}\n\n' + line)
    assert caught.value.row == 3
