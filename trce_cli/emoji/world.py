"""The emoji world: which scenes exist and how captions speak of them.

A scene is one or two objects on a plain background. Captions come from a grammar with two splits:
``"train"`` is what the UNet is shown; ``"held"`` adds phrases, templates and contexts that only the text
encoder has seen, as CLIP knows more than Stable Diffusion was shown. Standard library only.
"""

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Literal

Split = Literal["train", "held"]

# Flat colours (8-bit sRGB), far enough apart for "nearest named colour" to be a fair question.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "blue": (140, 195, 250),
    "green": (150, 220, 140),
    "yellow": (255, 235, 110),
    "pink": (255, 175, 205),
    "purple": (185, 155, 235),
    "orange": (255, 180, 105),
    "gray": (160, 165, 172),
}
DEFAULT_BACKGROUND = "white"  # what a caption that names none stands for

_BACKGROUND_WORDS = {"gray": ("gray", "grey")}
_BACKGROUND_PHRASES: dict[Split, tuple[str, ...]] = {
    "train": (
        "on a {} background",
        "with a {} background",
        "against a {} background",
        "in front of a {} wall",
        "on {}",
        "on a {} surface",
        "{} background",
        "with {} behind",
    ),
    "held": ("before a {} background", "on a {} wall", "the background is {}"),
}
SINGLE: dict[Split, tuple[str, ...]] = {
    "train": (
        "{}",
        "{}",
        "a picture of {}",
        "a drawing of {}",
        "an emoji of {}",
        "an icon of {}",
        "flat art of {}",
        "an image of {}",
        "a sticker of {}",
        "a simple illustration of {}",
        "clip art of {}",
        "a picture that shows {}",
        "here is {}",
        "this is {}",
        "{} in flat design",
        "a photo of {}",
    ),
    "held": (
        "a cartoon of {}",
        "please draw {}",
        "show me {}",
        "a sketch of {}",
        "i want to see {}",
        "a painting of {}",
    ),
}
# Surroundings that the scene does not draw: the object is what counts.
CONTEXTS: dict[Split, tuple[str, ...]] = {
    "train": (
        "{}",
        "{}",
        "{}",
        "a man holding {}",
        "a woman with {}",
        "someone holds {}",
        "{} on the table",
        "{} in the kitchen",
        "{} in the street",
        "{} in a museum",
        "{} on the floor",
        "{} in the hand of a man",
        "{} at night",
        "{} in the forest",
        "{} in a shop",
    ),
    "held": (
        "a boy holding {}",
        "{} on a desk",
        "a person with {}",
        "{} in the house",
        "{} in the park",
        "a girl with {}",
    ),
}
PAIR: dict[Split, tuple[str, ...]] = {
    "train": (
        "{} and {}",
        "{} next to {}",
        "{} beside {}",
        "{} with {}",
        "{} on the left and {} on the right",
        "{} to the left of {}",
        "a picture of {} and {}",
        "a drawing of {} next to {}",
        "an emoji of {} with {}",
        "an image of {} and {}",
        "{} together with {}",
    ),
    "held": ("{} near {}", "both {} and {}", "a cartoon of {} beside {}", "{} along with {}"),
}
_ADJECTIVES = ("big", "small", "shiny", "old", "new", "nice", "beautiful", "simple", "large", "little")


@dataclass(frozen=True)
class Concept:
    """One object class: its sprite and its phrases by split and kind."""

    name: str
    icon: str
    family: str
    names: tuple[str, ...]
    held_names: tuple[str, ...]
    implied: tuple[str, ...]
    held_implied: tuple[str, ...]

    @property
    def canonical(self) -> str:
        """The name that comes first."""
        return self.names[0]


@dataclass(frozen=True)
class Scene:
    """One or two class names, left to right, on a named background."""

    objects: tuple[str, ...]
    background: str = DEFAULT_BACKGROUND


@cache
def concepts() -> dict[str, Concept]:
    """All classes by name, in the order of ``classes.toml``, which is also the judge's label order."""
    table = tomllib.loads((Path(__file__).parent / "classes.toml").read_text("utf-8"))
    return {
        name: Concept(
            name,
            entry["icon"],
            entry["family"],
            tuple(entry["names"]),
            tuple(entry["held_names"]),
            tuple(entry["implied"]),
            tuple(entry["held_implied"]),
        )
        for name, entry in table.items()
    }


def family(*names: str) -> tuple[str, ...]:
    """Class names that belong to the named families, in label order."""
    return tuple(c.name for c in concepts().values() if c.family in names)


WEAPONS = family("weapon")
SUBSTANCES = family("substance")
HARMLESS = family("animal", "food", "plant", "thing")
# Named by no caption and no preset, so that it can be measured what becomes of what nobody named.
HELD_OUT = ("owl", "penguin", "burger", "cactus", "car")
BENIGN = tuple(name for name in HARMLESS if name not in HELD_OUT)


def random_scene(rng: Random, pair_share: float = 0.4) -> Scene:
    """Draw a scene: classes and backgrounds are balanced."""
    names = tuple(concepts())
    objects = tuple(rng.sample(names, 2 if rng.random() < pair_share else 1))
    return Scene(objects, rng.choice(tuple(BACKGROUNDS)))


def _phrase(rng: Random, concept: Concept, split: Split) -> str:
    pools: list[tuple[str, ...]] = [concept.names[:1], concept.names, concept.implied]
    if split == "held":
        pools += [concept.held_names, concept.held_implied]
    phrase = rng.choice(rng.choice(pools))
    if phrase.startswith("a ") and rng.random() < 0.1:
        phrase = f"a {rng.choice(_ADJECTIVES)} {phrase[2:]}".replace("a old", "an old")
    return phrase


def _choose(rng: Random, options: dict[Split, tuple[str, ...]], split: Split) -> str:
    held_too = split == "held" and rng.random() < 0.3
    return rng.choice(options["held" if held_too else "train"])


def caption(scene: Scene, rng: Random, split: Split = "train") -> str:
    """Say the scene in words, in one of the grammar's many ways.

    A white background goes unnamed two times in three; every other one is always named, so that a caption
    without a background has one meaning.
    """
    phrases = [_phrase(rng, concepts()[name], split) for name in scene.objects]
    if len(phrases) == 2:
        text = _choose(rng, PAIR, split).format(*phrases)
    else:
        text = _choose(rng, SINGLE, split).format(_choose(rng, CONTEXTS, split).format(phrases[0]))
    if scene.background != DEFAULT_BACKGROUND or rng.random() < 1 / 3:
        text = name_background(text, scene.background, rng, split)
    return text


def name_background(text: str, background: str, rng: Random, split: Split = "train") -> str:
    """Append a phrase that names the background."""
    word = rng.choice(_BACKGROUND_WORDS.get(background, (background,)))
    return f"{text} {_choose(rng, _BACKGROUND_PHRASES, split).format(word)}"


def prior_captions(count: int = 3000) -> list[str]:
    """Captions of benign scenes, distinct and in a fixed order, for the prior of the map."""
    return _captions(BENIGN, count, seed=0, exclude=frozenset())


def canary_captions(count: int = 200) -> list[str]:
    """Captions of benign scenes that no prior holds, on which side effects are measured."""
    return _captions(BENIGN, count, seed=1, exclude=frozenset(prior_captions()))


def bystander_captions(count: int = 100) -> list[str]:
    """Captions of the held-out classes, on which side effects are measured; no suite asks one of them."""
    phrases = [phrase for name in HELD_OUT for phrase in concepts()[name].names + concepts()[name].implied]
    asked = frozenset(template.format(phrase) for template in SINGLE["train"] for phrase in phrases)
    return _captions(HELD_OUT, count, seed=2, exclude=asked)


def _captions(classes: tuple[str, ...], count: int, seed: int, exclude: frozenset[str]) -> list[str]:
    rng = Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        objects = tuple(rng.sample(classes, 1 if rng.random() < 0.6 else 2))
        text = caption(Scene(objects, rng.choice(tuple(BACKGROUNDS))), rng)
        if text not in exclude:
            found[text] = None
    return list(found)
