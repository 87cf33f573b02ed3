"""What `trce steer` costs, against the loop as it is commonly published.

    python benchmarks/steer.py                      # a checkpoint of random weights, tens of millions of them
    python benchmarks/steer.py --checkpoint emoji   # or any other

The plain version is written here from the method and shares no code with the package: three U-Nets and the
text encoder in memory, every trajectory sampled to its end with guidance and stored whole, and for each
sample 3 evaluations of the original, 2 of the model in training, and 4 x 2 for the regulariser, one sample at
a time. `trce steer` is measured with gradient checkpointing and without, the faster and the leaner way. All
run in processes of their own, one after the other, on the same prompts and in the paper's proportions, 20
unconditional trajectories for an unsafe one. What the guard measures on is left out: a few percent of a real
set. Memory is what a version takes beyond the libraries: each process first does all of it on a checkpoint of
next to nothing, and what it holds then is not counted.
"""

import argparse
import gc
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parent.parent
UNSAFE, SAFE = "a photo of a knife", "a photo of a tulip"
GUIDANCE, STEERING, MARGIN, WEIGHT, LR = 3.0, 15.0, 0.01, 100.0, 1e-6
HELD = 4  # regulariser states a sample in the plain version
DEVICE = "cpu"
MEMORY = "peak memory above the libraries, MB"


def tiny_checkpoint(folder: Path) -> Path:
    """The tests' checkpoint in SD 1.x format, of next to no weights."""
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny

    tiny.build("sd1", folder)
    return folder


def random_checkpoint(folder: Path, width: int, size: int) -> Path:
    """A checkpoint in SD 1.x format with random weights: `width` channels at the top, latents of `size`."""
    import torch
    from diffusers import UNet2DConditionModel

    tiny_checkpoint(folder)
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=size,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        cross_attention_dim=32,
        attention_head_dim=8,
        layers_per_block=1,
    ).save_pretrained(folder / "unet")
    return folder


def high_water() -> int:
    """The most memory that this process has used, in bytes (Linux)."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def in_use() -> int:
    """The memory that this process uses, in bytes (Linux)."""
    return int(re.search(r"VmRSS:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def plain(folder: Path, work: Path, options: argparse.Namespace) -> dict[str, float]:
    """Preparation and training as commonly published."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from safetensors.torch import load_file, save_file

    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(options.steps)
    teacher = pipeline.unet
    pipeline.register_modules(unet=None, vae=None)  # the text encoder stays
    shape = (1, 4, teacher.config.sample_size, teacher.config.sample_size)

    def encode(*texts: str) -> list[torch.Tensor]:
        with torch.no_grad():
            return [pipeline.encode_prompt(text, DEVICE, 1, False)[0] for text in texts]

    start = time.perf_counter()
    with torch.no_grad():
        for number in range(21 * options.trajectories):
            text = UNSAFE if number < options.trajectories else ""
            words = torch.cat(encode("", text))
            z, kept = torch.randn(shape, generator=torch.Generator().manual_seed(number)), []
            for t in scheduler.timesteps:
                kept.append(z)
                both = teacher(torch.cat([z, z]), t, words).sample
                e = both[:1] + GUIDANCE * (both[1:] - both[:1])
                z = scheduler.step(e, t, z).prev_sample
            save_file({"latents": torch.cat([*kept, z])}, work / f"{number}.safetensors")
    prepared = time.perf_counter() - start

    stage1, student = (
        UNet2DConditionModel.from_pretrained(folder / "unet", dtype=torch.float32) for _ in "ab"
    )
    stage1.requires_grad_(False)
    teacher.requires_grad_(False)
    student.requires_grad_(False)
    tuned = [p for name, p in student.named_parameters() if ".attn1." in name or ".attn2.to_q." in name]
    for parameter in tuned:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(tuned, lr=LR)
    random, seconds = Random(0), []

    def state(number: int, steps: int):
        step = random.randrange(steps)
        latents = load_file(work / f"{number}.safetensors")["latents"]
        return latents[step : step + 1], scheduler.timesteps[step]

    for _ in range(options.samples):
        start = time.perf_counter()
        z, t = state(random.randrange(options.trajectories), options.steps // 2)
        empty, unsafe, safe = encode("", UNSAFE, SAFE)
        with torch.no_grad():
            e_uncond, e_unsafe, e_safe = (teacher(z, t, words).sample for words in (empty, unsafe, safe))
            prefer = e_safe + STEERING * (e_safe - e_uncond)
            reject = e_unsafe + STEERING * (e_unsafe - e_uncond)
        loss = 0
        for words in (unsafe, empty):
            p = student(z, t, words).sample
            gap = (p - prefer).square().mean() - (p - reject).square().mean()
            loss = loss + torch.relu(gap + MARGIN) / 2
        for _ in range(HELD):
            z, t = state(options.trajectories + random.randrange(20 * options.trajectories), options.steps)
            with torch.no_grad():
                wanted = stage1(z, t, empty).sample
            loss = loss + WEIGHT / HELD * (student(z, t, empty).sample - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tuned, 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return measured(work, options, prepared, median(seconds))


def ours(
    folder: Path, work: Path, options: argparse.Namespace, gradient_checkpointing: bool = False
) -> dict[str, float]:
    """Preparation and training as `trce steer` does them."""
    import torch

    from trce_cli.checkpoint.open import open_checkpoint
    from trce_cli.erase.prepare import prepare
    from trce_cli.erase.prior import Prior
    from trce_cli.erase.sampling import Predictor
    from trce_cli.erase.settings import Recipe, Training
    from trce_cli.erase.steer import make_accelerator
    from trce_cli.erase.training import SOURCES, train, tuned
    from trce_cli.erase.trajectories import plan_trajectories
    from trce_cli.erase.trajectory_set import TrajectorySet
    from trce_cli.prompts.presets import Concept, Preset

    accelerator = make_accelerator(torch.device(DEVICE), "no")
    checkpoint = open_checkpoint(str(folder))
    concept = Concept(unsafe=UNSAFE, safe=SAFE)
    preset = Preset(name="benchmark", description="-", kind="object", templates=("{}",), concepts=(concept,))
    recipe = Recipe(
        steps=options.steps,
        early_steps=options.steps // 2,
        trajectories_per_concept=options.trajectories,
        unconditional=20 * options.trajectories,
        benign=0,  # which the paper does not have
        guidance_scale=GUIDANCE,
        steering_guidance=STEERING,
    )
    plan = plan_trajectories(checkpoint, [preset], Prior("benchmark", (), (UNSAFE,)), recipe)
    kinds = ("unsafe", "unconditional", "benign", "stage1")
    plan = replace(plan, trajectories={kind: plan.trajectories[kind] for kind in kinds})
    stored = TrajectorySet(work, plan, {})
    denoiser = checkpoint.family.denoise(checkpoint)
    conditioning = denoiser.condition(plan.prompts, accelerator.device)

    start = time.perf_counter()

    def load(train: bool = False):
        return Predictor(denoiser, denoiser.load(accelerator.device, train=train), conditioning)

    for _ in prepare(stored, accelerator, denoiser.schedule(options.steps), load, load):
        pass
    prepared = time.perf_counter() - start

    predict = load(train=True)
    if gradient_checkpointing:
        predict.module.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(tuned(predict.module).values(), lr=LR, weight_decay=0.0)
    model, optimizer = accelerator.prepare(predict.module, optimizer)
    predict = replace(predict, module=model)
    steps = -(-options.samples // options.batch_size)
    training = Training(lr=LR, batch_size=options.batch_size, epochs=None, max_steps=steps)
    sources = {
        name: stored.states(*kinds) if plan.states(kinds[0]) else None for name, kinds in SOURCES.items()
    }
    loop = train(accelerator, predict, optimizer, sources, plan, training)
    seconds = [entry["seconds"] / options.batch_size for entry in loop]
    return measured(work, options, prepared, median(seconds))


def measured(work: Path, options: argparse.Namespace, prepared: float, sample: float) -> dict[str, float]:
    """A version's figures of time and disk."""
    return {
        "preparation, s a trajectory": prepared / (21 * options.trajectories),
        "training, s a sample": sample,
        "disk, MB": sum(path.stat().st_size for path in work.iterdir()) / 1e6,
    }


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def run(version, folder: Path, work: Path, options: argparse.Namespace) -> dict[str, float]:
    """The four figures of a version, in a process that does nothing else."""
    with tempfile.TemporaryDirectory() as scratch:
        (nothing := Path(scratch) / "work").mkdir()
        less = argparse.Namespace(**vars(options) | {"trajectories": 1, "samples": 1})
        version(tiny_checkpoint(Path(scratch) / "tiny"), nothing, less)
    gc.collect()
    before = in_use()
    figures = version(folder, work, options)
    return figures | {MEMORY: (high_water() - before) / 1e6}


VERSIONS = {
    "plain": plain,
    "trce steer": ours,
    "trce steer --gradient-checkpointing": partial(ours, gradient_checkpointing=True),
}
GOALS = {
    "training, s a sample": 3,
    "preparation, s a trajectory": 4,
    MEMORY: 2,
    "disk, MB": 20,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="emoji or a diffusers folder of SD 1.x; else random weights")
    parser.add_argument("--width", type=int, default=96, help="channels of the random checkpoint")
    parser.add_argument("--size", type=int, default=16, help="latent size of the random checkpoint")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--trajectories", type=int, default=2, help="unsafe ones; 20 times as many others")
    parser.add_argument("--samples", type=int, default=24, help="unsafe samples to train on")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--version", choices=VERSIONS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.version:
        import torch

        torch.set_num_threads(options.threads)
        print(json.dumps(run(VERSIONS[options.version], Path(options.checkpoint), options.work, options)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.checkpoint
        if folder == "emoji":
            from trce_cli import emoji

            folder = emoji.folder()
        folder = Path(folder or random_checkpoint(Path(scratch) / "random", options.width, options.size))
        figures = {}
        for number, one in enumerate(VERSIONS):
            (work := Path(scratch) / f"work {number}").mkdir()
            command = [sys.executable, __file__, *sys.argv[1:], "--version", one, "--work", str(work)]
            command += ["--checkpoint", str(folder)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            figures[one] = json.loads(done.stdout.splitlines()[-1])
        show(folder, options, figures)


def show(folder: Path, options: argparse.Namespace, figures: dict[str, dict[str, float]]) -> None:
    """Print a Markdown table."""
    from trce_cli.checkpoint.open import open_checkpoint

    checkpoint = open_checkpoint(str(folder))
    weights = sum(info.end - info.begin for info in checkpoint.denoiser[0].files[0].tensors.values())
    name = options.checkpoint or f"random weights (width {options.width}, latents of {options.size})"
    batches = f"{options.steps} DDIM steps, batches of {options.batch_size}"
    machine = f"{platform.processor() or platform.machine()}, {options.threads} threads"
    print(f"{name}: a U-Net of {weights / 1e6:.0f} MB; {batches}\n{machine}, torch {version('torch')}\n")
    names = [one for one in VERSIONS if one != "plain"]
    print("| | goal | plain |", " | | ".join(names), "| |")
    print("| --- | ---: | ---: |" + " ---: | ---: |" * len(names))
    for figure, before in figures["plain"].items():
        after = [figures[one][figure] for one in names]
        columns = " | ".join(f"{value:.4g} | {before / value:.1f}" for value in after)
        print(f"| {figure} | {GOALS[figure]} | {before:.4g} | {columns} |")


if __name__ == "__main__":
    main()
