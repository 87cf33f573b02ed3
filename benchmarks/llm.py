"""What `trce map` costs where a language model reads the prompt: true shapes, random weights.

    python benchmarks/llm.py --family z-image --captions 100       # 20 GB on paper, 8 GB on disk
    python benchmarks/llm.py --family qwen-image --captions 100

Checkpoints are built in --scratch in fp16 and removed in the end. The text encoder is written out; of the
transformer and the autoencoder only what is read is, the rest are holes in sparse files. The tokenizer is
that of the tests: it cuts words into more tokens than the real one. Encoding dominates, and its time goes
with the tokens; the limit beside it is what their products of matrices take at this machine's measured rate.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from map import as_toml, child, preset, write

PARAMETERS = {"z-image": 2560, "qwen-image": 3584}  # widths of the door, which say which family it is


def build(folder: Path, family: str, layers: int) -> None:
    """A diffusers folder in fp16 with the family's true shapes and random weights."""
    import diffusers
    import torch
    import transformers

    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    import tiny

    tiny.write_qwen_tokenizer(folder / "tokenizer")
    if family == "z-image":
        text = transformers.Qwen3Config(
            vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=layers or 36,
            num_attention_heads=32, num_key_value_heads=8, head_dim=128, rope_theta=1e6,
        )  # fmt: skip
        kinds = (transformers.Qwen3Model, diffusers.ZImageTransformer2DModel, diffusers.AutoencoderKL)
        vae: dict[str, Any] = {
            "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2, "latent_channels": 16,
            "sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159,
        }  # fmt: skip
        names = ("ZImagePipeline", "Qwen3Model", "cap_embedder")
    else:
        text = transformers.Qwen2_5_VLConfig(
            text_config={
                "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
                "num_hidden_layers": layers or 28, "num_attention_heads": 28, "num_key_value_heads": 4,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            }
        )  # fmt: skip
        kinds = (
            transformers.Qwen2_5_VLTextModel,
            diffusers.QwenImageTransformer2DModel,
            diffusers.AutoencoderKLQwenImage,
        )
        vae, names = {}, ("QwenImagePipeline", "Qwen2_5_VLForConditionalGeneration", "txt_")
    with torch.device("meta"):
        models = {
            "text_encoder": kinds[0](getattr(text, "text_config", text)),
            "transformer": kinds[1](),
            "vae": kinds[2](**vae),
        }
    text.save_pretrained(folder / "text_encoder")
    for part, wanted in (("text_encoder", ""), ("transformer", names[2]), ("vae", "nothing")):
        if part != "text_encoder":
            models[part].save_config(folder / part)
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        shapes = {key: tuple(value.shape) for key, value in models[part].state_dict().items()}
        write(folder / part / f"{stem}.safetensors", shapes, (wanted,))
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": names[0],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", names[1]],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", kinds[1].__name__],
        "vae": ["diffusers", kinds[2].__name__],
    }
    (folder / "model_index.json").write_text(json.dumps(index))


def work(folder: Path, toml: Path, captions: Path) -> dict[str, float]:
    """Operations that encoding every distinct prefix once takes, and the checkpoint's bytes."""
    import math

    from trce_cli.checkpoint.open import open_checkpoint
    from trce_cli.erase.map_plan import distinct_prompts
    from trce_cli.erase.prior import choose_prior
    from trce_cli.prompts.pairs import prompt_pairs
    from trce_cli.prompts.presets import load_presets

    checkpoint = open_checkpoint(str(folder))
    prior = choose_prior(checkpoint, captions)
    prompts = distinct_prompts(prompt_pairs(load_presets([str(toml)])))
    text: Any = checkpoint.family.text(checkpoint, "cpu", __import__("torch").float32)
    prefixes = {
        tokens.ids[:end]
        for tokens in text.tokenizer.tokens({*prompts, *prior.captions, *prior.canaries})
        for end in range(1, len(tokens.ids) + 1)
    }
    weights = checkpoint.family.text_weights(checkpoint.config)["text_encoder"]
    layers = sum(math.prod(shape) for name, shape in weights.items() if name.startswith("layers."))
    apparent = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    return {"tokens": len(prefixes), "flops": 2 * layers * len(prefixes), "bytes": apparent}


def main() -> None:
    if sys.argv[1:2] == ["--part"]:
        name, *paths = sys.argv[2:]
        if name == "build":
            build(Path(paths[0]), paths[1], int(paths[2]))
        print(json.dumps({} if name == "build" else work(*map(Path, paths))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=PARAMETERS, default="z-image")
    parser.add_argument("--captions", type=int, default=2400, help="of the built-in prior, the first so many")
    parser.add_argument("--layers", type=int, default=0, help="of the text encoder; else as many as it has")
    parser.add_argument("--concepts", type=int, default=12)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as place:
        measure(Path(place), options)


def measure(scratch: Path, options: argparse.Namespace) -> None:
    """Build, map to a LoRA, print a table."""
    from trce_cli.prompts.captions import prior_captions

    folder, toml, captions = scratch / "checkpoint", scratch / "preset.toml", scratch / "captions.txt"
    toml.write_text(as_toml(preset(options.concepts, 3)))
    captions.write_text("\n".join(prior_captions()[: options.captions]))
    own = [sys.executable, __file__, "--part"]
    child([*own, "build", str(folder), options.family, str(options.layers)])
    known, _, _ = child([*own, "work", str(folder), str(toml), str(captions)])
    rates, _, _ = child(
        [sys.executable, str(Path(__file__).with_name("map.py")), "--part", "machine", str(scratch)]
    )
    command = [sys.executable, "-m", "trce_cli", "map", folder, "--preset", toml, "--prior", captions]
    command += [
        "--output",
        scratch / "out.safetensors",
        "--as",
        "lora",
        "--device",
        "cpu",
        "--json",
        "--quiet",
    ]
    _, seconds, peak = child(list(map(str, command)), TRCE_CACHE=str(scratch / "cache"))
    print("| family | checkpoint, GB | captions | tokens | s | limit of encoding, s | peak memory, GB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    print(
        f"| {options.family} | {known['bytes'] / 1e9:.1f} | {options.captions:,} | {known['tokens']:,} "
        f"| {seconds:.0f} | {known['flops'] / rates['flops']:.0f} | {peak / 1e9:.2f} |"
    )
    print(f"\n{rates['flops'] / 1e9:.0f} GFLOP/s in fp32, measured before it.")


if __name__ == "__main__":
    main()
