"""The cocktail: one immutable version of a name, as it stands at one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self, TypedDict

from cocktail_serve import errors
from cocktail_serve.cocktails.options import CocktailOptions
from cocktail_serve.decisions import Form
from cocktail_serve.errors import CocktailError
from cocktail_serve.generation_settings import GenerationSettings
from cocktail_serve.pool import Kind, Pool
from cocktail_serve.recipe import Recipe
from cocktail_serve.weighting.candidates import Candidate, chosen_of
from cocktail_serve.weighting.verdict import Advice

Status = Literal["queued", "scoring", "mixing", "ready", "failed", "cancelled"]

FINAL: frozenset[Status] = frozenset({"ready", "failed", "cancelled"})
"""States that a job never leaves by itself."""

DIGEST8 = 8
"""Characters of the request digest that stand for a version in its id."""


def version_id(name: str, digest: str) -> str:
    """`name@digest8`."""
    return f"{name}@{digest[:DIGEST8]}"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a job failed, kept so that it reads the same after a restart.

    Attributes:
        type: name of the class in `errors`.
    """

    type: str
    code: str
    message: str
    param: str | None = None

    @classmethod
    def of(cls, error: CocktailError) -> Self:
        return cls(type=type(error).__name__, code=error.code, message=error.message, param=error.param)

    def to_json(self) -> dict[str, str | None]:
        return asdict(self)

    def exception(self) -> CocktailError:
        """The error itself, to raise where the failure meets a caller that waited for it."""
        kind: type[CocktailError] = getattr(errors, self.type, CocktailError)
        return kind(self.message, param=self.param, code=self.code)


@dataclass(frozen=True, slots=True)
class CrossValidation:
    """What a cocktail can be expected to do, or why nothing can be told; see `cross_validation`.

    Attributes:
        status: `pending` while it is in the making.
        advice: see `Verdict`; None until ready, and where nothing can be told.
        text: the verdict in a sentence with its figures; else why there is none.
        held_out_loss: mean loss (nats) over the examples, each under a mixture that was weighed without it.
        best_expert: expert of the least mean loss on the examples.
        best_expert_loss: its loss on them, which chose it.
        best_expert_held_out_loss: mean loss over the examples, each under the expert that the other folds choose.
        num_folds: mixtures that were made to find out.
    """

    status: Literal["pending", "ready"]
    advice: Advice | None = None
    text: str | None = None
    held_out_loss: float | None = None
    best_expert: str | None = None
    best_expert_loss: float | None = None
    num_folds: int = 0
    best_expert_held_out_loss: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Cocktail:
    """A snapshot of one version of a name, or of an inline cocktail.

    Three numbers count for it: `sequence` orders the versions of a name, `epoch` tells jobs that work on it apart, and
    `change` the writes of its row.

    Attributes:
        uid: key of its rows, never shown: an id that comes again after a deletion is another cocktail.
        sequence: order in which versions were last asked for; the newest ready one is current.
        digest: of the request, 64 hex characters, known at once.
        progress: 0 to 1.
        created_at: seconds since the epoch, as `ready_at`.
        current: whether the bare name means this version; settled by the catalog, which knows the others.
        options: as asked for, with what omissions meant filled in.
        losses: loss (nats) by model name, `base` first, as far as measured.
        merging_weights: coefficients by model name over base, experts and target; None until weighed.
        entropy: of the shares that the weights stand for (nats); None where they are none: a negative one, or
            coefficients of task vectors by hand.
        mixed_loss: loss of the mixture on the same examples; None without examples.
        validation_loss: loss of the mixture on the validation examples; None without any.
        recipe: None until weighed.
        candidates: the merging weights that were tried; empty until weighed, and where nothing is weighed.
        owner: id of the gateway whose job it is, as long as it is not final.
        epoch: how often it was given to a gateway: a job of an earlier epoch has lost it.
        change: number of the change that wrote it; a write says which one it goes back to.
        cross_validation: of its report; None until ready, and where nobody asked for it.
        key_id: of the key that asked for it first; None where none was asked for.
        example_bytes: size of its examples in the store.
    """

    uid: str
    tenant: str
    name: str
    pool_id: str
    kind: Kind
    digest: str
    options: CocktailOptions
    created_at: float
    sequence: int
    status: Status = "queued"
    progress: float = 0.0
    ready_at: float | None = None
    used_at: float = 0.0
    current: bool = False
    losses: Mapping[str, float] = field(default_factory=dict)
    merging_weights: Mapping[str, float] | None = None
    entropy: float | None = None
    mixed_loss: float | None = None
    validation_loss: float | None = None
    recipe: Recipe | None = None
    error: Failure | None = None
    warnings: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    owner: str | None = field(default=None, compare=False)
    epoch: int = field(default=0, compare=False)
    change: int = field(default=0, compare=False)
    cross_validation: CrossValidation | None = field(default=None, compare=False)
    key_id: str | None = None
    example_bytes: int = 0

    @property
    def id(self) -> str:
        return version_id(self.name, self.digest)

    @property
    def inline(self) -> bool:
        return self.options.inline

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.options.metadata

    @property
    def chosen(self) -> Candidate | None:
        """The candidate that this cocktail is."""
        return chosen_of(self.candidates)

    @property
    def is_final(self) -> bool:
        return self.status in FINAL


class CocktailChanges(TypedDict, total=False):
    """What may change of a cocktail, by the names of its fields."""

    status: Status
    progress: float
    ready_at: float | None
    used_at: float
    losses: Mapping[str, float]
    merging_weights: Mapping[str, float] | None
    entropy: float | None
    mixed_loss: float | None
    validation_loss: float | None
    recipe: Recipe | None
    error: Failure | None
    warnings: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    owner: str | None
    epoch: int
    cross_validation: CrossValidation | None


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a model id means now: the parameters a request is answered by.

    Attributes:
        model_id: the canonical id, `name@digest8` for a cocktail's name.
        generation: how it is called where a request does not say; of a decoder.
        form: how it is asked for decisions; of a decoder.
    """

    model_id: str
    pool: Pool
    recipe: Recipe
    generation: GenerationSettings
    form: Form


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A line of the model list."""

    id: str
    created: int
    kind: Kind
    pool: str


@dataclass(frozen=True, slots=True)
class WeightingResult:
    """Losses and what follows from them.

    Attributes:
        losses: loss (nats) by model name; empty where nothing was measured.
        merging_weights: coefficients over base, experts and target, by the rule of the method.
        entropy: as in `Cocktail`.
        candidates: the merging weights that were tried, the chosen ones among them; empty where nothing was weighed.
    """

    losses: Mapping[str, float]
    merging_weights: Mapping[str, float]
    entropy: float | None
    candidates: tuple[Candidate, ...] = ()

    @property
    def chosen(self) -> Candidate | None:
        """The candidate that these weights are."""
        return chosen_of(self.candidates)
