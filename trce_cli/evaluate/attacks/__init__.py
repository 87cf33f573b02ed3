"""Adaptive attacks on an erased checkpoint, one file each."""
