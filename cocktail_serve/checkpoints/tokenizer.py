"""Whether two folders read text the same way: tokenizers are compared by what they do, once loaded."""

from __future__ import annotations

import filecmp
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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


class FolderTokenizer:
    """The tokenizer of a model folder, read, loaded and tried as far as it is asked about, each once.

    All attributes raise CheckpointError where the tokenizer cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.root = model_folder(folder)

    @cached_property
    def written(self) -> Tokenization | None:
        """What its files say; None where there is no tokenizer."""
        if self._file.is_file():
            return _from_tokenizer_json(read_json(self._file), self._file)
        return self.as_loaded if any((self.root / name).is_file() for name in _VOCABULARIES) else None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What of `tokenizer_config.json` may change how text is cut: the library builds some pipelines from it."""
        path = self.root / "tokenizer_config.json"
        if not path.is_file():
            return {}
        settings = {
            key: value for key, value in read_json(path).items() if key not in _SAYS_NOTHING and value is not None
        }
        if self._file.is_file():
            settings.pop("added_tokens_decoder", None)  # tokenizer.json holds them too
        return settings

    @cached_property
    def as_loaded(self) -> Tokenization:
        """What the library makes of the files."""
        backend = getattr(self._loaded, "backend_tokenizer", None)
        if backend is None:  # of Python or sentencepiece: nothing to look into but the texts it cuts
            return Tokenization(vocab=dict(self._loaded.get_vocab()), pipeline={})
        return _from_tokenizer_json(json.loads(backend.to_str()), self.root)

    @cached_property
    def corpus(self) -> list[tuple[str, list[int]]]:
        """Texts, with every token of the vocabulary in one of them, and the ids that they are cut into."""
        texts = list(texts_to_try(self._loaded))
        return list(zip(texts, self.ids(texts), strict=True))

    def ids(self, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[list[int]]:
        """What the texts are cut into."""
        try:
            ids: list[list[int]] = self._loaded(list(texts), add_special_tokens=add_special_tokens, verbose=False)[
                "input_ids"
            ]
        except Exception as error:  # settings of a kind that only cutting a text finds wrong
            raise CheckpointError(
                f"{self.root}: the tokenizer cannot cut a text: {type(error).__name__}: {error}; look at its "
                "tokenizer_config.json"
            ) from error
        return ids

    @property
    def ignores_case(self) -> bool:
        """Whether it cuts an English text as it cuts the same text in lower case."""
        text = "The Quick Brown Fox Jumps OVER the Lazy Dog"
        whole, lower = self.ids([text, text.lower()])
        return whole == lower

    def has_same_file(self, other: FolderTokenizer) -> bool:
        """Whether both folders hold the same `tokenizer.json`, byte for byte, as fine-tuned models usually do."""
        return self._file.is_file() and other._file.is_file() and filecmp.cmp(self._file, other._file, shallow=False)

    @property
    def has_file(self) -> bool:
        """Whether the folder has a `tokenizer.json`."""
        return self._file.is_file()

    @property
    def _file(self) -> Path:
        return self.root / "tokenizer.json"

    @cached_property
    def _loaded(self) -> PreTrainedTokenizerBase:
        with library_loading:
            from transformers import AutoTokenizer

            try:
                return AutoTokenizer.from_pretrained(self.root, trust_remote_code=False, local_files_only=True)
            except Exception as error:  # each tokenizer class has errors of its own
                raise CheckpointError(
                    f"{self.root}: transformers cannot read the tokenizer: {type(error).__name__}: {error}"
                ) from error


def differences(base: FolderTokenizer, expert: FolderTokenizer) -> Iterator[Difference]:
    """How two tokenizers differ; nothing where one of the folders has none.

    Files that say the same are not loaded. What is written differently is loaded as an engine loads it, and compared
    by parts and by the ids of a corpus of texts, which holds every token of the vocabulary.

    Raises:
        CheckpointError: a tokenizer cannot be read.
    """
    is_set_alike = base.settings == expert.settings
    if is_set_alike and base.has_same_file(expert):
        return
    mine, theirs = base.written, expert.written
    if mine is None or theirs is None or (is_set_alike and mine == theirs):
        return
    if not (base.has_file and expert.has_file):
        mine, theirs = base.as_loaded, expert.as_loaded
    if (shifted := _first_shifted(mine, theirs)) is not None:
        yield shifted
        return
    loaded, others = base.as_loaded.pipeline, expert.as_loaded.pipeline
    changed = [part for part in loaded if not _is_same(part, loaded[part], others.get(part))]
    for part in ("merges", "scores"):  # a rare merge may be in no text that is tried
        if part in changed:
            yield Difference(part, _short(loaded[part]), _short(others.get(part)))
            return
    for (text, ids), other_ids in zip(base.corpus, expert.ids([text for text, _ in base.corpus]), strict=True):
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
    (around,), (others_around,) = (each.ids(["a"], add_special_tokens=True) for each in (base, expert))
    if around != others_around:
        yield Difference("special tokens around a text", str(around), str(others_around), is_harmless=True)


def _first_shifted(mine: Tokenization, theirs: Tokenization) -> Difference | None:
    """One token that has another id; one usually means that thousands have."""
    if mine.vocab == theirs.vocab:
        return None
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


def texts_to_try(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Texts on which tokenizers part, and the whole vocabulary as text: every token in one of them, in an order that is
    the same every time."""
    yield from _TEXTS
    special = set(tokenizer.all_special_tokens)
    tokens = sorted(token for token in tokenizer.get_vocab() if token not in special)
    random.Random(0).shuffle(tokens)
    for begin in range(0, len(tokens), _TOKENS_PER_TEXT):
        yield tokenizer.convert_tokens_to_string(tokens[begin : begin + _TOKENS_PER_TEXT])
    yield " ".join(sorted(special))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
