"""From texts and pairs of texts to token ids, with the model's own fast tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Encoding, Tokenizer

from cocktail_serve.errors import ConfigError, ContextLengthError, InvalidRequestError, params_named

TextPair = tuple[str, str]
"""Two texts that the model reads together, as query and document."""


class InputTokenizer:
    """Turns texts, or pairs of them, into token ids, special tokens included. Not thread-safe: one thread owns it.

    Args:
        tokenizer: a transformers tokenizer with a Rust backend, which is copied: truncation is a setting of it.
        max_length: tokens that the model takes.
        vocab_size: ids that the model knows.

    Raises:
        ConfigError: the tokenizer has no fast backend, or cuts text into tokens that the model does not know.
    """

    def __init__(self, tokenizer: Any, *, max_length: int, vocab_size: int) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ConfigError(
                f"{type(tokenizer).__name__} has no fast tokenizer (tokenizer.json); save it with transformers' "
                "AutoTokenizer(..., use_fast=True)"
            )
        self._tokenizer = _within(backend, vocab_size)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._truncate_to: int | None = None
        self._truncation_side: str = tokenizer.truncation_side
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self._num_special = {pair: self._tokenizer.num_special_tokens_to_add(is_pair=pair) for pair in (False, True)}
        self._vocab_size = vocab_size
        self.max_length = max_length
        self.has_token_types = "token_type_ids" in tokenizer.model_input_names

    def check_token_types(self) -> None:
        """Raises ConfigError where single texts have token types that the engine would drop."""
        if self.has_token_types and any(self._tokenizer.encode("a text").type_ids):
            raise ConfigError("the tokenizer gives a text token types other than 0, which is not supported")

    def encode(self, texts: Sequence[str], *, truncate_to: int | None = None) -> list[list[int]]:
        """Token ids of each text; cut to `truncate_to` tokens where that is given, else of any length.

        Raises:
            InvalidRequestError: a text no tokenizer takes; carries `input.{index}`.
        """
        return [encoding.ids for encoding in self._encode(texts, truncate_to)]

    def encode_pairs(
        self, pairs: Sequence[TextPair], *, truncate_to: int | None = None
    ) -> tuple[list[list[int]], list[list[int]] | None]:
        """Token ids and token types of each pair; where it is cut, the longer text goes first, token by token.

        Returns:
            Ids, and types of the same lengths: None where the model reads none.

        Raises:
            InvalidRequestError: a text no tokenizer takes; carries `input.{index}`.
        """
        encodings = self._encode(pairs, truncate_to)
        types = [encoding.type_ids for encoding in encodings] if self.has_token_types else None
        return [encoding.ids for encoding in encodings], types

    def tokens_of(self, text: str, *, add_special_tokens: bool) -> tuple[list[int], list[str]]:
        """Token ids of a text of any length, and what the vocabulary calls them.

        Raises:
            InvalidRequestError: a text no tokenizer takes; carries `prompt`.
        """
        self._set_truncation(None)
        with params_named(lambda _: "prompt"):
            check_encodable([text])
        encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return encoding.ids, encoding.tokens

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones included.

        Raises:
            InvalidRequestError: an id outside the vocabulary; carries `tokens`.
        """
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self._vocab_size:
            raise InvalidRequestError(
                f"tokens holds an id outside 0 to {self._vocab_size - 1}, which are those the model knows",
                param="tokens",
            )
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False))

    def shorten_pairs(self, pairs: Sequence[TextPair], max_tokens: tuple[int | None, int | None]) -> Sequence[TextPair]:
        """Pairs whose first and second texts have at most so many tokens, special tokens not counted; None: any.

        Texts are cut at their end, on whole characters.
        """
        if max_tokens == (None, None):
            return pairs
        shortened: list[dict[str, str]] = []
        for position, limit in enumerate(max_tokens):
            texts = {pair[position] for pair in pairs}
            shortened.append({text: text if limit is None else self._shorten(text, limit) for text in texts})
        return [(shortened[0][first], shortened[1][second]) for first, second in pairs]

    def _shorten(self, text: str, max_tokens: int) -> str:
        self._set_truncation(None)
        # what is left may be cut into other tokens than before, and more of them
        while True:
            try:
                ends = [end for _, end in self._tokenizer.encode(text, add_special_tokens=False).offsets]
            except (TypeError, UnicodeEncodeError):
                check_encodable([text])
                raise
            if len(ends) <= max_tokens:
                return text
            # one character may be several tokens: then it goes as a whole
            end = ends[max_tokens - 1]
            text = text[: end if end < len(text) and ends[max_tokens] > end else max(0, end - 1)]

    def _set_truncation(self, truncate_to: int | None) -> None:
        if truncate_to == self._truncate_to:
            return
        if truncate_to is None:
            self._tokenizer.no_truncation()
        else:
            self._tokenizer.enable_truncation(truncate_to, direction=self._truncation_side)
        self._truncate_to = truncate_to

    def _encode(self, inputs: Sequence[str] | Sequence[TextPair], truncate_to: int | None) -> list[Encoding]:
        self._set_truncation(truncate_to)
        try:
            return self._tokenizer.encode_batch_fast(list(inputs))
        except (TypeError, UnicodeEncodeError):
            check_encodable(inputs)
            raise

    def check_truncation(self, truncate_to: int, *, is_pair: bool = False) -> None:
        """Raises InvalidRequestError where nothing but special tokens would be left.

        Below their number the tokenizer silently does not truncate at all.
        """
        least = self._num_special[is_pair] + 1
        if truncate_to < least:
            raise InvalidRequestError(
                f"truncate_prompt_tokens must be at least {least} (special tokens and one of the text), "
                f"got {truncate_to}",
                param="truncate_prompt_tokens",
            )

    def prompt_length(self, prompt: str) -> int:
        """Tokens at the start of an input that are the prompt's, as sentence-transformers counts them.

        A special token at the end is not the prompt's.
        """
        ids = self.encode([prompt])[0]
        return len(ids) - 1 if ids and ids[-1] in self._special_ids else len(ids)

    def check_length(self, token_ids: Sequence[Sequence[int]], *, field: str = "input", what: str = "") -> None:
        """Raises ContextLengthError for the first input over `max_length`.

        Args:
            field: the request's field that the inputs stand in.
            what: what an input is made of, where the field does not tell.
        """
        for index, ids in enumerate(token_ids):
            if len(ids) > self.max_length:
                raise ContextLengthError(
                    f"{field} {index} has {len(ids)} tokens{what}, but the model takes at most {self.max_length}; "
                    "shorten it, or send truncate_prompt_tokens to have it cut",
                    param=f"{field}.{index}",
                )

    def check_token_ids(self, token_ids: Sequence[Sequence[int]]) -> None:
        """Raises InvalidRequestError for an empty input or an id outside the vocabulary; carries `input.{index}`."""
        for index, ids in enumerate(token_ids):
            if not ids:
                raise InvalidRequestError(f"input {index} is an empty list of tokens", param=f"input.{index}")
            if min(ids) < 0 or max(ids) >= self._vocab_size:
                raise InvalidRequestError(
                    f"input {index} holds a token id outside 0 to {self._vocab_size - 1}", param=f"input.{index}"
                )


def _within(backend: Tokenizer, vocab_size: int) -> Tokenizer:
    """A copy without the added tokens that the model does not know, such as a padding token that it was never resized
    for: whoever wrote one into a text would break the pass that it is in. There it is plain text."""
    if backend.get_vocab_size(with_added_tokens=True) <= vocab_size:
        return Tokenizer.from_str(backend.to_str())
    token, largest = max(backend.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise ConfigError(
            f"the tokenizer gives {token!r} the id {largest}, but the model has embeddings for {vocab_size} ids alone: "
            "it is another model's tokenizer, or the embeddings were cut; take the tokenizer that the model came with"
        )
    content = json.loads(backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < vocab_size]
    return Tokenizer.from_str(json.dumps(content))


def check_encodable(inputs: Sequence[str] | Sequence[TextPair]) -> None:
    """Raises InvalidRequestError for a lone surrogate, which JSON can carry and UTF-8 cannot."""
    for index, texts in enumerate(inputs):
        for text in (texts,) if isinstance(texts, str) else texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InvalidRequestError(
                    f"input {index} holds a lone surrogate at character {error.start}, which is no text",
                    param=f"input.{index}",
                ) from error
