"""Tokenizers are compared by what they do, once loaded as an engine loads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from cocktail_serve.checkpoints import tokenizer
from cocktail_serve.checkpoints.tokenizer import SCORE_TOLERANCE, Difference, FolderTokenizer

CORPUS = ["the quick brown fox jumps over the lazy dog", "what is the capital of france", "0 1 2 3 4 5 6 7 8 9"] * 3


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Meta's and Mistral's first models are on the hub: SentencePiece's rules written as a normalizer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    folder = tmp_path_factory.mktemp("llama")
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    return write(folder, content, tokenizer_class="LlamaTokenizer", add_bos_token=True, add_eos_token=False)


def write(folder: Path, content: dict[str, Any], **settings: Any) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer.json").write_text(json.dumps(content))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special | settings))
    return folder


def rewritten(source: Path, folder: Path, change: Callable[[dict[str, Any]], None], **settings: Any) -> Path:
    shutil.copytree(source, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def differences(base: Path, expert: Path) -> list[Difference]:
    return list(tokenizer.differences(FolderTokenizer(base), FolderTokenizer(expert)))


def unlike(base: Path, expert: Path) -> list[Difference]:
    """What keeps two tokenizers from being one, whichever is the base."""
    found = [[d for d in differences(*pair) if not d.is_harmless] for pair in ((base, expert), (expert, base))]
    assert [d.part for d in found[0]] == [d.part for d in found[1]]
    return found[0]


def test_a_llama_tokenizer_saved_anew_by_transformers_is_the_same(llama: Path, tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "anew")
    shutil.copy(llama / "config.json", tmp_path / "anew")
    before, after = (json.loads((f / "tokenizer.json").read_text()) for f in (llama, tmp_path / "anew"))
    assert before["normalizer"] is not None
    assert after["normalizer"] is None, "transformers writes the rules elsewhere; if not, this test says nothing"
    assert unlike(llama, tmp_path / "anew") == []


def test_the_file_says_one_thing_and_the_class_that_loads_it_another(llama: Path, tmp_path: Path) -> None:
    """`LlamaTokenizer` makes its own pipeline; a plain fast tokenizer has that of the file."""

    def never_prepends(content: dict[str, Any]) -> None:
        content["normalizer"] = None
        content["pre_tokenizer"] = {
            "type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False,
        }  # fmt: skip

    assert unlike(llama, rewritten(llama, tmp_path / "same", never_prepends)) == []
    plain = rewritten(llama, tmp_path / "plain", never_prepends, tokenizer_class="PreTrainedTokenizerFast")
    (found,) = unlike(llama, plain)
    assert found.part == "pre_tokenizer"
    assert "'never'" in found.expert
    assert "cuts 'The quick brown fox" in found.base


@pytest.mark.parametrize(
    "settings",
    [
        {"chat_template": "{{ messages }}", "model_max_length": 7, "padding_side": "left"},
        {"unsloth_fixed": True, "extra_special_tokens": {}, "clean_up_tokenization_spaces": True},
        {"an_unknown_key": 3},
    ],
    ids=str,
)
def test_settings_that_cut_nothing_otherwise(llama: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    assert list(differences(llama, rewritten(llama, tmp_path / "expert", lambda _: None, **settings))) == []


def test_special_tokens_around_a_text_are_the_bases_and_told(llama: Path, tmp_path: Path) -> None:
    def ends(content: dict[str, Any]) -> None:
        template = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
        content["post_processor"] = json.loads(template.__getstate__())

    base = rewritten(llama, tmp_path / "base", lambda _: None, tokenizer_class="PreTrainedTokenizerFast")
    (found,) = differences(base, rewritten(base, tmp_path / "expert", ends))
    assert (found.part, found.is_harmless) == ("special tokens around a text", True)
    assert found.expert.endswith(", 2]")


def test_a_pre_tokenizer_that_cuts_some_digits_otherwise(tmp_path: Path) -> None:
    """Vocabulary and merges are the same; only what may be merged differs."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>"],
    )  # fmt: skip
    tokenizer.train_from_iterator([*CORPUS, "1234567890 " * 20], trainer)
    content = json.loads(tokenizer.to_str())
    base = write(tmp_path / "base", content, tokenizer_class="PreTrainedTokenizerFast")
    byte_level = content["pre_tokenizer"]
    digits = {"type": "Digits", "individual_digits": True}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    expert = write(tmp_path / "expert", content, tokenizer_class="PreTrainedTokenizerFast")
    (found,) = unlike(base, expert)
    assert found.part == "pre_tokenizer"


def test_scores_of_a_unigram_vocabulary_have_a_tolerance(tmp_path: Path) -> None:
    pieces = [["<unk>", 0.0], ["<s>", 0.0], ["</s>", 0.0], ["▁", -2.0], ["a", -2.5], ["▁a", -3.0], ["b", -4.25]]

    def saved(name: str, change: float) -> Path:
        vocab = [[piece, score + change * (index > 2)] for index, (piece, score) in enumerate(pieces)]
        content = json.loads(Tokenizer(models.Unigram([tuple(row) for row in vocab], unk_id=0)).to_str())
        content["pre_tokenizer"] = {
            "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True,
        }  # fmt: skip
        return write(tmp_path / name, content, tokenizer_class="PreTrainedTokenizerFast")

    base = saved("base", 0.0)
    assert unlike(base, saved("float32", SCORE_TOLERANCE / 10)) == []
    assert [found.part for found in unlike(base, saved("trained", SCORE_TOLERANCE * 10))] == ["scores"]
