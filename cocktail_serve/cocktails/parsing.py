"""Reads what a tenant asks for: the body of `POST /v1/cocktails` checked, its defaults filled in."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cocktail_serve.cocktails.options import CHOSEN_BY_WEIGHTING, CocktailOptions, CocktailRequest
from cocktail_serve.config import CocktailDefaults, Settings, Weighting
from cocktail_serve.decisions import form_of
from cocktail_serve.dtypes import DType
from cocktail_serve.errors import (
    ConflictError,
    InvalidMixError,
    InvalidRequestError,
    NotFoundError,
    WeightingNotServedError,
    params_named,
)
from cocktail_serve.examples import ExampleSet, parse_examples
from cocktail_serve.imported_recipe import read_recipe
from cocktail_serve.methods import Method, MethodName, find_method
from cocktail_serve.pool import BASE, NAME_PATTERN, Kind, Pool
from cocktail_serve.recipe import check_mode, make_recipe
from cocktail_serve.request_schema import parse_as
from cocktail_serve.storable_text import check_text
from cocktail_serve.suggestions import did_you_mean
from cocktail_serve.weighting.blackbox import BUDGET, MAX_BUDGET, check_available
from cocktail_serve.weighting.softmax import check_alpha, check_temperature

PAPER_TEMPERATURE = 5.0
PAPER_ALPHA = 0.5
"""LM-Cocktail's own settings (arXiv 2311.13534, section 4), what `weighting: "paper"` stands for."""

MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512
"""As OpenAI's API bounds `metadata`."""

_WEIGHED_BY = ("examples", "target", "alpha", "experts", "max_experts", "temperature", "weighting", "budget")
"""Fields of a request that say how a mixture is weighed: none of them stands beside weights that are given."""


class InlineBody(BaseModel):
    """The `cocktail` object of a generation or embedding request; null means the same as left out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    examples: Any = Field(None, description="Few-shot examples of the task; five are enough.")
    target: str | None = Field(None, description="Expert fine-tuned for this task already (Eq. 1).")
    alpha: float | None = Field(None, description="Share of the target, 0 to 1.")
    temperature: float | None = Field(None, description="tau of softmax(-loss / tau); lower is more selective.")
    weighting: Weighting | None = Field(
        None,
        description="How losses become weights; paper: tau 5, alpha 0.5; gradient: coefficients learned "
        "from the examples, as far as held-out loss falls; search: tau and alpha by held-out loss; "
        "blackbox: any coefficients, without gradients.",
    )
    budget: int | None = Field(
        None, ge=1, le=MAX_BUDGET, description=f"Mixtures that blackbox tries; {BUDGET} if left out."
    )
    method: MethodName | None = Field(None, description="How parameters are merged; linear if left out.")
    method_params: dict[str, Any] | None = Field(None, description="Parameters of the method; linear takes none.")
    experts: list[str] | None = Field(None, description="Experts to weigh beside the base; null: all of the pool.")
    max_experts: int | None = Field(
        None, ge=1, description="At most so many experts keep their weights, those that weigh most; null: all."
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="Seed of the sampling of examples.")
    merging_weights: dict[str, float] | None = Field(None, description="Weights given by hand, by the method's rule.")
    recipe: dict[str, Any] | None = Field(
        None,
        description="A recipe of another server, or a folder's `recipe.json`: the same mixture bit for bit, in place "
        "of all other fields that decide it.",
    )
    metadata: dict[str, str] | None = Field(None, description="Up to 16 pairs of strings, kept with the cocktail.")


class CocktailBody(InlineBody):
    """The body of `POST /v1/cocktails`."""

    name: str = Field(description=f"Name of the cocktail, {NAME_PATTERN}; the same name again makes a new version.")
    pool: str = Field(description="Id of the pool to mix from.")
    validation_examples: Any = Field(
        None, description="Examples that decide nothing: the loss of the mixture on them is reported."
    )


def parse_request(
    body: Mapping[str, Any],
    *,
    settings: Settings,
    pools: Mapping[str, Pool],
    visible: Collection[str] | None = None,
) -> CocktailRequest:
    """Checks the body of `POST /v1/cocktails`. Pure and bound by the CPU: megabytes of examples belong off the loop.

    Args:
        pools: all of the configuration: no cocktail may take the name of any.
        visible: ids of the pools that are there for the tenant; None: all.

    Raises:
        InvalidRequestError: an unknown or malformed field; `param` names it.
        InvalidExamplesError: examples that do not fit the pool.
        InvalidMixError: options that break their rule or exclude each other.
        MethodNotServedError: the method needs merged parameters, and the pool is served unmerged.
        WeightingNotServedError: the weighting tries more mixtures than the pool's engine can merge beside traffic.
        NotFoundError: an unknown pool or expert.
        ConflictError: the name is a pool's.
    """
    parsed = parse_as(CocktailBody, body)
    if not re.fullmatch(NAME_PATTERN, parsed.name):
        raise InvalidRequestError(
            f"{parsed.name!r} is not a name of a cocktail: lower-case letters, digits, '.', '_' and '-', at most 64, "
            "beginning with a letter or digit",
            param="name",
        )
    if parsed.name == BASE:
        raise InvalidRequestError(f"the name {BASE!r} is reserved for the pools' base models", param="name")
    if parsed.name in pools:
        raise ConflictError(f"the name {parsed.name!r} is taken by a pool; choose another", param="name")
    pool = pools.get(parsed.pool)
    if pool is None or not (visible is None or pool.id in visible):
        known = sorted(pools.keys() if visible is None else pools.keys() & visible)
        raise NotFoundError(
            f"there is no pool {parsed.pool!r}; there are: {', '.join(known)}{did_you_mean(parsed.pool, known)}",
            param="pool",
            code="pool_not_found",
        )
    request = _resolve(parsed, parsed.name, pool, settings, inline=False)
    return request if parsed.validation_examples is None else _with_validation(request, parsed, pool, settings)


def parse_inline(
    cocktail: Any, *, pool: Pool, settings: Settings, dtype: DType | None = None, is_served: bool = True
) -> CocktailRequest:
    """Checks the `cocktail` object of a request whose `model` is the pool.

    Args:
        dtype: what mixtures round to; None: as the pool's engine runs.
        is_served: whether a serving engine is to make the mixture, which makes fewer than can be made offline.

    Raises:
        As `parse_request`; `param` begins with `cocktail.`.
    """
    with params_named(lambda param: "cocktail" if param is None else f"cocktail.{param}"):
        body = parse_as(InlineBody, cocktail)
        return _resolve(body, pool.id, pool, settings, inline=True, dtype=dtype, is_served=is_served)


def _resolve(
    body: InlineBody,
    name: str,
    pool: Pool,
    settings: Settings,
    *,
    inline: bool,
    dtype: DType | None = None,
    is_served: bool = True,
) -> CocktailRequest:
    if body.recipe is not None:
        body = _by_recipe(body, pool, dtype or settings.pool(pool.id).engine.dtype_over(pool.base))
    seed = body.seed or 0
    method = find_method(body.method or "linear")
    check_mode(method.name, pool.mode)
    options = CocktailOptions(
        name,
        pool.id,
        pool.fingerprint,
        method=method.name,
        method_params=method.check_params(body.method_params or {}, seed=seed),
        seed=seed,
        metadata=_metadata(body.metadata or {}),
        inline=inline,
        text_digest=pool.text_digest,
    )
    if body.alpha is not None:
        check_alpha(body.alpha)
    if body.temperature is not None:
        check_temperature(body.temperature)
    if body.merging_weights is not None:
        weights = _by_hand(body, pool, method, options.method_params)
        options = replace(options, members=_fingerprints(pool, weights), merging_weights=weights)
        return CocktailRequest(options, examples=None)
    experts = _experts(body, pool)
    if body.target is not None:
        _check_target(body.target, experts, pool)
    examples = None
    if body.examples is not None:
        examples = _parse_examples(body.examples, pool, settings, seed=seed)
    elif body.target is None:
        raise InvalidMixError(
            "give examples, merging_weights, a target or a recipe: there is nothing to mix", param="examples"
        )
    elif experts is not None:
        raise InvalidMixError(
            "experts are weighed by examples and there are none; give examples, or leave experts out to mix the target "
            "with the base",
            param="experts",
        )
    peers = () if examples is None else _peers(pool, experts, body.target)
    _check_count(method, peers or (BASE,), body.target, pool)
    weighting, temperature, alpha = _weighting(body, settings.defaults, pool.kind)
    if weighting == "gradient" and examples is not None:
        _check_gradient(method, options.method_params)
        if is_served:
            _check_gradient_is_served(pool)
    options = replace(
        options,
        members=_fingerprints(pool, (*peers, *filter(None, [body.target]))),
        target=body.target,
        alpha=None if body.target is None else alpha,
        weighting=None if examples is None else weighting,
        temperature=None if examples is None else temperature,
        budget=(body.budget or BUDGET) if examples is not None and weighting == "blackbox" else None,
        experts=experts,
        max_experts=_max_experts(body, peers, weighting),
        peers=peers,
        examples_digest=None if examples is None else examples.digest,
        num_examples=0 if examples is None else len(examples),
        num_examples_given=0 if examples is None else examples.num_given,
        form=form_of(examples) if pool.kind == "decoder" else None,
    )
    return CocktailRequest(options, examples)


def _parse_examples(rows: Any, pool: Pool, settings: Settings, *, seed: int) -> ExampleSet:
    config = settings.pool(pool.id)
    return parse_examples(
        rows, pool.kind, max_examples=config.max_examples, seed=seed, separator=config.example_separator
    )


def _fingerprints(pool: Pool, names: Iterable[str]) -> dict[str, str]:
    return {name: pool.member(name).fingerprint for name in sorted({BASE, *names})}


def _with_validation(request: CocktailRequest, body: CocktailBody, pool: Pool, settings: Settings) -> CocktailRequest:
    with params_named(lambda _: "validation_examples"):
        validation = _parse_examples(body.validation_examples, pool, settings, seed=request.options.seed)
    options = replace(request.options, validation_digest=validation.digest, num_validation_examples=len(validation))
    return replace(request, options=options, validation=validation)


def _by_recipe(body: InlineBody, pool: Pool, dtype: DType) -> InlineBody:
    """The request for the same recipe by merging weights: both are one cocktail."""
    for other in ("merging_weights", "method", "method_params", *_WEIGHED_BY):
        if getattr(body, other) is not None:
            raise InvalidMixError(
                f"a recipe is the whole mixture and excludes {other!r}; give one of the two", param=other
            )
    imported = read_recipe(body.recipe)
    fields = {
        "recipe": None,
        "merging_weights": imported.weights_in(pool, dtype=dtype),
        "method": imported.recipe.method,
        "method_params": dict(imported.recipe.method_params),
    }
    return body.model_copy(update=fields)


def _by_hand(body: InlineBody, pool: Pool, method: Method, method_params: Mapping[str, Any]) -> dict[str, float]:
    for other in _WEIGHED_BY:
        if getattr(body, other) is not None:
            raise InvalidMixError(
                f"merging_weights cover the whole mixture and exclude {other!r}; give one of the two", param=other
            )
    assert body.merging_weights is not None
    # the rule of sums and finite values has one home; dtype is the engine's matter and decides nothing here
    make_recipe(pool, body.merging_weights, dtype="float32", method=method.name, method_params=method_params)
    order = {name: position for position, name in enumerate(pool.members)}
    coefficients = method.coefficients(body.merging_weights)
    return {name: float(coefficients[name]) for name in sorted(coefficients, key=order.__getitem__)}


def _max_experts(body: InlineBody, peers: Sequence[str], weighting: Weighting) -> int | None:
    """The limit where it leaves an expert out: a request in which it changes nothing is the one without."""
    if body.max_experts is None:
        return None
    if not peers or weighting in ("blackbox", "gradient"):
        raise InvalidMixError(
            "max_experts leaves out experts of the softmax over losses, and "
            + (
                "there are no examples to weigh them by"
                if not peers
                else f"{weighting!r} chooses every coefficient itself"
            ),
            param="max_experts",
        )
    return body.max_experts if body.max_experts < len([name for name in peers if name != BASE]) else None


def _experts(body: InlineBody, pool: Pool) -> tuple[str, ...] | None:
    if body.experts is None:
        return None
    for index, name in enumerate(body.experts):
        if name == BASE:
            raise InvalidMixError("the base always takes part; 'experts' names the others", param=f"experts.{index}")
        pool.member(name, param=f"experts.{index}")
    if len(set(body.experts)) < len(body.experts):
        raise InvalidMixError("an expert is named twice", param="experts")
    return tuple(sorted(body.experts))


def _check_target(target: str, experts: tuple[str, ...] | None, pool: Pool) -> None:
    if target == BASE:
        raise InvalidMixError(
            "the target is an expert fine-tuned for the task; the base takes part in every mixture anyway",
            param="target",
        )
    pool.member(target, param="target")
    if experts is not None and target in experts:
        raise InvalidMixError(
            f"target {target!r} is among the experts it is mixed with (Eq. 1 sums over the others); name it once",
            param="target",
        )


def _peers(pool: Pool, experts: tuple[str, ...] | None, target: str | None) -> tuple[str, ...]:
    taken = tuple(pool.experts) if experts is None else experts
    return (BASE, *(name for name in taken if name != target))


def _check_count(method: Method, peers: Sequence[str], target: str | None, pool: Pool) -> None:
    names = (*peers, *(() if target is None else (target,)))
    num_models = len({pool.member(name).fingerprint for name in names})
    if method.num_models is not None and num_models != method.num_models:
        raise InvalidMixError(
            f"method {method.name!r} mixes {method.num_models} different models; here the base and "
            f"{num_models - 1} others would take part: choose with 'experts', as in \"experts\": "
            f'["{next(iter(pool.experts), "NAME")}"], or by a target without examples',
            param="experts",
        )


def _weighting(
    body: InlineBody, defaults: CocktailDefaults, kind: Kind
) -> tuple[Weighting, float | None, float | None]:
    """Weighting, temperature and alpha: the request's, else those its weighting stands for, else the server's.

    None: the weighting reads none, or chooses it.
    """
    weighting: Weighting = body.weighting or defaults.weighting
    fallback = (defaults.temperature_of(kind), defaults.alpha)
    for option in CHOSEN_BY_WEIGHTING.get(weighting, ()):
        if getattr(body, option) is not None:
            if body.weighting == weighting:
                raise InvalidMixError(
                    f"weighting {weighting!r} chooses {option} itself; leave it out, or use 'softmax'", param=option
                )
            weighting = "softmax"  # the server's default gives way to what the request says
            break
    if weighting == "paper":
        fallback = (PAPER_TEMPERATURE, PAPER_ALPHA)
        given = {"temperature": body.temperature, "alpha": body.alpha}
        for (option, value), fixed in zip(given.items(), fallback, strict=True):
            if value is not None and value != fixed:
                if body.weighting == "paper":
                    raise InvalidMixError(
                        f"weighting 'paper' means {option} {fixed:g}, got {value:g}; 'softmax' lets you choose",
                        param=option,
                    )
                weighting = "softmax"
    temperature = fallback[0] if body.temperature is None else float(body.temperature)
    alpha = fallback[1] if body.alpha is None else float(body.alpha)
    if weighting == "blackbox":
        check_available()
    elif body.budget is not None:
        raise InvalidMixError(f"budget is of weighting 'blackbox'; {weighting!r} takes none", param="budget")
    if weighting in CHOSEN_BY_WEIGHTING and body.examples is not None:
        return weighting, None if "temperature" in CHOSEN_BY_WEIGHTING[weighting] else temperature, body.alpha
    return weighting, None if weighting == "uniform" else temperature, alpha


def _check_gradient(method: Method, method_params: Mapping[str, Any]) -> None:
    """The coefficients that are learned are of a plain sum, which no other scale multiplies."""
    if not method.is_weighted_sum:
        raise InvalidMixError(
            f"weighting 'gradient' learns the coefficients of a sum, and method {method.name!r} is none; "
            "use 'linear' or 'task_arithmetic', or weighting 'softmax'",
            param="method",
        )
    if method_params.get("lambda", 1.0) != 1.0:
        raise InvalidMixError(
            "lambda scales all coefficients, and weighting 'gradient' learns each; leave lambda out",
            param="method_params.lambda",
        )


def _check_gradient_is_served(pool: Pool) -> None:
    if pool.kind == "decoder" and pool.mode == "merged":
        raise WeightingNotServedError(
            "weighting 'gradient' tries a hundred mixtures, and each would be merged into the engine that serves this "
            "pool: use 'search' or 'softmax', learn the coefficients offline (cocktail-serve weigh --weighting "
            "gradient) and give them as merging_weights, or have the operator serve adapters in a pool with "
            "engine.mode: unmerged",
            param="weighting",
        )


def _metadata(pairs: Mapping[str, str]) -> dict[str, str]:
    if len(pairs) > MAX_METADATA_PAIRS:
        raise InvalidRequestError(
            f"metadata holds {len(pairs)} pairs; at most {MAX_METADATA_PAIRS} are kept", param="metadata"
        )
    for key, value in pairs.items():
        if len(key) > MAX_METADATA_KEY or len(value) > MAX_METADATA_VALUE:
            raise InvalidRequestError(
                f"metadata keys have at most {MAX_METADATA_KEY} characters and values {MAX_METADATA_VALUE}; "
                f"{key[:MAX_METADATA_KEY]!r} does not",
                param="metadata",
            )
        check_text(key + value, param="metadata")
    return dict(pairs)
