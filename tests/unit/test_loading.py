"""The one door to the libraries that load models."""

from __future__ import annotations

import logging
import threading

import pytest

from cocktail_serve import loading
from cocktail_serve.loading import library_loading


def test_who_waits_for_long_is_told_for_whom(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "PATIENCE_S", 0.01)
    has_waited, has_entered = threading.Event(), threading.Event()

    class Noted(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            has_waited.set()

    def enter() -> None:
        with library_loading, library_loading:  # reentrant
            has_entered.set()

    handler = Noted()
    loading.logger.addHandler(handler)
    monkeypatch.setattr(threading.current_thread(), "name", "bge-model-0")
    other = threading.Thread(target=enter, name="flan-tokenizer", daemon=True)
    try:
        with library_loading:
            other.start()
            assert has_waited.wait(30)
            assert not has_entered.is_set()
        assert has_entered.wait(30)
    finally:
        loading.logger.removeHandler(handler)
    assert caplog.messages[0].startswith("flan-tokenizer waits to load a model or a tokenizer until bge-model-0 has")
