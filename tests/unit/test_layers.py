"""Imports go one way: each package imports only what lies below it, and a framework stays where it belongs."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from bench.structure import imports, ring_in

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "cocktail_serve"
PLUGIN = ROOT / "plugins" / "vllm_cocktail"

NOUNS = {"errors", "build", "digest", "dtypes", "ids", "storable_text", "pool", "methods", "recipe", "progress"} | {
    "examples",
    "example_rows",
    "chat_rows",
    "decisions",
    "decision_rows",
    "questions",
    "generation_settings",
    "imported_recipe",
    "loading",
    "library_process",
    "request_schema",
    "suggestions",
}
"""Modules that import nothing but each other."""

MATHS = {"merging", "weighting"}
BYTES = {"checkpoints", "scoring"}
STORED = {"database", "tenants", "usage"}

BELOW: dict[str, set[str]] = {
    **dict.fromkeys(NOUNS, NOUNS),
    "merging": NOUNS,
    "weighting": NOUNS,
    "scoring": NOUNS | {"checkpoints"},
    "config": NOUNS,
    "checkpoints": NOUNS | {"config", "merging"},
    "database": {"errors"},
    "engines": NOUNS | BYTES | MATHS | {"config"},
    "usage": NOUNS | {"database"},
    "tenants": NOUNS | {"config", "database", "usage"},
    "cocktails": NOUNS | MATHS | BYTES | STORED | {"config", "engines"},
    "finetuning": NOUNS | STORED | {"config", "cocktails"},
    "batches": NOUNS | STORED | {"finetuning"},
    "offline": NOUNS | MATHS | BYTES | {"config", "engines", "cocktails"},
    "api_client": {"errors"},
    "evaluation": NOUNS | MATHS | BYTES | {"api_client", "config", "engines", "cocktails", "offline"},
    "gateway": NOUNS | MATHS | BYTES | STORED | {"config", "engines", "cocktails", "finetuning", "batches", "logs"},
    # the maths of a recipe, and the errors and bounds that both sides name
    "vllm_cocktail": NOUNS | {"merging", "checkpoints", "config"},
}
"""What each package may import of the others; the command line may import all."""

AT_HOME: dict[str, set[str]] = {
    "fastapi": {"gateway", "vllm_cocktail"},  # vLLM's own app takes the plugin's routes
    "vllm": {"vllm_cocktail"},
    "sentence_transformers": {"engines"},
    "transformers": {"checkpoints", "engines", "scoring", "offline", "evaluation"},
    "sqlalchemy": {"database", "cocktails", "finetuning", "batches", "tenants", "usage"},
    "typer": {"cli"},
}
"""Where a framework may be imported."""


@cache
def imports_of(path: Path) -> tuple[str, ...]:
    """Read once: many tests ask for the same files."""
    return tuple(imports(path.read_text(encoding="utf-8")))


def files_of(package: str) -> list[Path]:
    folder = PLUGIN if package == PLUGIN.name else PACKAGE / package
    return sorted(folder.rglob("*.py")) or [folder.with_suffix(".py")]


def imported(package: str) -> Iterator[tuple[str, list[str]]]:
    """The file and the parts of each import."""
    for path in files_of(package):
        for name in imports_of(path):
            yield str(path.relative_to(ROOT)), name.split(".")


def packages() -> set[str]:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    return folders | {PLUGIN.name}


def test_every_package_has_its_place() -> None:
    assert packages() - {"cli"} <= BELOW.keys()


@pytest.mark.parametrize("package", sorted(BELOW))
def test_a_package_imports_only_what_lies_below_it(package: str) -> None:
    wrong = [
        (file, ".".join(parts))
        for file, parts in imported(package)
        if parts[0] == PACKAGE.name and len(parts) > 1 and parts[1] not in BELOW[package] | {package, "__version__"}
    ]
    assert not wrong


def test_no_packages_import_each_other_in_a_ring() -> None:
    """Of what is imported, not of what the table allows: a ring goes unseen in either package alone."""
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    arrows: defaultdict[str, set[str]] = defaultdict(set)
    for package in packages() | modules:
        for _, (root, *inner) in imported(package):
            targets = inner[:1] if root == PACKAGE.name else [root] if root == PLUGIN.name else []
            arrows[package] |= set(targets) - {package}
    assert arrows["gateway"] >= {"cocktails", "engines"}
    assert not ring_in(arrows)


WINGS = {
    "turns": {"turns"},
    "replicas": {"replicas"},
    "vllm": {"vllm", "turns", "replicas"},
    "in_process": {"in_process"},
}
"""Of `engines`: what each may import beside the modules on its ground. The wings never meet."""


@pytest.mark.parametrize("wing", WINGS)
def test_wings_of_engines_do_not_meet(wing: str) -> None:
    folders = {path.parent.name for path in (PACKAGE / "engines").glob("*/__init__.py")}
    assert folders == WINGS.keys()
    wrong = [
        (file, ".".join(parts))
        for file, parts in imported(f"engines/{wing}")
        if parts[:2] == [PACKAGE.name, "engines"] and len(parts) > 2 and parts[2] in folders - WINGS[wing]
    ]
    assert not wrong


def test_the_ground_of_engines_knows_no_wing() -> None:
    ground = [path for path in (PACKAGE / "engines").glob("*.py") if path.name != "__init__.py"]
    names = [name for path in ground for name in imports_of(path)]
    assert not [name for name in names if name.startswith(tuple(f"cocktail_serve.engines.{wing}" for wing in WINGS))]


def test_a_ring_is_found() -> None:
    assert set(ring_in({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


@pytest.mark.parametrize("framework", AT_HOME)
def test_a_framework_is_imported_only_where_it_is_at_home(framework: str) -> None:
    found = {package for package in packages() for _, parts in imported(package) if parts[0] == framework}
    assert found <= AT_HOME[framework]


LIBRARIES = ("transformers", "sentence_transformers")


def loose_imports(source: str) -> list[str]:
    """What functions import of the libraries that several threads load by, outside of `with library_loading`."""
    tree = ast.parse(source)
    behind = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.With)
        and any(isinstance(i.context_expr, ast.Name) and i.context_expr.id == "library_loading" for i in node.items)
        for inner in ast.walk(node)
    }
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [
        name
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in behind
        for name in imports(ast.unparse(node))
        if name.partition(".")[0] in LIBRARIES
    ]


@pytest.mark.parametrize("package", ["checkpoints", "engines", "scoring"])
def test_libraries_are_loaded_behind_one_door(package: str) -> None:
    """By whatever runs on threads of the server. Modules that import them at their head are behind the door of
    `build_engine`, which imports those modules."""
    loose = {str(path.relative_to(ROOT)): loose_imports(path.read_text(encoding="utf-8")) for path in files_of(package)}
    assert not {file: names for file, names in loose.items() if names}


def test_a_loose_import_is_found() -> None:
    inside = "def load():\n    with library_loading:\n        from transformers import AutoConfig"
    assert loose_imports(inside) == []
    assert loose_imports("def load():\n    from transformers import AutoConfig") == ["transformers.AutoConfig"]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import fastapi.routing", ["fastapi.routing"]),
        ("from cocktail_serve import errors", ["cocktail_serve.errors"]),
        ("def load():\n    from vllm.config import ModelConfig as Config", ["vllm.config.ModelConfig"]),
        ("if TYPE_CHECKING:\n    import torch", ["torch"]),
    ],
)
def test_imports_are_found_wherever_they_stand(source: str, found: list[str]) -> None:
    assert list(imports(source)) == found


def is_module(parts: list[str]) -> bool:
    root = ROOT / "plugins" if parts[0] == PLUGIN.name else ROOT
    path = root.joinpath(*parts)
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@pytest.mark.parametrize("folder", ["bench", "docs", "examples", "tests"])
def test_what_is_imported_from_the_packages_is_there(folder: str) -> None:
    """Benchmarks and examples run by hand: no other test would see that a module has moved."""
    wrong = [
        (str(path.relative_to(ROOT)), name)
        for path in (ROOT / folder).rglob("*.py")
        for name in imports_of(path)
        if name.partition(".")[0] in (PACKAGE.name, PLUGIN.name)
        and not is_module(name.split("."))
        and not is_module(name.split(".")[:-1])
    ]
    assert wrong == []
