"""The worker of `bench.engine_mixing --profile`: takes the time of a mix and of a reload apart.

Every part is timed on the thread that loads, without the parts inside it. What other threads do meanwhile, summing
above all, is counted apart: it costs the loading thread only what it waits.
"""

from __future__ import annotations

import functools
import resource
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vllm_cocktail import worker
from vllm_cocktail.mixer import Mixer
from vllm_cocktail.worker import CocktailWorkerExtension


class Clock:
    """Seconds by part of one thread's work, each without the parts inside it; seconds of other threads in `beside`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.beside: dict[str, float] = defaultdict(float)
        self._inside: list[float] = []
        self._thread = threading.get_ident()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin_s = time.perf_counter()
        is_own = threading.get_ident() == self._thread
        if is_own:
            self._inside.append(0.0)
        try:
            yield
        finally:
            took_s = time.perf_counter() - begin_s
            if is_own:
                self.seconds[name] += took_s - self._inside.pop()
                if self._inside:
                    self._inside[-1] += took_s
            else:
                self.beside[name] += took_s

    def watch(self, owner: Any, function: str, name: str) -> None:
        """Times every call of `owner.function` from now on."""
        watched: Callable[..., Any] = getattr(owner, function)

        @functools.wraps(watched)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return watched(*args, **kwargs)

        setattr(owner, function, timed)


class ProfiledWorker(CocktailWorkerExtension):
    """The worker extension, with a clock in it."""

    cocktail_clock: Clock | None = None

    def cocktail_profile(self, what: str, argument: str) -> dict[str, Any]:
        """Mixes a recipe (JSON), or reloads a merged folder, and says where the time went.

        Returns:
            what `cocktail_mix` returns; `parts`, seconds of the loading thread; `beside`, seconds of others; `user_s`,
            `system_s` and `page_faults` of the process.
        """
        clock = self.cocktail_clock = self.cocktail_clock or _watched_clock()
        clock.reset()
        before = resource.getrusage(resource.RUSAGE_SELF)
        reply: dict[str, Any] = {"ok": True}
        with clock.part("the rest, in Python"):
            if what == "reload":
                self.reload_weights(weights_path=argument)
            else:
                reply = self.cocktail_mix(argument)
        after = resource.getrusage(resource.RUSAGE_SELF)
        return {
            **reply,
            "parts": dict(clock.seconds),
            "beside": dict(clock.beside),
            "user_s": after.ru_utime - before.ru_utime,
            "system_s": after.ru_stime - before.ru_stime,
            "page_faults": after.ru_minflt - before.ru_minflt,
        }


def _watched_clock() -> Clock:
    from vllm import _custom_ops
    from vllm.model_executor.model_loader.reload import inplace, layerwise

    from cocktail_serve.merging import merger

    clock = Clock()
    clock.watch(_custom_ops, "create_onednn_mm", "packing for oneDNN")
    clock.watch(layerwise, "_layerwise_process", "copying into new layers")
    clock.watch(layerwise, "materialize_layer", "allocating new layers")
    clock.watch(layerwise, "_copy_and_restore_kernel_tensors", "copying into the live parameters")
    clock.watch(layerwise, "get_numel_loaded", "counting elements")
    clock.watch(inplace, "initialize_layerwise_reload", "before and after")
    clock.watch(inplace, "finalize_layerwise_reload", "before and after")
    clock.watch(worker, "_repack_tied_heads", "before and after")
    clock.watch(Mixer, "_open", "opening and checking files")
    clock.watch(merger, "merge_param", "summing")
    noted = worker._noted

    def waited_for(params: Any, names: list[str]) -> Iterator[Any]:
        items = noted(params, names)
        while True:
            with clock.part("waiting for a mixed tensor, and helping"):
                item = next(items, None)
            if item is None:
                return
            yield item

    worker._noted = waited_for
    return clock
