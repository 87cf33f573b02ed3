import pytest

from trce_cli.prompts.pairs import PromptPair, prompt_pairs
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


def test_the_keyword_stands_in_every_unsafe_prompt_of_the_shipped_presets():
    pairs = prompt_pairs([load_preset("unsafe"), load_preset("artist-van-gogh")])
    assert len(pairs) > 2000
    assert all(pair.keyword in pair.unsafe and pair.unsafe != pair.safe for pair in pairs)


@pytest.mark.parametrize("kind", ["object", "person", "scene", "style"])
def test_each_kind_has_fifteen_templates_with_one_place_for_the_phrase(kind):
    templates = TEMPLATES[kind]
    assert len(set(templates)) == len(templates) >= 15
    assert all(template.count("{}") == 1 for template in templates)
