"""`trce steer` as a user runs it: plans, refusals, kills, several processes, a full disk."""

import fcntl
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import toy
from trce_cli.system.safetensors import SafetensorsFile

STEER = """
steps = 4
trajectories_per_concept = 5
unconditional = 18
benign = 17
lr = 1e-3
batch_size = 2
max_steps = 5
"""
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    path = tmp_path_factory.mktemp("preset") / "toy.toml"
    path.write_text(toy.preset(STEER))
    return path


@pytest.fixture(scope="module")
def mapped(tiny_sd1, preset, tmp_path_factory):
    """The tiny SD 1.x checkpoint after stage 1."""
    from trce_cli.cli.app import main

    folder = tmp_path_factory.mktemp("mapped") / "mapped"
    assert main(["map", str(tiny_sd1), "-p", str(preset), "-o", str(folder), "--quiet"]) == 0
    return folder


@pytest.fixture(scope="module")
def whole(mapped, preset, tmp_path_factory):
    """An undisturbed run in one process."""
    from trce_cli.cli.app import main

    folder = tmp_path_factory.mktemp("whole") / "whole"
    assert main(arguments(mapped, preset, folder)) == 0
    return folder


def arguments(erased, preset, output, *more):
    return [str(one) for one in ("steer", erased, "-p", preset, "-o", output, "--device", "cpu", "-q", *more)]


def furthest(a, b):
    one, other = load_file(a / WEIGHTS), load_file(b / WEIGHTS)
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)


def test_a_lora_holds_both_stages(trce, mapped, whole, preset, tiny_sd1, tmp_path):
    forms = ("--as", "lora", "--as", "diffusers", "--energy", "1", "--json")
    outcome = trce(*arguments(mapped, preset, tmp_path / "out", *forms))
    assert outcome.status == 0, outcome.err
    assert furthest(tmp_path / "out", whole) < 1e-6
    lora = tmp_path / "out.lora.safetensors"
    result = json.loads(outcome.out)
    assert result["outputs"] == {"diffusers": str(tmp_path / "out"), "lora": str(lora)}
    assert result["lora"]["truncation_error"]["change"]["max"] < 0.01
    biases = [key for key in result["lora"]["left_out"] if key.endswith("bias")]
    assert biases == result["lora"]["left_out"]
    assert trce("apply", lora, tiny_sd1, "-o", tmp_path / "applied").status == 0
    one, other = load_file(tmp_path / "applied" / WEIGHTS), load_file(whole / WEIGHTS)
    for key in one.keys() - set(biases):
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=1e-4)
    history = json.loads((tmp_path / "applied/trce.json").read_text())["history"][0]["edits"][0]["history"]
    assert [entry["edit"] for entry in history] == ["map", "steer"]


def test_a_map_cannot_hold_what_steering_does(trce, mapped, preset, tmp_path):
    outcome = trce(*arguments(mapped, preset, tmp_path / "out.safetensors", "--as", "map"))
    assert outcome.status == 2
    assert "--as lora" in outcome.err


def test_the_plan_is_told_and_nothing_is_written(trce, mapped, preset, tiny_sd1, tmp_path):
    told = trce(*arguments(mapped, preset, tmp_path / "out", "--dry-run", "--json", "--batch-size", 3))
    assert told.status == 0
    plan = json.loads(told.out)
    assert (plan["unsafe_states"], plan["unconditional_states"], plan["steps"]) == (20, 18, 5)
    assert plan["teacher"] == str(tiny_sd1)
    assert plan["evaluations"]["training"] == 5 * 3 * 4  # unsafe twice, unconditional, benign
    assert plan["evaluations"]["guard"] == 2 * (2 * 2 * 2 + 18 + 18)  # 2 trajectories of 2 early steps
    assert plan["output_bytes"] >= (mapped / WEIGHTS).stat().st_size
    lora = trce(
        *arguments(mapped, preset, tmp_path / "out.safetensors", "--dry-run", "--json", "--as", "lora")
    )
    assert json.loads(lora.out)["output_bytes"] == 0
    assert plan["trajectory_bytes"] > 20 * 2 * 256 * 2
    assert plan["memory_bytes"] > 4 * (plan["frozen_weights"] + plan["tuned_weights"])
    assert list(tmp_path.iterdir()) == []


def test_both_stages_are_in_the_history_and_the_guard_is_shown(trce, mapped, preset, tiny_sd1, tmp_path):
    told = trce("steer", mapped, "-p", preset, "-o", tmp_path / "out", "--device", "cpu", "--json")
    assert told.status == 0, told.err
    result = json.loads(told.out)
    assert result["settings"]["teacher"] == tiny_sd1.name
    assert result["figures"]["unconditional"]["drift"] < 0.2
    lines = told.err.splitlines()
    assert lines[0].startswith("20 unsafe, 18 unconditional and 17 benign states: ")  # the size comes first
    assert "from reject (0) to prefer (1)" in told.err
    assert told.err.count("good (up to 20%)") == 2
    history = json.loads((tmp_path / "out/trce.json").read_text())["history"]
    assert [entry["edit"] for entry in history] == ["map", "steer"]
    erased, steered = load_file(mapped / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    for key in erased:
        if ".attn2.to_k." in key or ".attn2.to_v." in key:
            assert torch.equal(erased[key], steered[key])


def test_stage_2_alone_works_with_a_note(trce, tiny_sdxl, preset, tmp_path):
    told = trce("steer", tiny_sdxl, "-p", preset, "-o", tmp_path / "out", "--device", "cpu", "--max-steps", 1)
    assert told.status == 0, told.err
    assert "has not been mapped: stage 2 alone is the weaker half" in told.err


def test_a_missing_or_changed_original_is_told(trce, tiny_sd1, preset, tmp_path, monkeypatch):
    monkeypatch.setenv("TRCE_CACHE", str(tmp_path / "cache"))  # where it was seen elsewhere
    original = tmp_path / "original"
    shutil.copytree(tiny_sd1, original)
    assert trce("map", original, "-p", preset, "-o", tmp_path / "mapped").status == 0
    shutil.copytree(tmp_path / "mapped/unet", original / "unet", dirs_exist_ok=True)
    changed = trce("steer", tmp_path / "mapped", "-p", preset, "-o", tmp_path / "out")
    assert changed.status == 2
    assert "is not the original" in changed.err
    shutil.rmtree(original)
    missing = trce("steer", tmp_path / "mapped", "-p", preset, "-o", tmp_path / "out")
    assert missing.status == 2
    assert "Name it with --teacher" in missing.err
    assert "Traceback" not in changed.err + missing.err


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--early-steps", 9], 2, "early"),
        (["--mixed-precision", "fp16"], 2, "needs a GPU"),
        (["--margin", "nan"], 2, "--margin"),
        (["--max-drift", "nan"], 2, "--max-drift"),
        (["--log-with", "wandb"], 2, "wandb is not installed"),
        (["--steps", 2000], 2, "DDIM steps"),
        (["--teacher", "no/such/folder"], 2, "no/such/folder"),
    ],
)
def test_wrong_values_are_one_sentence(trce, mapped, preset, tmp_path, options, status, said):
    if "tensorboard" in options and shutil.which("tensorboard"):
        pytest.skip("tensorboard is installed")
    told = trce("steer", mapped, "-p", preset, "-o", tmp_path / "out", "--device", "cpu", *options)
    assert (told.status, told.out) == (status, "")
    assert said in told.err
    assert "Traceback" not in told.err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_before_anything_is_done(trce, mapped, preset, whole):
    before = (whole / WEIGHTS).stat().st_mtime_ns
    told = trce(*arguments(mapped, preset, whole))
    assert told.status == 2
    assert "exists already" in told.err
    assert (whole / WEIGHTS).stat().st_mtime_ns == before
    assert not whole.with_name(".whole.steer").exists()


def test_the_teacher_is_not_replaced(trce, mapped, preset, tiny_sd1, tmp_path):
    shutil.copytree(tiny_sd1, tmp_path / "original")
    teacher = ("--teacher", tmp_path / "original", "--force")
    told = trce(*arguments(mapped, preset, tmp_path / "original", *teacher))
    assert told.status == 2
    assert "is the input itself" in told.err
    assert (tmp_path / "original" / WEIGHTS).read_bytes() == (tiny_sd1 / WEIGHTS).read_bytes()


def test_a_kept_set_is_used_again_and_refused_for_other_inputs(trce, mapped, preset, whole, tmp_path):
    kept = ("--trajectories", tmp_path / "set")
    assert trce(*arguments(mapped, preset, tmp_path / "one", *kept)).status == 0
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()}
    again = trce(*arguments(mapped, preset, tmp_path / "two", *kept, "--lr", "2e-3"))
    assert again.status == 0
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()} == made
    assert furthest(tmp_path / "one", whole) == 0
    assert furthest(tmp_path / "two", whole) > 0
    other = trce(*arguments(mapped, preset, tmp_path / "three", *kept, "--seed", 1))
    assert other.status == 2
    assert "were made for other inputs: seed was 0, and is 1 now" in other.err
    assert not list(tmp_path.glob("*three*"))


def test_a_set_that_another_run_is_making_is_refused(trce, mapped, preset, tmp_path):
    (made := tmp_path / "set").mkdir()
    handle = os.open(made, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    told = trce(*arguments(mapped, preset, tmp_path / "out", "--trajectories", made))
    os.close(handle)
    assert told.status == 2
    assert "Another run is making the trajectories" in told.err
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert trce(*arguments(mapped, preset, tmp_path / "out", "--trajectories", made)).status == 0


@pytest.mark.filterwarnings("ignore:.*no supported trackers")
def test_what_trackers_say_is_not_in_the_result(trce, mapped, preset, tmp_path, monkeypatch):
    from accelerate import Accelerator

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(Accelerator, "init_trackers", lambda *args: print("a project begins"))
    monkeypatch.setattr(Accelerator, "end_training", lambda *args: print("a project ends"))
    told = trce(*arguments(mapped, preset, tmp_path / "out", "--json", "--log-with", "trackio"))
    assert told.status == 0, told.err
    assert json.loads(told.out)["edit"] == "steer"
    assert "a project begins\na project ends" in told.err


# Kills. Each run is a process of its own, forked from one that has the libraries loaded already.


def killed_run(args: list[str], file: str, count: int, during: bool) -> None:
    """Run a command in this process, which kills itself at the `count`th write of a file of this name."""
    from trce_cli.cli.app import main
    from trce_cli.erase import steer, training_state, trajectory_set
    from trce_cli.system.whole import whole

    steer.SAVE_EVERY = -1.0  # a state after every step
    write, written = training_state.write_tensors, []

    def counted(path: Path, *rest) -> None:
        hit = path.name.startswith(file)
        written.extend([path] * hit)
        if hit and len(written) == count and during:
            with whole(path) as fresh:
                fresh.write_bytes(b"half a file")
                os.kill(os.getpid(), signal.SIGKILL)
        write(path, *rest)
        if hit and len(written) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    training_state.write_tensors = trajectory_set.write_tensors = counted
    if file == "output":
        steer.write_outputs = lambda *args, **options: os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(main(args))


@pytest.fixture(scope="module")
def start():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trce_cli.erase.steer", "diffusers.pipelines.stable_diffusion", __name__])

    def run(*args) -> int:
        process = context.Process(target=killed_run, args=args)
        process.start()
        process.join(600)
        return process.exitcode

    return run


@pytest.mark.parametrize("left", [["state.safetensors", "trajectories/a.safetensors"], ["steer.jsonl"], []])
def test_a_run_killed_while_it_tidied_up_is_tidied_up_by_the_next(trce, mapped, preset, tmp_path, left):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/model_index.json").touch()
    (tmp_path / ".out.steer/trajectories").mkdir(parents=True)
    for name in left:
        (tmp_path / ".out.steer" / name).touch()
    done = trce(*arguments(mapped, preset, tmp_path / "out"))
    assert (done.status, "exists already" in done.err) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_working_folder_with_files_of_others_stays(trce, mapped, preset, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.steer").mkdir()
    (tmp_path / ".out.steer/notes").touch()
    assert trce(*arguments(mapped, preset, tmp_path / "out")).status == 2
    assert (tmp_path / ".out.steer/notes").exists()


def test_a_working_folder_that_is_a_link_is_refused(trce, mapped, preset, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.steer").symlink_to("elsewhere")
    done = trce(*arguments(mapped, preset, tmp_path / "out"))
    assert (done.status, "no folder of ours" in done.err) == (2, True)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_run_killed_again_and_again_ends_as_an_undisturbed_one(start, mapped, preset, whole, tmp_path):
    args = arguments(mapped, preset, tmp_path / "out")
    kills = [
        ("unsafe-", 1, True),
        ("unconditional-", 2, False),
        ("benign-0", 1, False),
        ("stage1-", 1, True),
        ("state", 2, False),
        ("state", 2, True),
        ("output", 0, False),
    ]
    work = tmp_path / ".out.steer"
    kept: dict[str, int] = {}
    for file, count, during in kills:
        assert start(args, file, count, during) == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
        made = {path.name: path.stat().st_mtime_ns for path in work.glob("trajectories/*.safetensors")}
        assert kept.items() <= made.items()  # nothing is made twice
        kept = made
    assert start(args, "none", 0, False) == 0
    assert furthest(tmp_path / "out", whole) == 0
    log = (tmp_path / "out/steer.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2, 3, 4, 5]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_unfinished_run_of_other_arguments_is_refused_or_dropped(start, trce, mapped, preset, tmp_path):
    args = arguments(mapped, preset, tmp_path / "out")
    assert start(args, "state", 1, False) == -signal.SIGKILL
    refused = trce(*args, "--lr", "2e-3")
    assert refused.status == 2
    assert "unfinished run with other arguments (lr differs)" in refused.err
    made = {path.name for path in (tmp_path / ".out.steer/trajectories").iterdir()}
    assert start([*args, "--lr", "2e-3", "--force"], "state", 1, False) == -signal.SIGKILL
    assert {path.name for path in (tmp_path / ".out.steer/trajectories").iterdir()} == made
    assert trce(*args, "--lr", "2e-3").status == 0
    log = [json.loads(line) for line in (tmp_path / "out/steer.jsonl").read_text().splitlines()]
    assert log[-1]["lr"] == 2e-3
    assert len(log) == 5


# Several processes


def launch(program, args):
    """Run a program in two processes with gloo."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", "0", *program, *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


# The clocks of two processes never agree on when a state is due: here they disagree at every step.
KILLED = """
import os, signal, sys
from trce_cli.erase import steer
from trce_cli.erase import working_folder
from trce_cli.cli.app import main

main_process = os.environ["RANK"] == "0"
steer.SAVE_EVERY = -1.0 if main_process else 1e9
save = working_folder.WorkingFolder.save

def saved(self, step, *rest):
    save(self, step, *rest)
    if step == 3:
        os.kill(os.getpid(), signal.SIGKILL)

working_folder.WorkingFolder.save = saved
sys.exit(main(sys.argv[1:]))
"""


def test_two_processes_give_the_result_of_one(mapped, preset, whole, tmp_path):
    """They are killed on the way, after a state that was due in one of them alone, and go on."""
    (script := tmp_path / "killed.py").write_text(KILLED)
    args = arguments(mapped, preset, tmp_path / "out")
    killed = launch([script], args)
    assert killed.returncode, killed.stderr[-3000:]
    script.unlink()
    state = SafetensorsFile.open(tmp_path / ".out.steer/state.safetensors")
    assert state.metadata["step"] == "3", killed.stderr[-3000:]
    done = launch(["-m", "trce_cli"], args)
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((tmp_path / "out/trce.json").read_text())["history"]
    assert history[-1]["settings"]["processes"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # Adam divides by the gradient's size, so rounding a tiny one can move a weight by a share of lr.
    assert furthest(tmp_path / "out", whole) < 0.1 * 1e-3
    logs = [
        [json.loads(line) for line in (folder / "steer.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "out", whole)
    ]
    for ours, theirs in zip(*logs, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


def test_two_processes_train_the_lora_of_one(trce, mapped, preset, tmp_path):
    """Killed on the way and gone on with, as with whole weights; each process has factors of its own."""
    lora = ("--lora-rank", "3", "--lr", "1e-2", "--max-drift", "1000")
    alone, folder = tmp_path / "alone", tmp_path / "out"
    assert trce(*arguments(mapped, preset, alone, *lora)).status == 0
    (script := tmp_path / "killed.py").write_text(KILLED)
    args = arguments(mapped, preset, folder, *lora)
    killed = launch([script], args)
    assert killed.returncode, killed.stderr[-3000:]
    state = SafetensorsFile.open(tmp_path / ".out.steer/state.safetensors")
    assert state.metadata["step"] == "3", killed.stderr[-3000:]
    done = launch(["-m", "trce_cli"], args)
    assert done.returncode == 0, done.stderr[-3000:]
    settings = json.loads((folder / "trce.json").read_text())["history"][-1]["settings"]
    assert (settings["processes"], settings["lora_rank"]) == (2, 3)
    # Beside what training changed most.
    assert furthest(folder, alone) < 1e-3 * furthest(mapped, alone)
    logs = [
        [json.loads(line) for line in (place / "steer.jsonl").read_text().splitlines()]
        for place in (folder, alone)
    ]
    for ours, theirs in zip(*logs, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


# A full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", place]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("announced", [True, False])
def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(
    trce, mapped, preset, small_disk, tmp_path, announced, monkeypatch
):
    from trce_cli.erase.working_folder import WorkingFolder

    if not announced:  # the space goes while the run is at work
        monkeypatch.setattr(WorkingFolder, "_check_space", lambda *args: None)
    (small_disk / "filler").write_bytes(bytes(252 * 4096))  # of 256 pages
    set_folder = small_disk / "set"
    told = trce(*arguments(mapped, preset, tmp_path / "out", "--trajectories", set_folder))
    assert told.status == 1
    assert "Traceback" not in told.err
    assert told.err.count("\n") == 2
    assert not (tmp_path / "out").exists()
    if announced:
        assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]
        assert not set_folder.exists()
    else:
        assert not list(set_folder.glob(".*"))
        (small_disk / "filler").unlink()
        assert trce(*arguments(mapped, preset, tmp_path / "out", "--trajectories", set_folder)).status == 0
