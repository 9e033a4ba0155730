"""A fine-tuning job in OpenAI's words: checked, named by digest, and said again as the body of a cocktail."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Final, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from cocktail_serve.digest import digest_of
from cocktail_serve.errors import InvalidRequestError, NotFoundError
from cocktail_serve.pool import BASE, NAME_PATTERN, Pool
from cocktail_serve.storable_text import check_text
from cocktail_serve.suggestions import did_you_mean

AUTO: Final = "auto"

MAX_POOL_IN_NAME = 55
"""Characters of a pool's id in a name made from it: with the job's part it stays within 64."""


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _check_number(value: Any) -> Any:
    if value is None or value == AUTO or _is_positive(value):
        return value
    raise PydanticCustomError("hyperparameter", "must be 'auto' or a number above 0")


def _check_whole(value: Any) -> Any:
    if value is None or value == AUTO or (isinstance(value, int) and _is_positive(value)):
        return value
    raise PydanticCustomError("hyperparameter", "must be 'auto' or a whole number above 0")


def _schema(numbers: str) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"const": AUTO}, {"type": numbers, "exclusiveMinimum": 0}, {"type": "null"}]})


# not unions, whose errors would name the branches tried as if they were fields
_Number = Annotated[Any, AfterValidator(_check_number), _schema("number")]
_Whole = Annotated[Any, AfterValidator(_check_whole), _schema("integer")]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Hyperparameters(_Body):
    """Of a training, which does not take place: echoed, and otherwise ignored."""

    batch_size: _Whole = None
    learning_rate_multiplier: _Number = None
    n_epochs: _Whole = None


class SupervisedMethod(_Body):
    hyperparameters: Hyperparameters | None = None


class JobMethod(_Body):
    type: str = Field(description="`supervised`; no other is served.")
    supervised: SupervisedMethod | None = None
    dpo: Any = Field(None, description="Refused.")
    reinforcement: Any = Field(None, description="Refused.")


class JobBody(_Body):
    """The body of `POST /v1/fine_tuning/jobs`."""

    model: str = Field(description="`<pool>`, or `<pool>/<expert>` for a target.", examples=["flan/ag-news"])
    training_file: str = Field(description="Id of an uploaded file: the examples.")
    validation_file: str | None = Field(None, description="Id of another, whose loss is reported.")
    suffix: str | None = Field(
        None, description=f"Name of the model, {NAME_PATTERN}; left out: made from the pool and the job."
    )
    metadata: dict[str, str] | None = Field(
        None,
        description="Up to 16 pairs of strings. `alpha`, `temperature`, `weighting`, `method`, `method_params` (JSON), "
        "`experts` (comma-separated), `max_experts` and `budget` mean what they do in a cocktail; others are kept.",
    )
    hyperparameters: Hyperparameters | None = Field(None, description="Echoed and ignored: nothing is trained.")
    method: JobMethod | None = Field(
        None, description='`{"type": "supervised"}`, with hyperparameters that count above those beside it.'
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="Of the sampling of examples; 0 if left out.")
    integrations: list[Any] | None = Field(None, description="Refused unless empty.")


@dataclass(frozen=True, slots=True)
class JobRequest:
    """What a job was asked with; what omissions mean is filled in.

    Attributes:
        metadata: None where none was given.
        hyperparameters: all three, `auto` where left out.
    """

    model: str
    training_file: str
    validation_file: str | None
    suffix: str | None
    metadata: Mapping[str, str] | None
    hyperparameters: Mapping[str, str | int | float]
    seed: int

    @classmethod
    def of(cls, body: JobBody) -> Self:
        """The request of a body.

        Raises:
            InvalidRequestError: it asks for what is not served: another method, integrations.
        """
        hyperparameters = body.hyperparameters
        if body.method is not None:
            _check_supervised(body.method)
            if body.method.supervised is not None:
                hyperparameters = body.method.supervised.hyperparameters or hyperparameters
        if body.integrations:
            raise InvalidRequestError("no integrations are served; leave them out", param="integrations")
        for key, value in (body.metadata or {}).items():
            check_text(key + value, param="metadata")
        given = {} if hyperparameters is None else hyperparameters.model_dump(exclude_none=True)
        return cls(
            model=body.model,
            training_file=body.training_file,
            validation_file=body.validation_file,
            suffix=body.suffix,
            metadata=body.metadata,
            hyperparameters={name: given.get(name, AUTO) for name in Hyperparameters.model_fields},
            seed=body.seed or 0,
        )

    @property
    def ignored(self) -> dict[str, str | int | float]:
        """Hyperparameters that were asked for."""
        return {name: value for name, value in self.hyperparameters.items() if value != AUTO}

    @property
    def digest(self) -> str:
        """SHA-256 of all of it, 64 hex characters: jobs of equal digests are identical."""
        return digest_of(self.to_json())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def cocktail(self, pools: Mapping[str, Pool], *, visible: Collection[str] | None) -> dict[str, Any]:
        """The body of `POST /v1/cocktails` that asks for the same, without its examples.

        Args:
            visible: ids of the pools that are there for the tenant; None: all.

        Raises:
            NotFoundError: `model` is no pool and no expert of one.
            InvalidRequestError: an option in the metadata that cannot be read.
        """
        pool_id, _, expert = self.model.partition("/")
        there = pools.keys() if visible is None else pools.keys() & visible
        if pool_id not in there or self.model == f"{pool_id}/{BASE}" or (self.model != pool_id and not expert):
            raise _no_model(self.model, there)
        if expert and expert not in pools[pool_id].experts:
            raise _no_model(self.model, [pool_id, *(f"{pool_id}/{name}" for name in pools[pool_id].experts)])
        metadata = self.metadata or {}
        return {
            "name": f"{pool_id[:MAX_POOL_IN_NAME]}-{self.digest[:8]}" if self.suffix is None else self.suffix,
            "pool": pool_id,
            "target": expert or None,
            "seed": self.seed,
            "metadata": dict(metadata),
            **{name: _option(name, metadata[name]) for name in _OPTIONS if name in metadata},
        }


_OPTIONS: Mapping[str, tuple[Callable[[str], Any], str]] = {
    "alpha": (float, "a number"),
    "temperature": (float, "a number"),
    "weighting": (str, "a string"),
    "method": (str, "a string"),
    "method_params": (json.loads, "a JSON object"),
    "experts": (lambda text: [name.strip() for name in text.split(",")], "names with commas between them"),
    "budget": (int, "a whole number"),
    "max_experts": (int, "a whole number"),
}
"""Options of a cocktail that metadata carry: how their text is read, and what it must be."""

_NAMES: Mapping[str, str] = {
    "name": "suffix",
    "pool": "model",
    "target": "model",
    "examples": "training_file",
    "validation_examples": "validation_file",
    **{name: f"metadata.{name}" for name in _OPTIONS},
}
"""The field of a job that stands for a field of a cocktail."""


def param_of_job(param: str | None) -> str | None:
    """A field of a cocktail, in dotted form, as the job calls it."""
    if param is None:
        return None
    head, dot, rest = param.partition(".")
    if head in ("examples", "validation_examples"):
        return _NAMES[head]
    return f"{_NAMES.get(head, head)}{dot}{rest}"


def _option(name: str, text: str) -> Any:
    read, expected = _OPTIONS[name]
    try:
        return read(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(
            f"metadata.{name}: must be {expected}, got {text[:80]!r}", param=f"metadata.{name}"
        ) from error


def _check_supervised(method: JobMethod) -> None:
    for other in ("dpo", "reinforcement"):
        if method.type == other or getattr(method, other) is not None:
            raise InvalidRequestError(
                f"method {other!r} is not served: models are mixed by examples; use 'supervised', or leave method out",
                param="method.type" if method.type == other else f"method.{other}",
            )
    if method.type != "supervised":
        raise InvalidRequestError(f"method.type: must be 'supervised', got {method.type!r}", param="method.type")


def _no_model(model: str, there: Collection[str]) -> NotFoundError:
    meant = did_you_mean(model, there)
    return NotFoundError(
        f"there is no model {model!r} to fine-tune{f'{meant} Name' if meant else ': name'} a pool, or <pool>/<expert> "
        f"for a target; there are: {', '.join(sorted(there))}",
        param="model",
        code="model_not_found",
    )
