"""What `doctor` passes, starts; what it refuses does not, and both say why: pools broken in every way we know of."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cocktail_serve.cli.doctor.configuration import check_config
from cocktail_serve.config import load_settings
from cocktail_serve.engines.base import EmbeddingEngine, RerankingEngine
from cocktail_serve.errors import CocktailError
from cocktail_serve.gateway.app import create_app
from cocktail_serve.gateway.assembly import assembled
from cocktail_serve.gateway.gateway import Gateway
from cocktail_serve.gateway.lifecycle import Lifecycle
from cocktail_serve.gateway.metrics import GatewayMetrics
from cocktail_serve.gateway.server import bind
from cocktail_serve.progress import silent
from cocktail_serve.recipe import one_hot
from tests.models import (
    make_decoder,
    make_decoder_reranker,
    make_encoder,
    make_encoder_decoder,
    make_reranker,
    make_t5_encoder,
)

PARAMS = "model.safetensors"
SHARD = "model-00001-of-00001.safetensors"
START_S = 60.0


@dataclass
class World:
    """A configuration of one pool, and its models, to be broken.

    Attributes:
        base: folder of the base; `expert` is of the expert.
        pool, server, store: sections of the configuration.
    """

    folder: Path
    kind: str
    make: Callable[..., Path]
    engine: dict[str, Any] = field(default_factory=lambda: {"type": "sentence_transformers", "device": "cpu"})
    pool: dict[str, Any] = field(default_factory=dict)
    server: dict[str, Any] = field(default_factory=lambda: {"port": 0})
    store: dict[str, Any] = field(default_factory=lambda: {"cache_dir": "cache", "cache_bytes": 1000})

    def __post_init__(self) -> None:
        self.make(self.base)
        shutil.copytree(self.base, self.expert)

    @property
    def base(self) -> Path:
        return self.folder / "models" / "base"

    @property
    def expert(self) -> Path:
        return self.folder / "models" / "expert"

    def write(self) -> Path:
        experts = {"tuned": str(self.expert)} if self.expert.is_dir() else {}
        pool = {"id": "p", "kind": self.kind, "base": str(self.base), "experts": experts, "engine": self.engine}
        path = self.folder / "config.yaml"
        path.write_text(
            yaml.safe_dump({"server": self.server, "store": self.store, "reports": False, "pools": [pool | self.pool]})
        )
        return path

    def edit(self, file: str, **changes: Any) -> None:
        """Changes keys of a JSON file of base and expert; None removes one."""
        for folder in (self.base, self.expert):
            content = json.loads((folder / file).read_text()) | changes
            kept = {key: value for key, value in content.items() if value is not None}
            (folder / file).write_text(json.dumps(kept))

    def edit_params(self, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        for folder in (self.base, self.expert):
            params = load_file(folder / PARAMS)
            change(params)
            save_file(params, folder / PARAMS, metadata={"format": "pt"})

    def edit_modules(self, change: Callable[[list[dict[str, Any]]], None]) -> None:
        for folder in (self.base, self.expert):
            modules = json.loads((folder / "modules.json").read_text())
            change(modules)
            (folder / "modules.json").write_text(json.dumps(modules))

    def remove(self, *files: str) -> None:
        for folder in (self.base, self.expert):
            for file in files:
                (folder / file).unlink()


class Code:
    """A pickle that asks for a call while it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def nothing(world: World) -> None:
    pass


def no_tokenizer(world: World) -> None:
    world.remove("tokenizer.json", "tokenizer_config.json")


def unknown_tokenizer_class(world: World) -> None:
    world.edit("tokenizer_config.json", tokenizer_class="NoSuchTokenizer")


def malformed_tokenizer(world: World) -> None:
    for folder in (world.base, world.expert):
        (folder / "tokenizer.json").write_text("{")


def foreign_tokenizer(world: World) -> None:
    """Ids beyond the embeddings, in base and expert alike."""
    world.edit_params(lambda params: params.update({WORDS: params[WORDS][:100].clone()}))
    world.edit("config.json", vocab_size=100)


def no_config(world: World) -> None:
    world.remove("config.json")


def malformed_config(world: World) -> None:
    (world.base / "config.json").write_text("[]")


def unknown_architecture(world: World) -> None:
    world.edit("config.json", model_type="no-such-model")


def code_of_its_own(world: World) -> None:
    world.edit("config.json", model_type="own", auto_map={"AutoModel": "modeling.Own", "AutoConfig": "modeling.Config"})


def quantised(world: World) -> None:
    world.edit("config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def truncated(world: World) -> None:
    content = (world.base / PARAMS).read_bytes()
    (world.base / PARAMS).write_bytes(content[: len(content) // 2])


def shard_gone(world: World) -> None:
    names = list(load_file(world.base / PARAMS))
    (world.base / PARAMS).unlink()
    (world.base / f"{PARAMS}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, SHARD)}))


def index_of_more(world: World) -> None:
    names = list(load_file(world.base / PARAMS))
    (world.base / PARAMS).rename(world.base / SHARD)
    index = {"weight_map": dict.fromkeys([*names, "more.weight"], SHARD)}
    (world.base / f"{PARAMS}.index.json").write_text(json.dumps(index))


def pickled(world: World) -> None:
    (world.base / PARAMS).unlink()
    with (world.base / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"a": Code(world.folder / "ran")}, file)


def parameter_gone(world: World) -> None:
    world.edit_params(
        lambda params: params.pop(next(name for name in params if "layer.1" in name or "layers.1" in name))
    )


def other_shape_than_said(world: World) -> None:
    world.edit_params(lambda params: params.update({WORDS: torch.cat([params[WORDS]] * 2)}))


def not_a_number(world: World) -> None:
    world.edit_params(lambda params: params[WORDS].fill_(float("nan")))


def too_large_for_float16(world: World) -> None:
    world.edit_params(lambda params: params[WORDS].mul_(1e30))
    world.engine["dtype"] = "float16"


def no_base(world: World) -> None:
    shutil.rmtree(world.base)


def expert_is_the_base_again(world: World) -> None:
    world.pool["experts"] = {"one": str(world.base), "two": str(world.expert)}


def expert_of_another_shape(world: World) -> None:
    shutil.rmtree(world.expert)
    make_encoder(world.expert, hidden_size=64)


def adapter_of_another_base(world: World) -> None:
    shutil.rmtree(world.expert)
    world.expert.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["query"], "base_model_name_or_path": "x"}
    (world.expert / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.encoder.layer.0.attention.self.query"
    factors = {f"{name}.lora_A.weight": torch.ones(2, 7), f"{name}.lora_B.weight": torch.ones(7, 2)}
    save_file(factors, world.expert / "adapter_model.safetensors")


def cache_too_small(world: World) -> None:
    world.engine["cache_bytes"] = 1000


def no_such_device(world: World) -> None:
    world.engine["device"] = "cuda:99"


def unknown_key(world: World) -> None:
    world.engine["no_such_key"] = 1


def cache_dir_is_a_file(world: World) -> None:
    (world.folder / "file").write_text("")
    world.store["cache_dir"] = "file"


def no_such_host(world: World) -> None:
    world.server["host"] = "203.0.113.1"  # an address of documentation: no machine has it
    world.server["auth"] = "off"


def no_key(world: World) -> None:
    world.server["auth"] = "required"


def no_modules(world: World) -> None:
    world.remove("modules.json")


def malformed_modules(world: World) -> None:
    (world.base / "modules.json").write_text("{}")


def module_of_its_own(world: World) -> None:
    world.edit_modules(lambda modules: modules[1].update(type="own_code.Pooling"))


def no_such_module(world: World) -> None:
    world.edit_modules(lambda modules: modules[1].update(type="sentence_transformers.models.NoSuchModule"))


def no_pooling(world: World) -> None:
    world.edit_modules(lambda modules: modules.pop(1))


def pooling_without_settings(world: World) -> None:
    world.remove("1_Pooling/config.json")


def dense_of_another_size(world: World) -> None:
    world.edit("2_Dense/config.json", in_features=48)


def sparse(world: World) -> None:
    world.edit("config_sentence_transformers.json", model_type="SparseEncoder")


def sparse_of_before_it_was_said(world: World) -> None:
    world.edit("config_sentence_transformers.json", model_type=None)
    splade = "sentence_transformers.sparse_encoder.models.SpladePooling"
    world.edit_modules(lambda modules: modules[1].update(type=splade))


def multi_vector(world: World) -> None:
    world.edit("config_sentence_transformers.json", model_type="MultiVectorEncoder")


def late_interaction(world: World) -> None:
    world.edit("config_sentence_transformers.json", model_type="ColBERT")


def expert_is_sparse(world: World) -> None:
    path = world.expert / "config_sentence_transformers.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "SparseEncoder"}))


def cross_encoder(world: World) -> None:
    for folder in (world.base, world.expert):
        shutil.rmtree(folder)
        make_reranker(folder)


def prompt_too_long(world: World) -> None:
    world.pool["prompts"] = {"query": "a dog " * 100}


def dimension_too_large(world: World) -> None:
    world.pool["matryoshka_dimensions"] = [16, 64]


def no_dimension(world: World) -> None:
    world.pool["matryoshka_dimensions"] = [0]


def two_labels(world: World) -> None:
    for folder in (world.base, world.expert):
        shutil.rmtree(folder)
        make_reranker(folder, num_labels=2)


def embeds(world: World) -> None:
    for folder in (world.base, world.expert):
        shutil.rmtree(folder)
        make_encoder(folder)


def argument_of_ours(world: World) -> None:
    world.engine["args"] = {"port": 1}


def no_number(world: World) -> None:
    world.engine["args"] = {"max-num-seqs": "many"}


def variable_of_ours(world: World) -> None:
    world.engine["env"] = {"VLLM_API_KEY": "mine"}


def encodes(world: World) -> None:
    for folder in (world.base, world.expert):
        shutil.rmtree(folder)
        make_encoder(folder)


def encodes_and_decodes(world: World) -> None:
    for folder in (world.base, world.expert):
        shutil.rmtree(folder)
        make_encoder_decoder(folder)


def not_served(world: World) -> None:
    encodes_and_decodes(world)
    world.kind, world.engine = "encoder_decoder", {"type": "offline"}


WORDS = "embeddings.word_embeddings.weight"

Break = Callable[[World], None]

ENCODERS: Mapping[Break, list[str] | None] = {
    nothing: None,
    no_tokenizer: ["knows no words", "copy tokenizer.json"],
    unknown_tokenizer_class: None,  # tokenizer.json alone says enough
    malformed_tokenizer: ["tokenizer"],
    foreign_tokenizer: ["embeddings for 100 ids", "take the tokenizer that the model came with"],
    no_config: ["config.json is missing"],
    malformed_config: ["config.json must hold a JSON object"],
    unknown_architecture: ["no-such-model"],
    code_of_its_own: ["own"],
    quantised: ["is quantised", "use the float32, float16 or bfloat16 checkpoint"],
    truncated: [PARAMS],
    shard_gone: [SHARD, "fetch it again"],
    index_of_more: ["more.weight"],
    pickled: ["pytorch_model.bin"],
    parameter_gone: ["layer.1", "save it"],
    other_shape_than_said: [WORDS, "[332, 32]", "save it with the class"],
    not_a_number: ["base"],
    too_large_for_float16: ["p"],
    no_base: ["there is no model folder"],
    expert_is_the_base_again: None,
    expert_of_another_shape: ["hidden_size", "tuned"],
    adapter_of_another_base: ["tuned"],
    cache_too_small: ["engine.cache_bytes is 1000", "raise it"],
    no_such_device: ["engine.device 'cuda:99' cannot be used"],
    unknown_key: ["no_such_key"],
    cache_dir_is_a_file: ["file"],
    no_such_host: ["203.0.113.1"],
    no_key: ["COCKTAIL_ADMIN_KEY"],
    no_modules: ["has no modules.json", "SentenceTransformer(...).save(...)"],
    malformed_modules: ["modules.json must hold a list of modules"],
    module_of_its_own: ["own_code.Pooling", "never run"],
    no_such_module: ["NoSuchModule"],
    no_pooling: ["no pooling module"],
    pooling_without_settings: ["1_Pooling"],
    sparse: ["is a SparseEncoder of sentence-transformers", "serve it with a tool of its kind"],
    sparse_of_before_it_was_said: ["is a SparseEncoder of sentence-transformers"],
    multi_vector: ["is a MultiVectorEncoder of sentence-transformers"],
    late_interaction: ["is a ColBERT of sentence-transformers"],
    expert_is_sparse: ["expert is a SparseEncoder of sentence-transformers"],
    cross_encoder: ["set the pool's 'kind'"],
    prompt_too_long: ["prompts.query", "shorten it"],
    dimension_too_large: ["matryoshka_dimensions holds 64", "leave it out"],
    no_dimension: ["matryoshka_dimensions", "greater than or equal to 1"],
}

RERANKERS: Mapping[Break, list[str] | None] = {
    nothing: None,
    no_tokenizer: ["knows no words", "copy tokenizer.json"],
    two_labels: ["one label", "2 labels"],
    embeds: ["set the pool's 'kind'"],
    truncated: [PARAMS],
    cache_too_small: ["engine.cache_bytes"],
}

DECODERS: Mapping[Break, list[str] | None] = {
    argument_of_ours: ["engine.args may not set 'port'"],
    no_number: ["engine.args.max-num-seqs must be a number"],
    variable_of_ours: ["engine.env may not set VLLM_API_KEY"],
    encodes: ["not a decoder", "set the pool's 'kind'"],
    encodes_and_decodes: ["set the pool's 'kind' to encoder_decoder"],
    not_served: ["cannot be served", "a configuration of its own"],
    quantised: ["is quantised"],
    truncated: [PARAMS],
    shard_gone: [SHARD],
    unknown_key: ["no_such_key"],
}


def problems(config: Path) -> str:
    """What `doctor` finds wrong, in one text; empty: nothing."""
    found = [check for check in check_config(config, silent) if check.status == "problem"]
    return "\n".join(f"{check.name}: {check.detail} {check.fix}" for check in found)


def why_not_started(config: Path) -> str:
    """Starts the whole server but for its socket, and asks for something; empty: it answered."""
    try:
        settings = load_settings(config)
        bind(settings.server).close()
        create_app(settings)
        return asyncio.run(_run(settings))
    except CocktailError as error:
        return error.message
    except OSError as error:
        return str(error)


async def _run(settings: Any) -> str:
    async with assembled(settings, None, None, GatewayMetrics(), Lifecycle()) as gateway:
        engine = gateway.engines["p"]
        deadline = time.monotonic() + START_S
        while (snapshot := await engine.snapshot(deadline_s=10)).state in ("starting", "restarting"):
            assert time.monotonic() < deadline, f"it does not come up: {snapshot}"
            await asyncio.sleep(0.01)
        return str(snapshot.detail["reason"]) if snapshot.state != "ready" else await _answered(gateway)


async def _answered(gateway: Gateway) -> str:
    engine, pool = gateway.engines["p"], gateway.pools["p"]
    recipe = one_hot(pool, "base", dtype=engine.dtype)
    texts = ["the dog", "my card was stolen at the bank"]
    if isinstance(engine, EmbeddingEngine):
        assert torch.isfinite(torch.from_numpy((await engine.embed(recipe, texts)).vectors)).all()
    elif isinstance(engine, RerankingEngine):
        assert len((await engine.rerank(recipe, "a dog", texts)).scores) == 2
    else:
        await engine.mix_ahead(recipe)
    return ""


def hold_to_each_other(world: World, expected: list[str] | None) -> None:
    config = world.write()
    found = problems(config)
    why = why_not_started(config)
    assert bool(found) == bool(why), f"doctor says {found!r}, and the start {why!r}"
    assert bool(found) == (expected is not None), found
    for word in expected or []:
        assert word in found, found
        assert word in why, why
    assert not (world.folder / "ran").exists()


@pytest.mark.parametrize("broken", ENCODERS, ids=lambda broken: broken.__name__)
def test_an_encoder_pool(tmp_path: Path, broken: Break) -> None:
    world = World(tmp_path, "encoder", make_encoder)
    broken(world)
    hold_to_each_other(world, ENCODERS[broken])


@pytest.mark.parametrize("broken", RERANKERS, ids=lambda broken: broken.__name__)
def test_a_reranker_pool(tmp_path: Path, broken: Break) -> None:
    world = World(tmp_path, "reranker", make_reranker)
    broken(world)
    hold_to_each_other(world, RERANKERS[broken])


@pytest.mark.parametrize("broken", DECODERS, ids=lambda broken: broken.__name__)
def test_a_decoder_pool(tmp_path: Path, broken: Break) -> None:
    world = World(tmp_path, "decoder", make_decoder, engine={"type": "vllm"})
    broken(world)
    hold_to_each_other(world, DECODERS[broken])


@pytest.mark.parametrize("padding", [None, 2])
def test_a_reranker_made_of_a_decoder(tmp_path: Path, padding: int | None) -> None:
    hold_to_each_other(
        World(tmp_path, "reranker", lambda folder: make_decoder_reranker(folder, pad_token_id=padding)), None
    )


@pytest.mark.parametrize("broken", [nothing, dense_of_another_size], ids=lambda broken: broken.__name__)
def test_an_encoder_with_tied_parameters_and_a_dense_module(tmp_path: Path, broken: Break) -> None:
    world = World(tmp_path, "encoder", make_t5_encoder)
    broken(world)
    hold_to_each_other(world, None if broken is nothing else ["linear"])


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    world = World(tmp_path, "encoder", make_encoder)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        world.server["port"] = taken.getsockname()[1]
        hold_to_each_other(world, ["in use"])


def test_a_cache_of_another_server(tmp_path: Path) -> None:
    world = World(tmp_path, "encoder", make_encoder)
    with held(tmp_path / "cache" / "engines"):
        hold_to_each_other(world, ["give each server a cache_dir of its own"])


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    from filelock import FileLock

    run_dir.mkdir(parents=True)
    with FileLock(run_dir / "lock", is_singleton=False):
        yield
