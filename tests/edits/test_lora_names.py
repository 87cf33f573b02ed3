"""LoRAs by the names that trainers give the layers of each family: which weights they change, and how."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.edits.files import open_edit
from trce_cli.errors import BadInput

UNET = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
SINGLE = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
# By family, a layer's name in a LoRA -> the weights that it changes, in the order of its rows.
NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "sd1": {
        f"lora_unet_{UNET.replace('.', '_')}": (UNET,),  # kohya
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (UNET,),
        f"lycoris_{UNET.replace('.', '_')}": (UNET,),  # SimpleTuner
        f"unet.{UNET}": (UNET,),  # diffusers
        "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k": (UNET,),  # saved by ComfyUI
        "diffusion_model.output_blocks.2.1.conv": ("up_blocks.0.upsamplers.0.conv",),
    },
    "sdxl": {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (UNET,),
        "diffusion_model.label_emb.0.0": ("add_embedding.linear_1",),
        "lora_unet_label_emb_0_0": ("add_embedding.linear_1",),
    },
    "z-image": {
        "transformer.layers.1.attention.to_q": ("layers.1.attention.to_q",),  # diffusers
        "diffusion_model.layers.1.attention.to_q": ("layers.1.attention.to_q",),  # ai-toolkit
        "lora_unet_layers_1_attention_to_out_0": ("layers.1.attention.to_out.0",),  # kohya's musubi-tuner
        "lora_unet_layers_1_attention_out": ("layers.1.attention.to_out.0",),  # the same, for ComfyUI
        "lora_unet_layers_1_attention_qkv": tuple(f"layers.1.attention.to_{each}" for each in "qkv"),
        "lora_unet_noise_refiner_0_feed_forward_w2": ("noise_refiner.0.feed_forward.w2",),
        "diffusion_model.final_layer.linear": ("all_final_layer.2-1.linear",),
        "transformer.all_final_layer.2-1.linear": ("all_final_layer.2-1.linear",),
        "cap_embedder.1": ("cap_embedder.1",),
    },
    "qwen-image": {
        "lora_unet_transformer_blocks_1_attn_to_q": ("transformer_blocks.1.attn.to_q",),  # musubi-tuner
        "diffusion_model.transformer_blocks.1.attn.to_q": ("transformer_blocks.1.attn.to_q",),
        "transformer_blocks.1.attn.to_q": ("transformer_blocks.1.attn.to_q",),  # DiffSynth
        "txt_in": ("txt_in",),
    },
    "flux": {
        "transformer.context_embedder": ("context_embedder",),
        "lora_unet_txt_in": ("context_embedder",),  # kohya
        "lora_unet_vector_in_in_layer": ("time_text_embed.text_embedder.linear_1",),
        "lora_unet_double_blocks_1_img_attn_proj": ("transformer_blocks.1.attn.to_out.0",),
        "lora_unet_double_blocks_1_img_attn_qkv": tuple(f"transformer_blocks.1.attn.to_{e}" for e in "qkv"),
        "lora_unet_double_blocks_1_txt_attn_qkv": tuple(
            f"transformer_blocks.1.attn.add_{each}_proj" for each in "qkv"
        ),
        "lora_unet_double_blocks_0_img_mod_lin": ("transformer_blocks.0.norm1.linear",),
        "lora_unet_single_blocks_1_linear1": tuple(f"single_transformer_blocks.1.{each}" for each in SINGLE),
        "lora_unet_single_blocks_1_linear2": ("single_transformer_blocks.1.proj_out",),
        "diffusion_model.single_blocks.1.linear1": tuple(f"single_transformer_blocks.1.{e}" for e in SINGLE),
        "lora_transformer_single_transformer_blocks_1_attn_to_q": (  # OneTrainer
            "single_transformer_blocks.1.attn.to_q",
        ),
    },
    "chroma": {
        "transformer.transformer_blocks.0.attn.to_q": ("transformer_blocks.0.attn.to_q",),
        "diffusion_model.double_blocks.0.img_attn.qkv": tuple(
            f"transformer_blocks.0.attn.to_{each}" for each in "qkv"
        ),
        "lora_unet_distilled_guidance_layer_layers_0_in_layer": (
            "distilled_guidance_layer.layers.0.linear_1",
        ),
    },
    "flux2-klein": {
        "diffusion_model.double_blocks.0.img_attn.qkv": tuple(  # ai-toolkit
            f"transformer_blocks.0.attn.to_{each}" for each in "qkv"
        ),
        "diffusion_model.single_blocks.0.linear1": ("single_transformer_blocks.0.attn.to_qkv_mlp_proj",),
        "lora_unet_single_blocks_0_linear2": ("single_transformer_blocks.0.attn.to_out",),
        "lora_unet_single_stream_modulation_lin": ("single_stream_modulation.linear",),
        "base_model.model.transformer_blocks.0.ff.linear_in": ("transformer_blocks.0.ff.linear_in",),
    },
    "sd3": {
        "transformer.transformer_blocks.0.attn2.to_v": ("transformer_blocks.0.attn2.to_v",),
        "lora_unet_joint_blocks_0_x_block_attn2_qkv": tuple(
            f"transformer_blocks.0.attn2.to_{each}" for each in "qkv"
        ),
        "lora_unet_joint_blocks_1_context_block_attn_qkv": tuple(
            f"transformer_blocks.1.attn.add_{each}_proj" for each in "qkv"
        ),
        "lora_unet_y_embedder_mlp_0": ("time_text_embed.text_embedder.linear_1",),
        "lora_transformer_transformer_blocks_0_ff_net_2": ("transformer_blocks.0.ff.net.2",),
    },
}  # fmt: skip
LAST_OF_SD3 = "lora_unet_joint_blocks_2_context_block"
CASES = [(family, layer) for family, names in NAMES.items() for layer in names]
RANK, ALPHA = 2, 6.0


@pytest.fixture
def checkpoint(family: str, request: pytest.FixtureRequest) -> Checkpoint:
    return open_checkpoint(str(request.getfixturevalue(f"tiny_{family}")))


def written(path: Path, layer: str, up: torch.Tensor, down: torch.Tensor, **more: torch.Tensor) -> Path:
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(ALPHA), **more}
    save_file({f"{layer}.{part}": value for part, value in tensors.items()}, path)
    return path


def factors(checkpoint: Checkpoint, keys: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    shapes = [checkpoint.shape("denoiser", f"{key}.weight") for key in keys]
    rows = [shape[0] for shape in shapes]
    convolution = shapes[0][2:]
    up = torch.randn(sum(rows), RANK, *[1 for _ in convolution])
    return up, torch.randn(RANK, *shapes[0][1:]), rows


@pytest.mark.parametrize(("family", "layer"), CASES)
def test_a_layer_changes_its_weights(family: str, layer: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    keys = NAMES[family][layer]
    up, down, rows = factors(checkpoint, keys)
    edits = open_edit(written(tmp_path / "lora.safetensors", layer, up, down)).weight_edits(checkpoint)
    assert set(edits) == {f"{key}.weight" for key in keys}
    for key, part in zip(keys, up.double().flatten(1).split(rows), strict=True):
        weight = checkpoint.read("denoiser", f"{key}.weight")
        change = (ALPHA / RANK * part @ down.double().flatten(1)).reshape(weight.shape)
        torch.testing.assert_close(edits[f"{key}.weight"](weight), weight.double() + change)


@pytest.mark.parametrize(
    ("family", "layer", "key"),
    [
        ("flux", "lora_unet_final_layer_adaLN_modulation_1", "norm_out.linear"),
        ("sd3", "diffusion_model.final_layer.adaLN_modulation.1", "norm_out.linear"),
        ("sd3", f"{LAST_OF_SD3}_adaLN_modulation_1", "transformer_blocks.2.norm1_context.linear"),
    ],
)
def test_shift_and_scale_lie_the_other_way_round(
    family: str, layer: str, key: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """In single files, whose names these are, shift comes first, in diffusers scale."""
    up, down, _ = factors(checkpoint, (key,))
    ((found, edit),) = (
        open_edit(written(tmp_path / "lora.safetensors", layer, up, down)).weight_edits(checkpoint).items()
    )
    assert found == f"{key}.weight"
    weight = checkpoint.read("denoiser", found).double()
    shift, scale = (ALPHA / RANK * up.double() @ down.double()).chunk(2)
    torch.testing.assert_close(edit(weight), weight + torch.cat([scale, shift]))


@pytest.mark.parametrize("family", ["flux"])
def test_a_dora_of_stacked_rows_rescales_each(family: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    layer = "lora_unet_single_blocks_1_linear1"
    keys = NAMES["flux"][layer]
    up, down, rows = factors(checkpoint, keys)
    path = tmp_path / "lora.safetensors"
    magnitudes = torch.rand(sum(rows), 1) + 1
    edits = open_edit(written(path, layer, up, down, dora_scale=magnitudes)).weight_edits(checkpoint)
    stacked = torch.cat([checkpoint.read("denoiser", f"{key}.weight").double() for key in keys])
    stacked += ALPHA / RANK * up.double() @ down.double()
    expected = stacked / stacked.norm(dim=1, keepdim=True) * magnitudes
    for key, part in zip(keys, expected.split(rows), strict=True):
        weight = checkpoint.read("denoiser", f"{key}.weight")
        torch.testing.assert_close(edits[f"{key}.weight"](weight), part)
    edit = open_edit(written(path, layer, up, down, dora_scale=torch.ones(1, down.shape[1])))
    with pytest.raises(BadInput, match=f"{layer}.*columns of several stacked"):
        edit.weight_edits(checkpoint)


@pytest.mark.parametrize("family", ["z-image"])
def test_one_weight_by_two_names_is_refused(family: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    tensors = {}
    for layer in ("lora_unet_layers_1_attention_qkv", "lora_unet_layers_1_attention_to_q"):
        up, down, _ = factors(checkpoint, NAMES[family].get(layer, ("layers.1.attention.to_q",)))
        tensors |= {f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down}
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(BadInput, match=r"to_q\.weight twice"):
        open_edit(tmp_path / "lora.safetensors").weight_edits(checkpoint)


@pytest.mark.parametrize("family", ["flux"])
def test_stacked_rows_of_another_size_are_refused(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    layer = "lora_unet_double_blocks_1_img_attn_qkv"
    up, down, rows = factors(checkpoint, NAMES["flux"][layer])
    edit = open_edit(written(tmp_path / "lora.safetensors", layer, up[: rows[0]], down))
    with pytest.raises(BadInput, match=f"{layer}.*is for weights of {rows[0]} x"):
        edit.weight_edits(checkpoint)
