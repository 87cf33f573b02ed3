"""Pictures drawn from pictures, by every family that has it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trce_cli.checkpoint.open import open_checkpoint


@pytest.fixture(params=["tiny_sd1", "tiny_sdxl"])
def redrawn(request: pytest.FixtureRequest) -> Any:
    """Draws with a tiny checkpoint from one picture, under a prompt and with a mask."""
    folder: Path = request.getfixturevalue(request.param)
    checkpoint = open_checkpoint(str(folder))
    family = checkpoint.family
    pipe = family.pipe(checkpoint, torch.device("cpu"), torch.float32)
    pipe.scheduler = family.scheduler(pipe, "ddim")
    canvas = family.canvas(checkpoint)
    noise = np.random.default_rng(0).integers(0, 255, (canvas.height, canvas.width, 3), dtype=np.uint8)

    def draw(prompt: str, mask: Image.Image | None, strength: float) -> np.ndarray:
        assert family.redraw is not None
        return np.asarray(
            family.redraw(
                pipe,
                prompt,
                None,
                torch.Generator().manual_seed(5),
                Image.fromarray(noise),
                mask,
                strength=strength,
                steps=4,
                guidance_scale=5.0,
            )
        )

    draw.size = (canvas.width, canvas.height)  # type: ignore[attr-defined]
    return draw


def test_nothing_is_painted_where_the_mask_is_black(redrawn: Any) -> None:
    black, white = Image.new("L", redrawn.size), Image.new("L", redrawn.size, 255)
    kept = redrawn("a knife", black, 1.0)
    assert kept.shape == (redrawn.size[1], redrawn.size[0], 3)
    assert kept == pytest.approx(redrawn("a cat", black, 1.0), abs=1e-5)
    assert np.abs(kept - redrawn("a knife", white, 1.0)).max() > 0.01


def test_strength_is_how_far_a_picture_goes_from_the_one_it_begins_with(redrawn: Any) -> None:
    begun = redrawn("a knife", Image.new("L", redrawn.size), 1.0)
    gone = [np.abs(redrawn("a knife", None, strength) - begun).mean() for strength in (0.25, 1.0)]
    assert gone[0] < gone[1]
    assert np.array_equal(redrawn("a knife", None, 0.5), redrawn("a knife", None, 0.5))
    assert not np.array_equal(redrawn("a knife", None, 0.5), redrawn("", None, 0.5))
