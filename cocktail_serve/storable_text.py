"""What text is: what UTF-8 holds and every store takes."""

from __future__ import annotations

from cocktail_serve.errors import InvalidRequestError


def check_text(text: str, *, param: str) -> str:
    """A string that can be kept: JSON can carry more than that, and PostgreSQL takes no NUL.

    Args:
        param: what the caller calls it.

    Raises:
        InvalidRequestError: it holds a NUL character or a lone surrogate.
    """
    if "\0" in text:
        raise InvalidRequestError(f"{param} holds a NUL character, which not every store takes", param=param)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"{param} holds a lone surrogate, which is no text", param=param) from error
    return text
