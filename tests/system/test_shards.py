"""Shards: which part a process does, what an environment asks for, and what a merge says of their records."""

from pathlib import Path

import pytest

from trce_cli.errors import BadInput
from trce_cli.system.shards import Shard, Share, begin, complete, finish, parse_shard, shard_of

RUN = {"checkpoints": "a", "prompts or seeds": "b", "settings": "c"}


def slurm(task: int, count: int, first: int, step: int = 1) -> dict[str, str]:
    last = first + (count - 1) * step
    told = {"ID": task, "COUNT": count, "MIN": first, "MAX": last, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in told.items()}


class Team:
    def __init__(self, rank: int, size: int) -> None:
        self.process_index, self.num_processes, self.is_main_process = rank, size, rank == 0


@pytest.mark.parametrize(("pieces", "shards", "processes"), [(0, 3, 2), (1, 4, 1), (7, 3, 2), (24, 5, 3)])
def test_every_piece_is_done_once(pieces: int, shards: int, processes: int) -> None:
    shares = [
        Share(Shard(number, shards), Team(rank, processes))
        for number in range(1, shards + 1)
        for rank in range(processes)
    ]
    done = [piece for share in shares for piece in share.mine(share.of_shard(range(pieces)))]
    assert sorted(done) == list(range(pieces))
    assert len({share.name for share in shares}) == len(shares)


@pytest.mark.parametrize(
    ("environment", "shard"),
    [
        ({}, "1/1"),
        (slurm(1, 4, first=1), "1/4"),
        (slurm(0, 4, first=0), "1/4"),
        (slurm(3, 4, first=0), "4/4"),
        (slurm(10, 3, first=2, step=4), "3/3"),
        ({"SLURM_ARRAY_TASK_ID": "2"}, "1/1"),
        ({"SKYPILOT_NODE_RANK": "0", "SKYPILOT_NUM_NODES": "2"}, "1/2"),
        ({"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2"}, "2/2"),
    ],
)
def test_array_jobs_say_which_shard(environment: dict[str, str], shard: str) -> None:
    assert str(shard_of(environment)) == shard


@pytest.mark.parametrize(
    "environment",
    [
        slurm(3, 3, first=1) | {"SLURM_ARRAY_TASK_MAX": "7"},  # 1,3,7
        slurm(9, 3, first=1),
        slurm(4, 3, first=1, step=2),
        slurm(1, 3, first=1) | {"SLURM_ARRAY_TASK_COUNT": "many"},
        {"SKYPILOT_NODE_RANK": "2", "SKYPILOT_NUM_NODES": "2"},
    ],
)
def test_what_is_no_shard_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(BadInput) as caught:
        shard_of(environment)
    assert "--shard" in (caught.value.hint or "")


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "1/0", "-1/2", "1/9999999", "²/3"])
def test_wrong_shards(text: str) -> None:
    with pytest.raises(BadInput, match="is no shard"):
        parse_shard(text)


def test_a_merge_names_what_is_missing_and_what_is_not_finished(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, number in ((one, 3), (two, 1), (one, 2)):
        begin(folder, Share(Shard(number, 5)), RUN)
    finish(one, Share(Shard(3, 5)), RUN, [{"phase": "draw", "seconds": 1.0}])
    with pytest.raises(BadInput, match=r"missing: 4/5, 5/5; not finished: 1/5, 2/5\."):
        complete([one, two], RUN)
    for number in (1, 2, 4, 5):
        finish(two, Share(Shard(number, 5)), RUN)
    assert complete([two, one], RUN) == [{"phase": "draw", "seconds": 1.0}]
    with pytest.raises(BadInput, match=r"missing: 3/5\."):
        complete([two], RUN)
    with pytest.raises(BadInput, match="holds no shard"):
        complete([tmp_path, two, one], RUN)


def test_a_shard_that_is_done_stays_so_and_others_are_refused(tmp_path: Path) -> None:
    share = Share(Shard(1, 2))
    for number in (1, 2):
        finish(tmp_path, Share(Shard(number, 2)), RUN)
    begin(tmp_path, share, RUN)
    complete([tmp_path], RUN)
    with pytest.raises(BadInput, match=r"Shard 1/2 in .* is one of other settings"):
        begin(tmp_path, share, RUN | {"settings": "d"})
    with pytest.raises(BadInput, match="is one of other prompts or seeds"):
        complete([tmp_path], RUN | {"prompts or seeds": "d"})
    begin(tmp_path, share, RUN | {"settings": "d"}, force=True)
    with pytest.raises(BadInput, match="missing: 2/2; not finished: 1/2"):
        complete([tmp_path], RUN | {"settings": "d"})


@pytest.mark.parametrize("cost", [{}, {"phase": 1, "seconds": 1.0}, {"phase": "draw", "seconds": "long"}])
def test_costs_that_nothing_can_be_added_to_are_refused(tmp_path: Path, cost: dict[str, object]) -> None:
    finish(tmp_path, Share(Shard(1, 2)), RUN, [cost])
    with pytest.raises(BadInput, match=r"cannot be read: 0\.(phase|seconds)"):
        complete([tmp_path], RUN)
