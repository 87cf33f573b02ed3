"""`--log-with`: a real tracker of a real run holds the figures by the names that the run's own files have."""

import json

import pytest

event_accumulator = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
)
EMOJI = ["--preset", "emoji-weapons", "--steps", 2, "--count", 2, "--device", "cpu", "--json"]
ATTACK = ["--attack", "ring-a-bell", "--ring-length", 3, "--ring-population", 4, "--ring-generations", 2]


def logged(folder):
    """Every figure of the runs in a folder: its values by step."""
    found = {}
    for path in folder.rglob("events.*"):
        reader = event_accumulator.EventAccumulator(str(path))
        reader.Reload()
        for name in reader.Tags()["scalars"]:
            found.setdefault(name, {}).update({each.step: each.value for each in reader.Scalars(name)})
    return found


@pytest.fixture
def run(trce, tmp_path):
    """Run a command with the tracker; what it printed, what was logged, and its configuration."""

    def tracked(command, *line, output):
        told = trce(command, *line, *EMOJI, "-o", tmp_path / output, "--log-with", "tensorboard")
        assert told.status == 0, told.err
        logs = tmp_path / f"{output}-logs"
        assert [path.name for path in logs.iterdir()] == [f"trce-{command}"]
        (config,) = logs.rglob("hparams.yml")
        return json.loads(told.out), logged(logs), config.read_text("utf-8")

    return tracked


def test_an_evaluation_is_logged_by_the_names_of_its_results(run):
    told, found, config = run(
        "evaluate", "emoji", "--against", "emoji", "--suite", "explicit", "--suite", "benign", output="out"
    )
    figures = {name: value for name, value in told["figures"].items() if value is not None}
    assert figures
    assert {name: values[0] for name, values in found.items()} == pytest.approx(figures)
    assert "steps: '2'" in config


def test_what_attacks_found_is_logged_by_the_names_of_its_record(run):
    told, found, config = run("attack", "emoji", "--against", "emoji", *ATTACK, output="a.csv")
    share = told["attacks"]["ring-a-bell"]["found_with"]["share"]
    assert found["attacks.ring-a-bell.found_with.share"] == {0: pytest.approx(share)}
    assert "budgets.ring-a-bell.length: '3'" in config


def test_every_trial_is_a_step(run):
    told, found, _ = run("tune", "emoji", "--preserve", "0.1..1e9", "--trials", 2, output="out")
    good, failed = told["trials"]
    assert failed["failed"]
    assert found["preserve"] == {0: pytest.approx(0.1), 1: pytest.approx(1e9)}
    assert found["attack_success"] == {0: pytest.approx(good["attack_success"]["share"])}
