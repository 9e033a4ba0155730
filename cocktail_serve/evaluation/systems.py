"""What is compared: LM-Cocktail's systems as the paper names them, and the obvious alternatives.

A system is made for a task, from the task's few-shot examples or its fine-tuned expert, and can then be measured on any
task. The target, the expert fine-tuned for the very task, takes part only where the system's line says so: in all
others it is left out, as if nobody had fine-tuned one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from cocktail_serve.errors import ClientError, InvalidRequestError
from cocktail_serve.evaluation.backend import Backend, DecoderBackend, EnsemblePart, EvaluatedMixture
from cocktail_serve.examples import ExampleSet, TextExample
from cocktail_serve.pool import BASE, Kind
from cocktail_serve.recipe import one_hot
from cocktail_serve.suggestions import did_you_mean
from cocktail_serve.weighting.candidates import mean

LEAST_SHARE = 1e-4
"""Members of an ensemble that weigh less are left out: each one costs a whole model."""


class NotMade(ClientError):
    """A system that cannot be made for a task: says what is missing. Its cell stays empty."""


@dataclass(frozen=True)
class Occasion:
    """What a system is made from.

    Attributes:
        task: name of the task.
        examples: the task's few-shot examples, or None.
        target: the pool's expert fine-tuned for the task, or None.
        peers: experts that may take part, the target not among them.
        multitask: name in the pool of a model fine-tuned on many tasks, which never takes part in a mixture.
        pooled: the examples of several tasks together, for `unified`.
        temperature: tau of softmax; None: the configuration's default.
        alpha: share of the target.
        budget: mixtures that `blackbox` tries; None: its default.
        method_params: by merging method.
    """

    task: str
    examples: ExampleSet | None = None
    target: str | None = None
    peers: tuple[str, ...] = ()
    multitask: str | None = None
    pooled: ExampleSet | None = None
    temperature: float | None = None
    alpha: float = 0.5
    budget: int | None = None
    seed: int = 0
    method_params: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def given(self) -> ExampleSet:
        if self.examples is None:
            raise NotMade(f"{self.task} has no examples: a train.jsonl beside it, or --examples")
        return self.examples

    def expert(self) -> str:
        if self.target is None:
            raise NotMade(f"{self.task} has no expert fine-tuned for it: name one with --target {self.task}=EXPERT")
        return self.target


@dataclass(frozen=True, slots=True)
class Contender:
    """A system made for a task, ready to be asked.

    Attributes:
        parts: one mixture, or the members of an ensemble with their shares, which sum to 1.
        shots: put before every prompt (in-context examples), or None.
        about: see `Cell.about`.
    """

    parts: tuple[EnsemblePart, ...]
    shots: ExampleSet | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> dict[str, Any]:
        """What decides its answers."""
        return {
            "parts": [[part.recipe.digest, part.share] for part in self.parts],
            "shots": None if self.shots is None else self.shots.digest,
        }


@dataclass(frozen=True, slots=True)
class System:
    """A row of the tables.

    Attributes:
        about: one line, for the documentation.
        reads_temperature: whether it is one row for each temperature.
        kinds: pools that have it.
    """

    name: str
    about: str
    make: Callable[[Backend, Occasion], Contender]
    reads_temperature: bool = False
    kinds: tuple[Kind, ...] = ("decoder", "encoder")


def _base(backend: Backend, occasion: Occasion) -> Contender:
    return _single(backend, BASE)


def _icl(backend: Backend, occasion: Occasion) -> Contender:
    shots = occasion.given()
    if not all(isinstance(example, TextExample) for example in shots):
        raise NotMade(f"{occasion.task}: in-context examples are texts (input, output), not messages")
    return Contender(_single(backend, BASE).parts, shots, {"num_shots": len(shots)})


def _fine_tuned(backend: Backend, occasion: Occasion) -> Contender:
    return _single(backend, occasion.expert())


def _multitask(backend: Backend, occasion: Occasion) -> Contender:
    if occasion.multitask is None:
        raise NotMade("no multitask model: name its folder, or an expert, with --multitask")
    return _single(backend, occasion.multitask)


def _best_single(backend: Backend, occasion: Occasion) -> Contender:
    losses = {
        name: mean(of_model) for name, of_model in backend.losses((BASE, *occasion.peers), occasion.given()).items()
    }
    best = min(losses, key=losses.__getitem__)
    single = _single(backend, best)
    return Contender(single.parts, None, {**single.about, "losses": losses})


def _soup(backend: Backend, occasion: Occasion) -> Contender:
    names = (BASE, *occasion.peers)
    return _mixture(backend.mix({"merging_weights": {name: 1.0 / len(names) for name in names}}))


def _lm_cocktail_2(backend: Backend, occasion: Occasion) -> Contender:
    return _mixture(backend.mix({"target": occasion.expert(), "alpha": occasion.alpha}))


def _lm_cocktail_10(backend: Backend, occasion: Occasion) -> Contender:
    return _mixture(backend.mix(_softmax(occasion) | {"target": occasion.expert(), "alpha": occasion.alpha}))


def _lm_cocktail(backend: Backend, occasion: Occasion) -> Contender:
    return _mixture(backend.mix(_softmax(occasion)))


def _unified(backend: Backend, occasion: Occasion) -> Contender:
    if occasion.pooled is None:
        raise NotMade("unified needs the examples of several tasks")
    return _mixture(backend.mix(_softmax(occasion) | {"examples": occasion.pooled.to_json()}))


def _blackbox(backend: Backend, occasion: Occasion) -> Contender:
    body = _weighed(occasion) | {"weighting": "blackbox"}
    return _mixture(backend.mix(body if occasion.budget is None else body | {"budget": occasion.budget}))


def _gradient(backend: Backend, occasion: Occasion) -> Contender:
    return _mixture(backend.mix(_softmax(occasion) | {"weighting": "gradient"}))


def _tune(backend: Backend, occasion: Occasion) -> Contender:
    recipe, about = cast(DecoderBackend, backend).tune(occasion.given(), seed=occasion.seed)
    return Contender((EnsemblePart(recipe, 1.0),), None, about)


def _search(backend: Backend, occasion: Occasion) -> Contender:
    return _mixture(backend.mix(_weighed(occasion) | {"weighting": "search"}))


def _search_10(backend: Backend, occasion: Occasion) -> Contender:
    return _mixture(backend.mix(_weighed(occasion) | {"weighting": "search", "target": occasion.expert()}))


def _ties(backend: Backend, occasion: Occasion) -> Contender:
    return _mixture(backend.mix(_softmax(occasion) | _method("ties", occasion)))


def _dare(backend: Backend, occasion: Occasion) -> Contender:
    return _mixture(backend.mix(_softmax(occasion) | _method("dare_linear", occasion)))


def _ensemble(backend: Backend, occasion: Occasion) -> Contender:
    mixed = backend.mix(_softmax(occasion))
    members = {name: share for name, share in mixed.merging_weights.items() if share >= LEAST_SHARE}
    total = math.fsum(members.values())
    parts = tuple(
        EnsemblePart(one_hot(backend.pool, name, dtype=backend.dtype), share / total) for name, share in members.items()
    )
    return Contender(parts, None, mixed.about)


def _softmax(occasion: Occasion) -> dict[str, Any]:
    body = _weighed(occasion) | {"weighting": "softmax"}
    return body if occasion.temperature is None else body | {"temperature": occasion.temperature}


def _weighed(occasion: Occasion) -> dict[str, Any]:
    return {"examples": occasion.given().to_json(), "experts": list(occasion.peers), "seed": occasion.seed}


def _method(name: str, occasion: Occasion) -> dict[str, Any]:
    return {"method": name, "method_params": dict(occasion.method_params.get(name, {}))}


def _single(backend: Backend, name: str) -> Contender:
    return Contender(
        (EnsemblePart(one_hot(backend.pool, name, dtype=backend.dtype), 1.0),), None, {"merging_weights": {name: 1.0}}
    )


def _mixture(mixed: EvaluatedMixture) -> Contender:
    return Contender((EnsemblePart(mixed.recipe, 1.0),), None, mixed.about)


SYSTEMS: Mapping[str, System] = {
    system.name: system
    for system in (
        System("base", "The pool's base as it is.", _base),
        System("icl", "The base with the examples before every prompt.", _icl, kinds=("decoder",)),
        System("fine-tuned", "The target alone.", _fine_tuned),
        System("multitask", "A model fine-tuned on many tasks at once.", _multitask),
        System("lm-cocktail-2", "Target and base, alpha and 1 - alpha (Eq. 3).", _lm_cocktail_2),
        System(
            "lm-cocktail-10",
            "Target by alpha, base and other experts by softmax of their losses (Eq. 1 and 2).",
            _lm_cocktail_10,
            reads_temperature=True,
        ),
        System(
            "lm-cocktail",
            "Without fine-tuning: base and other experts by softmax (Eq. 2).",
            _lm_cocktail,
            reads_temperature=True,
        ),
        System(
            "gradient",
            "Any coefficients, learned from those of lm-cocktail on as far as held-out loss falls.",
            _gradient,
            reads_temperature=True,
        ),
        System(
            "tune",
            "No mixture: a LoRA adapter of the base, tuned on the examples as far as held-out loss falls.",
            _tune,
            kinds=("decoder",),
        ),
        System("blackbox", "Any coefficients, searched without gradients (LoraHub).", _blackbox),
        System(
            "unified",
            "One mixture for all tasks: Eq. 2 on the examples of all.",
            _unified,
            reads_temperature=True,
        ),
        System("best-single", "Of base and other experts, the one of least loss on the examples.", _best_single),
        System("soup", "Base and other experts, all alike.", _soup),
        System("search", "As lm-cocktail, tau by held-out loss.", _search),
        System("search-10", "As lm-cocktail-10, tau and alpha by held-out loss.", _search_10),
        System("ties", "The weights of lm-cocktail, merged by TIES.", _ties, reads_temperature=True),
        System("dare", "The weights of lm-cocktail, merged by DARE.", _dare, reads_temperature=True),
        System(
            "ensemble",
            "The models of lm-cocktail all asked, probabilities (encoders: similarities) averaged by its weights.",
            _ensemble,
            reads_temperature=True,
        ),
    )
}


def find_systems(names: Sequence[str] | None, kind: Kind) -> list[System]:
    """The systems of these names, in the order given; None: all that a pool of the kind has.

    Raises:
        InvalidRequestError: an unknown name, or a system that the kind has not.
    """
    if names is None:
        return [system for system in SYSTEMS.values() if kind in system.kinds]
    for name in names:
        if name not in SYSTEMS:
            raise InvalidRequestError(
                f"there is no system {name!r}; there are: {', '.join(SYSTEMS)}{did_you_mean(name, SYSTEMS)}",
                param="systems",
            )
        if kind not in SYSTEMS[name].kinds:
            raise InvalidRequestError(
                f"system {name!r} is for {' and '.join(SYSTEMS[name].kinds)} pools", param="systems"
            )
    return [SYSTEMS[name] for name in dict.fromkeys(names)]
