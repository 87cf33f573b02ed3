"""Bystanders: what no shipped caption names, and the presets in question do not."""

from pathlib import Path

import pytest

from trce_cli.emoji.world import HELD_OUT, SUBSTANCES, concepts
from trce_cli.prompts import captions
from trce_cli.prompts.bystanders import bystanders, content_words, words
from trce_cli.prompts.home import EMBEDDED, REAL_WORLD
from trce_cli.prompts.pairs import prompt_pairs
from trce_cli.prompts.presets import load_preset, load_presets, preset_names
from trce_cli.prompts.suites import built_in_suite, parts

EMOJI = EMBEDDED[0]


def test_no_word_of_theirs_is_in_a_shipped_caption() -> None:
    every = captions.prior_captions() + captions.canary_captions() + captions.tuning_captions()
    said = {word for caption in every for word in content_words(caption)}
    assert len(words()) > 300
    assert len({each.phrase for each in words()}) == len(words())
    assert not [each for each in words() if content_words(each.phrase) & said]


@pytest.mark.parametrize("name", ["weapons", "drugs", "violence", "artist-van-gogh"])
def test_presets_name_none_of_them(name: str) -> None:
    presets = load_presets([name])
    named = {
        word
        for concept in (each for part in parts(presets) for each in part.concepts)
        for word in content_words(f"{concept.unsafe} {concept.safe}")
    }
    for split in ("reporting", "tuning"):
        chosen = bystanders(presets, split)
        assert len(chosen) > 80
        assert {each.kind for each in chosen} == {"object", "person", "scene", "style"}
        assert not [each for each in chosen if content_words(each.phrase) & named]


def test_the_other_presets_are_among_them() -> None:
    asked = {each.phrase for each in bystanders(load_presets(["weapons"]), "reporting")}
    drugs = {concept.unsafe for concept in load_preset("drugs").concepts}
    assert len(asked & drugs) > len(drugs) / 2
    scenes = {c.unsafe for each in ("violence", "sexual", "hate") for c in load_preset(each).concepts}
    assert not asked & scenes
    # Nobody who erases a style has to look at pictures that reports would blur.
    assert not {each.phrase for each in bystanders(load_presets(["artist-van-gogh"]), "reporting")} & drugs


def test_of_the_embedded_world_they_are_the_other_family_and_classes_that_nothing_names() -> None:
    suite = built_in_suite("bystanders", load_presets(["emoji-weapons"]), EMOJI, 220, 0)
    assert suite is not None
    assert suite.subjects is not None
    assert set(suite.subjects) == {*SUBSTANCES, *HELD_OUT}
    assert [set(each) for each in suite.objects or ()] == [{each} for each in suite.subjects]
    assert built_in_suite("bystanders", load_presets(["emoji-weapons", "emoji-substances"]), EMOJI, 9, 0)


def test_a_preset_that_names_every_bystander_of_a_world_leaves_none_to_ask(tmp_path: Path) -> None:
    path = tmp_path / "all.toml"
    names = ("penguin", "burger", "cactus", "car")
    listed = "".join(f'[[concepts]]\nunsafe = "a {name}"\nsafe = "an owl"\n' for name in names)
    path.write_text(f'name = "all"\ndescription = "d"\nkind = "object"\n{listed}')
    presets = load_presets(["emoji-weapons", "emoji-substances", path])
    assert built_in_suite("bystanders", presets, EMOJI, 9, 0) is None


@pytest.mark.parametrize("name", preset_names())
def test_their_canaries_are_apart_from_every_suite(name: str) -> None:
    home = EMOJI if name.startswith("emoji") else REAL_WORLD
    canaries = set(home.bystander_canaries())  # what guards measure on
    assert len(canaries) >= 100
    assert not canaries & {*home.captions(), *home.canaries()}
    presets = load_presets([name])
    for split in ("reporting", "tuning"):
        suite = built_in_suite("bystanders", presets, home, 600, 0, split)
        assert suite is not None
        asked = {prompt.text for prompt in suite.prompts}
        assert not canaries & asked
        if home is REAL_WORLD and split == "reporting":
            assert not [
                each for each in suite.subjects or () for caption in canaries if f" {each} " in f" {caption} "
            ]


@pytest.mark.parametrize("name", ["emoji-weapons", "emoji-substances"])
def test_no_caption_and_no_pair_names_a_held_out_class(name: str) -> None:
    phrases = [phrase for each in HELD_OUT for phrase in concepts()[each].names + concepts()[each].implied]
    texts = [*EMOJI.captions(), *EMOJI.canaries()]
    texts += [text for pair in prompt_pairs(load_presets([name])) for text in (pair.unsafe, pair.safe)]
    assert not [text for text in texts for phrase in phrases if f" {phrase} " in f" {text} "]
