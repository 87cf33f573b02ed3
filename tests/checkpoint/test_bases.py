"""Bases are called by name in what is handed out, and found again by their hash."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maps import random_map
from trce_cli.checkpoint.bases import INDEX, public_name
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.checkpoint.same_model import same_weights

PRESET = """
name = "blades"
description = "Blades"
kind = "object"
concepts = [{ unsafe = "a knife", safe = "a tulip" }]
"""
QUICK = ("--word-prompts", "50", "--max-collateral", "9")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRCE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "secret").mkdir()
    (tmp_path / "blades.toml").write_text(PRESET)
    monkeypatch.chdir(tmp_path / "secret")


@pytest.fixture
def base(tiny_sd1: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sd1, tmp_path / "secret/sd15"))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("emoji", "emoji"),
        ("owner/name", "owner/name"),
        ("/home/me/secret/sd15", "sd15"),
        ("~/models/sd15.safetensors", "sd15.safetensors"),
        ("/cache/models--owner--name/snapshots/0123", "owner/name"),
        ("..", None),
    ],
)
def test_names_without_folders(given: str, told: str | None) -> None:
    assert public_name(given) == (told or Path("..").resolve().name)


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text elsewhere")
def test_names_that_are_no_text_are_told_as_text(trce: Callable[..., Any], base: Path) -> None:
    odd = os.fsdecode(b"\xff")
    random_map(base).save(Path(f"m{odd}.safetensors"))
    base.rename(f"sd{odd}")
    shutil.copyfile(f"sd{odd}/vae/config.json", f"sd{odd}/vae/{odd}.json")
    shutil.copyfile(f"sd{odd}/vae/diffusion_pytorch_model.safetensors", f"sd{odd}/vae/x.{odd}.safetensors")
    done = trce("apply", f"m{odd}.safetensors", f"sd{odd}", "-o", f"out{odd}")
    assert done.status == 0, done.err
    (entry,) = json.loads(Path(f"out{odd}/trce.json").read_text("utf-8"))["history"]
    assert (entry["base"]["name"], entry["edits"][0]["file"]) == ("sd\ufffd", "m\ufffd.safetensors")
    assert "vae/x.\ufffd.safetensors" in entry["base"]["files"]
    Path(f"sd{odd}").rename("sd")
    Path(f"c{odd}.txt").write_text("\n".join(f"a dog number {i}" for i in range(120)))
    done = trce("map", "sd", "-p", "../blades.toml", "--prior", f"c{odd}.txt", *QUICK, "-o", "mapped")
    assert done.status == 0, done.err
    done = trce("generate", "sd", "a dog", "--steps", 1, "--width", 16, "--height", 16, "-o", f"p{odd}")
    assert done.status == 0, done.err


def test_nothing_handed_out_holds_a_path(trce: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    (tmp_path / "secret/mine.txt").write_text("\n".join(f"a dog number {i}" for i in range(120)))
    options = ("-p", "../blades.toml", "--prior", tmp_path / "secret/mine.txt", *QUICK)
    forms = ("--as", "diffusers", "--as", "single-file", "--as", "map")
    assert trce("map", base, *options, "-o", tmp_path / "out", *forms).status == 0
    read = [path for path in tmp_path.glob("out*/**/*") if path.suffix in (".json", ".md")]
    for path in [*read, *tmp_path.glob("out*.safetensors")]:
        assert b"secret" not in path.read_bytes(), path
    entry = json.loads((tmp_path / "out/trce.json").read_text())["history"][0]
    assert entry["base"]["name"] == "sd15"
    assert entry["settings"]["prior"] == "mine.txt"


def test_the_base_is_found_from_anywhere(
    trce: Callable[..., Any], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trce("map", "sd15", "-p", "../blades.toml", *QUICK, "-o", tmp_path / "far/mapped").status == 0
    monkeypatch.chdir("/")
    steer = (
        "steer",
        tmp_path / "far/mapped",
        "-p",
        tmp_path / "blades.toml",
        "-o",
        tmp_path / "x",
        "--dry-run",
    )

    def teacher() -> str:
        told = trce(*steer, "--json")
        return json.loads(told.out).get("teacher") or told.err

    assert teacher() == str(base)  # where it was last seen
    (tmp_path / "cache" / INDEX).write_text("not ours")
    assert "is not found" in teacher()
    moved = Path(shutil.move(base, tmp_path / "far/sd15"))
    assert teacher() == str(moved)  # beside the checkpoint
    shutil.copytree(tmp_path / "far/mapped/unet", moved / "unet", dirs_exist_ok=True)
    assert "is not the original" in teacher()


def test_what_is_done_twice_is_said(trce: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    assert trce("map", base, "-p", "../blades.toml", *QUICK, "-o", "mapped").status == 0
    twice = trce("map", "mapped", "-p", "../blades.toml", *QUICK, "-o", "again", "--dry-run")
    assert "has been without blades already" in twice.err
    (tmp_path / "other.toml").write_text(PRESET.replace("knife", "sword").replace("blades", "swords"))
    other = trce("steer", "mapped", "-p", "../other.toml", "-o", "steered", "--dry-run")
    assert "did not erase swords" in other.err
    same = trce("steer", "mapped", "-p", "../blades.toml", "-o", "steered", "--dry-run")
    assert "did not erase" not in same.err


def test_equal_weights_are_known_in_another_layout(trce: Callable[..., Any], base: Path) -> None:
    map_ = (
        "map",
        base,
        "-p",
        "../blades.toml",
        *QUICK,
        "-o",
        "out",
        "--as",
        "diffusers",
        "--as",
        "single-file",
    )
    assert trce(*map_).status == 0
    folder, file, original = (
        open_checkpoint(name, config=base) for name in ("out", "out.safetensors", str(base))
    )
    assert same_weights(folder, file)
    assert not same_weights(original, file)
