import pytest

from trce_cli.prompts.pairs import PromptPair, prompt_pairs, with_compounds
from trce_cli.prompts.presets import Concept, Preset, load_preset
from trce_cli.prompts.templates import TEMPLATES

SWORD = Concept(unsafe="a sword", safe="a walking stick")
BOMB = Concept(unsafe="a bomb", safe="a football")


def preset(*concepts: Concept, templates: tuple[str, ...] = ("{}", "a photo of {}")) -> Preset:
    return Preset(name="p", description="d", kind="object", templates=templates, concepts=concepts)


def test_every_concept_stands_in_every_template_in_order():
    assert prompt_pairs([preset(SWORD, BOMB)]) == [
        PromptPair("a sword", "a walking stick", "a sword"),
        PromptPair("a photo of a sword", "a photo of a walking stick", "a sword"),
        PromptPair("a bomb", "a football", "a bomb"),
        PromptPair("a photo of a bomb", "a photo of a football", "a bomb"),
    ]


def test_several_presets_are_joined_in_the_order_given_without_duplicates():
    pairs = prompt_pairs([preset(SWORD), preset(BOMB, SWORD)])
    assert [pair.keyword for pair in pairs] == ["a sword", "a sword", "a bomb", "a bomb"]


def test_two_safe_phrases_for_one_unsafe_phrase_are_two_pairs():
    other = Concept(unsafe="a sword", safe="a flute")
    assert len(prompt_pairs([preset(SWORD), preset(other)])) == 4


def test_a_phrase_with_braces_is_taken_as_it_stands():
    odd = Concept(unsafe="a {} sword", safe="a {0} stick")
    (pair,) = prompt_pairs([preset(odd, templates=("see {}",))])
    assert pair == PromptPair("see a {} sword", "see a {0} stick", "a {} sword")


def test_compounds_name_one_to_three_concepts_before_their_own():
    pairs = prompt_pairs([preset(SWORD, BOMB, Concept(unsafe="Two guns", safe="the tea"))])
    bare = {"sword": "walking stick", "bomb": "football", "Two guns": "tea"}
    found = with_compounds(pairs, 40)
    assert found[: len(pairs)] == pairs
    assert len(found) == 41 * len(pairs)
    counts = set()
    for pair, compound in zip(pairs * 40, found[len(pairs) :], strict=True):
        head, tail = pair.unsafe.split(pair.keyword)
        others = compound.keyword.removesuffix(f" {pair.keyword}")
        assert compound.unsafe == f"{head}{compound.keyword}{tail}"
        safe = others
        for unsafe, its in bare.items():
            safe = safe.replace(unsafe, its)
        assert compound.safe == f"{head}{safe} {pair.replacement}{tail}"
        named = [unsafe for unsafe in bare if unsafe in others]
        assert len(others) == sum(map(len, named)) + len(named) - 1  # each once, and nothing else
        counts.add(len(named))
    assert counts == {1, 2, 3}


def test_compounds_are_those_of_a_concept_in_all_templates_and_the_same_every_time():
    pairs = prompt_pairs([preset(SWORD, BOMB)])
    found = with_compounds(pairs, 6)
    keywords = [pair.keyword for pair in found]
    assert keywords[::2] == keywords[1::2]
    assert found == with_compounds(pairs, 6) != with_compounds(pairs, 6, seed=1)
    assert found[: 3 * len(pairs)] == with_compounds(pairs, 2)


def test_a_lone_concept_stands_before_itself():
    (_, compound) = with_compounds(prompt_pairs([preset(SWORD, templates=("see {}",))]), 1)
    assert compound == PromptPair("see sword a sword", "see walking stick a walking stick", "sword a sword")


def test_the_keyword_stands_in_every_unsafe_prompt_of_the_shipped_presets():
    pairs = prompt_pairs([load_preset("unsafe"), load_preset("artist-van-gogh")])
    assert len(pairs) > 2000
    assert all(pair.keyword in pair.unsafe and pair.unsafe != pair.safe for pair in pairs)


@pytest.mark.parametrize("kind", ["object", "person", "scene", "style"])
def test_each_kind_has_fifteen_templates_with_one_place_for_the_phrase(kind):
    templates = TEMPLATES[kind]
    assert len(set(templates)) == len(templates) >= 15
    assert all(template.count("{}") == 1 for template in templates)
