"""What the members of a family and their mixtures must be: transformers' and peft's own parameters, mixed by name."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.merging import linear
from tests.zoo.specimens import Specimen

if TYPE_CHECKING:
    import numpy as np
    import torch

_ADAPTER_CONFIG = "adapter_config.json"


def load_transformer(specimen: Specimen, folder: Path) -> Any:
    """The model of a full checkpoint as transformers loads it for what it is served for, float32."""
    import torch
    import transformers

    name = {"encoder": "AutoModel", "reranker": "AutoModelForSequenceClassification"}.get(specimen.kind)
    if specimen.model_class.endswith("ForConditionalGeneration"):
        name = "AutoModelForImageTextToText"
    if specimen.model_class == "T5EncoderModel":
        name = "T5EncoderModel"
    auto_class = getattr(transformers, name or "AutoModelForCausalLM")
    options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True}
    if specimen.kind == "decoder":  # another attention leaves Gemma 2's soft cap out
        options["attn_implementation"] = "eager"
    return auto_class.from_pretrained(folder, **options).eval()


class Reference:
    """A family's models in the library that serves their kind, mixed apart from the product.

    Args:
        folders: by member, `base` among them.
    """

    def __init__(self, specimen: Specimen, folders: Mapping[str, Path]) -> None:
        self.specimen = specimen
        self.folders = folders
        self._states: dict[str, dict[str, torch.Tensor]] = {}
        self._base = self._load(folders["base"])

    def state(self, member: str) -> dict[str, torch.Tensor]:
        """Parameters and buffers of a member by the names of the library's modules."""
        if member not in self._states:
            self._states[member] = dict(self._loaded(self.folders[member]).state_dict())
        return self._states[member]

    def mixed(self, merging_weights: Mapping[str, float]) -> Any:
        """The library's model with a mixture's parameters, summed in float64."""
        model = copy.deepcopy(self._base)
        model.load_state_dict(linear({name: self.state(name) for name in merging_weights}, merging_weights))
        return model

    def loaded(self, folder: Path) -> Any:
        """A full checkpoint of this family in the library."""
        return self._load(folder)

    def _loaded(self, folder: Path) -> Any:
        if not (folder / _ADAPTER_CONFIG).is_file():
            return self._load(folder)
        from peft import PeftModel

        model = copy.deepcopy(self._base)
        with quiet_about_patterns():
            if self.specimen.kind == "decoder":
                return PeftModel.from_pretrained(model, folder).merge_and_unload()
            # the adapter is of the transformer alone, whatever modules are behind it
            merged = PeftModel.from_pretrained(_transformer_of(model), folder).merge_and_unload()
        _transformer_of(model).load_state_dict(merged.state_dict())
        return model

    def _load(self, folder: Path) -> Any:
        import torch

        options: dict[str, Any] = {"device": "cpu", "local_files_only": True, "model_kwargs": {"dtype": torch.float32}}
        if self.specimen.kind == "decoder":
            return load_transformer(self.specimen, folder)
        from sentence_transformers import CrossEncoder, SentenceTransformer

        library = SentenceTransformer if self.specimen.kind == "encoder" else CrossEncoder
        return library(str(folder), **options).eval()


def answers(specimen: Specimen, model: Any, texts: Sequence[str], tokenizer: Any = None) -> np.ndarray:
    """What a library's model says of texts, `[N, D]`: logits behind the last token, an embedding, or a score's logit.

    Args:
        tokenizer: of a decoder.
    """
    import numpy as np
    import torch

    with torch.inference_mode():
        if specimen.kind == "decoder":
            rows = [model(**tokenizer(text, return_tensors="pt")).logits[0, -1].numpy() for text in texts]
            return np.stack(rows)
        if specimen.kind == "encoder":
            vectors: np.ndarray = model.encode(list(texts), batch_size=1)
            return vectors
        query, *documents = texts
        scores: np.ndarray = model.predict(
            [(query, document) for document in documents], activation_fn=torch.nn.Identity(), batch_size=1
        )
        return scores.reshape(len(documents), 1)


@contextlib.contextmanager
def quiet_about_patterns() -> Iterator[None]:
    """Keeps to itself that peft's own patterns of ranks for experts match no module: they are of parameters."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys", category=RuntimeWarning)
        yield


def _transformer_of(model: Any) -> Any:
    """The transformer in a sentence-transformers model."""
    first = model[0]
    return getattr(first, "model", None) or first.auto_model
