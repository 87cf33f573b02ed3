"""Causal language models as text encoders: templates, tokens, states, slots."""
