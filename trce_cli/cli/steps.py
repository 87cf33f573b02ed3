"""The steps of a recipe: each checked before the first begins, and skipped where it is done and whole."""

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, ConfigDict

from trce_cli.checkpoint.measured import CARD, PICTURE
from trce_cli.cli.console import Console
from trce_cli.cli.options import Opening, files_read
from trce_cli.cli.plans import show_plan
from trce_cli.cli.recipe import KINDS, NAME, Recipe, Step, recipe_text
from trce_cli.erase.settings import choose_map_settings, choose_steer_settings
from trce_cli.errors import BadInput, TrceError
from trce_cli.prompts.presets import every_part, load_presets, recommended
from trce_cli.prompts.settings import MapTable
from trce_cli.system.foreign import read_json, validated
from trce_cli.system.paths import real_path
from trce_cli.system.whole import write_json, write_text

if TYPE_CHECKING:
    from trce_cli.checkpoint.checkpoint import Checkpoint

RECORD: Final = "run.json"  # in the output folder: which steps are done, and what they wrote

# How the figures of several steps make one.
_TOTALS: Final[Mapping[str, Callable[[Sequence[float]], float]]] = {
    "estimated_seconds": sum,
    "memory_bytes": max,
    "disk_bytes": sum,
    "free_disk_bytes": min,
}


class _Done(BaseModel):
    """What was recorded of an edit's step.

    asked: a hash of all that its result depends on. outputs: by name the SHA-256 of each file, None while it
    is under way. before: the same of what it replaces.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    asked: str
    outputs: dict[str, dict[str, str]] | None
    before: dict[str, dict[str, str]]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    steps: dict[str, _Done]


@dataclass(frozen=True)
class Link:
    """A step in its place: what it starts from, and where it writes.

    source: the checkpoint it starts from, None for the base. made_by: the edit that wrote that. paths: its
    outputs, of an edit by form. arguments: of the command, but for what says how it is run.
    """

    step: Step
    source: Path | None
    made_by: str | None
    paths: tuple[Path, ...]
    arguments: Mapping[str, Any]


class Work:
    """A recipe on its base. answer: the options that say how the commands are to speak."""

    def __init__(self, recipe: Recipe, where: Path, force: bool, answer: dict[str, Any]) -> None:
        from trce_cli.checkpoint.open import open_checkpoint

        head = recipe.head
        self.recipe, self.where, self.force, self.answer = recipe, where, force, answer
        self.base: Checkpoint = open_checkpoint(head.base, head.revision, head.variant, head.config)
        self.links = self._chain()
        self._check_outputs()
        self.resolved: dict[str, dict[str, Any]] = {}
        for link in self.links:
            with _naming(where, link.step.name):
                self.resolved[link.step.name] = self._resolve(link.step)
        self._base_files = self.base.hashes().files
        if head.base_sha256 and not set(head.base_sha256) & set(self._base_files.values()):
            raise BadInput(f"{where}: {head.base} is not the checkpoint that base_sha256 speaks of.")
        self._record = self._read()
        self._plans: dict[str, list[Callable[[], None]]] = {}

    # --- what follows what

    def _chain(self) -> list[Link]:
        """The steps with what each starts from; BadInput where one has nothing to start from."""
        links: list[Link] = []
        source: Path | None = None
        made_by: str | None = None
        layout: str = self.base.layout
        subject: Path | None = None  # what is drawn and measured
        unwritten: str | None = None  # the last edit, where it wrote no checkpoint
        for step in self.recipe.steps:
            if not step.is_edit:
                if unwritten and (step.command == "generate" or subject is None):
                    raise self._no_checkpoint(step.name, unwritten)
                if step.given.get("card") and (unwritten or layout != "diffusers"):
                    raise BadInput(
                        f"{self.where}: [{step.name}] has `card`, but does not measure a diffusers folder.",
                        'Leave `card` out, or write the folder: as = ["diffusers"].',
                    )
                links.append(Link(step, subject, made_by, (step.output,), self._looking(step, subject)))
                continue
            if unwritten and step.command != "apply":
                raise self._no_checkpoint(step.name, unwritten)
            forms = step.given.get("forms") or (
                "single-file" if step.output.suffix.lower() == ".safetensors" else layout,
            )
            step, paths = self._places(step, forms)
            links.append(
                Link(step, source, made_by, tuple(paths.values()), self._editing(step, source, forms))
            )
            written = [(form, path) for form, path in paths.items() if form in ("diffusers", "single-file")]
            unwritten = None if written else step.name
            # An edit's file is put on the base to be looked at: what was made of another one is not.
            subject = next(iter(paths.values())) if source is None or step.command == "steer" else None
            if written:
                layout, source = written[0]
                subject, made_by = source, step.name
        return links

    def _no_checkpoint(self, name: str, edit: str) -> BadInput:
        return BadInput(
            f"{self.where}: [{name}] goes on from [{edit}], which writes no checkpoint.",
            f'Add "{self.base.layout}" to `as` of [{edit}].',
        )

    def _places(self, step: Step, forms: Sequence[str]) -> tuple[Step, dict[str, Path]]:
        """The step with its output named as its form asks, and what it writes by form."""
        from trce_cli.edits.outputs import choose_outputs

        given, output = step.given, step.output
        if "output" not in step.told and tuple(forms) != ("diffusers",) and len(forms) == 1:
            output = output.with_name(output.name + ".safetensors")
        outputs = choose_outputs(
            self.base, output, forms, given.get("rank"), given.get("energy"), given.get("edit_dtype")
        )
        return replace(step, output=output), {form.name: path for form, path in outputs.forms}

    def _editing(self, step: Step, source: Path | None, forms: Sequence[str]) -> dict[str, Any]:
        head = self.recipe.head
        place = "erased" if step.command == "steer" else "checkpoint"
        opening = dict(head) if source is None else {"config": head.config}
        given = {name: value for name, value in step.given.items() if name not in ("sha256", "prior_sha256")}
        return {
            **{name: opening.get(name) for name in Opening.model_fields},
            **given,
            **({"presets": list(step.presets)} if step.presets else {}),
            place: head.base if source is None else str(source),
            "forms": tuple(forms),
            "output": step.output,
        }

    def _looking(self, step: Step, subject: Path | None) -> dict[str, Any]:
        head, given = self.recipe.head, dict(step.given)
        original = str(self.base.path) if head.revision else head.base
        looked_at = original if subject is None else str(subject)
        told = {"config": head.config, **given, "output": step.output}
        if step.command == "evaluate":
            return told | {"checkpoint": [looked_at], "against": original, "presets": list(step.presets)}
        told |= {"prompts": list(told.pop("prompt", ()))}
        return told | {"checkpoint": looked_at, "compare": None if subject is None else original}

    def _check_outputs(self) -> None:
        """Raise BadInput where two steps write to one place, or one writes to what is read."""
        writers = [(link.step.name, real_path(path)) for link in self.links for path in link.paths]
        for number, (name, path) in enumerate(writers):
            for other, earlier in writers[:number]:
                if path.is_relative_to(earlier) or earlier.is_relative_to(path):
                    both = "the same place" if path == earlier else f"places in each other, {earlier} and"
                    raise BadInput(
                        f"{self.where}: [{other}] and [{name}] would write to {both} {path}.",
                        "Give one of them another `output`.",
                    )
            if real_path(self.recipe.head.output).is_relative_to(path):
                raise BadInput(
                    f"{self.where}: [{name}] would write to {path}, where the recipe's own output goes.",
                    "Give it a name in that folder.",
                )
            for read in self._read_files():
                if read.is_relative_to(path) or (read.is_dir() and path.is_relative_to(read)):
                    raise BadInput(f"{self.where}: [{name}] would write to {path}, but {read} is read.")

    def _read_files(self) -> list[Path]:
        files = [self.where, self.base.path]
        for step in self.recipe.steps:
            files += files_read(step.presets, step.given.get("prior"), *step.given.get("edits", ()))
        return [real_path(path) for path in files]

    # --- what was asked for

    def _resolve(self, step: Step) -> dict[str, Any]:
        """The step with every setting that has a value, as the file spells it."""
        told = dict(step.told)
        for key, (_, _, field) in KINDS[step.command].fields().items():
            if field.default not in (None, (), "", False) and not field.is_required():
                told.setdefault(key, str(field.default) if isinstance(field.default, Path) else field.default)
        if step.command == "map":
            chosen = load_presets(step.presets)
            given = {name: step.given[name] for name in MapTable.model_fields if name in step.given}
            settings, _ = choose_map_settings(given, chosen, self.base.family)
            told |= {name: getattr(settings, name) for name in MapTable.model_fields}
        if step.command == "steer":
            from trce_cli.erase.settings import SteerSettings

            given = {name: step.given[name] for name in SteerSettings.model_fields if name in step.given}
            both = choose_steer_settings(given, recommended(every_part(load_presets(step.presets)), "steer"))
            for part in both:
                told |= {name: value for name, value in part if value is not None}
            if both[1].epochs is None:
                told.pop("epochs", None)
        if "device" in KINDS[step.command].fields():
            told["device"] = step.given.get("device", "auto")
        return told

    def text(self) -> str:
        """The resolved recipe as TOML."""
        head = {**self.recipe.told, "output": str(self.recipe.head.output)}
        return recipe_text(
            head, self.resolved, "The recipe as it was resolved: every setting that has a value."
        )

    def _asked(self, link: Link) -> str:
        """A hash of all that an edit's result depends on."""
        step = link.step
        resolved = {key: value for key, value in self.resolved[step.name].items() if key != "output"}
        made_from = self._base_files
        if link.made_by is not None and link.source is not None:
            outputs = self._record[link.made_by].outputs or {}
            files = outputs.get(link.source.name, {})
            made_from = {
                name: found for name, found in files.items() if not name or name.endswith(".safetensors")
            }
        read = [file for file in (step.given.get("prior"), *step.given.get("edits", ())) if file is not None]
        told = {
            "command": step.command,
            "settings": resolved,
            "paths": sorted(path.name for path in link.paths),
            "presets": [preset.sha256() for preset in load_presets(step.presets)],
            "made_from": sorted(made_from.values()),
            "files": [hash_path(file)[""] for file in read],
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()

    # --- what is done

    def _read(self) -> dict[str, _Done]:
        path = self.recipe.head.output / RECORD
        if not path.exists():
            return {}
        hint = "Remove it, or choose another output."
        return validated(
            _Record, read_json(path, strict=True), f"{path}, the record of an earlier run,", hint
        ).steps

    def _keep(self, name: str, done: _Done) -> None:
        self._record[name] = done
        self._write_record()

    def _write_record(self) -> None:
        told = {"steps": {step: each.model_dump() for step, each in self._record.items()}}
        write_json(self.recipe.head.output / RECORD, told)

    def done(self, link: Link) -> bool:
        """Whether an edit's step is done, of these settings, and what it wrote whole."""
        found = self._record.get(link.step.name)
        if (
            not link.step.is_edit
            or found is None
            or not self._can_ask(link)
            or found.asked != self._asked(link)
        ):
            return False
        there = self._hashes(link)
        if found.outputs is None:  # stopped between its last file and the record
            return len(there) == len(link.paths) and all(
                there[path] != found.before.get(path) for path in there
            )
        return _without_cards(found.outputs) == _without_cards(there)

    def _can_ask(self, link: Link) -> bool:
        return link.made_by is None or link.made_by in self._record

    def _hashes(self, link: Link) -> dict[str, dict[str, str]]:
        return {path.name: hash_path(path) for path in link.paths if path.exists()}

    # --- run

    def check(self) -> None:
        """Raise what any step would refuse, before one begins; the base stands for what is yet to be made.

        What the plans tell is kept for `show_plans`.
        """
        place = self.recipe.head.output / NAME
        known = (self.recipe.head.output / RECORD).exists() or real_path(place) == real_path(self.where)
        if place.exists() and not (known or self.force):
            raise BadInput(f"{place} is there already, and of no run like this.", "Choose another output.")
        for link in self.links:
            self._check_files(link.step)
            if not self.done(link):
                self._refuse_other(link)
                self._plans[link.step.name] = self._plan(link)

    def _plan(self, link: Link) -> list[Callable[[], None]]:
        """What the command's `--dry-run` tells of a step, as calls that tell it."""
        arguments = dict(link.arguments)
        if link.source is not None:
            arguments.pop("card", None)  # the base has none of ours
        for name in ("checkpoint", "erased", "compare"):
            given = arguments.get(name)
            if given and (link.source is not None or name == "compare"):
                arguments[name] = (
                    [self.recipe.head.base] if isinstance(given, list) else self.recipe.head.base
                )
        if link.step.is_edit:
            arguments |= {name: getattr(self.recipe.head, name) for name in Opening.model_fields}
        with Console.held() as calls, _naming(self.where, link.step.name):
            self._call(link, arguments, dry_run=True)
        return calls

    def run(self, link: Link, told: dict[str, Any]) -> None:
        """Run a step, unless it is done; `told` receives what its command tells, also of gates not met."""
        if not link.step.is_edit:
            self._results(link, told)
            return
        asked = self._asked(link)
        if self.done(link):
            told |= {"kept": True, "outputs": list(link.paths)}
        else:
            self._refuse_other(link)
            self._keep(link.step.name, _Done(asked=asked, outputs=None, before=self._hashes(link)))
            self._results(link, told)
        self._keep(link.step.name, _Done(asked=asked, outputs=self._hashes(link), before={}))

    def show_plans(self, console: Console) -> dict[str, Any]:
        """Tell what each step that was checked would do and take, and all of them together."""
        plans: dict[str, dict[str, Any]] = {}
        for link in self.links:
            name = link.step.name
            if name not in self._plans:
                console.note(f"[{name}] is done and whole.")
                plans[name] = {"kept": True}
                continue
            console.note(f"[{name}]:")
            with Console.gathered() as results, _naming(self.where, name):
                for call in self._plans[name]:
                    call()
            plans[name] = dict(results[0])
        figures = {key: [plan[key] for plan in plans.values() if key in plan] for key in _TOTALS}
        told = {key: _TOTALS[key](found) for key, found in figures.items() if found}
        with Console.gathered():
            show_plan(console, self.recipe.head.output, {"steps": list(plans), **told})
        return {"dry_run": True, **told, "steps": plans}

    def _refuse_other(self, link: Link) -> None:
        """Raise BadInput where an edit's place holds the result of other settings, and force is not given."""
        found = self._record.get(link.step.name)
        if self.force or found is None or not link.step.is_edit or not self._can_ask(link):
            return
        if found.asked != self._asked(link) and (there := [path for path in link.paths if path.exists()]):
            raise BadInput(
                f"{self.where}: [{link.step.name}] was run with other settings, and {there[0]} is there.",
                "Choose another output, or replace it with --force.",
            )

    def begin(self) -> None:
        """Write the resolved recipe, after the record, by which a stopped run is known again."""
        self.recipe.head.output.mkdir(parents=True, exist_ok=True)
        self._write_record()
        write_text(self.recipe.head.output / NAME, self.text())

    def _results(self, link: Link, told: dict[str, Any]) -> None:
        with Console.gathered() as results:
            try:
                self._call(link, link.arguments)
            finally:
                for result in results:
                    told |= result

    def _call(self, link: Link, arguments: Mapping[str, Any], **how: Any) -> None:
        command: Callable[..., None] = KINDS[link.step.command].command
        parameters = inspect.signature(command).parameters.values()
        usual: dict[str, Any] = {
            each.name: None if each.default is each.empty else each.default for each in parameters
        }
        force = self.force or (link.step.is_edit and link.step.name in self._record)
        command(**usual | dict(arguments) | self.answer | {"force": force} | how)

    def _check_files(self, step: Step) -> None:
        at = f"{self.where}: [{step.name}]"
        edits = step.given.get("edits", ())
        for path in (path for path in edits if not path.is_file()):
            raise BadInput(
                f"{at}: there is no file {path}.", "An edit's file is needed, its hash is not enough."
            )
        if (hashes := step.given.get("sha256")) and tuple(hash_path(path)[""] for path in edits) != hashes:
            raise BadInput(f"{at}: {', '.join(map(str, edits))}: other files than sha256 speaks of.")
        if wanted := step.given.get("prior_sha256"):
            from trce_cli.erase.prior import choose_prior

            if choose_prior(self.base, step.given.get("prior")).sha256() != wanted:
                raise BadInput(f"{at}: the captions are others than prior_sha256 speaks of.")


@contextmanager
def _naming(where: Path, step: str) -> Iterator[None]:
    """Errors in the block say which step of which recipe they are about."""
    try:
        yield
    except TrceError as error:
        if type(error) not in (TrceError, BadInput):
            raise
        raise type(error)(f"{where}: [{step}]: {error.message}", error.hint) from None


def _without_cards(outputs: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """The hashes of outputs but for what people read, which evaluations and they themselves write into."""
    return {
        output: {name: found for name, found in files.items() if name not in (CARD, PICTURE)}
        for output, files in outputs.items()
    }


def hash_path(path: Path) -> dict[str, str]:
    """The SHA-256 of each file of a folder by relative name, or of a file alone by the empty name."""
    from trce_cli.system.safetensors import hash_file

    if not path.is_dir():
        return {"": hash_file(path)}
    found = sorted(Path(folder) / name for folder, _, names in os.walk(path) for name in names)
    return {file.relative_to(path).as_posix(): hash_file(file) for file in found}
