import errno
import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.amp import GradScaler

from trce_cli.edits.forms import How
from trce_cli.edits.outputs import Outputs
from trce_cli.erase import training_state
from trce_cli.erase.working_folder import WorkingFolder
from trce_cli.errors import BadInput, TrceError
from trce_cli.maths.low_rank import Size


def trained(steps: int, start: int = 0, model=None, optimizer=None):
    """A small model trained on data that depend on the step alone."""
    if model is None:
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(start, steps):
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()
    return model, optimizer


def test_a_run_that_goes_on_ends_as_an_undisturbed_one(tmp_path):
    model, optimizer = trained(5)
    training_state.save(tmp_path / "state.safetensors", 5, model.state_dict(), optimizer, {"note": "x"})
    fresh, moments = trained(0)
    step, metadata = training_state.load(tmp_path / "state.safetensors", fresh.state_dict(), moments)
    assert (step, metadata["note"]) == (5, "x")
    resumed, _ = trained(9, 5, fresh, moments)
    undisturbed, _ = trained(9)
    assert torch.equal(resumed.weight, undisturbed.weight)


def test_a_foreign_state_is_refused(tmp_path):
    model, optimizer = trained(1)
    path = tmp_path / "state.safetensors"
    training_state.save(path, 1, {"other": torch.zeros(2)}, optimizer)
    with pytest.raises(BadInput, match="no training state of this run"):
        training_state.load(path, model.state_dict(), optimizer)
    save_file(model.state_dict(), path)
    with pytest.raises(BadInput, match="no training state of this run"):
        training_state.load(path, model.state_dict(), optimizer)


@pytest.mark.parametrize(
    ("name", "other", "instead"),
    [
        ("optimizer/0/exp_avg", "optimizer/0/else", None),
        ("optimizer/0/exp_avg", "optimizer/zero/exp_avg", None),
        ("optimizer/0/exp_avg", "optimizer/9/exp_avg", None),
        ("optimizer/0/exp_avg", "optimizer/0", None),
        ("optimizer/0/exp_avg", "optimizer/0/exp_avg", torch.zeros(3, 3)),
        ("optimizer/0/exp_avg", "optimizer/0/exp_avg", torch.zeros(())),
        ("optimizer/0/step", "optimizer/0/step", torch.zeros(2, 3)),
        ("optimizer/0/step", "optimizer/0/step", torch.tensor(True)),
    ],
)
def test_moments_that_have_no_place_are_refused(tmp_path, name, other, instead):
    model, optimizer = trained(1)
    path = tmp_path / "state.safetensors"
    training_state.save(path, 1, model.state_dict(), optimizer)
    tensors = load_file(path)
    moment = tensors.pop(name)
    tensors[other] = moment if instead is None else instead
    save_file(tensors, path, {"step": "1"})
    with pytest.raises(BadInput, match="no training state of this run"):
        training_state.load(path, model.state_dict(), optimizer)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    training_state.write_tensors(path, {"a": torch.zeros(3)}, {})
    old = path.read_bytes()

    def full(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(TrceError, match="No space"):
        training_state.write_tensors(path, {"a": torch.ones(3)}, {})
    assert path.read_bytes() == old
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_files_get_the_mode_that_the_umask_asks_for(tmp_path):
    umask = os.umask(0o027)
    try:
        training_state.write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)}, {})
    finally:
        os.umask(umask)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    "told",
    [
        "{",
        "[]",
        "{}",
        '{"scale": 2.0}',
        *(
            json.dumps(GradScaler("cpu").state_dict() | wrong)
            for wrong in (
                {"scale": math.nan},
                {"scale": math.inf},
                {"scale": 0.0},
                {"scale": 1e39},
                {"scale": "2"},
                {"growth_factor": 1.0},
                {"backoff_factor": 1.0},
                {"growth_interval": 0},
                {"_growth_tracker": -1},
                {"_growth_tracker": 1 << 31},
                {"more": 1.0},
            )
        ),
    ],
)
def test_a_loss_scale_that_cannot_be_is_refused(tmp_path, told):
    model, optimizer = trained(1)
    work = WorkingFolder(tmp_path / "out", Outputs({}, How(Size())), {}, {})
    work.folder.mkdir()
    scaler = GradScaler("cpu", init_scale=8.0)
    work.save(1, model.state_dict(), optimizer, scaler)
    fresh, moments = trained(0)
    other = GradScaler("cpu")
    assert work.load(fresh.state_dict(), moments, other) == 1
    assert other.state_dict() == scaler.state_dict()
    training_state.save(work.folder / "state.safetensors", 1, model.state_dict(), optimizer, {"scaler": told})
    with pytest.raises(BadInput, match="The loss scale in"):
        work.load(fresh.state_dict(), moments, other)
