"""What `trce steer` costs, against the loop as it is commonly published.

    python benchmarks/steer.py                      # a checkpoint of random weights, tens of millions of them
    python benchmarks/steer.py --checkpoint emoji   # or any other

The plain version is written here from the paper alone and shares no code with the package: three U-Nets in
memory, every trajectory sampled to its end with guidance and stored whole, and for each sample 3 evaluations
of the original, 2 of the model in training, and 4 x 2 for the regulariser, one sample at a time. Both
versions run in processes of their own, one after the other, on the same prompts and in the paper's
proportions, 20 unconditional trajectories for an unsafe one. What the guard measures on is left out: a few
percent of a real set.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parent.parent
UNSAFE, SAFE = "a photo of a knife", "a photo of a tulip"
GUIDANCE, STEERING, MARGIN, WEIGHT, LR = 3.0, 15.0, 0.01, 100.0, 1e-6
HELD = 4  # regulariser states a sample in the plain version
DEVICE = "cpu"


def random_checkpoint(folder: Path, width: int, size: int) -> Path:
    """A checkpoint in SD 1.x format with random weights: `width` channels at the top, latents of `size`."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from diffusers import UNet2DConditionModel

    import tiny

    tiny.build("sd1", folder)
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

    base = in_use()
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(options.steps)
    with torch.no_grad():
        words = {text: pipeline.encode_prompt(text, "cpu", 1, False)[0] for text in ("", UNSAFE, SAFE)}
    teacher = pipeline.unet.float()
    del pipeline
    shape = (1, 4, teacher.config.sample_size, teacher.config.sample_size)

    start = time.perf_counter()
    with torch.no_grad():
        for number in range(21 * options.trajectories):
            text = UNSAFE if number < options.trajectories else ""
            z, kept = torch.randn(shape, generator=torch.Generator().manual_seed(number)), []
            for t in scheduler.timesteps:
                kept.append(z)
                both = teacher(torch.cat([z, z]), t, torch.cat([words[""], words[text]])).sample
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
        return load_file(work / f"{number}.safetensors")["latents"][step : step + 1], scheduler.timesteps[
            step
        ]

    for _ in range(options.samples):
        start = time.perf_counter()
        z, t = state(random.randrange(options.trajectories), options.steps // 2)
        with torch.no_grad():
            e_uncond, e_unsafe, e_safe = (teacher(z, t, words[text]).sample for text in ("", UNSAFE, SAFE))
            prefer = e_safe + STEERING * (e_safe - e_uncond)
            reject = e_unsafe + STEERING * (e_unsafe - e_uncond)
        loss = 0
        for text in (UNSAFE, ""):
            p = student(z, t, words[text]).sample
            gap = (p - prefer).square().mean() - (p - reject).square().mean()
            loss = loss + torch.relu(gap + MARGIN) / 2
        for _ in range(HELD):
            z, t = state(options.trajectories + random.randrange(20 * options.trajectories), options.steps)
            with torch.no_grad():
                wanted = stage1(z, t, words[""]).sample
            loss = loss + WEIGHT / HELD * (student(z, t, words[""]).sample - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tuned, 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return measured(work, options, prepared, median(seconds), base)


def ours(folder: Path, work: Path, options: argparse.Namespace) -> dict[str, float]:
    """Preparation and training as `trce steer` does them."""
    import diffusers.models.unets.unet_2d_condition
    import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion  # noqa: F401 - both versions need it
    import torch

    from trce_cli import steer
    from trce_cli.checkpoint import open_checkpoint
    from trce_cli.denoiser import ddim, encode, load_unet, trainable
    from trce_cli.presets import Concept, Preset
    from trce_cli.trajectories import Recipe, TrajectorySet, plan_trajectories, prepare

    accelerator = steer.make_accelerator(torch.device(DEVICE), "no")
    base = in_use()
    checkpoint = open_checkpoint(str(folder))
    concept = Concept(unsafe=UNSAFE, safe=SAFE)
    preset = Preset(name="benchmark", description="-", kind="object", templates=("{}",), concepts=(concept,))
    recipe = Recipe(
        steps=options.steps,
        early_steps=options.steps // 2,
        trajectories_per_concept=options.trajectories,
        unconditional=20 * options.trajectories,
        guidance_scale=GUIDANCE,
        steering_guidance=STEERING,
    )
    plan = plan_trajectories(checkpoint, [preset], [UNSAFE], recipe)
    kinds = ("unsafe", "unconditional", "stage1")
    plan = replace(plan, trajectories={kind: plan.trajectories[kind] for kind in kinds})
    stored = TrajectorySet(work, plan, {})
    conditioning = encode(checkpoint, plan.prompts, accelerator.device)

    start = time.perf_counter()

    def load(train: bool = False):
        return load_unet(checkpoint, accelerator.device, train=train)

    for _ in prepare(stored, accelerator, conditioning, ddim(checkpoint, options.steps), load, load):
        pass
    prepared = time.perf_counter() - start

    model = load(train=True)
    if options.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=LR, weight_decay=0.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    steps = -(-options.samples // options.batch_size)
    training = steer.Training(lr=LR, batch_size=options.batch_size, epochs=None, max_steps=steps)
    held = stored.states("unconditional", "stage1")
    loop = steer.train(
        accelerator, model, optimizer, stored.states("unsafe"), held, plan, conditioning, training
    )
    seconds = [entry["seconds"] / options.batch_size for entry in loop]
    return measured(work, options, prepared, median(seconds), base)


def measured(work: Path, options: argparse.Namespace, prepared: float, sample: float, base: int):
    """The four figures of a version."""
    return {
        "preparation, s a trajectory": prepared / (21 * options.trajectories),
        "training, s a sample": sample,
        "peak memory above the libraries, MB": (high_water() - base) / 1e6,
        "disk, MB": sum(path.stat().st_size for path in work.iterdir()) / 1e6,
    }


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


VERSIONS = {"plain": plain, "trce": ours}
GOALS = {
    "training, s a sample": 3,
    "preparation, s a trajectory": 4,
    "peak memory above the libraries, MB": 2,
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
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--version", choices=VERSIONS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.version:
        import torch

        torch.set_num_threads(options.threads)
        print(json.dumps(VERSIONS[options.version](Path(options.checkpoint), options.work, options)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.checkpoint
        if folder == "emoji":
            from trce_cli import emoji

            folder = emoji.folder()
        folder = Path(folder or random_checkpoint(Path(scratch) / "random", options.width, options.size))
        figures = {}
        for one in VERSIONS:
            (work := Path(scratch) / one).mkdir()
            command = [sys.executable, __file__, *sys.argv[1:], "--version", one, "--work", str(work)]
            command += ["--checkpoint", str(folder)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            figures[one] = json.loads(done.stdout.splitlines()[-1])
        show(folder, options, figures)


def show(folder: Path, options: argparse.Namespace, figures: dict[str, dict[str, float]]) -> None:
    """Print a Markdown table."""
    from trce_cli.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(str(folder))
    weights = sum(info.end - info.begin for info in checkpoint.unet_files[0].tensors.values())
    name = options.checkpoint or f"random weights (width {options.width}, latents of {options.size})"
    batches = f"{options.steps} DDIM steps, batches of {options.batch_size}"
    machine = f"{platform.processor() or platform.machine()}, {options.threads} threads"
    print(f"{name}: a U-Net of {weights / 1e6:.0f} MB; {batches}\n{machine}, torch {version('torch')}\n")
    print("| | plain | trce steer | plain / trce | goal |\n| --- | ---: | ---: | ---: | ---: |")
    for figure, before in figures["plain"].items():
        after = figures["trce"][figure]
        print(f"| {figure} | {before:.4g} | {after:.4g} | {before / after:.1f} | {GOALS.get(figure, 20)} |")


if __name__ == "__main__":
    main()
