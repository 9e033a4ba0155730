"""Where texts that are too long are cut, as vLLM's `truncate_prompt_tokens` says."""

from __future__ import annotations

from cocktail_serve.errors import InvalidRequestError


def truncation(wanted: int | None, *, max_length: int, truncate: bool) -> int | None:
    """The length in tokens at which inputs are cut; None: too long is an error.

    Args:
        wanted: the request's `truncate_prompt_tokens`; -1: what the model takes.
        truncate: the pool's own setting.

    Raises:
        InvalidRequestError: zero, or more than the model takes.
    """
    if wanted == -1 or (wanted is None and truncate):
        return max_length
    if wanted is not None and not 1 <= wanted <= max_length:
        raise InvalidRequestError(
            f"truncate_prompt_tokens must lie between 1 and {max_length}, or be -1, got {wanted}",
            param="truncate_prompt_tokens",
        )
    return wanted
