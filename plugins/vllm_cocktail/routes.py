"""Control routes and fence inside vLLM's API server. Entry point of `vllm.endpoint_plugins`.

All routes lie under `/v1`, the prefix that vLLM's key guards. The fence is the innermost middleware, so a request
without the key is turned away before it learns anything.
"""

from __future__ import annotations

import logging
import math
import os
import time
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.datastructures import State

from cocktail_serve.errors import CapacityError, ClientError, CocktailError, ConfigError
from cocktail_serve.recipe import Recipe
from vllm_cocktail.brought_templates import take_brought_templates
from vllm_cocktail.check import unknown_variables
from vllm_cocktail.control import EngineControl
from vllm_cocktail.decisions import Options, read_options
from vllm_cocktail.departure import unless_gone
from vllm_cocktail.fence import Fence, FenceMiddleware, error_body
from vllm_cocktail.launch import WORKER_EXTENSIONS
from vllm_cocktail.manifest import Manifest
from vllm_cocktail.replies import (
    DECIDE_PATH,
    DECISIONS_PATH,
    FORGET_PATH,
    MIX_PATH,
    RESPONSES_PATH,
    SCORE_PATH,
    STATUS_PATH,
    DecideReply,
    MixReply,
    ScoreReply,
    StatusReply,
)
from vllm_cocktail.scoring import TokenizedExample, leaves_out_inputs, mean_losses
from vllm_cocktail.unmerged.binding import RequestBinder
from vllm_cocktail.unmerged.control import UnmergedControl
from vllm_cocktail.unmerged.row import BASE_ROW

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

# a child of vLLM's logger, whose handlers and level it so shares
logger = logging.getLogger("vllm.cocktail.routes")


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class MixRequest(_Body):
    """Body of `POST MIX_PATH`: a recipe, or merging weights by the manifest's names."""

    recipe: dict[str, Any] | None = None
    merging_weights: dict[str, float] | None = None
    method: str | None = None
    method_params: dict[str, Any] | None = None
    drain_s: float = Field(30.0, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one_of_two(self) -> MixRequest:
        if (self.recipe is None) == (self.merging_weights is None):
            raise ValueError("give either recipe or merging_weights")
        if self.recipe is not None and not (self.method is None and self.method_params is None):
            raise ValueError("a recipe holds its method; give method and method_params with merging_weights")
        return self


class ForgetRequest(_Body):
    """Body of `POST FORGET_PATH`."""

    digest: str


class _BoundBody(_Body):
    """What of a request says which recipe answers it, and for whom."""

    vllm_xargs: dict[str, Any] | None = None
    model: str | None = None
    cache_salt: str | None = None


class ScoreRequest(_BoundBody):
    """Body of `POST SCORE_PATH`; its prompts have salts of their own."""

    examples: list[TokenizedExample] = Field(min_length=1)


class DecideRequest(_BoundBody):
    """Body of `POST DECIDE_PATH`."""

    questions: list[Options] = Field(min_length=1)


router = APIRouter(tags=["cocktail"])


@router.get(STATUS_PATH, response_model=None)
async def status(request: Request) -> StatusReply:
    """What the engine holds, asked of the engine itself."""
    reply = await _control(request).status()
    reply["warnings"] = request.app.state.cocktail_warnings
    return reply


@router.post(MIX_PATH, response_model=None)
async def mix(body: MixRequest, request: Request) -> MixReply:
    """Makes a recipe resident."""
    control = _control(request)
    if body.recipe is not None:
        recipe = Recipe.from_json(body.recipe)
    else:
        recipe = control.manifest.recipe(
            body.merging_weights or {}, method=body.method or "linear", method_params=body.method_params
        )
    return await control.mix(recipe, drain_s=body.drain_s)


@router.post(FORGET_PATH)
async def forget(body: ForgetRequest, request: Request) -> dict[str, Any]:
    """Frees the merged parameters of a recipe."""
    await _control(request).forget(body.digest)
    return {}


@router.post(SCORE_PATH, response_model=None)
async def score(body: ScoreRequest, request: Request) -> ScoreReply:
    """Mean token cross-entropy of each example under the resident recipe; null: not finite. Behind the fence."""
    losses = await mean_losses(_control(request).engine, body.examples, xargs=body.vllm_xargs)
    return {"losses": [loss if math.isfinite(loss) else None for loss in losses]}


@router.post(DECIDE_PATH, response_model=None)
async def decide(body: DecideRequest, request: Request) -> DecideReply | Response:
    """Log-probabilities of options under the resident model; null: not finite. Behind the fence."""
    work = read_options(
        _control(request).engine,
        body.questions,
        xargs=body.vllm_xargs,
        cache_salt=body.cache_salt,
        shares_prefixes=request.app.state.cocktail_shares_prefixes,
    )
    read = await unless_gone(request.receive, work)
    if read is None:
        return Response(status_code=499)  # nobody reads it
    return {
        "log_probs": [[value if math.isfinite(value) else None for value in each.log_probs] for each in read],
        "num_cached": [each.num_cached for each in read],
        "num_computed": sum(each.num_computed for each in read),
    }


class CocktailEndpointPlugin:
    """What vLLM loads when `VLLM_PLUGINS` names `cocktail`."""

    name = "cocktail"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Adds the routes and the fence, which stays closed until `init_state` is through."""
        fence = Fence()
        app.state.cocktail_fence = fence
        app.include_router(router)
        app.add_exception_handler(CocktailError, _answer_error)
        # the first one added is the innermost: vLLM adds its own, authentication among them, afterwards
        shut = {DECISIONS_PATH: f"vLLM salts no prompt there; {DECIDE_PATH} reads options"}
        if not take_brought_templates():
            shut[RESPONSES_PATH] = "this release of vLLM reads no chat template there"
        app.add_middleware(FenceMiddleware, fence=fence, bind=_binder(app.state), shut=shut)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Checks that the fence can hold, probes the workers, warms scoring up, opens the fence.

        Raises:
            ConfigError: what to start differently. vLLM then ends the server.
        """
        if engine_client is None:
            raise ConfigError("vllm_cocktail needs an engine; leave `cocktail` out of VLLM_PLUGINS for a render server")
        manifest = Manifest.from_environ()
        _require_fenceable(engine_client.vllm_config, args, WORKER_EXTENSIONS[manifest.mode])
        fence: Fence = state.cocktail_fence
        fence.managed = manifest.managed
        state.cocktail_warnings = list(unknown_variables(os.environ))
        control_of = UnmergedControl if manifest.mode == "unmerged" else EngineControl
        state.cocktail_control = control_of(engine_client, fence, manifest)
        started = time.perf_counter()
        # the first log-probabilities of a prompt take longer; nobody's first scores should
        await mean_losses(engine_client, [TokenizedExample(token_ids=[0, 1, 2, 3], output_start=1)], xargs=BASE_ROW)
        logger.info("cocktail: scoring warmed up in %.1f s", time.perf_counter() - started)
        await state.cocktail_control.start()
        state.cocktail_shares_prefixes = await leaves_out_inputs(engine_client, xargs=BASE_ROW)
        logger.info("cocktail: %d models to mix, resident %s", len(manifest.members), manifest.resident)


def _control(request: Request) -> EngineControl | UnmergedControl:
    control: EngineControl | UnmergedControl = request.app.state.cocktail_control
    return control


def _binder(state: State) -> RequestBinder | None:
    """What reads the recipe that a request brings; None where the engine holds one recipe for all."""
    manifest = Manifest.from_environ()
    if manifest.mode == "merged":
        return None
    base = Recipe(manifest.base, ((manifest.base, 1.0),), manifest.dtype, mode="unmerged")

    async def require_loaded(recipe: Recipe) -> None:
        control: UnmergedControl = state.cocktail_control  # the engine comes later than the routes
        await control.require_loaded(recipe)

    return RequestBinder(base, require_loaded)


def _require_fenceable(vllm_config: Any, args: Namespace, extension: str) -> None:
    """Refuses servers in which a request can reach the engine past the fence, or find other parameters behind it.

    Raises:
        ConfigError: names the flag or variable, and why.
    """
    from vllm import envs

    parallel = vllm_config.parallel_config
    refusals = {
        f"--worker-extension-cls {extension} is missing": parallel.worker_extension_cls != extension,
        "--data-parallel-size must be 1: engines would hold different recipes": parallel.data_parallel_size > 1,
        "--api-server-count must be 1: each server would count only its own requests": (
            (getattr(args, "api_server_count", None) or 1) > 1 or parallel._api_process_count > 1
        ),
        "VLLM_SERVER_DEV_MODE must be off: its routes change parameters behind the fence": envs.VLLM_SERVER_DEV_MODE,
        "VLLM_ENABLE_RESPONSES_API_STORE must be off: background responses outlive the request that the fence counts": (
            envs.VLLM_ENABLE_RESPONSES_API_STORE
        ),
        "--logprobs-mode must be raw_logprobs or processed_logprobs: losses need log-probabilities": (
            vllm_config.model_config.logprobs_mode.endswith("logits")
        ),
        "--kv-transfer-config is not supported: blocks kept outside vLLM are not dropped at a mix": (
            vllm_config.kv_transfer_config is not None
        ),
        "--kv-sharing-fast-prefill is not supported: it falsifies the log-probabilities of prompts": (
            vllm_config.cache_config.kv_sharing_fast_prefill
        ),
    }
    if reasons := [reason for reason, refused in refusals.items() if refused]:
        raise ConfigError("vllm_cocktail cannot work with this server: " + "; ".join(reasons))


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    """Our errors in OpenAI's shape; vLLM's own handlers do not know them."""
    assert isinstance(error, CocktailError)
    fence: Fence = request.app.state.cocktail_fence
    status_code = 400 if isinstance(error, ClientError) else 409 if isinstance(error, CapacityError) else 500
    body = error_body(status_code, error.code, error.message, resident=fence.resident, param=error.param)
    return JSONResponse(body, status_code=status_code)
