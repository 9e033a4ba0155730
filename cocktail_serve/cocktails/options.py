"""What decides a mixture, defaults filled in: kept with the cocktail, and what its digest is of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from cocktail_serve.config import Weighting
from cocktail_serve.decisions import Form
from cocktail_serve.digest import digest_of
from cocktail_serve.examples import ExampleSet
from cocktail_serve.pool import Pool

REQUEST_VERSION = 1
"""Part of every digest: raised when the same options come to mean another mixture."""

CHOSEN_BY_WEIGHTING: dict[str, tuple[str, ...]] = {
    "search": ("temperature",),
    "gradient": ("alpha",),
    "blackbox": ("temperature", "alpha"),
}
"""What a weighting that tries mixtures chooses itself, and so takes from no request."""


@dataclass(frozen=True, slots=True)
class CocktailOptions:
    """All that decides a mixture except the text of its examples; what omissions mean is filled in and so recorded.

    Attributes:
        name: the cocktail's name; for an inline cocktail the pool's id.
        members: fingerprint by name of the models that the mixture may need, and
        text_digest: the pool's: while both are as they were, other experts of the pool may come and go. Empty where
            an earlier release took the request.
        peers: what Eq. 2 weighs: the base and the experts taken, without the target. Empty without examples.
        alpha: share of the target; None where there is no target, or where the weighting chooses it.
        weighting: as asked for; None where nothing is weighed.
        temperature: tau; None where no softmax is taken, or where the weighting chooses it.
        budget: mixtures that `blackbox` tries; None for the other weightings.
        experts: the limit that was asked for, sorted; None: all.
        max_experts: how many experts keep their weights, those that weigh most; None: all that are weighed.
        merging_weights: weights given by hand, or None.
        examples_digest: digest of the examples after sampling, or None without examples.
        num_examples: examples after sampling.
        num_examples_given: examples in the request.
        validation_digest: digest of the validation examples after sampling, or None without any.
        num_validation_examples: validation examples after sampling.
        form: how the examples ask a decoder, and so how the cocktail is asked for decisions; None without examples, and
            where an earlier release took the request.
    """

    name: str
    pool: str
    pool_fingerprint: str
    target: str | None = None
    alpha: float | None = None
    temperature: float | None = None
    weighting: Weighting | None = None
    method: str = "linear"
    method_params: Mapping[str, Any] = field(default_factory=dict)
    experts: tuple[str, ...] | None = None
    max_experts: int | None = None
    peers: tuple[str, ...] = ()
    budget: int | None = None
    seed: int = 0
    merging_weights: Mapping[str, float] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    examples_digest: str | None = None
    num_examples: int = 0
    num_examples_given: int = 0
    validation_digest: str | None = None
    num_validation_examples: int = 0
    inline: bool = False
    members: Mapping[str, str] = field(default_factory=dict)
    text_digest: str = ""
    form: Form | None = None

    @property
    def scored(self) -> tuple[str, ...]:
        """Models whose loss is measured: the peers, and the target, whose loss decides nothing but is reported."""
        return self.peers if not self.peers or self.target is None else (*self.peers, self.target)

    @property
    def searches(self) -> bool:
        """Whether the weights are chosen by the losses of mixtures, beside those of the models."""
        return self.weighting in CHOSEN_BY_WEIGHTING

    @property
    def digest(self) -> str:
        """SHA-256 over the pool's content, the examples and the options that decide the mixture; not name or metadata.

        `paper` is `softmax` by another name, `experts` naming all is null: equal requests have equal digests.
        """
        return digest_of(
            {
                "version": REQUEST_VERSION,
                "pool": self.pool,
                "pool_fingerprint": self.pool_fingerprint,
                "examples": self.examples_digest,
                "peers": list(self.peers),
                "target": self.target,
                "alpha": self.alpha,
                "weighting": "softmax" if self.weighting == "paper" else self.weighting,
                "temperature": self.temperature,
                "method": self.method,
                "method_params": dict(self.method_params),
                "merging_weights": None if self.merging_weights is None else dict(self.merging_weights),
                "seed": self.seed,
                # left out where there is none, so that the ids of other cocktails stay what they were
                **({} if self.max_experts is None else {"max_experts": self.max_experts}),
                **({} if self.budget is None else {"budget": self.budget}),
                **({} if self.validation_digest is None else {"validation_examples": self.validation_digest}),
            }
        )

    def fits(self, pool: Pool) -> bool:
        """Whether the pool still has all that the mixture is made of."""
        if self.pool_fingerprint == pool.fingerprint:
            return True
        there = {name: member.fingerprint for name, member in pool.members.items()}
        return bool(self.members) and self.text_digest == pool.text_digest and self.members.items() <= there.items()

    def to_json(self) -> dict[str, Any]:
        """A JSON value that `from_json` reads back to equal options."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Reads what `to_json` wrote."""
        experts = value["experts"]
        return cls(**{**value, "peers": tuple(value["peers"]), "experts": None if experts is None else tuple(experts)})


@dataclass(frozen=True, slots=True)
class CocktailRequest:
    """A request for a cocktail, fit for its pool."""

    options: CocktailOptions
    examples: ExampleSet | None
    validation: ExampleSet | None = None

    @property
    def digest(self) -> str:
        """Digest of the options, the examples included: known before anything is scored."""
        return self.options.digest
