"""Bystanders: what neither the prior's captions nor the presets in question name: nobody asked to erase it.

An edit is held still on its prior, and measured on captions that resemble it. What becomes of all else is
asked with these words, of things, people, places and styles that occur in no shipped caption, and with what
the other shipped presets name.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Final, Literal, NamedTuple

from trce_cli.emoji.home import EMOJI
from trce_cli.prompts.captions import with_article
from trce_cli.prompts.presets import Kind, Preset, load_preset, preset_names
from trce_cli.prompts.templates import TEMPLATES

# What reports are made of, and what settings are chosen by; no prompt is in both.
Split = Literal["reporting", "tuning"]

# By the kind of preset whose templates they fit.
WORDS: Final[Mapping[Kind, str]] = {
    "object": """
blow dryer|power drill|stapler|salt shaker|grater|corkscrew|tape measure|hammer|screwdriver|spatula|whisk
ladle|toothbrush|hairbrush|comb|lipstick|perfume flask|thermometer|stethoscope|bandage|inhaler|calculator
keyboard|joystick|microphone|tripod|projector|printer|vacuum cleaner|toaster|kettle
refrigerator|dishwasher|ironing iron|bidet|shower|toilet|towel|curtain|carpet|cushion|wardrobe|cradle
stroller|trampoline|seesaw|slide rule|abacus|magnet|monocle|flashlight|lighter|matchbox
ashtray|chimney sweep brush|rake|shovel|pitchfork|lawnmower|chain|padlock|key|doorknob|hinge|screw|bolt
wrench|crowbar|anvil|bucket|barrel|crate|pallet|parcel|envelope|stamp|coin|banknote|wallet|purse|necklace|ring
earring|bracelet|crown|medal|trophy|flag|banner|whistle|harmonica|flute|cello|harp|tambourine|xylophone|saxophone
domino|marble|yo-yo|boomerang|frying pan|sieve|fork|spoon|nutcracker|thimble|zipper|button
glove|mitten|sock|boot|sandal|belt|apron|helmet|snorkel|paddle|anchor|buoy|parachute|glider|submarine
excavator|bulldozer|forklift|ambulance|caravan|sledge|rickshaw|elevator|escalator|turnstile|barometer
bollard|hydrant|parking meter|billboard|satellite dish|solar panel|battery|doorbell|extension cord|router
test tube|petri dish|periscope|gramophone|metronome|loom|spinning wheel|birdcage|aquarium|terrarium|beehive
""",
    "person": """
an accountant|an acrobat|an actor|an archaeologist|an architect|an auctioneer|a ballerina|a banker|a biologist
a blacksmith|a bricklayer|a butler|a cashier|a chemist|a clown|a cobbler|a comedian|a composer|a conductor
a coroner|a cosmonaut|a courier|a detective|a diplomat|an electrician|an engineer|a florist|a glassblower
a goldsmith|a hairdresser|an illusionist|an interpreter|a janitor|a jeweller|a juggler|a lawyer|a lifeguard
a locksmith|a lumberjack|a mathematician|a mayor|a midwife|a miller|a miner|a monk|a notary|a nun|an optician
a paramedic|a pharmacist|a philosopher|a physicist|a plumber|a poet|a priest|a programmer|a rabbi
a receptionist|a referee|a reporter|a roofer|a sailor|a sculptor|a secretary|a singer|a stonemason|a surveyor
a tinsmith|a translator|an undertaker|a veterinarian|a ventriloquist|a warden|a watchmaker|a weaver|a welder
a zookeeper|a sommelier|a trapper|a beggar|a pilgrim|a hermit|a widow|an emperor|a duchess
""",
    "scene": """
a glacier|a fjord|a swamp|a savannah|a tundra|an oasis|a lagoon|a dam|a quarry|a mine shaft
a steelworks|a refinery|a nuclear reactor|a foundry|a warehouse|a shipyard|a dry dock|a sawmill
a brewery|a dairy|a slaughterhouse|a hospital ward|an operating theatre|a dental surgery|a pharmacy|a morgue
a courtroom|a parliament|a prison cell|a customs checkpoint|a barracks|a trench|a ruined abbey|a monastery
a synagogue|a pagoda|a pyramid|a mausoleum|a catacomb|an amphitheatre|an opera|a cinema|a casino|a circus ring
a bowling alley|a gymnasium|a velodrome|a racecourse|a golf course|a ski jump|a boxing ring
an observatory|a planetarium|a laboratory|a call centre|a newsroom|a recording booth|a darkroom
a boutique|a pawnshop|an arcade|a petrol pump|a toll booth|a motorway junction
a roundabout|a tunnel|an aqueduct|a viaduct|a sluice|a jetty|an igloo|a yurt
a tepee|a treehouse|a skyscraper|a penthouse|a basement|an attic|a corridor|a nursery|a sauna
a graveyard at moonrise|an avalanche|a tornado|a sandstorm|a meteor shower|an eclipse|a tidal wave|an iceberg
a hayfield|a paddy|a plantation|a salt flat|a peat bog|a mangrove|a kelp bed
""",
    "style": """
gouache|fresco|collage|batik|etching|lithography|silkscreen|cyanotype|daguerreotype|holography
claymation|origami|embroidery|crochet|felt appliqué|graffiti|calligraphy|pointillism|fauvism|dadaism
surrealism|futurism|rococo|gothic tracery|byzantine iconography|bauhaus geometry|brutalism|steampunk|cyberpunk
anime|manga|caricature|trompe l'oeil|wireframe|voxels|sepia|infrared|x-ray|thermal imaging|bokeh
scratchboard|marquetry|sgraffito|cloisonné|enamel|lacquer|papier-mâché|macramé|ceramic glaze
""",
}
# Words that say nothing of a subject, and stand in captions as well.
_SMALL: Final = frozenset(
    ("an", "and", "at", "by", "from", "his", "her", "in", "of", "off", "on", "or", "out", "the", "to", "with")
)


class Bystander(NamedTuple):
    """A phrase, and the kind of preset whose templates it fits."""

    phrase: str
    kind: Kind


def bystanders(presets: Iterable[Preset], split: Split) -> list[Bystander]:
    """What these presets do not name: the words of `WORDS` and what the other shipped presets name.

    Left out is what shares a word with a phrase of theirs. Of the shipped presets those of things and styles
    count, which can be in any picture; those of scenes and people describe what nobody should have to draw
    for a figure of something else, and sensitive ones count only where something sensitive is erased.
    split: every third is for tuning.
    """
    presets = list(presets)
    is_sensitive = any(part.sensitive for preset in presets for part in preset.walk() if part.concepts)
    named = {word for preset in presets for part in preset.walk() for word in _named(part)}
    every = dict.fromkeys([*words(), *_of_presets(is_sensitive)])
    return [each for each in _of_split(list(every), split) if not content_words(each.phrase) & named]


def words() -> list[Bystander]:
    """Those of `WORDS`, whatever is erased."""
    return [
        Bystander(with_article(word) if kind == "object" else word, kind)
        for kind, lines in WORDS.items()
        for word in lines.strip().replace("\n", "|").split("|")
    ]


def bystander_canaries() -> list[str]:
    """Captions with words that no report asks, on which side effects are measured."""
    chosen = _of_split(words(), "tuning")
    return [
        TEMPLATES[kind][place % len(TEMPLATES[kind])].replace("{}", phrase)
        for place, (phrase, kind) in enumerate(chosen)
    ]


@cache
def _of_presets(is_sensitive: bool) -> list[Bystander]:
    found: list[Bystander] = []
    for name in preset_names():
        if name.startswith(f"{EMOJI.name}-"):  # the words of another world
            continue
        for part in load_preset(name).walk():
            if part.kind in ("object", "style") and part.sensitive <= is_sensitive:
                found += [Bystander(concept.unsafe, part.kind) for concept in part.concepts]
    return found


def _of_split(every: Sequence[Bystander], split: Split) -> list[Bystander]:
    return [each for place, each in enumerate(every) if (place % 3 == 2) == (split == "tuning")]


def content_words(text: str) -> set[str]:
    """The words of a text that say something, without case and plural s."""
    words = re.findall(r"[^\W_]{2,}", text.casefold())
    return {word if word.endswith("ss") else word.removesuffix("s") for word in words if word not in _SMALL}


def _named(preset: Preset) -> Sequence[str]:
    phrases = [phrase for concept in preset.concepts for phrase in (concept.unsafe, concept.safe)]
    return [word for phrase in phrases for word in content_words(phrase)]
