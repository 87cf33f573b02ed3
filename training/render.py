"""Draw scenes of the emoji world with Pillow; sprites are rendered once from Fluent Emoji flat art (MIT)."""

import io
import json
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from trce_cli.emoji.world import BACKGROUNDS, Scene, concepts

SIZE = 64  # pixels, both sides
_SPRITE_SIZE = 192
_RECOLOURED = {
    "water-pistol": 0.45
}  # drawn as a toy; greyed and darkened by this factor it reads as what it is


def render_sprites(icons: Path) -> dict[str, np.ndarray]:
    """Render every class's icon from the art's ``icons.json`` to RGBA uint8, shape (192, 192, 4)."""
    import resvg_py

    bodies = json.loads(icons.read_text("utf-8"))["icons"]
    sprites = {}
    for name, concept in concepts().items():
        body = bodies[concept.icon]["body"]
        size = f'viewBox="0 0 32 32" width="{_SPRITE_SIZE}" height="{_SPRITE_SIZE}"'
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{body}</svg>'
        image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
        if factor := _RECOLOURED.get(concept.icon):
            alpha = image.getchannel("A")
            image = image.convert("L").point(lambda v, f=factor: int(v * f)).convert("RGBA")
            image.putalpha(alpha)
        sprites[name] = np.asarray(image)
    return sprites


def draw(scene: Scene, sprites: dict[str, np.ndarray], rng: Random) -> np.ndarray:
    """Draw a scene with a little jitter in place and size; RGB uint8, shape (64, 64, 3)."""
    canvas = Image.new("RGB", (SIZE, SIZE), BACKGROUNDS[scene.background])
    alone = len(scene.objects) == 1
    for index, name in enumerate(scene.objects):
        side = rng.randint(44, 50) if alone else rng.randint(28, 30)
        centre = 32 if alone else (17, 47)[index]
        reach = 3 if alone else 1
        left = centre - side // 2 + rng.randint(-reach, reach)
        top = 32 - side // 2 + rng.randint(-reach, reach)
        sprite = Image.fromarray(sprites[name]).resize((side, side), Image.Resampling.BOX)
        canvas.paste(sprite, (left, top), sprite)
    return np.asarray(canvas)


def nearest_background(image: np.ndarray) -> str:
    """Name of the background whose colour is nearest to the mean colour of the two-pixel border."""
    border = np.concatenate(
        [
            image[:2].reshape(-1, 3),
            image[-2:].reshape(-1, 3),
            image[:, :2].reshape(-1, 3),
            image[:, -2:].reshape(-1, 3),
        ]
    )
    mean = border.astype(np.float64).mean(0)
    return min(BACKGROUNDS, key=lambda name: float(((mean - BACKGROUNDS[name]) ** 2).sum()))
