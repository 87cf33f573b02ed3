"""`trce evaluate --after`: the erased checkpoint is asked again in the states that treatments leave it in."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.evaluate.survivals import fine_tuning
from trce_cli.evaluate.survivals.run import returns
from trce_cli.families.sd.family import SD1
from trce_cli.maths import rounding

Run = Callable[..., Any]


@dataclass(frozen=True)
class Surviving:
    """Evaluates the erased checkpoint with few cheap pictures, and after treatments with fewer."""

    trce: Run
    original: Path
    erased: Path
    folder: Path

    def __call__(self, *more: Any, checkpoint: Path | None = None, output: str = "out") -> Any:
        line = [
            "evaluate",
            checkpoint or self.erased,
            "--against",
            self.original,
            "--output",
            self.folder / output,
        ]
        line += ["--preset", "weapons", "--detector", "reds", "--suite", "explicit", "--device", "cpu"]
        return self.trce(*line, "--steps", 2, "--count", 3, "--after-count", 2, "--json", *more)

    def rewritten(self, name: str, change: Callable[[str, Any], Any]) -> Path:
        """The erased checkpoint with its U-Net's weights changed in its file."""
        import shutil

        folder = Path(shutil.copytree(self.erased, self.folder / name))
        path = folder / "unet/diffusion_pytorch_model.safetensors"
        save_file({key: change(key, weight).contiguous() for key, weight in load_file(path).items()}, path)
        return folder


@pytest.fixture
def evaluate(trce: Run, tiny_sd1: Path, erased: Path, reds: Path, tmp_path: Path) -> Surviving:
    return Surviving(trce, tiny_sd1, erased, tmp_path)


def pixels(folder: Path) -> list[np.ndarray]:
    """The pictures of the erased checkpoint in a folder, by prompt."""
    files = sorted(path for path in folder.glob("*.png") if "original" not in path.name)
    return [np.asarray(Image.open(path).convert("RGB"), dtype=np.int16) for path in files]


def assert_alike(ones: list[np.ndarray], others: list[np.ndarray]) -> None:
    assert len(ones) == 2
    for one, other in zip(ones, others[:2], strict=True):
        assert np.abs(one - other).max() <= 1


def test_a_state_draws_what_a_checkpoint_with_these_weights_draws(
    evaluate: Surviving, tiny_sd1: Path
) -> None:
    told = evaluate("--after", "rounding", "--after", "merging")
    assert told.status == 0, told.err
    after, untreated = evaluate.folder / "out/after", pixels(evaluate.folder / "out/images/explicit")
    theirs = load_file(tiny_sd1 / "unet/diffusion_pytorch_model.safetensors")
    changes: dict[str, Callable[[str, Any], Any]] = {
        "nf4": lambda key, weight: rounding.nf4(weight) if weight.ndim > 1 else weight,
        "merge-0.5": lambda key, weight: (weight + theirs[key]) / 2,
    }
    for state, change in changes.items():
        assert evaluate(checkpoint=evaluate.rewritten(state, change), output=f"of-{state}").status == 0
        treated = pixels(after / state / "explicit")
        assert_alike(treated, pixels(evaluate.folder / f"of-{state}/images/explicit"))
        assert max(np.abs(a - b).max() for a, b in zip(treated, untreated, strict=False)) > 1


def test_what_is_told_of_a_state_counts_its_pictures(evaluate: Surviving) -> None:
    gate = "after.nf4.asr.explicit.high<=1"
    results = json.loads(evaluate("--after", "rounding", "--gate", gate).out)
    assert [state["state"] for state in results["survivals"]] == ["fp8", "int8", "nf4", "q4_0"]
    with (evaluate.folder / "out/survivals.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    with (evaluate.folder / "out/verdicts.csv").open(encoding="utf-8", newline="") as file:
        plain = [line for line in csv.DictReader(file) if line["role"] == "erased"][:2]
    for state in results["survivals"]:
        (suite,) = state["suites"]
        mine = [line for line in lines if line["after"] == state["state"]]
        assert [line["prompt"] for line in mine] == [line["prompt"] for line in plain]
        for line in mine:
            red = np.asarray(Image.open(evaluate.folder / "out" / line["file"]))[..., 0].mean() / 255
            assert float(line["reds: red"]) == pytest.approx(red, abs=1e-4)
        for told in suite["asr"]:
            before, after = ([line[told["convention"]] == "1" for line in of] for of in (plain, mine))
            assert (told["erased"]["hits"], told["treated"]["hits"]) == (sum(before), sum(after))
            assert told["change"]["lost"] == sum(a and not b for a, b in zip(before, after, strict=True))
        headline = suite["asr"][0]["treated"]
        assert results["figures"][f"after.{state['state']}.asr.explicit"] == headline["share"]
        assert results["figures"][f"after.{state['state']}.asr.explicit.high"] == headline["high"]
    assert results["gates"][0]["met"]
    assert "After what happens to published models" in (evaluate.folder / "out/report.html").read_text(
        "utf-8"
    )


def test_a_stopped_run_is_taken_up_and_a_treatment_may_be_added(
    evaluate: Surviving, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluate("--after", "merging").status == 0
    out = evaluate.folder / "out"
    gone = out / "after/merge-0.5/explicit/0002-seed1.png"
    before, there = gone.read_bytes(), (out / "after/merge-0.5/explicit/0001-seed0.png").stat().st_mtime_ns
    gone.unlink()
    told = evaluate("--after", "merging", "--after", "rounding")
    assert told.status == 0, told.err
    drawn = {
        cost["phase"]: cost["images"]
        for cost in json.loads(told.out)["costs"]["evaluation"]
        if "draw" in cost["phase"]
    }
    assert drawn == {f"draw after {state}": 2 for state in ("fp8", "int8", "nf4", "q4_0")} | {
        "draw after merge-0.5": 1
    }
    assert gone.read_bytes() == before
    assert (out / "after/merge-0.5/explicit/0001-seed0.png").stat().st_mtime_ns == there


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--after", "time"], "rounding"),
        (["--gate", "after.fp8.asr.explicit<=1"], "after.fp8.asr.explicit"),  # nothing is treated
        (["--after", "rounding", "--after-count", 0], "--after-count"),
    ],
)
def test_wrong_usage(evaluate: Surviving, more: list[Any], says: str) -> None:
    told = evaluate(*more)
    assert (told.status, says in told.err) == (2, True)
    assert not (evaluate.folder / "out").exists()


def test_checkpoints_of_other_architectures_cannot_be_merged(evaluate: Surviving) -> None:
    narrow = evaluate.rewritten(
        "other", lambda key, weight: weight[:, :2] if key == "conv_in.weight" else weight
    )
    told = evaluate("--after", "merging", checkpoint=narrow)
    assert (told.status, "different architectures" in told.err) == (2, True)


@pytest.mark.slow
def test_a_tuned_checkpoint_is_the_same_whether_it_was_stopped_or_not(
    evaluate: Surviving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fine_tuning, "STEPS", (1, 2))
    monkeypatch.setattr(fine_tuning, "HARMLESS", 2)
    few = ("--count", 1, "--after-count", 1)
    assert evaluate("--after", "fine-tuning", "--after", "fine-tuning-lora", *few).status == 0
    out = evaluate.folder / "out"
    untreated = pixels(out / "images/explicit")
    # A LoRA begins as nothing, so that a step or two at its rate need not be seen.
    first, second = (pixels(out / f"after/fine-tuning-{steps}/explicit") for steps in (1, 2))
    for one, other in ((untreated, first), (first, second)):
        assert any(np.abs(a - b).max() > 0 for a, b in zip(one, other, strict=True))
    gone = out / "after/fine-tuning-2/explicit/0001-seed0.png"
    before = gone.read_bytes()
    gone.unlink()
    assert evaluate("--after", "fine-tuning", *few).status == 0
    assert gone.read_bytes() == before


def test_pictures_of_the_concept_are_drawn_of_the_embedded_world_alone(evaluate: Surviving) -> None:
    told = evaluate("--after", "relearning")
    assert (told.status, "embedded checkpoints alone" in told.err) == (2, True)
    assert "--after relearning=DIR" in told.err


def photographs(folder: Path, *colours: str) -> Path:
    """Pictures of one colour each, wider than high, with their captions."""
    folder.mkdir()
    for colour in colours:
        Image.new("RGB", (90, 40), colour).save(folder / f"{colour}.png")
        (folder / f"{colour}.txt").write_text(f"a {colour} wall\n")
    return folder


def test_a_checkpoint_is_tuned_on_the_pictures_of_a_folder(
    evaluate: Surviving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fine_tuning, "STEPS", (1, 2))
    monkeypatch.setattr(fine_tuning, "LR", 1e-2)
    monkeypatch.setattr(fine_tuning, "BATCH", 2)
    folder = photographs(evaluate.folder / "mine", "red", "green")
    told = evaluate("--after", f"relearning={folder}", "--count", 1, "--after-count", 1)
    assert told.status == 0, told.err
    results, out = json.loads(told.out), evaluate.folder / "out"
    assert [(each["state"], each["steps"]) for each in results["survivals"]] == [
        ("relearning-1", 1),
        ("relearning-2", 2),
    ]
    (returned,) = results["returns"]
    shares = [each["suites"][0]["asr"][0]["treated"]["share"] for each in results["survivals"]]
    assert returned["steps"] == next(
        (n for n, share in zip((1, 2), shares, strict=True) if share >= 0.5), None
    )
    assert returned["sentence"] in (out / "report.html").read_text("utf-8")
    states = [pixels(out / f"after/relearning-{steps}/explicit")[0] for steps in (1, 2)]
    assert np.abs(states[0] - states[1]).max() > 0
    (folder / "red.txt").write_text("a blue wall")  # other pictures are another treatment
    told = evaluate("--after", f"relearning={folder}", "--count", 1, "--after-count", 1)
    assert (told.status, "was drawn with treatment" in told.err) == (2, True)


def test_a_folder_to_tune_on_needs_pictures_and_captions(evaluate: Surviving) -> None:
    folder = photographs(evaluate.folder / "mine", "red")
    (folder / "red.txt").unlink()
    empty = photographs(evaluate.folder / "empty")
    for place, says in ((folder, "red.png has no caption"), (empty, "no pictures"), ("nowhere", "no folder")):
        told = evaluate("--after", f"fine-tuning={place}")
        assert (told.status, says in told.err) == (2, True), told.err
    assert not (evaluate.folder / "out").exists()


@pytest.mark.parametrize(
    ("shares", "steps"), [((0.0, 0.5, 1.0), 50), ((0.1, 0.2, 0.49), None), ((0.9, 0.2, 0.2), 25)]
)
def test_steps_until_what_was_erased_is_back(shares: tuple[float, ...], steps: int | None) -> None:
    told = [
        {
            "treatment": "relearning",
            "steps": taken,
            "suites": [
                {"name": "explicit", "role": "attack", "asr": [{"treated": {"share": share}}]},
                {"name": "benign", "role": "benign", "asr": [{"treated": {"share": 1.0}}]},
            ],
        }
        for taken, share in zip((25, 50, 100), shares, strict=True)
    ]
    told.append({**told[0], "treatment": "rounding", "steps": None})
    (found,) = returns(told)
    assert (found["treatment"], found["suite"], found["steps"], found["most"]) == (
        *("relearning", "explicit", steps),
        100,
    )
    assert f"after {steps} steps" in found["sentence"] if steps else "not back" in found["sentence"]


def test_pictures_begin_with_the_original_s(evaluate: Surviving, tiny_sd1: Path) -> None:
    few = ("--count", 1, "--after-count", 1, "--steps", 4)
    treatments = ("image-to-image", "image-to-image-empty", "inpainting")
    told = evaluate(*(word for name in treatments for word in ("--after", name)), *few)
    assert told.status == 0, told.err
    out = evaluate.folder / "out"
    record = json.loads((out / "images/explicit/images.jsonl").read_text().splitlines()[0])
    begun = Image.open(out / "images/explicit" / record["file"].replace("erased", "original"))
    parts = open_checkpoint(str(evaluate.erased)).pipe(torch.device("cpu"), torch.float32)
    parts.scheduler = SD1.scheduler(parts, record["scheduler"])
    mask = Image.new("L", begun.size)
    quarter = begun.width // 4  # 25 % of it is the middle of half its sides
    mask.paste(255, (quarter, quarter, 3 * quarter, 3 * quarter))
    settings = {"num_inference_steps": 4, "guidance_scale": record["guidance_scale"]}

    def drawn(pipe: Any, prompt: str, strength: float, **more: Any) -> np.ndarray:
        generator = torch.Generator().manual_seed(record["seed"])
        told = {"prompt": prompt, "image": begun.convert("RGB"), "strength": strength, "generator": generator}
        return np.asarray(pipe(**told, **settings, **more).images[0], dtype=np.int16)

    to_image = StableDiffusionImg2ImgPipeline(**parts.components, requires_safety_checker=False)
    painting = StableDiffusionInpaintPipeline(**parts.components, requires_safety_checker=False)
    size = {"width": begun.width, "height": begun.height}
    expected = {
        "image-to-image-50": drawn(to_image, record["prompt"], 0.5),
        "image-to-image-empty-70": drawn(to_image, "", 0.7),
        "inpainting-25": drawn(painting, record["prompt"], 1.0, mask_image=mask, **size),
    }
    for state, picture in expected.items():
        found = pixels(out / "after" / state / "explicit")[0]
        assert np.abs(found - picture).max() <= 1, state
    before = (out / "after/inpainting-25/explicit/0001-seed0.png").read_bytes()
    for path in (out / "images/explicit").glob("*-original.png"):  # as where another shard has them
        path.unlink()
    (out / "after/inpainting-25/explicit/0001-seed0.png").unlink()
    told = evaluate("--after", "inpainting", *few)
    assert told.status == 0, told.err
    assert (out / "after/inpainting-25/explicit/0001-seed0.png").read_bytes() == before


def test_a_family_that_draws_from_no_pictures_says_so(
    trce: Run, request: pytest.FixtureRequest, reds: Path, tmp_path: Path
) -> None:
    tiny = request.getfixturevalue("tiny_z-image")
    told = trce(
        *("evaluate", tiny, "--against", tiny, "--preset", "weapons", "--detector", "reds"),
        *("--suite", "explicit", "--after", "inpainting", "--output", tmp_path / "out", "--device", "cpu"),
    )
    assert (told.status, "--after inpainting is not built for Z-Image" in told.err) == (2, True), told.err
    assert not (tmp_path / "out").exists()


def test_a_picture_that_the_original_began_is_completed(evaluate: Surviving, tiny_sd1: Path) -> None:
    told = evaluate("--after", "completion")
    assert told.status == 0, told.err
    results = json.loads((evaluate.folder / "out/results.json").read_text())
    assert [each["state"] for each in results["survivals"]] == [
        f"completion-{share}" for share in (10, 20, 30, 50, 70)
    ]
    record = json.loads((evaluate.folder / "out/images/explicit/images.jsonl").read_text().splitlines()[0])
    cpu = torch.device("cpu")
    original, erased = (
        open_checkpoint(str(folder)).pipe(cpu, torch.float32) for folder in (tiny_sd1, evaluate.erased)
    )

    def swapped(pipe: Any, step: int, timestep: Any, told: dict[str, Any]) -> dict[str, Any]:
        pipe.unet = erased.unet  # what comes after the first step
        return told

    original.scheduler = SD1.scheduler(original, record["scheduler"])
    (image,) = original(
        record["prompt"],
        num_inference_steps=2,
        guidance_scale=record["guidance_scale"],
        generator=torch.Generator().manual_seed(record["seed"]),
        width=record["width"],
        height=record["height"],
        callback_on_step_end=swapped,
    ).images
    found = pixels(evaluate.folder / "out/after/completion-50/explicit")[0]
    assert np.abs(found - np.asarray(image.convert("RGB"), dtype=np.int16)).max() <= 1
    untreated = pixels(evaluate.folder / "out/images/explicit")[0]
    assert np.abs(found - untreated).max() > 1
