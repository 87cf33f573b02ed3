"""The pictures of an evaluation: pairs of them on disk, and what detectors saw in each."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import FiniteFloat

from trce_cli.errors import BadInput
from trce_cli.evaluate.costs import phase
from trce_cli.evaluate.detectors.base import Loaded
from trce_cli.images.record import ImageRecord, load
from trce_cli.system.foreign import open_file, parse_json, read_text, validated
from trce_cli.system.paths import matching
from trce_cli.system.progress import Task
from trce_cli.system.safetensors import hash_file
from trce_cli.system.whole import appending

if TYPE_CHECKING:
    import torch

ROLES = ("original", "erased")
BATCH = 32  # pictures a detector sees at once
MAX_SCORES = 1 << 28  # bytes of a file of them

Scores = list[FiniteFloat]


@dataclass(frozen=True)
class Pair:
    """The two pictures of one prompt and seed.

    folder: of their suite. records: by role. elsewhere: the folder of a role whose pictures lie in another.
    """

    folder: Path
    records: Mapping[str, ImageRecord]
    elsewhere: Mapping[str, Path] = field(default_factory=dict)

    def path(self, role: str) -> Path:
        """Where the picture of that role lies."""
        return self.elsewhere.get(role, self.folder) / self.records[role].file


def pair_up(folder: Path, records: Sequence[ImageRecord]) -> list[Pair]:
    """The records of a suite by prompt."""
    grouped = groupby(records, key=lambda record: record.index)
    return [Pair(folder, {record.role: record for record in group}) for _, group in grouped]


def load_image(path: Path) -> np.ndarray:
    """RGB uint8 (height, width, 3)."""
    return np.asarray(load(path))


def batches(pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
    """The pairs in their order, at most half a `BATCH` at once and all of one size."""
    sized = groupby(pairs, key=lambda pair: (pair.records["erased"].width, pair.records["erased"].height))
    for _, group in sized:
        alike = list(group)
        yield from (alike[start : start + BATCH // 2] for start in range(0, len(alike), BATCH // 2))


class ScoreStore:
    """A detector's scores by the picture's SHA-256, on disk; torn lines are passed over.

    writer: names the file of this process, see `Share.name`.
    """

    def __init__(self, folder: Path, detector: Loaded, writer: str) -> None:
        self._folder = folder
        self._stem = f"{detector.name.partition(':')[0]}-{detector.fingerprint[:12]}"
        self._file = folder / f"{self._stem}-{writer}.jsonl"
        self._labels = len(detector.detector.labels)
        self._scores: dict[str, list[float]] = {}
        self.read()

    def read(self) -> None:
        """Take in what all processes have written."""
        self._scores |= self._read(self._folder)

    def take_over(self, folder: Path) -> None:
        """Take over what the detector saw in another run, whose scores are in that folder."""
        self.add({key: found for key, found in self._read(folder).items() if key not in self})

    def _read(self, folder: Path) -> dict[str, list[float]]:
        found = {}
        for path in matching(folder, f"{self._stem}-*.jsonl"):
            for line in read_text(path, MAX_SCORES, errors="replace").splitlines():
                with suppress(BadInput):
                    picture, scores = validated(tuple[str, Scores], parse_json(line, str(path)), str(path))
                    if len(scores) == self._labels:
                        found[picture] = scores
        return found

    def add(self, rows: Mapping[str, list[float]]) -> None:
        """Keep the scores of some pictures."""
        self._scores |= rows
        with appending(self._file) as file:
            file.write("\n" if is_torn(self._file) else "")
            file.writelines(json.dumps(row) + "\n" for row in rows.items())

    def __contains__(self, picture: str) -> bool:
        return picture in self._scores

    def __getitem__(self, picture: str) -> list[float]:
        return self._scores[picture]


def score_share(
    detector: Loaded,
    store: ScoreStore,
    pictures: Sequence[Path],
    device: "torch.device",
    costs: list[dict[str, Any]],
    task: Task,
) -> None:
    """Let a detector look at the pictures that it has not seen yet.

    At one after the other: what stands beside a picture would change how its scores are rounded, and so would
    a stop, or how the pictures are shared.
    """
    report = task(f"Detecting ({detector.name})", len(pictures), "images")
    seen = 0
    with phase(costs, f"detect {detector.name}", device) as cost:
        for path in pictures:
            if (key := hash_file(path)) not in store:
                (scores,) = detector.scores(load_image(path)[None]).tolist()
                store.add({key: scores})
                seen += 1
            report(1)
        cost["images"] = seen


def is_torn(path: Path) -> bool:
    """Whether the last line of a file has no end, as a kill leaves it."""
    with open_file(path) as file:
        return file.seek(0, 2) > 0 and file.seek(-1, 2) >= 0 and file.read() != b"\n"
