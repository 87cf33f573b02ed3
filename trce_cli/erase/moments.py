"""Second moments of captions' embeddings, computed once for each text encoder and cached."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from trce_cli.errors import BadInput, TrceError
from trce_cli.families.base import States, Text
from trce_cli.maths.closed_form import SecondMoment
from trce_cli.system.cache import cache_folder
from trce_cli.system.progress import Report, no_report
from trce_cli.system.safetensors import SafetensorsFile
from trce_cli.system.whole import write_tensors

# By stream, what captions' embeddings look like where they say something: 1/K sum c c^T over K captions,
# (width, width) float64.
Moments = Mapping[str, Tensor]


def second_moments(text: Text, captions: Sequence[str], report: Report = no_report) -> Moments:
    """The moments of captions; one that is given twice counts twice.

    Read from the cache where it holds the very same embeddings' statistics, else computed and put there.
    `report` gets the number of distinct captions as they are done.
    """
    key = text.fingerprint(captions)
    path = cache_folder() / "prior" / f"{key}.safetensors"
    moments = _load(path, key, text.streams)
    if moments is None:
        moments = _compute(text, captions, report)
        _store(path, key, moments)
    else:
        report(len(set(captions)))
    return moments


def _compute(text: Text, captions: Sequence[str], report: Report) -> Moments:
    times = Counter(captions)
    moments = {stream: SecondMoment(width, len(captions)) for stream, width in text.streams.items()}
    for batch in text.states(text.content(times), report):
        for stream, states in batch.items():
            moments[stream].update(states.embeddings, occurrences(states, times))
    return {stream: moment.P for stream, moment in moments.items()}


def occurrences(states: States, times: Mapping[str, int]) -> Tensor:
    """How often each embedding occurs in captions that occur so many times; (rows,)."""
    counts = torch.zeros(len(states.embeddings), dtype=torch.long)
    for caption, rows in states.rows.items():
        counts[list(rows)] += times[caption]
    return counts


def _load(path: Path, key: str, widths: Mapping[str, int]) -> Moments | None:
    """The cached moments, or None where there are none to be trusted: absent, damaged, of something else."""
    try:
        file = SafetensorsFile.open(path)
        moments = {stream: file.read(stream) for stream in widths}
    except (BadInput, KeyError, OSError):
        return None
    trusted = file.metadata.get("sha256") == _seal(key, moments) and all(
        moment.dtype == torch.float64
        and moment.shape == (widths[stream], widths[stream])
        and bool(torch.isfinite(moment).all())
        for stream, moment in moments.items()
    )
    return moments if trusted else None


def _store(path: Path, key: str, moments: Moments) -> None:
    with suppress(TrceError):  # a cache that cannot be written costs time, not the edit
        write_tensors(path, moments, {"sha256": _seal(key, moments)})


def _seal(key: str, moments: Moments) -> str:
    """A hash over content and name, so that neither a flipped bit nor a renamed entry passes."""
    digest = hashlib.sha256(key.encode())
    for moment in moments.values():
        digest.update(moment.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
