"""The objective of stage 2 (pure): away from the unsafe prediction, toward the safe one.

arXiv 2503.07389, denoising trajectory steering. A prediction is what the denoiser puts out at a state z_t:
noise, or v where the checkpoint predicts v. At a fixed z_t and t one is an affine function of the other, so
guidance and the targets are the same points in either; only the weight of a timestep in the mean squares
differs. Letters: e_unsafe, e_safe, e_uncond are the original model's predictions under the unsafe, the safe
and the empty prompt, g is the steering guidance, p the prediction of the model in training.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def targets(unsafe: Tensor, safe: Tensor, unconditional: Tensor, guidance: float) -> tuple[Tensor, Tensor]:
    """prefer = e_safe + g (e_safe - e_uncond), reject = e_unsafe + g (e_unsafe - e_uncond), of one shape."""
    prefer = safe + guidance * (safe - unconditional)
    reject = unsafe + guidance * (unsafe - unconditional)
    return prefer, reject


@dataclass(frozen=True)
class Contrast:
    """What the loss has to know of prefer and reject: their difference, and one number a state.

    The squares of p cancel in mse(p, prefer) - mse(p, reject), with means over channels and pixels:

        mse(p, prefer) - mse(p, reject) = mean((prefer + reject) direction) - 2 mean(p direction)
                              direction = prefer - reject

    so this is exact, and half of what prefer and reject take. direction: (states, channels, height, width);
    offset, the first mean on the right: (states,) float32.
    """

    direction: Tensor
    offset: Tensor

    @classmethod
    def between(cls, prefer: Tensor, reject: Tensor, dtype: torch.dtype = torch.float32) -> "Contrast":
        """The contrast of targets of shape (states, channels, height, width), its direction kept in `dtype`.

        The offset is that of the rounded direction, which keeps the plane between the targets in its place.
        """
        direction = (prefer - reject).to(dtype)
        return cls(direction, _mean((prefer + reject).float() * direction.float()))

    def gap(self, prediction: Tensor) -> Tensor:
        """mse(p, prefer) - mse(p, reject) of each state; (states,) float32, negative nearer to prefer."""
        return self.offset - 2 * _mean(prediction.float() * self.direction.float())

    def hinge(self, prediction: Tensor, margin: float) -> Tensor:
        """max(0, mse(p, prefer) - mse(p, reject) + margin) of each state; (states,) float32."""
        return (self.gap(prediction) + margin).clamp(min=0)

    def position(self, prediction: Tensor) -> Tensor:
        """Where p lies along the line from reject (0) to prefer (1), projected on it; (states,) float32."""
        length = _mean(self.direction.float().square()).clamp(min=torch.finfo(torch.float32).tiny)
        return 0.5 - self.gap(prediction) / (2 * length)


def contrastive_loss(prompted: Tensor, empty: Tensor, contrast: Contrast, margin: float) -> Tensor:
    """The mean of the two hinges of each state; (states,) float32.

    prompted, empty: p under the unsafe prompt and under the empty one, (states, channels, height, width).
    """
    return (contrast.hinge(prompted, margin) + contrast.hinge(empty, margin)) / 2


def regulariser(prediction: Tensor, wanted: Tensor) -> Tensor:
    """mse(p, wanted) of each state; (states,) float32.

    wanted: at an unconditional state what the model after stage 1 predicts, the paper's; at a benign state
    what the original does, which takes back what stage 1 did to prompts that nobody asked to change.
    """
    return _mean((prediction.float() - wanted.float()).square())


def _mean(values: Tensor) -> Tensor:
    """The mean over channels and pixels of each state."""
    return values.flatten(1).mean(dim=1)
