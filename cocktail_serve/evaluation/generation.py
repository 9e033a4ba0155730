"""Greedy answers of one model, or of several whose next-token probabilities are averaged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cocktail_serve.scoring.decoder import batches_by_length


def generate_texts(
    models: Sequence[Any],
    shares: Sequence[float],
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    max_tokens: int,
    stop_token_ids: Sequence[int] = (),
) -> list[str]:
    """Continues each prompt greedily with transformers' `generate`, in batches of like length.

    Several models: at each step the token of the largest `sum_i share_i p_i(token)`, each model reading all that was
    said so far. The further models read it anew at every token, which is what makes an ensemble costly.

    Args:
        models: in transformers, on one device, in evaluation mode.
        shares: one for each model, sum 1.
        prompts: token ids, special tokens included, shorter than `max_tokens`.
        max_tokens: context length: where prompt and answer would be longer, the answer ends there.
        stop_token_ids: what ends an answer; none: what the model's configuration says.

    Returns:
        The texts, without special tokens.
    """
    import torch
    from transformers import GenerationConfig, LogitsProcessorList

    first, *others = models
    eos = list(stop_token_ids) or getattr(first.generation_config, "eos_token_id", None) or tokenizer.eos_token_id
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    answers = [""] * len(prompts)
    with torch.inference_mode():
        for batch in batches_by_length([len(prompt) + max_new_tokens for prompt in prompts]):
            rows = [list(prompts[index]) for index in batch]
            longest = max(map(len, rows))
            input_ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=first.device)
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=first.device)
            config = GenerationConfig(
                do_sample=False,
                max_new_tokens=max(1, min(max_new_tokens, max_tokens - longest)),
                eos_token_id=eos,
                pad_token_id=pad,
            )
            processors = LogitsProcessorList([_Averaged(others, shares, mask)] if others else [])
            said = first.generate(input_ids, attention_mask=mask, generation_config=config, logits_processor=processors)
            texts = tokenizer.batch_decode(said[:, longest:], skip_special_tokens=True)
            for index, text in zip(batch, texts, strict=True):
                answers[index] = text
    return answers


class _Averaged:
    """A logits processor of transformers: the first model's scores become those of the ensemble."""

    def __init__(self, others: Sequence[Any], shares: Sequence[float], mask: Any) -> None:
        self._others = others
        self._log_shares = [math.log(share) for share in shares]
        self._mask = mask

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        said = torch.ones_like(input_ids[:, self._mask.shape[1] :])
        mask = torch.cat([self._mask, said], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        weighted = [torch.log_softmax(scores.float(), dim=-1) + self._log_shares[0]]
        for model, log_share in zip(self._others, self._log_shares[1:], strict=True):
            logits = model(input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[
                :, -1
            ]
            weighted.append(torch.log_softmax(logits.float(), dim=-1) + log_share)
        return torch.logsumexp(torch.stack(weighted), dim=0)
