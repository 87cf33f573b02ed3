"""Stage 1 as a whole: concepts of presets erased from a checkpoint by a map that says how it was made."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trce_cli.checkpoint.checkpoint import Checkpoint, Hashes
from trce_cli.checkpoint.provenance import record
from trce_cli.edits.edit import Made
from trce_cli.edits.map import Map
from trce_cli.erase.map import Solution, solve
from trce_cli.erase.prior import Prior
from trce_cli.erase.settings import MapSettings
from trce_cli.prompts.pairs import prompt_pairs
from trce_cli.prompts.presets import Preset
from trce_cli.system.progress import Task, no_task


@dataclass(frozen=True)
class Erasure:
    """What is erased from what, and how. Prompts are encoded on `device` in `dtype`."""

    checkpoint: Checkpoint
    presets: Sequence[Preset]
    settings: MapSettings
    prior: Prior
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32

    def solve(self, task: Task = no_task) -> Solution:
        """The maps and the guards' figures; nothing is changed. Errors are those of `Statistics`."""
        pairs = prompt_pairs(self.presets)
        return solve(self.checkpoint, pairs, self.prior, self.settings, self.device, self.dtype, task)

    def map(self, solution: Solution, seconds: float, hashes: Hashes) -> Map:
        """The solution as a map that says how it was made.

        seconds: that it took. hashes: of the checkpoint.
        """
        family = self.checkpoint.family
        resolved = self.settings.resolved(family) | {
            "prior": self.prior.source,
            "prior_sha256": self.prior.sha256(),
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        entry = record("map", self.checkpoint, self.presets, resolved, solution.figures, seconds, hashes)
        made = Made(family, hashes.text_encoder, (entry,), hashes.sample)
        return Map(made, solution.streams)
