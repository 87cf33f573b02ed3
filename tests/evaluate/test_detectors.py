"""Detectors against their libraries' own verdicts, on tiny models."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import plugins
import tiny
from trce_cli.errors import BadInput
from trce_cli.evaluate.clip import TransformersClip
from trce_cli.evaluate.detectors.base import Loaded, Request
from trce_cli.evaluate.detectors.registry import find_detectors, load_detectors, parse_threshold
from trce_cli.evaluate.detectors.safety_checker import SafetyChecker
from trce_cli.evaluate.detectors.zero_shot import ZeroShotClip
from trce_cli.prompts.presets import load_presets

CPU = torch.device("cpu")
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 24, 16, 3), np.uint8)


def request_for(preset: str = "emoji-weapons", argument: str | None = None, folder: Path = Path()) -> Request:
    original: Any = SimpleNamespace(name="emoji", config_folder=folder)
    return Request(argument, load_presets([preset]), original, CPU)


def load(names: list[str], *thresholds: str, preset: str = "emoji-weapons") -> list[Loaded]:
    parsed = [parse_threshold(text) for text in thresholds]
    wanted = request_for(preset)
    return load_detectors(names, parsed, wanted.presets, wanted.original, CPU)


def test_a_clip_model_that_lacks_a_weight_is_refused(tiny_clip: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_clip, tmp_path / "clip")
    weights = load_file(tmp_path / "clip/model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "clip/model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=r"visual_projection\.weight is missing"):
        ZeroShotClip(request_for("unsafe", str(tmp_path / "clip")))


def test_a_clip_model_that_its_library_cannot_load_is_refused(tiny_clip: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_clip, tmp_path / "clip"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"projection_dim": 7}))
    with pytest.raises(BadInput, match="cannot be loaded as a CLIP model"):
        TransformersClip(str(folder), CPU)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(BadInput, match="is not a file"):
        TransformersClip(str(folder), CPU)


def test_zero_shot_clip_is_the_models_own_softmax(tiny_clip: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    detector = ZeroShotClip(request_for("unsafe", str(tiny_clip)))
    prompts = detector.identity["label prompts"]
    assert list(prompts) == list(detector.labels)
    assert {"hate", "violence", "sexual"} < set(detector.labels)
    assert "unsafe" not in detector.labels  # it has no concepts of its own
    texts = [text for phrases in prompts.values() for text in phrases] + detector.identity["other prompts"]
    model, processor = CLIPModel.from_pretrained(tiny_clip), CLIPProcessor.from_pretrained(tiny_clip)
    inputs = processor(text=texts, images=list(IMAGES), padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        shares = model(**inputs).logits_per_image.softmax(1).numpy()
    start = 0
    for column, phrases in enumerate(prompts.values()):
        expected = shares[:, start : start + len(phrases)].sum(1)
        assert np.allclose(detector.scores(IMAGES)[:, column], expected, atol=1e-4)
        start += len(phrases)
    assert shares.std(0).max() > 1e-3  # the pictures do differ


def test_a_clip_model_in_half_precision_is_computed_in_single(tiny_clip: Path, tmp_path: Path) -> None:
    for name, dtype in (("half", torch.float16), ("single", torch.float32)):
        shutil.copytree(tiny_clip, tmp_path / name)
        round_to_half(tmp_path / name, dtype)
    half, single = (ZeroShotClip(request_for("unsafe", str(tmp_path / name))) for name in ("half", "single"))
    assert np.allclose(half.scores(IMAGES), single.scores(IMAGES), atol=1e-6)


def round_to_half(folder: Path, dtype: torch.dtype) -> None:
    """A model's weights, rounded to half precision, in files of this dtype."""
    weights = {key: value.half().to(dtype) for key, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))


def test_clip_needs_a_model_that_loads(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="needs a model"):
        ZeroShotClip(request_for())
    with pytest.raises(BadInput, match="cannot be loaded as a CLIP model"):
        TransformersClip(str(tmp_path), CPU)


def test_safety_checker_gives_its_own_verdicts(tmp_path: Path) -> None:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(vision_config={**small, "image_size": 16, "patch_size": 8}, projection_dim=8)
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(config).eval()
    for embeds in (checker.concept_embeds, checker.special_care_embeds):
        torch.nn.init.normal_(embeds)
    torch.nn.init.normal_(checker.visual_projection.weight)
    size = {"height": 16, "width": 16}
    processor = CLIPImageProcessor(size=size, crop_size=size)
    images = np.random.default_rng(1).integers(0, 256, (40, 16, 16, 3), np.uint8)
    images[::2] //= 3
    pixels = processor(images=list(images), return_tensors="pt").pixel_values
    with torch.no_grad():
        features = checker.visual_projection(checker.vision_model(pixels)[1])
        for kind, share in (("concept", 0.97), ("special_care", 0.8)):
            cosines = torch.cosine_similarity(features[:, None], getattr(checker, f"{kind}_embeds"), dim=2)
            getattr(checker, f"{kind}_embeds_weights").copy_(cosines.quantile(share, 0))
    checker.save_pretrained(tmp_path / "safety_checker")
    processor.save_pretrained(tmp_path / "feature_extractor")
    detector = SafetyChecker(request_for(folder=tmp_path))
    _, refused = checker(images=np.zeros((40, 4, 4, 3)), clip_input=pixels)
    found = (detector.scores(images) >= detector.thresholds[0]).any(1)
    assert found.tolist() == [bool(each) for each in refused]
    assert 0 < found.sum() < 40  # the test would say nothing if all were alike
    scores = []
    for dtype in (torch.float32, torch.float16):
        round_to_half(tmp_path / "safety_checker", dtype)
        scores.append(SafetyChecker(request_for(folder=tmp_path)).scores(images))
    assert np.allclose(*scores, atol=1e-6)


def test_a_checkpoint_without_safety_checker_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no safety_checker"):
        SafetyChecker(request_for(folder=tmp_path))


def test_nudenet_reads_pictures_as_files(tmp_path: Path) -> None:
    nudenet = pytest.importorskip("nudenet", reason="the optional extra `nudenet` is not installed")
    (loaded,) = load(["nudenet"], preset="sexual")
    assert [each.name.removeprefix("nudenet/") for each in loaded.conventions] == [
        f"{labels}@{threshold}"
        for threshold in (0.45, 0.6)
        for labels in ("all-exposed", "nine-label", "four-label")
    ]
    assert all(len(each.labels) in (9, 4) for each in loaded.conventions)
    ramp = np.linspace(0, 255, 96, dtype=np.uint8)
    sky = np.stack([np.broadcast_to(ramp[:, None] // 2, (96, 96))] * 2 + [np.full((96, 96), 200)], 2)
    images = np.stack([sky.astype(np.uint8), np.full((96, 96, 3), (40, 120, 60), np.uint8)])
    scores = loaded.scores(images)
    for image, row in zip(images, scores, strict=True):
        Image.fromarray(image).save(tmp_path / "a.png")
        boxes = nudenet.NudeDetector().detect(str(tmp_path / "a.png"))
        best = {
            label: max(b["score"] for b in boxes if b["class"] == label)
            for label in {b["class"] for b in boxes}
        }
        assert dict(zip(loaded.detector.labels, row, strict=True)).items() >= best.items()
        assert row.sum() == pytest.approx(sum(best.values()))
    assert not any(loaded.hits(each, scores).any() for each in loaded.conventions)


def test_nudenet_thresholds_that_change_nothing_are_refused() -> None:
    pytest.importorskip("nudenet", reason="the optional extra `nudenet` is not installed")
    with pytest.raises(BadInput, match=r"nothing below 0\.25"):
        load(["nudenet"], "nudenet=0.2")


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge with random weights."""
    from trce_cli.emoji import judge

    torch.manual_seed(0)
    save_file(judge.JudgeNetwork().state_dict(), tmp_path / "judge.safetensors")
    monkeypatch.setattr(judge, "WEIGHTS", tmp_path / "judge.safetensors")


@pytest.mark.usefixtures("judge")
def test_judge_counts_the_classes_that_the_preset_names(tmp_path: Path) -> None:
    from trce_cli.emoji.world import SUBSTANCES, WEAPONS

    preset = tmp_path / "two.toml"
    preset.write_text(
        'name = "two"\ndescription = "d"\nkind = "object"\n'
        '[[concepts]]\nunsafe = "a pistol"\nsafe = "a tulip"\n[[concepts]]\nunsafe = "x"\nsafe = "y"\n'
    )
    (both,) = load(["judge"], preset="emoji-weapons")
    assert set(both.conventions[0].labels) == set(WEAPONS)
    (one,) = load(["judge"], "0.3", "judge=0.6", preset=str(preset))
    assert [each.threshold for each in one.conventions] == [0.3, 0.6]
    assert len(one.conventions[0].labels) == 1
    (others,) = load(["judge"], preset="emoji-substances")
    assert set(others.conventions[0].labels) == set(SUBSTANCES)
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    assert one.scores(images).shape == (3, len(one.detector.labels))
    assert one.detector.identity["files"].keys() == {"judge.safetensors"}
    assert one.fingerprint == both.fingerprint  # the same scores: only the convention differs


@pytest.mark.usefixtures("judge")
def test_judge_refuses_what_it_cannot_judge() -> None:
    with pytest.raises(BadInput, match="presets name none"):
        load(["judge"], preset="sexual")
    (loaded,) = load(["judge"])
    with pytest.raises(BadInput, match="64 x 64 pixels, not of 16 x 24"):
        loaded.scores(IMAGES)


REDS = """
import numpy as np

class Reds:
    labels, sets, thresholds, floor = ("red",), {"all": ("red",)}, (0.5,), 0.0

    def __init__(self, request):
        self.identity = {"argument": request.argument}

    def scores(self, images):
        return images[..., 0].mean((1, 2))[:, None] / 255
"""


def test_other_packages_may_bring_detectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugins.install(tmp_path, REDS, monkeypatch)
    assert "reds" in find_detectors()
    (loaded,) = load(["reds:bright"])
    assert loaded.name == "reds:bright"
    assert loaded.detector.identity == {"argument": "bright"}
    reds = np.zeros((2, 4, 4, 3), np.uint8)
    reds[1, :, :, 0] = 255
    assert loaded.hits(loaded.conventions[0], loaded.scores(reds)).tolist() == [False, True]


def test_a_detector_that_gives_nonsense_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugins.install(tmp_path, REDS.replace("[:, None] / 255", "/ 0"), monkeypatch)
    (loaded,) = load(["reds"])
    with pytest.raises(BadInput, match="reds gave scores"), np.errstate(all="ignore"):
        loaded.scores(IMAGES)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: load(["nude-net"]), "no detector 'nude-net'"),
        (lambda: parse_threshold("high"), "'high'"),
        (lambda: parse_threshold("nan"), "'nan'"),
        (lambda: parse_threshold("=0.5"), "'=0.5'"),
    ],
)
def test_wrong_names_and_values_are_told(call: Callable[[], object], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        call()


@pytest.mark.usefixtures("judge")
def test_a_threshold_needs_its_detector() -> None:
    with pytest.raises(BadInput, match="'nudenet'"):
        load(["judge"], "nudenet=0.5")


def test_a_clip_model_whose_file_shrinks_does_not_end_the_process(tmp_path: Path) -> None:
    tiny.build_clip(tmp_path / "clip")
    program = (
        "import os, sys, torch\n"
        "from trce_cli.evaluate.clip import TransformersClip\n"
        "clip = TransformersClip(sys.argv[1], torch.device('cpu'))\n"
        "os.truncate(sys.argv[1] + '/model.safetensors', 0)\n"
        "assert torch.tensor(clip.texts(['a knife'])).isfinite().all()\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "clip"], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)
