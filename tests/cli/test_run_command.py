"""`trce run` as a user meets it: recipes refused whole, runs taken up again, edits made again bit for bit."""

import hashlib
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import metadata_load
from PIL import Image
from safetensors.torch import load_file, save_file

import plugins
from trce_cli.checkpoint.measured import PICTURE
from trce_cli.cli.recipe import read_recipe
from trce_cli.cli.recipe_start import start
from trce_cli.cli.steps import Link, Work

UNET = "unet/diffusion_pytorch_model.safetensors"
PRESET = """
[[preset]]
name = "blades"
description = "Blades"
kind = "object"
templates = ["{}", "a photo of {}", "a drawing of {} on a table"]
concepts = [
    { unsafe = "a knife", safe = "a tulip" },
    { unsafe = "a sharp dagger", safe = "two red apples" },
]
[preset.steer]
steps = 4
trajectories_per_concept = 2
unconditional = 8
benign = 8
lr = 1e-3
batch_size = 2
max_steps = 2
"""
MAP = """
[map]
preserve = 0.5
word_prompts = 50
max_collateral = 9
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def recipe(tiny_sd1: Path) -> Callable[..., Path]:
    """Write a recipe on the tiny checkpoint with these steps."""

    def write(steps: str, head: str = "", name: str = "recipe.toml") -> Path:
        above = f'base = "{tiny_sd1}"\npresets = ["blades"]\noutput = "out"\ndevice = "cpu"\n{head}'
        Path(name).write_text(above + steps + PRESET)
        return Path(name)

    return write


def sha256(path: Path | str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def times(folder: str) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in Path(folder).rglob("*") if path.is_file()}


def test_what_the_commands_do_one_by_one(trce: Callable[..., Any], recipe: Callable[..., Path]) -> None:
    steps = MAP + "[generate]\nprompt = ['a knife', 'a dog']\nsteps = 2\n"
    told = json.loads(trce("run", recipe(steps), "--json").out)
    assert list(told["steps"]) == ["map", "generate"]
    assert told["steps"]["map"]["settings"]["preserve"] == 0.5
    assert told["steps"]["generate"]["drawn"] == 4  # the original's beside the erased checkpoint's
    Path("blades.toml").write_text(PRESET.replace("[[preset]]", "").replace("[preset.steer]", "[steer]"))
    base = tomllib.loads(Path("recipe.toml").read_text())["base"]
    options = ("--preserve", "0.5", "--word-prompts", "50", "--max-collateral", "9", "--device", "cpu")
    assert trce("map", base, "-p", "blades.toml", "-o", "alone", *options).status == 0
    assert sha256("out/erased/" + UNET) == sha256("alone/" + UNET)


def test_the_same_recipe_gives_the_same_bits(trce: Callable[..., Any], recipe: Callable[..., Path]) -> None:
    path = recipe(MAP + "[generate]\nprompt = ['a knife', 'a dog']\nsteps = 2\n")
    found = []
    for folder in ("one", "other"):
        assert trce("run", path, "-o", folder).status == 0
        bits = {path.name: path.read_bytes() for path in Path(folder, "erased").rglob("*.safetensors")}
        for picture in Path(folder, "images").glob("*.png"):  # their text says where the checkpoint lies
            bits[picture.name] = Image.open(picture).tobytes()
        found.append(bits)
    assert found[0] == found[1]
    assert len([name for name in found[0] if name.endswith("erased.png")]) == 2


def test_run_again_does_nothing_and_mends_what_is_not_whole(
    trce: Callable[..., Any], recipe: Callable[..., Path]
) -> None:
    path = recipe(MAP)
    assert trce("run", path).status == 0
    weights, before = sha256("out/erased/" + UNET), times("out/erased")
    for again in (path, Path("out/recipe.toml")):  # the resolved recipe asks for the same
        outcome = trce("run", again, "--json")
        assert json.loads(outcome.out)["steps"]["map"]["kept"] is True
        assert times("out/erased") == before
    for damage in (
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.unlink(),
        lambda file: os.rename("out/erased", "elsewhere"),
    ):
        damage(Path("out/erased") / UNET)
        assert trce("run", path).status == 0
        assert sha256("out/erased/" + UNET) == weights


def test_other_settings_replace_nothing_without_force(
    trce: Callable[..., Any], recipe: Callable[..., Path]
) -> None:
    assert trce("run", recipe(MAP)).status == 0
    before = times("out")
    other = recipe(MAP.replace("0.5", "0.7"))
    refused = trce("run", other)
    assert refused.status == 2
    assert "other settings" in refused.err
    assert "--force" in refused.err
    assert times("out") == before
    assert trce("run", other, "--force").status == 0
    assert json.loads(Path("out/erased/trce.json").read_text())["history"][0]["settings"]["preserve"] == 0.7


def test_a_killed_run_is_taken_up_again(recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe(MAP)
    kill = (
        "import os, sys; from trce_cli.cli import steps; from trce_cli.cli.app import main\n"
        "keep, calls = steps.Work._keep, []\n"
        "def counted(*a):\n    calls.append(a)\n    (os._exit(9) if len(calls) == 2 else keep(*a))\n"
        "steps.Work._keep = counted\nmain(['run', sys.argv[1]])"
    )
    assert subprocess.run([sys.executable, "-c", kill, str(path)], check=False).returncode == 9
    before = times("out/erased")  # it was killed between the output and the record of it
    from trce_cli.cli.app import main

    assert before
    assert main(["run", str(path)]) == 0
    assert times("out/erased") == before


@pytest.mark.parametrize("stopped", ["after the recipe", "in its first step"])
def test_a_run_killed_before_a_step_is_recorded_is_taken_up_again(
    recipe: Callable[..., Path], stopped: str
) -> None:
    path = recipe(MAP)
    name = "write_text" if stopped == "after the recipe" else "Work._keep"
    kill = (
        "import os, sys; from trce_cli.cli import steps; from trce_cli.cli.app import main\n"
        f"do = steps.{name}\n"
        "def last(*a):\n    (do(*a) if '_keep' not in do.__name__ else None)\n    os._exit(9)\n"
        f"steps.{name} = last\nmain(['run', sys.argv[1]])"
    )
    assert subprocess.run([sys.executable, "-c", kill, str(path)], check=False).returncode == 9
    assert Path("out/recipe.toml").exists()
    from trce_cli.cli.app import main

    assert main(["run", str(path)]) == 0
    assert Path("out/erased").is_dir()


EVALUATE = """
[evaluate{}]
card = true
detector = "reds"
suite = ["explicit"]
count = 2
steps = 1
"""


def test_cards_are_written_beside_weights_that_stay(
    trce: Callable[..., Any], recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stage gets the figures of its own weights, and run again nothing is made anew for them."""
    plugins.install(Path("plugin"), plugins.REDS, monkeypatch)
    path = recipe(MAP + EVALUATE.format("") + "[steer]\nmax_drift = 9.0\n" + EVALUATE.format("-2"))
    path.write_text(path.read_text().replace('kind = "object"', 'kind = "object"\nsensitive = false'))
    outcome = trce("run", path)
    assert outcome.status == 0, outcome.err
    for stage, evaluation in (("map", "evaluation"), ("erased", "evaluation-2")):
        results = json.loads(Path("out", evaluation, "results.json").read_text())
        (told,) = metadata_load(Path("out", stage, "README.md"))["model-index"]
        shares = [each["asr"][0]["erased"]["share"] for each in results["suites"]]
        assert [each["metrics"][0]["value"] for each in told["results"]] == pytest.approx(shares, abs=1e-4)
        assert told["name"] == stage
    one, other = (Path("out", stage, PICTURE).read_bytes() for stage in ("map", "erased"))
    assert one != other
    Path("out/erased", PICTURE).unlink()
    with Path("out/erased/README.md").open("a") as card:
        card.write("Mine.\n")
    weights = {
        name: time for name, time in times("out").items() if name.endswith((".safetensors", "trce.json"))
    }
    told = json.loads(trce("run", path, "--json").out)
    assert [told["steps"][name]["kept"] for name in ("map", "steer")] == [True, True]
    assert weights.items() <= times("out").items()
    assert Path("out/erased", PICTURE).read_bytes() == other
    assert Path("out/erased/README.md").read_text().endswith("Mine.\n")


WRONG = {
    "[map]\nas = ['map']\n[evaluate]\ncard = true": "[evaluate] has `card`, but does not measure a diffusers",
    "[evaluate]\ncard = true": "[evaluate]: {base} is evaluated against itself",
    "bass = 1": "unknown key 'bass' (did you mean 'base'?)",
    "[mop]": "unknown key 'mop'",
    "[map]\npreserv = 1": "[map] has an unknown key 'preserv' (did you mean 'preserve'?)",
    "[map]\npreserve = -1": "[map] preserve must be at least 0.0, not -1",
    "[map]\npreserve = 'high'": "[map] preserve must be a number",
    "[map]\ntoken_weights = { NOSE = 1 }": "NOSE",
    "[map]\nprior = 'none.txt'": "none.txt",
    "[map]\npresets = ['none']": "[map]: There is no preset 'none'",
    "[map]\nas = ['gguf']": "[map] as",
    "[map]\n[evaluate]\ngate = 'much'": "[evaluate] gate: The gate 'much' is not of the form",
    "[map]\n[steer]\nmax_steps = 0": "[steer] max_steps must be at least 1, not 0",
    "[map]\n[steer]\ntrajectories = 3": "[steer] trajectories",
    "[map]\n[generate]": "[generate]: There is no prompt",
    "[map]\n[generate]\nprompt = ['a']\nprompts = 'none.csv'": "none.csv",
    "[apply]\nedits = ['none.safetensors']": "[apply]: there is no file none.safetensors",
    "[apply]": "[apply] lacks the key 'edits'",
    "[map]\nas = ['map']\n[steer]": "[steer] goes on from [map], which writes no checkpoint",
    "[map]\noutput = 'out/images'\n[generate]\nprompt = ['a']": "[map] and [generate] would write to the",
    "[map]\noutput = 'x'\n[evaluate]\noutput = 'x/y'": "[map] and [evaluate] would write to places",
    "[map]\noutput = 'out'": "where the recipe's own output goes",
    "map = 3": "[map] must be a table",
    "preset = 3": "[[preset]]",
}


@pytest.mark.parametrize("steps", WRONG, ids=WRONG.values())
def test_what_is_wrong_is_told_before_anything_starts(
    trce: Callable[..., Any], recipe: Callable[..., Path], tiny_sd1: Path, steps: str
) -> None:
    path = recipe(steps + "\n")
    if steps == "preset = 3":
        path.write_text(f'{steps}\nbase = "emoji"\noutput = "out"\n[map]\n')
    outcome = trce("run", path)
    assert outcome.status == 2, outcome.err
    error = next(line for line in outcome.err.splitlines() if line.startswith("Error: "))
    assert error.startswith("Error: recipe.toml")
    assert WRONG[steps].format(base=tiny_sd1) in error
    assert not Path("out").exists()


@pytest.mark.parametrize("text", ["", "base = 'emoji'", "base = 'emoji'\noutput = 'x'", "base ="])
def test_what_is_no_recipe(trce: Callable[..., Any], text: str) -> None:
    Path("r.toml").write_text(text)
    outcome = trce("run", "r.toml", "--json")
    assert outcome.status == 2
    assert "r.toml" in json.loads(outcome.out)["error"]["message"]
    assert trce("run", "none.toml").status == 2


def test_a_start_explains_every_key_and_runs(trce: Callable[..., Any]) -> None:
    assert trce("run", "--init").status == 0
    assert trce("run", "--init").status == 2  # it is there
    found = read_recipe(Path("recipe.toml"))
    assert [step.name for step in found.steps] == ["map", "generate", "evaluate"]
    # Every key that stands there as a comment is one that its step takes.
    for line in start().splitlines():
        assert len(line) <= 110
    text = start().replace("# [steer]", "[steer]").splitlines()
    keys = [line for line in text if line.lstrip("# ").partition(" = ")[0].isidentifier()]
    assert len(keys) > 60


def test_a_plan_writes_nothing(trce: Callable[..., Any], recipe: Callable[..., Path]) -> None:
    steps = MAP + "[generate]\nprompt = ['a knife']\nsteps = 8\n"
    told = json.loads(trce("run", recipe(steps), "--dry-run", "--json").out)
    assert told["dry_run"] is True
    assert set(told["steps"]) == {"map", "generate"}
    assert told["estimated_seconds"] > 0
    assert told["memory_bytes"] > 0
    assert told["free_disk_bytes"] > told["disk_bytes"] > 0
    assert not Path("out").exists()


def test_a_step_is_planned_once_and_its_remarks_are_told_once(
    trce: Callable[..., Any], recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[str] = []
    call = Work._call

    def counted(work: Work, link: Link, *args: Any, **how: Any) -> None:
        planned.append(link.step.name)
        call(work, link, *args, **how)

    monkeypatch.setattr(Work, "_call", counted)
    long = MAP + "[map-2]\n" + "[generate]\nprompt = ['a knife']\nsteps = 1\n"
    outcome = trce("run", recipe(long), "--dry-run")
    assert outcome.status == 0
    assert planned == ["map", "map-2", "generate"]
    assert [line for line in outcome.err.splitlines() if line.startswith("[")] == [
        f"[{name}]:" for name in planned
    ]
    assert outcome.out.count(" about ") == 4  # each plan, and all together
    assert trce("run", recipe(long, name="quiet.toml"), "--dry-run", "--quiet").err == ""


def test_the_history_is_a_recipe_again(trce: Callable[..., Any], recipe: Callable[..., Path]) -> None:
    steps = MAP + "[map-2]\npreserve = 2.0\nword_prompts = 50\nmax_collateral = 9\n[steer]\nmax_drift = 9.0\n"
    assert trce("run", recipe(steps)).status == 0
    assert sorted(os.listdir("out")) == ["erased", "map", "map-2", "recipe.toml", "run.json"]
    text = trce("inspect", "out/erased", "--recipe").out
    again = Path("again.toml")
    again.write_text(text)
    assert list(tomllib.loads(text))[-4:-1] == ["map", "map-2", "steer"]
    outcome = trce("run", again)
    assert outcome.status == 0, outcome.err
    first, second = load_file("out/erased/" + UNET), load_file("again/erased/" + UNET)
    assert sha256("out/erased/" + UNET) == sha256("again/erased/" + UNET)
    assert first.keys() == second.keys()


def test_applied_files_are_named_with_their_hashes(
    trce: Callable[..., Any], recipe: Callable[..., Path], tiny_sd1: Path
) -> None:
    assert trce("run", recipe(MAP + "as = ['map']\n")).status == 0
    os.rename("out/erased.safetensors", "blades.safetensors")
    assert trce("apply", "blades.safetensors", tiny_sd1, "-o", "safe", "--strength", "0.5").status == 0
    Path("again.toml").write_text(trce("inspect", "safe", "--recipe").out)
    assert trce("run", "again.toml").status == 0
    assert sha256("safe/" + UNET) == sha256("again/erased/" + UNET)
    tensors = {name: tensor + 1 for name, tensor in load_file("blades.safetensors").items()}
    save_file(tensors, "blades.safetensors")
    outcome = trce("run", "again.toml", "--output", "other")
    assert outcome.status == 2
    assert "other files than sha256 speaks of" in outcome.err


def test_gates_end_it_as_they_end_an_evaluation(trce: Callable[..., Any]) -> None:
    asked = "count = 1\nsteps = 1\nsuite = ['benign']\ngate = 'benign.kept.low>=0.9'"
    Path("r.toml").write_text(
        f"base = 'emoji'\npresets = ['emoji-weapons']\noutput = 'out'\n[evaluate]\n{asked}\n[map]\n"
    )
    outcome = trce("run", "r.toml", "--json")
    assert outcome.status == 1
    assert "benign.kept.low>=0.9 is not met" in outcome.err
    told = json.loads(outcome.out)
    assert told["steps"]["evaluate"]["gates"][0]["met"] is False
    assert "map" not in told["steps"]


def test_a_recipe_that_is_not_there_gets_the_way_to_start_one(
    trce: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = trce("run", tmp_path / "none.toml")
    assert outcome.status == 2
    assert f"trce run --init {tmp_path / 'none.toml'}" in outcome.err
