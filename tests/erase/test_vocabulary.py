"""Words as a prior: their moments against a plain sum, and which words mean what is erased."""

import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.erase import vocabulary
from trce_cli.erase.map import Statistics
from trce_cli.erase.prior import Prior
from trce_cli.erase.settings import MapSettings
from trce_cli.erase.vocabulary import HELD_OUT, TEMPLATES, Vocabulary, WordPrompts, kept_words
from trce_cli.families.base import Text
from trce_cli.prompts.pairs import PromptPair, prompt_pairs
from trce_cli.prompts.presets import load_preset

PAIRS = [
    PromptPair(f"a photo of {unsafe}", f"a photo of {safe}", unsafe)
    for unsafe, safe in (("a pistol", "two red apples"), ("the knife", "a tulip"))
]
EOT = {"FIRST_EOT": 1.0}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRCE_CACHE", str(tmp_path / "cache"))


def text_of(folder: Path | str) -> Text:
    checkpoint = open_checkpoint(str(folder))
    return checkpoint.family.text(checkpoint, "cpu", torch.float32)


def plain_states(folder: Path) -> Callable[[str], Tensor]:
    """What a plain text encoder gives for a prompt, up to its EoT, (tokens, width)."""
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    model = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True).eval()

    @cache
    def states(prompt: str) -> Tensor:
        with torch.no_grad():
            return model(tokenizer(prompt, return_tensors="pt").input_ids)[0][0].double()

    return states


def plain_exempt(states: Callable[[str], Tensor], words: list[str], pairs: list[PromptPair]) -> set[str]:
    """Cosine by cosine."""

    def at(phrase: str, template: str) -> Tensor:
        return states(template.replace("{}", phrase))[-1]

    means = {each: sum(at(word, each) for word in words) / len(words) for each in TEMPLATES}

    def nearness(one: str, other: str) -> float:
        cosines = [
            float(torch.cosine_similarity(at(one, t) - means[t], at(other, t) - means[t], dim=0))
            for t in TEMPLATES
        ]
        return sum(cosines) / len(cosines)

    unsafe = [re.sub("^(a|an|the) ", "", pair.keyword) for pair in pairs]
    safe = [re.sub("^(a|an|the) ", "", pair.replacement) for pair in pairs]
    limit = max(nearness(a, b) for a in safe for b in unsafe)
    return {word for word in words if max(nearness(word, phrase) for phrase in unsafe) > limit + 1e-4}


def test_moments_are_those_of_all_words_but_the_exempt_and_the_held_out(tiny_sd1: Path) -> None:
    text, states = text_of(tiny_sd1), plain_states(tiny_sd1)
    found = Vocabulary.of(text, PAIRS, EOT, 10_000)
    assert found is not None
    words = list(text.words(10_000))
    exempt = plain_exempt(states, words, PAIRS)
    assert set(found.exempt) == exempt
    assert 0 < len(exempt) < len(words) / 2
    assert found.held_out
    assert not {*found.held_out} & exempt

    def moment(some: set[str]) -> tuple[Tensor, int]:
        every = [states(template.replace("{}", word)) for word in sorted(some) for template in TEMPLATES]
        return sum(each.mT @ each for each in every) / len(every), len(every)

    for some, moments in (
        ({*words} - exempt - {*found.held_out}, found.P),
        ({*found.held_out}, found.canaries),
    ):
        expected, count = moment(some)
        torch.testing.assert_close(moments["context"], expected, rtol=1e-5, atol=1e-5)
        assert moments is not found.P or count == found.prompts


def test_the_statistics_of_words_are_kept_whatever_is_erased(
    tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, done = text_of(tiny_sdxl), []
    first = Vocabulary.of(text, PAIRS, EOT, 10_000)
    encode = text._encode
    monkeypatch.setattr(
        text,
        "_encode",
        lambda some, wanted: done.append(sum(len(pack.places) for pack in some)) or encode(some, wanted),
    )
    again = Vocabulary.of(text, PAIRS, EOT, 10_000)
    other = Vocabulary.of(text, PAIRS[:1], EOT, 10_000)
    assert first is not None
    assert again is not None
    assert other is not None
    assert sum(done) < len(text.words(10_000)) * len(TEMPLATES)
    for stream in ("context", "pooled"):
        assert torch.equal(first.P[stream], again.P[stream])
        assert not torch.equal(first.P[stream], other.P[stream])


def test_words_stand_in_as_many_templates_as_prompts_are_asked() -> None:
    asked = WordPrompts.of([f"w{n}" for n in range(50)], 150)
    assert len(asked.prompts) == len(set(asked.prompts)) == 150
    assert asked.prompts[:4] == ["w0", "a picture of w0", "a photo of w0", "a w1 on the table"]
    assert asked.with_words({"w1", "w2"}) == [
        *("a w1 on the table", "w1 and a cat", "a man with w1"),
        *("w2", "a picture of w2", "a photo of w2"),
    ]
    assert len(WordPrompts.of(["a", "b"], 1000).prompts) == 2 * len(TEMPLATES)


def test_a_vocabulary_of_next_to_no_words_is_no_prior(tiny_sd1: Path) -> None:
    text = text_of(tiny_sd1)
    assert Vocabulary.of(text, PAIRS, EOT, HELD_OUT - 1) is None


def test_words_have_the_share_they_are_given(tiny_sd1: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_sd1))
    prior = Prior("test", ("a dog", "a cat on a chair"), ("a hat",))
    statistics, without = (
        Statistics.of(checkpoint, PAIRS, prior, [MapSettings(word_share=share, word_prompts=500)])
        for share in (0.5, 0.0)
    )
    (reading,) = statistics.readings
    assert reading.words is not None
    for share in (0.0, 0.25, 1.0):
        settings = MapSettings(word_share=share, preserve=0.5, ridge=0.0)
        found = statistics.solve(settings)
        P = (1 - share) * reading.P["context"] + share * reading.words.P["context"]
        fitter = reading.guards["context"].fitter()
        expected = fitter.solve(P, 0.5, cut_off=found.figures["cut_off"]).map
        torch.testing.assert_close(found.streams["context"].change, expected.change)
        assert ("exempt_words" in found.figures) == (share > 0)
        plain = without.solve(settings)
        same = torch.equal(plain.streams["context"].change, found.streams["context"].change)
        assert same == (share == 0)
        assert "word_change" not in plain.figures


def test_what_held_out_words_suffer_is_told(tiny_sd1: Path) -> None:
    checkpoint, states = open_checkpoint(str(tiny_sd1)), plain_states(tiny_sd1)
    prior = Prior("test", ("a dog", "a cat on a chair"), ("a hat",))
    statistics = Statistics.of(checkpoint, PAIRS, prior, [MapSettings(word_prompts=10_000)])
    words = statistics.readings[0].words
    solution = statistics.solve(MapSettings())
    assert words is not None
    each = [states(t.replace("{}", word)) for word in words.held_out for t in TEMPLATES]
    every, linear = torch.cat(each), solution.streams["context"]
    changes = []
    for key in checkpoint.door_weights()["context"]:
        W = checkpoint.read("denoiser", key).double()
        if "to_v" in key:
            changes.append(float((linear.moves(every) @ W.mT).norm() / (every @ W.mT).norm()))
    assert solution.figures["word_change"]["values"]["max"] == pytest.approx(max(changes), rel=1e-3)


def test_compounds_exempt_no_other_words(tiny_sd1: Path) -> None:
    checkpoint, prior = open_checkpoint(str(tiny_sd1)), Prior("test", ("a dog",), ("a hat",))
    exempt = []
    for compounds in (0, 5):
        asked = MapSettings(word_prompts=1000, compounds=compounds)
        figures = Statistics.of(checkpoint, PAIRS, prior, [asked]).solve(asked).figures
        exempt.append(figures["exempt_words"])
    assert exempt[0] == exempt[1]


def test_weapons_are_exempt_and_bystanders_are_not() -> None:
    pairs = prompt_pairs([load_preset("emoji-weapons")])
    found = Vocabulary.of(text_of("emoji"), pairs, EOT, 6000)
    assert found is not None
    assert {"gun", "knife", "dagger", "bomb", "axe", "revolver", "crossbow"} <= {*found.exempt}
    bystanders = {"cigarette", "beer", "wine", "syringe", "skull", "coffin", "cat", "guitar", "penguin"}
    assert not bystanders & {*found.exempt}
    assert math.isclose(len(found.exempt), 75, abs_tol=25)
    kept = kept_words(text_of("emoji"), pairs, EOT, 6000)  # stage 2 has those that are held out as well
    assert {*kept} >= bystanders | {*found.held_out}
    assert not {*kept} & {*found.exempt}


def test_a_safe_phrase_is_what_stands_in_the_keywords_place() -> None:
    assert PAIRS[0].replacement == "two red apples"
    assert PromptPair("a gun and a gun rack", "a kite and a gun rack", "a gun").replacement == "a kite"


def test_templates_hold_a_word_once() -> None:
    assert all(template.count("{}") == 1 for template in vocabulary.TEMPLATES)
