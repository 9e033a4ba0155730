"""No process of the server outlives its parent.

vLLM's EngineCore never looks at its parent: SIGKILL of the API server leaves it behind with all its memory. Linux
delivers a signal at the parent's death (`PR_SET_PDEATHSIG`), but only to a process that asked before, so asking is
followed by a look at whether the parent was still there.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import MutableMapping

from vllm_cocktail.manifest import OWNER_VARIABLE

_PR_SET_PDEATHSIG = 1


def die_with_owner(environ: MutableMapping[str, str] = os.environ) -> None:
    """Ends this process by SIGKILL when its parent ends, if the server has an owner; else does nothing.

    The variable always names the process directly above: each process that is armed writes its own id there for the
    children to come (EngineCore dies with the API server, workers with EngineCore).

    The signal comes when the *thread* that started the process ends, so an owner starts the server from a thread
    that lives as long as itself.
    """
    owner = environ.get(OWNER_VARIABLE)
    if owner is None or not sys.platform.startswith("linux") or int(owner) == os.getpid():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl(PR_SET_PDEATHSIG): {os.strerror(code)}")
    # a helper process between the owner and this one (a fork server) is no reason to die, a dead owner is
    if os.getppid() != int(owner) and not _is_alive(int(owner)):
        print(f"vllm_cocktail: owner {owner} of process {os.getpid()} has died; ending", file=sys.stderr, flush=True)
        os._exit(1)
    environ[OWNER_VARIABLE] = str(os.getpid())


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
