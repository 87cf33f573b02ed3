"""Stable Diffusion 3 and 3.5: two CLIP encoders and T5 read the prompt, and a transformer draws."""
