"""What the operator has laid on an engine, and who is sent away for it."""

from __future__ import annotations

import pytest

from cocktail_serve.engines.base import OPERATOR_RETRY_S
from cocktail_serve.engines.turns.hold import OperatorHold
from cocktail_serve.errors import ModelNotReadyError
from cocktail_serve.recipe import Recipe

PINNED, OTHER = (Recipe(base="base", coefficients=((name, 1.0),), dtype="float32") for name in ("one", "other"))


@pytest.mark.parametrize(
    ("is_drained", "pinned", "asked", "reason"),
    [
        (False, None, OTHER, None),
        (False, PINNED, PINNED, None),
        (False, PINNED, OTHER, "pinned"),
        (True, None, OTHER, "drained"),
        (True, PINNED, PINNED, "drained"),
        (True, PINNED, OTHER, "drained"),
    ],
)
def test_who_is_kept_out(is_drained: bool, pinned: Recipe | None, asked: Recipe, reason: str | None) -> None:
    hold = OperatorHold()
    hold.is_drained = is_drained
    if pinned is not None:
        hold.pin(pinned, 5.0)
    assert hold.keeps_out(asked.digest) == reason
    if reason is None:
        hold.check_admits(asked.digest)
        return
    message = {
        "pinned": r"^the operator keeps another model in this engine for now; ask again later$",
        "drained": r"^the operator drains this engine; ask again later$",
    }[reason]
    with pytest.raises(ModelNotReadyError, match=message) as raised:
        hold.check_admits(asked.digest)
    assert raised.value.retry_after_s == OPERATOR_RETRY_S


def test_a_pin_is_the_operators_claim_and_can_be_taken_back() -> None:
    hold = OperatorHold()
    assert hold.pinned_digest is None
    hold.pin(PINNED, 5.0)
    assert hold.pinned is not None
    assert (hold.pinned.claimant, hold.pinned_digest) == ("operator", PINNED.digest)
    assert (hold.pinned.made_at, hold.pinned.ranked_from) == (5.0, 5.0)
    hold.unpin()
    assert hold.pinned_digest is None
    hold.check_admits(OTHER.digest)
