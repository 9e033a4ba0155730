"""The worker extension of an engine whose recipes share a batch: holds the experts' factors beside the base."""

from __future__ import annotations

import functools
import json
import logging
from typing import Any

from cocktail_serve.checkpoints.unchanged import check_unchanged
from cocktail_serve.errors import ConfigError
from vllm_cocktail.calls import rpc_method
from vllm_cocktail.manifest import Manifest
from vllm_cocktail.replies import UnmergedWorker
from vllm_cocktail.unmerged.experts import UnmergedExperts
from vllm_cocktail.unmerged.kernel import Limits
from vllm_cocktail.worker import require_base_of

# a child of vLLM's logger, whose handlers and level it so shares
logger = logging.getLogger("vllm.cocktail.worker")

MAX_EXPERTS = 256
MAX_RANKS = 4096
"""What the buffers of a GPU are made for: experts of one engine, and the sum of their ranks."""


class UnmergedWorkerExtension:
    """What vLLM's Worker gains by `--worker-extension-cls`; see `CocktailWorkerExtension` for its rules."""

    # what the Worker brings
    vllm_config: Any
    model_runner: Any

    # the Worker's __init__ is vLLM's, so `cocktail_hold_factors` sets it
    cocktail_experts: UnmergedExperts | None = None

    def cocktail_hold_factors(self) -> None:
        """Reads the experts' factors once the model is loaded: before vLLM compiles it and measures its memory.

        Raises:
            CocktailError: an expert that cannot be served unmerged, or an engine in which none can; says which and why.
        """
        manifest = Manifest.from_environ()
        require_unmergeable(self.vllm_config, manifest)
        # its loader has read the files by now: what they were before and are after, they were meanwhile
        check_unchanged(manifest.members[manifest.base])
        limits = Limits(
            max_rows=self.vllm_config.scheduler_config.max_num_batched_tokens,
            max_experts=MAX_EXPERTS,
            max_ranks=MAX_RANKS,
        )
        experts = UnmergedExperts(self.model_runner, manifest, limits, reread=Manifest.from_environ)
        if _is_compiled(self.vllm_config):
            # part of what vLLM names its compiled graphs by: with other layers, a kept one would leave theirs out
            self.vllm_config.additional_config["cocktail_layers"] = experts.layers.names
            experts.layers.seal()
        self.cocktail_experts = experts

    @rpc_method
    def cocktail_probe(self) -> UnmergedWorker:
        """What this worker holds."""
        return self._cocktail_reply()

    @rpc_method
    def cocktail_check_layers(self) -> UnmergedWorker:
        """After the first request: fails where vLLM computed past a layer that experts adapt."""
        self._cocktail_held().layers.require_called()
        return self._cocktail_reply()

    @rpc_method
    def cocktail_load(self, fingerprints_json: str) -> UnmergedWorker:
        """Loads experts that the manifest has gained. What runs meanwhile waits for a step's time."""
        self._cocktail_held().load(json.loads(fingerprints_json))
        return self._cocktail_reply()

    def _cocktail_held(self) -> UnmergedExperts:
        if self.cocktail_experts is None:
            raise ConfigError("the worker holds no factors: the plugin `cocktail` is missing from VLLM_PLUGINS")
        return self.cocktail_experts

    def _cocktail_reply(self) -> UnmergedWorker:
        held = self._cocktail_held()
        return {
            "experts": held.fingerprints,
            "factor_bytes": held.num_bytes,
            "kernel": held.kernel.name,
            "kernel_because": held.kernel.reason,
        }


def hold_factors_once_loaded() -> None:
    """Has the workers of this process read the factors as soon as their model is loaded."""
    from vllm.config import set_current_vllm_config
    from vllm.v1.worker.gpu_worker import Worker

    load_model = Worker.load_model
    if hasattr(load_model, "cocktail_wrapped"):
        return

    @functools.wraps(load_model)
    def load(worker: Any, *args: Any, **kwargs: Any) -> None:
        load_model(worker, *args, **kwargs)
        if isinstance(worker, UnmergedWorkerExtension):
            # telling what a checkpoint's names mean builds transformers' model, of which some layers are vLLM's here
            with set_current_vllm_config(worker.vllm_config):
                worker.cocktail_hold_factors()

    load.cocktail_wrapped = True  # type: ignore[attr-defined]  # plugins are registered as often as vLLM likes
    Worker.load_model = load


def _is_compiled(vllm_config: Any) -> bool:
    from vllm.config import CompilationMode

    return bool(vllm_config.compilation_config.mode != CompilationMode.NONE)


def require_unmergeable(vllm_config: Any, manifest: Manifest) -> None:
    """Refuses engines in which a step's rows are not one for each token, whole, on one rank."""
    require_base_of(vllm_config, manifest)
    parallel = vllm_config.parallel_config
    refusals = {
        f"--tensor-parallel-size and --pipeline-parallel-size must be 1 (it is {parallel.world_size} ranks)": (
            parallel.world_size > 1
        ),
        "speculative decoding samples from other rows than one for each request": (
            vllm_config.speculative_config is not None
        ),
        "--enable-dbo splits the rows of a step": getattr(parallel, "enable_dbo", False),
        "VLLM_USE_V2_MODEL_RUNNER lays its steps out otherwise": getattr(vllm_config, "use_v2_model_runner", False),
        "--enable-prompt-embeds brings rows without tokens": vllm_config.model_config.enable_prompt_embeds,
        "--additional-config is no object, which compiled graphs are named by": (
            _is_compiled(vllm_config) and not isinstance(vllm_config.additional_config, dict)
        ),
    }
    if reasons := [reason for reason, refused in refusals.items() if refused]:
        raise ConfigError(
            "engine.mode: unmerged cannot work with this server: " + "; ".join(reasons) + "; set engine.mode: merged"
        )
