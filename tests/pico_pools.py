"""Pico pools made once, for the tests of checkpoints and of adapters, whose folders import these fixtures; a test that
changes files works on a copy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from cocktail_serve.checkpoints.opening import open_pool
from cocktail_serve.config import PoolConfig
from cocktail_serve.pool import Pool
from tests.models import make_decoder_pool, make_encoder_pool, pool_section

Folders = Mapping[str, Path]


@pytest.fixture(scope="session")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_decoder_pool(tmp_path_factory.mktemp("untied"))


@pytest.fixture(scope="session")
def tied_decoders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_decoder_pool(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_encoder_pool(tmp_path_factory.mktemp("mean"))


@pytest.fixture(scope="session")
def cls_encoders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_encoder_pool(tmp_path_factory.mktemp("cls"), pooling="cls", normalize=False)


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a model folder to where it may be changed."""

    def copy(folder: Path, name: str = "copy") -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    return copy


@pytest.fixture
def edit_json() -> Callable[..., None]:
    """Sets keys of a JSON file; None takes a key away."""

    def edit(path: Path, **changes: Any) -> None:
        value = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in value.items() if k not in changes or v is not None}))

    return edit


@pytest.fixture
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pool]:
    """Opens folders as a pool."""
    cache = tmp_path_factory.mktemp("cache")

    def opened(folders: Folders, kind: str = "decoder", **options: Any) -> Pool:
        engine = {"type": "fake" if kind == "decoder" else "sentence_transformers"}
        config = PoolConfig.model_validate(pool_section("pico", kind, folders, engine))
        return open_pool(config, cache_dir=cache, **options)

    return opened
