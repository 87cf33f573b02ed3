"""How the embedded checkpoint was made: ``python -m training`` runs all stages or some."""
