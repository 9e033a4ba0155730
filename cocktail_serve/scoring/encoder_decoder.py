"""Loss of an encoder-decoder on examples: the mean token cross-entropy of the output given the input.

As LM-Cocktail's reference (`seq2seq_loss` of `research/LM_Cocktail`): the input goes to the encoder and the output,
closed by EOS, to the decoder, with teacher forcing. Two differences: the reference averages over the tokens of a batch
of two examples and then over batches, here every example counts the same; and it cuts what is too long, here that is an
error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cocktail_serve.errors import ContextLengthError, InvalidExamplesError
from cocktail_serve.examples import ExampleSet, TextExample
from cocktail_serve.scoring.decoder import batches_by_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

NOT_SCORED = -100
"""Label of a position that is padding, as transformers and torch have it."""


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """An example as the model sees it: token ids, special tokens included."""

    input_ids: list[int]
    labels: list[int]


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerFast, examples: ExampleSet, *, max_tokens: int | None
) -> list[TokenizedPair]:
    """Turns text examples into tokens, inputs and outputs as the tokenizer reads each of them.

    Args:
        max_tokens: longest input and longest output allowed; None: any.

    Raises:
        ContextLengthError: one is longer; names its row.
        InvalidExamplesError: another form of example.
    """
    pairs = []
    for number, example in enumerate(examples, start=1):
        if not isinstance(example, TextExample):
            raise InvalidExamplesError("an encoder-decoder is scored on input and output texts", row=number)
        pair = TokenizedPair(
            tokenizer(example.input, truncation=False, verbose=False)["input_ids"],
            tokenizer(text_target=example.output, truncation=False, verbose=False)["input_ids"],
        )
        for what, ids in (("input", pair.input_ids), ("output", pair.labels)):
            if max_tokens is not None and len(ids) > max_tokens:
                raise ContextLengthError(
                    f"row {number}: the {what} has {len(ids)} tokens, special tokens included, and at most "
                    f"{max_tokens} are read; shorten it, or raise engine.max_model_len if the model takes more",
                    param="examples",
                )
        pairs.append(pair)
    return pairs


def score_encoder_decoder(model: PreTrainedModel, pairs: Sequence[TokenizedPair]) -> list[float]:
    """Mean token cross-entropy (nats) of each pair's output, with the model where it is and as it is.

    Log-probabilities are taken in float32 whatever the model's dtype. Pairs of like length share a batch; padding is
    masked in the encoder, and behind the output, where causal attention cannot see it, in the decoder.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    losses = [0.0] * len(pairs)
    with torch.inference_mode():
        for batch in batches_by_length([len(pair.input_ids) + len(pair.labels) for pair in pairs]):
            inputs = [torch.tensor(pairs[index].input_ids, device=model.device) for index in batch]
            labels = [torch.tensor(pairs[index].labels, device=model.device) for index in batch]
            # [B, T, V]; the model shifts the labels itself: position t predicts label t
            logits = model(
                input_ids=pad_sequence(inputs, batch_first=True),
                attention_mask=pad_sequence([torch.ones_like(row) for row in inputs], batch_first=True),
                labels=pad_sequence(labels, batch_first=True, padding_value=NOT_SCORED),
            ).logits
            for position, (index, row) in enumerate(zip(batch, labels, strict=True)):
                predicted = logits[position, : len(row)].float()
                losses[index] = torch.nn.functional.cross_entropy(predicted, row).item()
    return losses
