"""How `emoji-dit` is made, the emoji world in Z-Image's format: ``python -m training.dit``."""
