"""One edit by every route (folder, single file, map, LoRA, live pipeline) draws the same pictures."""

import json
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from maps import random_map
from trce_cli import BadInput, Map, load_map
from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.edits.files import combine
from trce_cli.edits.forms import Edited
from trce_cli.edits.outputs import choose_outputs, write_outputs
from trce_cli.maths.low_rank import Size

PROMPTS = ["a photo of a knife", "two red apples on a plate"]
# Pixels are within [0, 1]. Routes differ in the order of float32 roundings alone.
SAME = 2e-4


def load(path: Path, family: str, config: Path) -> Any:
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    kind = getattr(diffusers, "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline")
    if path.is_dir():
        pipe = kind.from_pretrained(path, local_files_only=True)
    else:
        pipe = kind.from_single_file(str(path), config=str(config))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    images = pipe(
        PROMPTS, num_inference_steps=2, height=16, width=16, guidance_scale=3.0, output_type="pt",
        generator=generator,
    ).images  # fmt: skip
    return torch.as_tensor(images)


class Routes:
    """A checkpoint of a family, its single file, a map for it, and the same edit in every form."""

    def __init__(self, family: str, folder: Path, where: Path) -> None:
        self.family, self.folder = family, folder
        self.file = tiny.single_file(family, folder, where / "original.safetensors")  # type: ignore[arg-type]
        self.map = random_map(folder, seed=7)
        self.pipe = load(folder, family, folder)
        self.original = draw(self.pipe)
        self.paths: dict[str, dict[str, Path]] = {}
        self.figures: dict[str, Any] = {}
        for name, source in (("folder", folder), ("file", self.file)):
            checkpoint = open_checkpoint(str(source), config=folder)
            outputs = choose_outputs(
                checkpoint, where / f"from-{name}", ["diffusers", "single-file", "lora", "map"], energy=1.0
            )
            outputs.check(checkpoint)
            edits, text_map = combine([self.map], checkpoint)
            self.figures = write_outputs(Edited(checkpoint, edits, self.map.made, text_map), outputs)
            self.paths[name] = dict(outputs.paths)
        self.edited = draw(load(self.paths["folder"]["diffusers"], family, folder))

    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(str(self.folder))


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def routes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Routes:
    family = request.param
    return Routes(family, request.getfixturevalue(f"tiny_{family}"), tmp_path_factory.mktemp(family))


def test_the_edit_shows(routes: Routes) -> None:
    assert float((routes.edited - routes.original).abs().max()) > 20 * SAME


@pytest.mark.parametrize("source", ["folder", "file"])
@pytest.mark.parametrize("form", ["diffusers", "single-file"])
def test_every_layout_draws_the_same_whatever_it_came_from(routes: Routes, source: str, form: str) -> None:
    pipe = load(routes.paths[source][form], routes.family, routes.folder)
    torch.testing.assert_close(draw(pipe), routes.edited, rtol=0, atol=SAME)


def test_conversions_hold_the_weights_of_the_originals(routes: Routes) -> None:
    """Folder -> file has the names and values of a published file, file -> folder those of a folder."""
    ours, published = load_file(routes.paths["folder"]["single-file"]), load_file(routes.file)
    spare = {"alphas_cumprod"} | {
        key for key in published if routes.family == "sd2" and key not in ours and "cond_stage" in key
    }
    assert ours.keys() == published.keys() - spare
    direct = load_file(routes.paths["file"]["single-file"])
    assert all(torch.equal(value, direct[key]) for key, value in ours.items())
    for part in ("unet", "vae"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        one, other = (load_file(routes.paths[s]["diffusers"] / name) for s in ("folder", "file"))
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    folder = routes.paths["file"]["diffusers"]
    assert open_checkpoint(str(folder)).text_encoder_hash() == routes.map.made.text_encoder
    assert json.loads((folder / "trce.json").read_text())["history"][0]["edit"] == "map"
    assert (folder / "README.md").is_file()


def test_the_map_file_on_a_live_pipeline_draws_the_same_and_leaves_no_trace(routes: Routes) -> None:
    for source in ("folder", "file"):
        text_map = load_map(routes.paths[source]["map"])
        text_map.apply_to(routes.pipe)
        torch.testing.assert_close(draw(routes.pipe), routes.edited, rtol=0, atol=SAME)
        text_map.remove_from(routes.pipe)
        assert torch.equal(draw(routes.pipe), routes.original)


@pytest.mark.parametrize("source", ["folder", "file"])
def test_diffusers_loads_the_lora(routes: Routes, source: str) -> None:
    pytest.importorskip("peft")
    pipe = load(routes.folder, routes.family, routes.folder)
    pipe.load_lora_weights(str(routes.paths[source]["lora"]))
    torch.testing.assert_close(draw(pipe), routes.edited, rtol=0, atol=SAME)
    pipe.fuse_lora()
    state = pipe.unet.state_dict()
    checkpoint = routes.checkpoint()
    for key, edit in routes.map.weight_edits(checkpoint).items():
        wanted, got = (
            edit(checkpoint.read("denoiser", key)),
            state[key.replace(".weight", ".base_layer.weight")].double(),
        )
        error = routes.figures["truncation_error"]["weights"]["max"]
        assert float((got - wanted).norm() / wanted.norm()) <= error + 1e-6


def test_a_truncated_lora_in_diffusers_is_off_by_the_error_that_is_told(
    tiny_sd1: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    checkpoint, text_map = open_checkpoint(str(tiny_sd1)), random_map(tiny_sd1)
    outputs = choose_outputs(checkpoint, tmp_path / "lora.safetensors", ["lora"], rank=1, dtype="float16")
    edits, _ = combine([text_map], checkpoint)
    assert outputs.how.size == Size(rank=1)
    error = write_outputs(Edited(checkpoint, edits, text_map.made, text_map), outputs)["truncation_error"][
        "change"
    ]
    pipe = load(tiny_sd1, "sd1", tiny_sd1)
    pipe.load_lora_weights(str(outputs.paths["lora"]))
    pipe.fuse_lora()
    state = pipe.unet.state_dict()
    found = []
    for key, edit in edits.items():
        weight = checkpoint.read("denoiser", key).double()
        got = state[key.replace(".weight", ".base_layer.weight")].double()
        found.append(float((got - edit(weight)).norm() / (edit(weight) - weight).norm()))
    assert max(found) == pytest.approx(error["max"], rel=1e-3)
    assert sum(found) / len(found) == pytest.approx(error["mean"], rel=1e-3)


# Live pipelines


@pytest.fixture(scope="module")
def pipe(tiny_sd1: Path) -> Any:
    return load(tiny_sd1, "sd1", tiny_sd1)


def edited_picture(folder: Path, where: Path, maps: list[Map], strength: float) -> torch.Tensor:
    checkpoint = open_checkpoint(str(folder))
    outputs = choose_outputs(checkpoint, where, None)
    edits, text_map = combine(maps, checkpoint, strength)
    write_outputs(Edited(checkpoint, edits, maps[0].made, text_map), outputs)
    return draw(load(where, "sd1", folder))


def test_maps_on_a_pipeline_compose_as_on_weights_and_switch(
    pipe: Any, tiny_sd1: Path, tmp_path: Path
) -> None:
    a, b = random_map(tiny_sd1, 1), random_map(tiny_sd1, 2)
    original = draw(pipe)
    both = edited_picture(tiny_sd1, tmp_path / "both", [a, b], 0.5)
    only_b = edited_picture(tiny_sd1, tmp_path / "b", [b], 1.5)
    state = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    a.apply_to(pipe, 0.5)
    b.apply_to(pipe, 0.5)
    torch.testing.assert_close(draw(pipe), both, rtol=0, atol=SAME)
    a.remove_from(pipe)
    b.apply_to(pipe, strength=1.5)  # on it already: the strength changes
    torch.testing.assert_close(draw(pipe), only_b, rtol=0, atol=SAME)
    b.remove_from(pipe)
    b.remove_from(pipe)  # nothing to do
    assert torch.equal(draw(pipe), original)
    assert all(torch.equal(value, state[key]) for key, value in pipe.unet.state_dict().items())
    assert not pipe.unet._forward_pre_hooks


def test_ten_maps_are_switched_in_milliseconds(pipe: Any, tiny_sd1: Path) -> None:
    import time

    maps = [random_map(tiny_sd1, seed) for seed in range(10)]
    seconds = []
    for text_map in maps:
        began = time.perf_counter()
        text_map.apply_to(pipe)
        text_map.remove_from(pipe)
        seconds.append(time.perf_counter() - began)
    assert sorted(seconds)[5] < 0.01
    assert not pipe.unet._forward_pre_hooks


def test_embeddings_are_mapped_however_the_unet_is_called(pipe: Any, tiny_sd1: Path) -> None:
    text_map = random_map(tiny_sd1, 3)
    latents, time = torch.randn(1, 4, 8, 8), torch.tensor([10])
    embeddings = torch.randn(1, 5, 32)
    with torch.no_grad():
        expected = pipe.unet(
            latents, time, (embeddings.double() @ text_map.streams["context"].matrix.mT).float()
        ).sample
        text_map.apply_to(pipe)
        positional = pipe.unet(latents, time, embeddings).sample
        by_name = pipe.unet(latents, timestep=time, encoder_hidden_states=embeddings).sample
        text_map.remove_from(pipe)
        half = SimpleNamespace(unet=deepcopy(pipe.unet).to(torch.bfloat16))
        text_map.apply_to(half)  # type: ignore[arg-type]
        rough = half.unet(latents.bfloat16(), time, encoder_hidden_states=embeddings.bfloat16()).sample
    torch.testing.assert_close(positional, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(positional, by_name)
    torch.testing.assert_close(rough.float(), expected, rtol=0, atol=0.05)


def test_maps_that_do_not_fit_a_pipeline_are_refused(pipe: Any, tiny_sd1: Path, tiny_sdxl: Path) -> None:
    with pytest.raises(BadInput, match="width 64"):
        random_map(tiny_sdxl).apply_to(pipe)
    with pytest.raises(BadInput, match="strength"):
        random_map(tiny_sd1).apply_to(pipe, -1)
    with pytest.raises(BadInput, match="no unet"):
        random_map(tiny_sd1).apply_to(object())  # type: ignore[arg-type]
    assert not pipe.unet._forward_pre_hooks


def test_the_documented_examples_run(tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import re

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRCE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "my-checkpoint").symlink_to(tiny_sd1)
    text = (Path(__file__).parents[2] / "docs/api.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    assert names["erased"].images[0] != names["original"].images[0]
    assert not names["pipe"].unet._forward_pre_hooks
    assert names["weapons"].made.history[-1]["figures"]["cosine_to_safe"]
