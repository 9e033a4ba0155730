"""Log-probabilities of the outputs that are scored, and of no other token of a prompt.

vLLM computes the log-probabilities of a prompt for each of its tokens, one request after the other. A loss is of the
output alone, which is the prompt's end: so a request that is scored says where it starts, and the output head computes
the rows of those tokens only, of all such requests of a step in one product.

Likewise a request may say which tokens may follow its prompt, and is told the log-probability of each. vLLM has a field
for that (`logprob_token_ids`), by which V1 takes from all other requests of a step the log-probabilities that they ask
for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

OUTPUT_START_ARG = "cocktail_output_start"
"""In a request's `extra_args`: index of the first token of its prompt whose log-probability is wanted."""

LABELS_ARG = "cocktail_labels"
"""In a request's `extra_args`, beside an output that starts where the prompt ends: the tokens that may follow it."""

MAX_LOGITS = 2**24
"""Of one product: 64 MiB in float32, whatever the vocabulary."""

LayOutSamples = Callable[[NDArray[np.int64], NDArray[np.int32]], object]
"""Told before the output head computes rows of requests: their places in the step, and how many rows each has."""


@dataclass(frozen=True, slots=True)
class _Part:
    """What a step computes of one request.

    Attributes:
        place: of the request in the step.
        begin: the first of the step's hidden states that predict a token that counts.
        num_rows: how many of them do: one for each token, or one for all.
        token_ids: the tokens that they predict.
        logprobs: where they go: a view of the request's own, `[len(token_ids)]`.
    """

    place: int
    begin: int
    num_rows: int
    token_ids: Sequence[int]
    logprobs: Tensor


class OutputLogprobs:
    """Computes the log-probabilities of requests that name an output; those of others are left to vLLM.

    A request's answer holds a log-probability for each token of its output, or for each of its labels, in order, and
    for no other token.

    Args:
        runner: vLLM's model runner, of V1.
        lay_out_samples: where each row has parameters of its own.
    """

    def __init__(self, runner: Any, lay_out_samples: LayOutSamples | None = None) -> None:
        self._runner = runner
        self._lay_out_samples = lay_out_samples

    def install(self) -> None:
        """Puts itself before the runner's own method, and before whatever was put there earlier."""
        self._runner._get_prompt_logprobs_dict = self._around(self._runner._get_prompt_logprobs_dict)

    def _around(self, get_prompt_logprobs: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        def get(hidden_states: Tensor, num_scheduled_tokens: Mapping[str, int]) -> dict[str, Any]:
            wanted: dict[str, int] = self._runner.num_prompt_logprobs
            own = {request_id: num for request_id, num in wanted.items() if self._output_start(request_id) is not None}
            if not own:
                return get_prompt_logprobs(hidden_states, num_scheduled_tokens)
            for request_id in own:
                del wanted[request_id]
            found = get_prompt_logprobs(hidden_states, num_scheduled_tokens)
            finished = self._compute(hidden_states, {name: num_scheduled_tokens.get(name) for name in own})
            wanted.update((request_id, num) for request_id, num in own.items() if request_id not in finished)
            return {**found, **finished}

        return get

    def _output_start(self, request_id: str) -> int | None:
        start = self._arguments(request_id).get(OUTPUT_START_ARG)
        return start if isinstance(start, int) else None

    def _labels(self, request_id: str) -> Sequence[int]:
        """Tokens that may follow; none where they are no tokens, as other clients of vLLM may send."""
        labels = self._arguments(request_id).get(LABELS_ARG)
        size = self._runner.input_batch.vocab_size
        if isinstance(labels, list | tuple) and all(isinstance(each, int) and 0 <= each < size for each in labels):
            return labels
        return ()

    def _arguments(self, request_id: str) -> Mapping[str, Any]:
        params = self._runner.requests[request_id].sampling_params
        return (params and params.extra_args) or {}

    def _compute(self, hidden_states: Tensor, num_scheduled_tokens: Mapping[str, int | None]) -> dict[str, Any]:
        """Computes what the step has of these requests; the log-probabilities of those whose prompts are read."""
        finished, parts = {}, []
        for request_id, num_tokens in num_scheduled_tokens.items():
            request = self._runner.requests[request_id]
            if num_tokens is None or request.prompt_token_ids is None:
                continue  # preempted while its prompt is read, or without tokens
            part = self._part(request_id, request, num_tokens)
            if part.token_ids:
                parts.append(part)
            if request.num_computed_tokens + num_tokens >= len(request.prompt_token_ids):
                finished[request_id] = request.in_progress_prompt_logprobs_cpu
                request.in_progress_prompt_logprobs_cpu = None
        if parts:
            self._fill(hidden_states, parts)
        return finished

    def _part(self, request_id: str, request: Any, num_tokens: int) -> _Part:
        if labels := self._labels(request_id):
            return self._part_of_labels(request_id, request, num_tokens, labels)
        token_ids = request.prompt_token_ids
        start = min(max(self._output_start(request_id) or 0, 1), len(token_ids))
        if request.in_progress_prompt_logprobs_cpu is None:
            request.in_progress_prompt_logprobs_cpu = _empty(token_ids[start:])
        computed = request.num_computed_tokens
        # the hidden state of a token predicts the one behind it
        first = max(start, computed + 1)
        end = max(first, min(computed + num_tokens, len(token_ids) - 1) + 1)
        place = self._runner.input_batch.req_id_to_index[request_id]
        return _Part(
            place=place,
            begin=int(self._runner.query_start_loc.np[place]) + first - 1 - computed,
            num_rows=end - first,
            token_ids=token_ids[first:end],
            logprobs=request.in_progress_prompt_logprobs_cpu.logprobs[first - start : end - start, 0],
        )

    def _part_of_labels(self, request_id: str, request: Any, num_tokens: int, labels: Sequence[int]) -> _Part:
        """All of them where the step holds the prompt's last token, whose hidden state predicts each."""
        if request.in_progress_prompt_logprobs_cpu is None:
            request.in_progress_prompt_logprobs_cpu = _empty(labels)
        place = self._runner.input_batch.req_id_to_index[request_id]
        computed, last = request.num_computed_tokens, len(request.prompt_token_ids) - 1
        is_here = computed <= last < computed + num_tokens
        return _Part(
            place=place,
            begin=int(self._runner.query_start_loc.np[place]) + last - computed,
            num_rows=int(is_here),
            token_ids=labels if is_here else (),
            logprobs=request.in_progress_prompt_logprobs_cpu.logprobs[:, 0],
        )

    def _fill(self, hidden_states: Tensor, parts: Sequence[_Part]) -> None:
        """Computes the log-probabilities of several requests, and writes them where they belong."""
        import torch

        lengths = np.array([len(part.token_ids) for part in parts])
        heights = np.array([part.num_rows for part in parts])
        rows = torch.from_numpy(np.concatenate([part.begin + np.arange(part.num_rows) for part in parts]))
        token_ids = torch.tensor([token for part in parts for token in part.token_ids])
        # of each token, which of the rows predicts it: ascending
        row_of = np.repeat(np.arange(len(rows)), np.repeat(lengths // heights, heights))
        owners = np.repeat(np.arange(len(parts)), heights)
        places = np.array([part.place for part in parts])
        model, sampler = self._runner.get_model(), self._runner.sampler
        found = []
        most = max(1, MAX_LOGITS // self._runner.input_batch.vocab_size)
        for begin in range(0, len(rows), most):
            chunk = slice(begin, begin + most)
            if self._lay_out_samples is not None:
                counts = np.bincount(owners[chunk], minlength=len(parts)).astype(np.int32)
                self._lay_out_samples(places, counts)
            logits = model.compute_logits(hidden_states[rows[chunk].to(hidden_states.device)])
            logprobs = sampler.compute_logprobs(logits)
            tokens = slice(*np.searchsorted(row_of, (begin, begin + most)))
            of_tokens = torch.from_numpy(row_of[tokens] - begin).to(logprobs.device)
            found.append(logprobs[of_tokens, token_ids[tokens].to(logprobs.device)].cpu())
        for part, logprobs in zip(parts, torch.split(torch.cat(found), lengths.tolist()), strict=True):
            part.logprobs.copy_(logprobs)


def _empty(token_ids: Sequence[int]) -> Any:
    """vLLM's log-probabilities of a prompt's tokens, not computed yet; their ranks never are."""
    import torch
    from vllm.v1.outputs import LogprobsTensors

    return LogprobsTensors(
        logprob_token_ids=torch.tensor(token_ids, dtype=torch.int32)[:, None],
        logprobs=torch.full((len(token_ids), 1), torch.nan),
        selected_token_ranks=torch.zeros(len(token_ids), dtype=torch.int32),
    )
