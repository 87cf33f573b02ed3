"""Work that is shared: over the processes of one launch, and over shards that know nothing of each other.

A shard does every n-th piece of the work and leaves a record in `shards/` of its output; `complete` reads the
records of all and says which are missing. Pieces are such that each is the same whoever makes it, and whole
or absent, so that a shard may be killed, started again, or run twice at once.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from trce_cli.errors import BadInput
from trce_cli.system.foreign import read_json, validated
from trce_cli.system.paths import matching
from trce_cli.system.processes import Alone
from trce_cli.system.whole import make_inside, write_json

T = TypeVar("T")

FOLDER: Final = "shards"
MAX_SHARDS: Final = 100_000
_SAME: Final = "Give all shards, and the merge, the same arguments."


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of the work, `number` from 1."""

    number: int = 1
    count: int = 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def parse_shard(text: str) -> Shard:
    """`2/8`; BadInput for anything else."""
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text.strip())
    number, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= count <= MAX_SHARDS:
        raise BadInput(
            f"{text!r} is no shard.", "Give the number, from 1, and how many there are: --shard 2/8."
        )
    return Shard(number, count)


def shard_of(environment: Mapping[str, str]) -> Shard:
    """The shard that an array job of Slurm, or else a node of SkyPilot, is to do; the whole elsewhere.

    Raises BadInput where the variables do not tell it.
    """
    if "SLURM_ARRAY_TASK_ID" in environment and "SLURM_ARRAY_TASK_COUNT" in environment:
        task, count = (_number(environment, f"SLURM_ARRAY_TASK_{name}", 1) for name in ("ID", "COUNT"))
        first = _number(environment, "SLURM_ARRAY_TASK_MIN", 1)
        step = max(_number(environment, "SLURM_ARRAY_TASK_STEP", 1), 1)
        last = _number(environment, "SLURM_ARRAY_TASK_MAX", first + (count - 1) * step)
        place, rest = divmod(task - first, step)
        if rest or not 0 <= place < count or last != first + (count - 1) * step:
            raise BadInput(
                f"The array's {count} numbers from {first} to {last} are not evenly spaced.",
                "Say which part is meant: --shard I/N.",
            )
        return Shard(place + 1, count)
    if "SKYPILOT_NODE_RANK" in environment and "SKYPILOT_NUM_NODES" in environment:
        rank = _number(environment, "SKYPILOT_NODE_RANK", 0)
        return parse_shard(f"{rank + 1}/{_number(environment, 'SKYPILOT_NUM_NODES', 1)}")
    return Shard()


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise BadInput(
            f"{name} is {text[:20]!r}, which is no number.", "Say which part is meant: --shard I/N."
        )
    return int(text)


@dataclass(frozen=True)
class Share:
    """Which part of the work this process does: of the pieces of its shard, what falls to it in its team.

    merged: outputs of shards that are joined in place of making anything.
    """

    shard: Shard = Shard()
    team: Any = Alone()  # noqa: RUF009 - it has no state
    merged: tuple[Path, ...] = ()

    @property
    def is_part(self) -> bool:
        """Whether other shards do the rest, so that nothing can be concluded here."""
        return self.shard.count > 1

    @property
    def is_alone(self) -> bool:
        """Whether no other process works with this one."""
        return not self.is_part and bool(self.team.num_processes == 1)

    @property
    def name(self) -> str:
        """Of the files that this process alone writes."""
        rank = str(self.team.process_index)
        return f"{self.shard.number}-of-{self.shard.count}-{rank}" if self.is_part else rank

    def of_shard(self, pieces: Sequence[T]) -> Sequence[T]:
        """The pieces that this shard does; all processes of its team have to call it with the same."""
        return pieces[self.shard.number - 1 :: self.shard.count]

    def mine(self, pieces: Sequence[T]) -> Sequence[T]:
        """Of the shard's pieces those of this process."""
        return pieces[self.team.process_index :: self.team.num_processes]


ALL: Final = Share()


class Cost(BaseModel):
    """What has to hold of what a phase took; further keys are kept."""

    model_config = ConfigDict(strict=True)

    phase: str
    seconds: Annotated[FiniteFloat, Field(ge=0)]
    images: Annotated[int, Field(ge=0)] = 0
    peak_memory_bytes: Annotated[int, Field(ge=0)] = 0
    peak_device_memory_bytes: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True)
class Record:
    """What a shard leaves: what its run is of, by name, and once it is done what it took."""

    shard: str
    run: dict[str, str]
    done: bool
    costs: list[dict[str, Any]]


def begin(folder: Path, share: Share, run: Mapping[str, str], force: bool = False) -> None:
    """Note that a shard has begun; BadInput where shards of another run are there, which `force` drops.

    run: digests of checkpoints, prompts, settings and whatever else the results depend on, by name.
    """
    if not share.is_part:
        return
    own = _path(folder, share.shard)
    for path, record in read(folder).items():
        if not _differs(folder, record, run, force):
            if path == own and record.done:
                return
        else:
            path.unlink(missing_ok=True)
    _write(folder, Record(str(share.shard), dict(run), False, []))


def finish(
    folder: Path, share: Share, run: Mapping[str, str], costs: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Note that a shard has done all of its pieces."""
    if share.is_part:
        _write(folder, Record(str(share.shard), dict(run), True, [dict(cost) for cost in costs]))


def complete(folders: Sequence[Path], run: Mapping[str, str]) -> list[dict[str, Any]]:
    """What all shards took, whose outputs these are, each in one folder or in any of them.

    Raises BadInput where one is of another run, and where some are missing or not done, which are named.
    """
    told: dict[Shard, Record] = {}
    for folder in folders:
        records = read(folder)
        if not records:
            raise BadInput(f"{folder} holds no shard.", "Name the --output of commands with --shard.")
        for record in records.values():
            _differs(folder, record, run, False)
            shard = parse_shard(record.shard)
            if shard not in told or record.done:
                told[shard] = record
    counts = sorted({shard.count for shard in told}, key=lambda n: -sum(s.count == n for s in told) / n)
    for count in counts:
        wanted = [Shard(number, count) for number in range(1, count + 1)]
        if all(shard in told and told[shard].done for shard in wanted):
            return [cost for shard in wanted for cost in told[shard].costs]
    wanted = [Shard(number, counts[0]) for number in range(1, counts[0] + 1)]
    absent = [shard for shard in wanted if shard not in told]
    begun = [shard for shard in wanted if shard in told and not told[shard].done]
    parts = [
        f"{what}: {', '.join(map(str, shards[:20]))}{' and others' if len(shards) > 20 else ''}"
        for what, shards in (("missing", absent), ("not finished", begun))
        if shards
    ]
    raise BadInput(f"Shards are {'; '.join(parts)}.", "Run these (again), then merge.")


def read(folder: Path) -> dict[Path, Record]:
    """The records of a folder by their files."""
    records = {}
    for path in matching(folder / FOLDER, "*.json"):
        records[path] = validated(Record, read_json(path, strict=True), str(path))
        validated(list[Cost], records[path].costs, str(path))
    return records


def _differs(folder: Path, record: Record, run: Mapping[str, str], force: bool) -> bool:
    name = next((name for name in run if record.run.get(name) != run[name]), None)
    if name is not None and not force:
        raise BadInput(f"Shard {record.shard} in {folder} is one of other {name}.", _SAME)
    return name is not None


def _path(folder: Path, shard: Shard) -> Path:
    return folder / FOLDER / f"{shard.number}-of-{shard.count}.json"


def _write(folder: Path, record: Record) -> None:
    make_inside(folder, FOLDER)
    told = {"shard": record.shard, "run": record.run, "done": record.done, "costs": record.costs}
    write_json(_path(folder, parse_shard(record.shard)), told)


def digest(value: Any) -> str:
    """SHA-256 in hex of plain JSON values; of anything else in them, what it is as text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def from_environment() -> Shard:
    """The shard that this process's environment asks for."""
    return shard_of(os.environ)
