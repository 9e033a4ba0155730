"""Adapters as sentence-transformers saves them, with modules beside them that were trained too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense

from cocktail_serve.checkpoints.compatibility import compare
from cocktail_serve.checkpoints.folder import save_mixture
from cocktail_serve.checkpoints.mixture import Mixture, iter_mixture
from cocktail_serve.errors import CheckpointError, IncompatibleModelsError, ModelChangedError
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import make_recipe, one_hot
from tests.adapters import move_trained, parameters_of, train_adapter
from tests.models import make_encoder, make_reranker

Open = Callable[..., Pool]
TEXTS = ["my card was stolen", "the capital of france is paris", "open a new bank account"]
DENSE = "2_Dense/linear.weight"


def add_dense(folder: Path, out: Path) -> Path:
    torch.manual_seed(0)
    model = SentenceTransformer(str(folder), device="cpu")
    model.append(Dense(model.get_embedding_dimension(), 16))
    model.save(str(out), create_model_card=False)
    return out


def adapt(base: Path, out: Path, model_class: Any = SentenceTransformer, **options: Any) -> Any:
    """Adds an adapter by sentence-transformers, moves everything but the frozen base, and saves it."""
    torch.manual_seed(1)
    model = model_class(str(base), device="cpu")
    options = {"r": 4, "lora_alpha": 12, "target_modules": ["query", "dense"], **options}
    model.add_adapter(LoraConfig(init_lora_weights=False, **options))
    move_trained(model)
    model.save_pretrained(str(out))
    return model.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    return add_dense(make_encoder(folder / "plain", normalize=False), folder / "base")


@pytest.fixture
def tuned(base: Path, tmp_path: Path) -> tuple[Path, Any]:
    """A folder with an adapter and a Dense that was trained with it, and the model that saved it."""
    model = adapt(base, tmp_path / "tuned", task_type="FEATURE_EXTRACTION")
    return tmp_path / "tuned", model


def test_a_dense_that_was_trained_with_the_adapter_is_the_experts(
    base: Path, tuned: tuple[Path, Any], opened: Open, tmp_path: Path
) -> None:
    folder, model = tuned
    pool = opened({"base": base, "tuned": folder}, kind="encoder")
    save_mixture(one_hot(pool, "tuned", dtype="float32"), pool, tmp_path / "out")
    made = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(made, model.encode(TEXTS), rtol=1e-4, atol=1e-5)
    of_base = SentenceTransformer(str(base), device="cpu").encode(TEXTS)
    assert not np.allclose(made, of_base, atol=0.1)


def test_it_is_mixed_as_any_tensor(base: Path, tuned: tuple[Path, Any], opened: Open) -> None:
    folder, model = tuned
    pool = opened({"base": base, "tuned": folder}, kind="encoder")
    recipe = make_recipe(pool, {"base": 0.25, "tuned": 0.75}, dtype="float32")
    mixed = dict(iter_mixture(recipe, {member.fingerprint: member for member in pool}))
    own = load_file(base / "2_Dense" / "model.safetensors")["linear.weight"]
    expected = 0.25 * own + 0.75 * model[2].linear.weight.detach()
    torch.testing.assert_close(mixed[DENSE], expected, rtol=1e-6, atol=1e-7)


def test_its_bytes_are_part_of_the_fingerprint(base: Path, tuned: tuple[Path, Any], opened: Open) -> None:
    folder, _ = tuned

    def fingerprint() -> str:
        return opened({"base": base, "tuned": folder}, kind="encoder").experts["tuned"].fingerprint

    before = fingerprint()
    path = folder / "2_Dense" / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "linear.bias": tensors["linear.bias"] + 1}, path)
    assert fingerprint() != before
    save_file(tensors, path)
    assert fingerprint() == before


def test_an_adapter_of_peft_alone_has_the_bases_modules(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    folder = train_adapter(base, tmp_path / "lora", auto_class=AutoModel, target_modules=["query"]).folder
    own = load_file(base / "2_Dense" / "model.safetensors")["linear.weight"]
    assert torch.equal(parameters_of(folder, base)[DENSE], own)


def test_modules_that_the_base_lacks_are_never_dropped(tuned: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = tuned
    plain = make_encoder(tmp_path / "plain", normalize=False)
    subjects = {finding.subject for finding in compare(plain, folder).problems}
    assert {"modules.json", f"tensor {DENSE}"} <= subjects
    (plain / "modules.json").unlink()  # as transformers alone would save it
    assert {finding.subject for finding in compare(plain, folder).problems} >= {f"tensor {DENSE}"}
    (folder / "modules.json").unlink()
    assert compare(plain, folder).is_compatible  # files that nothing names


def test_modules_that_are_gone_are_named(base: Path, tuned: tuple[Path, Any]) -> None:
    folder, _ = tuned
    (folder / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"modules\.json names 2_Dense, which holds no parameters"):
        parameters_of(folder, base)


def test_another_pooling_is_named(base: Path, tuned: tuple[Path, Any], opened: Open) -> None:
    folder, _ = tuned
    path = folder / "1_Pooling" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pooling_mode": "cls"}))
    with pytest.raises(IncompatibleModelsError, match="pooling"):
        opened({"base": base, "tuned": folder}, kind="encoder")


def test_a_transformer_in_a_folder_of_its_own(base: Path, tuned: tuple[Path, Any]) -> None:
    """As releases of sentence-transformers before 2 have it."""
    folder, model = tuned
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "0_Transformer").mkdir()
    for file in folder.glob("adapter_*"):
        file.rename(folder / "0_Transformer" / file.name)
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    assert torch.equal(parameters_of(folder, base)[DENSE], model[2].linear.weight.detach())


def test_of_a_cross_encoder_with_its_head(tmp_path: Path, opened: Open) -> None:
    base = make_reranker(tmp_path / "base")
    model = adapt(base, tmp_path / "tuned", CrossEncoder, task_type="SEQ_CLS", modules_to_save=["classifier"])
    pairs = [[TEXTS[0], text] for text in TEXTS]
    pool = opened({"base": base, "tuned": tmp_path / "tuned"}, kind="reranker")
    save_mixture(one_hot(pool, "tuned", dtype="float32"), pool, tmp_path / "out")
    made = CrossEncoder(str(tmp_path / "out"), device="cpu").predict(pairs)
    np.testing.assert_allclose(made, model.predict(pairs), rtol=1e-4, atol=1e-5)
    assert not np.allclose(made, CrossEncoder(str(base), device="cpu").predict(pairs), atol=1e-3)


def test_a_module_beside_the_adapter_is_one_of_its_files(base: Path, tuned: tuple[Path, Any], opened: Open) -> None:
    folder, _ = tuned
    pool = opened({"base": base, "tuned": folder}, kind="encoder")
    path = folder / "2_Dense" / "model.safetensors"
    assert str(path) in {str(file.path) for file in pool.experts["tuned"].files}
    tensors = load_file(path)
    save_file({**tensors, "linear.bias": tensors["linear.bias"] + 1}, path)
    with pytest.raises(ModelChangedError, match="tuned"):
        Mixture(one_hot(pool, "tuned", dtype="float32"), {member.fingerprint: member for member in pool})
