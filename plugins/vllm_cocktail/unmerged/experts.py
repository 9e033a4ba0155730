"""The experts of one worker: their factors at the model's layers, and their columns in the rows of each step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from cocktail_serve.checkpoints.unchanged import open_base
from cocktail_serve.errors import ConfigError, InvalidMixError
from vllm_cocktail.manifest import Manifest
from vllm_cocktail.output_logprobs import OutputLogprobs
from vllm_cocktail.unmerged.factors import read_factors
from vllm_cocktail.unmerged.kernel import Limits, load_kernel
from vllm_cocktail.unmerged.layers import AdaptedLayers, Steps
from vllm_cocktail.unmerged.step import StepRows

if TYPE_CHECKING:
    import torch

    from cocktail_serve.pool import Member

# a child of vLLM's logger, whose handlers and level it so shares
logger = logging.getLogger("vllm.cocktail.experts")


class UnmergedExperts:
    """Holds the factors of the manifest's experts beside the base, and adds them to the rows that ask for them.

    Args:
        runner: vLLM's model runner, its model loaded.
        manifest: the experts.
        limits: of its steps.
        reread: gives the manifest as it stands now: its owner may add experts while the server runs.

    Raises:
        CocktailError: as `read_factors` and `AdaptedLayers.add`.
    """

    def __init__(self, runner: Any, manifest: Manifest, limits: Limits, *, reread: Callable[[], Manifest]) -> None:
        import torch

        self.manifest = manifest
        self._reread = reread
        self._columns: dict[str, int] = {}
        self._num_columns = 0
        model = runner.get_model()
        self._device = next(model.parameters()).device
        self.kernel = load_kernel(self._device, limits)
        steps = Steps(self.kernel)
        self._layers = AdaptedLayers(model, steps, dtype=getattr(torch, manifest.dtype))
        self._load(member for member in manifest.members.values() if member.fingerprint != manifest.base)
        rows = StepRows(runner, steps, self._columns)
        rows.install()
        OutputLogprobs(runner, rows.lay_out_samples).install()

    @property
    def fingerprints(self) -> list[str]:
        """Of the experts that are loaded."""
        return list(self._columns)

    @property
    def num_bytes(self) -> int:
        """Of their factors in the engine."""
        return self._layers.num_bytes

    @property
    def layers(self) -> AdaptedLayers:
        """Where their factors are."""
        return self._layers

    def load(self, fingerprints: Iterable[str]) -> None:
        """Loads experts that the manifest may have gained. Between steps; those that are loaded stay as they are.

        Raises:
            InvalidMixError: the manifest has no such expert, or is another engine's now.
            CocktailError: as `read_factors` and `AdaptedLayers.add`; those before it were added.
        """
        missing = [fingerprint for fingerprint in fingerprints if fingerprint not in self._columns]
        if not all(fingerprint in self.manifest.members for fingerprint in missing):
            try:
                found = self._reread()
            except ConfigError as error:
                raise InvalidMixError(f"the manifest could not be read again: {error.message}") from error
            if (found.base, found.dtype, found.mode) != (self.manifest.base, self.manifest.dtype, self.manifest.mode):
                raise InvalidMixError("the manifest is another engine's now: its base, dtype or mode has changed")
            self.manifest = found
        unknown = [fingerprint for fingerprint in missing if fingerprint not in self.manifest.members]
        if unknown:
            raise InvalidMixError(f"no model of the pool has the fingerprint {unknown[0]}", param="recipe")
        self._load(self.manifest.members[fingerprint] for fingerprint in missing)

    def _load(self, experts: Iterable[Member]) -> None:
        started = time.perf_counter()
        experts = list(experts)
        require_room(experts, _free_bytes(self._device))
        base = self.manifest.members[self.manifest.base]
        with open_base(base) as base_reader:
            for expert in experts:
                factors = read_factors(base, expert, dtype=self.manifest.dtype)
                column = self._num_columns
                self._num_columns += 1  # what fails half-way keeps its column: no other expert finds its factors there
                self._layers.add(column, factors, base_reader)
                self._columns[expert.fingerprint] = column
        logger.info(
            "factors of %d experts, %.1f MiB, after %.2f s",
            len(self._columns),
            self.num_bytes / 2**20,
            time.perf_counter() - started,
        )


def require_room(experts: Sequence[Member], num_free: int) -> None:
    """Refuses factors that do not fit, before any of them is read.

    Args:
        experts: to be loaded; factors are counted as they are stored.
        num_free: bytes of memory that are free.

    Raises:
        ConfigError: says how much is needed, and what can be done.
    """
    needed = sum(expert.num_bytes for expert in experts)
    if needed > num_free:
        raise ConfigError(
            f"the factors of {len(experts)} experts take {needed / 2**20:,.0f} MiB, more than the "
            f"{num_free / 2**20:,.0f} MiB of free memory: serve fewer experts, or adapters of smaller rank, in one pool"
        )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)
