"""A tokenizer is exported once, and again when a file that it is of is another."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cocktail_serve.errors import ConfigError
from cocktail_serve.library_process import LibraryProcess
from cocktail_serve.scoring import exported_tokenizer
from cocktail_serve.scoring import tokenizer_cache as kept_tokenizer
from cocktail_serve.scoring.exported_tokenizer import ExportedTokenizer
from cocktail_serve.scoring.tokenizer_cache import open_tokenizer, prepare_tokenizer
from tests.models import make_decoder_tokenizer

OPTIONS = {"add_special_tokens": True, "return_offsets_mapping": True, "truncation": False, "verbose": False}


class Exports(LibraryProcess):
    """Counts what is asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_asked = 0
        self.meanwhile: Callable[[], object] = lambda: None

    def call(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.num_asked += 1
        self.meanwhile()
        return function(*args, **kwargs)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_decoder_tokenizer().save_pretrained(tmp_path / "decoder")
    (tmp_path / "decoder" / "model.safetensors").write_bytes(b"parameters")
    return tmp_path / "decoder"


def ids(tokenizer: Any) -> list[int]:
    found: list[int] = tokenizer("what is the capital", **OPTIONS)["input_ids"]
    return found


def test_it_is_exported_once(folder: Path, tmp_path: Path) -> None:
    kept, exports = tmp_path / "kept", Exports()
    prepare_tokenizer(folder, kept=kept, libraries=exports)
    for _ in range(2):
        opened = open_tokenizer(folder, kept=kept, libraries=exports)
        assert isinstance(opened, ExportedTokenizer)
        assert ids(opened) == list(make_decoder_tokenizer()("what is the capital").input_ids)
    prepare_tokenizer(folder, kept=kept, libraries=exports)
    (folder / "model.safetensors").write_bytes(b"others")
    prepare_tokenizer(folder, kept=kept, libraries=exports)
    assert exports.num_asked == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " "),
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
        lambda folder: (folder / "special.tiktoken").write_text("whatever a class of transformers reads"),
        lambda folder: (
            (folder / "additional_chat_templates").mkdir()
            or (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
        ),
        lambda folder: (folder / "tokenizer_config.json").write_text('{"eos_token": "<s>"}'),
    ],
    ids=["tokenizer", "template", "other", "named-template", "settings"],
)
def test_what_changes_is_read_again(folder: Path, tmp_path: Path, change: Callable[[Path], object]) -> None:
    kept, exports = tmp_path / "kept", Exports()
    open_tokenizer(folder, kept=kept, libraries=exports)
    change(folder)
    open_tokenizer(folder, kept=kept, libraries=exports)
    assert exports.num_asked == 2


def test_another_release_of_a_library_reads_it_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, exports = tmp_path / "kept", Exports()
    open_tokenizer(folder, kept=kept, libraries=exports)
    monkeypatch.setattr(kept_tokenizer, "version_of", lambda name: "99.0" if name == "transformers" else "1")
    open_tokenizer(folder, kept=kept, libraries=exports)
    assert exports.num_asked == 2


def test_one_that_is_corrupt_is_made_again(folder: Path, tmp_path: Path) -> None:
    kept, exports = tmp_path / "kept", Exports()
    first = ids(open_tokenizer(folder, kept=kept, libraries=exports))
    (entry,) = kept.iterdir()
    content = entry.read_bytes()
    entry.write_bytes(content[:-10] + b"0123456789")
    assert ids(open_tokenizer(folder, kept=kept, libraries=exports)) == first
    assert (exports.num_asked, entry.read_bytes()) == (2, content)


def test_files_written_to_meanwhile_are_not_believed(folder: Path, tmp_path: Path) -> None:
    kept, exports = tmp_path / "kept", Exports()
    exports.meanwhile = lambda: (folder / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ConfigError, match="written to while they were read; ask again"):
        open_tokenizer(folder, kept=kept, libraries=exports)
    assert not kept.exists()
    exports.meanwhile = lambda: None
    opened = open_tokenizer(folder, kept=kept, libraries=exports)
    assert opened.chat_template == "{{ messages }}"


def test_a_cache_that_cannot_be_written_costs_time_alone(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept, exports = tmp_path / "kept", Exports()
    kept.write_text("a file")
    for _ in range(2):
        assert isinstance(open_tokenizer(folder, kept=kept, libraries=exports), ExportedTokenizer)
    assert exports.num_asked == 2
    assert f"{kept} cannot be written: File exists" in caplog.text


def test_what_an_export_does_otherwise_is_done_by_transformers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(exported_tokenizer, "_difference", lambda *_: "it cuts 'a' otherwise than its pipeline")
    with caplog.at_level(logging.INFO):
        opened = open_tokenizer(folder, kept=tmp_path / "kept", libraries=Exports())
    assert type(opened).__module__.startswith("transformers.")
    assert "are tokenised by transformers: it cuts 'a' otherwise" in caplog.text


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"the tokenizer of {tmp_path}/none cannot be read"):
        open_tokenizer(tmp_path / "none", kept=tmp_path / "kept", libraries=Exports())
