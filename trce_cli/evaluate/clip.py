"""CLIP models that tell how well a picture fits a text, the embedded one and any other, behind one form."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from trce_cli.errors import BadInput, first_line
from trce_cli.system.safetensors import hash_file

if TYPE_CHECKING:
    from trce_cli.checkpoint.checkpoint import Checkpoint

EMBEDDED = Path(__file__).parents[1] / "emoji" / "clip.safetensors"


class Clip(Protocol):
    """Both towers. `name` and `files` (name -> SHA-256) say what the numbers come from."""

    @property
    def name(self) -> str: ...

    @property
    def files(self) -> Mapping[str, str]: ...

    def images(self, images: np.ndarray) -> np.ndarray:
        """RGB uint8 (count, height, width, 3) -> features float32 (count, width)."""
        ...

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> features float32 (count, width) in the same space."""
        ...


class EmbeddedClip:
    """The CLIP that the embedded checkpoint was trained on; its text tower is that checkpoint's encoder."""

    def __init__(self, checkpoint: "Checkpoint") -> None:
        from safetensors.torch import load_file

        from trce_cli.emoji.networks import ImageTower

        state = {name: tensor.float() for name, tensor in load_file(EMBEDDED).items()}
        self.name = "the embedded checkpoint's CLIP"
        self.files = {EMBEDDED.name: hash_file(EMBEDDED)}
        self._projection = state.pop("text_projection.weight")
        self._tower = ImageTower().eval()
        self._tower.load_state_dict({name.removeprefix("image."): t for name, t in state.items()})
        (self._tokenizer,), (self._encoder,) = (
            checkpoint.load_tokenizers(),
            checkpoint.load_text_encoders(dtype=torch.float32),
        )

    @torch.inference_mode()
    def images(self, images: np.ndarray) -> np.ndarray:
        """RGB uint8 (count, 64, 64, 3) -> features float32 (count, width)."""
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return numpy(self._tower(pixels))

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> features float32 (count, width)."""
        tokens = self._tokenizer(
            list(texts), padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        return numpy(self._encoder(tokens).pooler_output @ self._projection.T)


def refuse_missing(found: Mapping[str, Any]) -> None:
    """Raise ValueError where transformers, as it tells after loading, left weights at random values."""
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"the weight {missing[0]} is missing.")


class TransformersClip:
    """Any CLIP model of transformers, by folder or hub id; only safetensors are read."""

    def __init__(self, name: str, device: torch.device) -> None:
        import transformers
        from transformers import CLIPModel, CLIPProcessor
        from transformers.utils import cached_file

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            model, found = CLIPModel.from_pretrained(name, use_safetensors=True, output_loading_info=True)
            refuse_missing(found)
            self._model = model.eval().to(device)
            self._processor = CLIPProcessor.from_pretrained(name)
            weights = Path(str(cached_file(name, "model.safetensors")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"{name} cannot be loaded as a CLIP model: {first_line(error)}",
                "Give a folder or hub id with config.json, model.safetensors, tokenizer and preprocessor.",
            ) from error
        self.name = f"CLIP {name}"
        self.files = {"model.safetensors": hash_file(weights)}
        self.scale = float(self._model.logit_scale.detach().exp())
        self._device = device

    @torch.inference_mode()
    def images(self, images: np.ndarray) -> np.ndarray:
        """RGB uint8 (count, height, width, 3) -> features float32 (count, width)."""
        inputs = self._processor(images=list(images), return_tensors="pt").to(self._device)
        return numpy(pooled(self._model.get_image_features(**inputs)))

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> features float32 (count, width)."""
        found = []
        for start in range(0, len(texts), 64):
            inputs = self._processor(
                text=list(texts[start : start + 64]), padding=True, truncation=True, return_tensors="pt"
            ).to(self._device)
            found.append(numpy(pooled(self._model.get_text_features(**inputs))))
        return np.concatenate(found)


def pooled(output: Any) -> Tensor:
    """The features: what transformers 4 returns as they are, and 5 inside an output object."""
    features = getattr(output, "pooler_output", output)
    assert isinstance(features, Tensor)
    return features


def numpy(features: Tensor) -> np.ndarray:
    """Features as a float32 array on the CPU."""
    array: np.ndarray = features.float().cpu().numpy()
    return array
