"""Why a start failed, read from what a server left in its log, and whether another may go better."""

from __future__ import annotations

import errno

import pytest
import torch

from cocktail_serve.engines.start_failures import BACKOFF_S, Exit, backoff_s, may_pass, reason_in
from cocktail_serve.errors import ConfigError

CORE = "(EngineCore pid=18030) ERROR 11-30 10:04:24 [core.py:1510] "
WORKER = "(Worker pid=19571) ERROR 11-30 10:05:30 [multiproc_executor.py:953] "

LOGS = {
    "a refused argument": (
        [
            "usage: server.py [--port PORT]",
            "                 [--rows {1,2}]",
            "server.py: error: no such argument: --x",
        ],
        "no such argument: --x",
    ),
    "an argument that is misspelt": (
        [
            "usage: server.py [-h] [--max-model-len LEN]",
            "                 [--eager | --no-eager] [--kv-cache-memory-bytes N]",
            "server.py: error: unrecognized arguments: --max-model-lenght 8 --kv_cache_memory_byte=9 --nothing-like-it",
        ],
        "unrecognized arguments: --max-model-lenght (did you mean --max-model-len?) 8 "
        "--kv_cache_memory_byte=9 (did you mean --kv-cache-memory-bytes?) --nothing-like-it",
    ),
    "a refused argument of a module": (["python -m a.b: error: no number: 'many'"], "no number: 'many'"),
    "one process": (
        ["Traceback (most recent call last):", '  File "a.py", line 1, in <module>', "KeyError: 'no such parser'"],
        "KeyError: 'no such parser'",
    ),
    "a configuration": (
        [
            "Traceback (most recent call last):",
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
            "  Value error, 100 is more than 10. [type=value_error, input_value={'a': 1}, input_type=dict]",
            "    For further information visit https://example.org",
        ],
        "ValidationError: 100 is more than 10.",
    ),
    "the process that failed, not those that saw it fail": (
        [
            "(APIServer pid=1) WARNING 11-30 10:03:58 [utils.py:255] this can cause errors like `OSError: [Errno 24]`",
            f"{CORE}Traceback (most recent call last):",
            f"{CORE}    raise ValueError(",
            f"{CORE}ValueError: the cache is too small",
            "(APIServer pid=1) Traceback (most recent call last):",
            "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.",
        ],
        "ValueError: the cache is too small",
    ),
    "an exception without a message": (
        [
            f'{WORKER}  File "vocabulary.py", line 5, in load',
            f"{WORKER}    assert weight.shape[0] == self.size",
            f"{WORKER}           ^^^^^^^^^^^^^^^^^^^^^^^^^^",
            f"{WORKER}AssertionError",
        ],
        "AssertionError: assert weight.shape[0] == self.size",
    ),
    "nothing": (["INFO loading", "no device found"], None),
}


@pytest.mark.parametrize("name", LOGS)
def test_the_reason_in_a_log(name: str) -> None:
    log, reason = LOGS[name]
    assert reason_in(log) == reason


@pytest.mark.parametrize(
    ("returncode", "reason", "is_refusal", "is_of_its_input"),
    [
        (2, "no such argument: --x", True, True),
        (2, None, False, False),
        (1, "ValidationError: 100 is more than 10.", False, True),
        (1, "AssertionError: assert a == b", False, True),
        (1, "NotFiniteError: tensor lora_B of /models/red is not finite", False, True),
        (1, "ModelChangedError: the files of 'base' are not what they were", False, False),
        (1, "ConfigError: the factors of 3 experts take 3 MiB, more than the 2 MiB of free memory", False, False),
        (1, "ValueError: No available memory for the cache", False, False),
        (1, "RuntimeError: CUDA error: device busy", False, False),
        (1, "OSError: [Errno 5] Input/output error", False, False),
        (1, "OutOfMemoryError: CUDA out of memory", False, False),
        (-9, None, False, False),
        (-9, "ValueError: logged, and survived, before the kernel killed it", False, False),
    ],
)
def test_what_another_start_would_not_change(
    returncode: int, reason: str | None, is_refusal: bool, is_of_its_input: bool
) -> None:
    ended = Exit(returncode, reason)
    assert (ended.is_refusal, ended.is_of_its_input) == (is_refusal, is_of_its_input)


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (OSError(errno.EIO, "the disk did not answer"), True),
        (caused(ConfigError("cannot load"), OSError(errno.EMFILE, "too many open files")), True),
        (OSError("no file named model.safetensors in the folder"), False),
        (RuntimeError("size mismatch"), False),
        (caused(ConfigError("cannot load"), ValueError("unknown architecture")), False),
        (ConfigError("cache_bytes is too small"), False),
    ],
)
def test_what_may_pass(error: BaseException, passes: bool) -> None:
    assert may_pass(error) == passes


def test_pauses_grow_and_stay() -> None:
    assert [backoff_s(number) for number in (1, 2, 99)] == [BACKOFF_S[0], BACKOFF_S[1], BACKOFF_S[-1]]
