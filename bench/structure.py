"""How a tree of packages hangs together: rooms, the arrows between them, floors, and rings.

A room of a package is each of its modules and each of its sub-packages; an arrow is that one imports another, in
functions and for type checkers too. The floors are the rooms of the longest way down. Give several source trees (a
worktree of an older commit beside this one) to see them side by side:

    python -m bench.structure . ../before
"""

from __future__ import annotations

import argparse
import ast
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = "cocktail_serve"
WHOLE = ("", "engines", "cocktails", "checkpoints", "gateway")


def imports(source: str) -> Iterator[str]:
    """All that a module imports, inside functions and for type checkers too; `from a import b` as `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def arrows_within(folder: Path, dotted: str) -> dict[str, set[str]]:
    """For each room of the package in `folder`, the rooms of it that it imports; `dotted` is the package's name."""
    arrows: dict[str, set[str]] = {}
    for room in sorted(folder.iterdir()):
        if room.name == "__init__.py" or not (room.suffix == ".py" or (room / "__init__.py").is_file()):
            continue
        arrows[room.stem] = set()
        for path in [room] if room.is_file() else room.rglob("*.py"):
            for name in imports(path.read_text(encoding="utf-8")):
                if name.startswith(dotted + "."):
                    arrows[room.stem].add(name.removeprefix(dotted + ".").partition(".")[0])
    return {room: (found & arrows.keys()) - {room} for room, found in arrows.items()}


def ring_in(arrows: Mapping[str, set[str]]) -> list[str]:
    """Rooms that import each other in a ring, the first named again at the end; empty if there is none."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        ring: list[str] = error.args[1]
        return ring
    return []


def num_floors(arrows: Mapping[str, set[str]]) -> int:
    """Rooms on the longest way down. Only without rings."""
    depth: defaultdict[str, int] = defaultdict(int)
    for room in TopologicalSorter(arrows).static_order():
        depth[room] = 1 + max((depth[below] for below in arrows.get(room, ())), default=0)
    return max(depth.values(), default=0)


def describe(tree: Path) -> dict[str, dict[str, object]]:
    """Of the package and of its largest sub-packages."""
    found: dict[str, dict[str, object]] = {}
    for part in WHOLE:
        folder = tree / PACKAGE / part
        dotted = ".".join([PACKAGE, part]) if part else PACKAGE
        arrows = arrows_within(folder, dotted)
        ring = ring_in(arrows)
        found[dotted] = {
            "rooms": len(arrows),
            "arrows": sum(map(len, arrows.values())),
            "floors": None if ring else num_floors(arrows),
            "ring": ring,
            "lines": sum(len(path.read_text(encoding="utf-8").splitlines()) for path in folder.rglob("*.py")),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="*", type=Path, default=[Path()], help="source trees; this one by default")
    for tree in parser.parse_args().trees:
        print(json.dumps({str(tree): describe(tree)}, indent=1))


if __name__ == "__main__":
    main()
