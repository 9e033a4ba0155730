"""Cocktails as the API shows them. The request bodies are those of `cocktails.parsing`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictStr, WithJsonSchema

from cocktail_serve.cocktails.cocktail import Cocktail, Status, WeightingResult
from cocktail_serve.decisions import Form
from cocktail_serve.gateway.error_handlers import error_body
from cocktail_serve.gateway.schemas.errors import ErrorDetail
from cocktail_serve.gateway.schemas.generation_settings import GenerationView
from cocktail_serve.gateway.schemas.pages import Listed, PageView
from cocktail_serve.pool import BASE, Kind, Mode, Pool
from cocktail_serve.recipe import Recipe, settings_of
from cocktail_serve.weighting.candidates import Candidate
from cocktail_serve.weighting.verdict import Advice

# many readers of OpenAPI documents do not know `prefixItems`, which pydantic would describe a pair by
_Coefficient = Annotated[
    tuple[str, float],
    WithJsonSchema(
        {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "number"}]}, "minItems": 2, "maxItems": 2}
    ),
]


class RecipeView(BaseModel):
    """What reproduces the mixture bit for bit."""

    object: Literal["recipe"] = "recipe"
    digest: str = Field(description="SHA-256 of what follows, but the names.")
    version: int
    base: str = Field(description="Fingerprint of the pool's base.")
    coefficients: list[_Coefficient] = Field(description="Fingerprint and coefficient, in order of accumulation.")
    method: str
    method_params: dict[str, Any]
    dtype: str
    form: Mode = Field("merged", description="How it reaches the engine; part of the digest where it is unmerged.")
    names: dict[str, str] = Field(
        description="What the pool calls these models, by fingerprint, for people; not part of the digest."
    )

    @classmethod
    def of(cls, recipe: Recipe, pool: Pool | None) -> Self:
        """As the pool's server shows it; None: a pool that is no longer there."""
        members = {} if pool is None else pool.by_fingerprint
        used = {recipe.base, *(fingerprint for fingerprint, _ in recipe.coefficients)}
        names = {fingerprint: member.name for fingerprint, member in members.items() if fingerprint in used}
        return cls.model_validate({"digest": recipe.digest, **recipe.to_json(), "names": names})


class CandidateView(BaseModel):
    """Merging weights that were tried."""

    temperature: float | None
    alpha: float | None
    merging_weights: dict[str, float]
    loss: float | None = Field(
        description="What it was judged by (nats): the mean held-out loss of `search`, else the loss of its mixture."
    )
    chosen: bool = Field(description="Whether the cocktail is this one.")

    @classmethod
    def of(cls, candidate: Candidate) -> Self:
        return cls(**asdict(candidate))


class CocktailView(Listed):
    """One version of a name."""

    object: Literal["cocktail"] = "cocktail"
    id: str = Field(description="`name@digest8`; the digest is of the request, so known at once.")
    name: str
    pool: str
    kind: Kind
    current: bool = Field(description="Whether the bare name means this version.")
    status: Status
    progress: float = Field(ge=0, le=1)
    target: str | None
    alpha: float | None
    weighting: str | None
    temperature: float | None = Field(description="tau; what `search` chose, once it has.")
    method: str
    method_params: dict[str, Any]
    experts: list[str] | None
    max_experts: int | None = Field(description="How many experts keep their weights, where some are left out.")
    seed: int
    num_examples: int = Field(description="Examples used, after sampling.")
    form: Form | None = Field(
        description="How the examples ask the models, and so how the cocktail is asked for decisions: by its chat "
        "template, or as a text; null: by the chat template, where there is one."
    )
    losses: dict[str, float] = Field(description="Loss (nats) by model, as far as measured; the base is `base`.")
    merging_weights: dict[str, float] | None = Field(description="Coefficients by model; null until weighed.")
    entropy: float | None = Field(description="Entropy (nats) of the merging weights.")
    mixed_loss: float | None = Field(
        description="Loss of the mixture on the examples that it was weighed with, which flatters it; the report's "
        "`held_out_loss` does not."
    )
    validation_loss: float | None = Field(description="Loss of the mixture on the validation examples.")
    candidates: list[CandidateView] = Field(description="Merging weights that were tried, the chosen ones included.")
    recipe: RecipeView | None
    generation: GenerationView | None = Field(
        description="End tokens, sampling defaults and the chat template's digest, where a request does not say; of "
        "decoders, once there is a recipe."
    )
    created_at: int = Field(description="Unix time, seconds.")
    ready_at: int | None
    error: ErrorDetail | None = Field(description="Why it failed.")
    warnings: list[str]
    metadata: dict[str, str]

    @classmethod
    def of(cls, cocktail: Cocktail, pools: Mapping[str, Pool]) -> Self:
        options, chosen = cocktail.options, cocktail.chosen
        return cls(
            id=cocktail.id,
            name=cocktail.name,
            pool=cocktail.pool_id,
            kind=cocktail.kind,
            current=cocktail.current,
            status=cocktail.status,
            progress=cocktail.progress,
            target=options.target,
            alpha=options.alpha if chosen is None else chosen.alpha,
            weighting=options.weighting,
            temperature=options.temperature if chosen is None else chosen.temperature,
            method=options.method,
            method_params=dict(options.method_params),
            experts=None if options.experts is None else list(options.experts),
            max_experts=options.max_experts,
            seed=options.seed,
            num_examples=options.num_examples,
            form=options.form,
            losses=dict(cocktail.losses),
            merging_weights=None if cocktail.merging_weights is None else dict(cocktail.merging_weights),
            entropy=cocktail.entropy,
            mixed_loss=cocktail.mixed_loss,
            validation_loss=cocktail.validation_loss,
            candidates=[CandidateView.of(candidate) for candidate in cocktail.candidates],
            recipe=None if cocktail.recipe is None else RecipeView.of(cocktail.recipe, pools.get(cocktail.pool_id)),
            generation=_generation(cocktail, pools.get(cocktail.pool_id)),
            created_at=int(cocktail.created_at),
            ready_at=None if cocktail.ready_at is None else int(cocktail.ready_at),
            error=None if cocktail.error is None else _error_detail(cocktail),
            warnings=list(cocktail.warnings),
            metadata=dict(cocktail.metadata),
        )


class CocktailList(PageView[CocktailView]):
    """The newest first."""


class WeighingView(BaseModel):
    """What `dry_run` answers: nothing of it is kept."""

    object: Literal["cocktail.weighing"] = "cocktail.weighing"
    losses: dict[str, float]
    merging_weights: dict[str, float]
    entropy: float | None
    candidates: list[CandidateView]

    @classmethod
    def of(cls, weighing: WeightingResult) -> Self:
        return cls(
            losses=dict(weighing.losses),
            merging_weights=dict(weighing.merging_weights),
            entropy=weighing.entropy,
            candidates=[CandidateView.of(candidate) for candidate in weighing.candidates],
        )


class ExampleList(BaseModel):
    """The examples of a cocktail, after sampling."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]


class ModelReport(BaseModel):
    """One model's part in a cocktail."""

    model: str
    loss: float | None = Field(description="Loss (nats) on the examples.")
    merging_weight: float | None


class CocktailReport(BaseModel):
    """What a cocktail is made of and what that bought, for reading."""

    object: Literal["cocktail.report"] = "cocktail.report"
    id: str
    status: Status
    models: list[ModelReport] = Field(description="By merging weight, the largest first.")
    entropy: float | None
    effective_models: float | None = Field(
        description="exp(entropy): how many equally weighed models would be as spread out."
    )
    mixed_loss: float | None = Field(description="Loss of the mixture on the examples that it was weighed with.")
    validation_loss: float | None = Field(description="Loss of the mixture on the validation examples.")
    base_loss: float | None = Field(description="Loss of the base on the examples, which have no part in it.")
    best_single_loss: float | None = Field(
        description="Loss of the best of the models that were mixed on the examples, which chose it."
    )
    report_status: Literal["pending", "ready"] = Field(
        description="Whether what follows is known; it is found out in the background once the cocktail is ready."
    )
    held_out_loss: float | None = Field(
        description="Mean loss of the examples, each under a mixture that was weighed without its fold."
    )
    best_expert: str | None = Field(description="Expert of the least loss on all examples.")
    best_expert_loss: float | None = Field(description="Its loss on them, which chose it.")
    best_expert_held_out_loss: float | None = Field(
        description="Mean loss of the examples, each under the expert that loses least on the other folds: what "
        "`held_out_loss` compares with."
    )
    num_folds: int = Field(description="Mixtures made to find out, at most five.")
    advice: Advice | None = Field(
        description="use: better than the base; use_expert: an expert alone is, the mixture is not; "
        "unsure: the gain is within chance; no_gain: not better than the base. Null where nothing can be told."
    )
    verdict: str | None = Field(description="The advice in a sentence with its figures; else why there is none.")
    seconds: float | None = Field(description="From the request to ready.")
    warnings: list[str]

    @classmethod
    def of(cls, cocktail: Cocktail) -> Self:
        """As far as known: a report can be read while the job runs."""
        weights, found = cocktail.merging_weights or {}, cocktail.cross_validation
        names = list(dict.fromkeys([*weights, *cocktail.losses]))
        models = [
            ModelReport(model=name, loss=cocktail.losses.get(name), merging_weight=weights.get(name)) for name in names
        ]
        return cls(
            id=cocktail.id,
            status=cocktail.status,
            models=sorted(models, key=lambda model: -(model.merging_weight or 0.0)),
            entropy=cocktail.entropy,
            effective_models=None if cocktail.entropy is None else math.exp(cocktail.entropy),
            mixed_loss=cocktail.mixed_loss,
            validation_loss=cocktail.validation_loss,
            base_loss=cocktail.losses.get(BASE),
            best_single_loss=min(cocktail.losses.values(), default=None),
            report_status="ready" if found is not None and found.status == "ready" else "pending",
            held_out_loss=None if found is None else found.held_out_loss,
            best_expert=None if found is None else found.best_expert,
            best_expert_loss=None if found is None else found.best_expert_loss,
            best_expert_held_out_loss=None if found is None else found.best_expert_held_out_loss,
            num_folds=0 if found is None else found.num_folds,
            advice=None if found is None else found.advice,
            verdict=None if found is None else found.text,
            seconds=None if cocktail.ready_at is None else cocktail.ready_at - cocktail.created_at,
            warnings=list(cocktail.warnings),
        )


class CurrentVersion(BaseModel):
    """The body of `PATCH /v1/cocktails/{name}`."""

    model_config = ConfigDict(extra="forbid")

    current: StrictStr | None = Field(description="The version that the name shall mean; null: the newest ready one.")


class CocktailDeleted(BaseModel):
    id: str
    object: Literal["cocktail"] = "cocktail"
    deleted: Literal[True] = True


def _generation(cocktail: Cocktail, pool: Pool | None) -> GenerationView | None:
    """None too where the pool no longer has the models."""
    if pool is None or pool.kind != "decoder" or cocktail.recipe is None:
        return None
    settings = settings_of(cocktail.recipe, pool)
    return None if settings is None else GenerationView.of(settings)


def _error_detail(cocktail: Cocktail) -> ErrorDetail:
    assert cocktail.error is not None
    return ErrorDetail.model_validate(error_body(cocktail.error.exception())["error"])
