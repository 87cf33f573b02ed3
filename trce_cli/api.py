"""The Python interface: solve a map, save and load it, put it on live pipelines. See docs/api.md."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter

import torch

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.edits.map import Map
from trce_cli.erase.erasure import Erasure
from trce_cli.erase.prior import choose_prior
from trce_cli.erase.settings import choose_map_settings
from trce_cli.families.registry import FURTHER_STREAMS
from trce_cli.prompts.presets import load_presets


def solve_map(
    checkpoint: str | Path | Checkpoint,
    presets: str | Path | Sequence[str | Path],
    *,
    preserve: float | None = None,
    word_share: float | None = None,
    word_prompts: int | None = None,
    ridge: float | None = None,
    token_weights: Sequence[float] | Mapping[str, float] | None = None,
    strength: float | None = None,
    deflate: float | None = None,
    compounds: int | None = None,
    clip_skip: int | None = None,
    prior: str | Path | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    **streams: bool,
) -> Map:
    """Solve stage 1 for a checkpoint (its name, path, or opened) and presets (names or TOML files), jointly.

    Settings are those of `trce map`: what is not given the presets recommend, else the defaults. streams: a
    stream that a family has beside its main one is left alone where it is False by its name. Prompts are
    encoded on `device` in `dtype`; nothing is written but the cached statistics of the prior. The figures of
    the guards are in `map.made.history[-1]["figures"]`, with `verdicts`: an edit that ruins what was not to
    be erased is not refused here. Else raises BadInput and TrceError as `trce map` does.
    """
    start = perf_counter()
    source = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(str(checkpoint))
    names = [presets] if isinstance(presets, str | Path) else presets
    chosen = load_presets([str(name) for name in names])
    weights = tuple(token_weights) if isinstance(token_weights, list) else token_weights
    if unknown := streams.keys() - FURTHER_STREAMS:
        raise TypeError(f"solve_map() got an unexpected keyword argument {min(unknown)!r}")
    given = {
        "preserve": preserve,
        "word_share": word_share,
        "word_prompts": word_prompts,
        "ridge": ridge,
        "token_weights": weights,
        "strength": strength,
        "deflate": deflate,
        "compounds": compounds,
        "clip_skip": clip_skip,
        "without": tuple(stream for stream, mapped in streams.items() if not mapped),
    }
    settings, _ = choose_map_settings(given, chosen, source.family)
    benign = choose_prior(source, None if prior is None else Path(prior))
    erasure = Erasure(source, chosen, settings, benign, device, dtype)
    solution = erasure.solve()
    return erasure.map(solution, perf_counter() - start, source.hashes())
