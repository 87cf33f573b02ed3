"""Z-Image, base and Turbo: Qwen3 reads the prompt, and a transformer of single streams draws."""
