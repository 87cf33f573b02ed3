"""Is what `trce steer --dry-run` tells of memory true? A real training step, measured.

    python -m benchmarks.steer_memory                        # emoji, emoji-dit and a tiny FLUX.1
    python -m benchmarks.steer_memory ./my-checkpoint        # any other
    python -m benchmarks.steer_memory --shapes sd1 z-image   # what is told of the true sizes of families

Each row is a process of its own: it loads the denoiser as the run does, takes a step that warms up, then
looks by how much the memory in use rises while it takes another (Linux: the high-water mark of the resident
set, reset before). Estimated is what `erase/step_memory.py` counts without values: activations, and gradients
of what is trained. With `--shapes` checkpoints are holes of the true shapes, and nothing is measured.
"""

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODES = {
    "whole weights": {},
    "whole weights, checkpointing": {"gradient_checkpointing": True},
    "LoRA": {"lora_rank": 8},
    "LoRA, bf16": {"lora_rank": 8, "mixed_precision": "bf16"},
    "LoRA, bf16, checkpointing": {"lora_rank": 8, "mixed_precision": "bf16", "gradient_checkpointing": True},
}
# What is freed goes back at once, so that a step before leaves nothing that hides the next one.
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"}


def resident(name: str) -> int:
    """`VmRSS`, the memory in use, or `VmHWM`, the most there was, in bytes."""
    return int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def measure(name: str, mode: str, size: int) -> dict[str, int]:
    """Bytes that a step takes, estimated and measured."""
    import torch

    from trce_cli.checkpoint.open import open_checkpoint
    from trce_cli.erase.adapters import add_adapters, trained_numbers
    from trce_cli.erase.prior import choose_prior
    from trce_cli.erase.sampling import Predictor
    from trce_cli.erase.settings import Recipe, Training
    from trce_cli.erase.step_memory import steer_memory
    from trce_cli.erase.training import losses, weighted
    from trce_cli.erase.trajectories import plan_trajectories
    from trce_cli.prompts.presets import load_presets

    options = dict(MODES[mode])
    checkpointing = bool(options.pop("gradient_checkpointing", False))
    training = Training(batch_size=size, **options)
    checkpoint = open_checkpoint(name)
    recipe = Recipe(unconditional=8, benign=8)
    plan = plan_trajectories(checkpoint, load_presets(["weapons"]), choose_prior(checkpoint), recipe)
    told = steer_memory(checkpoint, plan, training, checkpointing)
    trained = trained_numbers(checkpoint, training.lora_rank)
    cpu, denoiser = torch.device("cpu"), checkpoint.family.denoise(checkpoint)
    dtype = torch.float32 if training.mixed_precision == "no" else torch.bfloat16
    outline = denoiser.outline(plan.prompts)
    longest = max((int(each.argmax()) for each in outline.lengths.values()), default=1)
    told_of = denoiser.condition([outline.prompts[longest]], cpu)
    module = denoiser.load(cpu, dtype, training.lora_rank is None)
    if training.lora_rank is not None:
        add_adapters(module, checkpoint.family.tuned, training.lora_rank, 0)
    if checkpointing:
        module.enable_gradient_checkpointing()
    predict = Predictor(denoiser, module, told_of)
    states = {key: torch.randn(size, *plan.shape).half() for key in ("latents", "direction", "prediction")}
    states |= {"timesteps": torch.full((size,), 500), "rows": torch.ones(size, dtype=torch.int64)}
    batch = dict.fromkeys(("unsafe", "unconditional", "benign"), states | {"offset": torch.ones(size)})

    def step() -> int:
        module.zero_grad(set_to_none=True)
        gc.collect()
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        parts = losses(predict, batch, training.margin)
        weighted([part.mean() for part in parts], training).backward()
        return resident("VmHWM") - before

    step()
    return {"estimated": told["activation_bytes"] + 4 * trained, "measured": step()}


def tell(families: list[str], size: int) -> None:
    """Print a Markdown table of what is told of checkpoints of the true shapes."""
    from benchmarks import true_shapes
    from trce_cli.checkpoint.open import open_checkpoint
    from trce_cli.erase.prior import choose_prior
    from trce_cli.erase.settings import LORA_LR, Recipe, Training
    from trce_cli.erase.step_memory import steer_memory
    from trce_cli.erase.trajectories import plan_trajectories
    from trce_cli.prompts.presets import load_presets

    print("| family | gradient checkpointing | embeddings, GB | activations, GB | all, GB |")
    print("| --- | --- | ---: | ---: | ---: |")
    for family in families:
        with tempfile.TemporaryDirectory() as scratch:
            true_shapes.build(Path(scratch) / family, family, layers=2, filled=False)
            checkpoint = open_checkpoint(str(Path(scratch) / family))
            plan = plan_trajectories(
                checkpoint, load_presets(["weapons"]), choose_prior(checkpoint), Recipe()
            )
            training = Training(batch_size=size, lora_rank=16, lr=LORA_LR, mixed_precision="bf16")
            for checkpointing in (False, True):
                told = steer_memory(checkpoint, plan, training, checkpointing)
                names = ("embedding_bytes", "activation_bytes", "memory_bytes")
                row = " | ".join(f"{told[name] / 1e9:.3g}" for name in names)
                print(f"| {family} | {'yes' if checkpointing else 'no'} | {row} |", flush=True)


def main() -> None:
    """Measure each checkpoint in each mode, and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="*", default=["emoji", "emoji-dit", "tiny FLUX.1"])
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--shapes", nargs="+", metavar="FAMILY")
    options = parser.parse_args()
    if options.shapes:
        tell(options.shapes, options.batch_size)
        return
    if options.mode:
        print(json.dumps(measure(options.checkpoints[0], options.mode, options.batch_size)))
        return
    print("| checkpoint | what is trained | estimated, MB | measured, MB | estimated / measured |")
    print("| --- | --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.checkpoints:
            place = name
            if name == "tiny FLUX.1":
                sys.path.insert(0, str(ROOT / "tests"))
                import tiny

                place = str(tiny.build_flux(Path(scratch) / "flux"))
            for mode in MODES:
                command = [sys.executable, "-m", "benchmarks.steer_memory", place, "--mode", mode]
                command += ["--batch-size", str(options.batch_size)]
                done = subprocess.run(
                    command,
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                    cwd=ROOT,
                    env=os.environ | RETURNED,
                )
                found = json.loads(done.stdout.splitlines()[-1])
                one, other = found["estimated"] / 1e6, found["measured"] / 1e6
                print(f"| {name} | {mode} | {one:.1f} | {other:.1f} | {one / other:.2f} |", flush=True)


if __name__ == "__main__":
    main()
