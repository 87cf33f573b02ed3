"""What every family promises, on a tiny random checkpoint of each: see `families.base.Family`."""

from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from maps import random_map
from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.edits.lora import layers_of
from trce_cli.errors import BadInput
from trce_cli.families.base import Conditioning
from trce_cli.families.registry import FAMILIES

CPU = torch.device("cpu")
PROMPTS = ["a photo of a dog", "Two Red apples, on a plate!", "the weather is fine " * 30]


@pytest.fixture(scope="module", params=[family.key for family in FAMILIES])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    return open_checkpoint(str(request.getfixturevalue(f"tiny_{request.param}")))


@pytest.fixture(scope="module")
def module(checkpoint: Checkpoint) -> torch.nn.Module:
    return checkpoint.family.denoise(checkpoint).load(CPU)


@pytest.fixture(scope="module")
def told(checkpoint: Checkpoint) -> Conditioning:
    return checkpoint.family.denoise(checkpoint).condition(PROMPTS, CPU)


def predictions(checkpoint: Checkpoint, module: torch.nn.Module, told: Conditioning) -> torch.Tensor:
    """What the denoiser makes of one and the same latents with each prompt, all of the same length."""
    denoiser = checkpoint.family.denoise(checkpoint)
    rows = told.rows(PROMPTS)
    latents = torch.randn(denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    latents = latents.expand(len(rows), *latents.shape)
    # How long a prompt is enters by no door.
    lengths = {stream: torch.full_like(each, int(each.min())) for stream, each in told.lengths.items()}
    told = replace(told, lengths=lengths)
    with torch.no_grad():
        return denoiser.predict(module, latents, torch.full((len(rows),), 500), told.told(rows))


def test_there_is_no_other_door(checkpoint: Checkpoint, module: Any, told: Conditioning) -> None:
    """With zeros where prompts enter by its doors, the denoiser does not know the prompt."""
    open_ = predictions(checkpoint, module, told)
    assert not torch.allclose(open_[0], open_[1], rtol=1e-3)
    closed = deepcopy(module)
    for door in checkpoint.doors():
        for key in door.weights:
            closed.get_parameter(key).data[:, : door.width] = 0
    found = predictions(checkpoint, closed, told)
    for one in found[1:]:  # rows of a batch may be rounded in another order
        torch.testing.assert_close(one, found[0], rtol=1e-5, atol=1e-6)


def test_the_outline_has_the_sizes_of_what_enters(checkpoint: Checkpoint, told: Conditioning) -> None:
    outline = checkpoint.family.denoise(checkpoint).outline(PROMPTS)
    assert outline.prompts == told.prompts
    assert {name: each.shape for name, each in outline.streams.items()} == {
        name: each.shape for name, each in told.streams.items()
    }
    assert {each.device.type for each in outline.streams.values()} == {"meta"}
    assert outline.lengths.keys() == told.lengths.keys()
    assert all(torch.equal(each, told.lengths[name]) for name, each in outline.lengths.items())


class Wrapped(torch.nn.Module):
    """As Accelerate hands a denoiser back that several processes train."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def test_a_denoiser_that_is_wrapped_predicts_the_same(
    checkpoint: Checkpoint, module: Any, told: Conditioning
) -> None:
    assert torch.equal(predictions(checkpoint, Wrapped(module), told), predictions(checkpoint, module, told))


def test_every_door_is_of_a_stream_and_as_wide_as_its_embeddings(checkpoint: Checkpoint, module: Any) -> None:
    family = checkpoint.family
    streams = family.text(checkpoint, CPU, torch.float32).streams
    assert tuple(streams) == family.streams
    assert {door.stream for door in checkpoint.doors()} == set(streams)
    assert dict(streams) == dict(family.widths(module.config))
    for door in checkpoint.doors():
        assert door.width == streams[door.stream]
        assert not any(family.tuned(key) for key in door.weights)
        for key in door.weights:
            columns = checkpoint.shape("denoiser", key)[1]
            assert columns > door.width if door.wider else columns == door.width


def test_a_row_that_there_is_not_is_refused() -> None:
    told = Conditioning(("a", "b"), {"context": torch.zeros(2, 1)})
    assert told.told(torch.tensor([1, 0]))["context"].shape == (2, 1)
    for row in (2, -1, 2**62):
        with pytest.raises(BadInput, match="a prompt that there is not"):
            told.told(torch.tensor([0, row]))


def test_words_are_spread_over_the_vocabulary_and_the_same_each_time(checkpoint: Checkpoint) -> None:
    text = checkpoint.family.text(checkpoint, CPU, torch.float32)
    every, some = text.words(10**6), text.words(10)
    assert len(every) == len(set(every)) > 20
    assert 5 < len(some) <= 10
    assert list(text.words(10)) == list(some)
    assert set(some) <= set(every)
    places = [list(every).index(word) for word in some]
    assert places == sorted(places)
    assert places[-1] - places[0] > len(every) / 2
    # One token each: with a word more, a prompt says something at one position more.
    # The first prompt is there for a template's beginning, which counts once.
    content = text.content(["a", "a dog", *(f"a {word} dog" for word in some)])
    lengths = [len(where) for where in next(iter(content.values())).values()][1:]
    further = 2 if checkpoint.family.key == "sd3" else 1  # CLIP's token and T5's, one behind the other
    assert lengths == [lengths[0], *[lengths[0] + further] * len(some)]


def entering(checkpoint: Checkpoint, module: torch.nn.Module, call: Callable[[], Any]) -> dict[str, Any]:
    """By stream, all rows of embeddings that met the doors while something was called, in order."""
    family, seen = checkpoint.family, defaultdict(list)

    def note(stream: str, embeddings: torch.Tensor) -> torch.Tensor:
        seen[stream].append(embeddings.detach().float().flatten(0, -2))
        return embeddings

    def hook(_: Any, args: Any, kwargs: Any) -> Any:
        return family.mapped(args, kwargs, note)

    handle = family.entrance(module).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        call()
    finally:
        handle.remove()
    return {stream: torch.cat(rows) for stream, rows in seen.items()}


def own_rows(checkpoint: Checkpoint, module: Any, told: Conditioning, prompt: str) -> dict[str, torch.Tensor]:
    """By stream, what meets the doors of one prompt, without the padding that the denoiser never sees."""
    denoiser, row = checkpoint.family.denoise(checkpoint), told.rows([prompt])
    latents = torch.zeros(1, *denoiser.latent_shape)
    seen = entering(
        checkpoint,
        module,
        lambda: denoiser.predict(module, latents, torch.tensor([500]), told.told(row)),
    )
    counts = {stream: int(lengths[row]) for stream, lengths in told.lengths.items()}
    return {stream: rows[: counts.get(stream, len(rows))] for stream, rows in seen.items()}


@torch.no_grad()
def test_states_are_those_that_meet_the_doors(
    checkpoint: Checkpoint, module: Any, told: Conditioning
) -> None:
    """Stage 1 computes states in its own way; the denoiser's are those of the family's pipeline."""
    text = checkpoint.family.text(checkpoint, CPU, torch.float32)
    content = text.content(PROMPTS)
    for prompt in PROMPTS:
        for stream, expected in own_rows(checkpoint, module, told, prompt).items():
            tokens = told.streams[stream].ndim > 2
            wanted = {prompt: range(len(expected)) if tokens else content[stream][prompt]}
            (batch,) = text.states({stream: wanted})
            found = batch[stream].embeddings[list(batch[stream].rows[prompt])]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@torch.no_grad()
def test_what_the_denoiser_is_told_is_what_the_pipeline_tells_it(
    checkpoint: Checkpoint, module: Any, told: Conditioning
) -> None:
    family = checkpoint.family
    pipe = family.pipe(checkpoint, CPU, torch.float32)
    canvas = family.canvas(checkpoint)
    away = [""] if family.key == "flux" else None  # its guidance is embedded, unless it is told from what
    seen = entering(
        checkpoint,
        getattr(pipe, family.denoiser),
        lambda: family.draw(
            pipe, PROMPTS[:1], away, [torch.Generator().manual_seed(0)],
            steps=2, guidance_scale=2.0, width=canvas.width, height=canvas.height,
        ),
    )  # fmt: skip
    assert seen.keys() == told.streams.keys()
    for prompt in ("", PROMPTS[0]):  # it is guided away from the empty one
        for stream, expected in own_rows(checkpoint, module, told, prompt).items():
            windows = seen[stream].unfold(0, len(expected), 1).transpose(1, 2)
            nearest = (windows - expected).abs().amax((1, 2)).argmin()
            torch.testing.assert_close(windows[nearest], expected, rtol=1e-5, atol=2e-5)


def test_names_go_from_layout_to_layout_and_back(checkpoint: Checkpoint, tmp_path: Path) -> None:
    family, names = checkpoint.family, checkpoint.names
    shapes = {
        part: {key: checkpoint.shape(part, key) for key in checkpoint.keys(part)}
        for part in ("denoiser", *family.weight_parts)
    }
    places = names.to_file(shapes)
    stored = {
        place.name: place.packed_shape(shapes[part][key])
        for part, keys in places.items()
        for key, place in keys.items()
    }
    assert family.claims_file(stored) is None
    assert {part: dict(keys) for part, keys in names.from_file(stored).items()} == {
        part: dict(keys) for part, keys in places.items()
    }
    doors = {key for door in checkpoint.doors() for key in door.weights}
    known = layers_of(checkpoint)
    for key in shapes["denoiser"]:
        if layer := names.lora(key):
            assert set(known[layer]) == {key}
        else:
            assert key not in doors
    for weights in known.values():  # of a stacked tensor every row, once
        stacked = sorted((place.piece, place.span) for place in weights.values())
        ends = [piece[0] + span for piece, span in stacked]
        assert [piece[0] for piece, _ in stacked] == [0, *ends[:-1]]
        assert {piece[1] for piece, _ in stacked} == {ends[-1]}
    file = tiny.single_file(family.key, checkpoint.path, tmp_path / "model.safetensors")  # type: ignore[arg-type]
    single = open_checkpoint(str(file), config=checkpoint.path)
    assert single.family is family
    for part, keys in shapes.items():
        assert {key: single.shape(part, key) for key in single.keys(part)} == keys


def test_folding_a_map_into_the_doors_is_putting_it_on_the_live_pipeline(
    checkpoint: Checkpoint, module: Any, told: Conditioning
) -> None:
    text_map = random_map(checkpoint.path)
    assert tuple(text_map.streams) == checkpoint.family.streams
    folded, live = deepcopy(module), deepcopy(module)
    for key, edit in text_map.weight_edits(checkpoint).items():
        parameter = folded.get_parameter(key)
        parameter.data = edit(parameter.data).to(parameter.dtype)
    text_map.apply_to(SimpleNamespace(**{checkpoint.family.denoiser: live}))  # type: ignore[arg-type]
    one, other = (predictions(checkpoint, each, told) for each in (folded, live))
    assert not torch.allclose(one, predictions(checkpoint, module, told), rtol=1e-3, atol=1e-3)
    atol = 1e-5 * max(1.0, float(one.abs().max()))  # rounding, as a share of the largest
    torch.testing.assert_close(one, other, rtol=1e-4, atol=atol)
