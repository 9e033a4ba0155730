"""Whether a mixture is worth using, told from losses on examples that it was not weighed with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cocktail_serve.pool import BASE, Kind
from cocktail_serve.weighting.candidates import mean

Advice = Literal["use", "use_expert", "unsure", "no_gain"]

MIN_GAIN = 0.02
"""Share of a loss that an improvement must take off to count."""

MIN_GAIN_OF_RETRIEVAL = 0.1
"""The same of encoders, whose losses on a few passages move by more than what they find (docs/results.md)."""

MIN_ERRORS = 1.0
"""Standard errors (of the paired differences, over examples) that an improvement must be large."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to expect of a mixture.

    Attributes:
        advice: `use`: the mixture beats the base, whatever an expert alone does; `use_expert`: an expert alone beats
            the base and the mixture, which does not; `unsure`: better than the base by less than what chance does, or
            an encoder's, whose examples do not tell; `no_gain`: not better than the base.
        text: the same in a sentence with the figures, all of them held out.
        mixed: mean held-out loss of the mixture (nats), as the following.
        best_expert: the expert of least loss on all examples; None where there is none.
        best_expert_loss: its mean loss on them, which chose it, or None.
        best_expert_held_out: mean loss of the best expert where each fold's is chosen by the others, or None.
        base: of the base, which nothing is chosen for.
    """

    advice: Advice
    text: str
    mixed: float
    best_expert: str | None
    best_expert_loss: float | None
    best_expert_held_out: float | None
    base: float


def verdict(
    mixed: Sequence[float], losses: Mapping[str, Sequence[float]], folds: Sequence[Sequence[int]], *, kind: Kind
) -> Verdict:
    """Judges a mixture by what it loses on each example, held out, beside what base and best expert lose on the same.

    The best expert is held out as the mixture is: for the examples of a fold it is the one that loses least on the
    other folds, so that nothing is compared with what was chosen by the examples it is measured on. The base needs no
    choice.

    The mixture counts as better than another model if its mean loss is less by at least `MIN_GAIN` of the other's, and
    by at least `MIN_ERRORS` standard errors of the difference example by example. An expert may have been trained on
    the examples, and then it looks better than it is; the mixture does less. So an expert's lead over a mixture that
    beats the base is told, and changes nothing: on test rows it was seldom there (docs/results.md).

    An encoder's examples are told apart from each other's passages alone, which says little about a corpus: a gain
    counts from `MIN_GAIN_OF_RETRIEVAL` on, and where there is none nothing is claimed, neither for the base nor for an
    expert.

    Args:
        mixed: loss (nats) of each example under a mixture whose weights it had no part in.
        losses: of each example, in the same order, by model name, `base` among them.
        folds: indices of the examples that were held out together; every example is in one.
        kind: of the pool.
    """
    min_gain = min_gain_of(kind)
    mixed_loss, base_loss = mean(mixed), mean(losses[BASE])
    experts = {name: of_model for name, of_model in losses.items() if name != BASE}
    best = _best(experts, range(len(mixed)))
    figures = f"held-out losses: mixed {mixed_loss:.2f}, "
    alone: list[float] | None = None
    if best is not None:
        chosen = {row: _best(experts, _others(fold, len(mixed))) or best for fold in folds for row in fold}
        alone = [experts[chosen[row]][row] for row in range(len(mixed))]
        names = " or ".join(name for name in experts if name in chosen.values())
        figures += f"best expert {mean(alone):.2f} ({names}), "
    figures += f"base {base_loss:.2f}: "
    is_behind = alone is not None and is_better(alone, mixed)
    if is_better(mixed, losses[BASE], min_gain=min_gain):
        advice: Advice = "use"
        text = "use it"
        if is_behind:
            text += f"; {best} alone loses less here, which says little if it knows the examples"
    elif kind == "encoder":
        advice, text = "unsure", "a few passages do not tell what it finds in a corpus; measure it on a test set"
    elif alone is not None and is_behind and is_better(alone, losses[BASE]):
        advice, text = "use_expert", f"{best} alone is better; lower the temperature, or use it as it is"
    elif mixed_loss < base_loss:
        advice, text = "unsure", "the gain is within chance; give more examples"
    else:
        advice, text = "no_gain", "no expert is close: expect little"
    return Verdict(
        advice,
        figures + text,
        mixed=mixed_loss,
        best_expert=best,
        best_expert_loss=None if best is None else mean(experts[best]),
        best_expert_held_out=None if alone is None else mean(alone),
        base=base_loss,
    )


def _best(experts: Mapping[str, Sequence[float]], rows: Sequence[int]) -> str | None:
    """The expert of least mean loss on some examples; None where there are no experts, or no examples."""
    if not rows:
        return None
    return min(experts, key=lambda name: mean([experts[name][row] for row in rows]), default=None)


def _others(fold: Sequence[int], num_examples: int) -> list[int]:
    return [row for row in range(num_examples) if row not in fold]


def min_gain_of(kind: Kind) -> float:
    """Share of a loss that an improvement must take off to count, by kind of pool."""
    return MIN_GAIN_OF_RETRIEVAL if kind == "encoder" else MIN_GAIN


def is_better(ours: Sequence[float], theirs: Sequence[float], *, min_gain: float = MIN_GAIN) -> bool:
    """Whether the first losses are less than the second, example by example, by more than chance; see `verdict`."""
    gain = mean(theirs) - mean(ours)
    if not math.isfinite(gain) or gain <= 0.0 or gain < min_gain * mean(theirs):
        return False
    differences = [their - our for our, their in zip(ours, theirs, strict=True)]
    count = len(differences)
    if count < 2:
        return True
    variance = math.fsum((difference - gain) ** 2 for difference in differences) / (count - 1)
    return gain >= MIN_ERRORS * math.sqrt(variance / count)
