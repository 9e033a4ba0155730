"""`mix`: a cocktail as a model folder that any tool loads."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cocktail_serve.cli.mergekit import MERGEKIT_FILE, mergekit_yaml
from cocktail_serve.cli.model_card import CARD_FILE, model_card, sources_of
from cocktail_serve.cli.options import (
    AsJSON,
    ConfigFile,
    Judge,
    MixtureOptions,
    OptionalExamplesFile,
    PoolId,
    RecipeFile,
    WeightsOption,
    with_options,
)
from cocktail_serve.cli.terminal import print_json, progress, stderr, stdout
from cocktail_serve.cli.weigh import show, weighing_json
from cocktail_serve.config import PoolConfig, load_settings
from cocktail_serve.imported_recipe import read_recipe

if TYPE_CHECKING:
    from cocktail_serve.offline.weighing import OfflineWeighing
    from cocktail_serve.recipe import Recipe

REPORT_FILE = "weighing.json"


@with_options
def mix(
    context: typer.Context,
    config: ConfigFile,
    *,
    pool: PoolId,
    out: Annotated[Path, typer.Option("--out", help="Folder to write; must not exist, or be empty.")],
    examples: OptionalExamplesFile = None,
    weights: WeightsOption = None,
    recipe: RecipeFile = None,
    options: MixtureOptions,
    judge: Judge = True,
    as_json: AsJSON = False,
) -> None:
    """Mix a cocktail into a folder, offline: parameters, configuration, tokenizer, recipe and model card."""
    if examples is None and weights is None and recipe is None and options.target is None:
        raise typer.BadParameter("give --examples, --weights, --recipe or --target: there is nothing to mix")
    body = options.body(examples=examples, merging_weights=weights, recipe=recipe)
    settings = load_settings(config)

    from cocktail_serve.checkpoints.folder import check_free, save_mixture
    from cocktail_serve.cocktails.weighting_steps import recipe_of
    from cocktail_serve.offline.weighing import weigh_offline

    check_free(out)
    started_at = time.monotonic()
    with progress() as report:
        weighed = weigh_offline(settings, pool, body, report, judge=judge)
        made = recipe_of(weighed.request.options, weighed.pool, weighed.weighing.merging_weights, dtype=weighed.dtype)
        save_mixture(
            made,
            weighed.pool,
            out,
            extra_files=_extra_files(made, weighed, settings.pool(pool), out, command=context.obj),
            progress=lambda done, total: report(f"writing {out}", done, total, is_bytes=True),
        )
    seconds = time.monotonic() - started_at
    if "recipe" in body and read_recipe(body["recipe"]).recipe.mode == "unmerged":
        stderr().print(
            "the recipe is unmerged, and a folder holds merged parameters: the same coefficients, rounded once, as "
            f"recipe {made.digest[:12]}",
            markup=False,
        )
    if as_json:
        print_json(
            {
                **weighing_json(weighed),
                "object": "cocktail.mixture",
                "out": str(out),
                "recipe": {"digest": made.digest, **made.to_json()},
                "seconds": round(seconds, 3),
            }
        )
        return
    console = stdout()
    show(console, weighing_json(weighed), f"recipe {made.digest[:12]}", f"{seconds:.1f} s")
    console.print(f"written to {out}", markup=False)


def _extra_files(
    recipe: Recipe, weighed: OfflineWeighing, config: PoolConfig, out: Path, *, command: Sequence[str]
) -> dict[str, str]:
    """What says where the mixture comes from, by file name."""
    report = weighing_json(weighed)
    return {
        REPORT_FILE: json.dumps(report, indent=2) + "\n",
        CARD_FILE: model_card(recipe, weighed.pool, config, report, out=out, command=command),
        MERGEKIT_FILE: mergekit_yaml(recipe, weighed.pool, sources_of(config)),
    }
