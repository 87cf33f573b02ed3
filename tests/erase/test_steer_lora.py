"""Stage 2 as a LoRA: factors on the layers that it would tune, everything else frozen."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import toy
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.edits.edit import LowRank
from trce_cli.edits.outputs import choose_outputs
from trce_cli.erase import steer as stage2
from trce_cli.erase.adapters import add_adapters, take_adapters, trained_numbers
from trce_cli.erase.prior import Prior
from trce_cli.erase.sampling import Predictor
from trce_cli.erase.settings import Recipe, Training, choose_steer_settings
from trce_cli.erase.steer import make_accelerator, steer
from trce_cli.erase.training import tuned
from trce_cli.erase.trajectories import plan_trajectories
from trce_cli.erase.working_folder import WorkingFolder
from trce_cli.errors import BadInput
from trce_cli.maths.low_rank import Size, cut
from trce_cli.prompts.presets import Preset, load_preset

FAMILIES = ("sd1", "sdxl", "z-image", "qwen-image", "flux", "chroma", "flux2-klein", "sd3", "sd3-clip")
STEER = """
steps = 4
trajectories_per_concept = 2
unconditional = 4
benign = 4
lr = 1e-6
batch_size = 2
max_steps = 4
"""
PRIOR = Prior("test", ("a fish", "a pig"), ("a dog in the garden", "two red apples on a plate"))
RECIPE = Recipe(steps=4, early_steps=2, trajectories_per_concept=1, unconditional=2, benign=2)
RANK = 3
# A batch is all unsafe states, so that the loss of each step is of the same.
TRAINING = Training(lr=1e-2, batch_size=4, epochs=None, max_steps=5, margin=1e3, regularisation=1.0,
                    retention=1.0, lora_rank=RANK)  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("preset") / "toy.toml"
    path.write_text(toy.preset(STEER))
    return path


def run(folder: Path, preset: Preset, output: Path, training: Training = TRAINING, **options: Any) -> Any:
    """Steer a checkpoint that is its own teacher."""
    erased = open_checkpoint(str(folder))
    plan = plan_trajectories(erased, [preset], PRIOR, RECIPE)
    accelerator = make_accelerator(CPU, training.mixed_precision)
    options["outputs"] = choose_outputs(erased, output, options.pop("forms", None))
    return steer(erased, erased, [preset], plan, training, output, accelerator, max_drift=1e6, **options)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint's denoiser."""
    checkpoint = open_checkpoint(str(folder))
    return {key: checkpoint.read("denoiser", key) for key in checkpoint.keys("denoiser")}


def picture(pipe: Any, family: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    found: np.ndarray = family.draw(
        pipe, ["a knife"], None, [generator], steps=2, guidance_scale=2.0, width=32, height=32
    )
    return found


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen-Image's latents are as many as those of large pictures, whatever its sizes."""
    monkeypatch.setattr("trce_cli.families.qwen_image.denoiser.LATENTS", 8)


@pytest.mark.parametrize("key", FAMILIES)
def test_only_factors_are_trained_and_a_lora_does_what_is_folded(
    key: str, preset: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"tiny_{key}")
    entry = run(folder, load_preset(preset), tmp_path / "out", forms=["diffusers", "lora"])
    figures = entry["figures"]["training"]
    log = [json.loads(line) for line in (tmp_path / "out/steer.jsonl").read_text().splitlines()]
    assert min(line["contrast"] for line in log[1:]) < log[0]["contrast"]
    assert figures["steps"] == 5
    assert entry["settings"]["lora_rank"] == RANK
    assert entry["lora"]["max_rank"] == RANK
    assert entry["lora"]["truncation_error"]["change"]["max"] < 1e-3
    assert entry["lora"]["left_out"] == []
    checkpoint = open_checkpoint(str(folder))
    family = checkpoint.family
    before, after = weights_of(folder), weights_of(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layers = {name for name in before if family.tuned(name) and before[name].ndim == 2}
    # Tiny U-Nets attend over one latent at the bottom, where queries and keys do nothing.
    assert changed == layers or (family.denoiser == "unet" and changed < layers)
    for name in changed:
        values = torch.linalg.svdvals(after[name].double() - before[name].double())
        assert values[RANK:].max() < 1e-5 * values[0]
    pipe = family.pipe(checkpoint, CPU, torch.float32)
    original = picture(pipe, family)
    pipe.load_lora_weights(tmp_path / "out.lora.safetensors")
    folded = open_checkpoint(str(tmp_path / "out"))
    wanted = picture(family.pipe(folded, CPU, torch.float32), family)
    np.testing.assert_allclose(picture(pipe, family), wanted, rtol=0, atol=1e-4)
    assert np.abs(original - wanted).max() > 1e-2


@pytest.mark.parametrize("key", ["sd1", "z-image", "flux"])
def test_it_begins_as_the_model_was_and_frozen_weights_are_in_half_precision(
    key: str, request: pytest.FixtureRequest
) -> None:
    checkpoint = open_checkpoint(str(request.getfixturevalue(f"tiny_{key}")))
    denoiser, family = checkpoint.family.denoise(checkpoint), checkpoint.family
    module = denoiser.load(CPU, torch.bfloat16)
    before = {name: weight.clone() for name, weight in module.named_parameters()}
    predict = Predictor(denoiser, module, denoiser.condition(["a knife"], CPU))
    states = torch.randn(1, *denoiser.latent_shape), torch.tensor([500.0]), torch.tensor([1])
    with torch.no_grad():
        plain = predict(*states)
        add_adapters(module, family.tuned, RANK, seed=0)
        assert torch.equal(predict(*states), plain)
    trained = tuned(module)
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert sum(weight.numel() for weight in trained.values()) == trained_numbers(checkpoint, RANK)
    frozen = [weight for weight in module.parameters() if not weight.requires_grad]
    assert {weight.dtype for weight in frozen} == {torch.bfloat16}
    predict(*states).square().mean().backward()
    assert all(weight.grad is not None for weight in trained.values())
    edits = take_adapters(module)
    assert all(family.tuned(name) and isinstance(edit, LowRank) for name, edit in edits.items())
    after = dict(module.named_parameters())
    assert all(torch.equal(before[name], weight) for name, weight in after.items())
    assert after.keys() == before.keys()


def test_the_same_seed_begins_with_the_same_factors(tiny_sd1: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_sd1))

    def begun(seed: int) -> dict[str, torch.Tensor]:
        module = checkpoint.family.denoise(checkpoint).load(CPU)
        torch.manual_seed(time.time_ns() % 1000)  # what else is random does not matter
        add_adapters(module, checkpoint.family.tuned, RANK, seed)
        return {name: weight.detach() for name, weight in tuned(module).items()}

    one, same, other = begun(3), begun(3), begun(4)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_half_precision_and_gradient_checkpointing_train_it_too(
    preset: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder, plain = request.getfixturevalue("tiny_z-image"), load_preset(preset)
    run(folder, plain, tmp_path / "plain", forms=["diffusers"])
    run(folder, plain, tmp_path / "checkpointed", forms=["diffusers"], gradient_checkpointing=True)
    before, one, other = (
        weights_of(place) for place in (folder, tmp_path / "plain", tmp_path / "checkpointed")
    )
    assert all(torch.allclose(one[name], other[name], rtol=0, atol=1e-4) for name in one)
    AcceleratorState._reset_state(True)
    try:
        half = TRAINING.model_copy(update={"mixed_precision": "bf16"})
        run(folder, plain, tmp_path / "half", half, forms=["diffusers"], gradient_checkpointing=True)
    finally:
        AcceleratorState._reset_state(True)
    after = weights_of(tmp_path / "half")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed
    # As they were saved in float32, whatever frozen weights were computed in.
    assert all(torch.linalg.matrix_rank((after[n] - before[n]).double(), rtol=1e-4) <= RANK for n in changed)


def test_a_run_that_was_interrupted_ends_at_the_same_factors(
    preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    folder, plain = request.getfixturevalue("tiny_z-image"), load_preset(preset)
    run(folder, plain, tmp_path / "whole", forms=["diffusers"])
    monkeypatch.setattr(stage2, "SAVE_EVERY", -1.0)
    save = WorkingFolder.save

    def interrupted(self: WorkingFolder, step: int, *rest: Any) -> None:
        save(self, step, *rest)
        if step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(WorkingFolder, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(folder, plain, tmp_path / "parts", forms=["diffusers"])
    state = load_file(tmp_path / ".parts.steer/state.safetensors")
    names = [name for name in state if name.startswith("weights/")]
    assert names
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert (tmp_path / ".parts.steer/state.safetensors").stat().st_size < 20 * trained_numbers(
        open_checkpoint(str(folder)), RANK
    )
    monkeypatch.setattr(WorkingFolder, "save", save)
    other = TRAINING.model_copy(update={"lora_rank": 2})
    with pytest.raises(BadInput, match="lora rank differs"):
        run(folder, plain, tmp_path / "parts", other, forms=["diffusers"])
    run(folder, plain, tmp_path / "parts", forms=["diffusers"])
    one, other_weights = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(one[name], other_weights[name]) for name in one)


INTERRUPTED = """
import os, signal, sys
from trce_cli.cli.app import main
from trce_cli.erase import steer
from trce_cli.erase.working_folder import WorkingFolder

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
steer.SAVE_EVERY = -1.0
save = WorkingFolder.save

def saved(self, step, *rest):
    save(self, step, *rest)
    if step == 2:
        os.kill(os.getpid(), signal.SIGINT)

WorkingFolder.save = saved
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_stops_the_command_and_the_same_line_goes_on(
    preset: Path, tmp_path: Path, request: pytest.FixtureRequest, trce: Callable[..., Any]
) -> None:
    folder = request.getfixturevalue("tiny_z-image")

    def line(output: Path) -> list[str]:
        given = ("-p", preset, "-o", output, "--device", "cpu", "--lora-rank", RANK, "--as", "lora")
        return [str(one) for one in ("steer", folder, *given, "--max-drift", 1000)]

    place = tmp_path / "out.safetensors"
    stopped = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *line(place)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert stopped.returncode == 130, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not place.exists()
    assert (tmp_path / ".out.safetensors.steer/state.safetensors").exists()
    assert trce(*line(place)).status == 0
    assert trce(*line(tmp_path / "undisturbed.safetensors")).status == 0
    one, other = load_file(place), load_file(tmp_path / "undisturbed.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_both_stages_are_one_lora_for_the_original(
    preset: Path, tmp_path: Path, request: pytest.FixtureRequest, trce: Callable[..., Any]
) -> None:
    folder = request.getfixturevalue("tiny_z-image")
    assert trce("map", folder, "-p", preset, "-o", tmp_path / "mapped").status == 0
    line = ["steer", tmp_path / "mapped", "-p", preset, "-o", tmp_path / "out", "--device", "cpu"]
    line += ["--lora-rank", RANK, "--lr", 1e-2, "--max-drift", 1000, "--as", "diffusers", "--as", "lora"]
    done = trce(*line, "--energy", 1, "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)["settings"]["lora_rank"] == RANK
    tensors = load_file(tmp_path / "out.lora.safetensors")
    ranks = {name: len(tensor) for name, tensor in tensors.items() if "down" in name or "lora_A" in name}
    assert {rank for name, rank in ranks.items() if "attention" in name} == {RANK}
    assert any("cap_embedder" in name for name in ranks)
    done = trce("apply", tmp_path / "out.lora.safetensors", folder, "-o", tmp_path / "applied")
    assert done.status == 0, done.err
    one, other = weights_of(tmp_path / "applied"), weights_of(tmp_path / "out")
    assert all(torch.allclose(one[name], other[name], rtol=0, atol=1e-5) for name in one)
    recipe = trce("inspect", tmp_path / "out", "--recipe")
    assert "lora_rank = 3" in recipe.out


def test_the_plan_counts_factors_and_frozen_weights(
    preset: Path, tmp_path: Path, request: pytest.FixtureRequest, trce: Callable[..., Any]
) -> None:
    folder = request.getfixturevalue("tiny_z-image")
    line = ["steer", folder, "-p", preset, "-o", tmp_path / "out", "--device", "cpu", "--dry-run", "--json"]

    def plan(*more: Any) -> Any:
        done = trce(*line, *more)
        assert done.status == 0, done.err
        return json.loads(done.out)

    checkpoint = open_checkpoint(str(folder))
    every = sum(math.prod(checkpoint.shape("denoiser", key)) for key in checkpoint.keys("denoiser"))
    whole, lora = plan(), plan("--lora-rank", RANK, "--mixed-precision", "bf16")
    assert whole["tuned_weights"] + whole["frozen_weights"] == every
    assert (lora["tuned_weights"], lora["frozen_weights"]) == (trained_numbers(checkpoint, RANK), every)
    assert lora["state_bytes"] == 12 * lora["tuned_weights"]
    assert lora["memory_bytes"] < whole["memory_bytes"]
    assert list(tmp_path.iterdir()) == []


def test_a_size_that_is_asked_for_cuts_the_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(9, 4, generator=generator, dtype=torch.float64) * torch.tensor([8.0, 4, 2, 1])
    down = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    left, right = cut(up, down, Size(2))
    assert (left.shape, right.shape) == ((9, 2), (2, 7))
    U, S, Vt = torch.linalg.svd(up @ down)
    torch.testing.assert_close(left @ right, (U[:, :2] * S[:2]) @ Vt[:2])
    left, right = cut(up, down, Size(energy=1.0))
    torch.testing.assert_close(left @ right, up @ down)


def test_the_learning_rate_of_a_lora_is_its_own() -> None:
    advice = {"lr": 1e-6, "max_steps": 5}
    assert choose_steer_settings({"lora_rank": 8}, advice)[1].lr == 1e-4
    assert choose_steer_settings({"lora_rank": 8, "lr": 3e-3}, advice)[1].lr == 3e-3
    assert choose_steer_settings({}, advice)[1].lr == 1e-6
    with pytest.raises(BadInput, match="--lora-rank"):
        choose_steer_settings({"lora_rank": 0}, advice)
