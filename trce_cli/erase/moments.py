"""Second moments of captions' embeddings, computed once for each text encoder and cached."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from trce_cli.errors import BadInput, TrceError
from trce_cli.families.clip.embedder import Batch, Embedder
from trce_cli.maths.closed_form import SecondMoment
from trce_cli.system.cache import cache_folder
from trce_cli.system.safetensors import SafetensorsFile
from trce_cli.system.whole import write_tensors


class Moments(NamedTuple):
    """What captions' embeddings look like: 1/K sum c c^T over K captions; float64.

    context: over their non-padding tokens (SoT to first EoT), (dim, dim). pooled: over their pooled
    embeddings, (pooled_dim, pooled_dim); None for families without one.
    """

    context: Tensor
    pooled: Tensor | None


def second_moments(
    embedder: Embedder, texts: Sequence[str], report: Callable[[int], None] = lambda prompts: None
) -> Moments:
    """The moments of captions; one that is given twice counts twice.

    Read from the cache where it holds the very same embeddings' statistics, else computed and put there.
    `report` gets the number of distinct captions as they are done.
    """
    key = embedder.fingerprint(texts)
    path = cache_folder() / "prior" / f"{key}.safetensors"
    moments = _load(path, key, embedder)
    if moments is None:
        moments = _compute(embedder, texts, report)
        _store(path, key, moments)
    else:
        report(len(set(texts)))
    return moments


def _compute(embedder: Embedder, texts: Sequence[str], report: Callable[[int], None]) -> Moments:
    times = Counter(texts)
    tokens = zip(times, embedder.tokens(times), strict=True)
    context, pooled = (SecondMoment(dim, len(texts)) for dim in (embedder.dim, embedder.pooled_dim))
    for batch in embedder.states({text: range(tokens_.eot + 1) for text, tokens_ in tokens}, report):
        context.update(batch.context, occurrences(batch, times))
        if batch.pooled is not None:
            pooled.update(batch.pooled, torch.tensor([times[text] for text in batch.rows]))
    return Moments(context.P, pooled.P if embedder.pooled_dim else None)


def occurrences(batch: Batch, times: Mapping[str, int]) -> Tensor:
    """How often each token of a batch occurs in texts that occur so many times; (tokens,)."""
    counts = torch.zeros(len(batch.context), dtype=torch.long)
    for text, rows in batch.rows.items():
        counts[rows] += times[text]
    return counts


def _load(path: Path, key: str, embedder: Embedder) -> Moments | None:
    """The cached moments, or None where there are none to be trusted: absent, damaged, of something else."""
    widths = {"context": embedder.dim} | ({"pooled": embedder.pooled_dim} if embedder.pooled_dim else {})
    try:
        file = SafetensorsFile.open(path)
        found = {name: file.read(name) for name in widths}
    except (BadInput, KeyError, OSError):
        return None
    moments = Moments(found["context"], found.get("pooled"))
    trusted = file.metadata.get("sha256") == _seal(key, moments) and all(
        moment.dtype == torch.float64
        and moment.shape == (widths[name], widths[name])
        and bool(torch.isfinite(moment).all())
        for name, moment in found.items()
    )
    return moments if trusted else None


def _store(path: Path, key: str, moments: Moments) -> None:
    tensors = {name: moment for name, moment in moments._asdict().items() if moment is not None}
    with suppress(TrceError):  # a cache that cannot be written costs time, not the edit
        write_tensors(path, tensors, {"sha256": _seal(key, moments)})


def _seal(key: str, moments: Moments) -> str:
    """A hash over content and name, so that neither a flipped bit nor a renamed entry passes."""
    digest = hashlib.sha256(key.encode())
    for moment in moments:
        if moment is not None:
            digest.update(moment.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
