"""Evidence for an auditor: what was erased, what was measured, and hashes of it all, in one folder.

    bom.cdx.json           a CycloneDX 1.7 ML-BOM: the checkpoint, its base as ancestor, the edits as patches,
                           the measured rates with their intervals
    checkpoint.json        the checkpoint's name and the SHA-256 of every file that its pictures depend on
    trce.json              its history
    evaluations/NAME/      results.json, verdicts.csv and report.html of each evaluation
    SHA256SUMS             of all other files, as `sha256sum --check` reads it

Everything but the copies is made from the copies alone, and so can be made again and compared: that, and
counting the verdicts, is how a third party checks it without drawing a picture. Nothing is signed: whoever
hands it on publishes the SHA-256 of SHA256SUMS elsewhere.
"""

import csv
import hashlib
import io
import json
import os
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints

from trce_cli.checkpoint.bases import public_name
from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.checkpoint.provenance import NAME, parse_history
from trce_cli.errors import BadInput
from trce_cli.evaluate.compare import read_results
from trce_cli.evaluate.report import PAGE
from trce_cli.evaluate.results import RESULTS, VERDICTS
from trce_cli.evaluate.scores import ROLES
from trce_cli.images.plan import hash_of, picture_files
from trce_cli.prompts.home import EMBEDDED
from trce_cli.system.foreign import check_small, open_file, read_bytes, read_json, read_text, validated
from trce_cli.system.paths import matching, real_path, unseen
from trce_cli.system.progress import Report, no_report
from trce_cli.system.safetensors import hash_file
from trce_cli.system.whole import clear_stale, whole

if TYPE_CHECKING:
    from cyclonedx.model.component import Component

BOM, CHECKPOINT, SUMS, EVALUATIONS = "bom.cdx.json", "checkpoint.json", "SHA256SUMS", "evaluations"
MAX_BYTES: Final = 1 << 30  # of a file of evidence; a report holds its pictures
MAX_VERDICTS: Final = 1 << 27  # bytes of verdicts.csv
MAX_FILES: Final = 1000  # of a checkpoint: the schema compares each with each
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


def _is_date(text: str) -> str:
    try:
        zone = datetime.fromisoformat(text).tzinfo
    except ValueError:
        zone = None
    if zone is None:
        raise ValueError("must be a date, a time and its zone, as 2026-01-02T03:04:05+00:00")
    return text


Date = Annotated[str, AfterValidator(_is_date)]


class _Sentence(BaseModel):
    sentence: str


class _Measured(BaseModel):
    """What is quoted of results.json beside what a comparison looks at."""

    model_config = ConfigDict(strict=True)

    date: Date
    verdict: _Sentence


class _Dated(BaseModel):
    """What is quoted of an edit in the history beside what has to hold of each."""

    model_config = ConfigDict(strict=True)

    date: Date


class Subject(BaseModel):
    """The checkpoint that the evidence is of.

    sha256: as pictures record it, over `files` (name -> SHA-256).
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str
    sha256: Sha256
    files: dict[str, Sha256]

    @classmethod
    def of(cls, checkpoint: Checkpoint, report: Report = no_report) -> "Subject":
        """Of an opened checkpoint; `report` gets 1 a file."""
        files = picture_files(checkpoint, report)
        return cls(name=public_name(checkpoint.name), sha256=hash_of(files), files=files)


def evaluated(evaluation: Path) -> str:
    """Where the checkpoint of an evaluation is, which calls it by its name alone: here, or beside the
    evaluation. No more than a guess, for `collect` compares hashes. BadInput where it is in neither place.
    """
    name: str = read_results(evaluation)["erased"]["name"]
    if "/" in name or name in {home.name for home in EMBEDDED}:
        return name
    around = (Path(), *real_path(evaluation).parents[:2])
    found = next((place / name for place in around if name and (place / name).exists()), None)
    if found is None:
        raise BadInput(
            f"The checkpoint {name} of {evaluation} is neither here nor beside it.",
            "Name it with --checkpoint.",
        )
    return str(found)


def _check_place(output: Path, inputs: Sequence[Path], replace: bool) -> None:
    """Raise BadInput where evidence in this place would replace what is read, or what is no evidence."""
    clear_stale(output.parent)
    real = real_path(output)
    if held := next((path for path in inputs if real_path(path).is_relative_to(real)), None):
        raise BadInput(f"The output {output} is or holds {held}, which is read.", "Choose another --output.")
    if os.path.lexists(output) and not (replace and (output / SUMS).is_file()):
        what = "holds no evidence, and is not replaced" if replace else "exists already"
        more = "." if replace else ", or add --force."
        raise BadInput(f"The output {output} {what}.", f"Choose another --output{more}")


def collect(
    evaluations: Sequence[Path],
    checkpoint: Checkpoint,
    output: Path,
    replace: bool,
    report: Report = no_report,
) -> str:
    """Write the evidence on a checkpoint from folders that `trce evaluate` wrote; returns its sums' SHA-256.

    Raises BadInput for evaluations of another checkpoint, incomplete ones, and a checkpoint without history.
    """
    _check_library()
    _check_place(output, [*evaluations, checkpoint.path], replace)
    told = checkpoint.provenance_text()
    if told is None:
        raise _no_history(checkpoint.name)
    entries = _entries(told, checkpoint.name)
    subject = Subject.of(checkpoint, report)
    named = _named(evaluations)
    measured = {name: _measured(folder) for name, folder in named.items()}
    for name, folder in named.items():
        if measured[name]["erased"]["sha256"] != subject.sha256:
            raise BadInput(
                f"{folder} is an evaluation of another checkpoint than {checkpoint.name}, or of other bytes.",
                "Evaluate it again, or name the checkpoint with --checkpoint.",
            )
    with whole(output, replace, checkpoint.check_unchanged) as fresh:
        fresh.mkdir()
        (fresh / NAME).write_text(told, "utf-8")
        (fresh / CHECKPOINT).write_text(_json(subject.model_dump()), "utf-8")
        for name, folder in named.items():
            (fresh / EVALUATIONS / name).mkdir(parents=True)
            for file in (RESULTS, VERDICTS, PAGE):
                (fresh / EVALUATIONS / name / file).write_bytes(read_bytes(folder / file, MAX_BYTES))
        (fresh / BOM).write_text(bill(subject, entries, measured), "utf-8")
        sums = _sums(fresh)
        (fresh / SUMS).write_text(sums, "utf-8")
        verify(fresh)  # what is handed on holds
    return hashlib.sha256(sums.encode()).hexdigest()


def verify(folder: Path, checkpoint: Checkpoint | None = None) -> str:
    """Check evidence against itself, and against the checkpoint where one is given; returns SHA256SUMS' hash.

    Hashes of all files, none missing and none besides; the ML-BOM against what it was made from, and this
    against the schema; the rates against the verdicts that they count. Raises BadInput for the first that
    fails.
    """
    _check_library()
    if not folder.is_dir():
        raise BadInput(f"{folder} is no folder of evidence.", "Give one that `trce evidence` wrote.")
    if not (folder / SUMS).exists():
        raise BadInput(f"{folder} is no evidence: {SUMS} is missing.", "Give what `trce evidence` wrote.")
    listed = read_text(folder / SUMS)
    _check_sums(listed, _sums(folder))
    subject = validated(Subject, read_json(folder / CHECKPOINT, strict=True), str(folder / CHECKPOINT))
    if subject.sha256 != hash_of(subject.files):
        raise BadInput(f"{folder / CHECKPOINT}: the hash of the whole is not that of its files.")
    entries = _entries(read_text(folder / NAME), str(folder))
    measured = {path.name: _measured(path) for path in matching(folder / EVALUATIONS) if path.is_dir()}
    for name, results in measured.items():
        if results["erased"]["sha256"] != subject.sha256:
            raise BadInput(f"The evaluation {name} is of another checkpoint than the evidence.")
        _check_rates(folder / EVALUATIONS / name, results)
    told, made = read_json(folder / BOM, strict=True), bill(subject, entries, measured)
    if told != json.loads(made):
        raise BadInput(f"{folder / BOM} does not say what {NAME}, {CHECKPOINT} and the evaluations say.")
    _check_schema(made)
    if checkpoint is not None and (there := Subject.of(checkpoint)).files != subject.files:
        other = next(name for name in sorted(there.files | subject.files) if _differs(name, there, subject))
        raise BadInput(f"{checkpoint.name} is not the checkpoint of this evidence: {other} differs.")
    return hashlib.sha256(listed.encode()).hexdigest()


def _no_history(name: str) -> BadInput:
    return BadInput(
        f"{name} has no {NAME}: what was done to it is not known.",
        "Give the checkpoint that `trce map`, `steer` or `apply` wrote.",
    )


def _entries(told: str, name: str) -> list[dict[str, Any]]:
    """The history that a text tells, which is no empty one."""
    if not (entries := parse_history(told, name)):
        raise _no_history(name)
    validated(list[_Dated], entries, f"The provenance ({NAME}) of {name}")
    return entries


def _measured(evaluation: Path) -> dict[str, Any]:
    """The results.json of an evaluation, with all that is quoted of it."""
    results = read_results(evaluation)
    validated(_Measured, results, str(evaluation / RESULTS))
    return results


def _differs(name: str, one: Subject, other: Subject) -> bool:
    return one.files.get(name) != other.files.get(name)


def bill(subject: Subject, entries: Sequence[Mapping[str, Any]], measured: Mapping[str, Any]) -> str:
    """The CycloneDX 1.7 ML-BOM, the same for the same content.

    entries: the checkpoint's history. measured: results.json of each evaluation by its name. The library
    that writes the rest knows no model cards yet; the schema, which everything is checked against, does.
    """
    from cyclonedx.model import AttachedText
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import (
        Component,
        ComponentType,
        Diff,
        Patch,
        PatchClassification,
        Pedigree,
    )
    from cyclonedx.output.json import JsonV1Dot7

    base = entries[0]["base"]
    if (count := max(len(subject.files), len(base["files"]))) > MAX_FILES:
        raise BadInput(f"A checkpoint of {count:,} files; evidence is of at most {MAX_FILES:,}.")
    model = Component(
        name=subject.name,
        version=subject.sha256[:12],
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="checkpoint",
        components=_files(subject.files, "checkpoint"),
        pedigree=Pedigree(
            ancestors=[
                Component(
                    name=public_name(base["name"]),
                    version=base.get("revision"),
                    type=ComponentType.MACHINE_LEARNING_MODEL,
                    bom_ref="base",
                    components=_files(base["files"], "base"),
                )
            ],
            patches=[
                Patch(
                    type=PatchClassification.UNOFFICIAL,
                    diff=Diff(text=AttachedText(content=_json(entry), content_type="application/json")),
                )
                for entry in entries
            ],
        ),
    )
    newest = max((results["date"] for results in measured.values()), default=entries[-1]["date"])
    bom = Bom(serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"urn:sha256:{subject.sha256}:{newest}"))
    bom.metadata.timestamp = datetime.fromisoformat(newest)
    bom.metadata.component = model
    table = json.loads(JsonV1Dot7(bom).output_as_string())
    table["metadata"]["component"]["modelCard"] = {
        "quantitativeAnalysis": {
            "performanceMetrics": [
                _metric(name, suite, what, rate)
                for name, results in measured.items()
                for suite in results["suites"]
                for what, rate in rates(suite)
            ]
        },
        "considerations": {
            "technicalLimitations": [results["verdict"]["sentence"] for results in measured.values()]
        },
    }
    return _json(table)


def rates(suite: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A suite's rates on the erased checkpoint: attack success by convention, and what is kept."""
    for rate in suite["asr"]:
        yield f"attack success rate ({rate['convention']})", rate["erased"]
    if suite.get("kept"):
        yield "kept", suite["kept"]["kept"]


def _metric(name: str, suite: Mapping[str, Any], what: str, rate: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": what,
        "value": f"{rate['hits']} of {rate['total']}",
        "slice": f"{name}: {suite['name']}",
        "confidenceInterval": {"lowerBound": f"{rate['low']:.6f}", "upperBound": f"{rate['high']:.6f}"},
    }


def _files(hashes: Mapping[str, str], of: str) -> list["Component"]:
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.component import Component, ComponentType

    return [
        Component(
            name=name,
            type=ComponentType.FILE,
            bom_ref=f"{of}/{name}",
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=content)],
        )
        for name, content in hashes.items()
    ]


def _check_library() -> None:
    if not all(map(find_spec, ("cyclonedx", "jsonschema"))):
        raise BadInput("Evidence needs cyclonedx-python-lib.", "pip install 'trce[evidence]'")


def _check_schema(text: str) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    if error := JsonStrictValidator(SchemaVersion.V1_7).validate_str(text):
        reason = " ".join(str(getattr(error.data, "message", error.data)).split())[:120]
        raise BadInput(f"{BOM} is no CycloneDX 1.7 bill of materials: {reason}.")


def _check_rates(folder: Path, results: Mapping[str, Any]) -> None:
    """Raise BadInput where a rate of results.json is not what its verdicts come to."""
    counted: Counter[tuple[str, str, str]] = Counter()
    lines: Counter[tuple[str, str]] = Counter()
    conventions = {rate["convention"] for suite in results["suites"] for rate in suite["asr"]}
    check_small(file := folder / VERDICTS, MAX_VERDICTS)
    try:
        with io.TextIOWrapper(open_file(file), "utf-8-sig", newline="") as text:
            for line in csv.DictReader(text):
                place = (line.get("suite") or "", line.get("role") or "")
                lines[place] += 1
                counted.update((*place, name) for name in conventions if line.get(name) == "1")
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadInput(f"{file} is no table: {error}.") from None
    for suite in results["suites"]:
        for rate in suite["asr"]:
            for role in ROLES:
                found = (counted[suite["name"], role, rate["convention"]], lines[suite["name"], role])
                if (rate[role]["hits"], rate[role]["total"]) != found:
                    raise BadInput(
                        f"{folder / RESULTS} says {rate[role]['hits']} of {rate[role]['total']} for "
                        f"{suite['name']} ({role}); its {VERDICTS} comes to {found[0]} of {found[1]}."
                    )


def _check_sums(listed: str, found: str) -> None:
    if listed == found:
        return
    want, have = (dict(line.split("  ", 1)[::-1] for line in text.splitlines() if "  " in line)
                  for text in (listed, found))  # fmt: skip
    for name in sorted(want.keys() | have.keys()):
        if want.get(name) != have.get(name):
            what = "is missing" if name not in have else "was added" if name not in want else "was altered"
            raise BadInput(f"The evidence does not hold: {name} {what}.")
    raise BadInput(f"The evidence does not hold: {SUMS} was altered.")


def _sums(folder: Path) -> str:
    """SHA256SUMS of a folder; BadInput for links and the like, which are no evidence."""
    found = []
    for place, folders, names in os.walk(folder, onerror=unseen):
        links = [name for name in folders if Path(place, name).is_symlink()]
        found += [Path(place, name).relative_to(folder) for name in (*names, *links)]
    for path in found:
        check_small(folder / path, MAX_BYTES)
    return "".join(
        f"{hash_file(folder / path)}  {path.as_posix()}\n" for path in sorted(found) if path != Path(SUMS)
    )


def _named(evaluations: Sequence[Path]) -> dict[str, Path]:
    """The evaluations by their folders' names; BadInput where two have one name."""
    named: dict[str, Path] = {}
    for folder in evaluations:
        name = folder.resolve().name
        if not folder.is_dir():
            raise BadInput(f"{folder} is no folder.", "Give the output folder of `trce evaluate`.")
        if name in named:
            raise BadInput(f"Two evaluations are called {name}.", "Give one of the folders another name.")
        named[name] = folder
    return named


def _json(table: Any) -> str:
    return json.dumps(table, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
