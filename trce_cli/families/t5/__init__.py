"""T5 as a text encoder: bidirectional, so that every position, padding too, sees the whole prompt."""
