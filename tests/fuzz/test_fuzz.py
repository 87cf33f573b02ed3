"""Whatever strangers wrote: a short run of every kind, of the same inputs; `make fuzz` is the long one."""

import pytest

from fuzz import oracle
from fuzz.kinds import KINDS
from fuzz.run import attempt, fuzz
from fuzz.sandbox import Done
from fuzz.world import Hollow, World

INPUTS = 12


@pytest.mark.parametrize("kind", KINDS)
def test_every_input_ends_as_it_should(world: World, kind: str) -> None:
    statuses: set[int] = set()
    fuzz(world, kind, INPUTS, 1, lambda case: statuses.add(attempt(world, case)))
    assert 2 in statuses or 0 in statuses


SENTENCE = "Error: It is wrong.\nHint: Do better.\n"


@pytest.mark.parametrize(
    ("broken", "done"),
    [
        ("traceback", Done([], 1, "", "Traceback (most recent call last):\n")),
        ("exit status", Done([], -6, "", "")),
        ("exit status", Done([], 130, "", SENTENCE)),
        ("raw escape", Done([], 2, "", "Error: \x1b[31mred.\n")),
        ("raw escape", Done([], 0, "\x07", "")),
        ("sentences", Done([], 2, "", "")),
        ("sentences", Done([], 0, "", SENTENCE)),
        ("sentences", Done([], 2, "", SENTENCE * 2)),
        ("length", Done([], 2, "", f"Error: {'x' * 1000}\n")),
        ("time", Done([], 2, "", SENTENCE, seconds=11)),
        ("memory", Done([], 2, "", SENTENCE, memory=1 << 30)),
    ],
)
def test_the_oracle_sees_what_is_broken(world: World, broken: str, done: Done) -> None:
    with pytest.raises(oracle.Broken, match=broken):
        oracle.check(done, world.work, {}, {})
    oracle.check(Done([], 2, "", SENTENCE), world.work, {}, {})


def test_a_large_file_may_take_its_time(world: World) -> None:
    copied = Done([], 0, "", "", seconds=14)
    oracle.check(copied, world.work, {}, {}, {"sd1/vae": Hollow(1 << 33)})
    with pytest.raises(oracle.Broken, match="time"):
        oracle.check(copied, world.work, {}, {}, {"sd1/vae": Hollow(1 << 20)})


@pytest.mark.parametrize(
    ("broken", "name", "content", "status"),
    [
        ("left behind", "out/.trce-0123456789abcdef/mark", b"", 0),
        ("half an output", "out/x", b"", 2),
        ("not whole", "out/x.json", b'{"a": ', 0),
        ("not whole", "out/x.png", b"\x89PNG", 0),
        ("not whole", "out/x.safetensors", b"\x08\0\0\0\0\0\0\0{", 0),
    ],
)
def test_the_oracle_sees_what_is_left(
    world: World, broken: str, name: str, content: bytes, status: int
) -> None:
    with world.with_files({name: content}), pytest.raises(oracle.Broken, match=broken):
        oracle.check(Done(["map"], status, "", SENTENCE if status else ""), world.work, {}, {})


def test_what_is_taken_up_again_may_stay_but_for_a_plan(world: World) -> None:
    with world.with_files({"out/x/run.json": b"{}"}):
        oracle.check(Done(["run", "recipe.toml"], 2, "", SENTENCE), world.work, {}, {})
        with pytest.raises(oracle.Broken, match="half an output"):
            oracle.check(Done(["run", "recipe.toml", "--dry-run"], 2, "", SENTENCE), world.work, {}, {})


def test_the_oracle_sees_what_happened_outside(world: World) -> None:
    before = world.outside()
    notes = world.place / "neighbours/notes.txt"
    kept = notes.read_text()
    notes.write_text("touched")
    with pytest.raises(oracle.Broken, match=r"outside: .*notes\.txt"):
        oracle.check(Done([], 0, "", ""), world.work, before, world.outside())
    notes.write_text(kept)
