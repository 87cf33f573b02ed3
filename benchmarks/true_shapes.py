"""Checkpoints of random weights with the true shapes of the families, for what costs are measured on.

What is read of them is written out; with the larger ones everything else is a hole in a sparse file. CLIP has
its real tokenizer; those of Qwen and T5 are the tests' small ones, which cut words into more tokens.
"""

import json
import math
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

U_NETS: Final = ("sd1", "sd2", "sdxl")
# What is read of the denoiser of SDXL, the one U-Net that is a sparse file.
_SDXL_DOORS: Final = (".attn2.to_k.", ".attn2.to_v.", "add_embedding.linear_1.weight")
_QWEN3_4B: Final = {
    "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 1e6,
}  # fmt: skip
_T5_XXL: Final = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
_CLIP_L: Final = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "hidden_act": "quick_gelu", "projection_dim": 768, "eos_token_id": 49407,
}  # fmt: skip
_CLIP_G: Final = {
    "vocab_size": 49408, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
    "num_attention_heads": 20, "hidden_act": "gelu", "projection_dim": 1280, "eos_token_id": 49407,
}  # fmt: skip
_VAE: Final = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2, "latent_channels": 16,
    "sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159,
}  # fmt: skip
# What FLUX.1 and Stable Diffusion 3 have beside a T5.
_BESIDE_T5: Final[dict[str, Any]] = {
    "vae_blocks": _VAE | {"use_quant_conv": False, "use_post_quant_conv": False},
    "index": {"feature_extractor": [None, None], "image_encoder": [None, None]},
}


@dataclass(frozen=True)
class Shapes:
    """A family whose denoiser is a transformer: the classes of its parts, and their sizes.

    encoders: of each folder of a text encoder the model's class, its configuration's class, and the values.
    tokenizers: the class of each. doors: what the names of the weights that the prompt enters by hold.
    positions: how many of a prompt the encoders read whatever its length; 0 where only its tokens are.
    """

    pipeline: str
    transformer: str
    encoders: Mapping[str, tuple[str, str, Mapping[str, Any]]]
    tokenizers: Mapping[str, str]
    doors: tuple[str, ...]
    blocks: Mapping[str, Any] = field(default_factory=dict)
    vae: str = "AutoencoderKL"
    vae_blocks: Mapping[str, Any] = field(default_factory=lambda: _VAE)
    index: Mapping[str, Any] = field(default_factory=dict)
    positions: int = 0


TRANSFORMERS: Final = {
    "z-image": Shapes(
        pipeline="ZImagePipeline",
        transformer="ZImageTransformer2DModel",
        encoders={"text_encoder": ("Qwen3Model", "Qwen3Config", _QWEN3_4B)},
        tokenizers={"tokenizer": "Qwen2Tokenizer"},
        doors=("cap_embedder",),
    ),
    "qwen-image": Shapes(
        pipeline="QwenImagePipeline",
        transformer="QwenImageTransformer2DModel",
        encoders={
            "text_encoder": (
                "Qwen2_5_VLTextModel",
                "Qwen2_5_VLConfig",
                {
                    "text_config": {
                        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
                        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
                        "rope_parameters": {
                            "rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24],
                        },
                    }
                },
            )
        },
        tokenizers={"tokenizer": "Qwen2Tokenizer"},
        doors=("txt_",),
        vae="AutoencoderKLQwenImage",
        vae_blocks={},
        index={"text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"]},
    ),
    "flux": Shapes(
        pipeline="FluxPipeline",
        transformer="FluxTransformer2DModel",
        encoders={
            "text_encoder": ("CLIPTextModel", "CLIPTextConfig", _CLIP_L),
            "text_encoder_2": ("T5EncoderModel", "T5Config", _T5_XXL),
        },
        tokenizers={"tokenizer": "CLIPTokenizer", "tokenizer_2": "T5TokenizerFast"},
        doors=("context_embedder", "text_embedder"),
        blocks={"guidance_embeds": True},
        **_BESIDE_T5,
        positions=512,
    ),
    "sd3": Shapes(
        pipeline="StableDiffusion3Pipeline",
        transformer="SD3Transformer2DModel",
        encoders={
            "text_encoder": ("CLIPTextModelWithProjection", "CLIPTextConfig", _CLIP_L),
            "text_encoder_2": ("CLIPTextModelWithProjection", "CLIPTextConfig", _CLIP_G),
            "text_encoder_3": ("T5EncoderModel", "T5Config", _T5_XXL),
        },
        tokenizers={
            "tokenizer": "CLIPTokenizer", "tokenizer_2": "CLIPTokenizer", "tokenizer_3": "T5TokenizerFast",
        },
        doors=("context_embedder", "text_embedder"),
        # Stable Diffusion 3.5 large.
        blocks={
            "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "sample_size": 128,
            "pos_embed_max_size": 192, "qk_norm": "rms_norm",
        },
        **_BESIDE_T5,
        positions=256,
    ),
    "flux2-klein": Shapes(
        pipeline="Flux2KleinPipeline",
        transformer="Flux2Transformer2DModel",
        encoders={"text_encoder": ("Qwen3ForCausalLM", "Qwen3Config", _QWEN3_4B)},
        tokenizers={"tokenizer": "Qwen2TokenizerFast"},
        doors=("context_embedder",),
        # FLUX.2 klein of 4 billion weights.
        blocks={
            "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24,
            "joint_attention_dim": 7680, "guidance_embeds": False,
        },
        vae="AutoencoderKLFlux2",
        vae_blocks={},
        index={"is_distilled": False},
    ),
}  # fmt: skip


def build(folder: Path, family: str, layers: int = 0, filled: bool = True) -> None:
    """A diffusers folder in fp16. layers: of the text encoders of a transformer's family, 0 for all. filled:
    whether what is read has values; else all is holes, for those who look at shapes alone.
    """
    if family in U_NETS:
        _u_net(folder, family, filled)
    else:
        _transformer(folder, TRANSFORMERS[family], layers, filled)


def _u_net(folder: Path, family: str, filled: bool) -> None:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from trce_cli.families.sd import configs

    shutil.copytree(configs.folder(family), folder)
    torch.manual_seed(0)
    for name, kind in {"unet": UNet2DConditionModel, "vae": AutoencoderKL}.items():
        with torch.device("meta"):
            model = kind.from_config(kind.load_config(folder / name))
        write(
            folder / name / "diffusion_pytorch_model.safetensors",
            shapes_of(model),
            (_SDXL_DOORS if family == "sdxl" else ("",)) if filled else (),
        )
    for name in sorted(path.parent.name for path in folder.glob("text_encoder*/config.json")):
        config = CLIPTextConfig.from_pretrained(folder / name)
        kind = CLIPTextModelWithProjection if name.endswith("2") else CLIPTextModel
        with torch.device("meta"):
            shapes = shapes_of(kind(config))
        named = {
            key if key.startswith("text_") else f"text_model.{key}": value for key, value in shapes.items()
        }
        write(folder / name / "model.safetensors", named, ("",) if filled else ())


def _transformer(folder: Path, shapes: Shapes, layers: int, filled: bool) -> None:
    import diffusers
    import torch
    import transformers

    torch.manual_seed(0)
    for name, (kind, config, values) in shapes.encoders.items():
        text = getattr(transformers, config)(**_cut(values, layers))
        text.save_pretrained(folder / name)
        with torch.device("meta"):
            model = getattr(transformers, kind)(getattr(text, "text_config", text))
        write(folder / name / "model.safetensors", shapes_of(model), ("",) if filled else ())
    for name, kind, values, wanted in (
        ("transformer", shapes.transformer, shapes.blocks, shapes.doors if filled else ()),
        ("vae", shapes.vae, shapes.vae_blocks, ()),
    ):
        with torch.device("meta"):
            model = getattr(diffusers, kind)(**values)
        model.save_config(folder / name)
        write(folder / name / "diffusion_pytorch_model.safetensors", shapes_of(model), wanted)
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    _tokenizers(folder, shapes)
    index = {
        "_class_name": shapes.pipeline,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", shapes.transformer],
        "vae": ["diffusers", shapes.vae],
        **{name: ["transformers", kind] for name, (kind, _, _) in shapes.encoders.items()},
        **{name: ["transformers", kind] for name, kind in shapes.tokenizers.items()},
        **shapes.index,
    }
    (folder / "model_index.json").write_text(json.dumps(index))


def _cut(values: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """A configuration's values with fewer layers, of which CLIP, that costs little, keeps all."""
    found = dict(values)
    if "text_config" in found:
        found["text_config"] = _cut(found["text_config"], layers)
    for key in {"num_hidden_layers", "num_layers"} & found.keys() if values is not _CLIP_L else ():
        found[key] = layers or found[key]
    return found


def _tokenizers(folder: Path, shapes: Shapes) -> None:
    from trce_cli.families.sd import configs

    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    import tiny

    for name, kind in shapes.tokenizers.items():
        if kind == "CLIPTokenizer":
            of = configs.folder("sdxl") / ("tokenizer" if name == "tokenizer" else "tokenizer_2")
            shutil.copytree(of, folder / name)
        elif kind == "T5TokenizerFast":
            tiny.write_t5_tokenizer(folder / name)
        else:
            tiny.write_qwen_tokenizer(folder / name)


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's weights by their names, less what is no weight and what is another's copy."""
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    return {
        key: tuple(value.shape)
        for key, value in model.state_dict().items()
        if "position_ids" not in key and key not in tied
    }


def write(path: Path, shapes: Mapping[str, tuple[int, ...]], wanted: tuple[str, ...]) -> None:
    """A safetensors file in fp16: random where a name holds one of `wanted`, holes elsewhere."""
    import torch

    position, header = 0, {}
    for name, shape in sorted(shapes.items()):
        end = position + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    noise = torch.randn(1 << 22)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in sorted(shapes.items()):
            if not any(part in name for part in wanted):
                continue
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            # Gains near 1 and variances of 1 / inputs keep what flows through the layers alive; embeddings
            # are as large as what is added to them.
            gain = 1.0 if len(shape) < 2 or "embedding." in name else (1 / math.prod(shape[1:])) ** 0.5
            offset = float("norm" in name and name.endswith("weight"))
            gain *= 0.1 if len(shape) < 2 else 1.0
            begin = torch.randint(len(noise), ()).item()
            count = math.prod(shape)
            while count:
                part = noise[begin : begin + count]
                file.write((offset + gain * part).half().numpy().data)
                count, begin = count - len(part), 0
        file.truncate(8 + len(text) + position)
