"""The worker extension: mixes a recipe into the live parameters, from the models' files or from what is kept of them.

vLLM adds the class to its Worker's bases, so every name begins with `cocktail_`. Its methods are called by
`collective_rpc` on every rank: arguments and results are plain JSON values (no insecure serialisation), and nothing
is ever raised, since with several ranks an exception leaves replies queued that the next call would read as its own.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cocktail_serve.checkpoints.unchanged import check_unchanged
from cocktail_serve.errors import ConfigError, IncompatibleModelsError
from cocktail_serve.merging.native import kernel_name
from cocktail_serve.merging.threads import allow_cores
from cocktail_serve.recipe import Recipe
from vllm_cocktail.calls import rpc_method
from vllm_cocktail.captured import CapturedExperts, capture
from vllm_cocktail.launch import is_cpu_build
from vllm_cocktail.manifest import Manifest
from vllm_cocktail.mixer import Mixer
from vllm_cocktail.output_logprobs import OutputLogprobs
from vllm_cocktail.replies import CapturedWorker, MixedWorker, ParameterSource, ProbedWorker, WorkerDigest

if TYPE_CHECKING:
    from torch import Tensor, nn

# a child of vLLM's logger, whose handlers and level it so shares
logger = logging.getLogger("vllm.cocktail.worker")


class CocktailWorkerExtension:
    """What vLLM's Worker gains by `--worker-extension-cls vllm_cocktail.worker.CocktailWorkerExtension`."""

    # what the Worker brings
    vllm_config: Any
    model_runner: Any
    reload_weights: Callable[..., None]

    # the Worker's __init__ is vLLM's, so `cocktail_prepare` sets these
    cocktail_mixer: Mixer | None = None
    cocktail_resident: str | None = None
    cocktail_experts: CapturedExperts | None = None

    @rpc_method
    def cocktail_prepare(self) -> WorkerDigest:
        """Gets this worker ready to mix, once vLLM has loaded the base.

        Returns:
            `digest` of the resident recipe.
        """
        manifest = Manifest.from_environ()
        require_mixable(self.vllm_config, manifest)
        # its loader has read the files by now: what they were before and are after, they were meanwhile
        check_unchanged(manifest.members[manifest.base])
        world_size = self.vllm_config.parallel_config.world_size
        if world_size == 1 and is_cpu_build():  # several keep to their own, whose memory is near
            _allow_cores_of_server()
        # every rank keeps whole tensors, the bound is for the server
        self.cocktail_mixer = Mixer(
            manifest, cache_bytes=manifest.cache_bytes // world_size, reread=Manifest.from_environ
        )
        self.cocktail_resident = manifest.resident
        if hasattr(self.model_runner, "_get_prompt_logprobs_dict"):  # of V1: V2 computes them of the whole prompt
            OutputLogprobs(self.model_runner).install()
        return {"digest": self.cocktail_resident}

    @rpc_method
    def cocktail_probe(self) -> ProbedWorker:
        """Says what this worker holds."""
        mixer, experts = _ready(self.cocktail_mixer), self.cocktail_experts
        cache = mixer.cache
        return {
            "digest": self.cocktail_resident,
            "cached": cache.digests,
            "cached_bytes": cache.num_bytes,
            "cache_bytes": cache.max_bytes,
            "model_dtype": mixer.manifest.dtype,
            "mixing_kernel": kernel_name(),
            "captured": experts.fingerprints if experts else [],
            "captured_bytes": experts.num_bytes if experts else 0,
        }

    @rpc_method
    def cocktail_capture(self) -> CapturedWorker:
        """Keeps the pool's models as this worker holds them, if that is possible. Before the first request.

        `ok: False` means that the engine is lost, as after `cocktail_mix`.
        """
        mixer = _ready(self.cocktail_mixer)
        manifest = mixer.manifest
        members = mixer.keepable()
        reason = mixer.why_not_captured(members)
        if reason is None:
            base = Recipe(manifest.base, ((manifest.base, 1.0),), manifest.dtype)
            captured = capture(
                self.model_runner.get_model(),
                members,
                base=manifest.base,
                dtype=manifest.dtype,
                load=self._cocktail_stream,
                max_bytes=manifest.expert_bytes // self.vllm_config.parallel_config.world_size,
                excluded=_tensors_in(getattr(self.model_runner, "kv_caches", [])),
            )
            if isinstance(captured, CapturedExperts):
                self.cocktail_experts = captured
                captured.mix(base)
                self.cocktail_resident = base.digest
            else:
                reason = captured
                self._cocktail_stream(base)
        return {"digest": self.cocktail_resident, "reason": reason}

    @rpc_method
    def cocktail_release(self) -> WorkerDigest:
        """Lets go of what `cocktail_capture` kept: another rank could not keep its part.

        Returns:
            `digest` of the resident recipe.
        """
        self.cocktail_experts = None
        return {"digest": self.cocktail_resident}

    @rpc_method
    def cocktail_check(self, recipe_json: str) -> WorkerDigest:
        """Finds what is wrong with a recipe, as `Mixer.check`. Touches nothing.

        Returns:
            `digest` of the recipe.
        """
        recipe = Recipe.from_json(json.loads(recipe_json))
        experts = self.cocktail_experts
        _ready(self.cocktail_mixer).check(recipe, needs_files=experts is None or not experts.holds(recipe))
        return {"digest": recipe.digest}

    @rpc_method
    def cocktail_mix(self, recipe_json: str) -> MixedWorker:
        """Mixes a recipe into the live parameters. `ok: False` means that the engine is lost.

        A reload of vLLM that fails leaves half-loaded layers behind, and a second one over them gives garbage without
        an exception: the process must end.
        """
        recipe = Recipe.from_json(json.loads(recipe_json))
        mixer, experts = _ready(self.cocktail_mixer), self.cocktail_experts
        self.cocktail_resident = None
        if experts is not None and experts.holds(recipe):
            mixer.check_recipe(recipe)
            experts.mix(recipe)
            self.cocktail_resident = recipe.digest
            source: ParameterSource = "experts"
        else:
            source = self._cocktail_stream(recipe)
        return {"digest": recipe.digest, "source": source, "cached": mixer.cache.digests}

    def _cocktail_stream(self, recipe: Recipe) -> ParameterSource:
        """Puts a recipe into the engine in checkpoint format, through vLLM's own reload."""
        mixer = _ready(self.cocktail_mixer)
        self.cocktail_resident = None
        params, source = mixer.params(recipe)
        loaded: list[str] = []
        if is_cpu_build():
            _pack_experts_anew(self.model_runner.get_model())
        self.reload_weights(weights_iterator=_noted(params, loaded), weights_path=None, is_checkpoint_format=True)
        _require_all_loaded(loaded, mixer.tensor_names)
        _repack_tied_heads(self.model_runner.get_model())
        self.cocktail_resident = recipe.digest
        return source

    @rpc_method
    def cocktail_forget(self, recipe_digest: str) -> WorkerDigest:
        """Frees the merged parameters of a recipe, where they are kept. What is resident stays.

        Returns:
            `digest` of the recipe.
        """
        _ready(self.cocktail_mixer).cache.forget(recipe_digest)
        return {"digest": recipe_digest}


def _ready(mixer: Mixer | None) -> Mixer:
    if mixer is None:
        raise ConfigError("the worker was not prepared: the endpoint plugin `cocktail` is missing from VLLM_PLUGINS")
    return mixer


def _allow_cores_of_server() -> None:
    """Has this worker mix on the server's cores, as the process that started it has them.

    vLLM ties a worker on a CPU to the cores of its OpenMP threads from its first instruction on, and keeps a core for
    the server's other processes, which wait while it mixes.
    """
    if hasattr(os, "sched_getaffinity"):
        allow_cores(os.sched_getaffinity(os.getppid()))


def require_mixable(vllm_config: Any, manifest: Manifest) -> None:
    """Refuses an engine whose live parameters a mixture cannot replace one for one."""
    require_base_of(vllm_config, manifest)
    if (quantization := vllm_config.model_config.quantization) is not None:
        raise ConfigError(f"quantisation {quantization!r} cannot be mixed in place; serve unquantised models")


def require_base_of(vllm_config: Any, manifest: Manifest) -> None:
    """Refuses an engine that was not started on the manifest's base alone, in its dtype."""
    model = vllm_config.model_config
    base = manifest.members[manifest.base].path
    if Path(model.model).resolve() != base.resolve():
        raise ConfigError(
            f"the server was started on {model.model}, the manifest's base is {base}: start it on the base"
        )
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype != manifest.dtype:
        raise ConfigError(f"the engine's dtype is {dtype}, the manifest's {manifest.dtype}: start it with --dtype")
    if vllm_config.lora_config is not None:
        raise ConfigError("--enable-lora cannot be combined with mixing; start the server without it")


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of a KV cache: vLLM nests them by layer and kind."""
    from torch import Tensor

    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)


def _noted(params: Iterable[tuple[str, Tensor]], names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """The same parameters; the name of each is noted when the next is asked for, which is when it has been taken."""
    for name, tensor in params:
        yield name, tensor
        names.append(name)


def _require_all_loaded(loaded: list[str], expected: frozenset[str]) -> None:
    """vLLM only logs a tensor that did not come; here it is an error."""
    if sorted(loaded) != sorted(expected):
        raise IncompatibleModelsError(
            f"the reload took {len(loaded)} of {len(expected)} tensors; "
            f"missing: {sorted(expected - set(loaded))[:5]}; unknown: {sorted(set(loaded) - expected)[:5]}"
        )


def _pack_experts_anew(model: nn.Module) -> None:
    """Has a reload pack the experts of a mixture of experts as the first load did.

    On CPUs vLLM packs them when it makes their kernel, and a reload that finds the kernel made leaves them unpacked: it
    would compute with parameters in another order than the kernel reads.
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if method is not None and getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _repack_tied_heads(model: nn.Module) -> None:
    """Renews what an output head derived from an embedding it shares its parameter with.

    On CPUs vLLM packs linear layers into opaque oneDNN handles. The layer-wise reload processes a layer whose
    parameters arrive; a tied head receives none of its own, so it would go on with the handle of the old embedding.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    embeddings = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding)]
    sources = {m.weight.data_ptr() for m in embeddings if not isinstance(m, ParallelLMHead)}
    for head in embeddings:
        if isinstance(head, ParallelLMHead) and head.weight.data_ptr() in sources:
            head.quant_method.process_weights_after_loading(head)
