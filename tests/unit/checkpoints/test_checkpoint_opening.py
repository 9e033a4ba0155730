"""From a pool's configuration to a Pool."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from cocktail_serve.checkpoints.opening import open_expert, open_pool
from cocktail_serve.checkpoints.text_files import text_digest
from cocktail_serve.config import FakeEngineConfig, PoolConfig
from cocktail_serve.errors import CheckpointError, ConfigError, IncompatibleModelsError
from cocktail_serve.generation_settings import ChatTemplate, GenerationSettings
from cocktail_serve.pool import Pool
from tests.adapters import train_adapter
from tests.models import CHAIN_TOKENS, make_chain_decoder, make_decoder, make_decoder_pool

Folders = dict[str, Path]
Open = Callable[..., Pool]
Copy = Callable[..., Path]


def config(base: str, experts: dict[str, Any] | None = None, kind: str = "decoder") -> PoolConfig:
    engine = {"type": "fake" if kind == "decoder" else "sentence_transformers"}
    return PoolConfig.model_validate(
        {"id": "pico", "kind": kind, "base": base, "experts": experts or {}, "engine": engine}
    )


def test_members_have_folder_fingerprint_dtype_and_size(decoders: Folders, opened: Open) -> None:
    pool = opened(decoders)
    assert list(pool.members) == ["base", "ag-news", "nq"]
    assert len({member.fingerprint for member in pool}) == 3
    for name, member in pool.members.items():
        assert member.path == decoders[name]
        assert member.dtype == "float32"
        assert member.num_bytes == sum(t.nbytes for t in load_file(member.path / "model.safetensors").values())
        assert len(member.fingerprint) == 64


def test_dtype_is_as_stored(tmp_path: Path, opened: Open) -> None:
    pool = opened(make_decoder_pool(tmp_path, dtype=torch.bfloat16))
    assert {member.dtype for member in pool} == {"bfloat16"}


def test_opening_again_gives_the_same_pool(decoders: Folders, opened: Open) -> None:
    assert opened(decoders).fingerprint == opened(decoders).fingerprint


def test_progress_is_by_model_and_a_known_model_is_not_read(decoders: Folders, opened: Open) -> None:
    calls: list[tuple[str, int, int]] = []
    opened(decoders, progress=lambda *call: calls.append(call))
    assert [name for name, done, total in calls if done == total] == ["base", "ag-news", "nq"]
    calls.clear()
    opened(decoders, progress=lambda *call: calls.append(call))
    assert calls == []


def test_an_expert_that_does_not_fit_is_named_before_anything_is_read(
    decoders: Folders, tmp_path: Path, opened: Open
) -> None:
    calls: list[object] = []
    wide = make_decoder(tmp_path / "wide", hidden_size=128)
    with pytest.raises(IncompatibleModelsError, match="pool 'pico', expert 'wide'") as caught:
        opened({**decoders, "wide": wide}, progress=lambda *call: calls.append(call))
    assert "hidden_size: the base has 64, the expert 128" in caught.value.message
    assert calls == []


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "~/nowhere/model", "models/llama/base"])
def test_a_path_that_is_not_there_is_no_hub_id(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match=f"no model folder {path}"):
        open_pool(config(path), cache_dir=tmp_path)


def test_a_folder_that_is_not_there_may_be_misspelt(decoders: Folders, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model folder .*/bsae\. Did you mean 'base'\?"):
        open_pool(config(str(decoders["base"].parent / "bsae")), cache_dir=tmp_path)


def test_a_hub_id_is_downloaded_at_its_revision_without_code(
    decoders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []

    def download(repo_id: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((repo_id, revision))
        assert not any(pattern.endswith(".py") for pattern in allow_patterns)
        assert not any(pattern == "*" for pattern in allow_patterns)
        return str(decoders["nq"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    experts = {"nq": {"path": "someone/nq", "revision": "abc123"}}
    pool = open_pool(config(str(decoders["base"]), experts), cache_dir=tmp_path)
    assert asked == [("someone/nq", "abc123")]
    assert pool.experts["nq"].path == decoders["nq"]


def test_what_the_hub_refuses_names_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise ConnectionError("offline\nwith more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match="'someone/base' is no local folder, and the hub") as caught:
        open_pool(config("someone/base"), cache_dir=tmp_path)
    assert "more lines" not in caught.value.message


@pytest.mark.parametrize(
    ("pool", "kind", "message"),
    [
        ("encoders", "decoder", "BertModel, which cannot generate"),
        ("decoders", "encoder", "LlamaForCausalLM without sentence-transformers modules"),
        ("decoders", "reranker", "LlamaForCausalLM; a reranker"),
    ],
)
def test_a_model_of_another_kind(
    pool: str, kind: str, message: str, opened: Open, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(CheckpointError, match=message):
        opened(request.getfixturevalue(pool), kind)


def test_a_decoder_with_embedding_modules_may_be_an_encoder(
    encoders: Folders, opened: Open, copy: Copy, edit_json: Any
) -> None:
    base = copy(encoders["base"])
    edit_json(base / "config.json", architectures=["Qwen3ForCausalLM"])
    assert opened({"base": base}, "encoder").kind == "encoder"


def test_an_adapter_without_factors_is_no_expert(decoders: Folders, opened: Open, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    with pytest.raises(CheckpointError, match="holds no factors"):
        opened({**decoders, "lora": adapter})


IM_END = CHAIN_TOKENS.index("<|im_end|>")


class TestGeneration:
    """How a pool's models are called, and what messages are rendered by."""

    def open(self, folder: Path, base: str | None, *experts: str | None, **args: Any) -> Pool:
        """A pool of chain decoders, each with the template given."""
        folders = {
            name: make_chain_decoder(
                folder / name, end="</s>" if name == "base" else "<|im_end|>", chat_template=template
            )
            for name, template in zip(("base", "red", "green"), (base, *experts), strict=False)
        }
        section = {"id": "pico", "kind": "decoder", "base": str(folders.pop("base")), "engine": {"type": "vllm"}}
        section["experts"] = {name: str(path) for name, path in folders.items()}
        section["engine"] = {"type": "vllm", "args": {name.replace("_", "-"): value for name, value in args.items()}}
        return open_pool(PoolConfig.model_validate(section), cache_dir=folder / "cache")

    def plain_digest(self, pool: Pool) -> str:
        return text_digest(pool.base.path, prompts={})

    def test_each_model_is_called_as_its_own_folder_says(self, tmp_path: Path) -> None:
        pool = self.open(tmp_path, "base's", "red's", None)
        assert [member.generation for member in pool] == [
            GenerationSettings((2,), (2,), {}, ChatTemplate("base's")),
            GenerationSettings((IM_END,), (IM_END,), {}, None),
            GenerationSettings((IM_END,), (IM_END,), {}, ChatTemplate("red's")),
        ]
        assert pool.chat_template == ChatTemplate("base's")
        # losses that were kept before are those of the same text
        assert pool.text_digest == self.plain_digest(pool)

    def test_experts_that_agree_lend_their_template_to_a_base_without(self, tmp_path: Path) -> None:
        pool = self.open(tmp_path, None, "chat's", "chat's")
        assert pool.chat_template == ChatTemplate("chat's")
        assert pool.generation_of(pool.base).chat_template == ChatTemplate("chat's")
        assert pool.text_digest != self.plain_digest(pool)

    def test_experts_that_do_not_agree_lend_none(self, tmp_path: Path) -> None:
        pool = self.open(tmp_path, None, "red's", "green's")
        assert pool.chat_template is None
        assert pool.text_digest == self.plain_digest(pool)
        assert pool.generation_of(pool.member("red")).chat_template == ChatTemplate("red's")

    def test_the_operators_template_is_every_models(self, tmp_path: Path) -> None:
        file = tmp_path / "own.jinja"
        file.write_text("operator's")
        pool = self.open(tmp_path, "base's", "red's", chat_template=str(file))
        assert {member.generation.chat_template for member in pool} == {ChatTemplate("operator's")}
        assert pool.chat_template == ChatTemplate("operator's")
        file.write_text("changed")
        again = self.open(tmp_path, "base's", "red's", chat_template=str(file))
        assert len({pool.text_digest, again.text_digest, self.plain_digest(pool)}) == 3

    def test_defaults_of_templates_are_part_of_what_is_read(self, tmp_path: Path) -> None:
        plain = self.open(tmp_path, "base's")
        pool = self.open(tmp_path, "base's", default_chat_template_kwargs={"enable_thinking": False})
        assert pool.chat_template == ChatTemplate("base's", defaults={"enable_thinking": False})
        assert plain.text_digest != pool.text_digest

    def test_an_expert_that_is_added_later_is_called_by_the_same_options(self, tmp_path: Path) -> None:
        said = {"eos_token_id": 4, "temperature": 0.5, "top_k": 3}
        late = make_chain_decoder(tmp_path / "late", chat_template="late's", generation_config=said)
        pool = self.open(tmp_path, None, "red's", override_generation_config={"temperature": 0.1})
        member = open_expert(pool, "late", late, cache_dir=tmp_path / "cache")
        assert member.generation == GenerationSettings((2,), (2, 4), {"top_k": 3}, ChatTemplate("late's"))


@pytest.mark.parametrize("named", [-1, {"a": 1}, [3]], ids=str)
def test_architectures_that_are_no_names(
    decoders: Folders, opened: Open, copy: Callable[..., Path], edit_json: Callable[..., None], named: Any
) -> None:
    base = copy(decoders["base"])
    edit_json(base / "config.json", architectures=named)
    with pytest.raises(CheckpointError, match="architectures must be a list of class names"):
        opened({"base": base})


@pytest.mark.parametrize("value", ["endless", ["x"]], ids=str)
def test_a_tokenizer_that_loads_and_cannot_cut_a_text(
    decoders: Folders, opened: Open, copy: Callable[..., Path], edit_json: Callable[..., None], value: Any
) -> None:
    expert = copy(decoders["nq"])
    edit_json(expert / "tokenizer_config.json", model_max_length=value, add_prefix_space=True)
    with pytest.raises(CheckpointError, match="cannot cut a text: TypeError"):
        opened({"base": decoders["base"], "nq": expert})


class TestMode:
    """How a pool's mixtures reach the engine: as its experts allow, and the operator says."""

    def open(self, folders: Folders, cache: Path, mode: str | None = None) -> Pool:
        section = config(str(folders["base"]), {n: str(f) for n, f in folders.items() if n != "base"}).model_dump()
        return open_pool(
            PoolConfig.model_validate(section | {"engine": {"type": "fake", "mode": mode}}), cache_dir=cache
        )

    def test_adapters_need_no_merging_and_full_models_do(self, decoders: Folders, tmp_path: Path) -> None:
        lora = train_adapter(decoders["base"], tmp_path / "lora").folder
        adapters = {"base": decoders["base"], "lora": lora}
        pool = self.open(adapters, tmp_path, "unmerged")
        assert pool.experts["lora"].merged_only is None
        assert pool.mode == self.open(adapters, tmp_path).mode == "unmerged"
        assert self.open(adapters, tmp_path, "merged").mode == "merged"
        mixed = self.open(adapters | {"full": decoders["nq"]}, tmp_path)
        assert mixed.mode == "merged"
        assert mixed.merged_only == "expert 'full': it is a full model, and no LoRA adapter"

    def test_what_can_only_be_merged_is_refused_where_unmerged_is_asked_for(
        self, decoders: Folders, tmp_path: Path
    ) -> None:
        dora = train_adapter(decoders["base"], tmp_path / "dora", use_dora=True).folder
        folders = {"base": decoders["base"], "dora": dora}
        assert self.open(folders, tmp_path).mode == "merged"
        with pytest.raises(ConfigError, match=r"engine\.mode is unmerged, and expert 'dora': it is DoRA") as caught:
            self.open(folders, tmp_path, "unmerged")
        assert caught.value.param == "engine.mode"

    @pytest.mark.parametrize(
        ("args", "is_refused"),
        [
            ({"tensor_parallel_size": 2}, True),
            ({"--pipeline-parallel-size": 2}, True),
            ({"speculative-config": {"method": "ngram"}}, True),
            ({"enable-prompt-embeds": True}, True),
            ({"tensor-parallel-size": 1, "enable-prompt-embeds": False, "max-num-seqs": 4}, False),
        ],
        ids=str,
    )
    def test_arguments_that_an_unmerged_engine_would_not_start_with(
        self, decoders: Folders, tmp_path: Path, args: dict[str, Any], is_refused: bool
    ) -> None:
        lora = train_adapter(decoders["base"], tmp_path / "lora").folder
        pool = self.open({"base": decoders["base"], "lora": lora}, tmp_path)
        engine = FakeEngineConfig(args=args)
        assert engine.mode_over(pool) == ("merged" if is_refused else "unmerged")
        if is_refused:
            merged = replace(pool, mode="merged")
            assert next(iter(args)).lstrip("-").replace("_", "-") in engine.reason_of_mode(merged)
            with pytest.raises(ConfigError, match=r"engine\.mode is unmerged, and engine\.args has"):
                FakeEngineConfig(args=args, mode="unmerged").mode_over(pool)

    def test_an_expert_that_is_added_later_is_held_to_it(self, decoders: Folders, tmp_path: Path) -> None:
        lora = train_adapter(decoders["base"], tmp_path / "lora").folder
        pool = self.open({"base": decoders["base"], "lora": lora}, tmp_path, "unmerged")
        with pytest.raises(IncompatibleModelsError, match="it is a full model, and no LoRA adapter; have the operator"):
            open_expert(pool, "late", decoders["nq"], cache_dir=tmp_path)
        assert open_expert(pool, "late", lora, cache_dir=tmp_path).merged_only is None
        merged = self.open({"base": decoders["base"], "lora": lora}, tmp_path, "merged")
        assert open_expert(merged, "late", decoders["nq"], cache_dir=tmp_path).name == "late"
