"""Tokenizers as publishers ship them: the same pipelines, with vocabularies of a few hundred tokens.

Each maker writes the files of one publisher's folder, by hand where a release of transformers would write others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.models import make_encoder_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CORPUS = (
    "the quick brown fox jumps over the lazy dog",
    "what is the capital of france the capital of france is paris",
    "my card was stolen please open a new account at the bank",
    "positive negative neutral the film was a joy and the film was a bore",
    "user assistant system question answer input output 0123456789 20 30 100",
)

VOCAB_SIZE = 384
"""At most; every tokenizer here is smaller. Divisible by 64, as engines pad."""

WriteTokenizer = Callable[[Path], None]

_GPT4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_PATTERN = _GPT4_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")

_CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def llama_2(folder: Path) -> None:
    """Byte fallback, spaces as U+2581 by a normalizer that also prepends one; no pre-tokenizer."""
    _write(
        folder,
        _sentencepiece_bpe(["<unk>", "<s>", "</s>"], prepend=True, first=["<s>"]),
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False, "add_bos_token": True},
        tokenizer_class="LlamaTokenizer",
        chat=True,
    )


def mistral(folder: Path) -> None:
    """Llama 2's pipeline with tokens of instructions; for its own engine, the same as SentencePiece's file."""
    special = ["<unk>", "<s>", "</s>"]
    control = [
        "[INST]",
        "[/INST]",
        "[TOOL_CALLS]",
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
    ]
    tokenizer = _sentencepiece_bpe([*special, *control], prepend=True, first=["<s>"])
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False, "add_bos_token": True}
    _write(folder, tokenizer, settings, tokenizer_class="LlamaTokenizer", chat=True)
    (folder / "tokenizer.model.v3").write_bytes(_sentencepiece_file(tokenizer, control))


def phi_3(folder: Path) -> None:
    """As Llama 2, with special tokens of its own behind the vocabulary that swallow the spaces after them."""
    tokenizer = _sentencepiece_bpe(["<unk>", "<s>", "</s>"], prepend=True, first=["<s>"], num_added=3)
    from tokenizers import AddedToken

    tokenizer.add_special_tokens([AddedToken(t, rstrip=True) for t in ("<|endoftext|>", "<|assistant|>", "<|end|>")])
    special = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>", "pad_token": "<|endoftext|>"}
    _write(folder, tokenizer, {**special, "legacy": False}, tokenizer_class="LlamaTokenizer", chat=True)


def gemma(folder: Path) -> None:
    """Byte fallback, spaces as U+2581 without a first one, the specials in front."""
    tokenizer = _sentencepiece_bpe(_GEMMA_FIRST, prepend=False, first=["<bos>"])
    _write(folder, tokenizer, _GEMMA_SPECIAL, tokenizer_class="GemmaTokenizer", chat=True)


def embedding_gemma(folder: Path) -> None:
    """As Gemma, closed by EOS."""
    tokenizer = _sentencepiece_bpe(_GEMMA_FIRST, prepend=False, first=["<bos>"], last=["<eos>"])
    settings = {**_GEMMA_SPECIAL, "add_eos_token": True, "padding_side": "right"}
    _write(folder, tokenizer, settings, tokenizer_class="GemmaTokenizer")


def llama_3(folder: Path) -> None:
    """tiktoken's: whole words looked up before merging, split by a pattern, the specials behind the vocabulary."""
    tokenizer = _byte_level(pattern=_GPT4_PATTERN, ignore_merges=True)
    _add(tokenizer, "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
    _surround(tokenizer, first=["<|begin_of_text|>"])
    settings = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    _write(folder, tokenizer, settings, tokenizer_class="PreTrainedTokenizerFast")


def llama_3_padded(folder: Path) -> None:
    """As Llama 3, with the pad token that a classifier needs."""
    llama_3(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": "<|eot_id|>"}, indent=2))


def qwen(folder: Path) -> None:
    """Byte-level, NFC, no BOS; vocab.json and merges.txt beside tokenizer.json."""
    _write(folder, _qwen(), _QWEN_SPECIAL, tokenizer_class="Qwen2Tokenizer", legacy=True, chat=True)


def qwen_embedding(folder: Path) -> None:
    """As Qwen, closed by `<|endoftext|>` and padded on the left."""
    tokenizer = _qwen()
    _surround(tokenizer, last=["<|endoftext|>"])
    settings = {**_QWEN_SPECIAL, "padding_side": "left"}
    _write(folder, tokenizer, settings, tokenizer_class="Qwen2Tokenizer", legacy=True, chat=True)


def gpt_2(folder: Path) -> None:
    """Byte-level with GPT-2's own pattern; one special token, behind the vocabulary, for everything."""
    tokenizer = _byte_level()
    _add(tokenizer, "<|endoftext|>")
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    _write(folder, tokenizer, {**special, "add_prefix_space": False}, tokenizer_class="GPT2Tokenizer", legacy=True)


def gpt_neox(folder: Path) -> None:
    """As GPT-2, under the name of its successor, with the special token in front."""
    tokenizer = _byte_level(["<|endoftext|>", "<|padding|>"])
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    _write(folder, tokenizer, {**special, "add_prefix_space": False}, tokenizer_class="GPTNeoXTokenizer")


def generic_byte_level(folder: Path) -> None:
    """A byte-level pipeline that transformers runs as `tokenizer.json` says."""
    tokenizer = _byte_level(["<|endoftext|>", "<|padding|>"])
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|padding|>"}
    _write(folder, tokenizer, special, tokenizer_class="PreTrainedTokenizerFast")


def opt(folder: Path) -> None:
    """vocab.json and merges.txt alone: there is no tokenizer.json. `</s>` goes before each text."""
    tokenizer = _byte_level(["<s>", "<pad>", "</s>", "<unk>"])
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    settings = {**special, "add_bos_token": True, "add_prefix_space": False, "errors": "replace"}
    _write(folder, tokenizer, settings, tokenizer_class="GPT2Tokenizer", legacy=True)
    (folder / "tokenizer.json").unlink()


def bert(folder: Path) -> None:
    """WordPiece, lower-cased, vocab.txt beside tokenizer.json."""
    _word_piece(folder, "BertTokenizer")


def distilbert(folder: Path) -> None:
    """BERT's, without token types."""
    _word_piece(folder, "DistilBertTokenizer", model_input_names=["input_ids", "attention_mask"])


def electra(folder: Path) -> None:
    """BERT's."""
    _word_piece(folder, "ElectraTokenizer")


def mpnet(folder: Path) -> None:
    """BERT's pieces between RoBERTa's special tokens, whose order of ids is its own."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    names = {"[PAD]": "<pad>", "[CLS]": "<s>", "[SEP]": "</s>", "[MASK]": "<mask>"}
    pieces = sorted(_bert_vocab().items(), key=lambda item: item[1])
    ordered = ["<s>", "<pad>", "</s>", *(names.get(piece, piece) for piece, _ in pieces)]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(ordered))}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", vocab["</s>"]), ("<s>", vocab["<s>"]), trim_offsets=True, add_prefix_space=False
    )
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "[UNK]", "<mask>"])
    settings = {**_ROBERTA_SPECIAL, "unk_token": "[UNK]", "do_lower_case": True, "model_max_length": 128}
    _write(folder, tokenizer, settings, tokenizer_class="MPNetTokenizer")
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in vocab))


def roberta(folder: Path) -> None:
    """GPT-2's bytes between `<s>` and `</s>`; vocab.json and merges.txt beside tokenizer.json."""
    from tokenizers import processors

    tokenizer = _byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    ids = tokenizer.get_vocab()
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", ids["</s>"]), ("<s>", ids["<s>"]), trim_offsets=True, add_prefix_space=False
    )
    settings = {**_ROBERTA_SPECIAL, "unk_token": "<unk>", "model_max_length": 128, "add_prefix_space": False}
    _write(folder, tokenizer, settings, tokenizer_class="RobertaTokenizer", legacy=True)


def modernbert(folder: Path) -> None:
    """Byte-level bytes between BERT's special tokens, behind the vocabulary."""
    tokenizer = _byte_level()
    _add(tokenizer, "[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")
    _surround(tokenizer, first=["[CLS]"], last=["[SEP]"])
    settings = {**_BERT_SPECIAL, "model_max_length": 128, "model_input_names": ["input_ids", "attention_mask"]}
    _write(folder, tokenizer, settings, tokenizer_class="PreTrainedTokenizerFast")


def xlm_roberta(folder: Path) -> None:
    """SentencePiece Unigram between `<s>` and `</s>`."""
    tokenizer = _unigram(["<s>", "<pad>", "</s>", "<unk>"])
    _split_at_spaces(tokenizer)
    _add(tokenizer, "<mask>")
    _surround(tokenizer, first=["<s>"], last=["</s>"], between=["</s>", "</s>"])
    settings = {**_ROBERTA_SPECIAL, "unk_token": "<unk>", "model_max_length": 128}
    _write(folder, tokenizer, settings, tokenizer_class="XLMRobertaTokenizer")


def deberta_v2(folder: Path) -> None:
    """SentencePiece Unigram between BERT's special tokens."""
    from tokenizers import Regex, normalizers

    tokenizer = _unigram(["[PAD]", "[CLS]", "[SEP]", "[UNK]"], unk="[UNK]")
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Precompiled(_nmt_nfkc()), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    _add(tokenizer, "[MASK]")
    _surround(tokenizer, first=["[CLS]"], last=["[SEP]"], between=["[SEP]"])
    settings = {**_BERT_SPECIAL, "model_max_length": 128, "do_lower_case": False}
    _write(folder, tokenizer, settings, tokenizer_class="DebertaV2Tokenizer")


def t5(folder: Path) -> None:
    """SentencePiece Unigram closed by `</s>`; no BOS."""
    tokenizer = _unigram(["<pad>", "</s>", "<unk>"])
    _split_at_spaces(tokenizer)
    _surround(tokenizer, last=["</s>"])
    settings = {
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "extra_ids": 0,
        "model_max_length": 128,
    }
    _write(folder, tokenizer, settings, tokenizer_class="T5Tokenizer")


_GEMMA_FIRST = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
_GEMMA_SPECIAL = {
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "add_bos_token": True,
}
_QWEN_SPECIAL = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}
_ROBERTA_SPECIAL = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "cls_token": "<s>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
_BERT_SPECIAL = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}


def _qwen() -> Tokenizer:
    from tokenizers import normalizers

    tokenizer = _byte_level(pattern=_QWEN_PATTERN)
    tokenizer.normalizer = normalizers.NFC()
    _add(tokenizer, "<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return tokenizer


def _byte_level(special: Sequence[str] = (), *, pattern: str | None = None, ignore_merges: bool = False) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=360,
            special_tokens=list(special),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return tokenizer


def _sentencepiece_bpe(
    special: Sequence[str],
    *,
    prepend: bool,
    first: Sequence[str] = (),
    last: Sequence[str] = (),
    num_added: int = 0,
) -> Tokenizer:
    """Letters and merges of a trained BPE behind the specials and 256 bytes, in the order SentencePiece gives.

    Args:
        num_added: tokens that will be added; the vocabulary is filled up to what is left for it.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if prepend else "never")
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=100, show_progress=False))
    content = json.loads(trained.to_str())["model"]
    pieces = [
        *special,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *sorted(content["vocab"], key=content["vocab"].get),
    ]
    # no id without a token: vLLM's server ends on such an id where spaces are pieces (0.32)
    pieces += [f"<unused{number}>" for number in range(VOCAB_SIZE - num_added - len(pieces))]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [tuple(merge) for merge in content["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replaced = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replaced]) if prepend else replaced
    stripped = [decoders.Strip(content=" ", left=1)] if prepend else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *stripped]
    )
    tokenizer.add_special_tokens(list(special))
    _surround(tokenizer, first=first, last=last)
    return tokenizer


def _sentencepiece_file(tokenizer: Tokenizer, control: Sequence[str]) -> bytes:
    """A byte-fallback BPE as SentencePiece writes it: pieces in the order of ids, scores by the rank of their merge."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    content = json.loads(tokenizer.to_str())["model"]
    ranks = {"".join(merge): rank for rank, merge in enumerate(content["merges"])}
    model = proto.ModelProto()
    kinds = proto.ModelProto.SentencePiece
    for piece, _ in sorted(content["vocab"].items(), key=lambda item: item[1]):
        kind = kinds.CONTROL if piece in {"<s>", "</s>", *control} else kinds.NORMAL
        kind = kinds.UNKNOWN if piece == "<unk>" else kinds.BYTE if piece.startswith("<0x") else kind
        model.pieces.add(piece=piece, score=-float(ranks.get(piece, len(ranks))), type=kind)
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = len(content["vocab"])
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.remove_extra_whitespaces = False
    written: bytes = model.SerializeToString()
    return written


def _unigram(special: Sequence[str], *, unk: str = "<unk>") -> Tokenizer:
    """Letters, parts and words of the corpus with the logarithms of their shares; a trainer's would differ by run."""
    import math
    from collections import Counter

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = Counter(f"\u2581{word}" for text in CORPUS for word in text.split())
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for start in range(len(word)):
            for end in range(start + 1, min(len(word), start + 4) + 1):
                counts[word[start:end]] += count
    longer = [piece for piece, _ in counts.most_common() if len(piece) > 1][:60]
    pieces = [*sorted(piece for piece in counts if len(piece) == 1), *longer, *(w for w in words if len(w) > 4)]
    counts.update(words)
    total = sum(counts.values())
    scored = [(piece, math.log(counts[piece] / total)) for piece in dict.fromkeys(pieces)]
    vocab = [*((token, 0.0) for token in special), *scored]
    tokenizer = Tokenizer(models.Unigram(vocab=vocab, unk_id=list(special).index(unk)))
    tokenizer.add_special_tokens(list(special))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def _split_at_spaces(tokenizer: Tokenizer) -> None:
    """What SentencePiece's models of NMT become in a fast tokenizer."""
    from tokenizers import normalizers, pre_tokenizers

    tokenizer.normalizer = normalizers.Precompiled(_nmt_nfkc())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])


@cache
def _nmt_nfkc() -> bytes:
    """SentencePiece's table of characters: compatibility forms as their plain ones, other spaces as spaces."""
    import io

    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=written, vocab_size=40, hard_vocab_limit=False, minloglevel=2
    )
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(written.getvalue())
    table: bytes = model.normalizer_spec.precompiled_charsmap
    return table


def _bert_vocab() -> dict[str, int]:
    vocab: dict[str, int] = make_encoder_tokenizer().get_vocab()
    return vocab


def _word_piece(folder: Path, tokenizer_class: str, **settings: Any) -> None:
    tokenizer = make_encoder_tokenizer().backend_tokenizer
    settings = {**_BERT_SPECIAL, "do_lower_case": True, "model_max_length": 128, **settings}
    _write(folder, tokenizer, settings, tokenizer_class=tokenizer_class)
    ordered = sorted(_bert_vocab().items(), key=lambda item: item[1])
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece, _ in ordered))


def _add(tokenizer: Tokenizer, *tokens: str) -> None:
    from tokenizers import AddedToken

    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in tokens])


def _surround(
    tokenizer: Tokenizer, *, first: Sequence[str] = (), last: Sequence[str] = (), between: Sequence[str] = ()
) -> None:
    """Special tokens before and after a text; `between` stands between the two of a pair, instead of `last`."""
    from tokenizers import processors

    if not first and not last:
        return
    ids = tokenizer.get_vocab()
    template = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *(between or last), "$B:1", *(f"{token}:1" for token in last)],
        special_tokens=[(token, ids[token]) for token in dict.fromkeys([*first, *last, *between])],
    )
    kept = tokenizer.post_processor
    tokenizer.post_processor = template if kept is None else processors.Sequence([kept, template])


def _write(
    folder: Path,
    tokenizer: Tokenizer,
    settings: Mapping[str, Any],
    *,
    tokenizer_class: str,
    legacy: bool = False,
    chat: bool = False,
) -> None:
    """`tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`; vocab.json and merges.txt if `legacy`."""
    assert tokenizer.get_vocab_size() <= VOCAB_SIZE
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    content = json.loads((folder / "tokenizer.json").read_text())
    decoder = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in content["added_tokens"]}
    special = {key: value for key, value in settings.items() if key.endswith("_token") and isinstance(value, str)}
    config = {
        "added_tokens_decoder": decoder,
        **({"chat_template": _CHAT_TEMPLATE} if chat else {}),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
        **settings,
        "tokenizer_class": tokenizer_class,
    }
    for name, value in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        (folder / name).write_text(json.dumps(value, indent=2))
    if legacy:
        vocab, merges = content["model"]["vocab"], content["model"]["merges"]
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
        lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]))
