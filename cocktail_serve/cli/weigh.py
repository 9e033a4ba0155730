"""`weigh`: the losses and merging weights a cocktail would have, and nothing else."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cocktail_serve.cli.options import (
    AsJSON,
    ConfigFile,
    ExamplesFile,
    MixtureOptions,
    PoolId,
    with_mixture_options,
)
from cocktail_serve.cli.terminal import candidates_table, print_json, progress, stdout, weighing_table
from cocktail_serve.config import load_settings

if TYPE_CHECKING:
    from rich.console import Console

    from cocktail_serve.offline.weighing import OfflineWeighing


@with_mixture_options
def weigh(
    config: ConfigFile, *, pool: PoolId, examples: ExamplesFile, options: MixtureOptions, as_json: AsJSON = False
) -> None:
    """Measure each model's loss on the examples and show the merging weights that follow. Nothing is mixed."""
    from cocktail_serve.offline.weighing import weigh_offline

    settings = load_settings(config)
    body = options.body(examples=examples)
    with progress() as report:
        weighed = weigh_offline(settings, pool, body, report, judge=options.judge)
    if as_json:
        print_json(weighing_json(weighed))
        return
    show(stdout(), weighed)


def show(console: Console, weighed: OfflineWeighing, *more: str) -> None:
    """The candidates of a search, losses and merging weights by model, one line of the rest, and what was found.

    Args:
        more: what that line holds besides.
    """
    if len(weighed.weighing.candidates) > 1:
        console.print(candidates_table(weighed.weighing.candidates))
        console.print()
    console.print(weighing_table(weighed.weighing.losses, weighed.weighing.merging_weights))
    console.print(", ".join([*_summary(weighed), *more]))
    if weighed.cross_validation is not None:
        console.print(weighed.cross_validation.text, style="bold", markup=False)


def weighing_json(weighed: OfflineWeighing) -> dict[str, Any]:
    """A weighing as `--json` shows it, in the API's words."""
    options, chosen = weighed.request.options, weighed.weighing.chosen
    return {
        "object": "cocktail.weighing",
        "pool": weighed.pool.id,
        "kind": weighed.pool.kind,
        "losses": dict(weighed.weighing.losses),
        "merging_weights": dict(weighed.weighing.merging_weights),
        "entropy": weighed.weighing.entropy,
        "mixed_loss": weighed.mixed_loss,
        "findings": None if weighed.cross_validation is None else weighed.cross_validation.to_json(),
        "candidates": [asdict(candidate) for candidate in weighed.weighing.candidates],
        "weighting": options.weighting,
        "temperature": options.temperature if chosen is None else chosen.temperature,
        "target": options.target,
        "alpha": options.alpha if chosen is None else chosen.alpha,
        "method": options.method,
        "method_params": dict(options.method_params),
        "num_examples": options.num_examples,
        "dtype": weighed.dtype,
    }


def _summary(weighed: OfflineWeighing) -> list[str]:
    """What the table does not show."""
    options, entropy, chosen = weighed.request.options, weighed.weighing.entropy, weighed.weighing.chosen
    temperature = options.temperature if chosen is None else chosen.temperature
    alpha = options.alpha if chosen is None else chosen.alpha
    parts = [f"{options.num_examples} examples"] if options.num_examples else []
    parts += [f"{options.weighting}"] if options.weighting else []
    parts += [f"temperature {temperature:g}"] if temperature is not None else []
    parts += [f"target {options.target}"] if options.target is not None else []
    parts += [f"alpha {alpha:g}"] if alpha is not None else []
    parts += [f"method {options.method}"] if options.method != "linear" else []
    if entropy is not None:
        parts.append(f"entropy {entropy:.2f} nats (as {math.exp(entropy):.1f} equally weighed models)")
    parts += [f"loss of the mixture {weighed.mixed_loss:.3f}"] if weighed.mixed_loss is not None else []
    return parts
