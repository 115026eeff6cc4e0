"""Interventions in forms that other tools read, only where those compute the same; all else is refused by name."""
