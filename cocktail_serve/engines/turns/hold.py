"""What the operator has laid on an engine: a recipe that stays in it, or that nobody is let in."""

from __future__ import annotations

from typing import Literal

from cocktail_serve.engines.base import OPERATOR_RETRY_S
from cocktail_serve.engines.turns.wait_queue import Claim
from cocktail_serve.errors import ModelNotReadyError
from cocktail_serve.recipe import Recipe


class OperatorHold:
    """The operator's pin and drain.

    Attributes:
        pinned: the operator's claim to a recipe that keeps its turn; None: turns are given.
        is_drained: whether nobody is let in.
    """

    def __init__(self) -> None:
        self.pinned: Claim | None = None
        self.is_drained = False

    @property
    def pinned_digest(self) -> str | None:
        return None if self.pinned is None else self.pinned.recipe.digest

    def pin(self, recipe: Recipe, now: float) -> None:
        self.pinned = Claim(recipe=recipe, made_at=now, ranked_from=now, claimant="operator")

    def unpin(self) -> None:
        self.pinned = None

    def keeps_out(self, recipe_digest: str) -> Literal["drained", "pinned"] | None:
        """Why requests for a recipe are not let in; None: they are."""
        if self.is_drained:
            return "drained"
        return "pinned" if self.pinned is not None and self.pinned_digest != recipe_digest else None

    def check_admits(self, recipe_digest: str) -> None:
        """Sends requests for a recipe away where it is kept out.

        Raises:
            ModelNotReadyError: says what the operator does.
        """
        reason = self.keeps_out(recipe_digest)
        if reason is not None:
            raise operator_drains_error() if reason == "drained" else pinned_error()


def operator_drains_error() -> ModelNotReadyError:
    return ModelNotReadyError("the operator drains this engine; ask again later", retry_after_s=OPERATOR_RETRY_S)


def pinned_error() -> ModelNotReadyError:
    return ModelNotReadyError(
        "the operator keeps another model in this engine for now; ask again later", retry_after_s=OPERATOR_RETRY_S
    )
