"""What the command line says while something takes its time."""

from __future__ import annotations

import pytest

from cocktail_serve.cli import terminal


def test_without_a_terminal_lines_say_now_and_then_how_long_it_will_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    with terminal.progress() as report:
        for done in range(21):
            report("training faq", done, 20)
            now += 10.0
    assert capsys.readouterr().err.splitlines() == [
        "training faq ...",
        "training faq: 15%, about 3 min left",
        "training faq: 30%, about 2 min left",
        "training faq: 45%, about 2 min left",
        "training faq: 60%, about 80 s left",
        "training faq: 75%, about 50 s left",
        "training faq: 90%, about 20 s left",
        "training faq: done",
    ]
