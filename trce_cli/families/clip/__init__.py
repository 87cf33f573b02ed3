"""CLIP's text encoders: tokens, states, slots, and words for attacks."""
