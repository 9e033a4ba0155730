"""Which tensors a recipe puts into the engine, and where they come from: files, or memory. Knows no vLLM."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from cocktail_serve.checkpoints.adapters.reader import AdapterReader, read_expert
from cocktail_serve.checkpoints.finite import OVERFLOWS_FROM
from cocktail_serve.checkpoints.mixture import Mixture
from cocktail_serve.checkpoints.reader import CheckpointReader
from cocktail_serve.checkpoints.unchanged import open_base, open_expert_of
from cocktail_serve.dtypes import ITEM_BYTES
from cocktail_serve.errors import ConfigError, InvalidMixError, ModelChangedError
from cocktail_serve.merging.bounds import largest_of_mixture
from cocktail_serve.merging.threads import made_ahead
from cocktail_serve.recipe import Recipe
from vllm_cocktail.buffers import Buffers
from vllm_cocktail.cache import MergedParams
from vllm_cocktail.manifest import Manifest
from vllm_cocktail.replies import ParameterSource

if TYPE_CHECKING:
    from torch import Tensor

# a child of vLLM's logger, whose handlers and level it so shares
logger = logging.getLogger("vllm.cocktail.mixer")

BYTES_AHEAD = 1 << 27
"""Mixed tensors that wait for the engine."""


class Mixer:
    """Mixes what the manifest allows, and keeps merged parameters within its byte budget.

    The files of the models that were mixed stay mapped while the manifest names them, so that the next mix finds their
    pages in place: mapping ten models of 0.5 GB anew costs more than a million page table entries.

    Args:
        manifest: the models, the engine's dtype.
        cache_bytes: this rank's share of `manifest.cache_bytes`.
        reread: gives the manifest as it stands now: its owner may add models while the server runs.
    """

    def __init__(self, manifest: Manifest, *, cache_bytes: int, reread: Callable[[], Manifest] | None = None) -> None:
        self.manifest = manifest
        self._reread = reread
        self.cache = MergedParams(cache_bytes)
        self._buffers = Buffers(cache_bytes + 2 * BYTES_AHEAD)
        # read by nobody: held, so that what they map stays mapped
        self._readers: dict[str, CheckpointReader | AdapterReader] = {}

    def check(self, recipe: Recipe, *, needs_files: bool = True) -> None:
        """Finds what is wrong with a recipe, before the engine's parameters are touched.

        From headers, and from what files look like, alone; but a file that was replaced is read once, and a mixture
        that may be too large for its dtype is mixed here first, for nobody. What is kept needs no files, and was right
        before.

        Args:
            needs_files: False where the engine keeps the recipe's models itself.

        Raises:
            InvalidMixError: another base or dtype than the engine's, a model that the manifest lacks, another method.
            ModelChangedError: a file holds something else than it did.
            CheckpointError: a file that cannot be read.
            IncompatibleModelsError: tensors that differ in name or shape; names the tensor and both shapes.
            NotFiniteError: a tensor of the mixture would be infinite somewhere.
        """
        self.check_recipe(recipe)
        if recipe.digest in self.cache or not (needs_files or self._may_overflow(recipe)):
            return
        mixture = self._open(recipe)
        if mixture.may_overflow:
            for _ in mixture.params(empty=self._buffers.empty):
                pass

    def keepable(self) -> list[str]:
        """The models whose files are what they were, by fingerprint: what else was replaced is not taken for them.

        Raises:
            ModelChangedError: it is the base, which the engine was started with.
        """
        manifest = self.manifest
        base = manifest.members[manifest.base]
        found = []
        with open_base(base) as base_reader:
            for fingerprint, member in manifest.members.items():
                try:
                    if fingerprint != manifest.base:
                        open_expert_of(base, base_reader, member).close()
                except ModelChangedError as error:
                    logger.warning("left out: %s", error.message)
                    continue
                found.append(fingerprint)
        return found

    def why_not_captured(self, members: Sequence[str]) -> str | None:
        """Why models are not kept in the engine's layout, as far as their headers say; None where they may be.

        Raises:
            CheckpointError: a file that cannot be read.
        """
        manifest = self.manifest
        if not manifest.expert_bytes:
            return "engine.expert_memory is 0"
        base_folder = manifest.members[manifest.base].path
        for fingerprint in members:
            folder = manifest.members[fingerprint].path
            with CheckpointReader(base_folder) as base, read_expert(folder, base) as reader:
                dtypes = {info.dtype for info in reader.tensors.values() if info.is_floating}
            if dtypes != {manifest.dtype}:
                return (
                    f"model {fingerprint[:12]} holds {', '.join(sorted(dtypes))}, the engine {manifest.dtype}: "
                    "it would be rounded twice"
                )
        return None

    def params(self, recipe: Recipe) -> tuple[Iterator[tuple[str, Tensor]], ParameterSource]:
        """The recipe's parameters in checkpoint format, one at a time in the base's file order.

        What is computed is kept in memory for the next time once the iterator is exhausted; a model of the pool
        itself is not, since its file is as near.

        Raises:
            what `check` raises, before the first tensor.
        """
        self.check_recipe(recipe)
        kept = self.cache.get(recipe.digest)
        if kept is not None:
            return iter(kept), "cache"
        # vLLM packs and copies a layer while the next is mixed
        mixed = self._open(recipe).params(empty=self._buffers.empty)
        fresh: Iterator[tuple[str, Tensor]] = made_ahead(mixed, depth=BYTES_AHEAD, size_of=lambda item: item[1].nbytes)
        if recipe.only_model is None and self.cache.make_room(self._num_bytes(recipe)):
            fresh = self._keeping(recipe.digest, fresh)
        return fresh, "files"

    @property
    def tensor_names(self) -> frozenset[str]:
        """Names of all tensors of the base, and so of every mixture."""
        with CheckpointReader(self.manifest.members[self.manifest.base].path) as reader:
            return frozenset(reader.tensors)

    def check_recipe(self, recipe: Recipe) -> None:
        """Raises what `check` says of the recipe itself; reads the manifest again where it lacks a model of it."""
        manifest = self.manifest
        if recipe.base != manifest.base:
            raise InvalidMixError(f"the recipe's base is {recipe.base}, the engine was started on {manifest.base}")
        if recipe.dtype != manifest.dtype:
            raise InvalidMixError(
                f"the recipe rounds to {recipe.dtype}, the engine holds {manifest.dtype}: it would round twice"
            )
        if not recipe.coefficients:
            raise InvalidMixError("the recipe has no coefficients: there is nothing to mix")
        self._learn_models(recipe)

    def _may_overflow(self, recipe: Recipe) -> bool:
        largest = {f: self.manifest.members[f].largest for f, _ in recipe.coefficients}
        return largest_of_mixture(recipe, largest) >= OVERFLOWS_FROM[recipe.dtype]

    def _open(self, recipe: Recipe) -> Mixture:
        """The recipe over its models' files as they are now, checked by their headers; its readers are held."""
        members = self.manifest.members
        mixture = Mixture(recipe, members)
        readers = {**self._readers, **mixture.readers}
        self._readers = {fingerprint: reader for fingerprint, reader in readers.items() if fingerprint in members}
        return mixture

    def _learn_models(self, recipe: Recipe) -> None:
        """Reads the manifest again for models that it lacked; of what else it says nothing may change.

        Raises:
            InvalidMixError: it cannot be read, or is another engine's.
        """
        if self._reread is None or all(fingerprint in self.manifest.members for fingerprint, _ in recipe.coefficients):
            return
        try:
            found = self._reread()
        except ConfigError as error:
            raise InvalidMixError(f"the manifest could not be read again: {error.message}") from error
        if (found.base, found.dtype) != (self.manifest.base, self.manifest.dtype):
            raise InvalidMixError("the manifest is another engine's now: its base or dtype has changed")
        self.manifest = found

    def _keeping(self, digest: str, params: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        kept = []
        for name, tensor in params:
            kept.append((name, tensor))
            yield name, tensor
        self.cache.put(digest, kept)

    def _num_bytes(self, recipe: Recipe) -> int:
        # integer tensors, the few there are, count as floating ones: an estimate that errs on little
        with CheckpointReader(self.manifest.members[recipe.base].path) as reader:
            num_elements = sum(math.prod(info.shape) for info in reader.tensors.values())
        return num_elements * ITEM_BYTES[recipe.dtype]
