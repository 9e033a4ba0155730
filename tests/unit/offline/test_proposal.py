"""Which model is whose base, and what becomes of those that fit nowhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from cocktail_serve.checkpoints.model_folders import find_model_folders
from cocktail_serve.errors import ConfigError
from cocktail_serve.offline.proposal import MAX_CONTEXT, Proposal, propose
from cocktail_serve.progress import silent
from tests.adapters import edit_config, train_adapter
from tests.models import make_decoder, make_encoder, make_encoder_decoder


def proposed(*folders: Path, bases: Sequence[Path] = ()) -> Proposal:
    return propose(find_model_folders(folders)[0], bases=bases, report=silent)


def shape(proposal: Proposal) -> dict[str, tuple[str, list[str]]]:
    return {pool.id: (pool.base.folder.name, sorted(pool.experts)) for pool in proposal.pools}


def whys(proposal: Proposal) -> dict[str, str]:
    return {each.folder.name: each.why for each in proposal.left_out}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder, two that were tuned from it, another of the same form, and an adapter over the first."""
    folder = tmp_path_factory.mktemp("kept")
    make_decoder(folder / "llama")
    make_decoder(folder / "billing", perturbation_seed=1, perturbation=0.1)
    make_decoder(folder / "returns", perturbation_seed=2, perturbation=0.3)
    train_adapter(folder / "llama", folder / "lora")
    return folder


@pytest.fixture
def models(kept: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return shutil.copytree(kept, tmp_path / "models")


def name_base(folder: Path, base: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_name_or_path": base}))


def test_full_models_lie_around_their_base(models: Path) -> None:
    shutil.rmtree(models / "lora")
    found = proposed(models)
    assert shape(found) == {"llama": ("llama", ["billing", "returns"])}
    assert (found.pools[0].kind, found.pools[0].why) == ("decoder", "the others lie around it")
    assert found.left_out == []


def test_of_two_full_models_nothing_says_which_is_the_base(models: Path) -> None:
    shutil.rmtree(models / "lora")
    shutil.rmtree(models / "returns")
    found = proposed(models)
    assert found.pools == []
    assert "name it with --base" in whys(found)["billing"]
    told = proposed(models, bases=[models / "billing"])
    assert shape(told) == {"billing": ("billing", ["llama"])}
    assert told.pools[0].why == "as --base says"


def test_what_files_name_is_believed(models: Path) -> None:
    shutil.rmtree(models / "lora")
    shutil.rmtree(models / "returns")
    name_base(models / "llama", "your-org/Billing")
    assert shape(proposed(models)) == {"billing": ("billing", ["llama"])}


def test_a_folder_called_base_is_one(models: Path) -> None:
    shutil.rmtree(models / "lora")
    shutil.rmtree(models / "returns")
    (models / "billing").rename(models / "base")
    assert shape(proposed(models)) == {"models": ("base", ["llama"])}


def test_the_word_of_the_operator_is_worth_more(models: Path) -> None:
    assert shape(proposed(models, bases=[models / "billing"]))["billing"] == ("billing", ["llama", "returns"])


def test_a_base_that_is_none(models: Path) -> None:
    for wrong in (models / "lora", models / "nothing"):
        with pytest.raises(ConfigError, match="--base"):
            proposed(models, bases=[wrong])


def test_an_adapter_goes_to_the_base_that_it_names(models: Path) -> None:
    """It names the folder that it was trained beside, which is another by now."""
    found = proposed(models)
    assert shape(found) == {"llama": ("llama", ["billing", "lora", "returns"])}
    assert found.pools[0].why == "named by 1 of them"
    assert [model.is_adapter for model in found.pools[0].experts.values()] == [False, False, True]
    assert found.warnings == []


def test_an_adapter_over_an_expert_is_none_of_the_base(models: Path) -> None:
    edit_config(models / "lora", base_model_name_or_path="your-org/returns")
    found = proposed(models, bases=[models / "llama"])
    assert shape(found) == {"llama": ("llama", ["billing", "returns"])}
    assert whys(found)["lora"] == f"it was trained over {models / 'returns'}, which is no base here"


def test_an_adapter_that_names_no_base_goes_where_it_fits(models: Path) -> None:
    edit_config(models / "lora", base_model_name_or_path=None)
    wide = make_decoder(models / "wide", hidden_size=128)
    make_decoder(models / "wider", hidden_size=128, perturbation_seed=1)
    found = proposed(models, bases=[wide])
    assert shape(found) == {"wide": ("wide", ["wider"]), "llama": ("llama", ["billing", "lora", "returns"])}
    assert found.warnings == []


def test_an_adapter_over_a_model_that_is_not_there_is_taken_with_a_warning(models: Path) -> None:
    edit_config(models / "lora", base_model_name_or_path="your-org/Llama-Instruct")
    found = proposed(models)
    assert "lora" in found.pools[0].experts
    (warning,) = found.warnings
    assert "your-org/Llama-Instruct" in warning
    assert "make sure" in warning


def test_an_adapter_that_fits_nothing_says_why(models: Path) -> None:
    make_decoder(models / "wide", hidden_size=128)
    for name in ("llama", "billing", "returns"):
        shutil.rmtree(models / name)
    found = proposed(models)
    assert found.pools == []
    assert whys(found).keys() == {"lora", "wide"}
    assert whys(found)["wide"] == "nothing among these folders was fine-tuned from it"
    assert "lora_A" in whys(found)["lora"]


def test_kinds_are_pools_of_their_own(models: Path) -> None:
    make_encoder(models / "bge")
    make_encoder(models / "faq", perturbation_seed=1)
    make_encoder(models / "code", perturbation_seed=2)
    make_encoder_decoder(models / "flan-t5")
    found = proposed(models)
    assert {pool.id: pool.kind for pool in found.pools} == {"llama": "decoder", "bge": "encoder"}
    assert "no engine serves encoder-decoders" in whys(found)["flan-t5"]


def test_names_are_made_to_fit(models: Path) -> None:
    (models / "llama").rename(models / "Llama 3.1 (8B)")
    shutil.copytree(models / "lora", models / "a" / "Billing")
    edit_config(models / "lora", base_model_name_or_path=None)
    edit_config(models / "a" / "Billing", base_model_name_or_path=None)
    found = proposed(models)
    assert shape(found) == {"llama-3.1-8b": ("Llama 3.1 (8B)", ["billing", "billing-2", "lora", "returns"])}


def test_the_section_of_a_pool(models: Path, tmp_path: Path) -> None:
    pool = proposed(models).pools[0]
    section = pool.section(tmp_path)
    assert section == {
        "id": "llama",
        "kind": "decoder",
        "base": "models/llama",
        "experts": {name: f"models/{name}" for name in ("billing", "returns", "lora")},
        "engine": {"type": "vllm"},
    }
    assert pool.section(models / "lora")["base"] == str(models / "llama")
    assert pool.section(tmp_path, gpu_share=0.45)["engine"]["args"] == {"gpu-memory-utilization": 0.45}


def test_a_long_context_is_cut(models: Path, tmp_path: Path) -> None:
    for name in ("llama", "billing", "returns"):
        path = models / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 131072}))
    assert proposed(models).pools[0].section(tmp_path)["engine"]["max_model_len"] == MAX_CONTEXT
