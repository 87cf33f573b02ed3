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
from PIL import Image
from safetensors.torch import load_file, save_file

from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.evaluate.survivals import fine_tuning
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
    assert [state["state"] for state in results["survivals"]] == ["fp8", "int8", "nf4"]
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
    assert drawn == {f"draw after {state}": 2 for state in ("fp8", "int8", "nf4")} | {
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
