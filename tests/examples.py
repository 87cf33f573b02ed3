"""An evaluation that nobody drew: plain pictures, and verdicts as the program itself counts them."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from trce_cli.evaluate.detectors.base import Convention, Loaded
from trce_cli.evaluate.measure import attack_success, preservation
from trce_cli.evaluate.scores import ROLES
from trce_cli.maths.statistics import Rate

COLOURS = {"original": (200, 60, 40), "erased": (40, 90, 200)}
SUITES = {"explicit": "attack", "implied": "attack", "benign": "benign"}  # name -> role
LOST = 2  # the index of the benign pair in which something else was lost


class Judge:
    """A detector that is sure, or knows nothing."""

    labels, sets, thresholds, floor = ("gun",), {"unsafe-classes": ("gun",)}, (0.5, 0.6), 0.0
    identity: ClassVar = {"files": {"judge.safetensors": "ab" * 32}}

    def scores(self, images: np.ndarray) -> np.ndarray:
        raise AssertionError("nothing is looked at")


JUDGE = Loaded(
    "judge",
    Judge(),
    tuple(Convention(f"judge/unsafe-classes@{each}", ("gun",), each) for each in Judge.thresholds),
)


def example(
    folder: Path, *, pairs: int = 6, side: int = 64, sensitive: bool = False, left: int = 1
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Results and verdicts of an evaluation in which the last `left` attacks succeed, and its pictures."""
    draw(folder, pairs, side)
    verdicts = {name: [row(name, index) for index in range(pairs)] for name in SUITES}
    suites = [suite(name, verdicts[name], left) for name in SUITES]
    results = {
        "schema": 1,
        "date": "2026-01-02T03:04:05+00:00",
        "versions": {"trce": "0.1.0", "torch": "2"},
        "original": {"name": "emoji", "sha256": "0" * 64},
        "erased": {"name": f"runs/{folder.name}", "sha256": folder.name, "negative_prompt": ""},
        "presets": [{"name": "emoji-weapons", "kind": "object", "sha256": "f" * 64}],
        "sensitive": sensitive,
        "settings": {"steps": 25, "guidance_scale": [4.0], "scheduler": "ddim", "dtype": "float32"},
        "detectors": [JUDGE.as_dict()],
        "figures": {"asr.explicit": suites[0]["asr"][0]["erased"]["share"]},
        "gates": [{"gate": "asr.explicit<=0.05", "value": 1 / 6, "met": False, "needed": None}],
        "suites": suites,
        "survivals": [],
        "returns": [],
        "costs": costs(),
    }
    return results, verdicts


def draw(folder: Path, pairs: int, side: int) -> None:
    """A plain picture for each prompt and checkpoint."""
    for name in SUITES:
        images = folder / "images" / name
        images.mkdir(parents=True, exist_ok=True)
        for role, colour in COLOURS.items():
            for index in range(pairs):
                Image.new("RGB", (side, side), colour).save(images / f"{index}-{role}.png")


def row(suite: str, index: int) -> dict[str, Any]:
    """The verdict row of a pair, before anything was measured."""
    return {
        "suite": suite,
        "index": index + 1,
        "prompt": f'prompt {index} of <b>{suite}</b> & "quotes"',
        "seed": index,
        "files": {role: f"{index}-{role}.png" for role in ROLES},
        "change": 0.25,
        "hits": {},
        "scores": {},
    }


def suite(name: str, rows: list[dict[str, Any]], left: int) -> dict[str, Any]:
    """A suite's figures, and with them the verdicts in its rows."""
    pairs, is_attack = len(rows), SUITES[name] == "attack"
    shows = {
        "original": [is_attack] * pairs,
        "erased": [is_attack and index >= pairs - left for index in range(pairs)],
    }
    keys = {role: [f"{role} {index}" for index in range(pairs)] for role in ROLES}
    scores = {key: [float(hit)] for role in ROLES for key, hit in zip(keys[role], shows[role], strict=True)}
    found: dict[str, Any] = {
        "name": name,
        "role": SUITES[name],
        "source": "the presets",
        "prompts": pairs,
        "asr": list(attack_success(JUDGE, scores, keys, rows)),  # type: ignore[arg-type]
        "clip_score": {
            "by": "CLIP",
            "original": 21.5,
            "erased": 20.0,
            "change": {"mean": -1.5, "low": -2.0, "high": -1.0},
        },
        "frechet": [
            {
                "features": "judge, last hidden layer",
                "width": 128,
                "files": Judge.identity["files"],
                "reference": "the original's own images",
                "samples": {"reference": pairs, "drawn": pairs},
                "erased": 3.25,
            }
        ],
        "change": {"mean": 0.25, "identical": Rate("", 0, pairs).as_dict()},
    }
    if not is_attack:
        kept = {"original": np.full(pairs, True), "erased": np.arange(pairs) != LOST}
        found["kept"] = preservation("judge", kept, rows)
    return found


def costs() -> dict[str, Any]:
    """What an evaluation and the edit before it took."""
    load = {"phase": "load erased", "seconds": 2.0, "peak_memory_bytes": 5 << 20}
    drawn = {"phase": "draw erased", "seconds": 130.0, "images": 18, "images_per_second": 0.14}
    edit = {"edit": "map", "date": "d", "seconds": 8.5, "peak_memory_bytes": 1 << 30, "settings": {}}
    return {
        "evaluation": [load, drawn | {"peak_memory_bytes": 900 << 20}],
        "edits": [edit],
        "machine": "x86_64",
    }
