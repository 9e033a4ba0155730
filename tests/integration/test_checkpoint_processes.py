"""What checkpoints do to a process: files cut short while they are mapped, a kernel that refuses a write."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cocktail_serve.merging import native
from tests.models import make_decoder_pool


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


needs_compiler = pytest.mark.skipif(native.find_compiler() is None, reason="no C compiler")


@needs_compiler
@pytest.mark.parametrize("before", ["", "import faulthandler; faulthandler.enable()"])
def test_a_mapped_file_that_is_cut_short_ends_no_process(tmp_path: Path, before: str) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100_000)
    found = run(
        f"""
        import os, sys
        from pathlib import Path
        {before}
        from cocktail_serve.checkpoints.mapping import HeldFile
        from cocktail_serve.errors import CheckpointError
        path = Path(sys.argv[1])
        held, other = HeldFile(path), HeldFile(path)
        whole = held.read(0, 100_000)
        assert whole[99_999] == 120
        os.truncate(path, 10)
        print(whole[99_999])  # of a page that is gone
        for each in (held, other):
            try:
                each.check_unwritten()
            except CheckpointError:
                print("thrown away")
        path.write_bytes(b"y" * 100_000)
        os.utime(path, ns=(held.state.modified_ns, held.state.modified_ns))
        again = HeldFile(path)
        again.check_unwritten()
        print(again.read(0, 1)[0], again.read(99_999, 100_000)[0])
        """,
        tmp_path / "file",
    )
    assert (found.returncode, found.stdout.split("\n")) == (0, ["0", "thrown away", "thrown away", "121 121", ""]), (
        found
    )


FOREIGN = """
    import mmap, os, sys
    from pathlib import Path
    from cocktail_serve.checkpoints.mapping import HeldFile
    path = Path(sys.argv[1])
    held = HeldFile(path)
    {before}
    with path.open("rb") as file:
        foreign = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    os.truncate(path, 10)
    {fault}
    print("still here")
"""


@needs_compiler
@pytest.mark.parametrize(
    ("before", "fault"),
    [
        ("", "foreign[99_999]"),
        ("", "os.kill(os.getpid(), 7)"),
        ("import faulthandler; faulthandler.enable(); HeldFile(path)", "foreign[99_999]"),
    ],
    ids=["fault", "sent", "another handler between"],
)
def test_what_is_no_file_of_ours_ends_the_process_as_it_did(tmp_path: Path, before: str, fault: str) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100_000)
    found = run(FOREIGN.format(before=before, fault=fault), tmp_path / "file")
    assert found.returncode == -signal.SIGBUS
    assert found.stdout == ""


@needs_compiler
def test_a_handler_that_was_there_before_is_asked(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100_000)
    script = FOREIGN.format(before="", fault="foreign[99_999]")
    found = run(f"import faulthandler; faulthandler.enable()\n{textwrap.dedent(script)}", tmp_path / "file")
    assert found.returncode == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in found.stderr


@needs_compiler
def test_a_file_cut_short_while_a_library_reads_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100_000)
    script = FOREIGN.format(
        before="from cocktail_serve.checkpoints.mapping import library_reads",
        fault="""
    with library_reads(path.parent):
        print(foreign[99_999])
    """,
    )
    found = run(script, tmp_path / "file")
    assert found.stdout == "0\n"
    assert "CheckpointError" in found.stderr
    assert "was cut short while it was loaded" in found.stderr


def test_a_file_size_limit_leaves_nothing(tmp_path: Path) -> None:
    """The kernel refuses the write itself, in a process of its own."""
    decoders = make_decoder_pool(tmp_path / "models")
    script = """
import resource, signal, sys
from pathlib import Path
from cocktail_serve.checkpoints.folder import save_mixture
from cocktail_serve.checkpoints.opening import open_pool
from cocktail_serve.config import PoolConfig
from cocktail_serve.errors import StorageError
from cocktail_serve.recipe import make_recipe
base, expert, work = map(Path, sys.argv[1:])
config = dict(id="p", kind="decoder", base=str(base), experts={"nq": str(expert)}, engine={"type": "fake"})
pool = open_pool(PoolConfig.model_validate(config), cache_dir=work / "cache")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    save_mixture(make_recipe(pool, {"base": 0.5, "nq": 0.5}, dtype="float32"), pool, work / "out")
except StorageError as error:
    print("refused:", error)
"""
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-c", script, str(decoders["base"]), str(decoders["nq"]), str(tmp_path / "work")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "refused: cannot write" in ran.stdout, ran.stderr
    assert "File too large" in ran.stdout
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["cache"]
