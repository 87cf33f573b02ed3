"""`trce evaluate` on tiny checkpoints: what it writes, resuming, gates, reuse, suites of every kind."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny
from trce_cli.emoji.world import SINGLE, WEAPONS
from trce_cli.errors import BadInput
from trce_cli.maths.statistics import frechet_distance
from trce_cli.prompts import suites as suites_module
from trce_cli.prompts.captions import canary_captions, prior_captions
from trce_cli.prompts.home import EMBEDDED, REAL_WORLD, Home
from trce_cli.prompts.pairs import prompt_pairs
from trce_cli.prompts.presets import load_presets, preset_names
from trce_cli.prompts.suites import BUILT_IN, built_in_suite, choose_suites, parts, unsafe_classes

Run = Callable[..., Any]
(EMOJI,) = EMBEDDED
REDS = """
import numpy as np

class Reds:
    labels, thresholds, floor = ("red", "dark"), (0.45, 0.6), 0.0
    sets = {"red": ("red",), "any": ("red", "dark")}
    looked = []

    def __init__(self, request):
        self.identity = {"files": {"none": "0"}}

    def scores(self, images):
        self.looked.append(len(images))
        red = images[..., 0].mean((1, 2)) / 255
        return np.stack([red, 1 - images.mean((1, 2, 3)) / 255], 1)
"""


@pytest.fixture(scope="module")
def erased(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, drawing something else."""
    folder = Path(shutil.copytree(tiny_sd1, tmp_path_factory.mktemp("erased") / "erased"))
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["conv_in.bias"] += 1
    save_file(state, path, metadata={"format": "pt"})
    return folder


@pytest.fixture
def reds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package that brings a detector."""
    folder = tmp_path / "site"
    info = folder / "reds-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "reds.py").write_text(REDS)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: reds\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[trce.detectors]\nreds = reds:Reds\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "reds", raising=False)


@pytest.fixture
def evaluate(trce: Run, tiny_sd1: Path, erased: Path, tmp_path: Path, reds: None) -> Run:
    """Evaluate the erased checkpoint with few cheap pictures."""

    def run(*more: Any, output: str = "out", preset: str = "weapons") -> Any:
        arguments = ["evaluate", erased, "--against", tiny_sd1, "--preset", preset, "-o", tmp_path / output]
        arguments += ["--detector", "reds", "--steps", 2, "--count", 5, "--device", "cpu", "--json"]
        return trce(*arguments, *more)

    return run


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), dtype=np.float64)


def test_everything_that_is_promised(
    evaluate: Run, tiny_clip: Path, tmp_path: Path, tiny_sd1: Path, erased: Path
) -> None:
    (tmp_path / "own.csv").write_text('adv_prompt,evaluation_seed\n"a knife,\non a table",41\na cup,42\n')
    real = tmp_path / "real"
    real.mkdir()
    for number in range(3):
        Image.new("RGB", (40, 20 + number), (90 * number, 10, 200)).save(real / f"{number}.jpg")
    told = evaluate(
        *("--clip", tiny_clip, "--suite", f"own={tmp_path / 'own.csv'}", "--real", real),
        *("--gate", "asr.own<=1", "--gate", "benign.kept>=0"),
    )
    assert told.status == 0, told.err
    results = json.loads(told.out)
    output = tmp_path / "out"
    assert json.loads((output / "results.json").read_text()).items() <= results.items()
    suites = {suite["name"]: suite for suite in results["suites"]}
    assert {name: (suite["role"], suite["prompts"]) for name, suite in suites.items()} == {
        "explicit": ("attack", 5),
        "implied": ("attack", 5),
        "benign": ("benign", 5),
        "own": ("own", 2),
    }

    with (output / "verdicts.csv").open(encoding="utf-8", newline="") as file:
        verdicts = list(csv.DictReader(file))
    assert len((output / "verdicts.csv").read_text("utf-8").splitlines()) == len(verdicts) + 1 == 35
    for line in verdicts:  # every verdict follows from the picture
        image = pixels(output / line["file"])
        red, dark = image[..., 0].mean() / 255, 1 - image.mean() / 255
        for threshold in (0.45, 0.6):
            assert line[f"reds/red@{threshold}"] == str(int(red >= threshold))
            assert line[f"reds/any@{threshold}"] == str(int(max(red, dark) >= threshold))
        assert float(line["reds: dark"]) == pytest.approx(dark, abs=1e-4)
    mine = [line for line in verdicts if line["suite"] == "own"]
    assert [(line["prompt"], line["seed"]) for line in mine[::2]] == [
        ("a knife, on a table", "41"),
        ("a cup", "42"),
    ]

    for name, suite in suites.items():
        lines = [line for line in verdicts if line["suite"] == name]
        sides = {role: [line for line in lines if line["role"] == role] for role in ("original", "erased")}
        for verdict in suite["asr"]:
            hits = {
                role: [line[verdict["convention"]] == "1" for line in side] for role, side in sides.items()
            }
            assert {role: verdict[role]["hits"] for role in hits} == {
                role: sum(h) for role, h in hits.items()
            }
            lost = sum(a and not b for a, b in zip(hits["original"], hits["erased"], strict=True))
            assert verdict["change"]["lost"] == lost
        files = {role: [output / line["file"] for line in side] for role, side in sides.items()}
        gaps = [
            np.abs(pixels(a) - pixels(b)).mean() / 255
            for a, b in zip(files["original"], files["erased"], strict=True)
        ]
        assert suite["change"]["mean"] == pytest.approx(np.mean(gaps))
        distances = {each["reference"].split()[0]: each for each in suite["frechet"]}
        assert set(distances) == ({"the"} if suite["role"] == "attack" else {"the", "real"})
        assert distances["the"]["samples"] == {"reference": len(gaps), "drawn": len(gaps)}
        assert "CLIP" in distances["the"]["features"]
    assert suites["benign"]["frechet"][1]["samples"]["reference"] == 3

    check_clip(suites["own"], mine, output, tiny_clip)
    assert results["gates"] == [
        {"gate": "asr.own<=1", "value": suites["own"]["asr"][0]["erased"]["share"], "met": True},
        {"gate": "benign.kept>=0", "value": suites["benign"]["kept"]["kept"]["share"], "met": True},
    ]
    phases = {cost["phase"]: cost for cost in results["costs"]["evaluation"]}
    assert phases["draw erased"]["images"] == 17
    assert phases["detect reds"]["images"] == 34
    for cost in phases.values():
        assert cost["seconds"] > 0
        assert cost["peak_memory_bytes"] > 1 << 20
    assert results["original"]["name"] == str(tiny_sd1)
    assert results["original"]["sha256"] != results["erased"]["sha256"]
    assert "<html" in (output / "report.html").read_text("utf-8")


def check_clip(suite: dict[str, Any], lines: list[dict[str, str]], output: Path, clip: Path) -> None:
    """CLIP scores and the Fréchet distance from the model itself."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    features = {"original": [], "erased": []}
    for line in lines:
        text = {"a knife, on a table": "a knife,\non a table"}.get(line["prompt"], line["prompt"])
        inputs = processor(text=text, images=Image.open(output / line["file"]), return_tensors="pt")
        with torch.no_grad():
            found = model(**inputs)
        cosine = torch.cosine_similarity(found.image_embeds, found.text_embeds)
        assert float(line["clip_score"]) == pytest.approx(100 * float(cosine), abs=1e-2)
        with torch.no_grad():
            raw = model.get_image_features(pixel_values=inputs.pixel_values)
        features[line["role"]].append(getattr(raw, "pooler_output", raw)[0].numpy())
    expected = frechet_distance(features["erased"], features["original"])
    assert suite["frechet"][0]["erased"] == pytest.approx(expected, rel=1e-3)


def test_a_single_file_is_evaluated_as_its_folder(
    trce: Run, tiny_sd1: Path, tmp_path: Path, reds: None
) -> None:
    single = tiny.single_file("sd1", tiny_sd1, tmp_path / "model.safetensors")
    arguments = ["evaluate", single, "--against", tiny_sd1, "--config", tiny_sd1, "--preset", "weapons"]
    arguments += ["--detector", "reds", "--suite", "explicit", "--count", 2, "--steps", 2, "--device", "cpu"]
    told = trce(*arguments, "-o", tmp_path / "out", "--json")
    assert told.status == 0, told.err
    assert json.loads(told.out)["figures"]["explicit.change"] < 1e-4


def test_a_stopped_run_is_taken_up(evaluate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_save, count = Image.Image.save, iter(range(1000))

    def stop_in_seventh(image: Image.Image, *args: Any, **options: Any) -> None:
        real_save(image, *args, **options)
        if next(count) == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "save", stop_in_seventh)
        assert evaluate("--suite", "explicit").status == 130
    output = tmp_path / "out"
    assert not (output / "results.json").exists()
    there = {path: path.stat().st_mtime_ns for path in output.rglob("*.png")}
    assert len(there) == 6
    first = json.loads(evaluate("--suite", "explicit").out)
    assert {path: path.stat().st_mtime_ns for path in there} == there
    drawn = {
        cost["phase"]: cost["images"] for cost in first["costs"]["evaluation"] if "draw" in cost["phase"]
    }
    assert sum(drawn.values()) == 4
    assert not list(output.rglob("*.tmp"))

    # Nothing is drawn or looked at twice; a torn line of scores is.
    (scores,) = (output / "scores").iterdir()
    scores.write_text(scores.read_text()[:-20])
    import reds

    reds.Reds.looked.clear()
    again = json.loads(evaluate("--suite", "explicit").out)
    assert sum(reds.Reds.looked) == 1
    assert [again["suites"], again["figures"]] == [first["suites"], first["figures"]]
    assert {cost["phase"] for cost in again["costs"]["evaluation"]} == {"detect reds", "measure"}

    refused = evaluate("--suite", "explicit", "--guidance-scale", 3)
    assert refused.status == 2
    assert "guidance scale" in refused.err
    assert evaluate("--suite", "explicit", "--guidance-scale", 3, "--force").status == 0


def test_gates_decide_the_exit_status_after_all_is_written(evaluate: Run, tmp_path: Path) -> None:
    told = evaluate("--suite", "explicit", "--gate", "explicit.change>=2", "--gate", "asr.explicit<=1")
    assert told.status == 1
    assert "explicit.change>=2 is not met: it is" in told.err
    assert [gate["met"] for gate in json.loads(told.out)["gates"]] == [False, True]
    assert (tmp_path / "out" / "report.html").exists()
    named = evaluate("--suite", "explicit", "--gate", "asr.explicit[reds/any@0.6]<=100%")
    assert named.status == 0


def test_equal_pictures_of_another_evaluation_are_taken_over(evaluate: Run, tmp_path: Path) -> None:
    first = json.loads(evaluate("--suite", "explicit").out)
    told = evaluate(
        "--suite", "explicit", "--negative-prompt", "a knife", "--reuse", tmp_path / "out", output="b"
    )
    second = json.loads(told.out)
    drawn = {cost["phase"]: cost.get("images") for cost in second["costs"]["evaluation"]}
    assert drawn["draw erased"] == 5
    assert "draw original" not in drawn
    assert second["erased"]["negative_prompt"] == "a knife"
    original = [each["suites"][0]["asr"][0]["original"] for each in (first, second)]
    assert original[0] == original[1]
    assert first["suites"][0]["change"] != second["suites"][0]["change"]


def test_results_of_several_are_compared(evaluate: Run, trce: Run, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 9)):
        assert evaluate("--suite", "explicit", "--seed", seed, output=name).status == 0
    a, b = (tmp_path / name / "results.json" for name in "ab")
    told = trce("evaluate", "--compare", a, b, "-o", tmp_path / "c", "--json")
    assert told.status == 0
    compared = json.loads(told.out)
    assert compared["columns"] == ["asr.explicit"]
    assert [row["role"] for row in compared["rows"]] == ["erased", "erased", "original"]
    assert compared == json.loads((tmp_path / "c" / "comparison.json").read_text()) | {
        "output": str(tmp_path / "c"),
        "report": str(tmp_path / "c" / "report.html"),
    }
    with_it = evaluate("--suite", "explicit", "--compare", b, output="a")
    assert with_it.status == 0
    assert "Compared" in (tmp_path / "a" / "report.html").read_text("utf-8")
    b.write_text('{"schema": 1}')
    refused = trce("evaluate", "--compare", a, b, "-o", tmp_path / "d")
    assert (refused.status, str(b) in refused.err) == (2, True)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--gate", "asr.implied<=lots"], "'asr.implied<=lots'"),
        (["--gate", "asr.impled<=0.1"], "'asr.impled'"),
        (["--gate", "benign.kept>=0.9"], "'benign.kept'"),  # nothing here can tell
        (["--suite", "explicid"], "'explicid'"),
        (["--suite", "context"], "no context suite"),
        (["--suite", "none"], "no suite"),
        (["--suite", "own=absent.csv"], "absent.csv"),
        (["--suite", "a/b=x.csv"], "'a/b=x.csv'"),
        (["--threshold", "many"], "'many'"),
        (["--detector", "clip"], "needs a model"),
        (["--detector", "judge"], "presets name none"),
        (["--real", "absent"], "absent"),
        (["--clip", "/absent"], "/absent"),
        (["--steps", "5000"], "5000"),
    ],
)
def test_wrong_usage(evaluate: Run, tmp_path: Path, more: list[str], says: str) -> None:
    preset = "sexual" if "judge" in more else "weapons"
    told = evaluate(*more, preset=preset)
    assert (told.status, told.out) == (2, "")
    assert says in told.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"text,evaluation_seed\na cat,1\n", "no prompt column"),
        (b"prompt,evaluation_seed\na cat,nan\n", "'nan'"),
        (b"prompt\n" + b"x" * (10 << 20), "characters"),
        (b"prompt\n", "no prompt"),
        (b'prompt\n"a cat\n', "well-formed"),
        (b"\xff\xfe\x00", "damaged"),
    ],
)
def test_malformed_suites(evaluate: Run, tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "own.csv"
    path.write_bytes(content)
    told = evaluate("--suite", f"own={path}")
    assert told.status == 2
    assert says in told.err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_a_detector_is_told_which_there_are(
    trce: Run, tiny_sd1: Path, erased: Path, tmp_path: Path
) -> None:
    told = trce("evaluate", erased, "--against", tiny_sd1, "-p", "violence", "-o", tmp_path / "out")
    assert told.status == 2
    assert "clip:MODEL" in told.err
    told = trce("evaluate", erased, "-p", "violence", "-o", tmp_path / "out")
    assert told.status == 2
    assert "--against" in told.err


# --- the embedded checkpoint


def test_the_embedded_checkpoint_is_judged_by_its_own(trce: Run, tmp_path: Path) -> None:
    output = tmp_path / "out"
    # With steering away from everything that is asked for, something has to go.
    told = trce(
        *("evaluate", "emoji", "--against", "emoji", "--preset", "emoji-weapons", "-o", output, "--json"),
        *("--count", 4, "--steps", 8, "--negative-prompt", "a gun, a knife, a bomb", "--device", "cpu"),
        *("--gate", "context.kept>=0", "--gate", "asr.implied<=1"),
    )
    assert told.status in (0, 1), told.err
    results = json.loads(told.out)
    suites = {suite["name"]: suite for suite in results["suites"]}
    assert {name: suite["prompts"] for name, suite in suites.items()} == dict.fromkeys(BUILT_IN, 4)
    assert [detector["name"] for detector in results["detectors"]] == ["judge"]
    assert set(results["detectors"][0]["conventions"][0]["labels"]) == set(WEAPONS)
    assert results["settings"]["guidance_scale"] == [4.0]
    assert results["sensitive"] is False
    for name in ("context", "benign"):
        assert suites[name]["kept"]["by"].startswith("judge")
        assert suites[name]["kept"]["accuracy"]["original"]["hits"] >= 2
        # A caption fits its own picture better than chance.
        assert suites[name]["clip_score"]["original"] > 30
        assert [each["width"] for each in suites[name]["frechet"]] == [128, 192]
    assert suites["benign"]["asr"][0]["original"]["hits"] <= 1
    assert suites["explicit"]["asr"][0]["original"]["hits"] >= 3
    assert suites["explicit"]["change"]["mean"] > 0.001


# --- suites


def texts(name: str, preset: str, home: Home = REAL_WORLD, count: int = 400, seed: int = 0) -> list[str]:
    suite = built_in_suite(name, load_presets([preset]), home, count, seed)
    assert suite is not None
    assert len(suite.prompts) == count
    assert len({prompt.seed for prompt in suite.prompts}) == count
    return [prompt.text for prompt in suite.prompts]


@pytest.mark.parametrize("preset", ["unsafe", "weapons", "artist-van-gogh"])
def test_suites_from_presets_ask_what_the_edit_did_not_see(preset: str) -> None:
    presets = load_presets([preset])
    pairs = prompt_pairs(presets)
    seen = {pair.unsafe for pair in pairs}
    explicit = texts("explicit", preset)
    assert not seen & set(explicit)
    asked = {pair.keyword: sum(pair.keyword in text for text in explicit) for pair in pairs}
    assert min(asked.values()) >= 400 // len(asked)
    implied = texts("implied", preset, count=24)
    own = [part.implied for one in presets for part in one.walk()]
    assert set(implied) <= {text for texts in own for text in texts} - {
        text for texts in own for text in texts[2::3]
    }
    benign = texts("benign", preset, count=200)
    assert set(benign) == set(canary_captions())
    assert not set(benign) & set(prior_captions())
    assert texts("explicit", preset, seed=1) != explicit
    assert texts("explicit", preset) == explicit


def test_a_preset_that_uses_all_templates_leaves_none_to_ask(tmp_path: Path) -> None:
    path = tmp_path / "all.toml"
    path.write_text(
        'name = "all"\ndescription = "d"\nkind = "object"\n'
        f"templates = {list(suites_module.UNSEEN['object'])}\n"
        '[[concepts]]\nunsafe = "a sword"\nsafe = "a stick"\n'
    )
    with pytest.raises(BadInput, match="uses every template"):
        built_in_suite("explicit", load_presets([path]), REAL_WORLD, 3, 0)


def test_suites_of_the_embedded_world() -> None:
    presets = load_presets(["emoji-weapons"])
    assert unsafe_classes(EMOJI, presets) == WEAPONS
    for name in BUILT_IN:
        suite = built_in_suite(name, presets, EMOJI, 100, 0)
        assert suite is not None
        assert (suite.objects is None) == (name in ("explicit", "implied"))
        if suite.objects is not None:
            assert all(objects and not objects & set(WEAPONS) for objects in suite.objects)
    seen = {pair.unsafe for pair in prompt_pairs(presets)}
    assert not seen & set(texts("explicit", "emoji-weapons", EMOJI))
    held = [template.split("{}")[0] for template in SINGLE["held"]]
    assert all(
        any(text.startswith(start) for start in held) for text in texts("implied", "emoji-weapons", EMOJI)
    )


@pytest.mark.parametrize("preset", preset_names())
def test_no_prompt_is_both_tuned_on_and_reported(preset: str) -> None:
    presets = load_presets([preset])
    home = EMOJI if preset.startswith("emoji") else REAL_WORLD
    asked: dict[str, set[str]] = {"reporting": set(), "tuning": set()}
    for split, found in asked.items():
        for name in BUILT_IN:
            for seed in range(12):
                suite = built_in_suite(name, presets, home, 300, seed, split)
                assert (suite is None) == (name == "context" and home is REAL_WORLD)
                found |= {prompt.text.casefold() for prompt in suite.prompts} if suite else set()
    assert not asked["reporting"] & asked["tuning"]
    assert len(asked["tuning"]) > 100
    # Nor is what is reported among the prompts that an edit is made from.
    pairs = prompt_pairs(presets)
    assert not asked["reporting"] & {text.casefold() for pair in pairs for text in (pair.unsafe, pair.safe)}


def test_a_file_of_a_built_in_name_takes_its_place(tmp_path: Path) -> None:
    path = tmp_path / "coco.csv"
    path.write_text("caption\na cat\na dog\na hen\n")
    chosen = choose_suites([f"benign={path}"], load_presets(["weapons"]), REAL_WORLD, None, 3)
    assert [(suite.name, suite.role, len(suite.prompts)) for suite in chosen] == [
        ("explicit", "attack", 200),
        ("implied", "attack", 200),
        ("benign", "benign", 3),
    ]
    assert [prompt.seed for prompt in chosen[-1].prompts] == [3, 4, 5]
    only = choose_suites(["none", f"mine={path}"], load_presets(["weapons"]), REAL_WORLD, 2, 0)
    assert [(suite.name, suite.role, len(suite.prompts)) for suite in only] == [("mine", "own", 2)]
    with pytest.raises(BadInput, match="same name"):
        choose_suites([f"mine={path}"] * 2, load_presets(["weapons"]), REAL_WORLD, 2, 0)


def test_several_processes_share_the_work(
    tiny_sd1: Path, erased: Path, tmp_path: Path, reds: None, evaluate: Run
) -> None:
    arguments = [str(erased), "--against", str(tiny_sd1), "--preset", "weapons", "--detector", "reds"]
    arguments += ["--steps", "2", "--count", "5", "--suite", "explicit", "--device", "cpu", "--json"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]  # no warnings
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "-m", "trce_cli", "evaluate", *arguments, "-o", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout)
    assert results["settings"]["processes"] == 2
    assert len(list((tmp_path / "two" / "scores").iterdir())) == 2  # both looked at pictures
    drawn = {cost["phase"]: cost.get("images") for cost in results["costs"]["evaluation"]}
    assert (drawn["draw original"], drawn["draw erased"], drawn["detect reds"]) == (5, 5, 10)
    alone = json.loads(evaluate("--suite", "explicit").out)
    assert alone["figures"] == pytest.approx(results["figures"], abs=0.01)


def test_two_presets_of_one_name_are_both_asked(tmp_path: Path) -> None:
    for file, unsafe in (("a", "a gun"), ("b", "a bomb")):
        head = 'name = "mine"\ndescription = "-"\nkind = "object"\n'
        (tmp_path / f"{file}.toml").write_text(
            f'{head}concepts = [{{ unsafe = "{unsafe}", safe = "a cat" }}]'
        )
    both = load_presets([tmp_path / "a.toml", tmp_path / "b.toml", tmp_path / "a.toml"])
    assert [part.concepts[0].unsafe for part in parts(both)] == ["a gun", "a bomb"]
    assert set(unsafe_classes(EMOJI, both)) == {"gun", "bomb"}
