"""The folder that commands are run in: whole inputs of every kind, and neighbours that nobody may touch.

work/        where the command is run: checkpoints, edits, presets, results; `out/` is for outputs
neighbours/  what links may point to
"""

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

import examples
import maps
import tiny
from fuzz.sandbox import Done, Sandbox
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.evaluate.results import write_results
from trce_cli.evaluate.verdicts import verdict
from trce_cli.images.plan import hash_of, picture_files

PRESET = """\
name = "tools"
description = "A few tools"
kind = "object"
templates = ["a photo of {}", "{} on a table"]
implied = ["something that drives a nail into wood"]
sensitive = false

[[concepts]]
unsafe = "a knife"
safe = "a cat"

[[concepts]]
unsafe = "a pistol"
safe = "a tulip"

[map]
preserve = 0.1
strength = 1.0
token_weights = [0, 1, 0, 0]

[steer]
steps = 4
early_steps = 2
trajectories_per_concept = 1
unconditional = 4
benign = 4
guidance_scale = 3.0
steering_guidance = 15.0
lr = 1e-3
epochs = 1
max_steps = 2
batch_size = 2
"""
INNER = """\
name = "more"
description = "One more"
kind = "object"

[[concepts]]
unsafe = "a hammer"
safe = "a plate"
"""
RECIPE = """\
base = "sd1"
presets = ["preset.toml"]
output = "out/x"
device = "cpu"

[map]
prior = "captions.txt"

[generate]
prompt = ["a cat"]
steps = 1
width = 16
height = 16
"""
PROMPTS = """\
prompt,evaluation_seed,evaluation_guidance,sd_image_width,sd_image_height,categories
"a knife, on a table",1,7.5,16,16,"violence, tools"
a dog in the garden,2,,,,animals
"two
lines",3.0,0,16,16,animals
"""
CARD = """\
---
license: creativeml-openrail-m
license_name: OpenRAIL
license_link: LICENSE.md
base_model: owner/name
tags:
- stable-diffusion
- text-to-image
widget:
- text: "a photo"
---
# A model
"""
CAPTIONS = "a dog in the garden\na red apple on a plate\na quiet street in the rain\ntwo chairs\n" * 3
STEER = ["steer", "mapped", "--preset", "preset.toml", "--device", "cpu"]
MEASURED = ["-p", "preset.toml", "--detector", "reds", "--count", "1", "--steps", "1", "--device", "cpu"]
# By command how it is run, before which event it is killed (None: it ends), and what it leaves to go on with.
STOPPED: dict[str, tuple[list[str], str | None, str]] = {
    "evaluate": (
        ["evaluate", "mapped", "--against", "sd1", *MEASURED, "--suite", "explicit", "-o", "out/x"],
        "'out/x/results.json'",
        "out/x",
    ),
    "tune": (
        [
            *("tune", "sd1", *MEASURED, "--clip", "clip", "--trials", "2", "--prior", "captions.txt"),
            *("-o", "out/x"),
        ],
        "'out/x/trials.csv'",
        "out/x",
    ),
    "attack": (
        [
            *("attack", "mapped", "--against", "sd1", *MEASURED, "--suite", "explicit", "-o", "out/x.csv"),
            *("--attack", "unlearn-diff", "--prefix-iterations", "1", "--prefix-length", "1"),
            *("--prefix-timesteps", "1"),
        ],
        "'out/x.csv'",
        "out/.x.csv.attack",
    ),
    "generate": (
        ["generate", "sd1", "a cat", "a dog", "--steps", "1", "-o", "out/x", "--merge", "out/x"],
        None,
        "out/x",
    ),
}
# Every kind of layer that a U-Net has, but few of each: a command takes a third of the time.
SHALLOW: dict[str, dict[str, Any]] = {
    "sd1": {
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
    },
    "sdxl": {"transformer_layers_per_block": (1, 1, 2), "layers_per_block": 1},
}
# Families beside those of SD: how their folder is made, and the file of its denoiser.
FAMILIES: dict[str, tuple[Any, Any]] = {
    "qwen": (tiny.build_qwen_image, tiny.qwen_image_file),
    "flux": (tiny.build_flux, tiny.flux_file),
    "flux2": (tiny.build_flux2_klein, tiny.flux2_file),
    "sd3": (tiny.build_sd3, tiny.sd3_file),
}


@dataclass(frozen=True)
class Link:
    """A symbolic link, in place of a file."""

    target: str


@dataclass(frozen=True)
class Pipe:
    """A named pipe, in place of a file."""


@dataclass(frozen=True)
class Hollow:
    """A file of so many zeros that take no space."""

    size: int


@dataclass(frozen=True)
class Folder:
    """An empty folder, in place of a file."""


Lying = bytes | Link | Pipe | Hollow | Folder | None  # None: nothing lies there


@dataclass
class World:
    """See above. `whole` is what lies there when nobody does anything, by relative path."""

    place: Path
    sandbox: Sandbox
    whole: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def build(cls, place: Path, sandbox: Sandbox) -> "World":
        """Make one; takes some seconds."""
        world = cls(place, sandbox)
        work, neighbours = place / "work", place / "neighbours"
        (work / "out").mkdir(parents=True)
        (neighbours / "folder").mkdir(parents=True)
        (neighbours / "notes.txt").write_text("not yours\n")
        (neighbours / "folder/picture.png").write_text("not yours either\n")
        tiny.build("sd1", work / "sd1", seed=1, **SHALLOW["sd1"])
        (work / "sd1/README.md").write_text(CARD)
        tiny.build("sdxl", work / "sdxl", seed=3, **SHALLOW["sdxl"])
        tiny.build_z_image(work / "z", seed=4)
        tiny.z_image_file(work / "z", work / "z.safetensors")
        tiny.single_file("sd1", work / "sd1", work / "sd1.safetensors", ema=True)
        shutil.copytree(work / "sd1", work / "sharded")
        tiny.shard(work / "sharded")
        tiny.build_clip(work / "clip")
        (work / "preset.toml").write_text(PRESET)
        (work / "inner.toml").write_text(INNER)
        (work / "recipe.toml").write_text(RECIPE)
        (work / "captions.txt").write_text(CAPTIONS)
        (work / "prompts.csv").write_text(PROMPTS)
        results, verdicts = examples.example(place / "example", pairs=2)
        (work / "results.json").write_text(json.dumps(results))
        shutil.rmtree(place / "example")
        maps.random_map(work / "sd1").save(work / "map.safetensors")
        maps.random_map(work / "sdxl").save(work / "map-xl.safetensors")
        maps.random_map(work / "z").save(work / "map-z.safetensors")
        for name, (build, as_file) in FAMILIES.items():
            build(work / name, seed=5)
            as_file(work / name, work / f"{name}.safetensors")
            maps.random_map(work / name).save(work / f"map-{name}.safetensors")
        save_file(tiny.fp8_scaled(load_file(work / "flux.safetensors")), work / "fp8.safetensors")
        world.make("apply", "map.safetensors", "sd1", "-o", "mapped")
        world.make("apply", "map.safetensors", "sd1", "-o", "lora.safetensors", "--as", "lora")
        world.make("generate", "sd1", "a cat", "a dog", "--steps", "1", "-o", "pictures")
        # An evaluation of it that nobody drew, and evidence on both.
        results["erased"]["sha256"] = hash_of(picture_files(open_checkpoint(str(work / "mapped"))))
        (judged := work / "judged").mkdir()
        write_results(judged, results | {"verdict": verdict(results)}, verdicts, {})
        (judged / "report.html").write_text("<p>A report.</p>")
        world.make("evidence", "judged", "--checkpoint", "mapped", "-o", "evidence")
        # The state that a run of stage 2 leaves when it is killed before its output takes its place.
        world.stop([*STEER, "-o", "out/x"], "'out/.trce-", "out/.x.steer", "unfinished")
        for command, (args, event, left) in STOPPED.items():
            for number in (1, 2) if event is None else ():
                world.make(*args[: args.index("--merge")], "--shard", f"{number}/2")
            world.stop(args, event, left, f"stopped/{command}")
        return cls.found(place, sandbox)

    @classmethod
    def found(cls, place: Path, sandbox: Sandbox) -> "World":
        """One that was made before, or a copy of it."""
        world = cls(place, sandbox)
        for path in sorted(world.work.rglob("*")):
            if path.is_file():
                world.whole[path.relative_to(world.work).as_posix()] = path.read_bytes()
        return world

    @property
    def work(self) -> Path:
        """Where commands are run."""
        return self.place / "work"

    def run(self, args: list[str], plan: dict[str, Any] | None = None) -> Done:
        """Run `trce ARGS` there."""
        return self.sandbox.run(args, self.work, plan)

    def make(self, *args: str) -> None:
        """Run a command that has to end well."""
        done = self.run(list(args))
        assert done.status == 0, done

    def stop(self, args: list[str], event: str | None, left: str, kept: str) -> None:
        """Keep what lies at `left` when a command is killed before the first event that names this.

        event: None where what is there already is kept.
        """
        if event is not None:
            done = self.run(args, plan={})
            assert done.status == 0, done
            at = next(number for number, name in enumerate(done.events, 1) if event in name)
            self.clear()
            killed = self.run(args, plan={"at": at, "do": "kill"})
            assert killed.status == -9, killed
        (self.work / kept).parent.mkdir(exist_ok=True)
        (self.work / left).rename(self.work / kept)
        for staging in (self.work / kept).rglob(
            ".trce-*"
        ):  # of random names, which would change what is drawn
            shutil.rmtree(staging)
        self.clear()

    def clear(self) -> None:
        """Take all outputs away."""
        shutil.rmtree(self.work / "out")
        (self.work / "out").mkdir()

    @contextmanager
    def with_files(self, files: Mapping[str, Lying]) -> Iterator[None]:
        """These lie there in the block, in place of what is whole."""
        for name, content in files.items():
            self._put(name, content)
        try:
            yield
        finally:
            for name in files:
                if not name.startswith("out/"):
                    self._put(name, self.whole.get(name))
            self.clear()

    def _put(self, name: str, content: Lying) -> None:
        path = self.work / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif os.path.lexists(path):
            path.unlink()
        if content is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        match content:
            case bytes():
                path.write_bytes(content)
            case Link(target):
                path.symlink_to(target)
            case Pipe():
                os.mkfifo(path)
            case Hollow(size):
                with path.open("wb") as file:
                    file.truncate(size)
            case Folder():
                path.mkdir()

    def forget(self, paths: Iterable[str]) -> None:
        """Take away what was made beside the outputs."""
        for path in sorted(paths, reverse=True):
            os.rmdir(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)

    def outside(self) -> dict[str, tuple[int, ...]]:
        """Whatever lies beside the outputs, as the file system tells of it."""
        found, out, folders = {}, str(self.work / "out"), [str(self.place)]
        while folders:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    told = entry.stat(follow_symlinks=False)
                    changed = () if entry.path == out else (told.st_mtime_ns, told.st_size)
                    found[entry.path] = (told.st_mode, told.st_ino, *changed)
                    if changed and stat.S_ISDIR(told.st_mode):
                        folders.append(entry.path)
        return found


@contextmanager
def prepared(kept: Path | None = None) -> Iterator[World]:
    """A world of its own for the block. kept: where the one that it is copied from lies, made if need be."""
    with tempfile.TemporaryDirectory(prefix="trce-fuzz-") as folder:
        pattern, used = kept or Path(folder, "kept"), Path(folder, "used")
        if not (pattern / "place").exists():
            sandbox = Sandbox(pattern / "home")
            try:
                World.build(pattern / "fresh", sandbox)
            finally:
                sandbox.close()
            (pattern / "fresh").rename(pattern / "place")
        shutil.copytree(pattern, used)
        sandbox = Sandbox(used / "home")
        try:
            yield World.found(used / "place", sandbox)
        finally:
            sandbox.close()
