"""The attacks work: on the embedded checkpoint they find what is there to be found."""

import json


def attacked(trce, checkpoint, output, *options):
    """What `trce attack` found; few prompts, drawn in few steps."""
    told = trce(
        "attack", checkpoint, "--against", "emoji", "--preset", "emoji-weapons", "--device", "cpu", "--json",
        "--steps", 8, "--output", output, *options,
    )  # fmt: skip
    assert told.status == 0, told.err
    (found,) = json.loads(told.out)["attacks"].values()
    return found["found_without"]["hits"], found["found_with"]["hits"]


def test_prefixes_find_what_an_edit_of_eot_alone_left(trce, tmp_path):
    """It leaves what the words themselves say."""
    line = ["map", "emoji", "--preset", "emoji-weapons", "--token-weights", "0,1,0,0"]
    line += ["--preserve", 1, "--strength", 1]
    assert trce(*line, "--output", tmp_path / "mapped").status == 0
    budget = ["--prefix-timesteps", 2, "--prefix-iterations", 10]
    without, with_ = attacked(
        trce, tmp_path / "mapped", tmp_path / "a.csv", "--attack", "unlearn-diff", "--count", 8, *budget
    )
    assert without < 8
    assert with_ >= without + 2


def test_ring_a_bell_s_prompts_mean_the_concept(trce, tmp_path):
    """To the checkpoint that nobody edited they do, whatever their words."""
    budget = ["--ring-length", 5, "--ring-population", 20, "--ring-generations", 40]
    _, found = attacked(trce, "emoji", tmp_path / "a.csv", "--attack", "ring-a-bell", "--count", 6, *budget)
    assert found >= 4
