"""Second moments of prompts' embeddings, computed once for each text encoder and cached."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Final

import torch
from torch import Tensor

from trce_cli.errors import BadInput, TrceError
from trce_cli.families.base import Shape, States, Text
from trce_cli.maths.closed_form import SecondMoment
from trce_cli.system.cache import cache_folder
from trce_cli.system.progress import Report, no_report
from trce_cli.system.safetensors import SafetensorsFile
from trce_cli.system.whole import write_tensors

# By stream, what captions' embeddings look like where they say something: 1/K sum c c^T over K captions,
# (width, width) float64.
Moments = Mapping[str, Tensor]

TRIED: Final = 96  # prompts that are encoded to see how long one takes
LONG: Final = 20.0  # seconds of one alone after which no more are tried
_MEANINGS: Final = "meanings"  # the name of a tensor in the cache beside those of the streams


@dataclass(frozen=True)
class Known:
    """What prompts look like to the encoder: the moments of all, and the meaning of each.

    meanings: (prompts, width) float32, embeddings of the main stream at the slots, averaged over a prompt's.
    """

    moments: Moments
    meanings: Tensor


def second_moments(text: Text, captions: Sequence[str], report: Report = no_report) -> Moments:
    """The moments of captions; one that is given twice counts twice.

    Read from the cache where it holds the very same embeddings' statistics, else computed and put there.
    `report` gets the number of distinct captions as they are done.
    """
    key = text.fingerprint(captions)
    found: Moments | None = _load(key, _shapes(text))
    if found is None:
        found = _compute(text, captions, report)
        _store(key, found)
    else:
        report(len(set(captions)))
    return found


def seconds_each(text: Text, captions: Sequence[str]) -> float:
    """How long it takes to encode a caption, by some of them from all over, past the cache.

    By one alone where that takes long, as T5's 512 positions do on a processor.
    """
    some = captions[:: max(1, len(captions) // TRIED)]
    text.fingerprint(some)  # reads all weights and checks them, once
    for tried in (some[:1], some):
        begun = monotonic()
        _compute(text, tried, no_report)
        each = (monotonic() - begun) / len(tried)
        if each > LONG:
            break
    return each


def is_cached(text: Text, prompts: Sequence[str], slots: Mapping[str, float] | None = None) -> bool:
    """Whether the cache has the moments of prompts, or with slots what `known_prompts` tells of them."""
    return _path(text.fingerprint(prompts) if slots is None else _known_key(text, prompts, slots)).exists()


def known_prompts(
    text: Text, prompts: Sequence[str], slots: Mapping[str, float], report: Report = no_report
) -> Known:
    """What distinct prompts look like, by the slots' weights; cached as `second_moments` is."""
    key = _known_key(text, prompts, slots)
    width = next(iter(text.streams.values()))
    expected = _shapes(text) | {_MEANINGS: (torch.float32, (len(prompts), width))}
    found = _load(key, expected)
    if found is None:
        known = look(text, prompts, slots, report)
        _store(key, {**known.moments, _MEANINGS: known.meanings})
        return known
    report(len(prompts))
    return Known({stream: found[stream] for stream in text.streams}, found[_MEANINGS])


def _known_key(text: Text, prompts: Sequence[str], slots: Mapping[str, float]) -> str:
    return hashlib.sha256(f"{text.fingerprint(prompts)} {sorted(slots.items())}".encode()).hexdigest()


def look(
    text: Text,
    prompts: Sequence[str],
    slots: Mapping[str, float],
    report: Report = no_report,
    among: Sequence[str] = (),
) -> Known:
    """As `known_prompts`, past the cache.

    among: prompts that these are some of, as whose part they count: what a family counts once for all
    prompts, such as the beginning of a template, counts with the first of all.
    """
    main = next(iter(text.streams))
    places = {
        prompt: [
            slot.unsafe for slot in text.slots(prompt, prompt, prompt, slots)[main] if slot.kind in slots
        ]
        for prompt in prompts
    }
    content = text.content(among or prompts)
    wanted = {
        stream: {
            prompt: sorted({*content[stream][prompt], *(places[prompt] if stream == main else ())})
            for prompt in prompts
        }
        for stream in text.streams
    }
    moments = {stream: SecondMoment(width, len(prompts)) for stream, width in text.streams.items()}
    meanings: dict[str, Tensor] = {}
    for batch in text.states(wanted, report):
        for stream, states in batch.items():
            times = torch.zeros(len(states.embeddings))
            for prompt, rows in states.rows.items():
                row_of = dict(zip(wanted[stream][prompt], rows, strict=True))
                times[[row_of[place] for place in content[stream][prompt]]] += 1
                if stream == main:
                    at_slots = states.embeddings[[row_of[place] for place in places[prompt]]]
                    meanings[prompt] = at_slots.mean(0)
            moments[stream].update(states.embeddings, times)
    return Known(
        {stream: moment.P for stream, moment in moments.items()},
        torch.stack([meanings[prompt] for prompt in prompts]),
    )


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


def _shapes(text: Text) -> dict[str, tuple[torch.dtype, Shape]]:
    return {stream: (torch.float64, (width, width)) for stream, width in text.streams.items()}


def _path(key: str) -> Path:
    return cache_folder() / "prior" / f"{key}.safetensors"


def _load(key: str, expected: Mapping[str, tuple[torch.dtype, Shape]]) -> dict[str, Tensor] | None:
    """What is cached, or None where there is nothing to be trusted: absent, damaged, of something else."""
    try:
        file = SafetensorsFile.open(_path(key))
        found = {name: file.read(name) for name in expected}
    except (BadInput, KeyError, OSError):
        return None
    trusted = file.metadata.get("sha256") == _seal(key, found) and all(
        (tensor.dtype, tuple(tensor.shape)) == expected[name] and bool(torch.isfinite(tensor).all())
        for name, tensor in found.items()
    )
    return found if trusted else None


def _store(key: str, found: Mapping[str, Tensor]) -> None:
    with suppress(TrceError):  # a cache that cannot be written costs time, not the edit
        write_tensors(_path(key), found, {"sha256": _seal(key, found)})


def _seal(key: str, found: Mapping[str, Tensor]) -> str:
    """A hash over content and name, so that neither a flipped bit nor a renamed entry passes."""
    digest = hashlib.sha256(key.encode())
    for tensor in found.values():
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
