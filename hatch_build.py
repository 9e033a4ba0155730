"""What a wheel has beyond the packages: the demo's pools, the trainer, and the commit that it was built from."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

CARRIED = {
    "examples/demo_pool": "cocktail_serve/carried/examples/demo_pool",
    "examples/smollm2": "cocktail_serve/carried/examples/smollm2",
    "examples/train_experts": "cocktail_serve/train_experts",
}
COMMIT = "cocktail_serve/COMMIT"


class CarryHook(BuildHookInterface[Any]):
    """An editable installation needs none of it: the clone is there."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        root, included = Path(self.root), build_data["force_include"]
        if self.target_name == "wheel":
            # a container's build may leave the examples out
            included |= {str(root / source): place for source, place in CARRIED.items() if (root / source).is_dir()}
        sys.path.insert(0, self.root)
        from cocktail_serve.build import commit_of

        commit = commit_of(root)
        if commit is not None:  # a source distribution carries it already
            self._folder = tempfile.TemporaryDirectory()
            file = Path(self._folder.name) / "COMMIT"
            file.write_text(f"{commit}\n")
            included[str(file)] = COMMIT
