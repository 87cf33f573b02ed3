"""What `trce map` costs, against the procedure as it is commonly published, and how near it is to its limit.

    python benchmarks/map.py                  # SD 1.x: 300 prompt pairs, and many more
    python benchmarks/map.py --family sdxl    # trce alone: the plain version would need 20 GB
    python benchmarks/map.py --family z-image --captions 100     # a transformer: 20 GB, of which 8 on disk
    python benchmarks/map.py --family flux --captions 5 --layers 3

Checkpoints have the true shapes and random weights in fp16 (`true_shapes.py`); they are built in --scratch,
which should be in memory, and removed in the end. The plain version is written here from the paper alone and
shares no code with the package: the whole pipeline loaded in fp32, each prompt of a pair and each caption
encoded on its own at 77 positions, every layer's sums and inverse separately, the U-Net saved. Both
versions run in processes of their own, one after the other, on the same pairs and captions; peak memory is
the kernel's figure for the process, libraries included.

For SDXL the tensors that are neither a text encoder's nor changed are holes in a sparse file, and the output
goes to --output-folder, because two whole copies would need 14 GB of memory. Families of transformers are
mapped to a LoRA. There encoding dominates, and its time goes with the tokens: the limit beside it is what
their products of matrices take at this machine's measured rate.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import islice, product
from pathlib import Path
from typing import Any

from benchmarks.true_shapes import TRANSFORMERS, U_NETS, build

PRESERVE = 1.0
GOALS = {"whole command, s": 15, "solve alone, s": 100, "peak memory, MB": 5}

COLOURS = ["red", "blue", "green", "black", "white", "golden", "silver", "wooden", "broken", "rusty"]
PLACES = (
    "|from the war|with a handle|in its case|on a chain|with engravings|made of steel|of a soldier|in a hand"
)
NAMES = "knife|pistol|rifle|sword|grenade|dagger|machete|revolver|crossbow|bayonet|shotgun|hatchet"
SAFE = "tulip|teapot|apple|candle|violin|book|lamp|basket|pillow|kite|spoon"


# What both versions are given


def preset(concepts: int, templates: int) -> dict[str, Any]:
    """A preset of so many concepts, two to six words each, in so many of the templates of objects."""
    from trce_cli.prompts.templates import TEMPLATES

    every = product(PLACES.split("|"), COLOURS, NAMES.split("|"))
    unsafe = [f"a {colour} {name} {place}".strip() for place, colour, name in islice(every, concepts)]
    safe = [f"a {SAFE.split('|')[number % 11]}" for number in range(concepts)]
    assert len(set(unsafe)) == concepts
    return {
        "name": "benchmark",
        "description": "Weapons of many kinds",
        "kind": "object",
        "templates": list(TEMPLATES["object"][:templates]),
        "concepts": [{"unsafe": a, "safe": b} for a, b in zip(unsafe, safe, strict=True)],
    }


def as_toml(table: Mapping[str, Any]) -> str:
    lines = [f"{key} = {json.dumps(value)}" for key, value in table.items() if key != "concepts"]
    for concept in table["concepts"]:
        lines += ["[[concepts]]", *(f"{key} = {json.dumps(value)}" for key, value in concept.items())]
    return "\n".join(lines) + "\n"


# The plain version


def plain(folder: Path, output: Path, table: Mapping[str, Any], captions: list[str]) -> dict[str, float]:
    """The published procedure; returns the seconds of its phases."""
    import torch
    from diffusers import StableDiffusionPipeline

    clock = [time.perf_counter()]
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, safety_checker=None)

    @torch.no_grad()
    def encode(prompt: str) -> torch.Tensor:
        """The states of a prompt up to its EoT, (tokens, dim); the last one is the EoT's."""
        batch = pipe.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt")
        return pipe.text_encoder(batch.input_ids)[0][0, : int(batch.attention_mask.sum())]

    clock.append(time.perf_counter())
    pairs = [
        tuple(encode(template.replace("{}", concept[side]))[-1] for side in ("unsafe", "safe"))
        for concept in table["concepts"]
        for template in table["templates"]
    ]
    clock.append(time.perf_counter())
    benign = [encode(caption) for caption in captions]
    clock.append(time.perf_counter())
    with torch.no_grad():
        for name, module in pipe.unet.named_modules():
            if name.endswith(("attn2.to_k", "attn2.to_v")):
                W = module.weight
                left, right = torch.zeros_like(W), torch.zeros(W.shape[1], W.shape[1])
                for o, n in pairs:
                    left += torch.outer(W @ n, o) / len(pairs)
                    right += torch.outer(o, o) / len(pairs)
                for C in benign:
                    left += PRESERVE * (W @ C.T) @ C / len(benign)
                    right += PRESERVE * C.T @ C / len(benign)
                module.weight.copy_(left @ torch.inverse(right))
    clock.append(time.perf_counter())
    pipe.unet.save_pretrained(output)
    clock.append(time.perf_counter())
    names = ("load", "pairs", "captions", "solve", "save")
    return {name: after - before for name, before, after in zip(names, clock, clock[1:], strict=False)}


# The parts of ours


def parts(folder: Path, table: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of the solution alone, and the work that cannot be avoided.

    solve: statistics, solution and new weights of all layers, from embeddings that are there. flops: to
    encode every distinct prefix once. bytes: of the checkpoint. encoders: bytes of the text encoders in fp32.
    """
    import torch

    from trce_cli.checkpoint.open import open_checkpoint
    from trce_cli.erase.map_plan import distinct_prompts
    from trce_cli.erase.moments import occurrences
    from trce_cli.erase.prior import choose_prior
    from trce_cli.erase.targets import embed_pairs
    from trce_cli.maths.closed_form import SecondMoment
    from trce_cli.prompts.pairs import prompt_pairs
    from trce_cli.prompts.presets import Preset

    checkpoint = open_checkpoint(str(folder))
    text = checkpoint.family.text(checkpoint, "cpu", torch.float32)
    slots = checkpoint.family.defaults.slots
    pairs, prior = prompt_pairs([Preset.model_validate(table)]), choose_prior(checkpoint)
    targets = embed_pairs(text, pairs, [slots]).targets(slots)["context"]
    batches = [batch["context"] for batch in text.states(text.content(prior.captions))]
    states = [(found.embeddings, occurrences(found, Counter(prior.captions))) for found in batches]
    weights = [checkpoint.read("denoiser", key) for key in checkpoint.door_weights()["context"]]

    start = time.perf_counter()
    moment = SecondMoment(text.streams["context"], len(prior.captions))
    for context, times in states:
        moment.update(context, times)
    solved = targets.fitter().solve(moment.P, PRESERVE).map
    for weight in weights:
        solved.edit(weight).to(weight.dtype)
    solve = time.perf_counter() - start

    per_token = 2 * sum(
        config["num_hidden_layers"]
        * (4 * config["hidden_size"] + 2 * config["intermediate_size"])
        * config["hidden_size"]
        for config in (encoder.config for encoder in text.encoders)
    )

    def flops(texts: Iterable[str]) -> int:
        prefixes = {t.ids[0][:end] for t in text.tokenizers.tokens(set(texts)) for end in range(1, t.eot + 2)}
        return per_token * len(prefixes)

    prompts = distinct_prompts(pairs)
    return {
        "solve": solve,
        "prompts": len(prompts),
        "flops of prompts": flops(prompts),
        "flops of captions": flops(prior.captions) + flops(prior.canaries),
        "bytes": checkpoint.total_bytes(),
        "encoders": 4
        * sum(
            math.prod(shape)
            for shapes in checkpoint.family.text_weights(checkpoint.config).values()
            for shape in shapes.values()
        ),
    }


def encoding(folder: Path, toml: Path, captions: Path, family: str) -> dict[str, float]:
    """Of a transformer's family: the checkpoint's bytes, the positions that the map encodes, and the
    operations that this takes at least.

    A causal encoder reads every distinct prefix once; T5 reads each prompt whole, with its padding.
    """
    import torch

    from trce_cli.checkpoint.open import open_checkpoint
    from trce_cli.erase.map_plan import distinct_prompts
    from trce_cli.erase.prior import choose_prior
    from trce_cli.erase.settings import MapSettings
    from trce_cli.erase.vocabulary import asked_words
    from trce_cli.prompts.pairs import prompt_pairs
    from trce_cli.prompts.presets import load_presets

    checkpoint = open_checkpoint(str(folder))
    prior = choose_prior(checkpoint, captions)
    text: Any = checkpoint.family.text(checkpoint, "cpu", torch.float32)
    prompts = distinct_prompts(prompt_pairs(load_presets([str(toml)])))
    prompts |= {*prior.captions, *prior.canaries, *prior.bystanders}
    prompts |= {*asked_words(text, MapSettings().words_asked).prompts}
    shapes = TRANSFORMERS[family]
    if shapes.positions:
        positions = shapes.positions * len(prompts)
    else:
        tokens = text.tokenizer.tokens(prompts)
        positions = len({t.ids[:end] for t in tokens for end in range(1, len(t.ids) + 1)})
    encoder = list(shapes.encoders)[-1]  # beside which CLIP costs little
    weights = checkpoint.family.text_weights(checkpoint.config)[encoder]
    products = [math.prod(shape) for key, shape in weights.items() if len(shape) == 2 and "embed" not in key]
    return {
        "prompts": len(prompts),
        "positions": positions,
        "flops": 2 * sum(products) * positions,
        "bytes": sum(path.stat().st_size for path in folder.rglob("*.safetensors")),
    }


def machine(scratch: Path) -> dict[str, float]:
    """This machine's rates: fp32 operations a second in a large matrix product, bytes a second copied."""
    import torch

    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    source, target = scratch / "copied", scratch / "copy"
    source.write_bytes(b"\1" * (1 << 28))
    products, copies = (
        [timed(action) for _ in range(9)]
        for action in (lambda: a @ b, lambda: shutil.copyfile(source, target))
    )
    source.unlink()
    target.unlink()
    return {
        "flops": 2 * 2048**3 / statistics.median(products),
        "copy": (1 << 28) / statistics.median(copies),
    }


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


# The comparison


def child(command: list[str], **environment: str) -> tuple[dict[str, float], float, int]:
    """Run a command: its output, read as JSON, wall seconds, and peak memory in bytes.

    This process imports nothing large, so what the kernel counts is the command's own.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
    assert process.stdout
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}.")
    return json.loads(text), time.perf_counter() - start, usage.ru_maxrss * 1024


def part(name: str, *args: object) -> tuple[dict[str, float], float, int]:
    """Run one of `PARTS` in a process of its own."""
    return child([sys.executable, __file__, "--part", name, *map(str, args)])


def as_part(name: str, *args: str) -> None:
    import warnings

    warnings.filterwarnings("ignore")
    paths = [Path(arg) for arg in args]
    found: dict[str, float] = {}
    if name == "build":
        build(paths[0], args[1], int(args[2]))
    elif name == "plain":
        table, captions = json.loads(paths[1].read_text()), json.loads(paths[3].read_text())
        found = plain(paths[0], paths[2], table, captions)
    elif name == "parts":
        found = parts(paths[0], json.loads(paths[1].read_text()))
    elif name == "encoding":
        found = encoding(*paths[:3], args[3])
    else:
        found = machine(paths[0])
    print(json.dumps(found))


def main() -> None:
    if sys.argv[1:2] == ["--part"]:
        return as_part(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=(*U_NETS, *TRANSFORMERS), default="sd1")
    parser.add_argument(
        "--sizes", default="20x15,100x15,1000x15", help="of a U-Net: concepts x templates, the first compared"
    )
    parser.add_argument("--no-plain", action="store_true", help="leave the plain version out")
    parser.add_argument(
        "--captions", type=int, default=100, help="of a transformer: of the built-in prior, the first so many"
    )
    parser.add_argument(
        "--concepts", type=int, default=12, help="of a transformer: concepts, in three templates"
    )
    parser.add_argument(
        "--layers", type=int, default=0, help="of a transformer: of its text encoder, 0 for all"
    )
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--output-folder", type=Path, help="where outputs go; else --scratch")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(dir=options.scratch) as scratch,
        tempfile.TemporaryDirectory(dir=options.output_folder or options.scratch) as outputs,
    ):
        (compare if options.family in U_NETS else measure)(Path(scratch), Path(outputs), options)
    return None


def measure(scratch: Path, outputs: Path, options: argparse.Namespace) -> None:
    """Map a transformer's family to a LoRA and print a Markdown table."""
    from trce_cli.prompts.captions import prior_captions

    folder, toml, captions = scratch / "checkpoint", scratch / "preset.toml", scratch / "captions.txt"
    toml.write_text(as_toml(preset(options.concepts, 3)))
    captions.write_text("\n".join(prior_captions()[: options.captions]))
    part("build", folder, options.family, options.layers)
    known, _, _ = part("encoding", folder, toml, captions, options.family)
    rates, _, _ = part("machine", outputs)
    command = [sys.executable, "-m", "trce_cli", "map", folder, "--preset", toml, "--prior", captions]
    command += ["--output", outputs / "out.safetensors", "--as", "lora", "--device", "cpu"]
    # Random weights are erased well or badly by chance: what it costs is the same.
    command += ["--max-collateral", "99", "--json", "--quiet"]
    _, seconds, peak = child(list(map(str, command)), TRCE_CACHE=str(scratch / "cache"))
    print("| family | checkpoint, GB | peak memory, GB | prompts | positions | s | limit of encoding, s |")
    print("| --- " + "| ---: " * 6 + "|")
    print(
        f"| {options.family} | {known['bytes'] / 1e9:.1f} | {peak / 1e9:.2f} | {known['prompts']:,.0f} "
        f"| {known['positions']:,.0f} | {seconds:.0f} | {known['flops'] / rates['flops']:.0f} |"
    )
    print(
        f"\nfp16, {f'{options.layers} layers' if options.layers else 'all layers'} of the text encoder; "
        f"{os.cpu_count()} cores, {rates['flops'] / 1e9:.0f} GFLOP/s in fp32. Who loads the pipeline needs "
        "as much memory as the checkpoint has bytes, and more."
    )


def compare(scratch: Path, outputs: Path, options: argparse.Namespace) -> None:
    """Run everything of a U-Net's family and print Markdown tables."""
    from trce_cli.prompts.captions import prior_captions

    folder, output, cache = scratch / "checkpoint", outputs / "out", scratch / "cache"
    part("build", folder, options.family, 0)
    (scratch / "captions.json").write_text(json.dumps(prior_captions()))
    rates, _, _ = part("machine", outputs)

    def trce(toml: Path) -> tuple[float, int]:
        command = [sys.executable, "-m", "trce_cli", "map", folder, "--preset", toml, "--output", output]
        command += ["--preserve", PRESERVE, "--device", "cpu", "--json", "--quiet"]
        _, seconds, peak = child(list(map(str, command)), TRCE_CACHE=str(cache))
        shutil.rmtree(output)
        return seconds, peak

    rows, known = [], {}
    for number, size in enumerate(options.sizes.split(",")):
        concepts, templates = map(int, size.split("x"))
        table = preset(concepts, templates)
        (scratch / "preset.json").write_text(json.dumps(table))
        (scratch / "preset.toml").write_text(as_toml(table))
        shutil.rmtree(cache, ignore_errors=True)
        first, first_peak = trce(scratch / "preset.toml")
        later, later_peak = trce(scratch / "preset.toml")
        known, _, _ = part("parts", folder, scratch / "preset.json")
        copy = known["bytes"] / rates["copy"]
        least = known["flops of prompts"] / rates["flops"]
        least_first = least + known["flops of captions"] / rates["flops"]
        rows.append(
            f"| {concepts:,} x {templates} | {known['prompts']:,} | {first:.1f} | {least_first + copy:.1f} "
            f"| {later:.1f} | {least + copy:.1f} | {known['solve']:.2f} "
            f"| {max(first_peak, later_peak) / 1e6:.0f} |"
        )
        if number == 0 and options.family != "sdxl" and not options.no_plain:
            paths = (folder, scratch / "preset.json", output, scratch / "captions.json")
            phases, seconds, peak = part("plain", *paths)
            shutil.rmtree(output)
            figures = {
                "whole command, s": (seconds, first, later),
                "solve alone, s": (phases["solve"], known["solve"], known["solve"]),
                "peak memory, MB": (peak / 1e6, first_peak / 1e6, later_peak / 1e6),
            }
            comparison = [
                f"| {name} | {a:.4g} | {b:.3g} | {c:.3g} | {a / b:.1f} | {a / c:.1f} | {GOALS[name]} |"
                for name, (a, b, c) in figures.items()
            ]
            print(f"{concepts} concepts x {templates} templates and {len(prior_captions()):,} captions:\n")
            print("| | plain | trce, first edit of a base | later ones | plain / first | / later | goal |")
            print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n" + "\n".join(comparison))
            print("\nPlain, s: " + ", ".join(f"{name} {took:.1f}" for name, took in phases.items()) + ".\n")
    print("| concepts x templates | prompts | first, s | limit | later, s | limit | solve, s | peak, MB |")
    print("| ---: " * 8 + "|\n" + "\n".join(rows))
    print(
        f"\n{options.family}, {known['bytes'] / 1e9:.2f} GB in fp16, text encoders "
        f"{known['encoders'] / 1e6:.0f} MB in fp32; {os.cpu_count()} cores, "
        f"{rates['flops'] / 1e9:.0f} GFLOP/s in fp32, copies of {rates['copy'] / 1e9:.2f} GB/s."
    )


if __name__ == "__main__":
    main()
