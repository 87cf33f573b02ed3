"""The machine: safetensors bytes, files that are whole or absent, paths, cache, processes, memory, words."""
