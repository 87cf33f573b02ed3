"""The weights that configurations ask for are those of diffusers' modules."""

from typing import Any

import pytest
import torch

from trce_cli.families.sd import configs
from trce_cli.families.sd.shapes import unet_weights, vae_weights

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


def test_what_is_not_known_is_not_guessed() -> None:
    assert unet_weights({"class_embed_type": "timestep"}) is None
    assert (
        unet_weights({"down_block_types": ["X"], "up_block_types": ["X"], "block_out_channels": [1]}) is None
    )
    assert (
        vae_weights({"down_block_types": ["X"], "up_block_types": ["X"], "block_out_channels": [1]}) is None
    )
