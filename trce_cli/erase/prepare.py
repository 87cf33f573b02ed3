"""The set of trajectories made: sampled by the original, and predicted at by the model after stage 1."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from trce_cli.erase.sampling import Predictor, finite, predictions_at, sample
from trce_cli.erase.trajectories import STORED, Shard
from trce_cli.erase.trajectory_set import TrajectorySet
from trce_cli.families.base import Schedule
from trce_cli.system.processes import on_main

if TYPE_CHECKING:
    from accelerate import Accelerator

Load = Callable[[], Predictor]
Job = Callable[[Predictor], dict[str, Tensor]]


def prepare(
    stored: TrajectorySet,
    accelerator: "Accelerator",
    schedule: Schedule,
    load_teacher: Load,
    load_stage1: Load,
) -> Iterator[int]:
    """Make the missing shards, each process its share, the main one writes; yields trajectories done.

    The models are loaded one after the other, each only if it is needed, and let go.
    """
    missing = on_main(accelerator, lambda: stored.missing)
    plan = stored.plan

    def trajectories(shard: Shard) -> Job:
        return lambda predict: sample(predict, schedule, shard, plan.recipe, plan.shape)

    def predictions(shard: Shard) -> Job:
        source = Shard("unconditional", shard.number, shard.trajectories)
        states = on_main(accelerator, lambda: stored.read(source))

        def predict_all(predict: Predictor) -> dict[str, Tensor]:
            (prediction,) = predictions_at(predict, states, [states["rows"]])
            return finite(shard, {"prediction": prediction.to(STORED)})

        return predict_all

    for load, wanted, job in (
        (load_teacher, [shard for shard in missing if shard.kind != "stage1"], trajectories),
        (load_stage1, [shard for shard in missing if shard.kind == "stage1"], predictions),
    ):
        if wanted:
            yield from _make(stored, accelerator, load(), wanted, job)


def _make(
    stored: TrajectorySet,
    accelerator: "Accelerator",
    predict: Predictor,
    shards: Sequence[Shard],
    job: Callable[[Shard], Job],
) -> Iterator[int]:
    from accelerate.utils import gather_object

    world, rank = accelerator.num_processes, accelerator.process_index
    for start in range(0, len(shards), world):
        together = shards[start : start + world]
        jobs = [job(shard) for shard in together]
        mine = [jobs[rank](predict)] if rank < len(jobs) else []
        made = gather_object(mine)

        def write(together: Sequence[Shard] = together, made: Sequence[dict[str, Tensor]] = made) -> None:
            for shard, tensors in zip(together, made, strict=True):
                stored.write(shard, tensors)

        on_main(accelerator, write)
        yield sum(len(shard.trajectories) for shard in together)
