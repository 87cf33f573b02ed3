"""What has to hold of every command, whatever its input: one judgement for fuzzing, kills and faults."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from fuzz.sandbox import Done
from fuzz.world import Hollow
from trce_cli.errors import BadInput
from trce_cli.system.safetensors import SafetensorsFile

SECONDS = 10.0  # of CPU, beside what large files take
RATE = 500e6  # bytes of a large file that are copied or hashed in a second of CPU, at least
MEMORY = 500 << 20  # bytes that the command adds to what its libraries take
SENTENCE = 600  # characters of the line that tells an error, and of the hint's
STAGING = re.compile(r"\.trce-[0-9a-f]{16}")

# What may lie at an output when a command failed: runs that are taken up again, of which each file is whole.
RESUMED = {"generate", "evaluate", "tune", "steer", "attack", "run"}


class Broken(AssertionError):  # noqa: N818 - it names what happened to a promise
    """A promise that was not kept; `kind` tells alike ones from others."""

    def __init__(self, kind: str, done: Done, detail: str = "") -> None:
        last = done.err.strip().splitlines()[-1:] or [""]
        self.kind = f"{kind}: {last[0][:200] if 'Traceback' in done.err else detail[:200]}"
        super().__init__(
            f"{self.kind}\ntrce {done.args}\nstatus {done.status}\n{done.out[-500:]}\n{done.err[-6000:]}"
        )


def check(
    done: Done,
    work: Path,
    before: Mapping[str, tuple[int, ...]],
    after: Mapping[str, tuple[int, ...]],
    planted: Mapping[str, object] = {},
) -> None:
    """Raise Broken unless the command ended as it should.

    before, after: `World.outside()`. planted: names below `work` that the case itself put there.
    """  # fmt: skip
    if "Traceback" in done.err:
        raise Broken("traceback", done)
    if done.status not in (0, 1, 2):
        raise Broken("exit status", done, f"{done.status} {done.err[:100]}")
    check_speech(done)
    large = sum(each.size for each in planted.values() if isinstance(each, Hollow))
    if done.seconds > SECONDS + large / RATE:
        raise Broken("time", done, f"{done.seconds:.1f} s")
    if done.memory > MEMORY:
        raise Broken("memory", done, f"{done.memory >> 20} MB")
    if before != after:
        changed = sorted(path for path in {*before, *after} if before.get(path) != after.get(path))
        raise Broken("outside", done, ", ".join(changed))
    check_outputs(done, work / "out", planted)


def check_speech(done: Done) -> None:
    """One error in one short sentence, and nothing that a terminal would obey."""
    for text in (done.out, done.err):
        for line in text.split("\n"):
            if bad := next((letter for letter in line if not letter.isprintable()), None):
                raise Broken("raw escape", done, repr(bad))
    errors = [line for line in done.err.split("\n") if line.startswith("Error: ")]
    if len(errors) != (done.status != 0):
        raise Broken("sentences", done, f"{len(errors)} errors, status {done.status}")
    hints = [line for line in done.err.split("\n") if line.startswith("Hint: ")]
    if any(len(line) > SENTENCE for line in errors + hints):
        raise Broken("length", done, f"{max(map(len, errors + hints))} characters")


def check_outputs(done: Done, out: Path, planted: Mapping[str, object]) -> None:
    """Whole files, or none."""
    for folder, folders, names in os.walk(out):
        for name in (*folders, *names):
            path = Path(folder, name)
            relative = f"out/{path.relative_to(out).as_posix()}"
            if any(
                f"{relative}/".startswith(f"{each}/") or each.startswith(f"{relative}/") for each in planted
            ):
                continue
            if STAGING.fullmatch(name):
                raise Broken("left behind", done, relative)
            if done.status != 0 and (done.args[0] not in RESUMED or "--dry-run" in done.args):
                raise Broken("half an output", done, relative)
            if name in names and not path.is_symlink() and not _is_copy(path, planted):
                check_whole(done, path)


def _is_copy(path: Path, planted: Mapping[str, object]) -> bool:
    """Whether it is a file of the input, taken over as it is."""
    hollow = (each.size for each in planted.values() if isinstance(each, Hollow))
    full = (each for each in planted.values() if isinstance(each, bytes))
    return path.stat().st_size in hollow or any(path.read_bytes() == each for each in full)


def check_whole(done: Done, path: Path) -> None:
    """A file of ours can be read from beginning to end."""
    try:
        match path.suffix:
            case ".safetensors":
                SafetensorsFile.open(path)
            case ".json":
                json.loads(path.read_text())
            case ".jsonl":
                [json.loads(line) for line in path.read_text().split("\n") if line]
            case ".png":
                with Image.open(path) as image:
                    image.load()
    except (BadInput, ValueError, OSError, SyntaxError) as error:
        raise Broken("not whole", done, f"{path.name}: {error}") from error
