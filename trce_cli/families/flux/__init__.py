"""FLUX.1, dev and schnell: T5 reads the prompt, CLIP pools it, and a transformer draws."""
