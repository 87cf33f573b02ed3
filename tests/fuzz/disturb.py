"""Commands that write, disturbed at one file-system event: killed, refused a call, or their input changed.

What has to hold: what a command leaves is whole or absent, whatever happens to it; run again, it ends as an
undisturbed run does; and nothing comes out that is made of an input as it was and as it became.
"""

import csv
import hashlib
import io
import json
import random
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from PIL import Image

from fuzz import oracle
from fuzz.events import other
from fuzz.kinds import DRAWN, MAP, OUT
from fuzz.sandbox import Done
from fuzz.world import STEER, World, prepared
from trce_cli.system.safetensors import SafetensorsFile

ASKED: Final = ["--against", "sd1", "-p", "preset.toml", "--detector", "reds", "--count", "1", "--steps", "1"]
ASKED_MORE: Final = ["--suite", "explicit", "--suite", "implied", "--device", "cpu"]
COMMANDS: Final[dict[str, list[str]]] = {
    "map": [*MAP, "-p", "preset.toml", "--prior", "captions.txt", *OUT],
    "map, a file": [*MAP, "-p", "preset.toml", "--prior", "captions.txt", "-o", "out/x.safetensors"],
    "apply": ["apply", "map.safetensors", "sd1", *OUT],
    "apply, a LoRA": ["apply", "map.safetensors", "sd1", "-o", "out/x.safetensors", "--as", "lora"],
    "generate": ["generate", "mapped", "a cat", "--compare", "sd1", *DRAWN, *OUT],
    "steer": [*STEER, *OUT],
    "steer, two forms": [*STEER, "--as", "lora", "--as", "single-file", *OUT],
    "evaluate": ["evaluate", "mapped", *ASKED, *ASKED_MORE, *OUT],
    "evaluate --compare": ["evaluate", "--compare", "results.json", *OUT],
    "tune": [
        *("tune", "sd1", "-p", "preset.toml", "--detector", "reds", "--clip", "clip", "--count", "1"),
        *("--steps", "1", "--trials", "2", "--prior", "captions.txt", "--device", "cpu", *OUT),
    ],
    "attack": [
        *("attack", "mapped", *ASKED, "--device", "cpu", "-o", "out/x.csv", "--attack", "unlearn-diff"),
        *("--prefix-iterations", "1", "--prefix-length", "1", "--prefix-timesteps", "1"),
    ],
    "evidence": ["evidence", "measured", "--checkpoint", "mapped", *OUT],
    "run": ["run", "recipe.toml"],
    "presets new": ["presets", "new", "out/x.toml"],
}
# What makes a further input, and where it lies.
BEFORE: Final[dict[str, tuple[str, list[str]]]] = {
    "evidence": ("measured", [*COMMANDS["evaluate"][:-1], "measured"])
}
REFUSALS: Final = ("ENOSPC", "EIO", "EMFILE", "EACCES")
# The inputs that are changed under way, by the command that reads them.
INPUTS: Final[dict[str, tuple[str, ...]]] = {
    "map": (
        "sd1/unet/diffusion_pytorch_model.safetensors",
        "sd1/text_encoder/model.safetensors",
        "preset.toml",
    ),
    "apply": ("map.safetensors", "sd1/vae/diffusion_pytorch_model.safetensors", "sd1/tokenizer/vocab.json"),
    "apply, a LoRA": ("map.safetensors", "sd1/unet/diffusion_pytorch_model.safetensors"),
    "generate": ("mapped/unet/diffusion_pytorch_model.safetensors", "sd1/text_encoder/model.safetensors"),
    "steer": (
        "mapped/unet/diffusion_pytorch_model.safetensors",
        "sd1/unet/diffusion_pytorch_model.safetensors",
    ),
    "evaluate --compare": ("results.json",),
    "evidence": ("measured/results.json", "mapped/unet/diffusion_pytorch_model.safetensors"),
}

# Keys of what differs from run to run: clocks and meters.
_METERS: Final = {
    "date",
    "seconds",
    "peak_memory_bytes",
    "costs",
    "created",
    "images_per_second",
    "seconds_a_step",
}


@dataclass(frozen=True)
class Disturbance:
    """What happens at which event; see `events.watch`."""

    command: str
    at: int
    do: str
    to: str | None = None

    @property
    def plan(self) -> dict[str, Any]:
        return {"at": self.at, "do": self.do, "to": self.to}


@dataclass
class Bench:
    """Commands of a world, and what they leave when nothing happens to them."""

    world: World
    _whole: dict[tuple[str, str, str], tuple[dict[str, Any], tuple[str, ...]]] = field(default_factory=dict)

    def undisturbed(
        self, command: str, do: str = "", changed: str = ""
    ) -> tuple[dict[str, Any], tuple[str, ...]]:
        """What it leaves, and its file-system events. do: what was done to an input before it started."""
        if command in BEFORE and not (self.world.work / BEFORE[command][0]).exists():
            self.world.make(*BEFORE[command][1])
            for name in INPUTS[command]:
                self.world.whole[name] = (self.world.work / name).read_bytes()
        if (key := (command, do, changed)) not in self._whole:
            with self.world.with_files({changed: self._after(do, changed)} if do else {}):
                self.world.run(
                    COMMANDS[command]
                )  # fills the cache, so that every further run has the same events
                self.world.clear()
                done = self.world.run(COMMANDS[command], {})
                assert do or done.status == 0, done
                self._whole[key] = essence(self.world.work / "out"), done.events
        return self._whole[key]

    def _after(self, do: str, name: str) -> bytes | None:
        """An input when it was deleted, cut or swapped."""
        content = self.world.whole[name]
        return {"delete": None, "cut": content[: len(content) // 2], "swap": other(content)}[do]

    def disturbances(self, command: str, kinds: tuple[str, ...]) -> list[Disturbance]:
        """Every one of these kinds: "kill", "refuse", "input"."""
        count = len(self.undisturbed(command)[1])
        found = []
        for at in range(1, count + 1):
            found += [Disturbance(command, at, "kill")] * ("kill" in kinds)
            found += [Disturbance(command, at, code) for code in REFUSALS if "refuse" in kinds]
            for name in INPUTS.get(command, ()) if "input" in kinds else ():
                found += [Disturbance(command, at, do, name) for do in ("delete", "cut", "swap")]
        return found

    def check(self, disturbance: Disturbance) -> str:
        """Let it happen, judge what is left, run the command again; a word on how it ended."""
        try:
            return self._check(disturbance)
        except oracle.Broken as broken:
            event = self.undisturbed(disturbance.command)[1][disturbance.at - 1]
            broken.add_note(f"{disturbance}: {event}")
            raise

    def _check(self, disturbance: Disturbance) -> str:
        world, (whole, events) = self.world, self.undisturbed(disturbance.command)
        args = COMMANDS[disturbance.command]
        files = {disturbance.to: world.whole[disturbance.to]} if disturbance.to else {}
        with world.with_files(files):
            with judging(world, disturbance, files) as before:
                done = world.run(args, disturbance.plan)
            if disturbance.do == "kill":
                if done.status != -9:
                    raise oracle.Broken("not killed", done)
            else:
                left = _left_by(world, disturbance.at, events)
                after = {name: self._after(disturbance.do, name) for name in files}
                oracle.check(done, world.work, before, before, left | after)
                if done.status == 0 and self._is_of_another(done, disturbance):
                    return "exit 0"  # the input was changed before it was first looked at
            for name, content in files.items():
                world._put(name, content)
            again = world.run(args)
            if again.status == 2 and "already" in again.err:
                pass  # it had taken its place before
            elif disturbance.do == "swap" and again.status == 2 and "was drawn with" in again.err:
                return "resumed as another"  # all that was drawn is of the other input, and says so
            elif again.status != 0:
                raise oracle.Broken("not taken up", again, again.err)
            if stale := [path for path in world.work.rglob(".*") if oracle.STAGING.fullmatch(path.name)]:
                raise oracle.Broken("left behind", again, str(stale[0]))
            if (found := essence(world.work / "out")) != whole:
                raise oracle.Broken("another output", again, difference(found, whole))
        return "killed" if disturbance.do == "kill" else f"exit {done.status}"

    def _is_of_another(self, done: Done, disturbance: Disturbance) -> bool:
        """Whether the output is of the changed input and not of the whole one; Broken where of neither."""
        found, whole = essence(self.world.work / "out"), self.undisturbed(disturbance.command)[0]
        if found == whole:
            return False
        if disturbance.to is None or found != self._of_changed(disturbance):
            raise oracle.Broken("accepted a change", done, difference(found, whole))
        return True

    def _of_changed(self, disturbance: Disturbance) -> dict[str, Any]:
        kept = self.world.work / "kept"
        (self.world.work / "out").rename(kept)
        (self.world.work / "out").mkdir()
        found = self.undisturbed(disturbance.command, disturbance.do, str(disturbance.to))[0]
        shutil.rmtree(self.world.work / "out")
        kept.rename(self.world.work / "out")
        return found


@contextmanager
def judging(world: World, disturbance: Disturbance, files: Any) -> Iterator[dict[str, tuple[int, ...]]]:
    """Raise where something outside of the outputs is another after the block, the disturbed input aside."""

    def outside() -> dict[str, tuple[int, ...]]:
        found = world.outside()
        for name in files:
            found.pop(str(world.work / name), None)
            found.pop(str((world.work / name).parent), None)
        return found

    before = outside()
    yield before
    if (after := outside()) != before:
        changed = sorted(path for path in {*before, *after} if before.get(path) != after.get(path))
        raise oracle.Broken("outside", Done([str(disturbance)], 0, "", ""), ", ".join(changed))


def _left_by(world: World, at: int, events: tuple[str, ...]) -> dict[str, object]:
    """What may be left until the next run: staging that the system refused to remove."""
    placed = max(
        (n for n, event in enumerate(events, 1) if event.startswith(("ctypes.dlsym", "os.rename"))), default=0
    )
    if at > placed or events[at - 1].startswith(("os.remove", "os.rmdir", "os.scandir", "os.listdir")):
        staging = [path for path in world.work.rglob(".*") if oracle.STAGING.fullmatch(path.name)]
        return {path.relative_to(world.work).as_posix(): None for path in staging}
    return {}


def essence(out: Path) -> dict[str, Any]:
    """All that lies in a folder by relative name, without staging, and without what clocks and meters say."""
    return {
        path.relative_to(out).as_posix(): _essence(path)
        for path in sorted(out.rglob("*"))
        if path.is_file() and not any(map(oracle.STAGING.fullmatch, path.parts))
    }


def _essence(path: Path) -> Any:
    content = path.read_bytes()
    match path.suffix:
        case ".safetensors":
            file = SafetensorsFile.open(path)
            told = {
                key: _plain(json.loads(value)) if value[:1] in "{[" else value
                for key, value in file.metadata.items()
                if not key.startswith("modelspec.date")
            }
            return told, hashlib.sha256(content[file.data_start :]).hexdigest()
        case ".json":
            try:
                told = _plain(json.loads(content))
            except ValueError:  # a copy of an input that was cut
                return hashlib.sha256(content).hexdigest()
            if path.name == "run.json":  # cards and histories, whose hashes stand there, tell the time
                for step in told["steps"].values():
                    step["outputs"] = {
                        name: {file: one for file, one in files.items() if file.endswith(".safetensors")}
                        for name, files in step["outputs"].items()
                    }
            return told
        case ".jsonl":
            return sorted(
                json.dumps(_plain(json.loads(line)), sort_keys=True) for line in content.splitlines()
            )
        case ".png":
            with Image.open(io.BytesIO(content)) as image:
                return hashlib.sha256(image.tobytes()).hexdigest(), image.info.get("trce")
        case ".csv":
            return list(csv.reader(io.StringIO(content.decode())))
        case ".html":
            return bool(content)
        case ".md":
            return re.sub(r"on \d{4}-\d\d-\d\d|: \d+ s, [\d.]+ GB", "", content.decode())
    return hashlib.sha256(content).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items() if key not in _METERS}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The first name of which they say something else, and what."""
    names = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
    return (
        f"{names[0]}: {str(found.get(names[0]))[:300]}, not {str(wanted.get(names[0]))[:300]}"
        if names
        else ""
    )


def main() -> int:
    """Try so many disturbances of each command and kind (0: all of them), and say what was found."""
    import argparse
    from time import monotonic

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("commands", nargs="*", choices=[[], *COMMANDS])
    parser.add_argument("--kinds", nargs="*", default=["kill", "refuse", "input"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world", type=Path, metavar="DIR", help="where to keep the inputs that are whole")
    asked = parser.parse_args()
    findings = 0
    with prepared(asked.world) as world:
        bench = Bench(world)
        for command in asked.commands or COMMANDS:
            for kind in asked.kinds:
                every = bench.disturbances(command, (kind,))
                count = min(asked.count or len(every), len(every))
                start, ends, seen = monotonic(), dict[str, int](), set[str]()
                for one in random.Random(asked.seed).sample(every, count):
                    try:
                        end = bench.check(one)
                    except oracle.Broken as broken:
                        end = "broken"
                        if broken.kind not in seen:
                            seen.add(broken.kind)
                            at = bench.undisturbed(command)[1][one.at - 1]
                            print(f"--- {one} at {at}: {broken}", file=sys.stderr, flush=True)
                    ends[end] = ends.get(end, 0) + 1
                if count:
                    told = ", ".join(f"{number} {end}" for end, number in sorted(ends.items()))
                    print(
                        f"{command}, {kind}: {count} of {len(every)} ({told}), {len(seen)} findings, "
                        f"{monotonic() - start:.0f} s",
                        flush=True,
                    )
                findings += len(seen)
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
