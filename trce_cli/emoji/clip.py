"""The CLIP that the embedded checkpoint was trained on; its text tower is that checkpoint's text encoder."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from trce_cli.emoji import folder
from trce_cli.emoji.networks import ImageTower, to_pixels

WEIGHTS = Path(__file__).parent / "clip.safetensors"


class EmojiClip:
    """Both towers. `name` and `files` (name -> SHA-256) say what the numbers come from."""

    name = "the embedded checkpoint's CLIP"

    def __init__(self) -> None:
        import transformers
        from transformers import CLIPTextModel, CLIPTokenizerFast

        transformers.logging.disable_progress_bar()
        state = {name: tensor.float() for name, tensor in load_file(WEIGHTS).items()}
        self.files = {WEIGHTS.name: hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()}
        self._projection = state.pop("text_projection.weight")
        self._tower = ImageTower().eval()
        self._tower.load_state_dict({name.removeprefix("image."): t for name, t in state.items()})
        self._tokenizer = CLIPTokenizerFast.from_pretrained(folder() / "tokenizer", local_files_only=True)
        self._encoder = CLIPTextModel.from_pretrained(
            folder() / "text_encoder", local_files_only=True, dtype=torch.float32
        ).eval()

    @torch.inference_mode()
    def images(self, images: np.ndarray) -> np.ndarray:
        """RGB uint8 (count, 64, 64, 3) -> features float32 (count, width)."""
        return _numpy(self._tower(to_pixels(images)))

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> features float32 (count, width) in the same space."""
        tokens = self._tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
        return _numpy(self._encoder(tokens.input_ids).pooler_output @ self._projection.T)


def _numpy(features: Tensor) -> np.ndarray:
    found: np.ndarray = features.numpy()
    return found
