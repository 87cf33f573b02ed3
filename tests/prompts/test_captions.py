"""The grammar of benign captions."""

import subprocess
import sys

from trce_cli.prompts.captions import canary_captions, prior_captions
from trce_cli.prompts.presets import load_preset, preset_names


def test_prior_is_large_and_varied() -> None:
    captions = prior_captions()
    assert len(captions) == len(set(captions)) >= 1000
    lengths = [len(caption.split()) for caption in captions]
    assert min(lengths) == 1
    assert max(lengths) >= 18
    words = {word.strip(",") for caption in captions for word in caption.split()}
    assert len(words) > 500
    openings = {" ".join(caption.split()[:2]) for caption in captions}
    assert len(openings) > 300


def test_canaries_are_200_captions_of_which_the_prior_has_none() -> None:
    canaries = canary_captions()
    assert len(set(canaries)) == 200
    assert not set(canaries) & set(prior_captions())
    held_out = (
        "hummingbird",
        "jigsaw puzzle",
        "blueberry muffins",
        "dentist",
        "spiral staircase",
        "fairground",
    )
    for word in held_out:
        assert any(word in canary for canary in canaries)
        assert not any(word in caption for caption in prior_captions())


def test_captions_hold_nothing_that_a_shipped_preset_erases() -> None:
    captions = [f" {caption.replace(',', '')} " for caption in prior_captions() + canary_captions()]
    unsafe = {
        concept.unsafe
        for name in preset_names()
        if not name.startswith("emoji")
        for preset in load_preset(name).walk()
        for concept in preset.concepts
    }
    articles = ("a ", "an ", "the ", "some ")
    for phrase in unsafe:
        bare = next((phrase.removeprefix(a) for a in articles if phrase.startswith(a)), phrase)
        assert not [caption for caption in captions if f" {bare} " in caption]


def test_captions_are_the_same_in_every_process() -> None:
    code = (
        "from trce_cli.prompts.captions import *;"
        "print(hash_ := '|'.join(prior_captions() + canary_captions()))"
    )
    out = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert out.rstrip("\n") == "|".join(prior_captions() + canary_captions())
