"""Fuzzing by kind: `python -m fuzz.run N KIND...` tries N inputs of each kind and says what was found."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic

from hypothesis import HealthCheck, Phase, given, seed, settings

from fuzz import (
    further,  # noqa: F401 - registers its kinds
    oracle,
)
from fuzz.kinds import KINDS, Case, cases
from fuzz.world import World, prepared


def attempt(world: World, case: Case) -> int:
    """Run one case and judge it; its exit status."""
    with world.with_files(case.files):
        before = world.outside()
        done = world.run(case.args)
        after = world.outside()
        if case.anywhere:
            world.forget(new := after.keys() - before.keys())
            after = world.outside()
            before |= {str(world.work): after[str(world.work)]} if new else {}
        oracle.check(done, world.work, before, after, case.files)
    return done.status


def fuzz(world: World, kind: str, count: int, number: int, judge: Callable[[Case], None]) -> None:
    """Hand `count` cases of a kind to `judge`; the same number draws the same ones."""
    quick = settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),
        print_blob=False,
    )
    seed(number)(quick(given(cases(kind, world.whole))(judge)))()


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(description="Try hostile input of every kind, and say what was found.")
    parser.add_argument("count", type=int, help="inputs of each kind")
    parser.add_argument("kinds", nargs="*", choices=[[], *KINDS], help="else all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=1, help="over all kinds, each with the next seed")
    parser.add_argument("--world", type=Path, metavar="DIR", help="where to keep the inputs that are whole")
    asked = parser.parse_args()
    with prepared(asked.world) as world:
        failed = [
            one
            for number in range(asked.seed, asked.seed + asked.rounds)
            for one in asked.kinds or KINDS
            if _run(world, one, asked.count, number)
        ]
    return int(bool(failed))


def _run(world: World, kind: str, count: int, number: int) -> int:
    """Fuzz a kind, print a line, and return how many promises were broken, alike ones once."""
    statuses: dict[int, int] = {}
    found: dict[str, str] = {}

    def judge(case: Case) -> None:
        try:
            status = attempt(world, case)
        except oracle.Broken as broken:
            status = -1
            if broken.kind not in found:
                found[broken.kind] = f"{broken}\n{str(case)[:3000]}"
                print(f"--- {kind}: {found[broken.kind]}", file=sys.stderr, flush=True)
        statuses[status] = statuses.get(status, 0) + 1

    start = monotonic()
    fuzz(world, kind, count, number, judge)
    told = ", ".join(f"{statuses.get(status, 0):,} exit {status}" for status in (0, 1, 2))
    seconds = monotonic() - start
    total = sum(statuses.values())
    print(f"{kind}: {total:,} inputs ({told}), {len(found)} findings, {seconds:.0f} s", flush=True)
    return len(found)


if __name__ == "__main__":
    sys.exit(main())
