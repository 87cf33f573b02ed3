"""Checkpoints of any layout: opened, checked, copied with edits, converted, and what is said about them."""
