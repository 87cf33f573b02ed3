"""Erase unsafe concepts from text-to-image diffusion checkpoints (TRCE, arXiv 2503.07389)."""

__version__ = "0.1.0"
