"""Train `emoji-dit`: every stage in order, each resumable, or the stages that are named."""

import argparse
import logging
from dataclasses import replace
from pathlib import Path

from training.data import make_sprites
from training.dit.card import COUNT, measure, write_card
from training.dit.export import export
from training.dit.latents import make_latents
from training.dit.llm import LlmTask
from training.dit.transformer import TransformerTask
from training.dit.words import train_tokenizer
from training.loop import fit
from trce_cli.emoji import dit_folder

STAGES = ("sprites", "tokenizer", "llm", "latents", "transformer", "export", "card")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.dit", description=__doc__)
    parser.add_argument(
        "stages", nargs="*", default=STAGES, metavar="STAGE", help=f"from {', '.join(STAGES)}, measure"
    )
    parser.add_argument("--work", type=Path, default=Path("emoji-dit-training"), help="folder for all of it")
    parser.add_argument("--output", type=Path, help="folder of the checkpoint (default: the embedded one)")
    parser.add_argument("--processes", type=int, default=2, help="data-parallel processes of one thread each")
    parser.add_argument(
        "--steps", type=int, help="of the transformer: a run that goes on ends there, and slows down before"
    )
    parser.add_argument("--count", type=int, default=COUNT, help="pictures a row of what is measured")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts that `measure` draws")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    work: Path = arguments.work
    output: Path = arguments.output or dit_folder()
    work.mkdir(parents=True, exist_ok=True)
    for stage in arguments.stages:
        logging.info("stage %s", stage)
        match stage:
            case "sprites":
                make_sprites(work)
            case "tokenizer":
                train_tokenizer(work / "tokenizer")
            case "llm":
                fit(LlmTask(work), work, arguments.processes)
            case "latents":
                make_latents(work)
            case "transformer":
                task = TransformerTask(work)
                recipe = replace(task.recipe, steps=arguments.steps or task.recipe.steps)
                fit(replace(task, recipe=recipe), work, arguments.processes)
            case "export":
                export(work, output)
            case "measure":
                for rate in measure(work, output, arguments.count, arguments.seed):
                    print(f"{rate.name}: {rate}")
            case "card":
                write_card(work, output, arguments.count)
            case _:
                parser.error(f"unknown stage {stage!r}; choose from {', '.join(STAGES)}, measure")


if __name__ == "__main__":
    main()
