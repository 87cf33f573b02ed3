"""`trce attack` on the command line, on the embedded checkpoint: what it writes and what it refuses."""

import csv
import json

import pytest

SMALL = [
    "--ring-length", 4, "--ring-population", 6, "--ring-generations", 3,
    "--prefix-length", 2, "--prefix-timesteps", 1, "--prefix-iterations", 2, "--inversion-iterations", 2,
]  # fmt: skip


@pytest.fixture
def attack(trce, tmp_path):
    """Attack the embedded checkpoint, in few steps and at a small budget."""

    def run(*more, output="attacks.csv"):
        line = ["attack", "emoji", "--against", "emoji", "--preset", "emoji-weapons", "--device", "cpu"]
        line += ["--steps", 2, "--count", 2, "--negative-prompt", "a gun", "--json", *SMALL]
        return trce(*line, "--output", tmp_path / output, *more)

    return run


def rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_both_files_say_what_was_found_and_evaluate_asks_it_again(attack, trce, tmp_path):
    told = attack()
    assert told.status == 0, told.err
    output, record = tmp_path / "attacks.csv", tmp_path / "attacks.json"
    result = json.loads(told.out)
    assert {key: result.pop(key) for key in ("output", "record")} == {
        "output": str(output),
        "record": str(record),
    }
    assert json.loads(record.read_text("utf-8")) == result
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attacks.csv", "attacks.json"]
    found = rows(output)
    assert [row["attack"] for row in found] == ["ring-a-bell"] * 2 + ["unlearn-diff"] * 2
    assert [row["seed"] for row in found] == ["0", "1"] * 2
    assert result["settings"]["budgets"]["ring-a-bell"]["length"] == 4
    assert result["settings"]["budgets"]["unlearn-diff"]["iterations"] == 2
    assert result["attacks"].pop("concept-inversion")["found_with"]["total"] == 2  # no prompt can say it
    for name, figures in result["attacks"].items():
        for key, rate in figures.items():
            assert rate["hits"] == sum(int(row[key]) for row in found if row["attack"] == name)

    again = trce(
        "evaluate", "emoji", "--against", "emoji", "--preset", "emoji-weapons", "--device", "cpu", "--json",
        "--steps", 2, "--suite", "none", "--suite", f"attacks={output}", "--negative-prompt", "a gun",
        "--output", tmp_path / "evaluation",
    )  # fmt: skip
    assert again.status == 0, again.err
    verdicts = rows(tmp_path / "evaluation" / "verdicts.csv")
    erased = {(v["prompt"], v["seed"]): v for v in verdicts if v["role"] == "erased"}
    column = next(name for name in verdicts[0] if name.startswith("judge/unsafe"))
    for row in found:
        assert erased[row["prompt"], row["seed"]][column] == row["found_with"]


def test_one_attack_on_prompts_of_ones_own(attack, tmp_path):
    (tmp_path / "own.csv").write_text("prompt,evaluation_seed,guidance\na sword,77,2.5\n", "utf-8")
    told = attack("--attack", "ring-a-bell", "--suite", f"own={tmp_path / 'own.csv'}")
    assert told.status == 0, told.err
    (row,) = rows(tmp_path / "attacks.csv")
    assert (row["source"], row["seed"], row["guidance"]) == ("a sword", "77", "2.5")
    assert list(json.loads(told.out)["attacks"]) == ["ring-a-bell"]


def test_nothing_is_replaced_without_force(attack, tmp_path):
    record = tmp_path / "attacks.json"
    record.write_text("mine")
    told = attack()
    assert told.status == 2
    assert "attacks.json is there already" in json.loads(told.out)["error"]["message"]
    assert "attacks.json is there already" in told.err
    assert record.read_text() == "mine"
    assert attack("--attack", "ring-a-bell", "--force").status == 0
    assert json.loads(record.read_text("utf-8"))["schema"] == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--output", "attacks.txt"], "attacks.txt is no .csv file"),
        (["--output", "no-such-folder/attacks.csv"], "There is no folder"),
        (["--attack", "brute-force"], "brute-force"),
        (["--suite", "expicit"], "There is no suite 'expicit'"),
        (["--suite", "own=nothing.csv"], "There is no prompt file"),
        (["--suite", "own=../sizes.csv"], "several sizes"),
        (["--ring-strength", "inf"], "--ring-strength must be a finite number"),
        (["--ring-mutation", "1.5"], "--ring-mutation must be at most 1"),
        (["--prefix-lr", "0"], "--prefix-lr must be greater than 0"),
        (["--ring-length", "0"], "--ring-length must be at least 1"),
        (["--prefix-length", "99"], "prompts of up to 30 words"),
        (["--steps", "2000"], "steps"),
        (["--preset", "no-such-preset"], "no-such-preset"),
        (["--detector", "no-such-detector"], "no-such-detector"),
    ],
)
def test_bad_input_is_told_in_a_sentence_and_writes_nothing(attack, tmp_path, monkeypatch, options, told):
    (tmp_path / "sizes.csv").write_text("prompt,width\na sword,64\na gun,96\n", "utf-8")
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    outcome = attack(*options, output="empty/attacks.csv")
    assert outcome.status == 2
    assert json.loads(outcome.out).keys() == {"error"}
    assert told in outcome.err
    assert "Traceback" not in outcome.err
    assert not list(empty.iterdir())
