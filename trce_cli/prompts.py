"""Concepts x templates -> prompt pairs: what stage 1 maps onto what."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from trce_cli.presets import Preset

# The default templates of each kind, in the grammar of a caption: the phrase brings its own article.
TEMPLATES: Final[Mapping[str, tuple[str, ...]]] = {
    "object": (
        "{}",
        "a photo of {}",
        "a picture of {}",
        "a close-up of {}",
        "a drawing of {}",
        "a painting of {}",
        "a 3d render of {}",
        "a studio shot of {} on a plain background",
        "{} on a wooden table",
        "{} lying on the floor",
        "{} on a shelf",
        "{} seen from above",
        "a person holding {}",
        "a man with {}",
        "a woman next to {}",
        "an old photograph showing {}",
        "a detailed illustration of {}",
        "a poster with {}",
    ),
    "person": (
        "{}",
        "a photo of {}",
        "a portrait of {}",
        "a picture of {}",
        "a full-length photo of {}",
        "a painting of {}",
        "a pencil sketch of {}",
        "a cinematic still of {}",
        "{} in a living room",
        "{} on the street",
        "{} by a window",
        "{} in the park",
        "{} looking at the camera",
        "a film poster with {}",
        "a black and white photograph of {}",
        "a digital illustration of {}",
        "a comic panel showing {}",
        "a magazine cover with {}",
    ),
    "scene": (
        "{}",
        "a photo of {}",
        "a picture showing {}",
        "a scene of {}",
        "a painting of {}",
        "an illustration of {}",
        "a drawing that shows {}",
        "a film still with {}",
        "a news photograph of {}",
        "a comic panel of {}",
        "a wide shot of {}",
        "a close view of {}",
        "{} at night",
        "{} in daylight",
        "{} in a city",
        "{} in a house",
        "a realistic depiction of {}",
        "concept art of {}",
    ),
    "style": (
        "{}",
        "a painting in {}",
        "a landscape in {}",
        "a portrait in {}",
        "a still life in {}",
        "a city street in {}",
        "a garden in {}",
        "a house in {}",
        "a cat in {}",
        "a vase of flowers in {}",
        "a field under the sky in {}",
        "a night scene in {}",
        "a boat on the water in {}",
        "a room in {}",
        "a drawing in {}",
        "an artwork in {}",
        "a group of people in {}",
        "a tree on a hill in {}",
    ),
}


@dataclass(frozen=True, slots=True)
class PromptPair:
    """An unsafe prompt, the safe prompt it is mapped to, and the unsafe phrase as it stands in the former."""

    unsafe: str
    safe: str
    keyword: str


def prompt_pairs(presets: Iterable["Preset"]) -> list[PromptPair]:
    """Every concept in every template of its preset, included presets too: deduplicated, in stable order.

    Order: presets as given; in each its own concepts, then its includes; a concept's templates together.
    """
    pairs = (
        PromptPair(
            template.replace("{}", concept.unsafe), template.replace("{}", concept.safe), concept.unsafe
        )
        for preset in presets
        for part in preset.walk()
        for concept in part.concepts
        for template in part.templates
    )
    return list(dict.fromkeys(pairs))
