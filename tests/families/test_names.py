"""Key names against those of published files; whole checkpoints are compared in test_single_file.py."""

import pytest

from trce_cli.families.base import Stored
from trce_cli.families.clip.names import clip_weights, openclip_from_clip
from trce_cli.families.sd.names import (
    ema_from_ldm,
    kohya_name,
    ldm_layers_per_block,
    unet_from_ldm,
)

SD1 = {
    "input_blocks.0.0.weight": "conv_in.weight",
    "time_embed.2.bias": "time_embedding.linear_2.bias",
    "input_blocks.1.1.proj_in.weight": "down_blocks.0.attentions.0.proj_in.weight",
    "input_blocks.3.0.op.weight": "down_blocks.0.downsamplers.0.conv.weight",
    "input_blocks.4.0.skip_connection.weight": "down_blocks.1.resnets.0.conv_shortcut.weight",
    "input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight": (
        "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k.weight"
    ),
    "middle_block.0.in_layers.0.weight": "mid_block.resnets.0.norm1.weight",
    "middle_block.1.transformer_blocks.0.attn2.to_v.weight": (
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"
    ),
    "middle_block.2.out_layers.3.bias": "mid_block.resnets.1.conv2.bias",
    "output_blocks.2.1.conv.weight": "up_blocks.0.upsamplers.0.conv.weight",
    "output_blocks.5.2.conv.bias": "up_blocks.1.upsamplers.0.conv.bias",
    "output_blocks.11.0.emb_layers.1.weight": "up_blocks.3.resnets.2.time_emb_proj.weight",
    "output_blocks.11.1.transformer_blocks.0.attn2.to_out.0.weight": (
        "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0.weight"
    ),
    "out.2.weight": "conv_out.weight",
}


@pytest.mark.parametrize("key", SD1)
def test_unet_names(key: str) -> None:
    assert unet_from_ldm(key, 2) == SD1[key]


@pytest.mark.parametrize(
    "key",
    ["", "weight", "input_blocks.x.0.weight", "other.1.0.weight", "input_blocks.1.7.norm.weight", "a.1.b.c"],
)
def test_other_names_have_none(key: str) -> None:
    assert unet_from_ldm(key, 2) is None


def test_one_layer_a_block() -> None:
    assert unet_from_ldm("input_blocks.3.1.norm.weight", 1) == "down_blocks.1.attentions.0.norm.weight"
    assert unet_from_ldm("output_blocks.3.1.norm.weight", 1) == "up_blocks.1.attentions.1.norm.weight"
    assert ldm_layers_per_block(["input_blocks.2.0.op.weight", "input_blocks.4.0.op.weight"]) == 1
    assert ldm_layers_per_block([*SD1, "input_blocks.6.0.op.weight"]) == 2


def test_ema_names_have_no_dots() -> None:
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    assert ema_from_ldm(key) == "model_ema.diffusion_modelinput_blocks11transformer_blocks0attn2to_kweight"


def test_openclip_names() -> None:
    layer = "text_model.encoder.layers.22."
    block = "transformer.resblocks.22."
    assert openclip_from_clip(f"{layer}self_attn.v_proj.bias") == Stored(
        f"{block}attn.in_proj_bias", piece=(2, 3)
    )
    assert openclip_from_clip(f"{layer}mlp.fc1.weight") == Stored(f"{block}mlp.c_fc.weight")
    assert openclip_from_clip("text_projection.weight") == Stored("text_projection", transposed=True)


@pytest.mark.parametrize("projection", [False, True])
def test_clip_weights_are_those_of_transformers(projection: bool) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=3, num_attention_heads=1
    )
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)
    shapes = {
        name if name.startswith("text_") else f"text_model.{name}": tuple(parameter.shape)
        for name, parameter in model.named_parameters()
    }
    assert clip_weights(config.to_dict(), projection) == shapes


def test_kohya_names() -> None:
    key = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert kohya_name(key) == "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
