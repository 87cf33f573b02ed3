"""Further kinds: other families and forms of weights, edits of other trainers, and runs that were stopped."""

import json
import math
import struct
from typing import Any, Final

from hypothesis import strategies as st

from fuzz.kinds import DRAWN, MAP, OUT, Case, Whole, _read, kind, picture, table
from fuzz.strategies import (
    Tensors,
    header,
    json_text,
    lying,
    mangled,
    other_tensors,
    rarely,
    safetensors,
    tensors_of,
    toml,
)
from fuzz.world import FAMILIES, STOPPED, Lying


@kind("families' files")
def families(draw: st.DrawFn, whole: Whole) -> Case:
    """Files of other families' weights, plain and in fp8 with scales, beside a folder with all else."""
    base = draw(st.sampled_from(sorted(FAMILIES)))
    name = f"{base}.safetensors"
    if base == "flux" and draw(st.booleans()):
        name = "fp8.safetensors"
    content = draw(
        lying(st.one_of(other_tensors(whole[name]), other_tensors(whole[name]), header(whole[name])))
    )
    config = ["--config", base] if not rarely(draw) else []
    edit = f"map-{base}.safetensors"
    args = draw(
        st.sampled_from(
            [
                ["inspect", name, *config],
                ["apply", edit, name, *config, *OUT],
                ["apply", edit, name, *config, "-o", "out/x.safetensors"],
                ["apply", edit, name, *config, "--as", "diffusers", *OUT],
                ["apply", edit, name, *config, "--as", "lora", *OUT],
                ["generate", name, "a cat", *config, *DRAWN, *OUT],
                ["diff", name, base, *config],
            ]
        )
    )
    return Case(args, {name: content})


GGUF: Final = struct.pack("<4sIQQ", b"GGUF", 3, 1, 1) + struct.pack("<Q", 20) + b"general.architecture"


@st.composite
def in_four_bits(draw: st.DrawFn, content: bytes) -> bytes:
    """A file whose matrices are as bitsandbytes packs them, with more or less of what it says beside them."""
    tensors, metadata = tensors_of(content)
    packed: Tensors = {}
    kept = draw(st.sets(st.sampled_from(["absmax", "quant_map", "state"])))
    for name, (dtype, shape, data) in tensors.items():
        if len(shape) != 2:
            packed[name] = dtype, shape, data
            continue
        size = math.prod(shape) // 2
        packed[name] = "U8", [size, 1], data[:size].ljust(size, b"\0")
        if "absmax" in kept:
            packed[f"{name}.absmax"] = "F32", [1], b"\0\0\x80\x3f"
        if "quant_map" in kept:
            packed[f"{name}.quant_map"] = "F32", [16], b"\0" * 64
        if "state" in kept:
            packed[f"{name}.quant_state.bitsandbytes__nf4"] = "U8", [2], b"{}"
    return (
        draw(other_tensors(safetensors(packed, metadata)))
        if rarely(draw, 2)
        else safetensors(packed, metadata)
    )


@kind("quantized files")
def quantized(draw: st.DrawFn, whole: Whole) -> Case:
    """GGUF under any name, nf4 in a file and in a folder."""
    if draw(st.booleans()):
        name = draw(st.sampled_from(["x.gguf", "sd1.safetensors", "map.safetensors", "x.ckpt", "x.bin"]))
        base, content = "sd1", draw(lying(st.one_of(st.just(GGUF), mangled(GGUF))))
    else:
        name, base = draw(
            st.sampled_from(
                [
                    ("sd1.safetensors", "sd1"),
                    ("flux.safetensors", "flux"),
                    ("z/transformer/diffusion_pytorch_model.safetensors", "z"),
                ]
            )
        )
        content = draw(lying(in_four_bits(whole[name])))
    files: dict[str, Lying] = {name: content}
    if base == "z":
        config = "z/transformer/config.json"
        told = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        files[config] = draw(json_text(_read(whole, config) | {"quantization_config": told}))
    source, edit = (base, "map-z.safetensors") if base == "z" else (name, "map.safetensors")
    more = [] if base == "z" else ["--config", base]
    args = draw(
        st.sampled_from(
            [
                ["inspect", source],
                ["apply", edit, source, *more, *OUT],
                ["apply", source, base, *OUT],
                ["generate", source, "a cat", *more, *DRAWN, *OUT],
                [
                    "map",
                    source,
                    "-p",
                    "preset.toml",
                    "--prior",
                    "captions.txt",
                    "--device",
                    "cpu",
                    *more,
                    *OUT,
                ],
            ]
        )
    )
    return Case(args, files)


WEIGHTS: Final = "sd1/unet/diffusion_pytorch_model.safetensors"
PLACES: Final = (
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "mid_block.attentions.0.proj_in",
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
)
TRAINERS: Final = ("LoRA", "DoRA", "LoHa", "LoKr", "PEFT", "diffusers")


def adapter(trainer: str, place: str, shape: list[int]) -> Tensors:
    """What a trainer writes of one layer, of rank 2."""
    out, into, *kernel = shape
    ones = [1] * len(kernel)
    named = {
        "PEFT": f"base_model.model.{place}.",
        "diffusers": f"unet.{place}.",
    }.get(trainer, f"lora_unet_{place.replace('.', '_')}.")
    down, up = ("lora_A", "lora_B") if trainer in ("PEFT", "diffusers") else ("lora_down", "lora_up")
    shapes: dict[str, list[int]] = {f"{down}.weight": [2, into, *kernel], f"{up}.weight": [out, 2, *ones]}
    wide = into * math.prod(kernel)
    if trainer == "LoHa":
        shapes = {f"hada_w{n}_{x}": [out, 2] if x == "a" else [2, wide] for n in (1, 2) for x in "ab"}
    if trainer == "LoKr":
        shapes = {"lokr_w1": [2, 2], "lokr_w2": [out // 2, into // 2, *kernel]}
    if trainer == "DoRA":
        shapes["dora_scale"] = [out, 1, *ones]
    if trainer not in ("PEFT", "diffusers"):
        shapes["alpha"] = []
    value = struct.pack("<f", 0.01)
    return {named + part: ("F32", each, value * math.prod(each)) for part, each in shapes.items()}


@kind("other trainers' edits")
def adapters(draw: st.DrawFn, whole: Whole) -> Case:
    """LoRAs, DoRAs, LoHas, LoKrs and PEFT's files, also of several at once."""
    weights, _ = tensors_of(whole[WEIGHTS])
    tensors: Tensors = {}
    for place in draw(st.lists(st.sampled_from(PLACES), min_size=1, max_size=3, unique=True)):
        for trainer in draw(st.lists(st.sampled_from(TRAINERS), min_size=1, max_size=2)):
            tensors |= adapter(trainer, place, weights[f"{place}.weight"][1])
    content = safetensors(tensors, {"format": "pt"})
    if not rarely(draw, 3):
        content = draw(other_tensors(content))
    name, allow = "adapter.safetensors", ["--allow-other-text-encoder"]
    strength = draw(st.sampled_from([[], ["--strength", "0.5"], ["--strength", "1e30"]]))
    args = draw(
        st.sampled_from(
            [
                ["inspect", name],
                ["inspect", "sd1", "--edit", name],
                ["apply", name, "sd1", *allow, *strength, *OUT],
                ["apply", name, "map.safetensors", "sd1", *allow, *OUT],
                ["apply", name, "sdxl", *allow, *OUT],
                ["apply", name, "sd1", *allow, "--as", "lora", "--as", "single-file", *OUT],
            ]
        )
    )
    return Case(args, {name: draw(lying(st.just(content)))})


@kind("includes")
def includes(draw: st.DrawFn, whole: Whole) -> Case:
    """Presets that include each other: in chains, in circles, and the same ones on many ways."""
    count = draw(st.integers(1, 40))
    ahead = draw(st.sampled_from([1, 2, 3, count]))
    files: dict[str, Lying] = {}
    for number in range(count):
        others = [f"a{min(number + step, count - 1)}.toml" for step in range(1, ahead + 1)][:12]
        if rarely(draw, 30):
            others.append(
                draw(st.sampled_from(["a0.toml", ".", "weapons", "nothing.toml", "../work/a1.toml"]))
            )
        told = {"name": f"a{number}", "description": "One of many", "kind": "object"}
        told |= {"includes": others} if number < count - 1 or rarely(draw) else {}
        told |= {"concepts": [{"unsafe": f"a knife {number}", "safe": "a cat"}]}
        text = "\n".join(f"{key} = {toml(value)}" for key, value in told.items())
        files[f"a{number}.toml"] = draw(lying(st.just(text.encode()))) if rarely(draw, 20) else text.encode()
    args = draw(
        st.sampled_from(
            [
                ["presets", "check", "a0.toml"],
                ["presets", "show", "a0.toml", "--pairs"],
                [*MAP, "-p", "a0.toml", "--prior", "captions.txt", "--dry-run", *OUT],
            ]
        )
    )
    return Case(args, files)


def _first_line(content: bytes) -> st.SearchStrategy[bytes]:
    first, *more = content.split(b"\n")
    return json_text(json.loads(first)).map(lambda one: b"\n".join([one, *more]))


@kind("stopped runs")
def stopped_runs(draw: st.DrawFn, whole: Whole) -> Case:
    """What stopped runs of `evaluate`, `tune` and `attack` left, and the shards of `generate`."""
    command = draw(st.sampled_from(sorted(STOPPED)))
    args, _, place = STOPPED[command]
    before = f"stopped/{command}/"
    files: dict[str, Lying] = {
        name.replace(before, f"{place}/"): content
        for name, content in whole.items()
        if name.startswith(before)
    }
    name = draw(st.sampled_from(sorted(files)))
    content: Any = files[name]
    match name.rpartition(".")[2]:
        case "json":
            some = json_text(json.loads(content))
        case "jsonl":
            some = _first_line(content)
        case "png" if "pareto" not in name:
            some = picture(content)
        case "csv":
            some = table(content.decode())
        case _:
            some = mangled(content)
    files[name] = draw(lying(some))
    return Case([*args, *["--force"] * rarely(draw, 4)], files)
