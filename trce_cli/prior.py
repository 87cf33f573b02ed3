"""The prior: the benign captions that an edit has to leave alone, and their statistics, computed once."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trce_cli import captions, emoji
from trce_cli.checkpoint import Checkpoint, open_checkpoint
from trce_cli.closed_form import SecondMoment
from trce_cli.embed import Embedder
from trce_cli.errors import BadInput
from trce_cli.prompt_files import read_prompts
from trce_cli.safetensors_file import SafetensorsFile


@dataclass(frozen=True)
class Prior:
    """Benign captions to preserve, and canary captions to measure side effects on that are not among them.

    source: `built-in`, `emoji`, or the user's file. A caption that is given twice counts twice.
    """

    source: str
    captions: tuple[str, ...]
    canaries: tuple[str, ...]


def choose_prior(
    checkpoint: Checkpoint, file: Path | None = None, note: Callable[[str], None] = lambda text: None
) -> Prior:
    """The captions of the user's file where one is given, else those that fit the checkpoint.

    Raises BadInput where the file cannot be read or holds no caption.
    """
    if is_emoji(checkpoint):
        from trce_cli.emoji import world

        source, benign, canaries = "emoji", world.prior_captions(), world.canary_captions()
    else:
        source, benign, canaries = "built-in", captions.prior_captions(), captions.canary_captions()
    if file is not None:
        source, benign = str(file), [prompt.text for prompt in read_prompts(file, note=note)]
    taken = set(map(_plain, benign))
    kept = tuple(canary for canary in canaries if _plain(canary) not in taken)
    if not kept:
        raise BadInput(
            f"{file} holds every caption that side effects are measured on.",
            "Leave some of them out.",
        )
    return Prior(source, tuple(benign), kept)


def is_emoji(checkpoint: Checkpoint) -> bool:
    """Whether this is the embedded checkpoint, or one with its text encoder (an edited copy, for example)."""
    if checkpoint.name == "emoji":
        return True
    if not emoji.folder().is_dir():
        return False
    embedded = open_checkpoint("emoji")
    return (
        checkpoint.context_width == embedded.context_width
        and checkpoint.text_encoder_hash() == embedded.text_encoder_hash()
    )


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


def _plain(caption: str) -> str:
    return " ".join(caption.casefold().split())
