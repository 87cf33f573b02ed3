"""Suites: what is asked of a checkpoint, from presets, from the embedded world, and from files."""

from pathlib import Path

import pytest

from trce_cli.emoji.world import SINGLE, WEAPONS
from trce_cli.errors import BadInput
from trce_cli.prompts import suites as suites_module
from trce_cli.prompts.captions import canary_captions, prior_captions
from trce_cli.prompts.home import EMBEDDED, REAL_WORLD, Home
from trce_cli.prompts.pairs import prompt_pairs
from trce_cli.prompts.presets import load_presets, preset_names
from trce_cli.prompts.suites import BUILT_IN, built_in_suite, choose_suites, parts, unsafe_classes

EMOJI = EMBEDDED[0]


def texts(name: str, preset: str, home: Home = REAL_WORLD, count: int = 400, seed: int = 0) -> list[str]:
    suite = built_in_suite(name, load_presets([preset]), home, count, seed)
    assert suite is not None
    assert len(suite.prompts) == count
    assert len({prompt.seed for prompt in suite.prompts}) == count
    return [prompt.text for prompt in suite.prompts]


@pytest.mark.parametrize("preset", ["unsafe", "weapons", "artist-van-gogh"])
def test_suites_from_presets_ask_what_the_edit_did_not_see(preset: str) -> None:
    presets = load_presets([preset])
    pairs = prompt_pairs(presets)
    seen = {pair.unsafe for pair in pairs}
    explicit = texts("explicit", preset)
    assert not seen & set(explicit)
    asked = {pair.keyword: sum(pair.keyword in text for text in explicit) for pair in pairs}
    assert min(asked.values()) >= 400 // len(asked)
    implied = texts("implied", preset, count=24)
    own = [part.implied for one in presets for part in one.walk()]
    assert set(implied) <= {text for texts in own for text in texts} - {
        text for texts in own for text in texts[2::3]
    }
    benign = texts("benign", preset, count=200)
    assert set(benign) == set(canary_captions())
    assert not set(benign) & set(prior_captions())
    assert texts("explicit", preset, seed=1) != explicit
    assert texts("explicit", preset) == explicit


def test_a_preset_that_uses_all_templates_leaves_none_to_ask(tmp_path: Path) -> None:
    path = tmp_path / "all.toml"
    path.write_text(
        'name = "all"\ndescription = "d"\nkind = "object"\n'
        f"templates = {list(suites_module.UNSEEN['object'])}\n"
        '[[concepts]]\nunsafe = "a sword"\nsafe = "a stick"\n'
    )
    with pytest.raises(BadInput, match="uses every template"):
        built_in_suite("explicit", load_presets([path]), REAL_WORLD, 3, 0)


def test_suites_of_the_embedded_world() -> None:
    presets = load_presets(["emoji-weapons"])
    assert unsafe_classes(EMOJI, presets) == WEAPONS
    for name in BUILT_IN:
        suite = built_in_suite(name, presets, EMOJI, 100, 0)
        assert suite is not None
        assert (suite.objects is None) == (name in ("explicit", "implied"))
        if suite.objects is not None:
            assert all(objects and not objects & set(WEAPONS) for objects in suite.objects)
    seen = {pair.unsafe for pair in prompt_pairs(presets)}
    assert not seen & set(texts("explicit", "emoji-weapons", EMOJI))
    held = [template.split("{}")[0] for template in SINGLE["held"]]
    assert all(
        any(text.startswith(start) for start in held) for text in texts("implied", "emoji-weapons", EMOJI)
    )


@pytest.mark.parametrize("preset", preset_names())
def test_no_prompt_is_both_tuned_on_and_reported(preset: str) -> None:
    presets = load_presets([preset])
    home = EMOJI if preset.startswith("emoji") else REAL_WORLD
    asked: dict[str, set[str]] = {"reporting": set(), "tuning": set()}
    for split, found in asked.items():
        for name in BUILT_IN:
            for seed in range(12):
                suite = built_in_suite(name, presets, home, 300, seed, split)
                assert (suite is None) == (name == "context" and home is REAL_WORLD)
                found |= {prompt.text.casefold() for prompt in suite.prompts} if suite else set()
    assert not asked["reporting"] & asked["tuning"]
    assert len(asked["tuning"]) > 100
    # Nor is what is reported among the prompts that an edit is made from.
    pairs = prompt_pairs(presets)
    assert not asked["reporting"] & {text.casefold() for pair in pairs for text in (pair.unsafe, pair.safe)}


def test_a_file_of_a_built_in_name_takes_its_place(tmp_path: Path) -> None:
    path = tmp_path / "coco.csv"
    path.write_text("caption\na cat\na dog\na hen\n")
    chosen = choose_suites([f"benign={path}"], load_presets(["weapons"]), REAL_WORLD, None, 3)
    assert [(suite.name, suite.role, len(suite.prompts)) for suite in chosen] == [
        ("explicit", "attack", 200),
        ("implied", "attack", 200),
        ("bystanders", "benign", 200),
        ("benign", "benign", 3),
    ]
    assert [prompt.seed for prompt in chosen[-1].prompts] == [3, 4, 5]
    only = choose_suites(["none", f"mine={path}"], load_presets(["weapons"]), REAL_WORLD, 2, 0)
    assert [(suite.name, suite.role, len(suite.prompts)) for suite in only] == [("mine", "own", 2)]
    with pytest.raises(BadInput, match="same name"):
        choose_suites([f"mine={path}"] * 2, load_presets(["weapons"]), REAL_WORLD, 2, 0)


def test_a_file_says_what_has_to_survive_of_its_prompts(tmp_path: Path) -> None:
    path, presets = tmp_path / "mine.csv", load_presets(["weapons"])
    path.write_text("prompt,kept\na cat and a pistol,a cat\na pet that barks beside a bomb,a dog\n")
    for home, objects in ((REAL_WORLD, None), (EMOJI, (frozenset({"cat"}), frozenset({"dog"})))):
        (suite,) = choose_suites(["none", f"context={path}"], presets, home, None, 0)
        assert (suite.role, suite.subjects) == ("context", ("a cat", "a dog"))
        assert suite.objects == objects
    path.write_text("prompt,kept\na cat and a pistol,a cat\na bomb in the rain,the rain\n")
    (suite,) = choose_suites(["none", f"mine={path}"], presets, EMOJI, None, 0)
    assert (suite.subjects, suite.objects) == (("a cat", "the rain"), None)  # a word that no class has
    path.write_text("prompt\na cat and a pistol\n")
    (suite,) = choose_suites(["none", f"context={path}"], presets, EMOJI, None, 0)
    assert (suite.subjects, suite.objects) == (None, None)
    path.write_text("prompt,kept\na cat and a pistol,a cat\na bomb in the rain,\n")
    with pytest.raises(BadInput, match="survive of 1 of 2 prompts"):
        choose_suites(["none", f"mine={path}"], presets, EMOJI, None, 0)


def test_two_presets_of_one_name_are_both_asked(tmp_path: Path) -> None:
    for file, unsafe in (("a", "a gun"), ("b", "a bomb")):
        head = 'name = "mine"\ndescription = "-"\nkind = "object"\n'
        (tmp_path / f"{file}.toml").write_text(
            f'{head}concepts = [{{ unsafe = "{unsafe}", safe = "a cat" }}]'
        )
    both = load_presets([tmp_path / "a.toml", tmp_path / "b.toml", tmp_path / "a.toml"])
    assert [part.concepts[0].unsafe for part in parts(both)] == ["a gun", "a bomb"]
    assert set(unsafe_classes(EMOJI, both)) == {"gun", "bomb"}
