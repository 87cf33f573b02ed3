"""What is to be known of English: which words of a phrase say nothing of it."""

import re


def bare(phrase: str) -> str:
    """A phrase without its article, as a word stands in templates."""
    return re.sub(r"^(an?|the) ", "", phrase, flags=re.IGNORECASE)
