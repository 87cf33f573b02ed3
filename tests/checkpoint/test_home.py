"""Homes: which checkpoint brings what along."""

from pathlib import Path

import pytest

from trce_cli.checkpoint import home as module
from trce_cli.checkpoint.home import home_of
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.emoji.home import EmojiHome
from trce_cli.evaluate.attacks.registry import ATTACKS, choose_budgets
from trce_cli.prompts.home import EMBEDDED, REAL_WORLD, Clip, Home


@pytest.mark.parametrize("home", EMBEDDED, ids=lambda home: home.name)
def test_an_embedded_checkpoint_is_at_home_by_its_name(home: Home) -> None:
    assert home_of(open_checkpoint(home.name)) is home


@pytest.mark.parametrize("home", EMBEDDED, ids=lambda home: home.name)
def test_a_copy_is_at_home_by_its_text_encoder(home: Home) -> None:
    assert home.folder is not None
    assert home_of(open_checkpoint(str(home.folder))) is home


def test_every_other_checkpoint_is_of_the_real_world(tiny_sd1: Path) -> None:
    assert home_of(open_checkpoint(str(tiny_sd1))) is REAL_WORLD


def test_another_embedded_checkpoint_is_one_more_home(
    tiny_sd1: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = EmojiHome("tiny", tiny_sd1, steps=1, guidance=1.0)
    monkeypatch.setattr(module, "EMBEDDED", (*EMBEDDED, tiny))
    monkeypatch.setattr("trce_cli.checkpoint.open.EMBEDDED", (*EMBEDDED, tiny))
    assert home_of(open_checkpoint("tiny")) is tiny
    assert home_of(open_checkpoint(str(tiny_sd1))) is tiny
    assert home_of(open_checkpoint("emoji")) is EMBEDDED[0]


@pytest.mark.parametrize("home", EMBEDDED, ids=lambda home: home.name)
def test_an_embedded_checkpoint_brings_all_that_measuring_needs(home: Home) -> None:
    assert not set(home.captions()) & set(home.canaries())
    judge = home.judge()
    assert judge is not None
    assert judge.weights.is_file()
    assert isinstance(home.clip(), Clip)
    assert set(choose_budgets((), home)) == set(ATTACKS)  # its budgets are ones that attacks know
    assert set(home.budgets) <= set(ATTACKS)
