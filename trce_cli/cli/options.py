"""The arguments and options that several commands share, and the meaning of `--device` and `--dtype`."""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trce_cli.errors import BadInput
from trce_cli.evaluate.detectors.registry import usage
from trce_cli.prompts.presets import preset_names

if TYPE_CHECKING:
    import torch

    from trce_cli.checkpoint.checkpoint import Checkpoint

_DTYPES = {
    "fp32": "float32",
    "float32": "float32",
    "fp16": "float16",
    "float16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
}


def _check_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
        raise typer.BadParameter(f"{value!r} is none of auto, cpu, cuda, cuda:N, mps.")
    return value


def check_dtype(value: str | None) -> str | None:
    """torch's name of a dtype in any spelling."""
    if value is None:
        return None
    if value.lower() not in _DTYPES:
        raise typer.BadParameter(f"{value!r} is none of {', '.join(_DTYPES)}.")
    return _DTYPES[value.lower()]


_FORMS = ("diffusers", "single-file", "lora", "map")


def each_of(names: Sequence[str]) -> Callable[[list[str] | None], list[str] | None]:
    """The callback of an option that may be repeated, whose values are all among these."""

    def check(values: list[str] | None) -> list[str] | None:
        for value in values or []:
            if value not in names:
                raise typer.BadParameter(f"{value!r} is none of {', '.join(names)}.")
        return values

    return check


def _complete_preset(incomplete: str) -> list[str]:
    return [name for name in preset_names() if name.startswith(incomplete)]


CheckpointName = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="`emoji` (the embedded one), a diffusers folder, a .safetensors file, or a hub id.",
        show_default=False,
    ),
]
Presets = Annotated[
    list[str],
    typer.Option(
        "--preset",
        "-p",
        metavar="NAME|FILE",
        help="What to erase: a shipped preset's name or a TOML file; repeat it to erase several jointly.",
        autocompletion=_complete_preset,
        show_default=False,
    ),
]
PresetName = Annotated[
    str,
    typer.Argument(
        metavar="NAME|FILE",
        help="A shipped preset's name or a TOML file.",
        autocompletion=_complete_preset,
        show_default=False,
    ),
]
Output = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="PATH", help="Where the result goes.", show_default=False),
]
Device = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.", callback=_check_device)
]
DType = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="fp32, fp16 or bf16 (also float32, ...); the checkpoint's own where not given.",
        callback=check_dtype,
        show_default=False,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", help="Branch, tag or commit of a hub id.", show_default=False),
]
Variant = Annotated[
    str | None,
    typer.Option("--variant", help="Weight file variant, such as fp16.", show_default=False),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="DIR",
        help="For a single file: a diffusers folder with its configurations and tokenizers, "
        "instead of the published base's.",
        show_default=False,
    ),
]
Forms = Annotated[
    list[str] | None,
    typer.Option(
        "--as",
        metavar="|".join(_FORMS),
        callback=each_of(_FORMS),
        help="What to write; else what the input is. Repeat it for several, whose names begin with --output: "
        "OUT, OUT.safetensors, OUT.lora.safetensors, OUT.map.safetensors.",
        show_default=False,
    ),
]
Rank = Annotated[
    int | None,
    typer.Option("--rank", min=1, help="For --as lora: how many directions it keeps.", show_default=False),
]
Energy = Annotated[
    float | None,
    typer.Option(
        "--energy",
        help="For --as lora, in place of --rank: share of the squared singular values to keep; else 0.999.",
        show_default=False,
    ),
]
EditDType = Annotated[
    str | None,
    typer.Option(
        "--edit-dtype",
        help="For --as lora and map: fp32 or fp16; else fp32.",
        callback=check_dtype,
        show_default=False,
    ),
]
Link = Annotated[
    bool,
    typer.Option(
        "--link",
        help="Share unchanged files with the input, not copies, where both lie on one file system.",
    ),
]
# What is asked of a checkpoint, and who looks: for all commands that judge.
AGAINST = typer.Option(
    "--against", metavar="ORIGINAL", help="The checkpoint that it was made from.", show_default=False
)
Suites = Annotated[
    list[str] | None,
    typer.Option(
        "--suite",
        metavar="NAME[=FILE]",
        help="explicit, implied, context, benign: only these of the built-in ones (none: none of them); "
        "NAME=FILE.csv: prompts of your own, in the columns that `trce generate` reads.",
        show_default=False,
    ),
]
Count = Annotated[
    int | None,
    typer.Option(
        "--count",
        min=1,
        help="Prompts a built-in suite, 200 where not given, and at most so many of a file.",
        show_default=False,
    ),
]
Detectors = Annotated[
    list[str] | None,
    typer.Option(
        "--detector",
        metavar="NAME[:MODEL]",
        help=f"{usage()}, or one of an installed package; repeat it for several, the first gives the "
        "headline figures.",
        show_default=False,
    ),
]
Thresholds = Annotated[
    list[str] | None,
    typer.Option(
        "--threshold",
        metavar="[NAME=]SCORE",
        help="From which score on a detector's label counts, instead of its customary ones; "
        "repeat it to report several side by side.",
        show_default=False,
    ),
]
EvaluationSteps = Annotated[
    int | None,
    typer.Option("--steps", min=1, help="Denoising steps: 50, `emoji` 25.", show_default=False),
]
EvaluationGuidance = Annotated[
    float | None,
    typer.Option(
        "--guidance-scale",
        help="Classifier-free guidance, instead of a file's own or the checkpoint's usual one.",
        show_default=False,
    ),
]
NegativePrompt = Annotated[
    str,
    typer.Option(
        "--negative-prompt",
        help="What CHECKPOINT alone is steered away from: the baseline that needs no editing.",
        show_default=False,
    ),
]
EvaluationScheduler = Annotated[
    str | None,
    typer.Option("--scheduler", help="As for `trce generate`; else CHECKPOINT's.", show_default=False),
]
DrawBatch = Annotated[
    int, typer.Option("--batch-size", min=1, help="Images drawn at once; changes none of them.")
]
DrawDType = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="fp32, fp16 or bf16 (also float32, ...); else fp16 on CUDA and fp32 elsewhere.",
        callback=check_dtype,
        show_default=False,
    ),
]
PriorFile = Annotated[
    Path | None,
    typer.Option(
        "--prior",
        metavar="FILE",
        help="Benign captions to preserve: .txt, one a line, or .csv with a prompt or caption column; "
        "else the built-in ones.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of every random choice.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON value on stdout, human output on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and errors.")]


def files_read(presets: list[str], *others: Path | None) -> list[Path]:
    """The files and folders among a command's arguments that it reads; presets may also be names."""
    paths = [path for path in map(Path, presets) if path.is_file()]
    return paths + [path for path in others if path is not None]


def resolve_device(name: str) -> "torch.device":
    """The torch device of `--device`: auto takes CUDA, then MPS, then CPU; BadInput where it is absent."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        absent = (device.index or 0) >= torch.cuda.device_count()
    else:
        absent = device.type == "mps" and not torch.backends.mps.is_available()
    if absent:
        raise BadInput(f"This machine has no device {name!r}.", "Use --device auto, or --device cpu.")
    return device


def check_outside(output: Path, checkpoints: Iterable["Checkpoint"]) -> None:
    """Raise BadInput for an output that lies in the folder of one of the checkpoints it is made from."""
    for opened in checkpoints:
        if opened.path.is_dir() and output.resolve().is_relative_to(opened.path.resolve()):
            raise BadInput(f"{output} lies in the checkpoint {opened.name}.", "Choose another --output.")


def resolve_dtype(name: str | None) -> "torch.dtype | None":
    """The torch dtype of `--dtype`, None where it was not given."""
    import torch

    return None if name is None else getattr(torch, name)
