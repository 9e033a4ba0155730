"""Every configuration that is shipped can be loaded as it is."""

from pathlib import Path

import pytest

from cocktail_serve.config import load_settings

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_load(path):
    settings = load_settings(path, environ={})
    assert settings.pools
    assert all(pool.experts for pool in settings.pools)


def test_the_papers_pools_are_among_them():
    by_name = {path.stem: load_settings(path, environ={}) for path in CONFIGS}
    assert by_name["paper-llama2"].pool("llama2").base.path == "meta-llama/Llama-2-7b-chat-hf"
    assert by_name["paper-bge"].pool("bge").base.path == "BAAI/bge-base-en-v1.5"
    assert by_name["paper-bge"].defaults.weighting == "paper"


def test_the_example_names_every_section():
    text = (Path(__file__).parents[2] / "configs" / "example.yaml").read_text()
    assert all(f"\n{section}:" in text for section in ("server", "store", "defaults", "pools"))
