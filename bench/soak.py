"""Hours in minutes: tenants that ask, stream, hang up, make cocktails and delete them, on real engines, all at once.

One gateway with keys, a pool of pico decoders in real vLLM and an encoder pool in sentence-transformers. Each tenant
runs the same mix of work from a seed. Meanwhile the memory of the gateway and of the engine's processes is sampled. At
the end:

* every answer was that of transformers (or sentence-transformers) on parameters merged apart;
* the ledger of each tenant holds what its clients counted: the same tokens for answers that came whole, and at least
  the delivered ones for streams that the client broke off;
* memory: the median of the last quarter beside that of the second (the first warms up).

    python -m bench.soak --minutes 20
    python -m bench.soak --minutes 20 --mode unmerged       # the decoders' experts are adapters that share a batch
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import httpx
import numpy as np
import psutil
import yaml
from openai import AsyncOpenAI

from bench import invariant
from bench.machine import describe_machine
from bench.server import RunningServer, running_server
from cocktail_serve.pool import Mode
from tests.merging import linear
from tests.models import make_encoder_pool, pool_section

ADMIN_KEY = "soak-operator"
POOL, ENCODERS = "tied", "mini"
TENANTS = ("acme", "bolt", "crate", "delta")
SAMPLE_S = 5.0
NUM_PROMPTS = 24
LEDGER_DELAY_S = 3.0
"""What is counted is written within a second or so."""

EMBEDDING_TOLERANCE = 1e-5
"""Greatest distance of a coordinate from the reference: batches of other shapes round float32 sums otherwise."""

WORK = {"ask": 40, "stream": 40, "hang_up": 10, "embed": 20, "make_and_delete": 6, "fine_tune": 2, "list": 4}
"""What clients do, by how often."""


@dataclasses.dataclass
class Count:
    """What the clients of one tenant saw.

    Attributes:
        tokens_in: prompt tokens of answers that came whole, chats, completions and embeddings.
        tokens_out: generated tokens of answers that came whole.
        broken_prompts: streams that the client broke off; their prompts held `broken_in` tokens together.
        broken_out: tokens that they delivered.
        did: pieces of work by name.
    """

    tokens_in: int = 0
    tokens_out: int = 0
    broken_prompts: int = 0
    broken_in: int = 0
    broken_out: int = 0
    did: Counter[str] = dataclasses.field(default_factory=Counter)
    wrong: list[dict[str, Any]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Answers:
    """What is right: of decoders by (mixture, prompt), of encoders by (mixture, text); `num_tokens` by prompt."""

    decoder: Mapping[tuple[str, str], invariant.Reference]
    prompts: Sequence[str]
    num_tokens: Mapping[str, int]
    encoder: Mapping[tuple[str, str], np.ndarray]
    texts: Sequence[str]


ENCODER_MIXTURES = {"base": {"base": 1.0}, "faq": {"faq": 1.0}, "both": {"base": 0.2, "faq": 0.3, "code": 0.5}}


def count_tokens(model: Path, prompts: Sequence[str]) -> dict[str, int]:
    """Tokens of each prompt, as the engine counts them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return {prompt: len(tokenizer(prompt)["input_ids"]) for prompt in prompts}


def encoder_references(folders: Mapping[str, Path], texts: Sequence[str]) -> dict[tuple[str, str], np.ndarray]:
    """Embeddings of sentence-transformers on parameters merged apart, in float64."""
    from sentence_transformers import SentenceTransformer

    models = {name: SentenceTransformer(str(path), device="cpu") for name, path in folders.items()}
    states = {name: model.state_dict() for name, model in models.items()}
    mixed = SentenceTransformer(str(folders["base"]), device="cpu")
    result = {}
    for mixture, weights in ENCODER_MIXTURES.items():
        mixed.load_state_dict(linear(states, weights))
        for text, vector in zip(texts, mixed.encode(list(texts)), strict=True):
            result[mixture, text] = vector
    return result


class Tenant:
    """One customer: its clients share a key and a count."""

    def __init__(self, name: str, base_url: str, key: str, answers: Answers, *, seed: int) -> None:
        self.name = name
        self.count = Count()
        self.key = key
        self._answers = answers
        self._random = random.Random(seed)
        self._client = AsyncOpenAI(base_url=base_url, api_key=key, max_retries=8, timeout=120)
        self._num_made = 0
        self._models: dict[str, str] = {}

    async def start(self) -> None:
        """Makes the cocktails that stay."""
        for name, weights in invariant.COCKTAILS.items():
            self._models[name] = await self._make(f"{name}", POOL, weights)
        self._models["base"] = POOL
        self._models |= {expert: f"{POOL}/{expert}" for expert in invariant.EXPERTS}

    async def close(self) -> None:
        await self._client.close()

    async def work_until(self, moment: float) -> None:
        """One client: works from the mix until that time (`time.monotonic`)."""
        names = list(WORK)
        while time.monotonic() < moment:
            name = self._random.choices(names, weights=list(WORK.values()))[0]
            step: Callable[[], Awaitable[None]] = getattr(self, f"_{name}")
            await step()
            self.count.did[name] += 1

    async def _ask(self) -> None:
        mixture = self._random.choice(list(self._models))
        await self._check_answer(mixture, self._models[mixture], stream=False)

    async def _stream(self) -> None:
        mixture = self._random.choice(list(self._models))
        await self._check_answer(mixture, self._models[mixture], stream=True)

    async def _hang_up(self) -> None:
        """Closes a stream after some tokens: some in the middle, some after the last but before the end."""
        mixture, prompt = self._random.choice(list(self._models)), self._random.choice(self._answers.prompts)
        stop_after = self._random.randint(1, invariant.MAX_TOKENS)
        tokens: list[int] = []
        stream = await self._client.completions.create(
            **_question(self._models[mixture], prompt), stream=True, stream_options={"include_usage": True}
        )
        usage = None
        async with stream:
            async for chunk in stream:
                usage = chunk.usage or usage
                if chunk.choices:
                    tokens += chunk.choices[0].token_ids or []  # type: ignore[attr-defined]  # vLLM's field
                if len(tokens) >= stop_after:
                    break
        if usage is not None:
            self._add(usage)
        else:
            self.count.broken_prompts += 1
            self.count.broken_in += self._answers.num_tokens[prompt]
            self.count.broken_out += len(tokens)
        expected = self._answers.decoder[mixture, prompt]
        shown = dataclasses.replace(
            expected, tokens=expected.tokens[: len(tokens)], margins=expected.margins[: len(tokens)]
        )
        self._judge(shown, tokens, mixture)

    async def _embed(self) -> None:
        texts = self._random.sample(self._answers.texts, self._random.randint(1, 8))
        mixture, model = self._random.choice([("base", ENCODERS), ("faq", f"{ENCODERS}/faq")])
        await self._check_embeddings(mixture, model, texts)

    async def _make(self, name: str, pool: str, weights: Mapping[str, float]) -> str:
        answer = await self._client.post(
            "/cocktails?wait=60", body={"name": name, "pool": pool, "merging_weights": weights}, cast_to=httpx.Response
        )
        created = answer.json()
        if created["status"] != "ready":
            raise RuntimeError(f"the cocktail did not become ready: {created}")
        model_id: str = created["id"]
        return model_id

    async def _make_and_delete(self) -> None:
        """A cocktail from its making to its end."""
        self._num_made += 1
        name = f"made-{self._num_made}"
        if self._random.random() < 0.3:
            mixture = "both"
            model = await self._make(name, ENCODERS, ENCODER_MIXTURES[mixture])
            await self._check_embeddings(mixture, model, self._answers.texts[:2])
        else:
            mixture = self._random.choice(list(invariant.COCKTAILS))
            model = await self._make(name, POOL, invariant.COCKTAILS[mixture])
            await self._check_answer(mixture, model, stream=True)
        await self._client.models.delete(model)

    async def _fine_tune(self) -> None:
        """The same through files and jobs; the mixture is the examples' to choose, so its answer is not checked."""
        self._num_made += 1
        rows = [{"input": prompt, "output": "paris"} for prompt in self._random.sample(self._answers.prompts, 3)]
        content = "\n".join(map(json.dumps, rows)).encode()
        file = await self._client.files.create(file=("rows.jsonl", content), purpose="fine-tune")
        job = await self._client.fine_tuning.jobs.create(
            training_file=file.id, model=POOL, suffix=f"tuned-{self._num_made}"
        )
        while job.status not in ("succeeded", "failed", "cancelled"):
            await asyncio.sleep(0.3)
            job = await self._client.fine_tuning.jobs.retrieve(job.id)
        if job.status != "succeeded" or job.fine_tuned_model is None:
            raise RuntimeError(f"the job did not succeed: {job}")
        await self._client.models.delete(job.fine_tuned_model)
        await self._client.files.delete(file.id)

    async def _list(self) -> None:
        listed = {model.id async for model in self._client.models.list()}
        missing = set(self._models.values()) - listed
        if missing:
            self.count.wrong.append({"missing models": sorted(missing)})

    async def _check_answer(self, mixture: str, model: str, *, stream: bool) -> None:
        prompt = self._random.choice(self._answers.prompts)
        question = _question(model, prompt)
        tokens: list[int] = []
        if stream:
            async for chunk in await self._client.completions.create(
                **question, stream=True, stream_options={"include_usage": True}
            ):
                if chunk.usage is not None:
                    self._add(chunk.usage)
                if chunk.choices:
                    tokens += chunk.choices[0].token_ids or []  # type: ignore[attr-defined]  # vLLM's field
        else:
            answer = await self._client.completions.create(**question)
            tokens = list(answer.choices[0].token_ids)  # type: ignore[attr-defined]  # vLLM's field
            self._add(answer.usage)
        self._judge(self._answers.decoder[mixture, prompt], tokens, mixture)

    async def _check_embeddings(self, mixture: str, model: str, texts: Sequence[str]) -> None:
        answer = await self._client.embeddings.create(model=model, input=list(texts))
        self.count.tokens_in += answer.usage.prompt_tokens
        for text, data in zip(texts, answer.data, strict=True):
            distance = float(np.abs(np.asarray(data.embedding) - self._answers.encoder[mixture, text]).max())
            if not distance <= EMBEDDING_TOLERANCE:
                self.count.wrong.append({"model": model, "distance": distance})

    def _judge(self, expected: invariant.Reference, tokens: Sequence[int], mixture: str) -> None:
        right, _ = invariant.compare(expected, tokens)
        if not right:
            self.count.wrong.append({"model": mixture, "got": list(tokens), "want": list(expected.tokens)})

    def _add(self, usage: Any) -> None:
        self.count.tokens_in += usage.prompt_tokens
        self.count.tokens_out += usage.completion_tokens


def _question(model: str, prompt: str) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": invariant.MAX_TOKENS,
        "extra_body": {"return_token_ids": True},
    }


def memory_mib(pid: int) -> dict[str, float]:
    """Unshared memory of the gateway and, together, of all processes it started, MiB."""
    gateway = psutil.Process(pid)
    engines = 0
    for child in gateway.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            engines += child.memory_full_info().uss
    return {"gateway": gateway.memory_full_info().uss / 2**20, "engines": engines / 2**20}


async def sample_memory(pid: int, samples: list[dict[str, float]]) -> None:
    """Adds a sample every few seconds until cancelled."""
    while True:
        samples.append(await asyncio.to_thread(memory_mib, pid))
        await asyncio.sleep(SAMPLE_S)


@contextlib.asynccontextmanager
async def sampled_memory(pid: int) -> AsyncIterator[list[dict[str, float]]]:
    """Samples for as long as the block runs."""
    samples: list[dict[str, float]] = []
    sampler = asyncio.create_task(sample_memory(pid, samples))
    try:
        yield samples
    finally:
        sampler.cancel()
        await asyncio.gather(sampler, return_exceptions=True)


def compare_ledger(server: RunningServer, tenant: Tenant, since: Mapping[str, int]) -> dict[str, Any]:
    """What the ledger says of a tenant beside what its clients counted.

    Args:
        since: the ledger's sums before the work began.
    """
    ledger = ledger_of(server, tenant.key)
    count = tenant.count
    extra_out = ledger["tokens_out"] - since["tokens_out"] - count.tokens_out
    extra_in = ledger["tokens_in"] - since["tokens_in"] - count.tokens_in
    broken = count.broken_prompts
    return {
        "tenant": tenant.name,
        "completed": {"tokens_in": count.tokens_in, "tokens_out": count.tokens_out},
        "broken": {"streams": broken, "delivered_tokens_out": count.broken_out},
        "ledger_less_completed": {"tokens_in": extra_in, "tokens_out": extra_out},
        # what the ledger has beyond whole answers is the broken streams': each at least what was delivered of it, and
        # no more than it could generate
        "agrees": count.broken_out <= extra_out <= broken * invariant.MAX_TOKENS and extra_in == count.broken_in,
    }


def ledger_of(server: RunningServer, key: str) -> dict[str, int]:
    """A tenant's sums, once what was counted has been written."""
    time.sleep(LEDGER_DELAY_S)
    answer = server.http.get("/v1/usage", params={"group_by": "day"}, headers={"authorization": f"Bearer {key}"})
    rows = answer.raise_for_status().json()["data"]
    return {name: sum(row[name] for row in rows) for name in ("tokens_in", "tokens_out")}


def quarters(samples: Sequence[Mapping[str, float]], name: str) -> dict[str, float]:
    """Medians of a sampled value (MiB) in the four quarters of the time."""
    size = max(len(samples) // 4, 1)
    parts = [samples[at * size : (at + 1) * size] for at in range(4)]
    return {f"q{n}": round(statistics.median(s[name] for s in part), 1) for n, part in enumerate(parts, 1) if part}


async def soak(server: RunningServer, tenants: Sequence[Tenant], *, seconds: float, clients: int) -> list[Any]:
    """Runs the tenants' clients for that long; returns the samples of memory."""
    for tenant in tenants:
        await tenant.start()
    until = time.monotonic() + seconds
    async with sampled_memory(server.process.pid) as samples, asyncio.TaskGroup() as group:
        for tenant in tenants:
            for _ in range(clients):
                group.create_task(tenant.work_until(until))
    for tenant in tenants:
        await tenant.close()
    return samples


def write_config(folder: Path, decoders: Mapping[str, Path], encoders: Mapping[str, Path], *, mode: Mode) -> Path:
    """The pools, keys required."""
    mini = pool_section(ENCODERS, "encoder", encoders, {"type": "sentence_transformers", "dtype": "float32"})
    path = invariant.write_config(folder, {POOL: decoders}, slice_s=0.5, mode=mode, more_pools=[mini])
    config = yaml.safe_load(path.read_text()) | {"server": {"auth": "required"}}
    path.write_text(yaml.safe_dump(config))
    return path


def make_key(server: RunningServer, tenant: str) -> str:
    """A key of a tenant that may use and make models."""
    answer = server.http.post(
        "/admin/keys", json={"tenant": tenant}, headers={"authorization": f"Bearer {ADMIN_KEY}"}
    ).raise_for_status()
    key: str = answer.json()["key"]
    return key


def run(folder: Path, *, seconds: float, clients: int, mode: Mode, seed: int = 0) -> dict[str, Any]:
    """Builds everything in `folder`, serves it, soaks it, and says what came out."""
    decoders = invariant.make_pools(folder, mode)[POOL]
    encoders = make_encoder_pool(folder / ENCODERS, ("faq", "code"))
    prompts = invariant.make_prompts(NUM_PROMPTS, seed)
    texts = [f"{prompt} {number}" for number, prompt in enumerate(invariant.make_prompts(NUM_PROMPTS, seed + 1))]
    answers = Answers(
        invariant.references(decoders, invariant.MIXTURES, prompts),
        prompts,
        count_tokens(decoders["base"], prompts),
        encoder_references(encoders, texts),
        texts,
    )
    config = write_config(folder, decoders, encoders, mode=mode)
    environment = {"COCKTAIL_ADMIN_KEY": ADMIN_KEY}
    with running_server(config, log=folder / "server.log", env=environment) as server:
        tenants = [
            Tenant(name, f"{server.url}/v1", make_key(server, name), answers, seed=seed + number)
            for number, name in enumerate(TENANTS)
        ]
        since = {tenant.name: ledger_of(server, tenant.key) for tenant in tenants}
        samples = asyncio.run(soak(server, tenants, seconds=seconds, clients=clients))
        ledgers = [compare_ledger(server, tenant, since[tenant.name]) for tenant in tenants]
        swaps = int(server.metric_sum("cocktail_swaps_total"))
    wrong = [wrong for tenant in tenants for wrong in tenant.count.wrong]
    did = sum((tenant.count.did for tenant in tenants), Counter[str]())
    return {
        "machine": describe_machine(),
        "mode": mode,
        "seconds": round(seconds),
        "tenants": len(TENANTS),
        "clients": clients * len(TENANTS),
        "did": dict(did),
        "swaps": swaps,
        "wrong": len(wrong),
        "first_wrong": wrong[:5],
        "ledger": ledgers,
        "memory_mib": {name: quarters(samples, name) for name in ("gateway", "engines")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=3, help="of each tenant")
    parser.add_argument("--mode", choices=get_args(Mode), default="merged")
    parser.add_argument("--folder", type=Path, help="where the pools and logs are left; omitted: a temporary one")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        folder.mkdir(parents=True, exist_ok=True)
        outcome = run(folder, seconds=60 * arguments.minutes, clients=arguments.clients, mode=arguments.mode)
    print(json.dumps(outcome, indent=2))
    raise SystemExit(0 if not outcome["wrong"] and all(row["agrees"] for row in outcome["ledger"]) else 1)


if __name__ == "__main__":
    main()
