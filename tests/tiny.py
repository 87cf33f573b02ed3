"""Tiny random-weight Stable Diffusion checkpoints with the true structure of SD 1.x, SD 2.x and SDXL.

Every folder looks like one from the hub: old-style tokenizer files, `text_model.` keys in the text encoders.
The U-Nets have the block layout of the real ones (SDXL: fewer transformer layers) and few channels.
"""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file

FamilyKey = Literal[
    "sd1", "sd2", "sdxl", "z-image", "qwen-image", "flux", "chroma", "flux2-klein", "sd3", "sd3-clip"
]  # fmt: skip
FAMILIES: tuple[FamilyKey, ...] = ("sd1", "sd2", "sdxl")
MAX_LENGTH = 77
T5_MARK = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes the space before a word

SENTENCES = """\
a photo of a dog in the garden
a photograph of a knife on the kitchen table
a drawing of a pistol and a tulip
a person holding a hammer beside an old wooden house
two red apples on a plate
a quiet street in the morning rain
a painting of the harbour in the evening light
a cat sleeping on a chair
portrait of a woman with a hat
mountains, river and clouds
""".splitlines()


@cache
def vocabulary(merges: int = 160) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level BPE in CLIP's order: bytes, bytes + </w>, merges, SoT, EoT."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = [letter + "</w>" for letter in alphabet]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) * 2 + merges,
        initial_alphabet=alphabet,
        special_tokens=ends,  # numbered in advance: the trainer breaks ties by numbers, else random ones
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    learned = json.loads(tokenizer.to_str())["model"]["merges"]
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in learned][:merges]
    tokens = alphabet + ends + ["".join(pair) for pair in pairs]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, pairs


def write_tokenizer(folder: Path, pad_token: str) -> None:
    """Write `vocab.json`, `merges.txt` and configs as the SD repositories have them (no tokenizer.json)."""
    vocab, merges = vocabulary()
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = pad_token
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_LENGTH,
        "add_prefix_space": False,
        "do_lower_case": True,
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_text_encoder(folder: Path, *, hidden: int, layers: int, act: str, projection: int | None) -> None:
    """A random CLIP text encoder, saved with the `text_model.` keys that every published checkpoint has."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    vocab, _ = vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        hidden_act=act,
        projection_dim=projection or hidden,
        bos_token_id=0,
        eos_token_id=2,  # as in the published configs: means "the highest token id" to transformers
        pad_token_id=1,
    )
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)
    with (
        torch.no_grad()
    ):  # the initial weights are so small that every prompt would give nearly the same embedding
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    state = {k if k.startswith("text_") else f"text_model.{k}": v for k, v in model.state_dict().items()}
    state.pop("text_model.embeddings.position_ids", None)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def build(family: FamilyKey, folder: Path, seed: int = 0, **blocks: object) -> Path:
    """Write a whole tiny fp32 pipeline into `folder` and return it; the same seed gives the same bytes.

    blocks: of the U-Net's configuration, in place of what stands here.
    """
    from diffusers.models import AutoencoderKL, UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    xl, two = family == "sdxl", family == "sd2"
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if xl:
            write_text_encoder(
                folder / "text_encoder", hidden=24, layers=3, act="quick_gelu", projection=None
            )
            write_text_encoder(folder / "text_encoder_2", hidden=40, layers=3, act="gelu", projection=40)
        else:
            act = "gelu" if two else "quick_gelu"
            write_text_encoder(folder / "text_encoder", hidden=32, layers=3, act=act, projection=None)
        attention: dict[str, object] = {"cross_attention_dim": 64 if xl else 32, "attention_head_dim": 2}
        if xl:
            attention |= {
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "block_out_channels": (8, 8, 16),
                "transformer_layers_per_block": (1, 1, 2),
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 4,
                "projection_class_embeddings_input_dim": 40 + 6 * 4,
            }
        else:
            attention["block_out_channels"] = (8, 8, 16, 16)
        attention |= blocks
        unet = UNet2DConditionModel(
            sample_size=8,
            norm_num_groups=4,
            use_linear_projection=xl or two,
            **attention,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=16,
        )
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction" if two else "epsilon",
    )
    scheduler.save_pretrained(folder / "scheduler")
    index: dict[str, object] = {
        "_class_name": "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_tokenizer(folder / "tokenizer", "!" if two else "<|endoftext|>")
    if xl:
        write_tokenizer(folder / "tokenizer_2", "!")
        index["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        index["tokenizer_2"] = ["transformers", "CLIPTokenizer"]
        index["force_zeros_for_empty_prompt"] = True
    else:
        index |= {"feature_extractor": [None, None], "safety_checker": [None, None]}
        index["requires_safety_checker"] = False
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def add_fp16_variant(folder: Path, *, keep_plain: bool = True) -> None:
    """Add `*.fp16.safetensors` copies beside every weight file, or replace them with `keep_plain=False`."""
    for path in list(folder.glob("*/*.safetensors")):
        half = {key: value.half() for key, value in load_file(path).items()}
        save_file(half, path.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        if not keep_plain:
            path.unlink()


def shard(folder: Path, *, variant: str | None = None, parts: int = 2) -> None:
    """Split the U-Net's weights into shards with an index, named as diffusers names them."""
    unet = folder / "unet"
    infix = f".{variant}" if variant else ""
    source = unet / f"diffusion_pytorch_model{infix}.safetensors"
    state = load_file(source)
    keys, weight_map = sorted(state), {}
    for part in range(parts):
        name = f"diffusion_pytorch_model{infix}-{part + 1:05}-of-{parts:05}.safetensors"
        chosen = keys[part::parts]
        save_file({key: state[key] for key in chosen}, unet / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, name)
    total = sum(value.numel() * value.element_size() for value in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (unet / f"diffusion_pytorch_model.safetensors.index{infix}.json").write_text(json.dumps(index, indent=2))
    source.unlink()


def single_file(
    family: FamilyKey, folder: Path, path: Path, *, ema: bool = False, half: bool = False
) -> Path:
    """Write the folder's weights as one file in the layout of the family's published single files."""
    if family == "z-image":
        return z_image_file(folder, path)
    if family == "qwen-image":
        return qwen_image_file(folder, path)
    if family in ("flux", "chroma"):
        return flux_file(folder, path)
    if family == "flux2-klein":
        return flux2_file(folder, path)
    if family.startswith("sd3"):
        return sd3_file(folder, path)
    unet = {f"model.diffusion_model.{key}": value for key, value in ldm_unet(folder).items()}
    state = dict(unet)
    if ema:  # a copy that differs, as that of a training run does
        for key, value in unet.items():
            state["model_ema." + key.removeprefix("model.").replace(".", "")] = value * 0.5
        state["model_ema.decay"] = torch.tensor(0.9999)
    state |= {f"first_stage_model.{key}": value for key, value in ldm_vae(folder).items()}
    first = load_file(folder / "text_encoder/model.safetensors")
    if family == "sd1":
        state |= {f"cond_stage_model.transformer.{key}": value for key, value in first.items()}
    elif family == "sd2":
        state |= {
            f"cond_stage_model.model.{key}": value for key, value in openclip(first, spare=True).items()
        }
    else:
        second = openclip(load_file(folder / "text_encoder_2/model.safetensors"), spare=False)
        state |= {f"conditioner.embedders.0.transformer.{key}": value for key, value in first.items()}
        state |= {f"conditioner.embedders.1.model.{key}": value for key, value in second.items()}
    state["alphas_cumprod"] = torch.linspace(1, 0, 10)
    if half:
        state = {key: value.half() for key, value in state.items()}
    state = {key: value.contiguous().clone() for key, value in state.items()}
    save_file(
        state, path, metadata={"format": "pt", "modelspec.title": "Tiny", "modelspec.hash_sha256": "0x0"}
    )
    return path


def renamed(key: str, names: dict[str, str]) -> str:
    """The key with every whole dotted name of `names` replaced."""
    for ours, theirs in names.items():
        key = f".{key}.".replace(f".{ours}.", f".{theirs}.")[1:-1]
    return key


def ldm_unet(folder: Path) -> dict[str, torch.Tensor]:
    """The U-Net's weights by their LDM names: blocks are numbered in the order of the forward pass."""
    state = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    config = json.loads((folder / "unet/config.json").read_text())
    depth, layers = len(config["block_out_channels"]), config["layers_per_block"]
    prefixes = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    for kind, ldm in (("time_embedding", "time_embed"), ("add_embedding", "label_emb.0")):
        prefixes |= {f"{kind}.linear_1": f"{ldm}.0", f"{kind}.linear_2": f"{ldm}.2"}
    prefixes |= {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}
    prefixes["mid_block.resnets.1"] = "middle_block.2"
    number = 1
    for level in range(depth):
        for layer in range(layers):
            prefixes[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{number}.0"
            prefixes[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        prefixes[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
        number += 1
    number = 0
    for level in range(depth):
        attends = "CrossAttn" in config["up_block_types"][level]
        for layer in range(layers + 1):
            prefixes[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{number}.0"
            prefixes[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{number}.1"
            if layer == layers:
                place = 2 if attends else 1
                prefixes[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{number}.{place}.conv"
            number += 1
    resnet = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
    resnet |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    result = {}
    for key, value in state.items():
        prefix = max((p for p in prefixes if key.startswith(p + ".")), key=len)
        rest = key[len(prefix) :].lstrip(".")
        rest = renamed(rest, resnet) if ".resnets." in key else rest
        result[f"{prefixes[prefix]}.{rest}"] = value
    return result


def ldm_vae(folder: Path) -> dict[str, torch.Tensor]:
    """The VAE's weights by their LDM names; its attention's linear layers are 1 x 1 convolutions there."""
    state = load_file(folder / "vae/diffusion_pytorch_model.safetensors")
    depth = len(json.loads((folder / "vae/config.json").read_text())["block_out_channels"])
    names = {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2"}
    names |= {
        "mid_block.attentions.0": "mid.attn_1",
        "conv_norm_out": "norm_out",
        "conv_shortcut": "nin_shortcut",
    }
    names |= {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    for level in range(depth):
        names[f"down_blocks.{level}.downsamplers.0"] = f"down.{level}.downsample"
        names[f"up_blocks.{level}.upsamplers.0"] = f"up.{depth - 1 - level}.upsample"
        for layer in range(4):
            names[f"down_blocks.{level}.resnets.{layer}"] = f"down.{level}.block.{layer}"
            names[f"up_blocks.{level}.resnets.{layer}"] = f"up.{depth - 1 - level}.block.{layer}"
    result = {}
    for key, value in state.items():
        linear = ".attentions.0.to_" in key and key.endswith(".weight")
        result[renamed(key, names)] = value[..., None, None] if linear else value
    return result


def openclip(state: dict[str, torch.Tensor], *, spare: bool) -> dict[str, torch.Tensor]:
    """CLIP weights in OpenCLIP's form; `spare`: with the last layer and projection that SD 2.x leaves out."""
    names = {"embeddings.token_embedding.weight": "token_embedding.weight"}
    names |= {"embeddings.position_embedding.weight": "positional_embedding", "final_layer_norm": "ln_final"}
    names |= {"encoder.layers": "transformer.resblocks", "layer_norm1": "ln_1", "layer_norm2": "ln_2"}
    names |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}
    result = {}
    for key, value in state.items():
        if key == "text_projection.weight":
            result["text_projection"] = value.T
        elif ".q_proj." in key:
            parts = [state[key.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            leaf = key.rpartition(".")[2]
            place = renamed(key.removeprefix("text_model."), names).split(".self_attn.")[0]
            result[f"{place}.attn.in_proj_{leaf}"] = torch.cat(parts)
        elif ".k_proj." not in key and ".v_proj." not in key:
            result[renamed(key.removeprefix("text_model."), names)] = value
    if spare:
        last = max(int(key.split(".")[2]) for key in result if key.startswith("transformer."))
        for key, value in list(result.items()):
            if key.startswith(f"transformer.resblocks.{last}."):
                result[key.replace(f".{last}.", f".{last + 1}.", 1)] = torch.randn_like(value)
        result["text_projection"] = torch.eye(result["ln_final.weight"].shape[0])
    return result


def build_clip(folder: Path) -> Path:
    """Write a tiny random CLIP model with its tokenizer and image processor, and return its folder."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    write_tokenizer(folder, "<|endoftext|>")
    vocab, _ = vocabulary()
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config={**small, "vocab_size": len(vocab), "eos_token_id": vocab["<|endoftext|>"]},
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=24,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(config)
    with torch.no_grad():  # the initial weights are so small that all pictures and texts look alike
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    model.save_pretrained(folder)
    size = {"height": 16, "width": 16}
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size).save_pretrained(folder)
    return folder


# --- Z-Image: a language model reads the prompt

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
)


@cache
def qwen_tokenizer() -> str:
    """The `tokenizer.json` of a byte-level BPE that splits texts as Qwen's does."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*SENTENCES, "user\n", "assistant\n"] * 3, trainer)
    return tokenizer.to_str()


def write_qwen_tokenizer(folder: Path) -> None:
    """Write the tokenizer with its chat template, as Qwen's repositories have them."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(qwen_tokenizer(), encoding="utf-8")
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "chat_template": CHAT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@torch.no_grad()
def stir(*modules: torch.nn.Module) -> None:
    """Norms that are not all ones, and no part of a model that is silent."""
    for module in modules:
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.mul_(2).add_(torch.randn_like(parameter) * 0.02)


def build_z_image(folder: Path, seed: int = 0) -> Path:
    """Write a whole tiny fp32 Z-Image pipeline into `folder` and return it; the same seed, the same bytes."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    write_qwen_tokenizer(folder / "tokenizer")
    vocab = len(json.loads(qwen_tokenizer())["model"]["vocab"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=vocab + 5,
                hidden_size=48,
                intermediate_size=64,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=16,
                rope_theta=10000.0,
                tie_word_embeddings=True,
            )
        )
        transformer = ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=48,
            axes_dims=[8, 4, 4],
            axes_lens=[1024, 32, 32],
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=16,
            scaling_factor=0.36,
            shift_factor=0.11,
        )
        stir(model, transformer)
    model.save_pretrained(folder / "text_encoder")
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "ZImagePipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3Model"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def z_image_file(folder: Path, path: Path, prefix: str = "model.diffusion_model.") -> Path:
    """Write the folder's transformer as one file with the original names: queries, keys, values stacked."""
    state = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    names = {"all_final_layer.2-1": "final_layer", "all_x_embedder.2-1": "x_embedder", "to_out.0": "out"}
    names |= {"norm_q": "q_norm", "norm_k": "k_norm"}
    found = {}
    for key, value in state.items():
        if ".to_q." in key:
            parts = [state[key.replace(".to_q.", f".to_{each}.")] for each in "qkv"]
            found[prefix + key.replace(".to_q.", ".qkv.")] = torch.cat(parts)
        elif ".to_k." not in key and ".to_v." not in key:
            found[prefix + renamed(key, names)] = value.clone()
    save_file(found, path, metadata={"format": "pt"})
    return path


def build_qwen_image(folder: Path, seed: int = 0) -> Path:
    """Write a whole tiny fp32 Qwen-Image pipeline into `folder`; the same seed gives the same bytes."""
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    write_qwen_tokenizer(folder / "tokenizer")
    vocab = len(json.loads(qwen_tokenizer())["model"]["vocab"])
    text = {
        "vocab_size": vocab + 5,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 48}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=3, video_token_id=4)
        )
        transformer = QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            axes_dims_rope=(8, 4, 4),
        )
        vae = AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 0.8, 1.1, 2.0],
        )
        stir(model, transformer)
    model.save_pretrained(folder / "text_encoder")
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    ).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "QwenImagePipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def qwen_image_file(folder: Path, path: Path, prefix: str = "model.diffusion_model.") -> Path:
    """Write the folder's transformer as one file, whose names are diffusers' own."""
    state = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    save_file({prefix + key: value for key, value in state.items()}, path, metadata={"format": "pt"})
    return path


def write_t5_tokenizer(folder: Path) -> None:
    """A unigram tokenizer as T5's is: words begin with a mark, an end-of-sequence token behind every text."""
    from transformers import T5TokenizerFast

    words = sorted({word.strip(".,!") for line in SENTENCES for word in line.split()})
    letters = sorted({letter for word in words for letter in word} | set("abcdefghijklmnopqrstuvwxyzTR,!"))
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (T5_MARK, -2.0)]
    vocab += [(f"{T5_MARK}{word}", -3.0) for word in words if f"{T5_MARK}{word}" != T5_MARK]
    vocab += [(letter, -8.0) for letter in letters]
    T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512).save_pretrained(folder)


def build_flux(folder: Path, seed: int = 0, guidance: bool = True) -> Path:
    """Write a whole tiny fp32 FLUX.1 pipeline into `folder`; the same seed gives the same bytes."""
    from diffusers import FluxTransformer2DModel

    write_tokenizer(folder / "tokenizer", "<|endoftext|>")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        write_text_encoder(folder / "text_encoder", hidden=32, layers=3, act="quick_gelu", projection=None)
        transformer = FluxTransformer2DModel(
            pooled_projection_dim=32, guidance_embeds=guidance, **FLUX_BLOCKS
        )
        write_around_t5(folder, "text_encoder_2", "tokenizer_2", transformer)
    index = {
        "_class_name": "FluxPipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index | AROUND_T5, indent=2))
    return folder


def build_chroma(folder: Path, seed: int = 0) -> Path:
    """Write a whole tiny fp32 Chroma pipeline into `folder`; the same seed gives the same bytes."""
    from diffusers import ChromaTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = ChromaTransformer2DModel(
            approximator_num_channels=16, approximator_hidden_dim=24, approximator_layers=2, **FLUX_BLOCKS
        )
        write_around_t5(folder, "text_encoder", "tokenizer", transformer)
    index = {
        "_class_name": "ChromaPipeline",
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "ChromaTransformer2DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index | AROUND_T5, indent=2))
    return folder


FLUX_BLOCKS = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 48,
    "axes_dims_rope": (8, 4, 4),
}
AROUND_T5 = {
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_around_t5(folder: Path, encoder: str, tokenizer: str, transformer: torch.nn.Module) -> None:
    """Write the transformer, a T5 with its tokenizer, a VAE and a scheduler."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    write_t5_tokenizer(folder / tokenizer)
    config = T5Config(
        vocab_size=len(AutoTokenizer.from_pretrained(folder / tokenizer)) + 2,
        d_model=48,
        d_kv=8,
        d_ff=64,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=16,
    )
    model = T5EncoderModel(config)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        scaling_factor=0.36,
        shift_factor=0.11,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    stir(model, transformer)
    model.save_pretrained(folder / encoder)
    transformer.save_pretrained(folder / "transformer")  # type: ignore[operator]
    vae.save_pretrained(folder / "vae")
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.save_pretrained(folder / "scheduler")


def flux_file(folder: Path, path: Path, prefix: str = "model.diffusion_model.") -> Path:
    """Write the folder's transformer as one file with the original names, several weights stacked in one."""
    state = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    found: dict[str, torch.Tensor] = {}

    def move(ours: str, theirs: str, leaves: dict[str, str] | None = None) -> None:
        for leaf, other in (leaves or {"weight": "weight", "bias": "bias"}).items():
            if f"{ours}.{leaf}" in state:
                found[f"{theirs}.{other}"] = state[f"{ours}.{leaf}"].clone()

    def stack(block: str, names: list[str], theirs: str) -> None:
        for leaf in ("weight", "bias"):
            found[f"{theirs}.{leaf}"] = torch.cat([state[f"{block}.{name}.{leaf}"] for name in names])

    for embedder, ours in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance")):
        for number, layer in ((1, "in_layer"), (2, "out_layer")):
            move(f"time_text_embed.{embedder}_embedder.linear_{number}", f"{ours}_in.{layer}")
    move("context_embedder", "txt_in")
    move("x_embedder", "img_in")
    move("proj_out", "final_layer.linear")
    for key in state:
        if key.startswith("distilled_guidance_layer."):
            theirs = renamed(key, {"linear_1": "in_layer", "linear_2": "out_layer"})
            theirs = theirs.replace(".weight", ".scale") if ".norms." in key else theirs
            found[theirs] = state[key].clone()
    for leaf in ("weight", "bias") if "norm_out.linear.weight" in state else ():
        scale, shift = state[f"norm_out.linear.{leaf}"].chunk(2)
        found[f"final_layer.adaLN_modulation.1.{leaf}"] = torch.cat([shift, scale])
    for number in range(2):
        ours, theirs = f"transformer_blocks.{number}", f"double_blocks.{number}"
        stack(ours, ["attn.to_q", "attn.to_k", "attn.to_v"], f"{theirs}.img_attn.qkv")
        stack(ours, ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"], f"{theirs}.txt_attn.qkv")
        for side, norm, mlp, out, added in (
            ("img", "norm1", "ff", "to_out.0", ""),
            ("txt", "norm1_context", "ff_context", "to_add_out", "added_"),
        ):
            move(f"{ours}.{norm}.linear", f"{theirs}.{side}_mod.lin")
            move(f"{ours}.{mlp}.net.0.proj", f"{theirs}.{side}_mlp.0")
            move(f"{ours}.{mlp}.net.2", f"{theirs}.{side}_mlp.2")
            move(f"{ours}.attn.{out}", f"{theirs}.{side}_attn.proj")
            for each, name in (("q", "query_norm"), ("k", "key_norm")):
                place = f"{theirs}.{side}_attn.norm.{name}"
                move(f"{ours}.attn.norm_{added}{each}", place, {"weight": "scale"})
        ours, theirs = f"single_transformer_blocks.{number}", f"single_blocks.{number}"
        stack(ours, ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"], f"{theirs}.linear1")
        move(f"{ours}.norm.linear", f"{theirs}.modulation.lin")
        move(f"{ours}.proj_out", f"{theirs}.linear2")
        for each, name in (("q", "query_norm"), ("k", "key_norm")):
            move(f"{ours}.attn.norm_{each}", f"{theirs}.norm.{name}", {"weight": "scale"})
    save_file({prefix + key: value for key, value in found.items()}, path, metadata={"format": "pt"})
    return path


def build_flux2_klein(folder: Path, seed: int = 0, distilled: bool = False) -> Path:
    """Write a whole tiny fp32 FLUX.2 klein pipeline into `folder`; the same seed gives the same bytes."""
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    write_qwen_tokenizer(folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(json.loads(qwen_tokenizer())["model"]["vocab"]) + 5,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=28,  # the outputs of the 9th, 18th and 27th are read
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                rope_theta=10000.0,
                tie_word_embeddings=True,
            )
        )
        transformer = Flux2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        )
        vae = AutoencoderKLFlux2(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=16,
        )
        stir(model, transformer)
        vae.bn.running_mean.normal_(0, 0.3)
        vae.bn.running_var.uniform_(0.5, 2)
    model.save_pretrained(folder / "text_encoder")
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).save_pretrained(
        folder / "scheduler"
    )
    index = {
        "_class_name": "Flux2KleinPipeline",
        "_diffusers_version": "0.42.1",
        "is_distilled": distilled,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        "tokenizer": ["transformers", "Qwen2TokenizerFast"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def flux2_file(folder: Path, path: Path, prefix: str = "model.diffusion_model.") -> Path:
    """Write the folder's transformer as one file with the original names: queries, keys, values stacked."""
    state = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    names = {"x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear"}
    names |= {f"time_guidance_embed.timestep_embedder.linear_{n}": f"time_in.{each}_layer"
              for n, each in ((1, "in"), (2, "out"))}  # fmt: skip
    names |= {"norm_out.linear": "final_layer.adaLN_modulation.1"}
    for each in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        names[f"{each}.linear"] = f"{each}.lin"
    for side, added, mlp, out in (
        ("img", "", "ff", "to_out.0"),
        ("txt", "added_", "ff_context", "to_add_out"),
    ):
        names |= {f"attn.norm_{added}{q}.weight": f"{side}_attn.norm.{name}_norm.scale"
                  for q, name in (("q", "query"), ("k", "key"))}  # fmt: skip
        names |= {f"{mlp}.linear_in": f"{side}_mlp.0", f"{mlp}.linear_out": f"{side}_mlp.2"}
        names[f"attn.{out}"] = f"{side}_attn.proj"
    alone = {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}
    alone |= {
        f"attn.norm_{q}.weight": f"norm.{name}_norm.scale" for q, name in (("q", "query"), ("k", "key"))
    }
    found = {}
    for key, value in state.items():
        theirs = renamed(key, alone if key.startswith("single_transformer_blocks.") else names)
        theirs = theirs.replace("single_transformer_blocks.", "single_blocks.")
        theirs = theirs.replace("transformer_blocks.", "double_blocks.")
        for stack, parts in (("img", "to_q to_k to_v"), ("txt", "add_q_proj add_k_proj add_v_proj")):
            if f".attn.{parts.split()[0]}." in key:
                first = parts.split()[0]
                theirs = theirs.replace(f".attn.{first}.", f".{stack}_attn.qkv.")
                value = torch.cat([state[key.replace(f".{first}.", f".{each}.")] for each in parts.split()])
        if key == "norm_out.linear.weight":
            value = torch.cat(value.chunk(2)[::-1])  # shift before scale
        if not any(f".attn.{each}." in key for each in ("to_k", "to_v", "add_k_proj", "add_v_proj")):
            found[prefix + theirs] = value.clone()
    save_file(found, path, metadata={"format": "pt"})
    return path


def build_sd3(folder: Path, seed: int = 0, t5: bool = True, **blocks: object) -> Path:
    """Write a whole tiny fp32 Stable Diffusion 3.5 pipeline into `folder`, without `t5` one that lacks it.

    blocks: of the transformer's configuration what is to be otherwise. The same seed gives the same bytes.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    write_tokenizer(folder / "tokenizer", "<|endoftext|>")
    write_tokenizer(folder / "tokenizer_2", "!")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        write_text_encoder(folder / "text_encoder", hidden=16, layers=3, act="quick_gelu", projection=16)
        write_text_encoder(folder / "text_encoder_2", hidden=24, layers=3, act="gelu", projection=24)
        transformer = SD3Transformer2DModel(**SD3_BLOCKS | blocks)
        write_around_t5(folder, "text_encoder_3", "tokenizer_3", transformer)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    index: dict[str, object] = {
        "_class_name": "StableDiffusion3Pipeline",
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
    }
    if not t5:
        for part in ("text_encoder_3", "tokenizer_3"):
            shutil.rmtree(folder / part)
            index[part] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(AROUND_T5 | index, indent=2))
    return folder


SD3_BLOCKS = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 48,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 40,
    "pos_embed_max_size": 12,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}


def sd3_file(
    folder: Path, path: Path, prefix: str = "model.diffusion_model.", text: tuple[str, ...] = ()
) -> Path:
    """Write the folder's transformer and VAE as one file with the published names, and these text encoders
    of it: `clip_l` (without its projection, as published), `clip_g`, `t5xxl`.
    """
    state = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    last = json.loads((folder / "transformer/config.json").read_text())["num_layers"] - 1
    names = {f"time_text_embed.{ours}.linear_{n}": f"{theirs}.mlp.{2 * n - 2}"
             for ours, theirs in (("timestep_embedder", "t_embedder"), ("text_embedder", "y_embedder"))
             for n in (1, 2)}  # fmt: skip
    names |= {"pos_embed.pos_embed": "pos_embed", "pos_embed.proj": "x_embedder.proj"}
    names |= {"norm_out.linear": "final_layer.adaLN_modulation.1", "proj_out": "final_layer.linear"}
    names |= {"norm1.linear": "x_block.adaLN_modulation.1", "transformer_blocks": "joint_blocks"}
    names |= {"norm1_context.linear": "context_block.adaLN_modulation.1"}
    names |= {"attn.to_add_out": "context_block.attn.proj"}
    names |= {f"{each}.to_out.0": f"x_block.{each}.proj" for each in ("attn", "attn2")}
    names |= {f"{each}.norm_{n}": f"x_block.{each}.ln_{n}" for each in ("attn", "attn2") for n in "qk"}
    names |= {f"attn.norm_added_{n}": f"context_block.attn.ln_{n}" for n in "qk"}
    names |= {f"{ours}.net.{a}": f"{theirs}.mlp.{b}"
              for ours, theirs in (("ff", "x_block"), ("ff_context", "context_block"))
              for a, b in (("0.proj", "fc1"), ("2", "fc2"))}  # fmt: skip
    stacks = {"attn.to_{}": "x_block.attn.qkv", "attn2.to_{}": "x_block.attn2.qkv"}
    stacks["attn.add_{}_proj"] = "context_block.attn.qkv"
    found: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        block = ".".join(key.split(".")[:2])
        stack = next((each for each in stacks if f"{block}.{each.format('q')}." in key), None)
        if stack:
            parts = [state[key.replace(stack.format("q"), stack.format(each))] for each in "qkv"]
            key, value = key.replace(stack.format("q"), stacks[stack]), torch.cat(parts)
        elif any(f"{block}.{each.format(other)}." in key for each in stacks for other in "kv"):
            continue
        elif key.startswith(("norm_out.", f"transformer_blocks.{last}.norm1_context.")):
            scale, shift = value.chunk(2)
            value = torch.cat([shift, scale])
        found[prefix + renamed(key, names)] = value.clone()
    found |= {f"first_stage_model.{key}": value.clone() for key, value in ldm_vae(folder).items()}
    for part, name in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g"), ("text_encoder_3", "t5xxl")):
        if name in text:
            of = load_file(folder / part / "model.safetensors")
            of.pop("text_projection.weight" if name == "clip_l" else "encoder.embed_tokens.weight", None)
            found |= {f"text_encoders.{name}.transformer.{key}": value for key, value in of.items()}
            found[f"text_encoders.{name}.logit_scale"] = torch.tensor(4.6)
    save_file({key: value.contiguous() for key, value in found.items()}, path, metadata={"format": "pt"})
    return path


def fp8_scaled(state: dict[str, torch.Tensor], ending: str = ".scale_weight") -> dict[str, torch.Tensor]:
    """A single file's tensors as ComfyUI keeps them in fp8: matrices with a scale each, the rest in bf16, and
    a mark.
    """
    e4m3 = torch.float8_e4m3fn
    found = {"model.diffusion_model.scaled_fp8": torch.zeros(2, dtype=e4m3)}
    for key, value in state.items():
        if value.ndim == 2:
            scale = value.abs().max() / 448
            found[key] = (value / scale).to(e4m3)
            found[key.removesuffix(".weight") + ending] = scale
            found[key.removesuffix(".weight") + ".scale_input"] = torch.tensor(1.0)
        else:
            found[key] = value.bfloat16()
    return found
