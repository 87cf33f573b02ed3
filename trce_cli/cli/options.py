"""Options: how they are made from settings models, and those that several commands share."""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

import typer
from pydantic import AfterValidator, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from trce_cli.cli.console import Console
from trce_cli.edits.forms import FORMS
from trce_cli.errors import BadInput, Stopped
from trce_cli.prompts.presets import preset_names
from trce_cli.settings import Count, Flag, Settings, one_of, option_name
from trce_cli.system.paths import expanded
from trce_cli.system.processes import join_team
from trce_cli.system.shards import Shard, Share, from_environment, parse_shard

if TYPE_CHECKING:
    import torch

    from trce_cli.checkpoint.checkpoint import Checkpoint
    from trce_cli.checkpoint.push import Target
    from trce_cli.edits.outputs import Outputs
    from trce_cli.prompts.presets import Preset


# --- from a settings model to options


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command as Typer takes it: a parameter that is a settings model becomes one option a field.

    `drawing: Drawing` is handed the settings, checked. `given: Annotated[dict[str, Any], MapSettings]` is
    handed what the user gave, which is checked when it is laid over what presets recommend.
    """
    options: list[inspect.Parameter] = []
    models: dict[
        str, tuple[type[Settings], bool]
    ] = {}  # parameter -> its model, and whether it is checked here
    for parameter in inspect.signature(command).parameters.values():
        hints = (parameter.annotation, *getattr(parameter.annotation, "__metadata__", ()))
        model = next((hint for hint in hints if isinstance(hint, type) and issubclass(hint, Settings)), None)
        if model is None:
            options.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        else:
            models[parameter.name] = model, model is parameter.annotation
            options += [option_of(name, field) for name, field in model.model_fields.items()]

    @wraps(command)
    def run(**values: Any) -> None:
        is_quiet = bool(values.get("quiet"))
        for name, (model, is_checked) in models.items():
            told = {field: values.pop(field) for field in model.model_fields}
            for field in (field for field, value in told.items() if value is not None):
                if why := flag_of(model.model_fields[field]).gone:
                    Console(quiet=is_quiet).note(f"{option_name(field)} has no effect any more: {why}.")
            given = {field: _frozen(value) for field, value in told.items() if value is not None}
            values[name] = _checked(model, given) if is_checked else given
        command(**values)

    run.models = tuple(model for model, _ in models.values())  # type: ignore[attr-defined]
    return with_signature(run, options)


def goes_on(command: Callable[..., None]) -> Callable[..., None]:
    """A command that, stopped by a signal and started again, goes on where it was; stopped, it says so."""

    @wraps(command)
    def run(*args: Any, **values: Any) -> None:
        try:
            command(*args, **values)
        except KeyboardInterrupt:
            raise Stopped from None
        except SystemExit as stop:
            if isinstance(stop.code, int) and stop.code > 128:
                raise Stopped(stop.code) from None
            raise

    return run


def with_signature(command: Callable[..., None], options: list[inspect.Parameter]) -> Callable[..., None]:
    """The command as one with these parameters, to be asked for by name."""
    command.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    command.__annotations__ = {option.name: option.annotation for option in options}
    return command


def option_of(name: str, field: FieldInfo, of: str = "") -> inspect.Parameter:
    """The option of a field, None where it is not given: the default, told in the help, is the model's.

    of: what the setting belongs to, where that has to be said.
    """
    kind, nested = _plain_type(field.annotation)
    flag, default = flag_of(field), _spelt(field.default)
    text = f"{of}: {field.description}" if of else field.description or ""
    told = [f"default: {default}"] if default and "{default}" not in text else []
    told += _bounds([*field.metadata, *nested])
    option = typer.Option(
        *_flags(name, field),
        help=text.format(default=default) + (f"  [{'; '.join(told)}]" if told else ""),
        metavar=flag.metavar,
        parser=flag.parse,
        hidden=flag.gone is not None,
    )
    default_value = inspect.Parameter.empty if field.is_required() else None
    annotation = Annotated[kind, option]  # type: ignore[valid-type]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default_value, annotation=annotation
    )


def _checked(model: type[Settings], given: dict[str, Any]) -> Settings:
    return model.of(given, lambda name: _flags(name, model.model_fields[name])[0])


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def flag_of(field: FieldInfo) -> Flag:
    """How a field is spelt on the command line."""
    return next((mark for mark in field.metadata if isinstance(mark, Flag)), Flag())


def _flags(name: str, field: FieldInfo) -> tuple[str, ...]:
    return flag_of(field).names or (option_name(name),)


def key_of(name: str, field: FieldInfo) -> str:
    """What a field is called in a file: its option without dashes, `--edit-dtype` -> `edit_dtype`."""
    return _flags(name, field)[0].partition("/")[0].lstrip("-").replace("-", "_")


def _plain_type(annotation: Any) -> tuple[Any, list[Any]]:
    """A field's type as Typer knows it, and what stands with it in Annotated."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        kind, marks = _plain_type(arguments[0])
        infos = [mark for mark in arguments[1:] if isinstance(mark, FieldInfo)]
        return kind, [*marks, *(mark for info in infos for mark in info.metadata)]
    if origin in (Union, UnionType):  # with None, as options are that were not given
        others = [argument for argument in arguments if argument is not NoneType]
        return _plain_type(others[0]) if len(others) == 1 else (str, [])
    if origin is tuple and arguments[-1] is Ellipsis:
        return list[Path] if arguments[0] is Path else list[str], []
    return (str, []) if origin is tuple else (annotation, [])


def _bounds(marks: Iterable[Any]) -> list[str]:
    """`x>=1`, or `x>0; x<=1`, or nothing."""
    signs = {"gt": "x>", "ge": "x>=", "lt": "x<", "le": "x<="}
    found = [(sign, getattr(mark, name, None)) for mark in marks for name, sign in signs.items()]
    return [f"{sign}{bound:g}" for sign, bound in found if bound is not None]


def _spelt(value: Any) -> str:
    """A default as one types it; nothing for what goes without saying."""
    if value in (None, PydanticUndefined) or value is False:
        return ""
    if value is True:
        return "on"
    if isinstance(value, tuple):
        return ",".join(map(_spelt, value))
    return f"{value:g}".replace("e-0", "e-") if isinstance(value, float) else str(value)


# --- groups of options


def _check_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
        raise ValueError(f"must be auto, cpu, cuda, cuda:N or mps, not {value!r}")
    return value


_DTYPES = {
    "fp32": "float32",
    "float32": "float32",
    "fp16": "float16",
    "float16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
}


def _dtype_name(value: str) -> str:
    """torch's name of a dtype in any spelling."""
    if value.lower() not in _DTYPES:
        raise ValueError(f"must be one of {', '.join(_DTYPES)}, not {value!r}")
    return _DTYPES[value.lower()]


DTypeName = Annotated[str, AfterValidator(_dtype_name)]


class Published(Settings):
    """Where a single file's configurations are."""

    config: Annotated[Path | None, Flag(metavar="DIR")] = Field(
        None,
        description="For a single file: a diffusers folder with its configurations and tokenizers, "
        "instead of the published base's.",
    )

    def open_other(self, name: str) -> "Checkpoint":
        """A checkpoint that neither revision nor variant speak of."""
        from trce_cli.checkpoint.open import open_checkpoint

        return open_checkpoint(name, config=self.config)


class Opening(Published):
    """How a checkpoint is opened."""

    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    variant: str | None = Field(None, description="Weight file variant, such as fp16.")

    def open(self, name: str) -> "Checkpoint":
        """The checkpoint of that name."""
        from trce_cli.checkpoint.open import open_checkpoint

        return open_checkpoint(name, self.revision, self.variant, self.config)


_FORMS = [form.name for form in FORMS]


class Writing(Settings):
    """What an edit is written as."""

    forms: Annotated[
        tuple[Annotated[str, one_of(_FORMS)], ...], Flag(("--as",), metavar="|".join(_FORMS))
    ] = Field(
        (),
        description="What to write; else a file where --output ends in .safetensors, else what the input is. "
        "Repeat it for several, whose names begin with "
        f"--output: {', '.join(f'OUT{form.ending}' for form in FORMS)}.",
    )
    rank: Count | None = Field(None, description="For --as lora: how many directions it keeps.")
    energy: float | None = Field(
        None,
        description="For --as lora, in place of --rank: share of the squared singular values to keep; else "
        "0.999.",
    )
    edit_dtype: DTypeName | None = Field(None, description="For --as lora and map: fp32 or fp16; else fp32.")
    link: bool = Field(
        False,
        description="Share unchanged files with the input, not copies, where both lie on one file system.",
    )

    def outputs(self, checkpoint: "Checkpoint", output: Path, force: bool) -> "Outputs":
        """What is written where."""
        from trce_cli.edits.outputs import choose_outputs

        return choose_outputs(
            checkpoint, output, self.forms, self.rank, self.energy, self.edit_dtype, force, self.link
        )


class Publishing(Settings):
    """Whether what is written goes to the hub as well."""

    push_to_hub: Annotated[str | None, Flag(metavar="OWNER/NAME")] = Field(
        None,
        description="Once it is whole on disk, push it to a new repository of the hub, with its model "
        "card. The token is HF_TOKEN, or that of `hf auth login`.",
    )
    public: bool = Field(
        False, description="With --push-to-hub: a repository that everybody sees; else it is private."
    )

    def check(self) -> None:
        """Raise BadInput where nothing could be pushed; before any work."""
        if self.push_to_hub is not None:
            self._target(self.push_to_hub).check()
        elif self.public:
            raise BadInput("--public is for --push-to-hub, which is not given.")

    def push(
        self, console: Console, checkpoint: "Checkpoint", outputs: "Outputs", entry: Mapping[str, Any]
    ) -> str | None:
        """Push what was written, with trce.json and a model card; the repository's address."""
        if self.push_to_hub is None:
            return None
        from trce_cli.edits.outputs import published

        files = published(checkpoint, outputs, entry, self.push_to_hub)
        beside = next(path for _, path in outputs.forms)
        return self._push(console, self.push_to_hub, files, f"trce {entry['edit']}", beside)

    def push_carded(self, console: Console, checkpoint: "Checkpoint") -> str | None:
        """Push a folder with the card that it has, which tells how it is loaded from there; the address."""
        if self.push_to_hub is None:
            return None
        from trce_cli.checkpoint.push import carded

        files = carded(checkpoint, self.push_to_hub)
        return self._push(console, self.push_to_hub, files, "trce evaluate", checkpoint.path)

    def _push(
        self, console: Console, name: str, files: "Mapping[str, Path | bytes]", message: str, beside: Path
    ) -> str:
        console.note(f"Pushing {len(files)} files to {name}.")
        url = self._target(name).push(files, message, beside, console.has_bars)
        seen = "everybody sees it" if self.public else "only you see it"
        console.note(f"Pushed to {url}: {seen}.")
        return url

    def _target(self, name: str) -> "Target":
        from trce_cli.checkpoint.push import Target

        return Target(name, self.public)


class Computing(Settings):
    """Where it is computed."""

    device: Annotated[str, AfterValidator(_check_device)] = Field(
        "auto", description="auto, cpu, cuda, cuda:N or mps."
    )

    def place(self, team: Any = None) -> "torch.device":
        """The torch device: auto takes CUDA, then MPS, then CPU; BadInput where it is absent.

        team: processes of one launch, each of which takes a device of its own where that is left to us.
        """
        import torch

        name = self.device
        if team is not None and team.num_processes > 1 and name == "auto":
            device: torch.device = team.device
            return device
        if name == "auto":
            mps = torch.backends.mps.is_available()
            name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
        device = torch.device(name)
        if device.type == "cuda":
            absent = (device.index or 0) >= torch.cuda.device_count()
        else:
            absent = device.type == "mps" and not torch.backends.mps.is_available()
        if absent:
            raise BadInput(f"This machine has no device {name!r}.", "Use --device auto, or --device cpu.")
        return device


class Captions(Settings):
    """What is left alone."""

    prior: Annotated[Path | None, Flag(metavar="FILE")] = Field(
        None,
        description="Benign captions to preserve: .txt, one a line, or .csv with a prompt or caption column; "
        "else the built-in ones.",
    )


class Drawing(Computing):
    """How pictures are drawn; nothing of it changes what is on them but for rounding."""

    batch_size: Annotated[Count | None, Flag(gone="each image is drawn alone")] = None
    dtype: DTypeName | None = Field(
        None, description="fp32, fp16 or bf16 (also float32, ...); else fp16 on CUDA and fp32 elsewhere."
    )

    def precision(self, device: "torch.device") -> str:
        """torch's name of the dtype to draw in on that device."""
        from trce_cli.images.draw import default_dtype

        return self.dtype or default_dtype(device)


class Sharing(Settings):
    """How work is shared over machines."""

    shard: Annotated[Shard | None, Flag(metavar="I/N", parse=parse_shard)] = Field(
        None,
        description="Do part I of N alone, for array jobs: all into one --output or each into its own; "
        "--merge then concludes. Where not given it is that of Slurm's array task or SkyPilot's node; 1/1 is "
        "all.",
    )
    merge: Annotated[tuple[Path, ...], Flag(metavar="OUTPUT")] = Field(
        (),
        description="Conclude from what shards left in this output, which may be --output itself; repeat it "
        "for several. Nothing is made anew; shards that are missing are named.",
    )

    def share(self, device: str) -> Share:
        """What this process does of the work; `device` is that of `--device`."""
        if self.merge and self.shard is not None:
            raise BadInput("--merge joins what --shard makes.", "Give one of them.")
        shard = self.shard or (Shard() if self.merge else from_environment())
        return Share(shard, join_team(device), tuple(map(expanded, self.merge)))


def told_shard(console: Console, output: Path, share: Share, told: Mapping[str, Any] | None = None) -> None:
    """Say, where a part was done, that it is, and how the whole is concluded."""
    if share.is_part:
        console.show(
            f"Shard {share.shard} is done in {output}. When all are, give the same line with "
            f"--merge {output} in place of --shard, once for each output."
        )
        console.result({"output": output, "shard": str(share.shard), **(told or {})})


class Answer(Settings):
    """In which form the answer is given."""

    as_json: Annotated[bool, Flag(("--json",))] = Field(
        False, description="One JSON value on stdout, human output on stderr."
    )
    quiet: Annotated[bool, Flag(("--quiet", "-q"))] = Field(
        False, description="Only warnings, errors and what was asked for."
    )

    def console(self, speaks: bool = True) -> Console:
        """The command's console; of several processes only one speaks."""
        return Console(self.as_json and speaks, self.quiet or not speaks)


# --- single arguments and options


def complete_preset(incomplete: str) -> list[str]:
    """The shipped presets whose names begin so."""
    return [name for name in preset_names() if name.startswith(incomplete)]


def preset_option(told: str) -> Any:
    """The option that names presets, with this help."""
    return typer.Option(
        "--preset",
        "-p",
        metavar="NAME|FILE",
        help=told,
        autocompletion=complete_preset,
        show_default=False,
    )


CheckpointName = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="`emoji`, `emoji-dit` (embedded), a diffusers folder, a .safetensors file, a hub id, or a file "
        "there (owner/name/file.safetensors).",
        show_default=False,
    ),
]
Presets = Annotated[
    list[str],
    preset_option(
        "What to erase: a shipped preset's name or a TOML file; repeat it to erase several jointly."
    ),
]
PresetName = Annotated[
    str,
    typer.Argument(
        metavar="NAME|FILE",
        help="A shipped preset's name or a TOML file.",
        autocompletion=complete_preset,
        show_default=False,
    ),
]
Output = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="PATH", help="Where the result goes.", show_default=False),
]
AGAINST = typer.Option(
    "--against", metavar="ORIGINAL", help="The checkpoint that it was made from.", show_default=False
)
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
ForcePictures = Annotated[
    bool, typer.Option("--force", help="Replace the pictures of another run in the output folder.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")]


def spelt(given: Mapping[str, Any]) -> list[str]:
    """Settings as one types them, without those that are None; a list's option is repeated."""
    several = {name: each if isinstance(each, list) else [each] for name, each in given.items()}
    pairs = [(option_name(name), each) for name, values in several.items() for each in values]
    return [part for name, each in pairs if each is not None for part in (name, str(each))]


def files_read(presets: Iterable["str | Preset"], *others: Path | None) -> list[Path]:
    """The files and folders among a command's arguments that it reads; presets may also be names."""
    paths = [path for path in (Path(each) for each in presets if isinstance(each, str)) if path.is_file()]
    return paths + [path for path in others if path is not None]


def check_outside(output: Path, checkpoints: Iterable["Checkpoint"]) -> None:
    """Raise BadInput for an output that is a checkpoint's folder, or lies in one that it is made from."""
    if (output / "model_index.json").exists():
        raise BadInput(f"{output} is the folder of a checkpoint.", "Choose another --output.")
    for opened in checkpoints:
        if opened.path.is_dir() and output.resolve().is_relative_to(opened.path.resolve()):
            raise BadInput(f"{output} lies in the checkpoint {opened.name}.", "Choose another --output.")
