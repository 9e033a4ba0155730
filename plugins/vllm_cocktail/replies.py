"""What the control routes answer and what the workers say, as both sides of each know it. Imports no vLLM."""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

STATUS_PATH = "/v1/cocktail/status"
MIX_PATH = "/v1/cocktail/mix"
FORGET_PATH = "/v1/cocktail/forget"
SCORE_PATH = "/v1/cocktail/score"
DECIDE_PATH = "/v1/cocktail/decide"

RESPONSES_PATH = "/v1/responses"
"""vLLM's own; what it does beyond what its chats do is seen to in `brought_templates`."""

DECISIONS_PATH = "/v1/decisions"
"""vLLM's own, since 0.33, which salts no prompt. `DECIDE_PATH` is asked in its place."""

FenceState = Literal["open", "mixing", "poisoned"]

MixingPath = Literal["in_place", "stream", "unmerged"]
"""How parameters reach the engine: summed where they lie, from models kept in the engine's own layout; or in checkpoint
format, one tensor at a time, through vLLM's own reload; in place goes only what is a linear mixture of models that are
kept. Or not at all: factors stay apart, and each request brings its coefficients."""

ParameterSource = Literal["resident", "experts", "cache", "files"]
"""Where a mix took its parameters from: nothing was to do; summed in place; kept in memory; read from files."""


class StatusReply(TypedDict):
    """What `GET STATUS_PATH` answers.

    Attributes:
        resident: digest of the recipe that the engine holds; None: it is lost, or answers by several.
        in_flight: requests behind the fence.
        mode: how recipes are served, where there is a choice.
        mixing_path: a `MixingPath`; the fake server has one of its own.
        streams_because: why it is not `in_place`.
        captured: fingerprints of the models kept in the engine's layout, `captured_bytes` of them.
        mixing_kernel: `compiled`, or `torch` without a C compiler.
        cached: digests of the merged parameters kept in memory, `cached_bytes` of them, `cache_bytes` at most.
        weight_version: what vLLM calls the parameters: the resident recipe's digest.
        managed: whether every request must name its recipe.
        warnings: of what the server was started with, and does not heed.
    """

    resident: str | None
    state: FenceState
    in_flight: int
    mode: NotRequired[str]
    mixing_path: str
    streams_because: str | None
    captured: list[str]
    captured_bytes: int
    mixing_kernel: str
    cached: list[str]
    cached_bytes: int
    cache_bytes: int
    weight_version: str | None
    model_dtype: str
    managed: bool
    warnings: NotRequired[list[str]]


class MixReply(TypedDict):
    """What `POST MIX_PATH` answers.

    Attributes:
        resident: digest of the recipe that the engine holds now.
        seconds: from the request's turn to the fence's opening.
    """

    resident: str
    seconds: float
    source: ParameterSource


class ScoreReply(TypedDict):
    """What `POST SCORE_PATH` answers.

    Attributes:
        losses: in nats, one for each example; None where it is not finite, for which JSON has no other word.
    """

    losses: list[float | None]


class DecideReply(TypedDict):
    """What `POST DECIDE_PATH` answers.

    Attributes:
        log_probs: in nats, one for each option of each question; None where it is not finite.
        num_cached: of each question, tokens that had been computed before.
        num_computed: tokens that were computed, of all questions.
    """

    log_probs: list[list[float | None]]
    num_cached: list[int]
    num_computed: int


class ProbedWorker(TypedDict):
    """What a worker holds.

    Attributes:
        digest: of the resident recipe; None after a failed mix.
        cached, cached_bytes, cache_bytes, mixing_kernel, captured, captured_bytes: as of `StatusReply`.
    """

    digest: str | None
    cached: list[str]
    cached_bytes: int
    cache_bytes: int
    model_dtype: str
    mixing_kernel: str
    captured: list[str]
    captured_bytes: int


class UnmergedWorker(TypedDict):
    """The experts whose factors a worker holds beside the base.

    Attributes:
        experts: their fingerprints; `factor_bytes` of them.
        kernel: what computes the product: `compiled` or `torch`; `kernel_because`: why not `compiled`.
    """

    experts: list[str]
    factor_bytes: int
    kernel: str
    kernel_because: str | None


class CapturedWorker(TypedDict):
    """What became of keeping the pool's models.

    Attributes:
        digest: of the base, which is resident again.
        reason: why mixtures must be streamed; None: they need not be.
    """

    digest: str | None
    reason: str | None


class MixedWorker(TypedDict):
    """What a worker mixed.

    Attributes:
        digest: of the recipe, now resident.
        cached: digests of the merged parameters that it keeps.
    """

    digest: str
    source: ParameterSource
    cached: list[str]


class WorkerDigest(TypedDict):
    """The recipe that a call was about, or that is resident after it."""

    digest: str | None
