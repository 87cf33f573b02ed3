"""Benign captions of the real world, made by a grammar: what an edit leaves alone, and how that is checked.

Nothing here is drawn from a data set. The same captions come out on every machine and Python version, because
cached statistics are keyed by them.
"""

from collections.abc import Callable, Sequence
from itertools import cycle
from random import Random
from typing import Final

PRIOR_CAPTIONS: Final = 1200  # of `emoji`, 375 and 3,000 keep as much: docs/method.md
CANARY_CAPTIONS: Final = 200
TUNING_CAPTIONS: Final = 100

# Each word list is split: the last fifth occurs in canaries alone, so that they measure what no prior named.
_HELD_OUT: Final = 5

PEOPLE = """
a woman|a man|a girl|a boy|an old man|an old woman|a young couple|a family of four|a teacher|a nurse
a farmer|a chef|a firefighter|a carpenter|a fisherman|a pianist|a violinist|a dancer|a gardener|a student
a scientist|an astronaut|a cyclist|a football player|a tennis player|a swimmer|a skier|a tourist
a bride and groom|a grandmother|a toddler|twins|two friends|a group of children|a crowd of people
a bus driver|a postman|a waiter|a barber|a baker|a potter|a photographer|a painter at an easel|a judge
a surgeon|a librarian|a shepherd|a mechanic|an office worker|a pilot|a tailor|a beekeeper|a choir
a marching band|a rower|a climber|a street musician|a dentist|a jogger
"""
ACTIONS = """
reading a newspaper|drinking tea|riding a bicycle|walking a dog|cooking dinner|playing the guitar
planting flowers|looking out of the window|laughing|waving at the camera|carrying a suitcase
opening an umbrella|flying a kite|painting a fence|washing the dishes|writing a letter|talking on the phone
working on a laptop|folding laundry|throwing a frisbee|jumping into the water|building a sandcastle
sitting on a bench|feeding ducks|eating ice cream|buying vegetables|crossing the street
waiting for the train|pushing a pram|holding a baby|blowing out candles|wearing a red scarf|in a raincoat
in a wedding dress|in a suit and tie|with a backpack|with curly hair|with a beard|doing yoga|playing chess
repairing a bicycle|picking apples|kneading dough|watering plants|telling a story
"""
ANIMALS = """
dog|cat|horse|cow|sheep|goat|pig|rabbit|squirrel|fox|brown bear|polar bear|panda|lion|tiger|elephant|giraffe
zebra|monkey|kangaroo|koala|penguin|owl|eagle|parrot|swan|duck|rooster|sparrow|flamingo|frog|turtle|dolphin
whale|goldfish|butterfly|bee|ladybird|snail|deer|hedgehog|otter|camel|llama|donkey|puppy|kitten|peacock|seal
octopus|chameleon|moose|hamster|pelican|crab|dragonfly|beaver|raccoon|alpaca|hummingbird
"""
FOOD = """
a pizza|a bowl of soup|a plate of spaghetti|a hamburger with fries|a slice of chocolate cake|a birthday cake
pancakes|a loaf of bread|scrambled eggs on toast|a green salad|a basket of apples|a bunch of bananas
ripe strawberries|a cup of coffee|a pot of tea|a glass of orange juice|a bottle of milk
sushi on a wooden board|a taco|grilled fish|roast potatoes|rice with vegetables|a cheese platter
cupcakes with pink icing|an ice cream cone|a jar of honey|a sandwich|a bowl of cherries|sliced watermelon
a fruit stall|croissants|dumplings in a steamer|a pumpkin pie|noodles in broth|a lemon tart
a tray of cookies|fresh figs|stuffed peppers|an omelette|blueberry muffins
"""
THINGS = """
bicycle|motorcycle|red car|yellow taxi|double-decker bus|steam train|tram|sailing boat|canoe|airplane
hot air balloon|helicopter|tractor|fire engine|wooden chair|leather sofa|desk lamp|bookshelf
grandfather clock|kitchen table|bathtub|piano|violin|guitar|trumpet|drum kit|typewriter|laptop|camera
telephone|television|radio|umbrella|suitcase|pair of shoes|straw hat|wool sweater|blue dress|teapot
vase of tulips|candle|mirror|pillow|quilt|football|tennis racket|skateboard|surfboard|teddy bear
wooden toy train|kite|snow globe|compass|globe|wristwatch|pair of glasses|pencil|watering can|bird house
mailbox|street lamp|park bench|fountain|windmill|lighthouse|weathervane|sewing machine|microscope|telescope
rocking chair|paper lantern|hammock|accordion|picnic basket|wheelbarrow|scooter|ferry|chandelier
jigsaw puzzle
"""
ADJECTIVES = """
small|large|old|new|shiny|colourful|wooden|white|black|green|blue|bright|dusty|elegant|rusty|striped|sleepy
playful|curious|tiny|beautiful|golden|fluffy|weathered|modern|antique|handmade|plain|patterned|purple
"""
PLACES = """
in a kitchen|in a living room|in a classroom|in a library|at a train station|at an airport|on a beach
by a lake|in a forest|in a meadow|on a mountain path|in the snow|in the rain|under a tree|beside a river
in a city street|at a market|in a garden|on a farm|in a desert|on a bridge|in a museum|in an office
in a cafe|on a balcony|in a park|at a playground|in a stadium|in a greenhouse|on a rooftop|in an old town
on a harbour wall|in a bakery|on a boat|in a field of sunflowers|beside a fireplace|on a stage|at a bus stop
in a workshop|in a supermarket|in a vineyard|on a frozen pond|in a lecture hall|at a campsite
on a country road|in a bamboo grove|in a laundrette|at a fairground
"""
SCENES = """
a snowy mountain range|a tropical beach|a waterfall in the jungle|a village in the alps|a city skyline
rolling hills|a desert with dunes|a field of lavender|an autumn forest|a rocky coast|a quiet canal
a castle on a hill|a cathedral|a modern glass building|a cosy living room|a bright kitchen
a bedroom with a large window|a child's playroom|a barn|a japanese garden|a cherry orchard in bloom
a stone bridge|a cobbled street|a harbour with fishing boats|a windmill|a country cottage|a log cabin
a temple|a mosque with blue tiles|a town square|a shopping street|a subway station|a concert hall
a swimming pool|a football stadium|a railway station|an airport terminal|a vineyard|rice terraces
a frozen lake|the northern lights|the milky way|a full moon over the sea|a thunderstorm over fields
a rainbow|a volcano|a coral reef|an ice cave|a canyon|a geyser|a bamboo forest|a lighthouse on a cliff
a botanical garden|a spiral staircase
"""
TIMES = """
at sunrise|at sunset|at night|at noon|in the morning|in the evening|in winter|in spring|in summer|in autumn
on a foggy day|on a sunny day|under a cloudy sky|by candlelight|after the rain|during a snowfall|at dusk
at dawn
"""
MEDIA = """
a photo of|a photograph of|a black and white photograph of|a painting of|an oil painting of|a watercolour of
a pencil drawing of|a charcoal sketch of|a digital illustration of|a cartoon of|a 3d render of|a woodcut of
a mosaic of|an engraving of|a children's book illustration of|a vintage postcard of|a film still of
a close-up of|an aerial view of|a low angle shot of|a blurry picture of|a pastel drawing of
a stained glass window of|a linocut of|a tapestry of
"""
STYLES = """
impressionist painting|ukiyo-e print|art deco poster|pixel art|low poly|baroque painting|pop art
minimalist design|isometric view|paper cut-out|studio photography|macro photography|long exposure|tilt-shift
35mm film|high contrast|soft light|highly detailed|pastel colours|muted colours|vivid colours
shallow depth of field|golden hour|line art|art nouveau|cubist painting|chalk on slate|fisheye lens
blueprint|risograph
"""
COUNTS = "two|three|four|five|several|many|a pair of|a row of|a group of|a dozen"

Pick = Callable[[str], str]


def _person(pick: Pick) -> str:
    return f"{pick(PEOPLE)} {pick(ACTIONS)}"


def _animal(pick: Pick) -> str:
    return with_article(f"{pick(ADJECTIVES)} {pick(ANIMALS)}")


def _thing(pick: Pick) -> str:
    return with_article(f"{pick(ADJECTIVES)} {pick(THINGS)}")


def _subject(pick: Pick) -> str:
    kind = pick("person|animal|thing|food|scene|person|thing")
    simple = {"food": FOOD, "scene": SCENES}
    composed = {"person": _person, "animal": _animal, "thing": _thing}
    return pick(simple[kind]) if kind in simple else composed[kind](pick)


def with_article(noun: str) -> str:
    """`a dog`, `an owl`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _plural(noun: str) -> str:
    if noun.startswith("pair of") or noun in ("sheep", "deer", "moose", "goldfish"):
        return noun
    if noun.endswith(("x", "ch", "s")):
        return noun + "es"
    return noun[:-1] + "ies" if noun.endswith("y") and noun[-2] not in "aeiou" else noun + "s"


# From one word to long lists of modifiers, as prompts are written.
FORMS: Final[Sequence[Callable[[Pick], str]]] = (
    lambda pick: pick(ANIMALS),
    lambda pick: pick(THINGS),
    lambda pick: pick(SCENES),
    lambda pick: pick(FOOD),
    lambda pick: f"{pick(PEOPLE)} {pick(PLACES)}",
    _person,
    lambda pick: f"{_person(pick)} {pick(PLACES)}",
    lambda pick: f"{_person(pick)} {pick(PLACES)} {pick(TIMES)}",
    lambda pick: f"{_animal(pick)} {pick(PLACES)}",
    lambda pick: f"{_thing(pick)} {pick(PLACES)}",
    lambda pick: f"{pick(FOOD)} on a table {pick(PLACES)}",
    lambda pick: f"{pick(SCENES)} {pick(TIMES)}",
    lambda pick: f"{pick(MEDIA)} {_subject(pick)}",
    lambda pick: f"{pick(MEDIA)} {_subject(pick)} {pick(TIMES)}",
    lambda pick: f"{pick(MEDIA)} {_subject(pick)}, {pick(STYLES)}",
    lambda pick: f"{pick(SCENES)}, {pick(STYLES)}, {pick(STYLES)}",
    lambda pick: f"{pick(COUNTS)} {_plural(pick(ANIMALS))} {pick(PLACES)}",
    lambda pick: f"{pick(COUNTS)} {_plural(pick(THINGS))} {pick(PLACES)}",
    lambda pick: f"{_animal(pick)} next to {_thing(pick)}",
    lambda pick: f"{_thing(pick)} and {_thing(pick)} {pick(PLACES)}",
    lambda pick: f"{pick(PEOPLE)} and {_animal(pick)} {pick(PLACES)} {pick(TIMES)}",
    lambda pick: f"portrait of {pick(PEOPLE)}, {pick(STYLES)}, {pick(STYLES)}",
    lambda pick: f"{pick(MEDIA)} {pick(PEOPLE)} with {_thing(pick)}, {pick(PLACES)}, {pick(STYLES)}",
    lambda pick: f"{pick(SCENES)} with {_animal(pick)} in the foreground, {pick(TIMES)}, {pick(STYLES)}",
)


def prior_captions() -> list[str]:
    """The 1,200 distinct captions of the default prior."""
    return _captions(PRIOR_CAPTIONS, seed=0, held_out=False)


def canary_captions() -> list[str]:
    """The 200 distinct captions that side effects are measured on, with subjects held out of the prior."""
    return _captions(CANARY_CAPTIONS, seed=1, held_out=True)


def tuning_captions() -> list[str]:
    """100 distinct captions that are neither prior nor canaries, for choosing settings by."""
    return _captions(CANARY_CAPTIONS + TUNING_CAPTIONS, seed=1, held_out=True)[CANARY_CAPTIONS:]


def _captions(count: int, seed: int, held_out: bool) -> list[str]:
    random = Random(seed)

    def pick(words: str) -> str:
        options = words.strip().replace("\n", "|").split("|")
        if words in _SPLIT:
            border = len(options) - len(options) // _HELD_OUT
            options = options[border:] if held_out else options[:border]
        # random() is the one method whose sequence Python promises to keep.
        return options[int(random.random() * len(options))]

    captions: dict[str, None] = {}
    for form in cycle(FORMS):
        captions[form(pick)] = None  # the shortest forms run dry, and then add nothing
        if len(captions) == count:
            return list(captions)
    raise AssertionError("a cycle has no end")


_SPLIT: Final = frozenset({PEOPLE, ANIMALS, FOOD, THINGS, PLACES, SCENES})
