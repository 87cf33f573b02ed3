"""FLUX.1 and Chroma: T5 reads the prompt, for FLUX.1 CLIP pools it as well, and a transformer draws."""
