"""Train the embedded checkpoint: every stage in order, each resumable, or the stages that are named."""

import argparse
import logging
from pathlib import Path

from training.card import write_card
from training.data import make_sprites
from training.export import export
from training.judge import JudgeTask
from training.latents import make_latents
from training.loop import Recipe, fit
from training.text import TextTask, train_tokenizer
from training.unet import UNetTask
from training.vae import VaeTask
from trce_cli.emoji import folder

RECIPES = {
    "clip": Recipe(steps=400, batch_size=128, lr=1e-3, warmup=100, ema=0.99),
    "vae": Recipe(steps=2300, batch_size=16, lr=2e-3, warmup=200, ema=0.995),
    "judge": Recipe(steps=2500, batch_size=64, lr=2e-3, ema=0.995),
    "unet": Recipe(steps=3600, batch_size=64, lr=1e-3, warmup=300, ema=0.999),
}
STAGES = ("sprites", "tokenizer", "clip", "vae", "latents", "judge", "unet", "export", "card")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument(
        "stages", nargs="*", default=STAGES, metavar="STAGE", help=f"from {', '.join(STAGES)}"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("emoji-training"), help="folder for data, logs and checkpoints"
    )
    parser.add_argument("--processes", type=int, default=2, help="data-parallel processes of one thread each")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    for stage in arguments.stages:
        logging.info("stage %s", stage)
        match stage:
            case "sprites":
                make_sprites(work)
            case "tokenizer":
                train_tokenizer(work / "tokenizer")
            case "clip":
                fit(TextTask(work, RECIPES["clip"]), work, 1)  # contrastive: the batch must stay whole
            case "vae":
                fit(VaeTask(work, RECIPES["vae"]), work, arguments.processes)
            case "latents":
                make_latents(work)
            case "judge":
                fit(JudgeTask(work, RECIPES["judge"]), work, arguments.processes)
            case "unet":
                fit(UNetTask(work, RECIPES["unet"]), work, arguments.processes)
            case "export":
                export(work, folder())
            case "card":
                write_card(work)
            case _:
                parser.error(f"unknown stage {stage!r}; choose from {', '.join(STAGES)}")


if __name__ == "__main__":
    main()
