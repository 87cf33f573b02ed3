"""Maps for tiny checkpoints: random ones, a preset to make some, and what they have to be."""

from pathlib import Path

import torch

import tiny
from trce_cli import Map
from trce_cli.checkpoint.checkpoint import Hashes
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.checkpoint.provenance import record
from trce_cli.cli.app import main
from trce_cli.edits.edit import Made
from trce_cli.maths.closed_form import CUT_OFF
from trce_cli.maths.linear_map import LinearMap
from trce_cli.prompts.presets import load_preset

PRESET = """
name = "blades"
description = "blades"
kind = "object"
templates = ["{}", "a photo of {}"]
concepts = [{ unsafe = "a knife", safe = "a spoon" }, { unsafe = "a pistol", safe = "a tulip" }]
"""
PAIRS = [
    ("a knife", "a spoon"),
    ("a photo of a knife", "a photo of a spoon"),
    ("a pistol", "a tulip"),
    ("a photo of a pistol", "a photo of a tulip"),
]


def low_rank(width: int, rank: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.randn(width, rank, generator=generator, dtype=torch.float64) / width**0.5 for _ in range(2)
    )
    return left @ right.mT


def random_map(folder: Path, seed: int = 0, pooled: bool = True) -> Map:
    """A map of rank 3 for the checkpoint in the folder."""
    checkpoint = open_checkpoint(str(folder))
    hashes = Hashes({}, checkpoint.text_encoder_hash(), checkpoint.text_encoder_sample())
    entry = record("map", checkpoint, [load_preset("weapons")], {"strength": 1.0}, {"pairs": 3}, 0.1, hashes)
    made = Made(checkpoint.family, hashes.text_encoder, (entry,), hashes.sample)
    widths = checkpoint.widths
    return Map(
        made,
        {
            stream: LinearMap.of(low_rank(widths[stream], 3, seed + number))
            for number, stream in enumerate(checkpoint.family.streams if pooled else ("context",))
        },
    )


def run_map(folder: Path, where: Path, preset: str, slots: str, preserve: float, ridge: float) -> Path:
    """What `trce map` makes of a checkpoint with this preset, the tiny sentences alone being preserved."""
    (where / "blades.toml").write_text(preset)
    (where / "prior.txt").write_text("\n".join(tiny.SENTENCES))
    out = where / "out"
    command = f"map {folder} -p {where}/blades.toml --prior {where}/prior.txt -o {out} --word-share 0"
    command += f" --preserve {preserve} --ridge {ridge} --token-weights {slots} --max-collateral 1000 -q"
    assert main(command.split()) == 0
    return out


def solved_plainly(A: torch.Tensor, B: torch.Tensor, G: torch.Tensor, ridge: float) -> torch.Tensor:
    """M = I + (B - A) (G + r)^-1 on the range of G, written out apart from ours; float64."""
    values, vectors = torch.linalg.eigh(G)
    values, vectors = values[(kept := values > CUT_OFF * values[-1])], vectors[:, kept]
    inverse = vectors @ torch.diag(1 / (values + ridge * values[:-1].mean())) @ vectors.mT
    return torch.eye(len(A), dtype=torch.float64) + (B - A) @ inverse
