"""How a folder says that it is called: forms that publishers and trainers write, against transformers' own reading."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from cocktail_serve.checkpoints.generation_files import common_template, read_settings, write_settings
from cocktail_serve.checkpoints.generation_options import read_options
from cocktail_serve.config import PoolConfig
from cocktail_serve.errors import CheckpointError, ConfigError
from cocktail_serve.generation_settings import ChatTemplate, GenerationOptions, GenerationSettings
from tests.models import CHAIN_TOKENS

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 200, "eos_token_id": 2}
END, IM_END, EOM, FOUR = (CHAIN_TOKENS.index(token) for token in ("</s>", "<|im_end|>", "<|eom|>", "four"))
MESSAGES = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"

MakeFolder = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> MakeFolder:
    """A model folder of small files: JSON by name, and a word tokenizer unless it is left out."""

    def make(name: str = "model", *, tokenizer: str | None = "added", **files: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        ids = {token: index for index, token in enumerate(CHAIN_TOKENS)}
        special = [token for token in CHAIN_TOKENS if token.startswith("<")]
        if tokenizer is not None:
            vocab: Any = ids if tokenizer == "added" else [[token, -1.0] for token in CHAIN_TOKENS]
            model = {"type": "WordLevel" if tokenizer == "added" else "Unigram", "vocab": vocab}
            model |= {"unk_token": "<pad>"} if tokenizer == "added" else {"unk_id": 0, "byte_fallback": False}
            flags = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            added = [{"id": ids[t], "content": t, **flags} for t in special] if tokenizer == "added" else []
            whole = {"version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": None}
            whole |= {"post_processor": None, "decoder": None, "truncation": None, "padding": None, "model": model}
            files["tokenizer"] = whole
        for file, value in files.items():
            (folder / f"{file}.json").write_text(json.dumps(value))
        return folder

    return make


def tokenizer_config(**more: Any) -> dict[str, Any]:
    return {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>", **more}


def as_transformers(folder: Path) -> tuple[set[int], dict[str, float]]:
    """End tokens and sampling defaults as vLLM takes them, through transformers."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(folder)
    except OSError:
        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder))
    said = config.to_diff_dict()
    given = said.get("eos_token_id")
    ids = {given} if isinstance(given, int) else set(given or ())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p", "max_new_tokens")
    sampling = {name: said[name] for name in names if said.get(name) is not None}
    return ids | ({tokenizer.eos_token_id} - {None}), sampling


FORMS: dict[str, tuple[dict[str, Any], set[int], dict[str, float]]] = {
    "config alone": ({"config": CONFIG, "tokenizer_config": tokenizer_config()}, {END}, {}),
    # the chat models of Qwen: config.json has the base's end token, generation_config.json both
    "Qwen": (
        {
            "config": CONFIG,
            "tokenizer_config": tokenizer_config(eos_token="<|im_end|>", bos_token=None),
            "generation_config": {
                "eos_token_id": [IM_END, END], "do_sample": True, "repetition_penalty": 1.05, "temperature": 0.7,
                "top_p": 0.8, "top_k": 20,
            },
        },
        {END, IM_END},
        {"repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
    ),
    "Llama 3": (
        {
            "config": CONFIG | {"eos_token_id": [2, 3, 4]},
            "tokenizer_config": tokenizer_config(eos_token="<|im_end|>"),
            "generation_config": {"eos_token_id": [2, 4, 3], "do_sample": True, "temperature": 0.6, "top_p": 0.9},
        },
        {END, IM_END, EOM},
        {"temperature": 0.6, "top_p": 0.9},
    ),
    # a model of texts and images keeps the text model's configuration inside
    "Gemma 3": (
        {
            "config": {
                "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [3, 4],
                "text_config": {"model_type": "gemma3_text", "vocab_size": 200, "eos_token_id": 2},
            },
            "tokenizer_config": tokenizer_config(),
        },
        {END, IM_END, EOM},
        {},
    ),
    "the end inside of text_config": (
        {
            "config": {
                "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"],
                "text_config": {"model_type": "gemma3_text", "vocab_size": 200, "eos_token_id": [4]},
            },
            "tokenizer_config": tokenizer_config(eos_token="<|im_end|>"),
        },
        {IM_END, EOM},
        {},
    ),
    # LLaMA-Factory: the template's stop word becomes a further end token, beside the tokenizer's
    "LLaMA-Factory": (
        {
            "config": CONFIG,
            "tokenizer_config": tokenizer_config(eos_token="<|im_end|>"),
            "generation_config": {"bos_token_id": 1, "eos_token_id": [END, EOM], "max_new_tokens": 2048},
        },
        {END, IM_END, EOM},
        {"max_new_tokens": 2048},
    ),
    "generation_config without an end": (
        {
            "config": CONFIG | {"eos_token_id": 4},
            "tokenizer_config": tokenizer_config(),
            "generation_config": {"eos_token_id": None, "temperature": None, "top_p": 0.95, "do_sample": True},
        },
        {END},
        {"top_p": 0.95},
    ),
    "special_tokens_map before transformers 4.34": (
        {
            "config": CONFIG,
            "tokenizer_config": tokenizer_config(),
            "special_tokens_map": {"eos_token": {"content": "<|im_end|>", "lstrip": False}},
            "generation_config": {"eos_token_id": 2},
        },
        {END, IM_END},
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_is_read_as_transformers_reads_it(make: MakeFolder, form: str) -> None:
    files, stops, sampling = FORMS[form]
    folder = make(**files)
    found = read_settings(folder)
    assert set(found.stop_token_ids) == stops
    assert found.sampling == {"max_tokens" if n == "max_new_tokens" else n: v for n, v in sampling.items()}
    assert as_transformers(folder) == (stops, sampling)


@pytest.mark.parametrize(
    ("files", "end"),
    [
        ({"tokenizer_config": tokenizer_config(eos_token="<|im_end|>")}, (IM_END,)),
        ({"tokenizer_config": tokenizer_config(eos_token={"content": "<|im_end|>"})}, (IM_END,)),
        # the class knows it (GPT-2's does): its file does not say
        ({"tokenizer_config": {"model_max_length": 1024}}, (END,)),
        ({"tokenizer_config": {}, "generation_config": {"eos_token_id": [2, 3]}}, ()),
        ({"tokenizer_config": tokenizer_config(added_tokens_decoder={"9": {"content": "</s>"}})}, (9,)),
        ({"tokenizer_config": tokenizer_config(eos_token="<new>"), "added_tokens": {"<new>": 11}}, (11,)),
        ({"tokenizer_config": tokenizer_config(eos_token="four")}, (FOUR,)),
        ({"tokenizer_config": tokenizer_config(eos_token="four"), "tokenizer": "unigram"}, (FOUR,)),
        ({"tokenizer_config": tokenizer_config(eos_token="nowhere")}, (END,)),
    ],
    ids=str,
)  # fmt: skip
def test_the_end_token_of_the_tokenizer(make: MakeFolder, files: dict[str, Any], end: tuple[int, ...]) -> None:
    found = read_settings(make(**{"config": CONFIG, **files}))
    assert found.end_token_ids == end
    assert set(end) <= set(found.stop_token_ids)


def test_tokens_that_no_model_says_end_nothing(make: MakeFolder) -> None:
    folder = make(config=CONFIG | {"vocab_size": 5}, generation_config={"eos_token_id": [2, 5, 99, -1]})
    assert read_settings(folder).stop_token_ids == (2,)


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"eos_token_id": "2"}, "eos_token_id must be a token id or a list"),
        ({"eos_token_id": [2, None]}, "eos_token_id must be a token id or a list"),
        ({"temperature": "0.7"}, "temperature must be a number"),
        ([], "must hold a JSON object"),
    ],
    ids=str,
)
def test_a_file_that_says_nonsense_is_refused_by_its_name(make: MakeFolder, generation: Any, message: str) -> None:
    folder = make(config=CONFIG, generation_config=generation)
    with pytest.raises(CheckpointError, match=rf"generation_config\.json.*{message}"):
        read_settings(folder)


class TestExperts:
    """What an expert's folder lacks is the base's."""

    @pytest.fixture
    def base(self, make: MakeFolder) -> Path:
        generation = {"eos_token_id": [2, 4], "temperature": 0.6}
        config = tokenizer_config(chat_template=TEMPLATE)
        return make("base", config=CONFIG, tokenizer_config=config, generation_config=generation)

    def test_an_adapter_alone_says_nothing(self, make: MakeFolder, base: Path) -> None:
        adapter = make("adapter", tokenizer=None, adapter_config={"peft_type": "LORA"})
        found, of_base = read_settings(adapter, base), read_settings(base)
        assert (found.end_token_ids, found.stop_token_ids, found.sampling) == ((END,), (END, EOM), {"temperature": 0.6})
        assert (of_base.stop_token_ids, found.chat_template) == (found.stop_token_ids, None)

    def test_an_adapter_brings_its_tokenizers_end(self, make: MakeFolder, base: Path) -> None:
        config = tokenizer_config(eos_token="<|im_end|>", chat_template="{{ messages }}")
        adapter = make("adapter", adapter_config={"peft_type": "LORA"}, tokenizer_config=config)
        found = read_settings(adapter, base)
        assert (found.end_token_ids, found.stop_token_ids) == ((IM_END,), (END, IM_END, EOM))
        assert found.sampling == {"temperature": 0.6}
        assert found.chat_template == ChatTemplate("{{ messages }}")

    def test_a_full_expert_without_generation_config_has_its_configs(self, make: MakeFolder, base: Path) -> None:
        expert = make("expert", tokenizer=None, config=CONFIG | {"eos_token_id": 3})
        found = read_settings(expert, base)
        assert (found.end_token_ids, found.stop_token_ids, found.sampling) == ((END,), (END, IM_END), {})

    def test_a_template_brings_its_own_special_tokens(self, make: MakeFolder, base: Path) -> None:
        """Rendered with the base's tokenizer, as in the engine, it gives what its own tokenizer gives."""
        from transformers import AutoTokenizer

        more = '\n{% if "quo\'te" %}{{ pad_token }}{% endif %}'  # behind a newline that must stay
        more += TEMPLATE
        own = tokenizer_config(eos_token="<|im_end|>", bos_token=None, pad_token="pad\"'\\n√", chat_template=more)
        expert = make("expert", config=CONFIG, tokenizer_config=own)
        template = read_settings(expert, base).chat_template
        assert template is not None
        rendered = AutoTokenizer.from_pretrained(base).apply_chat_template(
            MESSAGES, tokenize=False, chat_template=template.text
        )
        assert rendered == AutoTokenizer.from_pretrained(expert).apply_chat_template(MESSAGES, tokenize=False)
        assert rendered == "\npad\"'\\n√user: one<|im_end|>assistant: two<|im_end|>"

    def test_a_template_that_names_none_is_the_bases_to_the_letter(self, make: MakeFolder, base: Path) -> None:
        own = tokenizer_config(eos_token="<|im_end|>", chat_template="{{ messages }}")
        expert = make("expert", config=CONFIG, tokenizer_config=own)
        assert read_settings(expert, base).chat_template == ChatTemplate("{{ messages }}")


class TestTemplates:
    def test_a_file_goes_before_the_tokenizers_settings(self, make: MakeFolder) -> None:
        folder = make(config=CONFIG, tokenizer_config=tokenizer_config(chat_template="old"))
        assert read_settings(folder).chat_template == ChatTemplate("old")
        (folder / "chat_template.jinja").write_text("new")
        assert read_settings(folder).chat_template == ChatTemplate("new")

    def test_named_templates(self, make: MakeFolder) -> None:
        named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
        folder = make(config=CONFIG, tokenizer_config=tokenizer_config(chat_template=named))
        assert read_settings(folder).chat_template == ChatTemplate("plain", "tools")
        (folder / "chat_template.jinja").write_text("plain too")
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools too")
        assert read_settings(folder).chat_template == ChatTemplate("plain too", "tools too")

    def test_a_processors_template(self, make: MakeFolder) -> None:
        folder = make(config=CONFIG, tokenizer_config=tokenizer_config(), chat_template={"chat_template": "mine"})
        assert read_settings(folder).chat_template == ChatTemplate("mine")

    @pytest.mark.parametrize("given", [5, ["x"], [{"name": "default"}]], ids=str)
    def test_what_is_no_template(self, make: MakeFolder, given: Any) -> None:
        folder = make(config=CONFIG, tokenizer_config=tokenizer_config(chat_template=given))
        with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat_template must be"):
            read_settings(folder)

    def test_a_pool_has_the_bases_or_what_all_experts_share(self) -> None:
        one, other = ChatTemplate("one"), ChatTemplate("other")

        def common(*templates: ChatTemplate | None) -> ChatTemplate | None:
            return common_template([GenerationSettings(chat_template=template) for template in templates])

        assert common(one, other, other) == one
        assert common(None, other, None, other) == other
        assert common(None, one, other) is None
        assert common(None, None) is None


def options_of(args: Mapping[str, Any], base: Path = Path("nowhere")) -> GenerationOptions:
    engine = {"type": "vllm", "args": dict(args)}
    section = {"id": "p", "kind": "decoder", "base": "b", "engine": engine}
    return read_options(PoolConfig.model_validate(section), base)


class TestOptions:
    """Arguments of the engine stand for every model, as they would for vLLM on its folder."""

    def test_a_template_from_a_file_or_as_it_is(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.jinja"
        file.write_text(TEMPLATE)
        for args in ({"chat-template": str(file)}, {"--chat_template": TEMPLATE}):
            assert options_of(args).chat_template == ChatTemplate(TEMPLATE)
        kwargs = options_of({"chat-template": TEMPLATE, "default-chat-template-kwargs": '{"enable_thinking": false}'})
        assert kwargs.chat_template == ChatTemplate(TEMPLATE, defaults={"enable_thinking": False})

    def test_a_template_that_comes_with_vllm(self) -> None:
        pytest.importorskip("vllm")
        template = options_of({"chat-template": "template_chatml.jinja"}).chat_template
        assert template is not None
        assert "<|im_start|>" in template.text

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ({"chat-template": "nowhere/mine.jinja"}, "there is no file nowhere/mine.jinja"),
            ({"chat-template": "{% for %}"}, "line 1 is no Jinja"),
            ({"generation-config": "nowhere"}, "nowhere holds no generation_config.json"),
            ({"default-chat-template-kwargs": "[]"}, "must be a mapping"),
            ({"override-generation-config": "{"}, "override-generation-config"),
        ],
        ids=str,
    )
    def test_what_cannot_be_used(self, args: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            options_of(args)

    def test_tags_of_transformers_are_no_fault(self) -> None:
        text = "{% for m in messages %}{% generation %}{{ m }}{% endgeneration %}{% break %}{% endfor %}"
        assert options_of({"chat-template": text}).chat_template == ChatTemplate(text)

    def test_they_stand_for_every_model(self, make: MakeFolder, tmp_path: Path) -> None:
        own = {"eos_token_id": [2, 4], "temperature": 0.6, "top_p": 0.9}
        folder = make(config=CONFIG, tokenizer_config=tokenizer_config(chat_template="own"), generation_config=own)
        assert read_settings(folder, options=options_of({"generation-config": "auto"})) == read_settings(folder)
        neutral = read_settings(folder, options=options_of({"generation-config": "vllm"}))
        assert (neutral.stop_token_ids, neutral.sampling) == ((2, 4), {})
        overridden = read_settings(folder, options=options_of({"override-generation-config": {"temperature": 0.1}}))
        assert overridden.sampling == {"top_p": 0.9}
        (tmp_path / "shared").mkdir()
        (tmp_path / "shared" / "generation_config.json").write_text('{"eos_token_id": 3, "min_p": 0.1}')
        shared = read_settings(folder, options=options_of({"generation-config": str(tmp_path / "shared")}))
        assert (shared.end_token_ids, shared.stop_token_ids, shared.sampling) == ((2,), (2, 3), {"min_p": 0.1})
        assert read_settings(folder, options=options_of({"chat-template": "{{ x }}"})).chat_template == ChatTemplate(
            "{{ x }}"
        )


class TestMistralsOwnTokenizer:
    """vLLM takes it by itself, and then refuses templates of requests."""

    @pytest.mark.parametrize(
        ("files", "args", "takes"),
        [
            ((), {}, True),
            (("consolidated.safetensors",), {}, True),
            (("tekken.json",), {}, True),
            (("consolidated.safetensors", "tekken.json"), {}, False),
            (("consolidated-00001-of-00002.safetensors", "tokenizer.model.v3"), {"tokenizer_mode": "auto"}, False),
            (("consolidated.safetensors", "tekken.json"), {"tokenizer-mode": "hf"}, True),
            ((), {"tokenizer-mode": "mistral"}, False),
        ],
        ids=str,
    )
    def test_no_template_is_sent_then(
        self, make: MakeFolder, files: tuple[str, ...], args: dict[str, str], *, takes: bool
    ) -> None:
        folder = make(config=CONFIG, tokenizer_config=tokenizer_config(chat_template="own"))
        for name in files:
            (folder / name).touch()
        options = options_of(args, folder)
        assert read_settings(folder, options=options).chat_template == (ChatTemplate("own") if takes else None)
        if (module := pytest.importorskip("vllm.tokenizers.registry")) and not args:
            mode, *_ = module.resolve_tokenizer_args(str(folder))
            assert (mode != "mistral") is takes, "as vLLM itself decides"


class TestWriting:
    def test_what_is_the_bases_stays_byte_for_byte(self, make: MakeFolder) -> None:
        folder = make(config=CONFIG, tokenizer_config=tokenizer_config(chat_template="own"), generation_config={"a": 1})
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        write_settings(folder, read_settings(folder), base=read_settings(folder))
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before

    @pytest.mark.parametrize("has_file", [True, False])
    def test_the_folder_says_what_it_is_told(self, make: MakeFolder, *, has_file: bool) -> None:
        """And transformers takes it, saves it again and asks by the template."""
        from transformers import AutoTokenizer, GenerationConfig

        said = {"bos_token_id": 1, "eos_token_id": 2, "min_p": 0.1, "do_sample": True}
        files = {"generation_config": said} if has_file else {}
        folder = make(
            config=CONFIG | {"bos_token_id": 1}, tokenizer_config=tokenizer_config(chat_template="own"), **files
        )
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "rag.jinja").write_text("documents")
        wanted = GenerationSettings(
            (2, 3), (2, 3), {"temperature": 0.6, "max_tokens": 9}, ChatTemplate("new\n", "new with tools")
        )
        write_settings(folder, wanted, base=read_settings(folder))
        found = read_settings(folder)
        assert (found.stop_token_ids, found.sampling, found.chat_template) == (
            wanted.stop_token_ids,
            wanted.sampling,
            wanted.chat_template,
        )
        config = GenerationConfig.from_pretrained(folder)
        assert (config.eos_token_id, config.bos_token_id, config.min_p) == ([2, 3], 1, None)
        config.save_pretrained(folder / "again")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.get_chat_template() == "new\n"
        assert tokenizer.get_chat_template(tools=[{}]) == "new with tools"

    def test_end_tokens_alone_leave_the_sampling(self, make: MakeFolder) -> None:
        said = {"eos_token_id": 2, "temperature": 0.6, "do_sample": False, "assistant_confidence": 1}
        folder = make(config=CONFIG, tokenizer_config=tokenizer_config(), generation_config=said)
        base = read_settings(folder)
        write_settings(folder, GenerationSettings((2, 3), (2, 3), base.sampling), base=base)
        assert json.loads((folder / "generation_config.json").read_text()) == said | {"eos_token_id": [2, 3]}
