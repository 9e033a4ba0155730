"""The rows of each step: which coefficients every token has, laid out when vLLM has laid out the tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vllm_cocktail.unmerged.row import ROW_ARG, coefficients_of

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_cocktail.unmerged.layers import Steps


class StepRows:
    """Sets the rows of every step of a model runner.

    vLLM's requests stand in a step in the order of its input batch, each with as many tokens as are scheduled; what is
    sampled from is one row of each. Log-probabilities of a prompt are computed for one request at a time.

    Args:
        runner: vLLM's model runner, of V1.
        steps: where the rows go.
        columns: the column of each expert, by fingerprint; experts may come while it runs, and columns be left out.

    A request without a row of coefficients, or with an expert that is not loaded, ends the engine: it never answers by
    whatever is there. The fence lets none through.
    """

    def __init__(self, runner: Any, steps: Steps, columns: Mapping[str, int]) -> None:
        self._runner = runner
        self._steps = steps
        self._columns = columns
        self._rows: dict[str, tuple[Any, np.ndarray]] = {}
        self._coefficients = np.zeros((0, 0), dtype=np.float32)
        self._starts = np.zeros(1, dtype=np.int64)
        self._prompts: Tensor | None = None  # the hidden states that prompts' log-probabilities are computed of

    def install(self) -> None:
        """Puts itself between the runner's own methods."""
        runner = self._runner
        runner._prepare_inputs = self._around_prepare_inputs(runner._prepare_inputs)
        runner._get_prompt_logprobs_dict = self._around_prompt_logprobs(runner._get_prompt_logprobs_dict)
        model = runner.get_model()
        model.compute_logits = self._around_compute_logits(model.compute_logits)

    def lay_out_samples(self, places: NDArray[np.int64], num_rows: NDArray[np.int32]) -> None:
        """Lays out rows of some of the step's requests, which the output head is to compute next.

        Args:
            places: `[num_requests]`, of the requests in the step.
            num_rows: `[num_requests]`, of each.
        """
        self._steps.set_samples(self._coefficients[places], num_rows)

    def _around_prepare_inputs(self, prepare_inputs: Callable[..., Any]) -> Callable[..., Any]:
        def prepare(scheduler_output: Any, num_scheduled_tokens: np.ndarray, *args: Any, **kwargs: Any) -> Any:
            prepared = prepare_inputs(scheduler_output, num_scheduled_tokens, *args, **kwargs)
            batch = self._runner.input_batch
            self._lay_out(batch.req_ids[: batch.num_reqs], num_scheduled_tokens[: batch.num_reqs])
            return prepared

        return prepare

    def _around_prompt_logprobs(self, get_prompt_logprobs: Callable[..., Any]) -> Callable[..., Any]:
        def get(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._prompts = hidden_states
            try:
                return get_prompt_logprobs(hidden_states, *args, **kwargs)
            finally:
                self._prompts = None

        return get

    def _around_compute_logits(self, compute_logits: Callable[..., Any]) -> Callable[..., Any]:
        def compute(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._prompts is not None:
                request = self._request_at(_first_row(hidden_states, self._prompts))
                self.lay_out_samples(np.array([request]), np.array([hidden_states.shape[0]], dtype=np.int32))
            return compute_logits(hidden_states, *args, **kwargs)

        return compute

    def _lay_out(self, request_ids: list[str], num_tokens: np.ndarray) -> None:
        rows = {}
        for request_id in request_ids:
            params = self._runner.requests[request_id].sampling_params
            args = params and params.extra_args
            known = self._rows.get(request_id)
            # ids may come again, a request's arguments are its own
            rows[request_id] = known if known is not None and known[0] is args else (args, self._row_of(args))
        self._rows = rows
        coefficients = np.zeros((len(request_ids), self._num_columns), dtype=np.float32)
        for index, (_, row) in enumerate(rows.values()):
            coefficients[index, : len(row)] = row
        self._coefficients = coefficients
        self._starts = np.concatenate(([0], np.cumsum(num_tokens)))
        self._steps.set(coefficients, num_tokens.astype(np.int32))

    def _row_of(self, args: Mapping[str, Any] | None) -> np.ndarray:
        row = np.zeros(self._num_columns, dtype=np.float32)
        for fingerprint, coefficient in coefficients_of((args or {}).get(ROW_ARG)).items():
            if fingerprint not in self._columns:
                raise ValueError(f"a request came for expert {fingerprint}, whose factors are not loaded")
            row[self._columns[fingerprint]] = coefficient
        return row

    @property
    def _num_columns(self) -> int:
        return 1 + max(self._columns.values(), default=-1)

    def _request_at(self, token: int) -> int:
        return int(np.searchsorted(self._starts, token, side="right")) - 1


def _first_row(part: Tensor, whole: Tensor) -> int:
    """Where in a step's hidden states a part of them begins.

    Raises:
        ValueError: it is no part of them.
    """
    row_bytes = whole.stride(0) * whole.element_size()
    row, rest = divmod(part.data_ptr() - whole.data_ptr(), row_bytes)
    if rest or not 0 <= row < whole.shape[0]:
        raise ValueError("a prompt's hidden states are no part of the step's: this vLLM computes them otherwise")
    return row
