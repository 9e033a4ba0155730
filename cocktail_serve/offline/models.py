"""Models of a pool in transformers, made in memory by mixing, whatever the recipe."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cocktail_serve.checkpoints.layout import model_class, model_folder
from cocktail_serve.checkpoints.mixture import Mixture, iter_mixture
from cocktail_serve.checkpoints.naming import parameter_names
from cocktail_serve.checkpoints.reader import CheckpointReader
from cocktail_serve.config import PoolConfig
from cocktail_serve.errors import CheckpointError, EngineError
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import Recipe
from cocktail_serve.scoring.tokenizer import load_fast_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class TransformersModels:
    """Decoders or encoder-decoders of a pool.

    Attributes:
        tokenizer: the base's.
        max_tokens: the context length: as configured, else the model's own; None where it has none (T5 counts
            distances only).

    Raises:
        CheckpointError: a decoder that does not say its context length.
        ConfigError: the base has no tokenizer that transformers can load.
        EngineError: transformers cannot load the base's configuration.
    """

    def __init__(self, pool: Pool, config: PoolConfig) -> None:
        import torch
        from transformers import AutoConfig
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        self._pool = pool
        self._dtype = getattr(torch, config.engine.dtype_over(pool.base))
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._members = pool.by_fingerprint
        self._model: Any = None
        self._resident: str | None = None
        folder, options = pool.base.path, {"local_files_only": True, "trust_remote_code": False}
        self.tokenizer: Any = (load_tokenizer if pool.kind == "encoder_decoder" else load_fast_tokenizer)(folder)
        with translated(pool):
            self._config = AutoConfig.from_pretrained(model_folder(folder), **options)
            if getattr(self._config.get_text_config(), "attn_logit_softcapping", None):
                # the attention that transformers takes otherwise leaves the cap out, without a word; vLLM has it
                self._config._attn_implementation = "eager"
            with torch.device("meta"):
                self._class = type(_auto_class(pool).from_config(self._config))
        self.max_tokens = _max_model_len(self._config, config)
        if self.max_tokens is None and pool.kind != "encoder_decoder":
            raise CheckpointError(f"{folder} does not say its context length; set engine.max_model_len")

    def use(self, recipe: Recipe) -> Any:
        """The model of a recipe; the one before it is gone, so that one is in memory at a time.

        Parameters are filled into the model that is there, a tenth of the time of a new one for a small model, where
        the checkpoint's names are the model's own.
        """
        if recipe.digest != self._resident:
            model, self._model, self._resident = self._model, None, None
            if model is None or not self._fill(model, recipe):
                del model
                gc.collect()
                model = self.make(recipe)
            self._model, self._resident = model, recipe.digest
        return self._model

    def _fill(self, model: Any, recipe: Recipe) -> bool:
        """Copies a mixture into a model in place; False, with nothing copied, where names or shapes are not its own."""
        import torch

        own = model.state_dict()
        with translated(self._pool), Mixture(recipe, self._members) as mixture:
            named = {name: own[name] for name in mixture.tensors if name in own}
            filled = {tensor.data_ptr() for tensor in named.values()}
            if (
                len(named) < len(mixture.tensors)
                or any(tuple(named[name].shape) != info.shape for name, info in mixture.tensors.items())
                # tied tensors are one; what is left would keep the values of the mixture before
                or any(tensor.data_ptr() not in filled for tensor in own.values())
            ):
                return False
            with torch.no_grad():
                for name, tensor in mixture.params():
                    named[name].copy_(tensor)
        return True

    def make(self, recipe: Recipe) -> Any:
        """A model of its own, for who needs several at once.

        Raises:
            CheckpointError: the pool lacks parameters that the architecture has.
            EngineError: transformers cannot load it.
        """
        with translated(self._pool):
            model, found = self._class.from_pretrained(
                None,
                config=self._config,
                state_dict=dict(iter_mixture(recipe, self._members)),
                dtype=self._dtype,
                output_loading_info=True,
            )
            if found["missing_keys"]:
                missing = ", ".join(sorted(found["missing_keys"])[:3])
                raise CheckpointError(f"{self._pool.base.path} lacks parameters of {self._class.__name__}: {missing}")
            return model.to(self._device).eval()


def check_loads(pool: Pool) -> None:
    """Has transformers find all parameters of the base in its files, without reading them.

    Raises:
        CheckpointError: one is missing, or of another shape than the configuration says.
        EngineError: transformers cannot make a model of it.
    """
    missing, mismatched = _unloadable(pool) if pool.base.quantisation is None else _unfitting(pool.base.path)
    if missing:
        raise CheckpointError(
            f"{pool.base.path} lacks parameters that its config.json asks for: {', '.join(sorted(missing)[:3])}; save "
            "it whole, with the class it was trained with"
        )
    for name, stored, wanted in mismatched:
        raise CheckpointError(
            f"{pool.base.path}: {name} is {list(stored)} in its files, but {list(wanted)} by its config.json; one of "
            "the two is another model's: save them together"
        )


_Mismatch = tuple[str, Sequence[int], Sequence[int]]
"""A parameter, its shape in the files, and by the configuration."""


def _unfitting(base: Path) -> tuple[list[str], list[_Mismatch]]:
    """What a quantised base lacks, or has in another shape: transformers loads it through libraries of their own."""
    names = parameter_names(base)
    with CheckpointReader(base, allow_quantised=True) as reader:
        wanted = {name: names.shape_of(name) for name in reader.parameters}
        mismatched: list[_Mismatch] = [
            (name, info.shape, shape)
            for name, info in reader.parameters.items()
            if (shape := wanted[name]) is not None and shape != info.shape
        ]
        return names.missing(reader.parameters), mismatched


def _unloadable(pool: Pool) -> tuple[list[str], list[_Mismatch]]:
    """What transformers finds missing in the base's files, or of another shape."""
    import transformers
    from transformers.utils import logging as transformers_logging

    # the class that the files were saved by, where it is known: one for text alone would miss other modalities' names
    loader = getattr(transformers, model_class(pool.base.path), None) or _auto_class(pool)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # what it would say is said below
    try:
        with translated(pool):
            _, found = loader.from_pretrained(
                model_folder(pool.base.path),
                device_map="meta",
                dtype="auto",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    finally:
        transformers_logging.set_verbosity(verbosity)
    return list(found["missing_keys"]), list(found["mismatched_keys"])


def _auto_class(pool: Pool) -> Any:
    """What makes the pool's models in transformers."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if pool.kind == "encoder_decoder" else AutoModelForCausalLM


def _max_model_len(model_config: PreTrainedConfig, config: PoolConfig) -> int | None:
    configured: int | None = getattr(config.engine, "max_model_len", None)
    if configured is not None:
        return configured
    # an attribute, not a key of the file: GPT-2's is `n_positions`, and Gemma 3's is in its `text_config`
    own = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    return own if isinstance(own, int) else None


@contextmanager
def translated(pool: Pool) -> Iterator[None]:
    """What transformers raises while it loads or runs a model, told with the pool's name."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise EngineError(f"transformers cannot run the models of pool {pool.id!r}: {error}") from error
