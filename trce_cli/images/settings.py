"""How pictures are drawn."""

from typing import Annotated

from pydantic import AfterValidator, Field

from trce_cli.prompts.files import MAX_SEED
from trce_cli.settings import Count, Flag, NotNegative, Settings

STEPS = 50  # diffusers' default for every family, and the one of the I2P evaluations


def _check_seed(seed: int) -> int:
    if seed > MAX_SEED:
        raise ValueError(f"must be at most {MAX_SEED}, not {seed}")
    return seed


class DrawSettings(Settings):
    """How to draw; None leaves it to the prompt's own row, and where that is silent to the checkpoint."""

    seed: Annotated[int, Field(ge=0), AfterValidator(_check_seed)] | None = Field(
        None,
        description="Seed of every prompt's first image, instead of the file's; 0 where there is none.",
    )
    images_per_prompt: Annotated[Count, Flag(("--images-per-prompt", "-n"))] = Field(
        1, description="Images a prompt, seeds counted up."
    )
    steps: Count = Field(STEPS, description="Denoising steps.")
    guidance_scale: NotNegative | None = Field(
        None,
        description="Classifier-free guidance, instead of the file's; where there is none 7.5, SDXL 5.",
    )
    negative_prompt: str = Field("", description="What to steer away from.")
    scheduler: str | None = Field(
        None,
        description="ddim, ddpm, dpmsolver++, euler, euler-a, heun, lms, pndm, unipc; else the checkpoint's.",
    )
    width: Count | None = Field(None, description="Pixels, instead of the file's; else as trained.")
    height: Count | None = Field(None, description="Pixels, instead of the file's; else as trained.")
