"""A conversion never drops, invents or crashes on a weight: what does not fit is refused in advance."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from maps import random_map
from trce_cli.checkpoint.checks import check_weights
from trce_cli.checkpoint.convert import write_folder, write_single_file
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.errors import BadInput

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_sd1: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sd1, tmp_path / "in"))


@pytest.fixture(scope="module")
def file(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.single_file("sd1", tiny_sd1, tmp_path_factory.mktemp("sd1") / "sd1.safetensors", ema=True)


def say(folder: Path, file: str, **said: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | said))


def change(path: Path, tensors: dict[str, torch.Tensor], without: str = "-") -> None:
    kept = {key: value for key, value in load_file(path).items() if not key.startswith(without)}
    save_file(kept | tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("unet/config.json", {"cross_attention_dim": 48}),
        ("unet/config.json", {"block_out_channels": [8, 8, 16, 32]}),
        ("unet/config.json", {"layers_per_block": 1}),
        ("unet/config.json", {"use_linear_projection": True, "in_channels": 4, "layers_per_block": 3}),
        ("vae/config.json", {"layers_per_block": 2}),
        ("vae/config.json", {"latent_channels": 8}),
    ],
)
def test_a_folder_whose_configuration_is_of_other_weights_is_not_edited(
    trce: Callable, folder: Path, tmp_path: Path, file: str, said: dict[str, Any]
) -> None:
    say(folder, file, **said)
    for output in ("out", "out.safetensors"):
        done = trce("map", folder, "-p", "weapons", "-o", tmp_path / output)
        assert done.status == 2
        assert any(told in done.err for told in ("its configuration asks for", "text encoders give"))
        assert not (tmp_path / output).exists()


def test_a_weight_that_is_missing_or_unknown_is_named(folder: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(str(folder))
    check_weights(opened, converting=True)
    change(folder / UNET, {"stray.weight": torch.zeros(2)})
    opened = open_checkpoint(str(folder))
    check_weights(opened, converting=False)  # a copy keeps it
    with pytest.raises(BadInput, match=r"stray\.weight"):
        write_single_file(opened, tmp_path / "out.safetensors", {}, {})
    change(folder / UNET, {}, without="conv_in")
    with pytest.raises(BadInput, match=r"lacks conv_in"):
        check_weights(open_checkpoint(str(folder)), converting=False)


def test_a_tensor_of_a_file_that_would_be_lost_is_named(file: Path, tiny_sd1: Path, tmp_path: Path) -> None:
    harmless = ["loss.logvar", "model_ema.num_updates", "cond_stage_model.logit_scale", "betas"]
    harmless += [
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "first_stage_model.loss.w",
        "logit_scale",
        "te.text_model.embeddings.position_ids",
        "text_encoder.logit_scale",
    ]
    path = Path(shutil.copy(file, tmp_path / "file.safetensors"))
    change(path, {name: torch.zeros(1) for name in harmless})
    opened = open_checkpoint(str(path), config=tiny_sd1)
    again = write_folder(opened, tmp_path / "out", {}, {})
    assert load_file(again / VAE).keys() == load_file(tiny_sd1 / VAE).keys()
    for name in (
        "model.diffusion_model.input_blocks.1.0.other.weight",
        "control_model.x",
        "first_stage_model.x",
    ):
        path = Path(shutil.copy(file, tmp_path / "file.safetensors"))
        change(path, {name: torch.zeros(1)})
        with pytest.raises(BadInput, match=r"which (would be lost|its configuration does not know)"):
            write_folder(open_checkpoint(str(path), config=tiny_sd1), tmp_path / "lost", {}, {})
        assert not (tmp_path / "lost").exists()


def built(tmp_path: Path, base: Path, **said: Any) -> Path:
    """A tiny SD 1.x whose U-Net is built otherwise."""
    from diffusers import UNet2DConditionModel

    folder = Path(shutil.copytree(base, tmp_path / "built"))
    config = json.loads((folder / "unet/config.json").read_text()) | said
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    return folder


def test_an_lcm_goes_both_ways_whole(tiny_sd1: Path, tmp_path: Path) -> None:
    folder = built(tmp_path, tiny_sd1, time_cond_proj_dim=6)
    say(folder, "model_index.json", _class_name="LatentConsistencyModelPipeline")
    source = open_checkpoint(str(folder))
    path = write_single_file(source, tmp_path / "lcm.safetensors", {}, {})
    again = write_folder(open_checkpoint(str(path), config=tiny_sd1), tmp_path / "out", {}, {})
    before, after = load_file(folder / UNET), load_file(again / UNET)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert json.loads((again / "unet/config.json").read_text())["time_cond_proj_dim"] == 6


def test_layers_and_depths_are_read_from_the_keys(tiny_sd1: Path, tmp_path: Path) -> None:
    folder = built(tmp_path, tiny_sd1, layers_per_block=1, transformer_layers_per_block=[2, 1, 1, 1])
    path = write_single_file(open_checkpoint(str(folder)), tmp_path / "small.safetensors", {}, {})
    opened = open_checkpoint(str(path), config=tiny_sd1)  # the base's
    assert "layers_per_block = 1" in opened.remarks[0]
    again = write_folder(opened, tmp_path / "out", {}, {})
    from diffusers import UNet2DConditionModel

    loaded, info = UNet2DConditionModel.from_pretrained(again / "unet", output_loading_info=True)
    assert not any(info.values())
    before = load_file(folder / UNET)
    assert before.keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in loaded.state_dict().items())


SSD = {
    "transformer_layers_per_block": [1, [2, 2], [2, 3]],
    "reverse_transformer_layers_per_block": [[2, 3, 3], [2, 1, 1], 1],
    "mid_block_type": "UNetMidBlock2D",
}
TINY = {
    "block_out_channels": [8, 8, 16],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 1,
    "mid_block_type": None,
}


@pytest.mark.parametrize(("base", "said"), [("sdxl", SSD), ("sd1", TINY)])
def test_a_distilled_u_net_goes_both_ways_by_its_keys(
    base: str, said: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base_folder = request.getfixturevalue(f"tiny_{base}")
    folder = built(tmp_path, base_folder, **said)
    path = write_single_file(open_checkpoint(str(folder)), tmp_path / "small.safetensors", {}, {})
    again = write_folder(open_checkpoint(str(path), config=base_folder), tmp_path / "out", {}, {})
    check_weights(open_checkpoint(str(again)), converting=True)
    from diffusers import UNet2DConditionModel

    loaded, info = UNet2DConditionModel.from_pretrained(again / "unet", output_loading_info=True)
    assert not any(info.values())
    before = load_file(folder / UNET)
    assert all(torch.equal(value, before[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize(
    "said",
    [
        {"transformer_layers_per_block": [1, 1]},
        {"transformer_layers_per_block": [1, [1], 1, 1]},
        {"reverse_transformer_layers_per_block": [[1, 1], 1, 1, 1]},
        {"layers_per_block": [1, 1, 1]},
    ],
)
def test_layers_that_do_not_fit_the_levels_are_refused(folder: Path, said: dict[str, Any]) -> None:
    say(folder, "unet/config.json", **said)
    with pytest.raises(BadInput, match=f"{next(iter(said))} must be of"):
        open_checkpoint(str(folder))


def test_a_number_in_a_name_is_no_count(tiny_sd1: Path, tmp_path: Path) -> None:
    state = load_file(tiny_sd1 / UNET) | {"down_blocks.0.resnets.99999999.conv1.weight": torch.zeros(1)}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(BadInput, match=r"resnets\.99999999"):
        check_weights(open_checkpoint(str(tmp_path / "x.safetensors"), config=tiny_sd1), converting=True)


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"edm_vpred.sigma_max": torch.zeros(0)}, "0 numbers"),
        ({"edm_vpred.sigma_max": torch.tensor(torch.nan)}, "sigma_max must be a finite number"),
        ({"edm_mean": torch.full((4,), torch.nan), "edm_std": torch.ones(4)}, "latents_mean"),
        ({"edm_mean": torch.ones(7), "edm_std": torch.ones(4)}, "latents_mean must be of 4 latents"),
        ({"edm_mean": torch.ones(4), "edm_std": torch.zeros(4)}, "latents_std"),
    ],
)
def test_what_a_file_says_of_itself_is_bounded(
    file: Path, tiny_sd1: Path, tmp_path: Path, tensors: dict[str, torch.Tensor], match: str
) -> None:
    save_file(load_file(file) | tensors, tmp_path / "x.safetensors")
    with pytest.raises(BadInput, match=match):
        open_checkpoint(str(tmp_path / "x.safetensors"), config=tiny_sd1)


def test_what_no_key_tells_asks_for_a_config(
    file: Path, tiny_sd1: Path, tmp_path: Path, trce: Callable
) -> None:
    config = Path(shutil.copytree(tiny_sd1, tmp_path / "config"))
    say(config, "unet/config.json", block_out_channels=[8, 8, 16, 32])
    done = trce("map", file, "--config", config, "-p", "weapons", "--as", "diffusers", "-o", tmp_path / "out")
    assert done.status == 2
    assert "--config" in done.err
    assert not (tmp_path / "out").exists()


def test_another_kind_of_autoencoder_has_no_single_file(folder: Path, tmp_path: Path, trce: Callable) -> None:
    from diffusers import AutoencoderTiny

    shutil.rmtree(folder / "vae")
    channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    AutoencoderTiny(**channels, **blocks).save_pretrained(folder / "vae")
    say(folder, "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    forms = ("--as", "lora", "--as", "single-file")
    done = trce("map", folder, "-p", "weapons", *forms, "-o", tmp_path / "out")
    assert (done.status, "AutoencoderTiny" in done.err) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    done = trce("map", folder, "-p", "weapons", "-o", tmp_path / "out")
    assert (done.status, "Next: trce inspect" in done.err) == (0, True), done.err
    with pytest.raises(BadInput, match="its VAE is an AutoencoderTiny"):
        open_checkpoint(str(folder)).pipe(torch.device("cpu"), torch.float32)


def test_an_inpainting_sibling_is_mapped_and_not_drawn(
    tiny_sd1: Path, tmp_path: Path, trce: Callable
) -> None:
    from diffusers import DiffusionPipeline

    folder = built(tmp_path, tiny_sd1, in_channels=9)
    say(folder, "model_index.json", _class_name="StableDiffusionInpaintPipeline")
    file = write_single_file(open_checkpoint(str(folder)), tmp_path / "in.safetensors", {}, {})
    done = trce(
        "map", file, "--config", tiny_sd1, "-p", "weapons", "--as", "diffusers", "-o", tmp_path / "out"
    )
    assert done.status == 0, done.err
    assert f"Next: trce inspect {tmp_path / 'out'}\n" in done.err  # to draw it would be refused
    assert json.loads((tmp_path / "out/unet/config.json").read_text())["in_channels"] == 9
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None)
    assert type(loaded).__name__ == "StableDiffusionInpaintPipeline"
    plain = tiny.single_file("sd1", tiny_sd1, tmp_path / "plain.safetensors")
    config = open_checkpoint(str(plain), config=folder).config
    assert config["model_index"]["_class_name"] == "StableDiffusionPipeline"
    assert trce("map", folder, "-p", "weapons", "-o", tmp_path / "copy").status == 0
    before, after = load_file(tmp_path / "copy" / UNET), load_file(tmp_path / "out" / UNET)
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    for command in (("generate", folder, "a dog"), ("steer", folder, "-p", "weapons")):
        done = trce(*command, "-o", tmp_path / f"no-{command[0]}")
        assert (done.status, "fills in pictures" in done.err) == (2, True)


def test_a_file_that_lacks_its_vae_is_named_with_the_config_that_has_one(
    file: Path, tiny_sd1: Path, tmp_path: Path, trce: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    weightless = shutil.ignore_patterns("*.safetensors")
    base = Path(shutil.copytree(tiny_sd1, tmp_path / "base", ignore=weightless))
    monkeypatch.setattr(
        "trce_cli.families.sd.configs.folder", lambda key: base
    )  # as the family's own, but tiny
    bare = {key: value for key, value in load_file(file).items() if not key.startswith("first_stage_model.")}
    save_file(bare, tmp_path / "bare.safetensors")
    for name, config, needed in (
        (file, [], ""),
        (tmp_path / "bare.safetensors", ["--config", tiny_sd1], f" --config {tiny_sd1}"),
    ):
        out = tmp_path / f"of-{name.stem}.safetensors"
        done = trce("map", name, *config, "-p", "weapons", "-o", out)
        assert done.status == 0, done.err
        assert done.err.endswith(f"--output {out.with_suffix('')}-images{needed}\n")
    refused = trce("generate", out, "a dog", "--steps", 2, "-o", tmp_path / "drawn")
    assert (refused.status, "holds no VAE" in refused.err) == (2, True)
    assert not (tmp_path / "drawn").exists()
    done = trce("generate", out, "a dog", "--steps", 2, *config, "-o", tmp_path / "drawn")
    assert done.status == 0, done.err


@pytest.mark.parametrize(
    "name", ["StableDiffusionControlNetPipeline", "StableDiffusionDepth2ImgPipeline", "Ours"]
)
def test_the_parts_decide_and_not_the_pipeline(
    name: str, tiny_sd1: Path, tmp_path: Path, trce: Callable
) -> None:
    folder = built(tmp_path, tiny_sd1, in_channels=5 if "Depth" in name else 4)
    say(folder, "model_index.json", _class_name=name, controlnet=["diffusers", "ControlNetModel"])
    saved = random_map(folder).save(tmp_path / "map.safetensors")
    done = trce("apply", saved, folder, "-o", tmp_path / "out")
    assert done.status == 0, done.err
    assert json.loads((tmp_path / "out/model_index.json").read_text())["_class_name"] == name
    assert "A ControlNet attends to the prompt by weights of its own" in done.err
    done = trce("generate", tmp_path / "out", "a dog", "--steps", 2, "-o", tmp_path / "drawn")
    assert (done.status, "5 channels" in done.err) == ((2, True) if "Depth" in name else (0, False)), done.err


def test_animatediff_is_edited_at_the_doors_of_texts_alone(
    tiny_sd1: Path, tmp_path: Path, trce: Callable
) -> None:
    from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel

    plain = UNet2DConditionModel.from_pretrained(tiny_sd1 / "unet")
    options = {"motion_layers_per_block": 2, "motion_num_attention_heads": 2, "motion_norm_num_groups": 4}
    adapter = MotionAdapter(block_out_channels=(8, 8, 16, 16), **options)
    folder = tmp_path / "in"
    shutil.copytree(tiny_sd1, folder)
    shutil.rmtree(folder / "unet")
    UNetMotionModel.from_unet2d(plain, adapter).save_pretrained(folder / "unet")
    say(folder, "model_index.json", _class_name="AnimateDiffPipeline", unet=["diffusers", "UNetMotionModel"])
    text_map = random_map(tiny_sd1)
    saved = text_map.save(tmp_path / "map.safetensors")
    assert trce("apply", saved, tiny_sd1, "-o", tmp_path / "plain").status == 0
    done = trce("apply", saved, folder, "-o", tmp_path / "out")
    assert done.status == 0, done.err
    wanted = load_file(tmp_path / "plain" / UNET)
    before, after = load_file(folder / UNET), load_file(tmp_path / "out" / UNET)
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed == {key for key in wanted if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    assert all(torch.equal(after[key], wanted[key]) for key in changed)
    for command in (
        ("apply", saved, folder, "-o", tmp_path / "a.safetensors"),
        ("generate", folder, "a dog", "-o", tmp_path / "b"),
    ):
        done = trce(*command)
        assert (done.status, "otion" in done.err) == (2, True), done.err


@pytest.mark.parametrize("said", [[[], "AutoencoderKL"], [], ["diffusers"], "diffusers", None])
def test_an_index_that_names_no_class_is_refused(
    folder: Path, file: Path, tmp_path: Path, said: object
) -> None:
    say(folder, "model_index.json", vae=said)
    with pytest.raises(BadInput, match=r"model_index\.json.*vae"):
        write_folder(open_checkpoint(str(file), config=folder), tmp_path / "out", {}, {})
    assert not (tmp_path / "out").exists()
