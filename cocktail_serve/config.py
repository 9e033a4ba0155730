"""The configuration file: one YAML, read once at start, unknown keys refused, `COCKTAIL_*` variables on top."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from platformdirs import user_data_path
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from cocktail_serve.dtypes import DType
from cocktail_serve.errors import ConfigError
from cocktail_serve.example_rows import MAX_SEPARATOR
from cocktail_serve.pool import BASE, NAME_PATTERN, Kind, Member, Mode, Pool, with_article
from cocktail_serve.request_schema import fields_beside
from cocktail_serve.suggestions import did_you_mean

ENV_PREFIX = "COCKTAIL_"

MAX_REPLICAS = 64
"""Engines of one pool that one gateway starts and feeds."""

DEVICE_VARIABLES: Mapping[Literal["gpu", "cpu"], str] = {
    "gpu": "CUDA_VISIBLE_DEVICES",
    "cpu": "VLLM_CPU_OMP_THREADS_BIND",
}
"""What tells a server what it computes on."""


def _check_name(name: str) -> str:
    if not re.fullmatch(NAME_PATTERN, name):
        raise ValueError(f"{name!r} is not a name: use {NAME_PATTERN}")
    if name == BASE:
        raise ValueError(f"{BASE!r} is reserved for the pool's base model")
    return name


Name = Annotated[str, AfterValidator(_check_name)]


def _check_origin(origin: str) -> str:
    origin = origin.lower()
    if origin != "*" and not re.fullmatch(r"https?://[^\s/?#@]+", origin):
        raise ValueError(
            f"{origin!r} is not an origin: give scheme, host and port as browsers send them, without a path, as "
            "https://app.example.com or http://localhost:3000, or '*' for any"
        )
    return origin


Origin = Annotated[str, AfterValidator(_check_origin)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Source(_Section):
    """Where a model comes from: a local folder, or a hub id with an optional revision."""

    path: str = Field(
        description="Local folder (relative to the config file), or hub id: used only where there is no such folder."
    )
    revision: str | None = Field(None, description="Branch, tag or commit on the hub; pin a commit in production.")


def _source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


SourceField = Annotated[Source, BeforeValidator(_source)]


class _EngineBase(_Section):
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="dtype of the parameters in the engine; auto: as the base is stored."
    )

    def dtype_over(self, base: Member) -> DType:
        """The dtype of an engine over this base."""
        return base.dtype if self.dtype == "auto" else self.dtype

    def mode_over(self, pool: Pool) -> Mode:
        """How mixtures of this pool's models reach the engine.

        Raises:
            ConfigError: the configuration says unmerged, and an expert can only be merged.
        """
        return "merged"

    def reason_of_mode(self, pool: Pool) -> str | None:
        """Why mixtures of an opened pool's models reach the engine as they do; None: there is no other way."""
        return None


class VLLMEngineConfig(_EngineBase):
    """A vLLM server of its own, started and supervised by the gateway."""

    type: Literal["vllm"] = Field("vllm", description="vLLM, for decoders.")
    mode: Mode | None = Field(
        None,
        description="unmerged: the factors of experts that are LoRA adapters stay apart and every request brings its "
        "coefficients, so that any number of cocktails share a batch. merged: parameters are summed first, and recipes "
        "take turns. Omitted: unmerged where all experts of the configuration are adapters that can be, or the base is "
        "quantised, else merged.",
    )
    max_model_len: int | None = Field(None, ge=8, description="Context length in tokens; omitted: the model's own.")
    slice_s: float = Field(
        2.0, ge=0, description="How long the resident recipe is served while requests for others wait, seconds."
    )
    drain_s: float = Field(
        30.0, ge=0, description="How long a swap lets running streams finish before it ends them, seconds."
    )
    queue_timeout_s: float = Field(
        60.0, gt=0, le=600, description="How long a request waits for its recipe's turn, seconds."
    )
    max_concurrency: int | None = Field(
        None,
        ge=1,
        description="Requests inside the engine at once; more wait in the gateway, where tenants take turns. Omitted: "
        "args.max_num_seqs, else 32 on a CPU and 256 on a GPU.",
    )
    max_concurrency_beside: int | None = Field(
        None,
        ge=1,
        description="Of these, requests of one tenant while other tenants have fewer inside, in an unmerged pool: "
        "lower keeps the others' answers faster beside a tenant that floods, and the engine emptier. Omitted: 5 on a "
        "CPU, no bound but an equal share on a GPU.",
    )
    cache_bytes: ByteSize = Field(
        ByteSize(2 * 1024**3),
        description="Merged parameters kept in memory by the worker, least recently used go first.",
    )
    expert_memory: ByteSize = Field(
        ByteSize(0),
        description="Memory, on the device of the parameters, for models kept in the engine's own layout: their linear "
        "mixtures are summed in place instead of read from files. Where the engine packs its parameters, as on most "
        "CPUs, it is found out at the start and mixtures are streamed. On a GPU it needs a bound of the KV cache in "
        "args (gpu-memory-utilization or kv-cache-memory-bytes).",
    )
    start_timeout_s: float = Field(600.0, gt=0, description="How long the server may take to start, seconds.")
    swap_timeout_s: float = Field(
        300.0, gt=0, description="How long one mix may take before the engine counts as hung, seconds."
    )
    allow_chat_template: bool = Field(False, description="Let requests bring a chat template of their own.")
    args: dict[str, Any] = Field(
        default_factory=dict,
        description="Further vLLM engine arguments by command-line name without the dashes; true is a bare flag. "
        "A chat-template or generation-config that is a path may be relative to the configuration file.",
    )
    env: dict[str, str] = Field(default_factory=dict, description="Environment variables of the server process.")
    replicas: int = Field(
        1,
        ge=1,
        le=MAX_REPLICAS,
        description="Servers of this pool on this machine, each with parameters, KV cache and caches of its own: what "
        "is set here of memory and of requests is set for each.",
    )
    devices: list[str] = Field(
        default_factory=list,
        description="What each replica computes on, one entry for each: GPUs as CUDA_VISIBLE_DEVICES names them (`0`, "
        "or `0,1` with tensor-parallel-size 2), or of vLLM's build for CPUs the cores (`0-15`), as "
        "VLLM_CPU_OMP_THREADS_BIND has them. Omitted: all that there is, for all of them.",
    )

    @model_validator(mode="after")
    def _each_replica_has_its_devices(self) -> Self:
        if self.devices and len(self.devices) != self.replicas:
            raise ValueError(f"devices has {len(self.devices)} entries for {self.replicas} replicas: give one for each")
        taken = sorted(set(DEVICE_VARIABLES.values()) & self.env.keys())
        if self.devices and taken:
            raise ValueError(f"env sets {taken[0]}, which devices sets for each replica: leave one of them out")
        return self

    def argument(self, name: str) -> Any:
        """One of `args`, however its name is written there; None where it is not given."""
        return next((value for key, value in self.args.items() if _argument_name(key) == name), None)

    def mode_over(self, pool: Pool) -> Mode:
        merged_only = self._merged_only(pool)
        if self.mode == "unmerged" and merged_only is not None:
            advice = "set it to merged, or " if pool.base.quantisation is None else ""
            raise ConfigError(
                f"pool {pool.id!r}: engine.mode is unmerged, and {merged_only}; {advice}leave that out",
                param="engine.mode",
            )
        if self.mode is not None:
            return self.mode
        is_of_adapters = bool(pool.experts) or pool.base.quantisation is not None
        return "unmerged" if is_of_adapters and merged_only is None else "merged"

    def reason_of_mode(self, pool: Pool) -> str:
        if self.mode is not None:
            return f"engine.mode is {self.mode}"
        if pool.mode == "unmerged" and pool.base.quantisation is not None:
            return f"the base is quantised ({pool.base.quantisation}), and nothing is merged into such a base"
        if pool.mode == "unmerged":
            return "all experts of the configuration are LoRA adapters that can be served unmerged"
        return self._merged_only(pool) or "the configuration has no experts"

    def _merged_only(self, pool: Pool) -> str | None:
        """Why a pool's mixtures can only reach this engine merged; None: they need not be."""
        for name, harmless in _MERGED_ONLY_ARGUMENTS.items():
            if (value := self.argument(name)) not in harmless:
                return f"engine.args has {name}: {value}, with which a step's rows are not one for each token"
        return pool.merged_only


_PATH_ARGUMENTS = frozenset({"chat-template", "generation-config"})
"""Engine arguments that may name a file or a folder."""


_MERGED_ONLY_ARGUMENTS: Mapping[str, tuple[Any, ...]] = {
    "tensor-parallel-size": (None, 1),
    "pipeline-parallel-size": (None, 1),
    "speculative-config": (None,),
    "enable-prompt-embeds": (None, False),
    "enable-dbo": (None, False),
}
"""Engine arguments that the plugin refuses of an engine that is served unmerged, unless their value is one of these."""


def _argument_name(key: str) -> str:
    """A vLLM argument's name as its own help writes it."""
    return key.lstrip("-").replace("_", "-")


class FakeEngineConfig(VLLMEngineConfig):
    """A server that speaks vLLM's surface without a model: for tests and for measuring the gateway alone."""

    type: Literal["fake"] = Field("fake", description="No model at all.")  # type: ignore[assignment]


class SentenceTransformersEngineConfig(_EngineBase):
    """sentence-transformers inside the gateway process, on threads of its own."""

    type: Literal["sentence_transformers"] = Field(
        "sentence_transformers", description="sentence-transformers, for encoders and rerankers."
    )
    token_inputs: bool = Field(False, description="Accept arrays of token ids as embedding inputs.")
    device: str = Field("auto", description="auto: cuda where there is one, else cpu.")
    max_batch_tokens: int | None = Field(
        None,
        ge=64,
        description="Tokens, padding included, of one forward pass; omitted: 1024 on a CPU, 32768 on a GPU.",
    )
    concurrent_passes: int | None = Field(
        None,
        ge=1,
        le=64,
        description="Forward passes computed at once, each on its share of the cores; omitted: as many as there are "
        "cores but at most 4 on a CPU, 1 on a GPU.",
    )
    max_input_tokens: int = Field(300_000, ge=1, description="Tokens of one request; more is refused with 400.")
    cache_bytes: ByteSize = Field(
        ByteSize(1024**3), description="Mixed state dicts kept in memory, least recently used go first."
    )
    queue_timeout_s: float = Field(60.0, gt=0, le=600, description="How long a request waits for a batch, seconds.")

    @model_validator(mode="before")
    @classmethod
    def _is_one(cls, data: Any) -> Any:
        if isinstance(data, dict) and {"replicas", "devices"} & data.keys():
            raise ValueError(
                "replicas and devices are of vllm: encoders and rerankers compute inside the gateway's process, on all "
                "of its cores or one GPU (concurrent_passes, device); for more, run several gateways on one store"
            )
        return data


class OfflineEngineConfig(_EngineBase):
    """No engine: the pool is weighed and mixed from the command line, and not served."""

    type: Literal["offline"] = Field("offline", description="Not served: for encoder-decoders, which no engine runs.")
    max_model_len: int | None = Field(
        None, ge=8, description="Tokens of an input and of an output; omitted: the model's own, if it has a limit."
    )


ServedEngineConfig = VLLMEngineConfig | FakeEngineConfig | SentenceTransformersEngineConfig

EngineConfig = Annotated[ServedEngineConfig | OfflineEngineConfig, Field(discriminator="type")]

_ENGINES_OF: dict[Kind, tuple[str, ...]] = {
    "decoder": ("vllm", "fake"),
    "encoder": ("sentence_transformers",),
    "reranker": ("sentence_transformers",),
    "encoder_decoder": ("offline",),
}


class PoolConfig(_Section):
    """One base model and its experts."""

    id: Name = Field(description="Name of the pool, and model id of its base.")
    kind: Kind = Field(description="What its models are; decides which routes they answer.")
    base: SourceField = Field(description="The model that all experts were fine-tuned from.")
    experts: dict[Name, SourceField] = Field(default_factory=dict, description="Fine-tuned models, by name.")
    engine: EngineConfig = Field(description="What runs the pool.")
    max_examples: int = Field(100, ge=1, le=10_000, description="More examples than this are sampled, with a warning.")
    example_separator: str | None = Field(
        None,
        max_length=MAX_SEPARATOR,
        description="What joins `input` and `output` of a decoder's examples, and is predicted with the output. Left "
        "out: one space, as LM-Cocktail has it, and nothing where the input ends in white space.",
    )
    prompts: dict[str, str] = Field(
        default_factory=dict, description="Text put before an embedding input, by prompt_name."
    )
    matryoshka_dimensions: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=list, description="Values of `dimensions` the model was trained for."
    )
    truncate: bool = Field(False, description="Cut inputs that are too long instead of refusing them.")

    @property
    def served_engine(self) -> ServedEngineConfig:
        """The engine's section.

        Raises:
            ConfigError: it is `offline`.
        """
        if isinstance(self.engine, OfflineEngineConfig):
            raise ConfigError(
                f"pool {self.id!r} cannot be served: no engine runs models of kind {self.kind}; `cocktail-serve weigh` "
                "and `mix` take the pool, and the folder that `mix` writes loads in transformers. Keep the pool in a "
                "configuration of its own",
                param="engine.type",
            )
        return self.engine

    @property
    def is_computed_here(self) -> bool:
        """Whether its models run in this process, by torch, and not in a server of their own."""
        return isinstance(self.engine, SentenceTransformersEngineConfig)

    @property
    def calls_tools(self) -> bool:
        """Whether its models decide by themselves to call the tools of a request."""
        return isinstance(self.engine, VLLMEngineConfig) and bool(self.engine.argument("enable-auto-tool-choice"))

    @property
    def allow_chat_template(self) -> bool:
        """Whether requests may bring a chat template of their own."""
        return isinstance(self.engine, VLLMEngineConfig) and self.engine.allow_chat_template

    @property
    def token_inputs(self) -> bool:
        """Whether embedding inputs may be arrays of token ids."""
        return isinstance(self.engine, SentenceTransformersEngineConfig) and self.engine.token_inputs

    @model_validator(mode="after")
    def _engine_fits_kind(self) -> PoolConfig:
        wanted = _ENGINES_OF[self.kind]
        if self.engine.type not in wanted:
            raise ValueError(
                f"{with_article(self.kind)} pool needs engine.type {' or '.join(wanted)}, not {self.engine.type!r}"
            )
        return self


class ServerConfig(_Section):
    """Where the gateway listens, and for whom."""

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    auth: Literal["auto", "required", "off"] = Field(
        "auto",
        description="Whether requests need a key. auto: not on loopback, unless a proxy forwards them; required "
        "elsewhere. off: nobody needs one, behind a proxy either. A key that is sent is honoured or refused always.",
    )
    max_request_bytes: ByteSize = Field(ByteSize(32 * 1024**2), description="Larger bodies are refused with 413.")
    shutdown_grace_s: float = Field(
        30.0, ge=0, le=3600, description="How long open answers may go on after a signal to stop, seconds."
    )
    log_format: Literal["text", "json"] = Field(
        "text",
        description="json: one object a line. Either has a line for each request, which never holds what it said.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="The least that is logged: a request's line is info, a probe's is debug."
    )
    expert_roots: list[Path] = Field(
        default_factory=list,
        description="Folders under which `POST /admin/pools/{id}/experts` may find models; none: nothing can be added "
        "while the server runs.",
    )
    ready_deadline_s: float = Field(5.0, gt=0, description="How long /ready waits for each engine, seconds.")
    cors_origins: list[Origin] = Field(
        default_factory=list,
        description="Origins, as `https://app.example.com`, whose pages browsers let call this server and read its "
        'answers; `"*"`: any. Empty: browsers refuse all pages but those of the server itself.',
    )

    @property
    def requires_key(self) -> bool:
        if self.auth == "auto":
            return not self.is_on_loopback
        return self.auth == "required"

    @property
    def is_on_loopback(self) -> bool:
        """Whether only this machine reaches the address."""
        return _is_loopback(self.host)

    @property
    def reason_open(self) -> str:
        """Why requests need no key, for who wonders; empty where they need one."""
        if self.requires_key:
            return ""
        return f"server.auth is {self.auth!r}" + (f" and server.host {self.host}" if self.auth == "auto" else "")


class RetentionConfig(_Section):
    """How long things are kept that nobody deletes. What is deleted by request goes at once."""

    failed_days: float | None = Field(
        30.0,
        gt=0,
        description="Cocktails that failed or were cancelled, since they were last asked for; null: always.",
    )
    jobs_days: float | None = Field(
        90.0,
        gt=0,
        description="Fine-tuning jobs and their events, and batches, since they ended; what they made stays; null: "
        "always.",
    )
    audit_days: float | None = Field(
        400.0, gt=0, description="Lines of the audit log; null: always. Usage is a sum by day and stays."
    )


DEFAULT_CACHE_DIR = Path("~/.cache/cocktail-serve")
_REGISTRY = "registry.sqlite"


class StoreConfig(_Section):
    """What outlives the process."""

    url: str | None = Field(
        None,
        description="URL of the registry: `sqlite:///path` or `postgresql://user@host/name`. Omitted: SQLite in "
        "`registry.sqlite` of cache_dir, where one is set; else of the user's data folder, "
        "`~/.local/share/cocktail-serve` or below XDG_DATA_HOME.",
    )
    cache_dir: Path = Field(
        DEFAULT_CACHE_DIR,
        description="Folder for what can be made again: kept fingerprints and tokenizers, logs of engines. One that is "
        "set, and is another than this, holds the registry too, unless `url` says where that is.",
    )
    cache_bytes: ByteSize = Field(
        ByteSize(50 * 1000**3),
        description="Disk space for kept fingerprints and tokenizers: each start deletes the least recently used "
        "beyond it. `doctor` checks for it. No merged copy is written.",
    )

    lease_s: float = Field(
        15.0,
        gt=0,
        le=600,
        description="How long a gateway may give no sign of life before others on the same store take its jobs over, "
        "seconds.",
    )
    poll_s: float = Field(
        0.5, gt=0, le=60, description="How often a gateway looks for what others on the same store changed, seconds."
    )

    retention: RetentionConfig = Field(RetentionConfig(), description="How long things are kept that nobody deletes.")

    @property
    def registry_path(self) -> Path:
        """The file of the registry, where `url` names no database."""
        folder = user_data_path("cocktail-serve") if self._is_cache_dir_default else self.cache_dir
        return folder / _REGISTRY

    @property
    def former_registry_path(self) -> Path | None:
        """Where earlier releases kept that file, if it was elsewhere."""
        return self.cache_dir.expanduser() / _REGISTRY if self._is_cache_dir_default else None

    @property
    def database_url(self) -> str:
        return self.url or f"sqlite:///{self.registry_path}"

    @property
    def _is_cache_dir_default(self) -> bool:
        return self.cache_dir.expanduser() == DEFAULT_CACHE_DIR.expanduser()


Weighting = Literal["softmax", "paper", "gradient", "uniform", "search", "blackbox"]
"""How losses become weights."""

TEMPERATURES: Mapping[Kind, float] = {"decoder": 0.2, "encoder_decoder": 0.2, "encoder": 5.0, "reranker": 5.0}
"""tau by kind of pool, where neither request nor configuration names one (docs/adr/0011-default-temperature.md).

The same tau means other weights for other losses: near 0 for every encoder where a few examples are easily told apart,
nats apart where they are not, and tenths apart for related decoders. These measured best, as far as anything did.
"""


class CocktailDefaults(_Section):
    """What a request means when it leaves an option out; recorded in the cocktail."""

    weighting: Weighting = Field("softmax", description="How losses become weights.")
    temperature: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="tau of softmax(-loss / tau); lower is more selective. Omitted: by the pool's kind, "
        + ", ".join(f"{tau:g} for `{kind}`" for kind, tau in TEMPERATURES.items())
        + ".",
    )
    alpha: float = Field(0.5, ge=0, le=1, description="Share of the target, where a request names one.")

    def temperature_of(self, kind: Kind) -> float:
        """tau of a pool of this kind, where a request names none."""
        return TEMPERATURES[kind] if self.temperature is None else self.temperature


class Limits(_Section):
    """What one tenant may use. Omitted: no limit. `cocktail-serve limits` says otherwise for one tenant."""

    requests_per_minute: int | None = Field(
        None, ge=1, description="Requests that ask a model, or make, change or delete something; reading is free."
    )
    tokens_per_minute: int | None = Field(
        None, ge=1, description="Tokens in and out of all models; scoring examples is not counted here."
    )
    concurrent_requests: int | None = Field(None, ge=1, description="Requests to models in flight, streams included.")
    cocktails: int | None = Field(
        None,
        ge=0,
        description="Versions kept, whatever their state; of inline ones as many more, least recently used go first.",
    )
    example_bytes: ByteSize | None = Field(
        None, ge=0, description="Size of all examples kept: those of cocktails, inline ones included, and files."
    )
    scoring_jobs: int | None = Field(
        None, ge=0, description="Jobs of cocktails that have not ended, inline ones and dry runs included."
    )


class Settings(_Section):
    """The whole configuration. Build it with `load_settings`."""

    server: ServerConfig = Field(ServerConfig(), description="Where the gateway listens, and for whom.")
    store: StoreConfig = Field(StoreConfig(), description="What outlives the process.")
    defaults: CocktailDefaults = Field(CocktailDefaults(), description="What requests mean by what they leave out.")
    limits: Limits = Field(Limits(), description="What each tenant may use.")
    pools: list[PoolConfig] = Field(min_length=1, description="The models to mix and serve.")
    reports: bool = Field(
        True,
        description="Find out in the background what each ready cocktail can be expected to do, by at most five "
        "mixtures more; false: only when its report is asked for.",
    )
    max_inline_cocktails: int = Field(1000, ge=1, description="Inline cocktails kept; least recently used go first.")
    admin_key: SecretStr | None = Field(None, description="The first admin key; from COCKTAIL_ADMIN_KEY only.")

    @model_validator(mode="after")
    def _pool_ids_are_unique(self) -> Settings:
        ids = [pool.id for pool in self.pools]
        twice = sorted({pool_id for pool_id in ids if ids.count(pool_id) > 1})
        if twice:
            raise ValueError(f"pool ids must be unique, twice there: {twice}")
        return self

    def check_servable(self) -> None:
        """Raises ConfigError for a pool that no engine serves, and where a key is required and none is set."""
        for pool in self.pools:
            _ = pool.served_engine
        if self.server.requires_key and self.admin_key is None:
            raise ConfigError(
                f"with server.auth {self.server.auth!r} and server.host {self.server.host!r} requests need a key, "
                "and none is set: set COCKTAIL_ADMIN_KEY, or listen on 127.0.0.1",
                param="server.auth",
            )

    def pool(self, pool_id: str) -> PoolConfig:
        """What the configuration says of a pool; ConfigError where it has none of this id."""
        for pool in self.pools:
            if pool.id == pool_id:
                return pool
        known = [pool.id for pool in self.pools]
        raise ConfigError(
            f"the configuration has no pool {pool_id!r}; it has: {', '.join(known)}{did_you_mean(pool_id, known)}",
            param="pool",
        )


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would keep the last: a lost expert is hard to notice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_settings(path: Path | str, *, environ: Mapping[str, str] = os.environ) -> Settings:
    """Reads a configuration file and lays the environment over it.

    `COCKTAIL_SERVER__PORT=9000` sets `server.port`; two underscores step into a section. Relative paths are relative
    to the file.

    Raises:
        ConfigError: no such file, no YAML, an unknown key, a value out of bounds; names the key.
    """
    path = Path(path)
    try:
        data = yaml.load(path.read_text(), Loader=_UniqueKeyLoader)
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration file {path}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path} as YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping with the keys server, store, pools; got {type(data).__name__}")
    if "admin_key" in data:
        raise ConfigError(f"{path}: admin_key is a secret and never read from a file; set {ENV_PREFIX}ADMIN_KEY")
    _overlay(data, environ)
    try:
        settings = Settings.model_validate(data)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc'])) or '(top)'}: {_told(e)}" for e in error.errors(include_url=False)]
        raise ConfigError(f"{path} is not a valid configuration:\n" + "\n".join(lines)) from error
    return _resolve_paths(settings, path.resolve().parent)


def _told(error: ErrorDetails) -> str:
    """What is wrong, and for a key that is not known, which may have been meant."""
    if error["type"] != "extra_forbidden":
        return error["msg"]
    return f"{error['msg']}{did_you_mean(str(error['loc'][-1]), fields_beside(Settings, error['loc']))}"


def _overlay(data: dict[str, Any], environ: Mapping[str, str]) -> None:
    for variable in sorted(environ):
        if not variable.startswith(ENV_PREFIX):
            continue
        *sections, leaf = variable.removeprefix(ENV_PREFIX).lower().split("__")
        if not sections and leaf not in Settings.model_fields:
            continue  # COCKTAIL_API_KEY and the like are somebody else's
        here = data
        for section in sections:
            here = here.setdefault(section, {})
            if not isinstance(here, dict):
                raise ConfigError(f"{variable} steps into {section!r}, which is not a section")
        raw = environ[variable]
        try:
            here[leaf] = raw if leaf == "admin_key" else yaml.safe_load(raw)
        except yaml.YAMLError as error:
            raise ConfigError(f"cannot read the value of {variable} as YAML: {error}") from error


def _resolve_paths(settings: Settings, folder: Path) -> Settings:
    def resolve(source: Source) -> Source:
        local = _from(folder, Path(source.path))
        # what can be no hub id is named whole though it is not there, so that errors say where it was looked for
        is_local = local.exists() or not is_hub_id(source.path)
        return source.model_copy(update={"path": str(local)}) if is_local else source

    def resolve_argument(key: str, value: Any) -> Any:
        if _argument_name(key) not in _PATH_ARGUMENTS or not isinstance(value, str) or "\n" in value:
            return value  # a template may stand there itself
        try:
            local = _from(folder, Path(value))
            return str(local) if local.exists() else value
        except OSError:  # longer than any path
            return value

    def resolve_engine(engine: EngineConfig) -> EngineConfig:
        if not isinstance(engine, VLLMEngineConfig):
            return engine
        return engine.model_copy(update={"args": {key: resolve_argument(key, v) for key, v in engine.args.items()}})

    pools = [
        pool.model_copy(
            update={
                "base": resolve(pool.base),
                "experts": {name: resolve(source) for name, source in pool.experts.items()},
                "engine": resolve_engine(pool.engine),
            }
        )
        for pool in settings.pools
    ]
    store = settings.store.model_copy(update={"cache_dir": _from(folder, settings.store.cache_dir)})
    if (
        store.url
        and store.url.startswith("sqlite:///")
        and not store.url.startswith("sqlite:////")
        and store.url != "sqlite:///:memory:"
    ):
        if "?" in str(folder):
            raise ConfigError(
                f"store.url is relative to {folder}, and no URL can name a folder with '?'; name the file by its whole "
                "path, in another folder",
                param="store.url",
            )
        store = store.model_copy(
            update={"url": f"sqlite:///{_from(folder, Path(store.url.removeprefix('sqlite:///')))}"}
        )
    roots = [_from(folder, root) for root in settings.server.expert_roots]
    server = settings.server.model_copy(update={"expert_roots": roots})
    return settings.model_copy(update={"pools": pools, "store": store, "server": server})


def is_hub_id(path: str) -> bool:
    """Whether a source that is no folder may be a model of the hub: `name` or `owner/name`."""
    return not (Path(path).is_absolute() or path.startswith((".", "~")) or path.count("/") > 1)


def _from(folder: Path, path: Path) -> Path:
    """A path of the file as a whole one, without `..` in it."""
    whole = folder / path.expanduser()
    return whole.resolve() if ".." in whole.parts else whole


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


__all__ = [
    "CocktailDefaults",
    "DType",
    "EngineConfig",
    "FakeEngineConfig",
    "Limits",
    "OfflineEngineConfig",
    "PoolConfig",
    "SentenceTransformersEngineConfig",
    "ServedEngineConfig",
    "ServerConfig",
    "Settings",
    "Source",
    "StoreConfig",
    "VLLMEngineConfig",
    "load_settings",
]
