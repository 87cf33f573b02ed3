"""Words only: presets, prompt pairs, templates, captions, suites and prompt files."""
