"""What a checkpoint predicts and how it is sampled is read from files, told, and carried by conversions."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tiny
from trce_cli.checkpoint.convert import write_folder, write_single_file
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.errors import BadInput
from trce_cli.families.sd import configs, sampling, schedule

CPU = torch.device("cpu")
EMPTY = torch.zeros(0)
V_ZERO = {"v_pred": EMPTY, "ztsnr": EMPTY}
BIAS = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"


@pytest.fixture(scope="module")
def xl_file(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.single_file("sdxl", tiny_sdxl, tmp_path_factory.mktemp("xl") / "xl.safetensors")


@pytest.fixture
def folder(tiny_sd1: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sd1, tmp_path / "in"))


def marked(path: Path, target: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> Path:
    with safe_open(path, "pt") as file:
        save_file({**load_file(path), **tensors}, target, {**file.metadata(), **metadata})
    return target


def say(folder: Path, file: str, **said: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | said))


def scheduler(folder: Path, **said: Any) -> None:
    say(folder, "scheduler/scheduler_config.json", **said)
    say(folder, "model_index.json", scheduler=["diffusers", said["_class_name"]])


def test_empty_tensors_say_v_prediction_and_zero_terminal_snr(
    trce: Callable, xl_file: Path, tiny_sdxl: Path, tmp_path: Path
) -> None:
    file = marked(xl_file, tmp_path / "noob.safetensors", V_ZERO, {})
    told = json.loads(trce("inspect", file, "--config", tiny_sdxl, "--json").out)["sampling"]
    assert told["predicts"] == "v_prediction"
    assert told["zero terminal SNR"] == "yes"
    assert told["timesteps"] == "trailing"
    opened = open_checkpoint(str(file), config=tiny_sdxl)
    schedule = opened.family.denoise(opened).schedule(5)
    noise, clean = torch.randn(2, 1, 4, 8, 8)
    last = torch.tensor([999])
    torch.testing.assert_close(schedule.noised(clean, noise, last), noise)  # ends in noise alone
    torch.testing.assert_close(schedule.wanted(clean, noise, last), -clean)  # which v says
    assert int(schedule.timesteps[0]) == 999
    pipe = opened.pipe(CPU, torch.float32)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.scheduler.config.rescale_betas_zero_snr
    euler = opened.family.scheduler(pipe, "euler")
    assert (euler.config.prediction_type, euler.config.rescale_betas_zero_snr) == ("v_prediction", True)
    with pytest.raises(BadInput, match="no zero terminal SNR"):
        opened.family.scheduler(pipe, "pndm")


@pytest.mark.parametrize("base", tiny.FAMILIES)
def test_sampling_survives_both_conversions(base: tiny.FamilyKey, request: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(request.getfixturevalue(f"tiny_{base}"), tmp_path / "in"))
    scheduler(
        folder,
        _class_name="EulerDiscreteScheduler",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    source = open_checkpoint(str(folder))
    file = write_single_file(source, tmp_path / "out.safetensors", {}, {})
    assert {"ztsnr", *(["v_pred"] if base != "sd2" else [])} <= load_file(file).keys()
    plain = request.getfixturevalue(f"tiny_{base}")  # says something else
    opened = open_checkpoint(str(file), config=plain)
    assert opened.family.sampling(opened.config) == source.family.sampling(source.config)
    again = open_checkpoint(str(write_folder(opened, tmp_path / "out", {}, {})))
    assert again.family.sampling(again.config) == source.family.sampling(source.config)
    assert again.pipe(CPU, torch.float32).scheduler.config.rescale_betas_zero_snr


def test_a_copy_of_a_marked_file_keeps_its_marks(
    trce: Callable, xl_file: Path, tiny_sdxl: Path, tmp_path: Path
) -> None:
    file = marked(xl_file, tmp_path / "noob.safetensors", V_ZERO, {})
    done = trce("map", file, "--config", tiny_sdxl, "-p", "weapons", "-o", tmp_path / "out.safetensors")
    assert done.status == 0, done.err
    assert V_ZERO.keys() <= load_file(tmp_path / "out.safetensors").keys()
    done = trce(
        "map", file, "--config", tiny_sdxl, "-p", "weapons", "-o", tmp_path / "d", "--as", "diffusers"
    )
    assert done.status == 0, done.err
    written = json.loads((tmp_path / "d/scheduler/scheduler_config.json").read_text())
    assert (written["prediction_type"], written["rescale_betas_zero_snr"]) == ("v_prediction", True)


def test_metadata_of_trainers_is_read(xl_file: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    for number, said in enumerate(({"modelspec.prediction_type": "v"}, {"ss_v_parameterization": "True"})):
        file = marked(xl_file, tmp_path / f"{number}.safetensors", {}, said)
        opened = open_checkpoint(str(file), config=tiny_sdxl)
        assert opened.config["scheduler"]["prediction_type"] == "v_prediction"
        assert "file is believed" in opened.remarks[0]


def test_an_sd2_file_tells_by_its_weights(tmp_path: Path) -> None:
    """Without a configuration of its own; the sizes of the base's, of which nothing but headers is there."""
    base = configs.tables("sd2")
    for spread, predicts, size in ((0.2, "v_prediction", 96), (0.01, "epsilon", 64)):
        bias = torch.randn(320, generator=torch.Generator().manual_seed(0)) * spread
        told = sampling.told_by_file({BIAS: (320,)}, {}, {BIAS: bias}.__getitem__, base, True, BIAS)
        config = {**base, **told.config}
        assert config["scheduler"]["prediction_type"] == predicts
        assert config["denoiser"]["sample_size"] == size
        assert predicts in told.notes[0]
        assert "upcast_attention" in told.notes[0]
        assert "--config" in told.notes[0]
        # With a configuration that the user chose nothing is guessed.
        assert (
            sampling.told_by_file({BIAS: (320,)}, {}, {BIAS: bias}.__getitem__, base, False, BIAS).notes == ()
        )


@pytest.mark.parametrize(
    ("step", "predicts"),
    [(875_000, "epsilon"), (110_000, "v_prediction"), *((n, "epsilon") for n in (5, math.nan, math.inf))],
)
def test_an_sd2_file_tells_by_its_step_where_other_readers_know_it(step: float, predicts: str) -> None:
    base, spread = configs.tables("sd2"), 0.2 if step == 875_000 else 0.01
    tensors = {BIAS: torch.linspace(-2, 2, 320) * spread, "global_step": torch.tensor(step)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    told = sampling.told_by_file(shapes, {}, tensors.__getitem__, base, True, BIAS)
    assert {**base, **told.config}["scheduler"]["prediction_type"] == predicts
    assert ("global_step" in told.notes[0]) == (step in (875_000, 110_000))


def test_edm_models_are_mapped_and_drawn_and_not_steered(
    trce: Callable, xl_file: Path, tiny_sdxl: Path, tmp_path: Path
) -> None:
    latents = {
        "edm_mean": torch.tensor([-1.6, 1.1, 3.2, -0.8]),
        "edm_std": torch.tensor([8.4, 6.0, 6.4, 5.2]),
    }
    file = marked(xl_file, tmp_path / "playground.safetensors", latents, {})
    opened = open_checkpoint(str(file), config=tiny_sdxl)
    folder = write_folder(opened, tmp_path / "folder", {}, {})
    again = open_checkpoint(str(folder))
    pipe = again.pipe(CPU, torch.float32)
    assert type(pipe.scheduler).__name__ == "EDMDPMSolverMultistepScheduler"
    torch.testing.assert_close(torch.tensor(pipe.vae.config.latents_std), latents["edm_std"])
    back = load_file(write_single_file(again, tmp_path / "back.safetensors", {}, {}))
    assert torch.equal(back["edm_mean"], latents["edm_mean"])
    drawn = trce("generate", folder, "a dog", "--steps", 2, "-o", tmp_path / "images")
    assert drawn.status == 0, drawn.err
    refused = trce("generate", folder, "a dog", "--steps", 2, "--scheduler", "ddim", "-o", tmp_path / "ddim")
    assert (refused.status, "no betas" in refused.err) == (2, True)
    mapped = trce("map", folder, "-p", "weapons", "-o", tmp_path / "mapped")
    assert mapped.status == 0, mapped.err
    steered = trce("steer", tmp_path / "mapped", "-p", "weapons", "-o", tmp_path / "steered")
    assert steered.status == 2
    assert "trce map` alone works" in steered.err
    assert not (tmp_path / "steered").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("IPNDMScheduler", "its noise is that of IPNDMScheduler"),
        ("CMStochasticIterativeScheduler", "its noise is that of CMStochasticIterativeScheduler"),
        ("OfMyOwn", "diffusers has no scheduler OfMyOwn"),
    ],
)
def test_a_scheduler_without_betas_is_kept_and_no_ddim(
    name: str, said: str, folder: Path, tiny_sd1: Path, tmp_path: Path
) -> None:
    scheduler(folder, _class_name=name)
    file = write_single_file(open_checkpoint(str(folder)), tmp_path / "x.safetensors", {}, {})
    opened = open_checkpoint(str(file), config=tiny_sd1)
    assert opened.family.sampling(opened.config)["scheduler"] == name
    with pytest.raises(BadInput, match=said):
        opened.family.denoise(opened).schedule(5)


@pytest.mark.parametrize("name", ["IPNDMScheduler", "CMStochasticIterativeScheduler"])
def test_no_betas_are_invented_to_draw_with_another_scheduler(name: str, folder: Path) -> None:
    scheduler(folder, _class_name=name)
    opened = open_checkpoint(str(folder))
    pipe = opened.pipe(CPU, torch.float32)
    assert type(opened.family.scheduler(pipe, name)).__name__ == name
    with pytest.raises(BadInput, match=f"no betas for DDIMScheduler: its noise is that of {name}"):
        opened.family.scheduler(pipe, "ddim")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("FlowMatchEulerDiscreteScheduler", "is none of diffusers' StableDiffusionPipeline"),
        ("ScoreSdeVeScheduler", "is none of diffusers' StableDiffusionPipeline"),
        ("UNet2DConditionModel", "diffusers has no scheduler"),
    ],
)
def test_a_scheduler_that_nothing_is_drawn_with_is_told(name: str, said: str, folder: Path) -> None:
    scheduler(folder, _class_name=name)
    with pytest.raises(BadInput, match=said):
        open_checkpoint(str(folder)).pipe(CPU, torch.float32)


def test_a_library_that_a_scheduler_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class StandIn:  # as diffusers puts it in the place of a class whose library is not installed
        _backends = ("torch", "torchsde")

    monkeypatch.setattr("diffusers.DPMSolverSDEScheduler", StandIn)
    with pytest.raises(BadInput, match="DPMSolverSDEScheduler needs torch and torchsde"):
        schedule.own_scheduler({"model_index": {}, "scheduler": {"_class_name": "DPMSolverSDEScheduler"}})


def test_marks_that_nobody_reads_are_told(tiny_sd1: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    for number, (base, is_told) in enumerate(((tiny_sd1, True), (tiny_sdxl, False))):
        folder = Path(shutil.copytree(base, tmp_path / str(number)))
        said = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
        scheduler(folder, _class_name="DDIMScheduler", **said)
        opened = open_checkpoint(str(folder))
        (told,) = (line for line in opened.family.lost_in_file(opened.config) if "is sampled" in line)
        assert ("predicts v_prediction, zero terminal SNR yes" in told) == is_told


FEW_STEPS: dict[str, Callable[[Path], None]] = {
    "LCM": lambda folder: scheduler(folder, _class_name="LCMScheduler"),
    "Turbo": lambda folder: scheduler(
        folder, _class_name="EulerAncestralDiscreteScheduler", timestep_spacing="trailing"
    ),
    "Lightning": lambda folder: scheduler(
        folder, _class_name="EulerDiscreteScheduler", timestep_spacing="trailing"
    ),
}


@pytest.mark.parametrize("kind", FEW_STEPS)
def test_few_step_models_are_not_steered(trce: Callable, kind: str, tiny_sdxl: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sdxl, tmp_path / "few"))
    FEW_STEPS[kind](folder)
    done = trce("steer", folder, "-p", "weapons", "-o", tmp_path / "steered")
    assert done.status == 2
    assert "trce map` alone works" in done.err
    assert kind in done.err
    done = trce("map", folder, "-p", "weapons", "-o", tmp_path / "x.safetensors")
    assert done.status == 0, done.err
    assert "other tools have to be told" in done.err
