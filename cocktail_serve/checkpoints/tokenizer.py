"""Whether two folders read text the same way: tokenizers are compared by what they do, once loaded."""

from __future__ import annotations

import filecmp
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cocktail_serve.checkpoints.layout import model_folder, read_json
from cocktail_serve.errors import CheckpointError
from cocktail_serve.loading import library_loading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)

_VOCABULARIES = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")

_SAYS_NOTHING = frozenset(
    {
        # who wrote the file, and how it is called: nothing of how a text is cut
        "chat_template", "model_max_length", "padding_side", "truncation_side", "name_or_path", "tokenizer_file",
        "processor_class", "special_tokens_map_file", "clean_up_tokenization_spaces", "backend",
        "is_local", "max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "pad_token_type_id",
        "bos_token", "eos_token", "pad_token", "unsloth_fixed", "return_token_type_ids", "model_input_names",
        "local_files_only", "device", "auto_map", "padding", "truncation", "model_specific_special_tokens",
        "extra_special_tokens", "additional_special_tokens",
    }
)  # fmt: skip

SCORE_TOLERANCE = 1e-4
"""Difference in the scores of a Unigram vocabulary that comes from writing them as float32 or float64."""

_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    " a leading space,  two  spaces,   three   and a trailing one ",
    "\tTabs\tand\nnew lines\n\nand\r\nothers\u00a0non-breaking",
    "Numbers: 7 42 1234567890 3.14159 -0.5e-10 1,000,000 ½ ²",
    "def f(x):\n    return {'a': [x ** 2 for _ in range(10)]}  # code",
    "It's we're they'll CamelCase snake_case UPPER lower",
    "Ünïcödé façade naïve Straße İstanbul ﬁ ligature e\u0301 combining",
    "Καλημέρα κόσμε. Привет, мир! שלום مرحبا नमस्ते",
    "你好\uff0c世界。こんにちは 안녕하세요",
    "\U0001f642 \U0001f469\u200d\U0001f467 € ™ → ∑ \u200bzero-width",
    "http://example.org/path?q=a&b=c user@example.org <tag attr='x'> </s> [CLS]",
    "a" * 70 + " " + "ab" * 40,
    "?!…—\u2013“quoted” \u2018single\u2019 (nested [brackets {braces}])",
)
"""White space, digits, case, accents, scripts without spaces, code: where pipelines part."""

_TOKENS_PER_TEXT = 32


@dataclass(frozen=True, slots=True)
class Tokenization:
    """What decides which ids a text becomes.

    Attributes:
        vocab: id by token, added tokens included.
        pipeline: further parts by name; equal parts cut text the same way.
    """

    vocab: Mapping[str, int]
    pipeline: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Difference:
    """How two tokenizers differ.

    Attributes:
        part: what of them.
        base: what the base's says or does.
        expert: what the expert's says or does.
        is_harmless: whether every text that was tried is cut into the same ids all the same.
    """

    part: str
    base: str
    expert: str
    is_harmless: bool = False


def read_tokenization(folder: Path) -> Tokenization | None:
    """The tokenizer of a model folder, or None where it has none.

    Raises:
        CheckpointError: there is one and it cannot be read.
    """
    root = model_folder(folder)
    if (root / "tokenizer.json").is_file():
        return _from_tokenizer_json(read_json(root / "tokenizer.json"), root / "tokenizer.json")
    if not any((root / name).is_file() for name in _VOCABULARIES):
        return None
    return _as_loaded(_load(root), root)


def differences(base: Path, expert: Path) -> Iterator[Difference]:
    """How the tokenizers of two model folders differ; nothing where one of them has none.

    Files that say the same are not loaded. What is written differently is loaded as an engine loads it, and compared
    by parts and by the ids of a corpus of texts, which holds every token of the vocabulary.

    Raises:
        CheckpointError: a tokenizer cannot be read.
    """
    if _is_same_file(base, expert) and _settings(base) == _settings(expert):
        return
    mine, theirs = read_tokenization(base), read_tokenization(expert)
    if mine is None or theirs is None:
        return
    if mine == theirs and _settings(base) == _settings(expert):
        return
    roots = model_folder(base), model_folder(expert)
    one, other = (_load(root) for root in roots)
    if not all((root / "tokenizer.json").is_file() for root in roots):
        mine, theirs = _as_loaded(one, roots[0]), _as_loaded(other, roots[1])
    if (shifted := _first_shifted(mine, theirs)) is not None:
        yield shifted
        return
    yield from _compare_loaded(one, other, mine, theirs, roots)


def ignores_case(folder: Path) -> bool:
    """Whether the tokenizer of a model folder cuts an English text as it cuts the same text in lower case.

    Raises:
        CheckpointError: it cannot be read.
    """
    text = "The Quick Brown Fox Jumps OVER the Lazy Dog"
    whole, lower = _ids(_load(model_folder(folder)), [text, text.lower()])
    return whole == lower


def _compare_loaded(
    one: PreTrainedTokenizerBase,
    other: PreTrainedTokenizerBase,
    mine: Tokenization,
    theirs: Tokenization,
    roots: tuple[Path, Path],
) -> Iterator[Difference]:
    loaded, others = _as_loaded(one, roots[0]).pipeline, _as_loaded(other, roots[1]).pipeline
    changed = [part for part in loaded if not _is_same(part, loaded[part], others.get(part))]
    for part in ("merges", "scores"):  # a rare merge may be in no text that is tried
        if part in changed:
            yield Difference(part, _short(loaded[part]), _short(others.get(part)))
            return
    texts = [*_TEXTS, *_texts_of(one)]
    for text, ids, other_ids in zip(texts, _ids(one, texts), _ids(other, texts), strict=True):
        if ids != other_ids:
            # the part that the files write differently, where one does, tells more than the text
            written = [part for part in mine.pipeline if not _is_same(part, mine.pipeline[part], theirs.pipeline[part])]
            part = next(iter(changed + written), "result")
            yield Difference(
                part,
                f"{_short(loaded.get(part))}, which cuts {_short(text)} into {_short(ids)}",
                f"{_short(others.get(part))}, which cuts it into {_short(other_ids)}",
            )
            return
    for part in changed:
        if part != "post_processor":  # which cuts nothing
            yield Difference(part, _short(loaded[part]), _short(others.get(part)), is_harmless=True)
    around, others_around = (tokenizer("a")["input_ids"] for tokenizer in (one, other))
    if around != others_around:
        yield Difference("special tokens around a text", str(around), str(others_around), is_harmless=True)


def _first_shifted(mine: Tokenization, theirs: Tokenization) -> Difference | None:
    """One token that has another id; one usually means that thousands have."""
    for token in sorted(mine.vocab.keys() | theirs.vocab.keys()):
        if mine.vocab.get(token) != theirs.vocab.get(token):
            return Difference(f"id of {token!r}", str(mine.vocab.get(token)), str(theirs.vocab.get(token)))
    return None


def _is_same(part: str, mine: Any, theirs: Any) -> bool:
    if part == "scores" and mine is not None and theirs is not None:
        return len(mine) == len(theirs) and all(
            abs(a - b) <= SCORE_TOLERANCE for a, b in zip(mine, theirs, strict=True)
        )
    return bool(mine == theirs)


def _is_same_file(one: Path, other: Path) -> bool:
    """Whether both folders hold the same `tokenizer.json`, byte for byte, as fine-tuned models usually do."""
    mine, theirs = (model_folder(folder) / "tokenizer.json" for folder in (one, other))
    return mine.is_file() and theirs.is_file() and filecmp.cmp(mine, theirs, shallow=False)


def _settings(folder: Path) -> dict[str, Any]:
    """What of `tokenizer_config.json` may change how text is cut: the library builds some pipelines from it."""
    path = model_folder(folder) / "tokenizer_config.json"
    if not path.is_file():
        return {}
    settings = {key: value for key, value in read_json(path).items() if key not in _SAYS_NOTHING and value is not None}
    if (model_folder(folder) / "tokenizer.json").is_file():
        settings.pop("added_tokens_decoder", None)  # tokenizer.json holds them too
    return settings


def _load(root: Path) -> PreTrainedTokenizerBase:
    with library_loading:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(root, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # each tokenizer class has errors of its own
            raise CheckpointError(
                f"{root}: transformers cannot read the tokenizer: {type(error).__name__}: {error}"
            ) from error


def _as_loaded(tokenizer: PreTrainedTokenizerBase, root: Path) -> Tokenization:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # of Python or sentencepiece: nothing to look into but the texts it cuts
        return Tokenization(vocab=dict(tokenizer.get_vocab()), pipeline={})
    return _from_tokenizer_json(json.loads(backend.to_str()), root)


def _from_tokenizer_json(content: Mapping[str, Any], path: Path) -> Tokenization:
    try:
        model = content["model"]
        vocab = model["vocab"]
        if isinstance(vocab, list):  # unigram: [token, score] in the order of ids
            ids = {token: index for index, (token, _) in enumerate(vocab)}
            scores: Any = [score for _, score in vocab]
        else:
            ids, scores = dict(vocab), None
        ids.update({token["content"]: token["id"] for token in content.get("added_tokens") or []})
        # both ways of writing a merge are in use: "a b" and ["a", "b"]
        merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model.get("merges") or []]
        return Tokenization(
            vocab=ids,
            pipeline={
                "type": model.get("type") or ("BPE" if merges else None),
                "merges": merges,
                "scores": scores,
                "normalizer": content.get("normalizer"),
                "pre_tokenizer": content.get("pre_tokenizer"),
                "model": {key: value for key, value in model.items() if key not in ("type", "vocab", "merges")},
                "post_processor": content.get("post_processor"),
                "added_tokens": sorted(content.get("added_tokens") or [], key=lambda token: token["id"]),
            },
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a tokenizer of the tokenizers library: {error!r}") from error


def _texts_of(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The vocabulary as text: every token in one of them, in an order that is the same every time."""
    special = set(tokenizer.all_special_tokens)
    tokens = sorted(token for token in tokenizer.get_vocab() if token not in special)
    random.Random(0).shuffle(tokens)
    for begin in range(0, len(tokens), _TOKENS_PER_TEXT):
        yield tokenizer.convert_tokens_to_string(tokens[begin : begin + _TOKENS_PER_TEXT])
    yield " ".join(sorted(special))


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    try:
        ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:  # settings of a kind that only cutting a text finds wrong
        raise CheckpointError(
            f"{tokenizer.name_or_path}: the tokenizer cannot cut a text: {type(error).__name__}: {error}; look at its "
            "tokenizer_config.json"
        ) from error
    return ids


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
