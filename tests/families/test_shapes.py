"""The weights that configurations ask for are those of diffusers' modules."""

import json
from typing import Any

import pytest
import torch

from trce_cli.families.flux.family import CHROMA, FLUX
from trce_cli.families.flux2.family import FLUX2_KLEIN
from trce_cli.families.qwen_image.family import QWEN_IMAGE
from trce_cli.families.sd import configs
from trce_cli.families.sd.shapes import unet_weights
from trce_cli.families.sd3.family import SD3
from trce_cli.families.shapes import vae_weights
from trce_cli.families.z_image.family import Z_IMAGE

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "SD 1.x": ("sd1", {}),
    "SD 2.x": ("sd2", {}),
    "SDXL": ("sdxl", {}),
    "inpainting": ("sd1", {"in_channels": 9}),
    "LCM": ("sd1", {"time_cond_proj_dim": 256}),
    "fewer layers": ("sd1", {"layers_per_block": 1}),
    "other layers in each": ("sd1", {"layers_per_block": [1, 2, 3, 1]}),
    "no middle": ("sd1", {"mid_block_type": None}),
    "depths by layer": (
        "sdxl",
        {
            "transformer_layers_per_block": [[0, 0], [2, 2], [4, 4]],
            "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        },
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_u_net_has_these_weights(variant: str) -> None:
    from diffusers import UNet2DConditionModel

    family, said = VARIANTS[variant]
    config = {**configs.tables(family)["denoiser"], **said}
    with torch.device("meta"):
        module = UNet2DConditionModel.from_config(config)
    assert unet_weights(config) == {key: tuple(value.shape) for key, value in module.state_dict().items()}


@pytest.mark.parametrize("said", [{}, {"use_quant_conv": False}, {"mid_block_add_attention": False}])
def test_an_autoencoder_has_these_weights(said: dict[str, Any]) -> None:
    from diffusers import AutoencoderKL

    config = {**configs.tables("sd1")["vae"], "layers_per_block": 2, **said}
    with torch.device("meta"):
        module = AutoencoderKL.from_config(config)
    assert vae_weights(config) == {key: tuple(value.shape) for key, value in module.state_dict().items()}


# Of each family's transformer sizes that no other builder has; nothing is left at what diffusers has.
HEADS = {"num_attention_heads": 3, "attention_head_dim": 24}
ROPE = {"axes_dims_rope": (8, 8, 8), "joint_attention_dim": 40}
FLUX_BLOCKS = {**HEADS, **ROPE, "num_layers": 2, "num_single_layers": 3, "in_channels": 12}
TRANSFORMERS: list[tuple[Any, str, dict[str, Any]]] = [
    (FLUX, "dev", {**FLUX_BLOCKS, "pooled_projection_dim": 20, "guidance_embeds": True}),
    (FLUX, "schnell, pruned", {**FLUX_BLOCKS, "pooled_projection_dim": 20, "num_layers": 0}),
    (
        CHROMA,
        "",
        {
            **FLUX_BLOCKS,
            "approximator_num_channels": 12,
            "approximator_hidden_dim": 28,
            "approximator_layers": 2,
        },
    ),
    (
        FLUX2_KLEIN,
        "",
        {**FLUX_BLOCKS, "axes_dims_rope": (6, 6, 6, 6), "mlp_ratio": 2.5, "timestep_guidance_channels": 20}
        | {"guidance_embeds": False},
    ),
    (QWEN_IMAGE, "", {**HEADS, **ROPE, "num_layers": 2, "in_channels": 12, "out_channels": 3}),
    (
        Z_IMAGE,
        "",
        {"dim": 72, "n_heads": 3, "n_layers": 3, "n_refiner_layers": 2, "in_channels": 5, "cap_feat_dim": 40}
        | {"axes_dims": [8, 8, 8]},
    ),
    (Z_IMAGE, "wider than it is told the time by", {"dim": 384, "n_heads": 3, "n_layers": 1}),
    *(
        (
            SD3,
            name,
            {**HEADS, "num_layers": 3, "in_channels": 6, "out_channels": 6, "joint_attention_dim": 40}
            | {"caption_projection_dim": 72, "pooled_projection_dim": 20, "pos_embed_max_size": 5}
            | {"patch_size": 3, **blocks},
        )
        for name, blocks in (
            ("3", {}),
            ("3.5 medium", {"qk_norm": "rms_norm", "dual_attention_layers": (0, 2)}),
        )
    ),
]


@pytest.mark.parametrize(
    ("family", "what", "config"), TRANSFORMERS, ids=lambda each: getattr(each, "key", "")
)
def test_a_transformer_has_these_weights(family: Any, what: str, config: dict[str, Any]) -> None:
    import diffusers

    with torch.device("meta"):
        module = getattr(diffusers, family.transformer).from_config(config)
    told = json.loads(json.dumps(dict(module.config)))  # as files say it, with diffusers' values for the rest
    assert family.shapes(told) == {key: tuple(value.shape) for key, value in module.state_dict().items()}


AUTOENCODERS: list[tuple[Any, str, dict[str, Any]]] = [
    (
        QWEN_IMAGE,
        "AutoencoderKLQwenImage",
        {"base_dim": 6, "z_dim": 3, "dim_mult": [1, 3, 2], "num_res_blocks": 2}
        | {"temperal_downsample": [True, False]},
    ),
    (QWEN_IMAGE, "AutoencoderKLQwenImage", {}),
    (
        FLUX2_KLEIN,
        "AutoencoderKLFlux2",
        {"block_out_channels": (8, 12), "decoder_block_out_channels": (16, 20), "norm_num_groups": 4}
        | {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
    ),
    (FLUX2_KLEIN, "AutoencoderKLFlux2", {}),
]


@pytest.mark.parametrize(("family", "kind", "config"), AUTOENCODERS)
def test_an_autoencoder_of_another_class_has_these_weights(
    family: Any, kind: str, config: dict[str, Any]
) -> None:
    import diffusers

    with torch.device("meta"):
        module = getattr(diffusers, kind).from_config(config)
    told = json.loads(json.dumps(dict(module.config)))
    found = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    found.pop("bn.num_batches_tracked", None)  # nothing computes with it
    assert family.vae_shapes(told) == found
    assert family.vae_shapes(told | {"attn_scales": [0.5], "down_block_types": ["X"]}) is None


def test_what_is_not_known_is_not_guessed() -> None:
    assert unet_weights({"class_embed_type": "timestep"}) is None
    assert (
        unet_weights({"down_block_types": ["X"], "up_block_types": ["X"], "block_out_channels": [1]}) is None
    )
    assert (
        vae_weights({"down_block_types": ["X"], "up_block_types": ["X"], "block_out_channels": [1]}) is None
    )
