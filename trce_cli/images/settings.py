"""What is drawn, and how."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import Field

from trce_cli.errors import BadInput
from trce_cli.prompts.files import Prompt, read_prompts
from trce_cli.settings import Count, Flag, NotNegative, Seed, Settings

STEPS = 50  # diffusers' default for every family, and the one of the I2P evaluations
CLIP_SKIP = (
    "The text encoder's layer that is read, counted from the last, as web UIs count it (SD 1.x and 2.x)."
)


class DrawSettings(Settings):
    """How to draw; None leaves it to the prompt's own row, and where that is silent to the checkpoint."""

    seed: Seed | None = Field(
        None,
        description="Seed of every prompt's first image, instead of the file's; 0 where there is none.",
    )
    images_per_prompt: Annotated[Count, Flag(("--images-per-prompt", "-n"))] = Field(
        1, description="Images a prompt, seeds counted up."
    )
    steps: Count = Field(STEPS, description="Denoising steps.")
    guidance_scale: NotNegative | None = Field(
        None,
        description="Classifier-free guidance, instead of the file's; where there is none what diffusers "
        "draws the family with.",
    )
    negative_prompt: str = Field("", description="What to steer away from.")
    clip_skip: Count = Field(1, description=CLIP_SKIP)
    scheduler: str | None = Field(
        None,
        description="ddim, ddpm, dpmsolver++, euler, euler-a, heun, lms, pndm, unipc; else the checkpoint's.",
    )
    width: Count | None = Field(None, description="Pixels, instead of the file's; else as trained.")
    height: Count | None = Field(None, description="Pixels, instead of the file's; else as trained.")


class Rows(Settings):
    """Prompts of a file."""

    prompt_file: Annotated[Path | None, Flag(("--prompts",), metavar="FILE")] = Field(
        None,
        description="More prompts: .txt, one a line, or .csv with a prompt column and, if any, seed, "
        "guidance, width and height, as I2P, MMA-Diffusion, P4D, Ring-A-Bell, UnlearnDiffAtk and COCO spell "
        "them.",
    )
    where: Annotated[tuple[str, ...], Flag(metavar="NAME=VALUE")] = Field(
        (),
        description="Only rows of the file whose cell is, or lists, this value; may be repeated, all must "
        "hold.",
    )
    limit: Count | None = Field(None, description="Take only the first so many of the file.")

    def prompts(self, note: Callable[[str], None]) -> list[Prompt]:
        """The file's prompts, none without a file; `note` receives remarks. Errors are `read_prompts`'s."""
        if self.prompt_file:
            return read_prompts(self.prompt_file, where=self.where, limit=self.limit, note=note)
        if self.where or self.limit:
            raise BadInput("--where and --limit choose rows of a file.", "Name it with --prompts.")
        return []
