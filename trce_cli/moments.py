"""Second moments of captions' embeddings, computed once for each text encoder and cached."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from trce_cli.closed_form import SecondMoment
from trce_cli.embed import Embedder
from trce_cli.errors import BadInput
from trce_cli.safetensors_file import SafetensorsFile


def second_moment(
    embedder: Embedder, texts: Sequence[str], report: Callable[[int], None] = lambda prompts: None
) -> Tensor:
    """1/K sum c c^T over the non-padding tokens (SoT to first EoT) of K captions; (dim, dim) float64.

    Read from the cache where it holds the very same embeddings' statistics, else computed and put there.
    `report` gets the number of distinct captions as they are done.
    """
    key = embedder.fingerprint(texts)
    path = cache_folder() / "prior" / f"{key}.safetensors"
    moment = _load(path, key, embedder.dim)
    if moment is None:
        moment = _compute(embedder, texts, report)
        _store(path, key, moment)
    else:
        report(len(set(texts)))
    return moment


def cache_folder() -> Path:
    """`$TRCE_CACHE`, else `trce` in the user's cache folder (which follows `$XDG_CACHE_HOME` on Linux)."""
    import platformdirs

    return Path(os.environ.get("TRCE_CACHE") or platformdirs.user_cache_path("trce"))


def _compute(embedder: Embedder, texts: Sequence[str], report: Callable[[int], None]) -> Tensor:
    times = Counter(texts)
    tokens = zip(times, embedder.tokens(times), strict=True)
    moment = SecondMoment(embedder.dim)
    for batch in embedder.states({text: range(tokens_.eot + 1) for text, tokens_ in tokens}, report):
        repeated = [states for text, states in batch.items() for _ in range(times[text])]
        moment.update(torch.cat(repeated), captions=len(repeated))
    return moment.P


def _load(path: Path, key: str, dim: int) -> Tensor | None:
    """The cached moment, or None where there is none to be trusted: absent, damaged, or of something else."""
    try:
        file = SafetensorsFile.open(path)
        moment = file.read("moment")
    except (BadInput, KeyError, OSError):
        return None
    sealed = file.metadata.get("sha256") == _seal(key, moment)
    fits = moment.dtype == torch.float64 and moment.shape == (dim, dim)
    return moment if sealed and fits and bool(torch.isfinite(moment).all()) else None


def _store(path: Path, key: str, moment: Tensor) -> None:
    from safetensors.torch import save

    with suppress(OSError):  # a cache that cannot be written costs time, not the edit
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{key}.partial-{os.getpid()}")
        try:
            partial.write_bytes(save({"moment": moment}, {"sha256": _seal(key, moment)}))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _seal(key: str, moment: Tensor) -> str:
    """A hash over content and name, so that neither a flipped bit nor a renamed entry passes."""
    content = moment.contiguous().view(-1).view(torch.uint8).numpy().data
    return hashlib.sha256(key.encode() + content).hexdigest()
