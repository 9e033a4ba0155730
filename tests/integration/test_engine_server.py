"""Server processes of our own: started, watched, kept within their log, and gone to the last child."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cocktail_serve.engines.vllm import process as process_group
from cocktail_serve.engines.vllm import server as engine_server
from cocktail_serve.engines.vllm.process import ProcessGroup
from cocktail_serve.engines.vllm.server import EngineServer, Launch
from cocktail_serve.errors import EngineError, EngineTimeoutError
from tests.fakes import make_fake_pool
from tests.processes import is_alive, survivors
from vllm_cocktail.launch import server_env
from vllm_cocktail.manifest import Manifest

DEADLINE_S = 20.0

FAMILY = """
    # a parent that ignores SIGTERM, a child in its group, a child in a session of its own, and what each has started
    import signal, subprocess, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sleep = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
    nested = [sys.executable, "-c", f"import subprocess; subprocess.run({sleep!r})"]
    subprocess.Popen(nested)
    subprocess.Popen(nested, start_new_session=True)
    print("up", flush=True)
    time.sleep(600)
"""


async def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.02)


async def start(tmp_path: Path, script: str, *arguments: str) -> ProcessGroup:
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    return await ProcessGroup.start(command, env=dict(os.environ), log=tmp_path / "logs" / "server.log")


def family_of(pid: int) -> list[psutil.Process]:
    leader = psutil.Process(pid)
    return [leader, *leader.children(recursive=True)]


@pytest.mark.parametrize("how", ["killed by us", "its leader is dead", "its leader is dead and was remembered"])
async def test_nothing_of_a_family_stays(tmp_path: Path, how: str) -> None:
    group = await start(tmp_path, FAMILY)
    await eventually(lambda: "".join(group.log_tail()).count("up") == 3)  # lines of three writers may mix
    family = family_of(group.pid)
    assert len(family) == 5
    expected = family
    if how != "killed by us":
        if how.endswith("remembered"):
            await group.remember()
        else:
            # whoever left the session cannot be told from a stranger once its parent is dead
            expected = [process for process in family if os.getsid(process.pid) == group.pid]
        os.kill(group.pid, signal.SIGKILL)
        await group.wait()
    await group.kill(grace_s=0.1)
    assert not any(is_alive(process) for process in expected)
    for process in family:
        if is_alive(process):
            process.kill()


async def test_a_polite_server_is_asked_first(tmp_path: Path) -> None:
    script = """
        import signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: (print("goodbye", flush=True), sys.exit(3)))
        print("up", flush=True)
        time.sleep(600)
    """
    group = await start(tmp_path, script)
    await eventually(lambda: "up" in "".join(group.log_tail()))
    await group.kill(grace_s=10)
    assert "goodbye" in group.log_tail()
    assert group.returncode == 3


async def test_the_log_is_bounded_while_it_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "MAX_LOG_BYTES", 10_000)
    monkeypatch.setattr(process_group, "LOG_CHECK_S", 0.02)
    script = """
        import sys, time
        for number in range(100_000):
            print(f"line {number:06d}", flush=True)
            if number % 100 == 0: time.sleep(0.01)
    """
    group = await start(tmp_path, script)
    log, old = tmp_path / "logs" / "server.log", tmp_path / "logs" / "server.log.1"
    # a log of 3000 lines has been trimmed more than once
    await eventually(
        lambda: old.exists() and max(map(int, re.findall(r"line (\d{6})", old.read_text())), default=0) > 3000
    )
    await group.kill(grace_s=0)
    assert old.stat().st_size == 10_000
    assert b"\0" not in log.read_bytes(), "the writer went on at its old place"
    assert sorted(file.name for file in log.parent.iterdir()) == ["server.log", "server.log.1"]
    assert log.stat().st_mode & 0o077 == 0


@pytest.fixture
def launch_fake(tmp_path: Path) -> Launch:
    pool = make_fake_pool(tmp_path / "pool")
    manifest = Manifest.of_pool(pool, dtype="float32", cache_bytes=0, managed=True).write(tmp_path / "pool.json")

    def launch(socket: Path, key: str) -> tuple[list[str], dict[str, str]]:
        command = [sys.executable, "-m", "cocktail_serve.engines.vllm.fake", "--uds", str(socket)]
        return command, server_env(manifest=manifest, api_key=key, owner_pid=os.getpid())

    return launch


def serving(launch: Launch, tmp_path: Path, *, start_timeout_s: float = DEADLINE_S) -> EngineServer:
    return EngineServer(launch, log=tmp_path / "engine.log", start_timeout_s=start_timeout_s)


def running_script(script: str) -> Launch:
    return lambda socket, key: ([sys.executable, "-c", textwrap.dedent(script), str(socket)], dict(os.environ))


async def test_each_life_has_a_socket_and_a_key_of_its_own(launch_fake: Launch, tmp_path: Path) -> None:
    seen: list[tuple[Path, str]] = []

    def launch(socket: Path, key: str) -> tuple[list[str], dict[str, str]]:
        seen.append((socket, key))
        return launch_fake(socket, key)

    for _ in range(2):
        async with serving(launch, tmp_path) as server:
            status, body = await server.call("GET", engine_server.STATUS_PATH, timeout_s=5)
            assert (status, body["state"]) == (200, "open")
            assert seen[-1][0].is_socket()
            assert seen[-1][0].parent.stat().st_mode & 0o777 == 0o700
            leader = psutil.Process(server.pid)
            assert not any(seen[-1][1] in argument for argument in leader.cmdline())
        assert not is_alive(leader)
        assert not seen[-1][0].parent.exists()
    assert len({socket for socket, _ in seen}) == len({key for _, key in seen}) == 2


async def test_strangers_are_turned_away(launch_fake: Launch, tmp_path: Path) -> None:
    async with serving(launch_fake, tmp_path) as server:
        stranger = {"Authorization": "Bearer wrong"}
        status, _ = await server.call("GET", engine_server.STATUS_PATH, timeout_s=5, headers=stranger)
        assert status == 401


async def test_any_exit_is_noticed(launch_fake: Launch, tmp_path: Path) -> None:
    async with serving(launch_fake, tmp_path) as server:
        exited = asyncio.create_task(server.exited())
        os.kill(server.pid, signal.SIGKILL)
        assert "exited with signal 9" in await exited
        with pytest.raises(EngineError, match="did not answer"):
            await server.call("GET", engine_server.STATUS_PATH, timeout_s=5)


async def test_an_exit_with_code_0_during_the_start_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"exited with code 0(?s:.*)no device found"):
        async with serving(running_script("print('no device found')"), tmp_path):
            pytest.fail("it did not start")


async def test_a_command_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot start the engine"):
        async with serving(lambda socket, key: (["/no/such/program"], {}), tmp_path):
            pytest.fail("it did not start")


@pytest.mark.parametrize(("status", "message"), [(404, "without the cocktail plugin"), (500, "worker extension")])
async def test_a_server_that_cannot_mix_is_refused(tmp_path: Path, status: int, message: str) -> None:
    script = f"""
        import http.server, socketserver, sys

        class Handler(http.server.BaseHTTPRequestHandler):
            def address_string(self): return "unix"
            def do_GET(self):
                body = b'{{"error": "the worker extension is missing"}}'
                self.send_response({status})
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        socketserver.UnixStreamServer(sys.argv[1], Handler).serve_forever()
    """
    with pytest.raises(EngineError, match=message):
        async with serving(running_script(script), tmp_path):
            pytest.fail("it cannot mix")


async def test_a_start_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    script = "import time; print('loading shards', flush=True); time.sleep(600)"
    pids: list[int] = []
    with pytest.raises(EngineTimeoutError, match=r"start_timeout_s=1 s(?s:.*)loading shards"):
        async with (server := serving(running_script(script), tmp_path, start_timeout_s=1)):
            pids.append(server.pid)
    assert pids == []
    assert not _sleeping(script)


async def test_a_cancelled_start_leaves_no_process(tmp_path: Path) -> None:
    script = "import time; time.sleep(601)"

    async def enter() -> None:
        async with serving(running_script(script), tmp_path):
            pytest.fail("it never becomes ready")

    task = asyncio.create_task(enter())
    await eventually(lambda: bool(_sleeping(script)))
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    await eventually(lambda: not _sleeping(script))


def _sleeping(script: str) -> list[int]:
    return [process.pid for process in psutil.process_iter(["cmdline"]) if script in (process.info["cmdline"] or [])]


async def test_an_owner_that_is_killed_takes_its_server_along(tmp_path: Path) -> None:
    make_fake_pool(tmp_path / "pool")
    script = """
        import asyncio, os, sys
        from pathlib import Path
        from cocktail_serve.config import FakeEngineConfig
        from cocktail_serve.engines.vllm.build import build_vllm_engine
        from tests.fakes import make_fake_pool

        async def main():
            folder = Path(sys.argv[1])
            engine = build_vllm_engine(make_fake_pool(folder / "pool"), FakeEngineConfig(), run_dir=folder / "run")
            await engine.start()
            while (await engine.snapshot(deadline_s=5)).state != "ready":
                await asyncio.sleep(0.05)
            print(engine._supervisor.server.pid, flush=True)
            await asyncio.sleep(600)

        asyncio.run(main())
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    owner = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert owner.stdout is not None
    server = psutil.Process(int(await owner.stdout.readline()))
    owner.kill()
    await owner.wait()
    assert await survivors([server], timeout_s=DEADLINE_S) == []
