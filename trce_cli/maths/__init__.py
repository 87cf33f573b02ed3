"""The equations: both stages, low rank, statistics. Torch and numpy at most."""
