"""Any CLIP model of transformers, to tell how well a picture fits a text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trce_cli.checkpoint.bases import public_name
from trce_cli.errors import refusing
from trce_cli.system.foreign import open_file
from trce_cli.system.safetensors import hash_file


def refuse_missing(found: Mapping[str, Any]) -> None:
    """Raise ValueError where transformers, as it tells after loading, left weights at random values."""
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"the weight {missing[0]} is missing")


def in_memory(model: Any) -> Any:
    """The model with weights of its own: those that transformers loads stay pages of the file, and one that
    shrinks meanwhile would end the process.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


class TransformersClip:
    """Any CLIP model of transformers, by folder or hub id; only safetensors are read."""

    def __init__(self, name: str, device: torch.device) -> None:
        import transformers
        from transformers import CLIPModel, CLIPProcessor
        from transformers.utils import cached_file

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        hint = "Give a folder or hub id with config.json, model.safetensors, tokenizer and preprocessor."
        with refusing(f"{name} cannot be loaded as a CLIP model", hint):
            for path in sorted(Path(name).glob("*")):
                if not path.is_dir():
                    open_file(path).close()  # a library would wait for a pipe
            model, found = CLIPModel.from_pretrained(
                name, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
            refuse_missing(found)
            self._model = in_memory(model).eval().to(device)
            self._processor = CLIPProcessor.from_pretrained(name)
            weights = Path(str(cached_file(name, "model.safetensors")))
        self.name = f"CLIP {public_name(name)}"
        self.files = {"model.safetensors": hash_file(weights)}
        self.scale = float(self._model.logit_scale.detach().exp())
        self._device = device

    @torch.inference_mode()
    def images(self, images: np.ndarray) -> np.ndarray:
        """RGB uint8 (count, height, width, 3) -> features float32 (count, width)."""
        inputs = self._processor(images=list(images), return_tensors="pt").to(self._device)
        return numpy(projected(self._model.get_image_features(**inputs)))

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> features float32 (count, width)."""
        found = []
        for start in range(0, len(texts), 64):
            inputs = self._processor(
                text=list(texts[start : start + 64]), padding=True, truncation=True, return_tensors="pt"
            ).to(self._device)
            found.append(numpy(projected(self._model.get_text_features(**inputs))))
        return np.concatenate(found)


def projected(output: Any) -> Tensor:
    """The features: what transformers 4 returns as they are, and 5 inside an output object."""
    features = getattr(output, "pooler_output", output)
    assert isinstance(features, Tensor)
    return features


def numpy(features: Tensor) -> np.ndarray:
    """Features as a float32 array on the CPU."""
    array: np.ndarray = features.float().cpu().numpy()
    return array
