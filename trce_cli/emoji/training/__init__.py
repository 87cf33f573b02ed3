"""How the embedded checkpoint was made: ``python -m trce_cli.emoji.training`` runs all stages or some."""
