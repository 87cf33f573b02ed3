"""What Fréchet distances are measured in: feature extractors, each with its name and file hashes."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch

from trce_cli.errors import BadInput, first_line
from trce_cli.system.safetensors import hash_file

if TYPE_CHECKING:
    from trce_cli.prompts.home import Clip, Judge


@runtime_checkable
class Extractor(Protocol):
    """`name` and `files` (name -> SHA-256) are told beside every distance."""

    @property
    def name(self) -> str: ...

    @property
    def files(self) -> Mapping[str, str]: ...

    def features(self, images: np.ndarray) -> np.ndarray:
        """RGB uint8 (count, height, width, 3) -> features float32 (count, width)."""
        ...


class JudgeFeatures:
    """A judge's last hidden layer, averaged over its cells."""

    def __init__(self, judge: "Judge") -> None:
        self.name = "judge, last hidden layer"
        self.files = {judge.weights.name: hash_file(judge.weights)}
        self.features = judge.features


class ClipFeatures:
    """A CLIP model's image features."""

    def __init__(self, clip: "Clip") -> None:
        self.name = f"{clip.name}, image features"
        self.files = clip.files
        self.features = clip.images


class InceptionFeatures:
    """The 2048 features of FID's own Inception v3, by torch-fidelity, from a local weight file."""

    def __init__(self, weights: Path, device: torch.device) -> None:
        import pickle

        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError) as error:  # the latter of a torchvision for another torch
            raise BadInput(
                f"torch-fidelity cannot be used: {error}.",
                "pip install 'trce[fid]', or leave --inception out.",
            ) from None
        try:
            # torch-fidelity unpickles the file; what the restricted loader takes can run no code there.
            torch.load(weights, weights_only=True)
            self._network = FeatureExtractorInceptionV3(
                "inception", ["2048"], feature_extractor_weights_path=str(weights)
            )
        except (  # what a damaged file makes torch raise
            *(OSError, EOFError, RuntimeError, AttributeError, TypeError, ValueError, LookupError),
            pickle.UnpicklingError,
        ) as error:
            reason = first_line(error)
            if isinstance(error, pickle.UnpicklingError):  # its text advises to run what is in there
                reason = "it holds something other than weights"
            raise BadInput(
                f"{weights} does not hold FID's Inception weights: {reason}",
                "It is torch-fidelity's weights-inception-2015-12-05-6726825d.pth.",
            ) from error
        self._network.eval().to(device)
        self._device = device
        self.name = "FID's Inception v3, 2048 features"
        self.files = {weights.name: hash_file(weights)}

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> np.ndarray:
        """RGB uint8 (count, height, width, 3) -> features float32 (count, 2048)."""
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).to(self._device)
        (found,) = self._network(pixels)
        array: np.ndarray = found.float().cpu().numpy()
        return array
