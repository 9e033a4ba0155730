"""vLLM on a CPU with linear layers as plain tensors, as on a GPU: what is mixed in place there, and slower here."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

_PLUGIN = """
    def register():
        from vllm import _custom_ops

        # vLLM then multiplies by the parameters themselves instead of what oneDNN made of them
        _custom_ops._supports_onednn = False
"""


def plain_parameters(folder: Path) -> dict[str, str]:
    """Environment of such a server. Writes a vLLM plugin into the folder, which must not hold one."""
    (folder / "plain_linear.py").write_text(textwrap.dedent(_PLUGIN))
    info = folder / "plain_linear-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plain-linear\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nplain_linear = plain_linear:register\n")
    return {"PYTHONPATH": python_path(folder), "VLLM_PLUGINS": "plain_linear"}


def python_path(folder: Path) -> str:
    """`PYTHONPATH` of a process that finds the modules of a folder first, and then all that this one finds."""
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
