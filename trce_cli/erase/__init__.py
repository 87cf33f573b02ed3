"""The two stages, from prompts to an edit, with their statistics, trajectories and guards."""
