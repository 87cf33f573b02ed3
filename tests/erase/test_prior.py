"""The prior: which captions are chosen for which checkpoint."""

from pathlib import Path

import pytest

from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.erase import prior
from trce_cli.errors import BadInput
from trce_cli.prompts import captions
from trce_cli.prompts.home import EMBEDDED, Home


def test_prior_of_a_file_keeps_duplicates_and_drops_canaries_that_it_holds(
    tiny_sd1: Path, tmp_path: Path
) -> None:
    canary = captions.canary_captions()[7]
    file = tmp_path / "captions.csv"
    file.write_text(
        f'id,caption\n1,"a dog,\non a chair"\n2,a dog\n3,a dog\n4,{canary.upper()!r}\n'.replace("'", '"')
    )
    chosen = prior.choose_prior(open_checkpoint(str(tiny_sd1)), file)
    assert chosen.source == file.name  # no folder of this machine
    assert chosen.captions == ("a dog,\non a chair", "a dog", "a dog", canary.upper())
    assert len(chosen.canaries) == 199
    assert canary not in chosen.canaries


def test_prior_without_a_file_is_the_built_in_one(tiny_sd1: Path) -> None:
    chosen = prior.choose_prior(open_checkpoint(str(tiny_sd1)))
    assert chosen.source == "built-in"
    assert len(chosen.captions) >= 1000
    assert len(chosen.canaries) == 200


@pytest.mark.parametrize("home", EMBEDDED, ids=lambda home: home.name)
def test_an_embedded_checkpoint_has_its_own_prior(home: Home) -> None:
    for name in (home.name, str(home.folder)):  # by its name, and by its text encoder
        chosen = prior.choose_prior(open_checkpoint(name))
        assert chosen.source == home.name
        assert chosen.captions == tuple(home.captions())
        assert not set(chosen.captions) & set(chosen.canaries)


def test_a_prior_that_holds_every_canary_is_refused(tiny_sd1: Path, tmp_path: Path) -> None:
    file = tmp_path / "all.txt"
    file.write_text("\n".join(captions.canary_captions()))
    with pytest.raises(BadInput, match=r"all\.txt"):
        prior.choose_prior(open_checkpoint(str(tiny_sd1)), file)
