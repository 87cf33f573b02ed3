"""FLUX.2 klein: Qwen3 reads the prompt at three depths, and a transformer of two streams draws."""
