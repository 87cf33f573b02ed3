"""Fixture: a world of whole inputs, in which every case puts something else and then puts it back."""

from collections.abc import Iterator

import pytest

from fuzz.disturb import Bench
from fuzz.sandbox import Sandbox
from fuzz.world import World


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("fuzz")
    sandbox = Sandbox(folder / "home")
    yield World.build(folder / "place", sandbox)
    sandbox.close()


@pytest.fixture(scope="session")
def bench(world: World) -> Bench:
    return Bench(world)
