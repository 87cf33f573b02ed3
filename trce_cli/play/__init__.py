"""A page to look with: original beside erased, drawn as one asks, and a slider for each map."""
