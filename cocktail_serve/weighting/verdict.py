"""Whether a mixture is worth using, told from losses on examples that it was not weighed with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cocktail_serve.pool import BASE
from cocktail_serve.weighting.candidates import mean

Advice = Literal["use", "use_expert", "unsure", "no_gain"]

MIN_GAIN = 0.02
"""Share of a loss that an improvement must take off to count."""

MIN_ERRORS = 1.0
"""Standard errors (of the paired differences, over examples) that an improvement must be large."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to expect of a mixture.

    Attributes:
        advice: `use`: the mixture beats the base, whatever an expert alone does; `use_expert`: an expert alone beats
            the base and the mixture, which does not; `unsure`: better than the base by less than what chance does;
            `no_gain`: not better than the base.
        text: the same in a sentence with the figures.
        mixed: mean held-out loss of the mixture (nats), as the following.
        best_expert: the expert of least loss; None where there is none.
        best_expert_loss: its mean loss, or None.
        base: of the base.
    """

    advice: Advice
    text: str
    mixed: float
    best_expert: str | None
    best_expert_loss: float | None
    base: float


def verdict(mixed: Sequence[float], losses: Mapping[str, Sequence[float]]) -> Verdict:
    """Judges a mixture by what it loses on each example, held out, beside what base and experts lose on the same.

    The mixture counts as better than another model if its mean loss is less by at least `MIN_GAIN` of the other's, and
    by at least `MIN_ERRORS` standard errors of the difference example by example. The best expert is chosen on the
    examples it is judged by and may have been trained on them, so it looks better than it is; the mixture does not. So
    an expert's lead over a mixture that beats the base is told, and changes nothing: on test rows it was seldom there
    (docs/results.md).

    Args:
        mixed: loss (nats) of each example under a mixture whose weights it had no part in.
        losses: of each example, in the same order, by model name, `base` among them.
    """
    mixed_loss, base_loss = mean(mixed), mean(losses[BASE])
    experts = {name: mean(of_model) for name, of_model in losses.items() if name != BASE}
    best = min(experts, key=experts.__getitem__, default=None)
    figures = f"mixed {mixed_loss:.2f}, "
    if best is not None:
        figures += f"best expert {experts[best]:.2f} ({best}), "
    figures += f"base {base_loss:.2f}: "
    is_behind = best is not None and is_better(losses[best], mixed)
    if is_better(mixed, losses[BASE]):
        advice: Advice = "use"
        text = "use it"
        if is_behind:
            text += f"; {best} alone loses less here, which says little if it knows the examples"
    elif best is not None and is_behind and is_better(losses[best], losses[BASE]):
        advice, text = "use_expert", f"{best} alone is better; lower the temperature, or use it as it is"
    elif mixed_loss < base_loss:
        advice, text = "unsure", "the gain is within chance; give more examples"
    else:
        advice, text = "no_gain", "no expert is close: expect little"
    return Verdict(advice, figures + text, mixed_loss, best, None if best is None else experts[best], base_loss)


def is_better(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether the first losses are less than the second, example by example, by more than chance; see `verdict`."""
    gain = mean(theirs) - mean(ours)
    if not math.isfinite(gain) or gain <= 0.0 or gain < MIN_GAIN * mean(theirs):
        return False
    differences = [their - our for our, their in zip(ours, theirs, strict=True)]
    count = len(differences)
    if count < 2:
        return True
    variance = math.fsum((difference - gain) ** 2 for difference in differences) / (count - 1)
    return gain >= MIN_ERRORS * math.sqrt(variance / count)
