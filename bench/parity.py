"""The same mixtures by mergekit 0.1.5 and by us, compared element by element.

    python -m bench.parity --environment build/mergekit > parity.json

Makes mergekit an environment of its own, where there is none yet, and pools of a small Llama: experts far from the
base (farther than fine-tunes are, so that SLERP turns) and near it. Each row is one mixture: how far the two results
lie apart, in units in the last place of the output dtype, and what is known of the elements more than one apart.
Models are given to mergekit in the order in which the recipe sums them.
mergekit computes in float32 (`dtype: float32`) and rounds once to `out_dtype`, as we do; its own common setting, all
arithmetic in bfloat16, is a row of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.environment import make_environment
from bench.machine import describe_machine
from cocktail_serve.checkpoints.mixture import iter_mixture
from cocktail_serve.checkpoints.opening import open_pool
from cocktail_serve.config import PoolConfig
from cocktail_serve.dtypes import DType
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import make_recipe
from tests.models import make_decoder, pool_section

MERGEKIT = "mergekit==0.1.5"

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One mixture, in our words."""

    method: str
    weights: Mapping[str, float]
    params: Mapping[str, Any] = field(default_factory=dict)


CASES = (
    Case("linear", {"base": 0.2, "red": 0.5, "green": 0.3}),
    Case("linear", {"base": 1.5, "red": -0.5}),
    Case("task_arithmetic", {"red": 0.6, "green": 0.4}, {"lambda": 0.7}),
    Case("ties", {"red": 1.0, "green": 1.0, "blue": 1.0}, {"density": 0.2}),
    Case("ties", {"red": 0.5, "green": 0.3, "blue": 0.15}, {"density": 0.5, "lambda": 0.8}),
    Case("ties", {"red": 0.9, "green": -0.4}, {"density": 0.5, "normalize": False}),
    Case("ties", {"red": 0.5, "green": 0.3, "blue": 0.15}, {"density": 1.0}),
    Case("slerp", {"base": 0.7, "red": 0.3}),
    Case("slerp", {"base": 0.5, "red": 0.5}),
)


def mergekit_config(
    case: Case, folders: Mapping[str, Path], *, dtype: DType, out_dtype: DType, pool_params: Mapping[str, Any]
) -> dict[str, Any]:
    """The case in mergekit's words, every default written out."""
    config: dict[str, Any] = {"merge_method": case.method, "dtype": dtype, "out_dtype": out_dtype}
    if case.method == "linear":
        models = [{"model": str(folders[n]), "parameters": {"weight": w}} for n, w in case.weights.items()]
        return config | {"models": models, "parameters": {"normalize": True}}
    config["base_model"] = str(folders["base"])
    if case.method == "slerp":
        _, t = case.weights.values()
        return config | {"models": [{"model": str(folders[n])} for n in case.weights], "parameters": {"t": t}}
    density = {"density": pool_params["density"]} if "density" in pool_params else {}
    models = [{"model": str(folders[n]), "parameters": {"weight": w, **density}} for n, w in case.weights.items()]
    shared = {"lambda": pool_params["lambda"], "normalize": pool_params.get("normalize", False), "int8_mask": False}
    return config | {"models": models, "parameters": shared}


def ulps_apart(one: Tensor, other: Tensor) -> Tensor:
    """How many numbers of their dtype lie between two tensors, plus one where they differ; int64."""

    def ordinal(values: Tensor) -> Tensor:
        bits = values.view(torch.int32 if values.dtype == torch.float32 else torch.int16).long()
        return torch.where(bits < 0, (-1 << (8 * values.element_size() - 1)) - bits, bits)

    return (ordinal(one) - ordinal(other)).abs()


def _compare(
    case: Case, params: Mapping[str, Any], ours: Tensors, theirs: Tensors, models: Mapping[str, Tensors]
) -> dict[str, Any]:
    over, tied, undecided, cancelled, num_elements, num_differing, largest, of_terms = 0, 0, 0, 0, 0, 0, 0, 0.0
    for name, tensor in ours.items():
        apart = ulps_apart(tensor, theirs[name])
        terms = torch.stack([models[m][name].double().abs() for m in {"base", *case.weights}]).amax(0)
        info = torch.finfo(tensor.dtype)
        _, exponent = torch.frexp(terms.clamp_min(info.smallest_normal))
        unit = torch.ldexp(torch.full_like(terms, info.eps), exponent - 1)
        difference = (tensor.double() - theirs[name].double()).abs() / unit
        num_elements += tensor.numel()
        num_differing += int((apart > 0).sum())
        is_over = apart > 1
        over += int(is_over.sum())
        if case.method == "ties":
            is_tied, is_undecided = _arbitrary(case, params["density"], name, models)
            tied += int((is_over & is_tied).sum())
            undecided += int((is_over & is_undecided & ~is_tied).sum())
            difference[is_tied | is_undecided] = 0.0
            is_over = is_over & ~is_tied & ~is_undecided
            apart = torch.where(is_tied | is_undecided, 0, apart)
        cancelled += int((is_over & (difference <= 1.0)).sum())
        largest = max(largest, int(apart.max()))
        of_terms = max(of_terms, float(difference.max()))
    return {
        "num_elements": num_elements,
        "num_differing": num_differing,
        "num_over_1_ulp": over,
        "of_these": {
            "equal_magnitudes_at_the_cut": tied,
            "sign_sum_within_rounding_of_0": undecided,
            "within_1_ulp_of_the_largest_term": cancelled,
            "else": over - tied - undecided - cancelled,
        },
        "max_ulps_elsewhere": largest,
        "max_ulps_of_largest_term_elsewhere": round(of_terms, 3),
    }


def _arbitrary(case: Case, density: float, name: str, models: Mapping[str, Tensors]) -> tuple[Tensor, Tensor]:
    """Elements of TIES that its definition leaves open.

    Returns:
        Where a task vector is of the very magnitude at which the cut falls and only some of those are kept; where the
        sum that elects the sign is smaller than its own float32 rounding.
    """
    base = models["base"][name].float()
    is_tied = torch.zeros(base.shape, dtype=torch.bool)
    total, mass = torch.zeros(base.shape, dtype=torch.float64), torch.zeros(base.shape, dtype=torch.float64)
    for model, weight in case.weights.items():
        vector = models[model][name].float() - base
        magnitudes = vector.abs()
        k = max(1, int(density * vector.numel()))
        cut = magnitudes.flatten().sort(descending=True, stable=True).values[k - 1]
        if int((magnitudes >= cut).sum()) > k:
            is_tied |= magnitudes == cut
        kept = torch.where(magnitudes >= cut, vector.double(), 0.0)
        total += weight * kept
        mass += abs(weight) * kept.abs()
    return is_tied, (total.abs() <= 1e-6 * mass) & (mass > 0)


def _make_pool(folder: Path, *, dtype: DType, perturbation: float) -> dict[str, Path]:
    names = ("base", "red", "green", "blue")
    return {
        name: make_decoder(
            folder / name,
            dtype=getattr(torch, dtype),
            hidden_size=128,
            perturbation_seed=index or None,
            perturbation=perturbation,
        )
        for index, name in enumerate(names)
    }


def _open(folders: Mapping[str, Path], cache: Path) -> Pool:
    config = PoolConfig.model_validate(pool_section("p", "decoder", folders, {"type": "fake"}))
    return open_pool(config, cache_dir=cache)


def _load(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def run(python: Path, work: Path, pools: Sequence[tuple[Literal["far", "near"], DType]]) -> list[dict[str, Any]]:
    """Every case on every pool, by both."""
    made = []
    jobs = []
    for kind, dtype in pools:
        folders = _make_pool(work / f"{kind}-{dtype}", dtype=dtype, perturbation=0.7 if kind == "far" else 0.01)
        pool = _open(folders, work / "cache")
        arithmetics: tuple[DType, ...] = ("float32",) if dtype == "float32" else ("float32", dtype)
        for case in CASES:
            recipe = make_recipe(pool, case.weights, dtype=dtype, method=case.method, method_params=case.params)
            names = {member.fingerprint: member.name for member in pool}
            in_order = [names[fingerprint] for fingerprint, _ in recipe.coefficients]
            weights = {name: case.weights[name] for name in in_order if name in case.weights}
            ordered = replace(case, weights=weights)
            for arithmetic in arithmetics:
                out = work / "theirs" / str(len(jobs))
                config = mergekit_config(
                    ordered, folders, dtype=arithmetic, out_dtype=dtype, pool_params=recipe.method_params
                )
                jobs.append({"config": config, "out": str(out)})
                made.append((kind, dtype, arithmetic, case, recipe, folders, out))
    script = Path(__file__).with_name("run_mergekit.py")
    subprocess.run([python, script], input=json.dumps(jobs).encode(), check=True, stdout=sys.stderr)
    rows = []
    for kind, dtype, arithmetic, case, recipe, folders, out in made:
        ours = dict(iter_mixture(recipe, _open(folders, work / "cache").by_fingerprint))
        models = {name: _load(folder) for name, folder in folders.items()}
        rows.append(
            {
                "experts": kind,
                "dtype": dtype,
                "mergekit_dtype": arithmetic,
                "method": case.method,
                "weights": dict(case.weights),
                "method_params": dict(recipe.method_params),
                **_compare(case, recipe.method_params, ours, _load(out), models),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, default=Path("build/mergekit"), help="mergekit's environment")
    arguments = parser.parse_args()
    torch_version = torch.__version__.partition("+")[0]
    python = make_environment(arguments.environment.absolute(), [MERGEKIT, f"torch=={torch_version}"])
    with tempfile.TemporaryDirectory(prefix="cocktail-parity-") as work:
        rows = run(
            python, Path(work), [("far", "bfloat16"), ("near", "bfloat16"), ("far", "float32"), ("near", "float32")]
        )
    print(json.dumps({"bench": "parity", "mergekit": MERGEKIT, "machine": describe_machine(), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
