"""What a mixture should answer: transformers on parameters merged in float64."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.e2e.conftest import VLLMServer
from tests.merging import linear

LOGPROB_TOLERANCE = 2e-3
"""float32 kernels of vLLM and transformers add in another order; logits of these models reach tens."""

TIE_MARGIN = 1e-2
"""Where the reference's best two logits are closer, either token may be chosen."""


@cache
def load_reference(folder: Path) -> LlamaForCausalLM:
    """A model of the pool in transformers, float32. Shared: copy it before a change."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def reference(server: VLLMServer, merging_weights: dict[str, float]) -> LlamaForCausalLM:
    """transformers on parameters merged apart, in float64."""
    models = {name: load_reference(server.folders[name]).state_dict() for name in merging_weights}
    mixed = copy.deepcopy(load_reference(server.folders["base"]))
    mixed.load_state_dict(linear(models, merging_weights))
    return mixed


def assert_greedy_of(
    model: LlamaForCausalLM, prompt: list[int], choice: dict[str, Any], *, tolerance: float = LOGPROB_TOLERANCE
) -> None:
    """Every token is the reference's best given the tokens before it, with the reference's log-probability."""
    answer = choice["token_ids"]
    assert len(answer) == 16
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
    log_probs = logits.log_softmax(-1)
    top = logits.topk(2).values
    for position, token in enumerate(answer):
        if top[position, 0] - top[position, 1] > max(TIE_MARGIN, 2 * tolerance):
            assert token == int(logits[position].argmax()), f"position {position}"
        given = choice["logprobs"]["token_logprobs"][position]
        assert given == pytest.approx(float(log_probs[position, token]), abs=tolerance), f"position {position}"
