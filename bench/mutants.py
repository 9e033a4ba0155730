"""Which faults the unit tests would let through: mutmut changes the rules that matter most, one place at a time.

Works on a copy of the tree, and runs of each mutant only the tests that reach it, in a fork. `make mutants` installs
mutmut beside the environment, not into it.

    python -m bench.mutants --tool .mutmut [--survivors] [PART ...]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent

TURNS = tuple(
    f"cocktail_serve/engines/turns/{name}.py"
    for name in ("exclusive", "hold", "in_flight", "lease", "mixing", "policy", "shared", "slots", "wait_queue")
)

REPLICAS = tuple(f"cocktail_serve/engines/replicas/{name}.py" for name in ("dispatcher", "placement"))

PARTS: dict[str, tuple[str, *tuple[str, ...]]] = {
    "cocktail_serve/weighting": ("cocktail_serve/weighting/", "tests/unit/weighting"),
    "cocktail_serve/recipe.py": (
        "cocktail_serve/recipe.py",
        "tests/unit/test_recipe.py",
        "tests/unit/test_generation.py",
    ),
    "cocktail_serve/tenants/limits.py": ("cocktail_serve/tenants/limits.py", "tests/unit/tenants/test_limits.py"),
    "plugins/vllm_cocktail/fence.py": ("vllm_cocktail/fence.py", "tests/unit/test_fence.py"),
    **{part: (part, "tests/unit/engines/turns") for part in TURNS},
    **{part: (part, "tests/unit/engines/replicas") for part in REPLICAS},
}
"""What is changed, as it lies in the copy, and the tests that must notice, by what it is called here."""

NOTICED = frozenset({"killed", "timeout", "suspicious", "caught by type check", "segfault"})


def copy_tree(folder: Path) -> None:
    """What git knows or would take. The plugin lies on top: mutmut takes a file's path for its module's name."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in listed.stdout.splitlines():
        source, target = ROOT / name, folder / name.removeprefix("plugins/")
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def run(folder: Path, tool: Path, parts: Sequence[str], *, limit_s: float) -> str:
    """Makes and tries the mutants; the outcome of each, a line each, with what the survivors change."""
    sources = [PARTS[part][0] for part in parts]
    tests = list(dict.fromkeys(test for part in parts for test in PARTS[part][1:]))
    with (folder / "pyproject.toml").open("a") as config:
        config.write(
            f"\n[tool.mutmut]\nsource_paths = {sources!r}\npytest_add_cli_args_test_selection = {tests!r}\n"
            'also_copy = ["cocktail_serve", "vllm_cocktail", "bench", "docs", "tests"]\n'
        )
    # behind what is installed, so that pytest and the others stay those of the environment
    mutmut = f"import sys; sys.path.append({str(tool)!r}); from mutmut.__main__ import cli; cli()"
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_WAIT_POLICY": "passive"}

    def call(*words: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", mutmut, *words],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )

    ran = call("run", timeout_s=limit_s)
    if ran.returncode != 0:
        raise SystemExit(f"mutmut failed:\n{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}")
    return call("results", "--all", "true", timeout_s=600).stdout


def outcomes(results: str) -> dict[str, str]:
    """The outcome of each mutant, by its name."""
    return dict(re.findall(r"^\s*(\S+): ([\w ]+)$", results, flags=re.MULTILINE))


def part_of(mutant: str) -> str:
    for part, (source, *_) in PARTS.items():
        if mutant.startswith(source.removesuffix("/").removesuffix(".py").replace("/", ".") + "."):
            return part
    raise ValueError(f"{mutant} is of no part that was changed")


def table(found: Iterable[tuple[str, str]]) -> str:
    """Markdown: of each part, how many mutants there were and how many the tests noticed."""
    by_part: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for mutant, outcome in found:
        by_part[part_of(mutant)]["noticed" if outcome in NOTICED else "survived"] += 1
    lines = ["| part | mutants | noticed | share |", "|---|---:|---:|---:|"]
    for part, counts in by_part.items():
        total = counts.total()
        lines.append(f"| `{part}` | {total} | {counts['noticed']} | {counts['noticed'] / total:.1%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}; none given: all")
    parser.add_argument("--tool", type=Path, required=True, help="folder that mutmut is installed in")
    parser.add_argument("--survivors", action="store_true", help="show what each mutant that survived changes")
    parser.add_argument("--limit-s", type=float, default=3600.0, help="seconds after which the run is given up")
    args = parser.parse_args()
    unknown = set(args.parts) - PARTS.keys()
    if unknown:
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory(prefix="cocktail-mutants-") as name:
        folder = Path(name)
        copy_tree(folder)
        found = outcomes(run(folder, args.tool.resolve(), args.parts or list(PARTS), limit_s=args.limit_s))
        print(table(found.items()))
        survivors = [mutant for mutant, outcome in found.items() if outcome not in NOTICED]
        if args.survivors:
            show = f"import sys; sys.path.append({str(args.tool.resolve())!r}); from mutmut.__main__ import cli; cli()"
            for mutant in survivors:
                subprocess.run([sys.executable, "-W", "ignore", "-c", show, "show", mutant], cwd=folder, check=False)


if __name__ == "__main__":
    main()
