"""The machine: safetensors bytes, files that are whole or absent, paths, the cache, processes, memory."""
