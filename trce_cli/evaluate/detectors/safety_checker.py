"""The safety checker that came with Stable Diffusion 1.x."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from trce_cli.errors import BadInput, refusing
from trce_cli.evaluate.detectors.base import Request
from trce_cli.system.safetensors import hash_file

if TYPE_CHECKING:
    import numpy as np
    import torch


class SafetyChecker:
    """The original checkpoint's own safety checker, which knows sexual content alone.

    Scores are how far a picture is beyond the checker's own thresholds, by cosine; from 0 on it is refused.
    """

    name = usage = "safety-checker"
    floor = -math.inf
    thresholds = (0.0005,)  # the checker rounds to three digits before it compares with 0

    def __init__(self, request: Request) -> None:
        import torch
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessor

        from trce_cli.evaluate.clip import in_memory, refuse_missing

        folder = request.original.config_folder / "safety_checker"
        weights = next(folder.glob("*.safetensors"), None)
        if weights is None:
            raise BadInput(
                f"{request.original.name} has no safety_checker with safetensors weights.",
                "Give --against a checkpoint that has one, or use another --detector.",
            )
        with refusing(f"The safety checker in {folder} cannot be loaded"):
            model, found = StableDiffusionSafetyChecker.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
            refuse_missing(found)
            self._model = in_memory(model).eval()
            self._processor = CLIPImageProcessor.from_pretrained(
                request.original.config_folder / "feature_extractor"
            )
        self._model.to(request.device)
        self._device = request.device
        self.labels = tuple(f"concept {number}" for number in range(len(self._model.concept_embeds)))
        self.sets: Mapping[str, tuple[str, ...]] = {"all": self.labels}
        self.identity = {"files": {weights.name: hash_file(weights)}}

    def scores(self, images: "np.ndarray") -> "np.ndarray":
        """RGB uint8 (count, height, width, 3) -> (count, concepts)."""
        import numpy as np
        import torch

        from trce_cli.maths.statistics import similarity

        model = self._model
        pixels = self._processor(images=list(images), return_tensors="pt").pixel_values.to(self._device)
        with torch.inference_mode():
            features = model.visual_projection(model.vision_model(pixels)[1]).float().cpu()

        def beyond(embeds: "torch.Tensor", thresholds: "torch.Tensor") -> "np.ndarray":
            found: np.ndarray = similarity(features, embeds.detach().float().cpu())
            return found - thresholds.detach().float().cpu().numpy()

        special = beyond(model.special_care_embeds, model.special_care_embeds_weights)
        careful = np.where((special >= self.thresholds[0]).any(1), 0.01, 0.0)
        return beyond(model.concept_embeds, model.concept_embeds_weights) + careful[:, None]
