"""Calls of a worker extension's methods: what each rank says, and how all are asked."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar

from cocktail_serve.errors import ClientError, CocktailError, EngineError, InvalidMixError, error_of_code
from vllm_cocktail.replies import CapturedWorker, MixedWorker, ProbedWorker, UnmergedWorker, WorkerDigest

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

# a child of vLLM's logger, whose handlers and level it so shares
logger = logging.getLogger("vllm.cocktail.worker")


class HasConfig(Protocol):
    """What a worker extension has of its Worker."""

    vllm_config: Any


_W = TypeVar("_W", bound=HasConfig)
_P = ParamSpec("_P")
_R = TypeVar("_R", ProbedWorker, CapturedWorker, MixedWorker, UnmergedWorker, WorkerDigest)


def rpc_method(method: Callable[Concatenate[_W, _P], _R]) -> Callable[Concatenate[_W, _P], dict[str, Any]]:
    """Turns a method's value into `{ok: True, error: None, ...}` and whatever it raises into `{ok: False, error}`.

    An error of ours has its `code` too. It runs under vLLM's configuration, as what builds a model does: telling what a
    checkpoint's names mean builds transformers' model, some of whose layers are vLLM's own in this process.
    """

    @functools.wraps(method)
    def never_raises(worker: _W, /, *args: _P.args, **kwargs: _P.kwargs) -> dict[str, Any]:
        from vllm.config import set_current_vllm_config

        try:
            with set_current_vllm_config(worker.vllm_config):
                return {"ok": True, "error": None, **method(worker, *args, **kwargs)}
        except CocktailError as error:
            return {"ok": False, "error": error.message, "code": error.code}
        except Exception as error:
            logger.exception("%s failed", method.__name__)
            return {"ok": False, "error": f"{type(error).__name__}: {error}"}

    return never_raises


async def ask_ranks(engine: EngineClient, method: str, *args: str) -> list[Any]:
    """The answer of every rank: what the method returns, beside `ok` and `error`.

    No timeout is set: replies that come after one would be taken for those of the next call.

    Raises:
        EngineError: a rank failed; of its own error it has the code.
    """
    answers: list[Any] = await engine.collective_rpc(method, args=args)
    for rank, answer in enumerate(answers):
        if not answer["ok"]:
            error = answer["error"] if len(answers) == 1 else f"rank {rank}: {answer['error']}"
            raise EngineError(error, code=answer.get("code"))
    return answers


async def ask_all(engine: EngineClient, method: str, *args: str) -> Any:
    """The one answer that all ranks gave.

    Raises:
        EngineError: a rank failed, or the ranks disagree.
    """
    answers = await ask_ranks(engine, method, *args)
    if any(answer != answers[0] for answer in answers):
        raise EngineError(f"the ranks disagree after {method}: {answers}")
    return answers[0]


def recipe_error(error: EngineError) -> ClientError:
    """What is wrong with a recipe, or with the models that it names, where a rank could not do with it."""
    return error_of_code(error.code, error.message) or InvalidMixError(
        error.message, param="recipe", code="invalid_recipe"
    )
