"""Commands that are killed, refused a call, or whose input changes: a sample; `make fuzz` takes all."""

import random
import re

import pytest

from fuzz.disturb import COMMANDS, Bench
from fuzz.world import World

QUICK = ("map", "apply", "presets new")


@pytest.mark.parametrize("kind", ["kill", "refuse", "input"])
@pytest.mark.parametrize("command", QUICK)
def test_a_disturbed_command_leaves_nothing_half_done(bench: Bench, command: str, kind: str) -> None:
    every = bench.disturbances(command, (kind,))
    for one in random.Random(1).sample(every, min(3, len(every))):
        bench.check(one)


@pytest.mark.slow
@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in QUICK])
def test_longer_commands_are_disturbed_as_well(bench: Bench, command: str) -> None:
    every = bench.disturbances(command, ("kill", "refuse", "input"))
    for one in random.Random(1).sample(every, min(30, len(every))):
        bench.check(one)


def test_events_are_counted_and_the_kill_is_one(world: World) -> None:
    args = ["presets", "new", "out/x.toml"]
    events = world.run(args, plan={}).events
    world.clear()
    assert [event.split()[0] for event in events].count("ctypes.dlsym") in (0, 1)
    assert any("out/x.toml" in event or "out/.trce-" in event for event in events)
    assert world.run(args, plan={"at": 1, "do": "kill"}).status == -9
    assert world.run(args, plan={"at": 10**6, "do": "kill"}).status == 0
    world.clear()


def test_a_run_has_the_events_that_were_counted(bench: Bench) -> None:
    _, counted = bench.undisturbed("map")
    with bench.world.with_files({}):
        events = bench.world.run(COMMANDS["map"], plan={}).events
    assert [_unnamed(event) for event in events] == [_unnamed(event) for event in counted]


def _unnamed(event: str) -> str:
    return re.sub(r"\.trce-[0-9a-f]{16}", ".trce-", event)
