"""Qwen-Image: Qwen2.5-VL reads the prompt, and a transformer of two streams draws."""
