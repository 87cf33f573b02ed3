"""The typeface of everything that is written into a picture: it has accents, Greek and Cyrillic."""

import unicodedata
from functools import cache
from pathlib import Path
from typing import Final

from PIL import ImageFont

# A subset of DejaVu Sans; Pillow's own typeface stops at ASCII. Its licence lies beside it.
FILE: Final = Path(__file__).with_name("fonts") / "dejavu-sans.ttf"


@cache
def typeface(size: int) -> ImageFont.FreeTypeFont:
    """The typeface, so many pixels high."""
    return ImageFont.truetype(FILE, size)


def legible(text: str) -> str:
    """The text with each symbol that the typeface lacks, such as an emoji, as its name: "(cat face)".

    Composed first, since accents of their own would stand beside their letters. Letters of scripts that
    the typeface lacks stay, and are drawn as boxes: a name would be longer than what it stands for.
    """
    return "".join(_shown(letter) for letter in unicodedata.normalize("NFC", text))


def _shown(letter: str) -> str:
    category = unicodedata.category(letter)
    if category == "Cf" or 0xFE00 <= ord(letter) <= 0xFE0F:  # joiners and selectors within emoji
        return ""
    if category not in ("So", "Sk") or ord(letter) < 0x250:
        return letter
    return f"({unicodedata.name(letter, 'symbol').lower()})"
