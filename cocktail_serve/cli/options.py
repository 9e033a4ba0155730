"""Options that several commands share."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from cocktail_serve.errors import InvalidExamplesError, InvalidMixError
from cocktail_serve.examples import read_rows
from cocktail_serve.methods import METHODS

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="The configuration file (YAML).", show_default=False)
]
Config = Annotated[
    Path, typer.Option("--config", metavar="CONFIG", help="The configuration file (YAML).", show_default=False)
]
PoolId = Annotated[str, typer.Option("--pool", help="Id of the pool in the configuration.", show_default=False)]
ExamplesFile = Annotated[
    Path,
    typer.Option(
        "--examples",
        help="The task's examples: one JSON object per line, or one array.",
        exists=True,
        dir_okay=False,
        readable=True,
    ),
]
OptionalExamplesFile = Annotated[
    Path | None,
    typer.Option(
        "--examples",
        help="The task's examples: one JSON object per line, or one array.",
        exists=True,
        dir_okay=False,
        readable=True,
    ),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        metavar="FILE",
        help="A recipe instead, as `export` prints it, or a mixed folder's recipe.json; - reads it from stdin.",
    ),
]
WeightsOption = Annotated[
    str | None, typer.Option("--weights", help="Merging weights by hand instead, as base=0.5,ag-news=0.5.")
]
TargetOption = Annotated[str | None, typer.Option(help="Expert fine-tuned for this task already (Eq. 1).")]
Alpha = Annotated[float | None, typer.Option(help="Share of the target, 0 to 1.")]
Temperature = Annotated[
    float | None, typer.Option(help="tau of softmax(-loss / tau); lower is more selective, the paper's is 5.")
]
WeightingOption = Annotated[
    str | None, typer.Option("--weighting", help="softmax, paper, gradient, uniform, search or blackbox.")
]
MaxExperts = Annotated[
    int | None, typer.Option(min=1, help="Experts that keep their weights, those that weigh most; all if left out.")
]
Budget = Annotated[int | None, typer.Option(help="Mixtures that weighting blackbox tries.")]
MethodOption = Annotated[
    str | None, typer.Option("--method", help=f"How parameters are merged: {', '.join(METHODS)}; linear if left out.")
]
MethodParams = Annotated[
    list[str] | None,
    typer.Option("--method-param", help="A parameter of the method, as density=0.3; may be repeated."),
]
ExpertsOption = Annotated[
    list[str] | None, typer.Option("--expert", help="Weigh only this expert beside the base; may be repeated.")
]
Seed = Annotated[int | None, typer.Option(help="Seed of the sampling when there are too many examples.")]
Judge = Annotated[
    bool,
    typer.Option(
        "--judge/--no-judge",
        help="Find out by cross-validation whether the mixture is worth using: at most five mixtures more.",
    ),
]
Tune = Annotated[
    bool,
    typer.Option(
        "--tune",
        help="Tell too what tuning a LoRA adapter of the base on the same examples comes to; decoders, needs peft.",
    ),
]
AsJSON = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def read_examples(path: Path) -> list[Any]:
    """The rows of a file of JSONL, or of one JSON array, unchecked.

    Raises:
        InvalidExamplesError: not UTF-8, or not JSON.
    """
    try:
        return read_rows(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidExamplesError(f"{path} is not UTF-8 text: {error}") from error


def read_recipe_file(path: Path) -> Any:
    """The JSON value of a file, or of stdin where its name is `-`, unchecked.

    Raises:
        InvalidMixError: it cannot be read, or is not JSON.
    """
    where = "stdin" if str(path) == "-" else str(path)
    try:
        return json.loads(sys.stdin.read() if where == "stdin" else path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidMixError(f"cannot read the recipe {where}: {error.strerror}", param="recipe") from error
    except ValueError as error:  # of the encoding too
        raise InvalidMixError(f"{where} holds no recipe: {error}", param="recipe") from error


def parse_weights(text: str) -> dict[str, float]:
    """`base=0.5,ag-news=0.5` as weights by model name.

    Raises:
        typer.BadParameter: not of that form; names the part.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, separator, number = (piece.strip() for piece in part.partition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not (name and separator and math.isfinite(weight)):
            raise typer.BadParameter(f"{part!r} is not NAME=NUMBER, as in base=0.5,ag-news=0.5", param_hint="--weights")
        if name in weights:
            raise typer.BadParameter(f"{name!r} is there twice", param_hint="--weights")
        weights[name] = weight
    return weights


def parse_method_params(pairs: list[str] | None) -> dict[str, Any] | None:
    """`["density=0.3", "normalize=false"]` as `method_params`, or None without any.

    Raises:
        typer.BadParameter: not of that form; names the part.
    """
    params: dict[str, Any] = {}
    for pair in pairs or ():
        name, separator, value = (piece.strip() for piece in pair.partition("="))
        try:
            params[name] = json.loads(value)
        except json.JSONDecodeError:
            separator = ""
        if not (name and separator):
            raise typer.BadParameter(
                f"{pair!r} is not NAME=VALUE, as in density=0.3 or normalize=false", param_hint="--method-param"
            )
    return params or None


@dataclass(frozen=True, kw_only=True)
class MixtureOptions:
    """How a cocktail is weighed and mixed: what `weigh`, `mix` and `create` have in common."""

    target: TargetOption = None
    alpha: Alpha = None
    temperature: Temperature = None
    weighting: WeightingOption = None
    budget: Budget = None
    method: MethodOption = None
    method_param: MethodParams = None
    expert: ExpertsOption = None
    max_experts: MaxExperts = None
    seed: Seed = None

    def body(
        self, *, examples: Path | None = None, merging_weights: str | None = None, recipe: Path | None = None
    ) -> dict[str, Any]:
        """The fields of a request. One that is not there means the configuration's default.

        Args:
            examples: file of the examples.
            merging_weights: as `base=0.5,ag-news=0.5`.
            recipe: file of a recipe.

        Raises:
            InvalidExamplesError, InvalidMixError: a file does not read.
            typer.BadParameter: weights or parameters of another form.
        """
        values = {
            "examples": None if examples is None else read_examples(examples),
            "merging_weights": None if merging_weights is None else parse_weights(merging_weights),
            "recipe": None if recipe is None else read_recipe_file(recipe),
            "target": self.target,
            "alpha": self.alpha,
            "temperature": self.temperature,
            "weighting": self.weighting,
            "budget": self.budget,
            "method": self.method,
            "method_params": parse_method_params(self.method_param),
            "experts": self.expert or None,
            "max_experts": self.max_experts,
            "seed": self.seed,
        }
        return {name: value for name, value in values.items() if value is not None}


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of a dataclass, such as `MixtureOptions`, where it takes one.

    Typer reads options off a signature, so this writes one: each field stands where its dataclass stood.
    """
    own = signature(command, eval_str=True)
    groups: dict[str, Any] = {
        name: parameter.annotation for name, parameter in own.parameters.items() if is_dataclass(parameter.annotation)
    }
    parameters: list[Parameter] = []
    for name, parameter in own.parameters.items():
        if name not in groups:
            parameters.append(parameter)
            continue
        hints = get_type_hints(groups[name], include_extras=True)
        parameters += [
            Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name])
            for field in fields(groups[name])
        ]

    @wraps(command)
    def run(*args: Any, **values: Any) -> None:
        chosen = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(*args, **chosen, **values)

    run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]  # inspect's own protocol
    return run
