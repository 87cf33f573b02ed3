"""Weights of transformers that are not those of their configurations: nothing is written of them.

What is told by a file's own names, such as how many layers a pruned model has, is taken from there.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from maps import random_map
from trce_cli.checkpoint.open import open_checkpoint

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
PREFIX = "model.diffusion_model."
# Of each family by diffusers' names and in a single file: the blocks, a module of such a block that is no
# door, and what the configuration calls their number, the heads and their size.
FAMILIES: dict[Any, tuple[str, str, str, str, str]] = {
    "z-image": ("layers", "layers", "feed_forward.w2", "n_layers", "n_heads"),
    "qwen-image": (
        *("transformer_blocks", "transformer_blocks", "img_mlp.net.2"),
        *("num_layers", "num_attention_heads"),
    ),
    "flux": ("single_transformer_blocks", "single_blocks", "linear2", "num_single_layers", "in_channels"),
    "chroma": ("transformer_blocks", "double_blocks", "img_mlp.2", "num_layers", "approximator_layers"),
    "sd3": ("transformer_blocks", "joint_blocks", "x_block.mlp.fc2", "num_layers", "pos_embed_max_size"),
    "flux2-klein": ("transformer_blocks", "double_blocks", "img_mlp.2", "num_layers", "mlp_ratio"),
}


@pytest.fixture(params=FAMILIES, scope="module")
def family(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(f"tiny_{family}")
    return found


@pytest.fixture(scope="module")
def file(family: Any, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.single_file(family, folder, tmp_path_factory.mktemp("file") / "whole.safetensors")


@pytest.fixture
def work(folder: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the folder, and a map for it."""
    shutil.copytree(folder, tmp_path / "copy")
    random_map(folder).save(tmp_path / "map.safetensors")
    yield tmp_path
    shutil.rmtree(tmp_path)


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], Any], to: Path | None = None) -> Path:
    state = load_file(path)
    edit(state)
    save_file(state, to or path, metadata={"format": "pt"})
    return to or path


def without(start: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(state: dict[str, torch.Tensor]) -> None:
        for name in [name for name in state if name.startswith(start)]:
            del state[name]

    return edit


def say(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(trce: Callable[..., Any], work: Path, source: Path, *said: str, options: Any = ()) -> None:
    """Nothing is written, in either layout, and one sentence says why; the LoRA of a door is."""
    for output in ("out", "out.safetensors"):
        done = trce("apply", work / "map.safetensors", source, "-o", work / output, *options)
        assert done.status == 2, done.err
        assert all(each in done.err for each in said), done.err
        assert "Traceback" not in done.err
    assert not list(work.glob("*out*"))


def test_a_folder_that_lacks_a_block_or_a_tensor_is_not_edited(
    family: str, work: Path, trce: Callable[..., Any]
) -> None:
    blocks = FAMILIES[family][0]
    whole = load_file(work / "copy" / WEIGHTS)
    for start in (f"{blocks}.0.", f"{blocks}.1.", max(name for name in whole if name.startswith(blocks))):
        save_file(whole, work / "copy" / WEIGHTS, metadata={"format": "pt"})
        change(work / "copy" / WEIGHTS, without(start))
        refused(trce, work, work / "copy", "The transformer of", f"lacks {start}")


def test_a_folder_with_a_tensor_of_another_shape_is_not_edited(work: Path, trce: Callable[..., Any]) -> None:
    name = next(name for name in load_file(work / "copy" / WEIGHTS) if name.endswith(".norm_k.weight"))
    change(work / "copy" / WEIGHTS, lambda state: state.update({name: torch.zeros(len(state[name]) + 1)}))
    refused(trce, work, work / "copy", f"{name} in the transformer", "shape")


def test_a_folder_whose_configuration_is_of_another_model_is_not_edited(
    family: str, work: Path, trce: Callable[..., Any]
) -> None:
    path = work / "copy/transformer/config.json"
    whole = json.loads(path.read_text())
    count, size = FAMILIES[family][3:]
    more = {count: whole[count] + 1}
    if size == "n_heads":  # of the same numbers in other heads
        other = {"n_heads": 4, "axes_dims": [4, 2, 2]}
    elif size == "num_attention_heads":
        other = {"num_attention_heads": 4, "attention_head_dim": 8, "axes_dims_rope": [4, 2, 2]}
    else:
        other = {size: whole.get(size, 3) + 4}
    for said in (more, other):
        path.write_text(json.dumps(whole | said))
        refused(trce, work, work / "copy", "The configuration and the weights are of different models")


def test_an_autoencoder_of_other_weights_is_not_handed_on(work: Path, trce: Callable[..., Any]) -> None:
    change(work / "copy" / VAE, without("decoder.conv_out."))
    done = trce("apply", work / "map.safetensors", work / "copy", "-o", work / "out")
    assert done.status == 2
    assert "The vae of" in done.err
    assert "lacks decoder.conv_out." in done.err
    assert not (work / "out").exists()


@pytest.mark.parametrize("form", ["plain", "fp8"])
def test_a_single_file_that_lacks_something_is_not_edited(
    family: str, folder: Path, file: Path, work: Path, trce: Callable[..., Any], form: str
) -> None:
    _, blocks, module, *_ = FAMILIES[family]
    whole = load_file(file)
    if form == "fp8":
        whole = tiny.fp8_scaled(whole)
    source = work / "in.safetensors"
    save_file(whole, source, metadata={"format": "pt"})
    config = ("--config", folder)
    name = f"{PREFIX}{blocks}.0.{module}.weight"
    for edit, said in (
        (without(f"{PREFIX}{blocks}.0."), "lacks"),
        (without(name), "lacks"),
        (lambda state: state.update({name: state[name][:, 1:].contiguous()}), "shape"),
    ):
        save_file(whole, source, metadata={"format": "pt"})
        change(source, edit)
        refused(trce, work, source, said, options=config)
    save_file(whole, source, metadata={"format": "pt"})
    done = trce("apply", work / "map.safetensors", source, "-o", work / "out.safetensors", *config)
    assert done.status == 0, done.err


def test_a_pruned_file_says_how_many_layers_it_has(
    family: str, folder: Path, file: Path, work: Path, trce: Callable[..., Any]
) -> None:
    blocks, theirs, _, count, _ = FAMILIES[family]
    last = max(int(name.split(".")[1]) for name in load_file(folder / WEIGHTS) if name.startswith(blocks))
    if family == "sd3":  # whose last block is one of its own
        source = work / "pruned"
        tiny.build_sd3(source, num_layers=last)
        pruned = tiny.sd3_file(source, work / "pruned.safetensors")
    else:
        pruned = change(file, without(f"{PREFIX}{theirs}.{last}."), work / "pruned.safetensors")
    line = ("apply", work / "map.safetensors", pruned, "--config", folder, "--force")
    for output in ("out.safetensors", "out"):
        done = trce(*line, "-o", work / output, *(["--as", "diffusers"] if output == "out" else []))
        assert done.status == 0, done.err
        assert f"{count} = {last}" in done.err
    assert json.loads((work / "out/transformer/config.json").read_text())[count] == last
    again = trce("apply", work / "map.safetensors", work / "out", "-o", work / "again")
    assert again.status == 0, again.err
    assert load_file(work / "out" / WEIGHTS).keys() == open_checkpoint(str(work / "out")).keys("denoiser")


def test_what_is_packed_is_handed_on_as_it_is(
    family: str, folder: Path, file: Path, work: Path, trce: Callable[..., Any]
) -> None:
    """Weights in four bits have shapes of their own; where the door is none of them it is edited."""
    _, blocks, module, *_ = FAMILIES[family]
    name = f"{PREFIX}{blocks}.0.{module}.weight"

    def pack(state: dict[str, torch.Tensor]) -> None:
        state[name] = torch.zeros(len(state[name]), state[name].shape[1] // 2, dtype=torch.uint8)

    source = change(file, pack, work / "packed.safetensors")
    config = ("--config", folder)
    done = trce("apply", work / "map.safetensors", source, "-o", work / "out.safetensors", *config)
    assert done.status == 0, done.err
    before, after = load_file(source), load_file(work / "out.safetensors")
    assert torch.equal(before[name], after[name])
    assert before.keys() == after.keys()
    done = trce(
        *("apply", work / "map.safetensors", source, "-o", work / "out", "--as", "diffusers"),
        *config,
    )
    assert done.status == 2
    assert "shape" in done.err


@pytest.mark.parametrize("guided", [True, False])
def test_a_flux_file_says_whether_guidance_is_embedded(
    tmp_path: Path, trce: Callable[..., Any], guided: bool
) -> None:
    """The folder that --config names is the other variant's, as schnell's may be for a fine-tune of dev."""
    own, other = tmp_path / "own", tmp_path / "other"
    tiny.build_flux(own, seed=60, guidance=guided)
    tiny.build_flux(other, seed=60, guidance=not guided)
    dynamic = {"use_dynamic_shifting": not guided, "shift": 1.0 if guided else 3.0}
    say(other / "scheduler/scheduler_config.json", **dynamic)
    file = tiny.flux_file(own, tmp_path / "file.safetensors")
    found = open_checkpoint(str(file), config=other)
    assert found.config["denoiser"]["guidance_embeds"] is guided
    assert found.config["scheduler"]["use_dynamic_shifting"] is True  # dev's own, or what --config says
    assert found.config["scheduler"]["shift"] == 3.0
    assert found.family.truncated(found, [])[0] == (512 if guided else 256)
    done = trce("generate", file, "a dog", "--config", other, "--steps", 2, "-o", tmp_path / "images")
    assert done.status == 0, done.err
    random_map(other).save(tmp_path / "map.safetensors")
    line = ("apply", tmp_path / "map.safetensors", file, "--config", other, "-o", tmp_path / "out")
    done = trce(*line, "--as", "diffusers")
    assert done.status == 0, done.err
    assert "guidance" in done.err
    assert load_file(tmp_path / "out" / WEIGHTS).keys() == load_file(own / WEIGHTS).keys()
    told = json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())
    assert (told["use_dynamic_shifting"], told["shift"]) == (True, 3.0)
