"""Where texts that are too long are cut: vLLM's `truncate_prompt_tokens`, Voyage's `truncation`, the pool's setting."""

from __future__ import annotations

from cocktail_serve.errors import InvalidRequestError


def truncation(wanted: int | None, *, max_length: int, truncate: bool, whether: bool | None = None) -> int | None:
    """The length in tokens at which inputs are cut; None: too long is an error.

    Args:
        wanted: the request's `truncate_prompt_tokens`; -1: what the model takes.
        truncate: the pool's own setting.
        whether: the request's `truncation`, which counts where `wanted` is not given.

    Raises:
        InvalidRequestError: zero, or more than the model takes; not to be cut, by a pool that cuts.
    """
    if whether is False and truncate:
        raise InvalidRequestError(
            "this pool cuts what is too long (its `truncate` is true), so truncation false is not served; leave it out",
            param="truncation",
        )
    if wanted == -1 or (wanted is None and (truncate or whether)):
        return max_length
    if wanted is not None and not 1 <= wanted <= max_length:
        raise InvalidRequestError(
            f"truncate_prompt_tokens must lie between 1 and {max_length}, or be -1, got {wanted}",
            param="truncate_prompt_tokens",
        )
    return wanted
