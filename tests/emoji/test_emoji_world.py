"""The emoji world's grammar and suites."""

from random import Random

import pytest

from training.quality import QUALITY, quality_suite
from trce_cli.emoji.suites import ERASURE, erasure_suite
from trce_cli.emoji.world import (
    BENIGN,
    CONTEXTS,
    HELD_OUT,
    PAIR,
    SINGLE,
    SUBSTANCES,
    WEAPONS,
    canary_captions,
    caption,
    concepts,
    prior_captions,
    random_scene,
)


def test_world_has_the_classes_it_promises() -> None:
    assert len(WEAPONS) >= 8
    assert len(SUBSTANCES) >= 6
    assert len(concepts()) == len(WEAPONS) + len(SUBSTANCES) + len(BENIGN) + len(HELD_OUT) >= 40


def test_no_phrase_stands_for_two_classes() -> None:
    phrases = [p for c in concepts().values() for p in c.names + c.held_names + c.implied + c.held_implied]
    assert len(phrases) == len(set(phrases))


def test_implied_phrases_name_no_class_of_theirs() -> None:
    for concept in concepts().values():
        heads = {name.split()[-1] for name in concept.names[:1] + concept.held_names}
        for phrase in concept.implied + concept.held_implied:
            assert not heads & set(phrase.split()), (concept.name, phrase)


def test_training_captions_hold_nothing_that_is_held_out() -> None:
    rng = Random(3)
    text = " | ".join(caption(random_scene(rng), rng) for _ in range(3000))
    for concept in concepts().values():
        for phrase in concept.held_implied:
            assert phrase not in text
    for template in SINGLE["held"]:
        assert template.format("") not in text


def test_held_captions_use_every_pool() -> None:
    rng = Random(4)
    text = " | ".join(caption(random_scene(rng), rng, "held") for _ in range(6000))
    assert all(any(p in text for p in c.held_names + c.held_implied) for c in concepts().values())
    for templates in (SINGLE, CONTEXTS):
        assert any(template.format("") in text for template in templates["held"])
    assert " near " in text
    assert any(t.startswith("{} near") for t in PAIR["held"])


def test_canaries_are_in_no_prior_and_name_nothing_unsafe() -> None:
    prior, canaries = prior_captions(), canary_captions()
    assert len(set(prior)) >= 2000
    assert len(set(canaries)) == 200
    assert not set(prior) & set(canaries)
    unsafe = [p for n in WEAPONS + SUBSTANCES for p in concepts()[n].names]
    words = {phrase.removeprefix("a ").removeprefix("an ") for phrase in unsafe}
    assert not [c for c in prior for w in words if f" {w} " in f" {c} "]


@pytest.mark.parametrize("name", QUALITY)
def test_quality_suites_are_balanced_and_seeded(name: str) -> None:
    suite = quality_suite(name, 88)
    assert suite == quality_suite(name, 88)
    assert {p.objects[0] for p in suite} == set(concepts())
    assert len({p.text for p in suite}) > 60


@pytest.mark.parametrize("name", ERASURE)
def test_erasure_suites_show_what_they_say(name: str) -> None:
    suite = erasure_suite(name, WEAPONS, 64)
    for prompt in suite:
        unsafe = set(prompt.objects) & set(WEAPONS)
        assert bool(unsafe) == (name not in ("benign", "bystanders"))
        assert len(prompt.objects) == (2 if name == "context" else 1)


def test_implied_suite_shares_no_phrase_with_training() -> None:
    seen = [phrase for name in WEAPONS for phrase in concepts()[name].names + concepts()[name].implied]
    for prompt in erasure_suite("implied", WEAPONS, 64):
        assert not any(prompt.text.endswith(phrase) for phrase in seen)
        assert not any(
            prompt.text.startswith(t.split("{")[0]) for t in SINGLE["train"] if not t.startswith("{")
        )
