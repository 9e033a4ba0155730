"""`weigh`: the losses and merging weights a cocktail would have, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cocktail_serve.cli.options import (
    AsJSON,
    ConfigFile,
    ExamplesFile,
    Judge,
    MixtureOptions,
    PoolId,
    Tune,
    with_options,
)
from cocktail_serve.cli.terminal import candidates_table, print_json, print_warnings, progress, stdout, weighing_table
from cocktail_serve.config import load_settings
from cocktail_serve.weighting.candidates import Candidate

if TYPE_CHECKING:
    from rich.console import Console

    from cocktail_serve.offline.tuning import Tuned
    from cocktail_serve.offline.weighing import OfflineWeighing


@with_options
def weigh(
    config: ConfigFile,
    *,
    pool: PoolId,
    examples: ExamplesFile,
    options: MixtureOptions,
    judge: Judge = True,
    tune: Tune = False,
    as_json: AsJSON = False,
) -> None:
    """Measure each model's loss on the examples and show the merging weights that follow. Nothing is mixed."""
    from cocktail_serve.offline.weighing import weigh_offline

    settings = load_settings(config)
    body = options.body(examples=examples)
    with progress() as report:
        weighed = weigh_offline(settings, pool, body, report, judge=judge, tune=tune)
    if as_json:
        print_json(weighing_json(weighed))
        return
    show(stdout(), weighing_json(weighed))


def show(console: Console, weighing: Mapping[str, Any], *more: str) -> None:
    """The candidates of a search, losses and merging weights by model, one line of the rest, and what was found.

    Args:
        weighing: as `weighing_json` has it, or a cocktail as the API shows it.
        more: what that line holds besides.
    """
    candidates = [Candidate(**candidate) for candidate in weighing["candidates"]]
    if len(candidates) > 1:
        console.print(candidates_table(candidates))
        console.print()
    console.print(weighing_table(weighing["losses"], weighing["merging_weights"] or {}))
    console.print(", ".join([*_summary(weighing), *more]), markup=False)
    print_warnings(console, weighing["warnings"])
    if weighing.get("findings") is not None:
        console.print(weighing["findings"]["text"], style="bold", markup=False)
    if weighing.get("tuning") is not None:
        console.print(_tuning_text(weighing["tuning"]), markup=False)


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
        "tuning": None if weighed.tuned is None else _tuning_json(weighed.tuned),
        "candidates": [asdict(candidate) for candidate in weighed.weighing.candidates],
        "weighting": options.weighting,
        "temperature": options.temperature if chosen is None else chosen.temperature,
        "target": options.target,
        "alpha": options.alpha if chosen is None else chosen.alpha,
        "method": options.method,
        "method_params": dict(options.method_params),
        "num_examples": options.num_examples,
        "warnings": list(weighed.warnings),
        "dtype": weighed.dtype,
    }


def _tuning_json(tuned: Tuned) -> dict[str, Any]:
    held_out = tuned.held_out
    return {
        "num_steps": tuned.num_steps,
        "held_out_loss": held_out[tuned.num_steps] if held_out else None,
        "base_loss": held_out[0] if held_out else None,
    }


def _tuning_text(tuning: Mapping[str, Any]) -> str:
    begin = "a LoRA adapter tuned on these examples instead: "
    if tuning["held_out_loss"] is None:
        return f"{begin}one example leaves nothing to hold out, so nothing can be told"
    if not tuning["num_steps"]:
        return f"{begin}no step lowers the held-out loss of the base, {tuning['base_loss']:.2f}"
    loss, steps = f"{tuning['held_out_loss']:.2f}", tuning["num_steps"]
    return f"{begin}held-out loss {loss} after {steps} steps, base {tuning['base_loss']:.2f}"


def _summary(weighing: Mapping[str, Any]) -> list[str]:
    """What the table does not show."""
    entropy, mixed_loss = weighing["entropy"], weighing["mixed_loss"]
    parts = [f"{weighing['num_examples']} examples"] if weighing["num_examples"] else []
    parts += [f"{weighing['weighting']}"] if weighing["weighting"] else []
    parts += [f"temperature {weighing['temperature']:g}"] if weighing["temperature"] is not None else []
    parts += [f"target {weighing['target']}"] if weighing["target"] is not None else []
    parts += [f"alpha {weighing['alpha']:g}"] if weighing["alpha"] is not None else []
    parts += [f"method {weighing['method']}"] if weighing["method"] != "linear" else []
    if entropy is not None:
        parts.append(f"entropy {entropy:.2f} nats (as {math.exp(entropy):.1f} equally weighed models)")
    parts += [f"loss of the mixture {mixed_loss:.3f}"] if mixed_loss is not None else []
    return parts
