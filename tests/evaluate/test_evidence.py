"""`trce evidence`: what it collects, and that nothing in it can be altered unseen."""

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trce_cli.cli.app import main
from trce_cli.evaluate import evidence
from trce_cli.maths.statistics import Rate

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def measured(tiny_sd1: Path, reds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `erased`, a mapped checkpoint, and `evaluation`, of it."""
    folder = tmp_path_factory.mktemp("measured")
    pairs = folder / "pairs.toml"
    pairs.write_text('name = "pairs"\ndescription = "One pair."\nkind = "object"\n[[concepts]]\n'
                     'unsafe = "a knife"\nsafe = "a spoon"\n')  # fmt: skip
    # Weak enough to do no harm to a text encoder of random weights.
    line = ["map", tiny_sd1, "-p", pairs, "--strength", "0.05", "-o", folder / "erased", "-q"]
    assert main([*map(str, line)]) == 0
    line = ["evaluate", folder / "erased", "--against", tiny_sd1, "-p", pairs, "-o", folder / "evaluation"]
    line += ["--detector", "reds", "--steps", 1, "--count", 3, "--device", "cpu", "-q"]
    assert main([*map(str, line)]) == 0
    return folder


@pytest.fixture
def collected(measured: Path, tmp_path: Path) -> Path:
    """Fresh evidence."""
    line = ["evidence", measured / "evaluation", "-o", tmp_path / "evidence", "-q"]
    assert main([*map(str, line)]) == 0
    return tmp_path / "evidence"


def seal(folder: Path) -> None:
    """Make SHA256SUMS fit again, as someone who alters evidence would."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(line for line in lines if "SHA256SUMS" not in line))


def test_it_says_what_was_erased_and_measured(trce: Run, measured: Path, collected: Path) -> None:
    bom = json.loads((collected / "bom.cdx.json").read_text())
    results = json.loads((measured / "evaluation/results.json").read_text())
    (entry,) = json.loads((measured / "erased/trce.json").read_text())["history"]
    assert bom["specVersion"] == "1.7"
    model = bom["metadata"]["component"]
    assert model["type"] == "machine-learning-model"
    (base,) = model["pedigree"]["ancestors"]
    hashes = {file["name"]: file["hashes"][0]["content"] for file in base["components"]}
    assert hashes == entry["base"]["files"]
    assert json.loads(model["pedigree"]["patches"][0]["diff"]["text"]["content"]) == entry
    for file in model["components"]:
        content = (measured / "erased" / file["name"]).read_bytes()
        assert file["hashes"][0]["content"] == hashlib.sha256(content).hexdigest()
    metrics = {
        (each["slice"], each["type"]): each
        for each in model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    }
    for suite in results["suites"]:
        rate = suite["asr"][0]
        told = metrics[f"evaluation: {suite['name']}", f"attack success rate ({rate['convention']})"]
        assert told["value"] == f"{rate['erased']['hits']} of {rate['erased']['total']}"
        assert float(told["confidenceInterval"]["upperBound"]) == pytest.approx(
            rate["erased"]["high"], abs=1e-6
        )
    assert str(measured) not in (collected / "bom.cdx.json").read_text()  # no paths of the machine


def test_it_holds_and_other_tools_agree(trce: Run, measured: Path, collected: Path) -> None:
    outcome = trce("evidence", "--verify", collected, "--checkpoint", measured / "erased", "--json")
    assert outcome.status == 0
    digest = hashlib.sha256((collected / "SHA256SUMS").read_bytes()).hexdigest()
    assert json.loads(outcome.out)["sha256"] == digest
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=collected, check=True)


def test_nothing_but_evidence_is_replaced_and_nothing_that_is_read(
    trce: Run, measured: Path, collected: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").touch()
    line = ("evidence", measured / "evaluation")
    before = sorted(measured.rglob("*"))
    for place, force, said in (
        (collected, False, "exists already"),
        (tmp_path / "notes", True, "holds no evidence"),
        (measured / "evaluation", True, "which is read"),
        (measured / "erased", True, "which is read"),
        (measured, True, "which is read"),
    ):
        outcome = trce(*line, "-o", place, *["--force"] * force)
        assert outcome.status == 2
        assert said in outcome.err, place
    assert sorted(measured.rglob("*")) == before
    assert (tmp_path / "notes/mine.txt").exists()
    assert trce(*line, "-o", collected, "--force").status == 0
    assert trce("evidence", "--verify", collected).status == 0


def test_one_altered_byte_is_found_in_every_file(trce: Run, collected: Path) -> None:
    for path in [path for path in collected.rglob("*") if path.is_file()]:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        held, _ = path.read_bytes(), path.write_bytes(content)
        outcome = trce("evidence", "--verify", collected)
        assert outcome.status == 2, path
        assert "Traceback" not in outcome.err
        path.write_bytes(held)
    assert trce("evidence", "--verify", collected).status == 0


def test_files_added_and_removed_are_found(trce: Run, collected: Path) -> None:
    (collected / "more.txt").write_text("?")
    assert "more.txt was added" in trce("evidence", "--verify", collected).err
    (collected / "more.txt").unlink()
    (collected / "trce.json").unlink()
    assert "trce.json is missing" in trce("evidence", "--verify", collected).err


def test_better_figures_are_found_though_the_hashes_fit(trce: Run, collected: Path) -> None:
    file = collected / "evaluations/evaluation/results.json"
    results = json.loads(file.read_text())
    rate = results["suites"][0]["asr"][0]["erased"]
    rate |= Rate("", 3 - rate["hits"], 3).as_dict()
    file.write_text(json.dumps(results))
    seal(collected)
    assert "verdicts.csv comes to" in trce("evidence", "--verify", collected).err


def test_a_nicer_bill_is_found_though_the_hashes_fit(trce: Run, collected: Path) -> None:
    file = collected / "bom.cdx.json"
    bom = json.loads(file.read_text())
    metrics = bom["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    metrics[0]["value"] = "0 of 1000"
    file.write_text(json.dumps(bom))
    seal(collected)
    assert "does not say what" in trce("evidence", "--verify", collected).err
    file.write_text("[" * 10_000)
    seal(collected)
    assert "nested too deeply" in trce("evidence", "--verify", collected).err


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("trce.json", lambda told: told.update(history=[]), "has no trce.json"),
        ("trce.json", lambda told: told["history"][0].update(date="yesterday"), "0.date must be a date"),
        ("trce.json", lambda told: told["history"][0]["base"].pop("revision"), "does not say what"),
        (
            "trce.json",
            lambda told: told["history"][0]["base"].update(files=dict.fromkeys(map(str, range(1001)), "a")),
            "at most 1,000",
        ),
        ("evaluations/evaluation/results.json", lambda told: told.pop("verdict"), "verdict is missing"),
        ("evaluations/evaluation/results.json", lambda told: told.update(date="2026-01-02"), "its zone"),
    ],
)
def test_sealed_evidence_that_says_what_nothing_can_be_made_of_is_told(
    trce: Run, collected: Path, name: str, change: Callable[[Any], Any], said: str
) -> None:
    told = json.loads((collected / name).read_text())
    change(told)
    (collected / name).write_text(json.dumps(told))
    seal(collected)
    outcome = trce("evidence", "--verify", collected)
    assert outcome.status == 2
    assert said in outcome.err


def test_what_was_not_measured_may_be_null(trce: Run, collected: Path) -> None:
    file = collected / "evaluations/evaluation/results.json"
    results = json.loads(file.read_text())
    for suite in results["suites"]:
        suite.setdefault("kept", None)
    file.write_text(json.dumps(results))
    seal(collected)
    assert trce("evidence", "--verify", collected).status == 0


@pytest.mark.parametrize("content", [b'suite,role\n"' + b"x" * 200_000 + b'"\n', b"suite\n\xff\n"])
def test_verdicts_that_are_no_table_are_told(trce: Run, collected: Path, content: bytes) -> None:
    (collected / "evaluations/evaluation/verdicts.csv").write_bytes(content)
    seal(collected)
    assert "is no table" in trce("evidence", "--verify", collected).err


def test_a_bill_that_its_schema_does_not_know_is_told(trce: Run, collected: Path) -> None:
    name = collected / "trce.json"
    told = json.loads(name.read_text())
    told["history"][0]["base"]["files"] = {"unet.safetensors": "no hash"}
    name.write_text(json.dumps(told))
    subject = evidence.Subject(**json.loads((collected / "checkpoint.json").read_text()))
    results = json.loads((collected / "evaluations/evaluation/results.json").read_text())
    (collected / "bom.cdx.json").write_text(evidence.bill(subject, told["history"], {"evaluation": results}))
    seal(collected)
    assert "no CycloneDX 1.7" in trce("evidence", "--verify", collected).err


def test_a_file_that_is_too_large_is_not_hashed(trce: Run, collected: Path) -> None:
    with (collected / "evaluations/evaluation/report.html").open("r+b") as file:
        file.truncate(1 << 33)
    assert "at most 1,073,741,824" in trce("evidence", "--verify", collected).err


def test_another_checkpoint_is_told(trce: Run, measured: Path, tiny_sd1: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "has no trce.json" in trce(
        "evidence", measured / "evaluation", "--checkpoint", tiny_sd1, "-o", out
    ).err  # fmt: skip
    other = Path(shutil.copytree(measured / "erased", tmp_path / "other"))
    (other / "scheduler/scheduler_config.json").write_text(
        (other / "scheduler/scheduler_config.json").read_text() + "\n"
    )
    line = ("evidence", measured / "evaluation", "--checkpoint", other, "-o", out)
    assert "another checkpoint" in trce(*line).err
    assert not out.exists()
    assert trce("evidence", measured / "evaluation", "-o", out).status == 0
    assert "differs" in trce("evidence", "--verify", out, "--checkpoint", other).err


def test_what_is_asked_wrongly_is_told(trce: Run, measured: Path, tmp_path: Path, monkeypatch: Any) -> None:
    twice = (measured / "evaluation", measured / "evaluation", "-o", tmp_path / "out")
    assert "Two evaluations are called evaluation" in trce("evidence", *twice).err
    assert "nothing to collect" in trce("evidence").err
    assert "no folder of evidence" in trce("evidence", "--verify", tmp_path / "absent").err
    assert trce("evidence", "--verify", tmp_path, *twice).status == 2
    assert "SHA256SUMS is missing" in trce("evidence", "--verify", tmp_path).err
    assert f"{tmp_path} is no evaluation: " in trce("evidence", tmp_path, "-o", tmp_path / "out").err
    monkeypatch.setattr(evidence, "find_spec", lambda name: None)
    assert "trce[evidence]" in trce("evidence", "--verify", tmp_path).err
