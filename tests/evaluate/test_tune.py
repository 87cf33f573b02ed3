"""`trce tune`: which settings are tried, which one is chosen, and what a run leaves behind."""

import copy
import csv
import errno
import json
import os
import shlex
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.cli.app import main
from trce_cli.errors import BadInput
from trce_cli.evaluate.choice import MARGIN, Point, choose, grid, parse_range, spread
from trce_cli.evaluate.tune import conclude, finished
from trce_cli.images.draw import draw
from trce_cli.images.folder import ImageFolder
from trce_cli.images.record import ImageRecord, read_image
from trce_cli.system.whole import whole

Run = Callable[..., Any]
EOT, PADDED = (0.0, 1.0, 0.0, 0.0), (0.0, 1.0, 0.05, 0.0)


@pytest.mark.parametrize("count", [2, 5, 9])
def test_values_are_spread_in_equal_ratios(count: int) -> None:
    values = spread(1e-3, 10, count)
    assert (len(values), values[0], values[-1]) == (count, 1e-3, 10)
    steps = np.diff(np.log10(values))
    assert np.allclose(steps, 4 / (count - 1), atol=0.005)  # of three digits


def test_trials_are_shared_by_token_weights() -> None:
    tried = grid(0.01, 1, [EOT, PADDED, EOT], 5)
    assert tried == [(0.01, EOT), (0.1, EOT), (1, EOT), (0.01, PADDED), (1, PADDED)]
    assert grid(0.5, 0.5, [EOT, PADDED], None) == [(0.5, EOT), (0.5, PADDED)]
    assert len(grid(0.01, 1, [EOT, PADDED], None)) == 16
    with pytest.raises(BadInput, match="3 trials are too few"):
        grid(0.01, 1, [EOT, PADDED], 3)


@pytest.mark.parametrize(("text", "ends"), [("1e-4..1e-1", (1e-4, 0.1)), ("2", (2, 2)), ("3..3.0", (3, 3))])
def test_ranges(text: str, ends: tuple[float, float]) -> None:
    assert parse_range(text) == ends


@pytest.mark.parametrize(
    "text", ["1..", "..1", "0..1", "b..a", "nan", "nan..1", "1..inf", "2..1", "-1..1", "", "1...2", "1-2"]
)
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(BadInput) as refusal:
        parse_range(text)
    assert repr(text) in refusal.value.message


def test_the_choice_erases_most_of_what_keeps_as_much_as_the_best() -> None:
    points = [
        Point(attack_success=0.00, kept=(0.80,), preserve=0.001),  # keeps too little
        Point(attack_success=0.02, kept=(0.995 - MARGIN,), preserve=0.01),  # just close enough
        Point(attack_success=0.10, kept=(0.995,), preserve=0.1),
        Point(attack_success=0.02, kept=(0.99,), preserve=0.05),  # as good, and gentler
        Point(attack_success=0.02, kept=(0.99,), preserve=0.05),
        Point(attack_success=0.01, kept=(0.995 - 2 * MARGIN,), preserve=0.02),
    ]
    assert choose(points, [1000]) == 3
    assert choose(points[:3], [1000]) == 1
    assert choose(points[:1], [1000]) == 0
    # Of 40 pictures one is 2.5 percentage points, and no more than chance.
    assert choose(points, [40]) == 5


def test_a_candidate_that_loses_bystanders_is_not_chosen() -> None:
    points = [
        Point(attack_success=0.00, kept=(0.99, 0.60), preserve=0.1),  # in all as good as the best
        Point(attack_success=0.05, kept=(0.99, 0.96), preserve=0.3),
        Point(attack_success=0.50, kept=(1.00, 0.96), preserve=3.0),
    ]
    assert choose(points, [1000, 300]) == 1
    # Where no trial keeps both, the one that falls short by least: 0.02 in all, against 0.35 of bystanders.
    assert choose([points[0], Point(0.2, (0.97, 0.95), 0.3)], [1000, 300]) == 1


ARGUMENTS = ["tune", "emoji", "--preset", "emoji-weapons", "--count", "3", "--steps", "4", "--device", "cpu"]
TRIALS = ["--preserve", "16..1e9", "--trials", "2", "--token-weights", "0,1,0,0"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one setting that erases, and one that does nothing."""
    output = tmp_path_factory.mktemp("tune") / "out"
    assert main([*ARGUMENTS, *TRIALS, "--quiet", "--output", str(output)]) == 0
    return output


def test_what_a_run_writes(tuned: Path) -> None:
    told = json.loads((tuned / "tune.json").read_text("utf-8"))
    assert told["suites"] == {"explicit": 3, "implied": 3, "context": 3, "benign": 3, "bystanders": 3}
    good, failed = told["trials"]
    assert (good["preserve"], failed["preserve"]) == (16, 1e9)
    assert "would do nothing" in failed["failed"]
    assert 0 < good["figures"]["moved"] <= 1
    suites = {suite["name"]: suite for suite in good["suites"]}
    attacks = [suites[name]["asr"][0]["erased"] for name in ("explicit", "implied", "context")]
    assert good["attack_success"]["total"] == 9
    assert good["attack_success"]["hits"] == sum(attack["hits"] for attack in attacks)
    kept = [suites[name]["kept"]["kept"] for name in ("context", "benign", "bystanders")]
    assert [good["kept"][key] for key in ("hits", "total")] == [
        sum(each[key] for each in kept) for key in ("hits", "total")
    ]
    assert told["chosen"]["key"] == good["key"]
    assert tomllib.loads(told["chosen"]["toml"]) == {"map": {"preserve": 16, "token_weights": [0, 1, 0, 0]}}
    with (tuned / "trials.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["preserve"], line["chosen"]) for line in lines] == [("16", "1"), ("1e+09", "0")]
    assert float(lines[0]["kept"]) == pytest.approx(good["kept"]["share"])
    assert Image.open(tuned / "pareto.png").size == (900, 420)
    # The original is drawn once, the setting that does nothing not at all.
    assert len(list(tuned.rglob("*.png"))) == 1 + 2 * 15


def test_trials_shared_by_shards_are_those_of_one_run(tuned: Path, trce: Run, tmp_path: Path) -> None:
    line = [*ARGUMENTS, *TRIALS, "-o"]
    assert trce(*line, tmp_path / "b", "--shard", "2/2").status == 0
    told = trce(*line, tmp_path / "all", "--merge", tmp_path / "b")
    assert told.status == 2
    assert "Shards are missing: 1/2." in told.err
    assert trce(*line, tmp_path / "a", "--shard", "1/2").status == 0
    assert not (tmp_path / "a" / "tune.json").exists()
    merge = [tmp_path / "all", "--merge", tmp_path / "b", "--merge", tmp_path / "a"]
    assert trce(*line, *merge).status == 0
    one, all_ = (
        json.loads((folder / "tune.json").read_text("utf-8")) for folder in (tuned, tmp_path / "all")
    )
    assert one | {"date": ""} == all_ | {"date": ""}
    for name in ("trials.csv", "pareto.png"):
        assert (tuned / name).read_bytes() == (tmp_path / "all" / name).read_bytes()
    assert len(list((tmp_path / "all").rglob("*.png"))) == len(list(tuned.rglob("*.png")))
    told = trce(*ARGUMENTS, "--preserve", "0.2", "-o", *merge)
    assert told.status == 2
    assert "is one of other settings" in told.err


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=np.float64)


def test_trials_are_drawn_as_the_chosen_command_would_have_it(tuned: Path, tmp_path: Path) -> None:
    command = shlex.split(json.loads((tuned / "tune.json").read_text("utf-8"))["chosen"]["command"])
    assert command[:2] == ["trce", "map"]
    assert main([*command[1:-1], str(tmp_path / "mapped"), "--quiet"]) == 0
    folder = tuned / "images" / "explicit"
    records = [record for path in folder.glob("*.png") if (record := read_image(path))]
    erased = [record for record in records if record.role == "erased"]
    mapped = open_checkpoint(str(tmp_path / "mapped"))
    pipeline = mapped.family.pipe(mapped, torch.device("cpu"), torch.float32)
    drawn: list[tuple[ImageRecord, Image.Image]] = list(draw(mapped.family, pipeline, erased))
    assert len(drawn) == 3
    for record, image in drawn:
        mine, (original,) = pixels(folder / record.file), folder.glob(f"{record.index:04d}-*-original.png")
        gap = np.abs(mine - np.asarray(image)).mean()  # the edited weights are rounded to their dtype
        assert gap < 0.1 * np.abs(mine - pixels(original)).mean()


def test_a_run_goes_on_where_it_was(tuned: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(tuned, tmp_path / "out"))
    before = json.loads((output / "tune.json").read_text("utf-8"))
    pictures = {path: path.stat().st_mtime_ns for path in (output / "images").rglob("*.png")}
    assert main([*ARGUMENTS, *TRIALS, "--quiet", "--output", str(output)]) == 0
    assert {path: path.stat().st_mtime_ns for path in (output / "images").rglob("*.png")} == pictures
    assert json.loads((output / "tune.json").read_text("utf-8"))["trials"] == before["trials"]

    (output / "tune.json").unlink()  # stopped in the first trial
    lost = next(path for path in pictures if "original" not in path.name)
    lost.unlink()
    assert main([*ARGUMENTS, *TRIALS, "--quiet", "--output", str(output)]) == 0
    after = {path: path.stat().st_mtime_ns for path in (output / "images").rglob("*.png")}
    assert {path for path in pictures if after[path] != pictures[path]} == {lost}
    again = json.loads((output / "tune.json").read_text("utf-8"))
    assert again["chosen"] == before["chosen"]
    for key in ("attack_success", "kept"):
        assert again["trials"][0][key] == before["trials"][0][key]


@pytest.mark.slow
def test_a_run_stopped_again_and_again_ends_as_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["tune", "emoji", "--preset", "emoji-weapons", "--count", "2", "--steps", "2", "--device", "cpu"]
    line += ["--suite", "explicit", "--suite", "benign", "--preserve", "0.1"]
    line += ["--token-weights", "0,1,1,1", "--token-weights", "0,1,0,0", "--quiet", "--output"]
    assert main([*line, str(tmp_path / "whole")]) == 0

    real, drawn = ImageFolder.add, []

    def stopped_after_five(folder: ImageFolder, record: ImageRecord, image: Image.Image) -> None:
        real(folder, record, image)
        drawn.append(folder.path / record.file)
        if len(drawn) % 5 == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ImageFolder, "add", stopped_after_five)
        assert [main([*line, str(tmp_path / "stopped")]) for _ in range(3)] == [130, 130, 0]
    assert len(set(drawn)) == len(drawn) == 12
    one, other = (tmp_path / name for name in ("whole", "stopped"))
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    for file in files:
        if file.suffix in (".png", ".csv"):
            assert (one / file).read_bytes() == (other / file).read_bytes(), file
    told = [json.loads((folder / "tune.json").read_text("utf-8")) for folder in (one, other)]
    assert [each.pop("date") for each in told]
    assert told[0] == told[1]


@pytest.mark.parametrize("key", ["key", "preserve", "figures", "attack_success", "suites", "kept"])
def test_a_record_that_says_too_little_is_not_taken_over(tuned: Path, tmp_path: Path, key: str) -> None:
    told = json.loads((tuned / "tune.json").read_text("utf-8"))
    assert finished(tuned / "tune.json", told["asked"]).keys() == {each["key"] for each in told["trials"]}
    for wrong in ({}, {key: []}):
        first = {name: value for name, value in told["trials"][0].items() if name != key} | wrong
        path = tmp_path / "tune.json"
        path.write_text(json.dumps(told | {"trials": [first, *told["trials"][1:]]}))
        assert finished(path, told["asked"]) == {}
    path.write_text(json.dumps(told | {"trials": [told["trials"][0] | {"seconds": float("nan")}]}))
    assert finished(path, told["asked"]) == {}


@pytest.mark.parametrize("total", [0, None])
def test_bystanders_that_one_record_does_not_tell_decide_nothing(tuned: Path, total: int | None) -> None:
    told = json.loads((tuned / "tune.json").read_text("utf-8"))["trials"]
    trials = [copy.deepcopy(trial) for trial in told if trial["failed"] is None for _ in range(2)]
    silent, telling, *_ = (
        next(each for each in trial["suites"] if each["name"] == "bystanders") for trial in trials
    )
    telling["kept"]["kept"]["total"] = 3
    if total is None:
        del silent["kept"]
    else:
        silent["kept"]["kept"]["total"] = total
    assert conclude(trials, [])["key"] in {trial["key"] for trial in trials}


def test_a_disk_that_refuses_a_picture_is_no_failure_of_the_settings(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trce: Run
) -> None:
    output = Path(shutil.copytree(tuned, tmp_path / "out"))
    (output / "tune.json").unlink()
    drawn = next(output.glob("images/*/0001-seed*-original.png"))
    next(path for path in drawn.parent.iterdir() if path.name.startswith("0001-") and path != drawn).unlink()

    def full(folder: ImageFolder, record: ImageRecord, image: Image.Image) -> None:
        with whole(folder.path / record.file):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ImageFolder, "add", full)
    told = trce(*ARGUMENTS, *TRIALS, "-o", output)
    assert (told.status, "No space left" in told.err) == (1, True), told.err
    assert "Cannot write" not in (
        (output / "tune.json").read_text() if (output / "tune.json").exists() else ""
    )


def test_pictures_of_other_settings_are_refused(tuned: Path, trce: Run) -> None:
    told = trce(*ARGUMENTS, "--preserve", 0.2, "-o", tuned)
    assert told.status == 2
    assert "of another run" in told.err
    told = trce(*ARGUMENTS, *TRIALS, "--guidance-scale", 2, "-o", tuned)
    assert told.status == 2
    assert "guidance scale" in told.err


@pytest.mark.parametrize(
    ("more", "status", "says"),
    [
        (["--preserve", "b..a"], 2, "'b..a'"),
        (["--preserve", "1..2", "--trials", "1"], 2, "too few"),
        (["--token-weights", "0,1,x,0"], 2, "'0,1,x,0'"),
        (["--token-weights", "0,0,0,0"], 2, "not all 0"),
        (["--suite", "explicit"], 2, "what an edit keeps"),
        (["--suite", "benign"], 2, "to be erased"),
        (["--preserve", "1e9"], 1, "None of the 1 settings"),
    ],
)
def test_wrong_usage(trce: Run, tmp_path: Path, more: list[str], status: int, says: str) -> None:
    told = trce(*ARGUMENTS, *more, "-o", tmp_path / "out")
    assert (told.status, told.out) == (status, "")
    assert says in told.err


def test_without_a_judge_clip_tells_what_is_kept(
    trce: Run, tiny_sd1: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    told = trce(
        *("tune", tiny_sd1, "--preset", "weapons", "--detector", f"clip:{tiny_clip}", "--preserve", "0.5"),
        *("--count", 1, "--steps", 2, "--device", "cpu", "-o", tmp_path / "out", "--json"),
    )
    assert told.status == 0, told.err
    (trial,) = json.loads(told.out)["trials"]
    assert [suite["name"] for suite in trial["suites"]] == ["explicit", "implied", "benign", "bystanders"]
    assert trial["attack_success"]["total"] == 2
    assert trial["kept"]["total"] == trial["kept"]["hits"] == 2  # a prompt alone in its suite has no rival
