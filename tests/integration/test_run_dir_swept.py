"""The folder that engines write to: what a killed server left is swept by the next one, and no sooner."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from cocktail_serve.config import Settings
from cocktail_serve.errors import ConfigError
from cocktail_serve.gateway.run_dir import own_run_dir

SERVER = """
import json, sys, tempfile, time
from contextlib import AsyncExitStack
from pathlib import Path
from cocktail_serve.config import Settings
from cocktail_serve.gateway.run_dir import own_run_dir
stack = AsyncExitStack()
run_dir = own_run_dir(Settings.model_validate_json(sys.argv[1]), stack)
folder = Path(tempfile.mkdtemp(prefix="cocktail-", dir=sys.argv[2]))
(folder / "engine.sock").touch()
(run_dir / folder.name).symlink_to(folder)
print(folder, flush=True)
time.sleep(600)
"""


def test_only_a_dead_servers_folders_are_swept(tmp_path: Path) -> None:
    pool = {"id": "flan", "kind": "decoder", "base": "b", "engine": {"type": "fake"}}
    settings = Settings.model_validate({"store": {"cache_dir": str(tmp_path / "cache")}, "pools": [pool]})
    temporary = tmp_path / "tmp"
    (temporary / "cocktail-of-another").mkdir(parents=True)  # of no note of ours: some other server's
    config = settings.model_dump_json(exclude_unset=True)
    command = [sys.executable, "-c", SERVER, config, str(temporary)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            folder = Path(server.stdout.readline().strip())
            assert (folder / "engine.sock").exists()
            with pytest.raises(ConfigError, match="another server"):
                own_run_dir(settings, AsyncExitStack())
            assert folder.exists(), "its owner lives"
        finally:
            server.send_signal(signal.SIGKILL)
    stack = AsyncExitStack()
    try:
        run_dir = own_run_dir(settings, stack)
        assert [path.name for path in temporary.iterdir()] == ["cocktail-of-another"]
        assert not list(run_dir.glob("cocktail-*"))
    finally:
        asyncio.run(stack.aclose())
