"""Loss of a decoder on examples: the mean token cross-entropy of the output given the input.

The same tokens are scored inside a running vLLM engine and, offline, with transformers.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cocktail_serve.errors import ContextLengthError, InvalidExamplesError, InvalidRequestError
from cocktail_serve.examples import ChatExample, Example, ExampleSet, TextExample
from cocktail_serve.generation_settings import ChatTemplate

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from cocktail_serve.scoring.exported_tokenizer import ExampleTokenizer

LOSS_VERSION = "text-2"
"""Part of every key that a loss is kept under: raised when the same example comes to mean other tokens."""

MAX_BATCH_TOKENS = 2048
"""Tokens, padding included, of one offline forward pass: logits of a vocabulary of 128k take 0.5 GB in bfloat16."""


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """An example as the model sees it.

    Attributes:
        token_ids: input and output, special tokens included.
        output_start: index of the first token that counts, at least 1: the first token of all has nothing before it.
    """

    token_ids: list[int]
    output_start: int


def tokenize_examples(
    tokenizer: ExampleTokenizer,
    examples: ExampleSet,
    *,
    max_tokens: int,
    chat_template: ChatTemplate | None = None,
) -> list[TokenizedExample]:
    """Turns text and chat examples into tokens, with the boundary between input and output found in tokens.

    Text is joined by the example's separator (LM-Cocktail's reference: one space) and closed by EOS; an output without
    an input stands alone, and is predicted from what the tokenizer begins a text with. Special tokens before it are
    those that the tokenizer's own template adds. The boundary is found by the tokens' character offsets: the first
    token that reaches past the input's last character is the first of the output. So the separator, and a token merged
    across the boundary, count as output.

    Messages go through the chat template, which brings its special tokens itself; what it renders after the generation
    prompt of all messages but the last is the output. Their tokens, and those of a text that nothing joins, are what a
    model which is served reads and writes: where a token of both together would merge across the boundary, as after a
    prompt that ends in a space, the two are cut apart.

    Args:
        max_tokens: longest example allowed; `max_model_len - 1` wherever it is scored, since vLLM needs room for one
            token more.
        chat_template: the pool's; None: the tokenizer's own, if it has one.

    Raises:
        ContextLengthError: an example is longer; names its row.
        InvalidExamplesError: an output that tokenises to nothing, messages without a chat template or that it refuses.
    """
    return [
        tokenize_example(tokenizer, example, Row(number, examples), max_tokens, chat_template)
        for number, example in enumerate(examples, start=1)
    ]


def score_with_transformers(model: PreTrainedModel, tokenized: Sequence[TokenizedExample]) -> list[float]:
    """Mean token cross-entropy (nats) of each example's output, with the model where it is and as it is."""
    return [mean_loss(log_probs) for log_probs in token_log_probs(model, tokenized)]


def mean_loss(log_probs: np.ndarray) -> float:
    """Mean token cross-entropy (nats) of an output from the log-probabilities `[T]` of its tokens."""
    return -math.fsum(log_probs) / len(log_probs)


def token_log_probs(model: PreTrainedModel, tokenized: Sequence[TokenizedExample]) -> list[np.ndarray]:
    """Log-probability (nats) of each token of each example's output, `[T]` float64.

    Examples of like length share a batch of at most `MAX_BATCH_TOKENS` tokens.
    """
    import torch

    log_probs: dict[int, np.ndarray] = {}
    with torch.inference_mode():
        for batch in batches_by_length([len(example.token_ids) for example in tokenized]):
            of_batch = batch_log_probs(model, [tokenized[index] for index in batch])
            log_probs |= {index: of_row.double().cpu().numpy() for index, of_row in zip(batch, of_batch, strict=True)}
    return [log_probs[index] for index in range(len(tokenized))]


def batch_log_probs(model: PreTrainedModel, tokenized: Sequence[TokenizedExample]) -> list[Tensor]:
    """Log-probability (nats) of each token of each example's output, `[T]` float32, in one forward pass.

    They are taken in float32 whatever the model's dtype, and can be differentiated. Examples are padded on the right,
    where causal attention cannot see it; so a model needs no pad token. Logits are computed from the first output token
    of the batch on, where the model can leave out those before it.
    """
    import torch

    leaves_out = "logits_to_keep" in inspect.signature(model.forward).parameters
    rows = [torch.tensor(example.token_ids, device=model.device) for example in tokenized]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    lengths = torch.tensor([len(row) for row in rows], device=model.device)
    attention_mask = torch.arange(input_ids.shape[1], device=model.device) < lengths[:, None]
    first = min(example.output_start for example in tokenized) - 1 if leaves_out else 0
    kept = {"logits_to_keep": input_ids.shape[1] - first} if leaves_out else {}
    # [B, T - first, V]; position t predicts token first + t + 1
    logits = model(input_ids=input_ids, attention_mask=attention_mask.long(), use_cache=False, **kept).logits
    return [
        -torch.nn.functional.cross_entropy(
            of_row[example.output_start - 1 - first : len(row) - 1 - first].float(),
            row[example.output_start :],
            reduction="none",
        )
        for of_row, example, row in zip(logits, tokenized, rows, strict=True)
    ]


class Place(Protocol):
    """Says what a message is about."""

    def invalid(self, message: str) -> InvalidRequestError:
        """What has no tokens to score."""

    def too_long(self, num_tokens: int, max_tokens: int) -> ContextLengthError:
        """What is longer than can be scored."""


class Row:
    """An example, by its number."""

    def __init__(self, number: int, examples: ExampleSet) -> None:
        self.number = number
        self._sampled = f" (of the {len(examples)} sampled)" if len(examples) < examples.num_given else ""

    def invalid(self, message: str) -> InvalidExamplesError:
        return InvalidExamplesError(message + self._sampled, row=self.number)

    def too_long(self, num_tokens: int, max_tokens: int) -> ContextLengthError:
        return ContextLengthError(
            f"row {self.number}: the example has {num_tokens} tokens, input, output and special tokens together, "
            f"and at most {max_tokens} can be scored; shorten it{self._sampled}",
            param="examples",
        )


def tokenize_example(
    tokenizer: ExampleTokenizer,
    example: Example,
    row: Place,
    max_tokens: int,
    chat_template: ChatTemplate | None,
) -> TokenizedExample:
    """One example, as `tokenize_examples` has it; raises what `row` makes of what is wrong with it."""
    if isinstance(example, TextExample):
        text, input_end = example.text, len(example.input)
        # what joins the two is ours: an output of which nothing else is left has no tokens
        output_begin = example.output_start
    elif isinstance(example, ChatExample):
        text, input_end = _render(tokenizer, example, row, chat_template)
        output_begin = input_end
    else:
        raise row.invalid("the example has no output for a decoder to predict")
    is_chat = isinstance(example, ChatExample)
    token_ids, offsets = _encode(tokenizer, text, add_special_tokens=not is_chat)
    ends = [end for _, end in offsets]
    if max(ends, default=0) <= output_begin:
        raise row.invalid("the output tokenises to nothing, so there is nothing to predict")
    output_start = max(1, next(index for index, end in enumerate(ends) if end > input_end))
    if isinstance(example, TextExample) and not example.input and ends[0] > 0:
        raise row.invalid(
            "the input is empty, and the pool's tokenizer begins a text with no token of its own, so there is nothing "
            "to predict the output's first token from; give an input"
        )
    if is_chat or input_end == output_begin:  # where something joins them, it is one text, as the reference's
        prompt_ids, _ = _encode(tokenizer, text[:input_end], add_special_tokens=not is_chat)
        if not is_chat and prompt_ids and prompt_ids[-1] == tokenizer.eos_token_id:
            prompt_ids.pop()
        if token_ids[: len(prompt_ids)] != prompt_ids:
            token_ids, output_start = prompt_ids + _continuation(tokenizer, text[input_end:]), len(prompt_ids)
    # a chat template closes the turn itself
    if not is_chat and tokenizer.eos_token_id is not None and token_ids[-1] != tokenizer.eos_token_id:
        token_ids.append(tokenizer.eos_token_id)
    if len(token_ids) > max_tokens:
        raise row.too_long(len(token_ids), max_tokens)
    if output_start >= len(token_ids):
        raise row.invalid("input and output are one token, so there is nothing to predict it from; give a longer input")
    return TokenizedExample(token_ids, output_start)


def _encode(
    tokenizer: ExampleTokenizer, text: str, *, add_special_tokens: bool
) -> tuple[list[int], Sequence[tuple[int, int]]]:
    """Token ids of a text, and where in it each begins and ends."""
    encoded = tokenizer(
        text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, truncation=False, verbose=False
    )
    return list(encoded["input_ids"]), encoded["offset_mapping"]


def _continuation(tokenizer: ExampleTokenizer, text: str) -> list[int]:
    """Tokens of a text that goes on from another: without the space that some tokenizers put before a text."""
    before, _ = _encode(tokenizer, "\n", add_special_tokens=False)
    both, _ = _encode(tokenizer, f"\n{text}", add_special_tokens=False)
    return (
        both[len(before) :] if both[: len(before)] == before else _encode(tokenizer, text, add_special_tokens=False)[0]
    )


def _render(
    tokenizer: ExampleTokenizer, example: ChatExample, row: Place, chat_template: ChatTemplate | None
) -> tuple[str, int]:
    """The conversation's text, and how many of its characters are the input."""
    from jinja2 import TemplateError

    if chat_template is None and not tokenizer.chat_template:
        raise row.invalid(
            "the pool's base has no chat template, and no single one comes with its experts, so messages cannot be "
            "scored; set chat-template in engine.args, or give input and output"
        )
    own = {} if chat_template is None else {**chat_template.defaults, "chat_template": chat_template.text}
    messages, tools = example.to_json()["messages"], [dict(tool) for tool in example.tools] or None
    plain = [*messages[:-1], {"role": "assistant", "content": messages[-1]["content"]}]

    def rendered(messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        text: str = tokenizer.apply_chat_template(
            messages, **{**own, "tools": tools, "tokenize": False, "add_generation_prompt": add_generation_prompt}
        )
        return text

    try:
        text = rendered(messages, add_generation_prompt=False)
        before = rendered(messages[:-1], add_generation_prompt=True)
        is_dropped = "tool_calls" in messages[-1] and text == rendered(plain, add_generation_prompt=False)
    # templates are programs: what they do to calls of tools that they do not expect ends in any of these
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise row.invalid(f"the chat template refuses these messages: {error}") from error
    if is_dropped:
        raise row.invalid("the answer calls tools, which the pool's chat template does not render")
    # a generation prompt may hold more than the template renders for a finished turn (an opened thought, say)
    return text, _length_of_common_prefix(text, before)


def _length_of_common_prefix(one: str, other: str) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def batches_by_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in batches of like length, longest first: a batch that does not fit in memory fails at once.

    Args:
        lengths: tokens of each example.
    """
    batch: list[int] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = longest or lengths[index]
        if batch and (len(batch) + 1) * longest > MAX_BATCH_TOKENS:
            yield batch
            batch, longest = [], lengths[index]
        batch.append(index)
    if batch:
        yield batch
