"""Tokens of examples and their boundary; offline losses against a naive loop over transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from cocktail_serve.errors import ContextLengthError, InvalidExamplesError
from cocktail_serve.examples import ChatExample, ExampleSet, TextExample, parse_examples
from cocktail_serve.generation_settings import ChatTemplate
from cocktail_serve.scoring import decoder
from cocktail_serve.scoring.decoder import TokenizedExample, score_with_transformers, tokenize_examples
from tests.models import CHAT_TEMPLATE, make_decoder, make_decoder_tokenizer

MAX_TOKENS = 255


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_decoder_tokenizer()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_decoder(tmp_path_factory.mktemp("decoder"))


def texts(*pairs: tuple[str, str]) -> ExampleSet:
    return ExampleSet(tuple(TextExample(*pair) for pair in pairs), len(pairs))


def chat(*turns: tuple[str, str]) -> ExampleSet:
    return ExampleSet((ChatExample(turns),), 1)


def tokenize(tokenizer: PreTrainedTokenizerFast, examples: ExampleSet) -> TokenizedExample:
    (tokenized,) = tokenize_examples(tokenizer, examples, max_tokens=MAX_TOKENS)
    return tokenized


def split(tokenizer: PreTrainedTokenizerFast, tokenized: TokenizedExample) -> tuple[str, str]:
    ids, start = tokenized.token_ids, tokenized.output_start
    return tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])


def word_tokenizer(*words: str, **special: Any) -> PreTrainedTokenizerFast:
    """One token per listed word, characters otherwise not known; no special tokens unless given."""
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(["?", *words])}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?", **special)


def test_text_is_joined_by_one_space_and_closed_by_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenized = tokenize(tokenizer, texts(("what is the capital?", "paris")))
    assert split(tokenizer, tokenized) == ("<s>what is the capital?", " paris</s>")
    assert tokenized.token_ids == [*tokenizer("what is the capital? paris").input_ids, tokenizer.eos_token_id]


def test_special_tokens_are_not_doubled(tokenizer: PreTrainedTokenizerFast) -> None:
    with_eos = make_decoder_tokenizer()
    with_eos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    examples = texts(("what is", "paris"))
    assert tokenize(with_eos, examples) == tokenize(tokenizer, examples)
    conversation = chat(("user", "what is"), ("assistant", "paris"))
    assert tokenize(tokenizer, conversation).token_ids.count(tokenizer.bos_token_id) == 1


def test_an_output_without_an_input_is_scored_as_a_whole(
    tokenizer: PreTrainedTokenizerFast, model_folder: Path
) -> None:
    tokenized = tokenize(tokenizer, texts(("", "what is the capital")))
    assert split(tokenizer, tokenized) == ("<s>", "what is the capital</s>")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    ids = torch.tensor([tokenized.token_ids])
    assert score_with_transformers(model, [tokenized]) == pytest.approx([model(input_ids=ids, labels=ids).loss.item()])


def test_without_a_first_token_there_is_nothing_to_predict_it_from() -> None:
    with pytest.raises(InvalidExamplesError, match="row 1: the input is empty, and the pool's tokenizer begins"):
        tokenize(word_tokenizer("a", "b"), texts(("", "a b")))


TOOLS_TEMPLATE = (
    "{{ bos_token }}{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for message in messages %}<|{{ message.role }}{% if message.name %} {{ message.name }}{% endif %}|>"
    "{{ message.content }}{% for call in message.tool_calls or [] %}"
    "<call>{{ call.function.name }}{% for key, value in call.function.arguments.items() %} {{ key }}={{ value }}"
    "{% endfor %}</call>{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "now"}}
CALL = {"type": "function", "function": {"name": "now", "arguments": '{"zone": "UTC"}'}}


def test_tools_names_and_calls_reach_the_template() -> None:
    with_tools = make_decoder_tokenizer()
    with_tools.chat_template = TOOLS_TEMPLATE
    turns: list[dict[str, Any]] = [{"role": "user", "content": "what", "name": "ann"}]
    turns += [{"role": "assistant", "content": None, "tool_calls": [CALL]}]
    row = {"messages": turns, "tools": [TOOL]}
    prompt, answer = split(with_tools, tokenize(with_tools, parse_examples([row], "decoder")))
    assert prompt.startswith("<s><tools>[{")
    assert prompt.endswith("</tools><|user ann|>what</s><|assistant|>")
    assert answer == "<call>now zone=UTC</call></s>"
    row["messages"] = [*turns, {"role": "tool", "content": "noon"}, {"role": "assistant", "content": "it is noon"}]
    prompt, answer = split(with_tools, tokenize(with_tools, parse_examples([row], "decoder")))
    assert prompt.endswith("<|assistant|><call>now zone=UTC</call></s><|tool|>noon</s><|assistant|>")
    assert answer == "it is noon</s>"


def test_a_template_that_does_not_render_calls(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"messages": [{"role": "user", "content": "what"}, {"role": "assistant", "tool_calls": [CALL]}]}
    with pytest.raises(InvalidExamplesError, match="row 1: the answer calls tools, which the pool's chat template"):
        tokenize(tokenizer, parse_examples([row], "decoder"))


def test_a_template_that_fails_on_what_it_does_not_expect() -> None:
    failing = make_decoder_tokenizer()
    failing.chat_template = "{{ tools | length + messages[0].content }}"
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": [TOOL]}
    with pytest.raises(InvalidExamplesError, match="row 1: the chat template refuses these messages"):
        tokenize(failing, parse_examples([row], "decoder"))


def test_a_token_merged_across_the_boundary_is_output() -> None:
    merging = Tokenizer(models.BPE({"a": 0, " ": 1, "b": 2, "a ": 3, "a b": 4, "c": 5}, [("a", " "), ("a ", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merging, eos_token="c")
    tokenized = tokenize(tokenizer, texts(("ca", "bb")))
    assert tokenizer.convert_ids_to_tokens(tokenized.token_ids) == ["c", "a b", "b", "c"]
    assert tokenized.output_start == 1


def test_a_tokenizer_without_special_tokens_scores_from_the_second_token() -> None:
    tokenizer = word_tokenizer("one", "two")
    tokenized = tokenize(tokenizer, texts(("one", "two one")))
    assert tokenized == TokenizedExample([1, 2, 1], 1)


def test_without_anything_before_it_the_first_token_is_not_scored() -> None:
    merging = Tokenizer(models.BPE({"a": 0, " ": 1, "b": 2, "a ": 3, "a b": 4}, [("a", " "), ("a ", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merging)
    assert tokenize(tokenizer, texts(("a", "bb"))) == TokenizedExample([4, 2], 1)
    with pytest.raises(InvalidExamplesError, match="row 1: input and output are one token"):
        tokenize(tokenizer, texts(("a", "b")))


@pytest.mark.parametrize("output", ["\u200b", "\u200b\u200b "])
def test_an_output_of_no_tokens_is_refused(output: str) -> None:
    tokenizer = word_tokenizer("one", eos_token="</s>")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    with pytest.raises(InvalidExamplesError, match="row 2: the output tokenises to nothing") as caught:
        tokenize_examples(tokenizer, texts(("one", "one"), ("one", output)), max_tokens=MAX_TOKENS)
    assert caught.value.row == 2


def test_an_example_over_the_limit_names_its_row(tokenizer: PreTrainedTokenizerFast) -> None:
    examples = texts(("a", "b"), ("a", "b" * 50))
    length = len(tokenize_examples(tokenizer, examples, max_tokens=MAX_TOKENS)[1].token_ids)
    assert len(tokenize_examples(tokenizer, examples, max_tokens=length)) == 2
    with pytest.raises(ContextLengthError, match=f"row 2.*{length} tokens.*at most {length - 1}") as caught:
        tokenize_examples(tokenizer, examples, max_tokens=length - 1)
    assert caught.value.param == "examples"


def test_a_row_of_a_sample_is_said_to_be_one(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"input": "a", "output": "b" * 50} for _ in range(5)]
    with pytest.raises(ContextLengthError, match="of the 2 sampled"):
        tokenize_examples(tokenizer, parse_examples(rows, "decoder", max_examples=2), max_tokens=10)


def test_the_last_assistant_turn_is_the_output(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = (("system", "answer"), ("user", "what"), ("assistant", "paris"), ("user", "is it"), ("assistant", "a joy"))
    before, output = split(tokenizer, tokenize(tokenizer, chat(*turns)))
    assert before.endswith("is it</s><|assistant|>")
    assert output == "a joy</s>"


def test_a_generation_prompt_that_opens_a_thought_is_not_output() -> None:
    tokenizer = make_decoder_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}")
    before, output = split(tokenizer, tokenize(tokenizer, chat(("user", "what"), ("assistant", "paris"))))
    assert before.endswith("<|assistant|>")
    assert output == "paris</s>"


def test_messages_need_a_chat_template() -> None:
    tokenizer = make_decoder_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(InvalidExamplesError, match="row 1: the pool's base has no chat template"):
        tokenize(tokenizer, chat(("user", "what"), ("assistant", "paris")))


def test_a_template_that_refuses_a_role_is_the_examples_fault() -> None:
    tokenizer = make_decoder_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + CHAT_TEMPLATE
    )
    with pytest.raises(InvalidExamplesError, match=r"row 1: .*System role not supported"):
        tokenize(tokenizer, chat(("system", "x"), ("user", "what"), ("assistant", "paris")))


def test_retrieval_examples_have_no_output(tokenizer: PreTrainedTokenizerFast) -> None:
    examples = parse_examples([{"query": "a", "pos": ["b"], "neg": ["c"]}], "encoder")
    with pytest.raises(InvalidExamplesError, match="row 1"):
        tokenize(tokenizer, examples)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    pair=st.tuples(
        st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=20),
        st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=20),
    )
)
def test_input_and_output_are_split_where_they_meet(pair: tuple[str, str]) -> None:
    tokenizer = _SHARED
    tokenized = tokenize(tokenizer, texts(pair))
    before, output = split(tokenizer, tokenized)
    assert before + output == f"<s>{pair[0]} {pair[1]}</s>"
    # merged tokens belong to the output, so the input may be cut short, by less than one token
    assert f"<s>{pair[0]}".startswith(before)
    first = tokenizer.decode([tokenized.token_ids[tokenized.output_start]])
    assert len(f"<s>{pair[0]}") < len(before + first)


_SHARED = make_decoder_tokenizer()

ROWS = [
    ("what is the capital of france", "paris"),
    ("my card was stolen", "please open a new account at the bank"),
    ("the film was", "a joy " * 20),
    ("q", "a"),
    ("positive negative neutral " * 10, "positive"),
]


def naive_loss(model: Any, example: TokenizedExample) -> float:
    """One example at a time, unpadded, by the loss that transformers computes itself."""
    input_ids = torch.tensor([example.token_ids])
    labels = input_ids.clone()
    labels[:, : example.output_start] = -100
    with torch.no_grad():
        loss: float = model(input_ids=input_ids, labels=labels).loss.item()
    return loss


@pytest.mark.parametrize("batch_tokens", [1, 200, 2048])
def test_losses_equal_a_naive_loop(
    tokenizer: PreTrainedTokenizerFast, model_folder: Path, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "MAX_BATCH_TOKENS", batch_tokens)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    tokenized = tokenize_examples(tokenizer, texts(*ROWS), max_tokens=MAX_TOKENS)
    losses = score_with_transformers(model, tokenized)
    assert losses == pytest.approx([naive_loss(model, example) for example in tokenized], rel=1e-6, abs=1e-5)
    assert all(loss > 0.01 for loss in losses)


def test_a_model_without_a_pad_token_can_be_scored(tokenizer: PreTrainedTokenizerFast, model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    model.config.pad_token_id = None
    bare = make_decoder_tokenizer()
    bare.pad_token = None
    tokenized = tokenize_examples(bare, texts(*ROWS), max_tokens=MAX_TOKENS)
    assert score_with_transformers(model, tokenized) == pytest.approx(
        [naive_loss(model, example) for example in tokenized], rel=1e-6, abs=1e-5
    )


def test_log_probabilities_of_a_bfloat16_model_are_taken_in_float32(
    tokenizer: PreTrainedTokenizerFast, model_folder: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).eval()
    tokenized = tokenize_examples(tokenizer, texts(ROWS[0]), max_tokens=MAX_TOKENS)
    (loss,) = score_with_transformers(model, tokenized)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokenized[0].token_ids])).logits[0].double()
    start, targets = tokenized[0].output_start, torch.tensor(tokenized[0].token_ids)
    exact = torch.nn.functional.cross_entropy(logits[start - 1 : -1], targets[start:]).item()
    # bfloat16 log-probabilities would be off by 1e-2
    assert loss == pytest.approx(exact, rel=1e-6, abs=1e-5)


SPACED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""A template whose prompt ends in a space, which tokenizers would merge with the answer's first letters."""


def metaspace_tokenizer(prepend_scheme: str) -> PreTrainedTokenizerFast:
    """As sentencepiece's: spaces belong to the words behind them, and one is put before a text."""
    words = [
        "<unk>",
        "</s>",
        "\u2581",
        "\u2581user:",
        "\u2581what",
        "\u2581assistant:",
        "\u2581paris",
        "paris",
        "\u2581a",
    ]
    inner = Tokenizer(models.Unigram([(word, -float(len(words) - len(word))) for word in words], unk_id=0))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    inner.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>", chat_template=SPACED)


def test_messages_are_the_tokens_that_a_served_model_reads_and_writes() -> None:
    byte_level = make_decoder_tokenizer()
    byte_level.chat_template = SPACED
    turns = (("user", "what"), ("assistant", "paris"))
    for tokenizer in (byte_level, metaspace_tokenizer("always"), metaspace_tokenizer("first")):
        tokenized = tokenize(tokenizer, chat(*turns))
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "what"}], tokenize=False, add_generation_prompt=True
        )
        assert prompt.endswith(": ")
        read, written = tokenized.token_ids[: tokenized.output_start], tokenized.token_ids[tokenized.output_start :]
        assert read == tokenizer(prompt, add_special_tokens=False).input_ids
        assert written[-1] == tokenizer.eos_token_id
        first = tokenizer.convert_ids_to_tokens(written)[0]
        assert "paris".startswith(first), "no space before it: that is in the prompt"
        # and together they are another text than the two cut at once
        whole = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns], tokenize=False
        )
        assert tokenized.token_ids != tokenizer(whole, add_special_tokens=False).input_ids


def test_an_answer_that_begins_with_a_line_break_is_cut_apart_too() -> None:
    tokenizer = make_decoder_tokenizer()
    tokenizer.chat_template = SPACED
    tokenized = tokenize(tokenizer, chat(("user", "what"), ("assistant", "\n\nparis")))
    before, output = split(tokenizer, tokenized)
    assert (before.endswith("assistant: "), output) == (True, "\n\nparis</s>")


def test_a_prompt_and_its_completion_are_joined_as_they_are(tokenizer: PreTrainedTokenizerFast) -> None:
    for row, text in (
        ({"prompt": "what is", "completion": " paris"}, "what is paris"),
        ({"prompt": "what is\n", "completion": "paris"}, "what is\nparis"),
        ({"input": "what is\n", "output": "paris"}, "what is\nparis"),
        ({"input": "what is ", "output": "paris"}, "what is paris"),
    ):
        tokenized = tokenize(tokenizer, parse_examples([row], "decoder"))
        prompt = next(iter(row.values()))
        assert tokenizer.decode(tokenized.token_ids) == f"<s>{text}</s>"
        assert tokenized.token_ids[: tokenized.output_start] == tokenizer(prompt).input_ids, "as it is served"


def test_a_prompt_that_ends_in_a_space_is_read_as_it_is_served() -> None:
    """And not merged with the completion's first word, which is another text to the model than what it is asked."""
    merging = Tokenizer(
        models.BPE({"<s>": 0, "a": 1, " ": 2, "b": 3, " b": 4, "ab": 5, "c": 6}, [(" ", "b"), ("a", "b")])
    )
    merging.post_processor = processors.TemplateProcessing(single="<s> $A c", special_tokens=[("<s>", 0), ("c", 6)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merging, bos_token="<s>", eos_token="c")
    for row, ids, start in (
        ({"input": "a", "output": "b"}, [0, 1, 4, 6], 2),
        ({"prompt": "a ", "completion": "b"}, [0, 1, 2, 3, 6], 3),
        ({"input": "a ", "output": "b"}, [0, 1, 2, 3, 6], 3),
        ({"prompt": "a", "completion": " b"}, [0, 1, 4, 6], 2),
        ({"prompt": "a", "completion": "b"}, [0, 1, 3, 6], 2),
    ):
        assert tokenize(tokenizer, parse_examples([row], "decoder")) == TokenizedExample(ids, start)


def test_an_output_of_which_only_the_separator_has_tokens_is_refused() -> None:
    tokenizer = word_tokenizer("one", "->", eos_token="</s>")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    examples = ExampleSet((TextExample("one", "\u200b", " -> "),), 1)
    with pytest.raises(InvalidExamplesError, match="row 1: the output tokenises to nothing"):
        tokenize(tokenizer, examples)


def test_nothing_to_score(model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    assert score_with_transformers(model, []) == []


def test_messages_go_through_the_pools_template_where_it_is_told(tokenizer: PreTrainedTokenizerFast) -> None:
    """With its defaults, and with special tokens of its own; the tokenizer's own template is none of its business."""
    text = (
        '{% set eos_token = "<end>" %}\n{% for m in messages %}{{ m["role"] }}: {{ m["content"] }}{{ eos_token }}'
        "{% if not thinks and m['role'] == 'user' %}!{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    template = ChatTemplate(text, tool_use="for tools", defaults={"thinks": False, "add_generation_prompt": False})
    examples = chat(("user", "what"), ("assistant", "paris"))
    (example,) = tokenize_examples(tokenizer, examples, max_tokens=MAX_TOKENS, chat_template=template)
    # the space before the answer is not merged with its first letters: where it is served, it is the prompt's
    assert split(tokenizer, example) == ("user: what<end>!assistant: ", "paris<end>")
