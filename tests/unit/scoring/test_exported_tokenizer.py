"""Tokenizers taken out of transformers give what it gives: for every family of the zoo, and templates of every kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer

from cocktail_serve.errors import ConfigError
from cocktail_serve.examples import ExampleSet, TextExample, parse_examples
from cocktail_serve.generation_settings import ChatTemplate
from cocktail_serve.scoring import exported_tokenizer
from cocktail_serve.scoring.decoder import tokenize_examples
from cocktail_serve.scoring.exported_tokenizer import ExportedTokenizer, export_tokenizer
from tests.models import make_decoder_tokenizer
from tests.unit.scoring.chat_templates import REFUSING, TEMPLATES
from tests.zoo.specimens import SPECIMENS, Specimen

TEXTS = (
    "what is the capital of france",
    " a  space\tbefore, and two\nlines\r\n",
    "Ünïcödé ﬁ e\u0301 你好 \U0001f469\u200d\U0001f467 ½",
    "<s> </s> <|endoftext|> [INST] <bos> [CLS]",
    "0123456789 it's",
    "",
)

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "be <brief> & kind"},
    {"role": "user", "content": " what is the capital?\n"},
    {"role": "assistant", "content": "paris"},
    {"role": "user", "content": "and élan"},
    {"role": "assistant", "content": ""},
]
CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "what time is it"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "now", "arguments": {"zone": "<UTC>", "at": [1]}}}],
    },
    {"role": "tool", "name": "now", "content": "noon"},
    {"role": "assistant", "content": "it is noon"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "now",
            "description": 'the "time" <now> é',
            "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}, "required": ["zone"]},
        },
    }
]


def decoders() -> list[Any]:
    return [pytest.param(each, id=each.name) for each in SPECIMENS if each.kind == "decoder"]


def published(folder: Path, specimen: Specimen) -> Path:
    """The files of the specimen's tokenizer, as its publisher has them."""
    folder.mkdir(parents=True, exist_ok=True)
    specimen.tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": specimen.model_type}))
    return folder


def outcome(work: Callable[[], Any]) -> Any:
    """What it returns, or the kind of error that it ends in."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001  of whatever kind
        return type(error), str(error)


def check_same(exported: ExportedTokenizer, original: Any) -> None:
    assert exported.eos_token_id == original.eos_token_id
    assert exported.chat_template == original.chat_template
    for text in TEXTS:
        for add_special_tokens in (True, False):
            options = {"return_offsets_mapping": True, "truncation": False, "verbose": False}
            mine = exported(text, add_special_tokens=add_special_tokens, **options)
            theirs = original(text, add_special_tokens=add_special_tokens, **options)
            assert mine["input_ids"] == theirs["input_ids"]
            assert mine["offset_mapping"] == [tuple(pair) for pair in theirs["offset_mapping"]]


@pytest.mark.parametrize("is_saved_anew", [False, True], ids=["published", "saved-anew"])
@pytest.mark.parametrize("specimen", decoders())
def test_a_family(tmp_path: Path, specimen: Specimen, is_saved_anew: bool) -> None:
    folder = published(tmp_path / "published", specimen)
    original = AutoTokenizer.from_pretrained(folder)
    if is_saved_anew:
        original.save_pretrained(tmp_path / "saved")
        (tmp_path / "saved" / "config.json").write_text((folder / "config.json").read_text())
        folder = tmp_path / "saved"
        original = AutoTokenizer.from_pretrained(folder)
    exported = ExportedTokenizer(export_tokenizer(folder))
    assert not exported.needs_library
    check_same(exported, original)
    examples = ExampleSet((TextExample("what is the capital?", "paris"), TextExample("a ", " b")), 2)
    assert tokenize_examples(exported, examples, max_tokens=99) == tokenize_examples(original, examples, max_tokens=99)


@pytest.mark.parametrize(
    "settings",
    [
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": False},
        {"legacy": True},
        {"add_prefix_space": True},
        {"split_special_tokens": True},
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"bos_token": "<unk>", "eos_token": {"content": "<s>", "lstrip": True, "__type": "AddedToken"}},
        {"model_max_length": 8, "truncation_side": "left", "padding_side": "left"},
    ],
    ids="-".join,
)
@pytest.mark.parametrize("name", ["llama-2", "qwen-2.5", "gpt-2", "gemma-2"])
def test_settings_that_change_what_is_built(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    """transformers builds pipelines from these: the file says another thing than what comes out."""
    (specimen,) = (each for each in SPECIMENS if each.name == name)
    folder = published(tmp_path, specimen)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    original = outcome(lambda: AutoTokenizer.from_pretrained(folder))
    if isinstance(original, tuple):
        with pytest.raises(ConfigError):
            export_tokenizer(folder)
        return
    exported = ExportedTokenizer(export_tokenizer(folder))
    assert not exported.needs_library
    check_same(exported, original)


@pytest.fixture(scope="module", params=TEMPLATES)
def rendering(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A tokenizer with a template, exported and as transformers loads it."""
    folder = tmp_path_factory.mktemp("rendering")
    made = make_decoder_tokenizer()
    made.chat_template = TEMPLATES[request.param]
    made.save_pretrained(folder)
    return ExportedTokenizer(export_tokenizer(folder)), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no-tools", "tools"])
@pytest.mark.parametrize("is_prompted", [False, True], ids=["closed", "prompted"])
@pytest.mark.parametrize(
    "variables",
    [{}, {"enable_thinking": False, "date_string": "26 Jul", "bos_token": "<other>"}, {"documents": [{"text": "a"}]}],
    ids=["plain", "variables", "documents"],
)
def test_a_template_renders_as_in_transformers(
    rendering: tuple[Any, Any], tools: Any, is_prompted: bool, variables: dict[str, Any]
) -> None:
    exported, original = rendering
    options = {"tools": tools, "tokenize": False, "add_generation_prompt": is_prompted, **variables}
    said = []
    for messages in (MESSAGES, MESSAGES[1:], MESSAGES[1:3], CALLS, [MESSAGES[1], *MESSAGES[1:3]], []):
        mine, theirs = (
            outcome(lambda each=each, messages=messages: each.apply_chat_template(messages, **options))
            for each in (exported, original)
        )
        # an empty conversation is refused in words of our own
        assert mine == theirs if messages else (mine[0], theirs[0]) == (ValueError, ValueError)
        said.append(mine)
    assert any(isinstance(each, str) for each in said) == (exported.chat_template not in REFUSING)


def test_the_template_of_the_pool_counts() -> None:
    """Not the tokenizer's own; and the operator's variables go before its special tokens."""
    original = make_decoder_tokenizer()
    template = ChatTemplate(
        "{{ bos_token }}{{ mood }}{% for m in messages %} {{ m.content }}{% endfor %}", defaults={"mood": "x"}
    )
    examples = parse_examples([{"messages": MESSAGES[1:3]}], "decoder")
    with TemporaryDirectory() as folder:
        original.save_pretrained(folder)
        exported = ExportedTokenizer(export_tokenizer(Path(folder)))
    mine, theirs = (
        tokenize_examples(each, examples, max_tokens=99, chat_template=template) for each in (exported, original)
    )
    assert mine == theirs


def test_what_is_not_what_was_written(tmp_path: Path) -> None:
    make_decoder_tokenizer().save_pretrained(tmp_path)
    content = export_tokenizer(tmp_path)
    place = content.index(b'"vocab"') + 12
    for spoilt in (b"", b"{}", content[:-1], content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]):
        with pytest.raises(ValueError, match=r"not an exported tokenizer|Expecting value"):
            ExportedTokenizer(spoilt)


def test_a_class_with_a_way_of_its_own_is_left_to_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_decoder_tokenizer()
    made.save_pretrained(tmp_path)

    class Shouting(type(made)):  # type: ignore[misc]
        def _encode_plus(self, text: Any, **options: Any) -> Any:
            return super()._encode_plus(text.upper(), **options)

    monkeypatch.setattr(exported_tokenizer, "load_fast_tokenizer", Shouting.from_pretrained)
    exported = ExportedTokenizer(export_tokenizer(tmp_path))
    assert exported.needs_library == "Shouting has a way of its own (_encode_plus)"


def test_a_pipeline_that_is_not_all_is_found_by_trying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_decoder_tokenizer()
    made.save_pretrained(tmp_path)
    normalizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    normalizer.normalizer = normalizers.Lowercase()
    pipeline = normalizer.to_str()

    class Other:
        """A backend that writes down another pipeline than it runs."""

        def __init__(self, backend: Tokenizer) -> None:
            self._backend = backend

        def to_str(self) -> str:
            return pipeline

        def __getattr__(self, name: str) -> Any:
            return getattr(self._backend, name)

    monkeypatch.setattr(type(made), "backend_tokenizer", property(lambda self: Other(self._tokenizer)))
    exported = ExportedTokenizer(export_tokenizer(tmp_path))
    assert exported.needs_library.startswith("it cuts 'The quick brown fox")
