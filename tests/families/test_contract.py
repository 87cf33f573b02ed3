"""What every family promises, on a tiny random checkpoint of each: see `families.base.Family`."""

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from maps import random_map
from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.checkpoint.open import open_checkpoint
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
    """What the denoiser makes of one and the same latents with each prompt."""
    denoiser = checkpoint.family.denoise(checkpoint)
    rows = told.rows(PROMPTS)
    latents = torch.randn(denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    latents = latents.expand(len(rows), *latents.shape)
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
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


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


def test_states_are_those_that_the_denoiser_is_told(checkpoint: Checkpoint, told: Conditioning) -> None:
    """Stage 1 computes states in its own way; the denoiser's are those of the family's pipeline."""
    text = checkpoint.family.text(checkpoint, CPU, torch.float32)
    expected = told.told(told.rows(PROMPTS))
    for stream, prompts in text.content(PROMPTS).items():
        rest = expected[stream].shape[1:-1]  # of a stream of tokens: how many there are
        wanted = {prompt: range(rest[0]) for prompt in PROMPTS} if rest else prompts
        for batch in text.states({stream: wanted}):
            for prompt, rows in batch[stream].rows.items():
                found = batch[stream].embeddings[list(rows)]
                goal = expected[stream][PROMPTS.index(prompt)]
                torch.testing.assert_close(found.reshape(goal.shape), goal, rtol=1e-5, atol=2e-5)


def test_what_the_denoiser_is_told_is_what_the_pipeline_tells_it(
    checkpoint: Checkpoint, told: Conditioning
) -> None:
    pipe = checkpoint.family.pipe(checkpoint, CPU, torch.float32)
    seen: dict[str, torch.Tensor] = {}

    def note(stream: str, embeddings: torch.Tensor) -> torch.Tensor:
        seen[stream] = embeddings
        return embeddings

    hook = lambda module, args, kwargs: checkpoint.family.mapped(args, kwargs, note)  # noqa: E731
    getattr(pipe, checkpoint.family.denoiser).register_forward_pre_hook(hook, with_kwargs=True)
    canvas = checkpoint.family.canvas(checkpoint)
    generators = [torch.Generator().manual_seed(0)]
    checkpoint.family.draw(
        pipe, PROMPTS[:1], None, generators,
        steps=1, guidance_scale=2.0, width=canvas.width, height=canvas.height,
    )  # fmt: skip
    rows = told.rows(["", PROMPTS[0]])  # guided away from the empty prompt
    assert seen.keys() == told.streams.keys()
    for stream, expected in told.told(rows).items():
        torch.testing.assert_close(seen[stream].float(), expected, rtol=1e-5, atol=2e-5)


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
    layers = {name for key in shapes["denoiser"] for name in names.kohya(key)}
    doors = {key for door in checkpoint.doors() for key in door.weights}
    assert all(names.kohya(key) for key in doors)
    assert len(layers) == len({n for key in shapes["denoiser"] for n in set(names.kohya(key))})
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
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
