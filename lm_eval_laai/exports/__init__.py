"""Interventions in forms that other tools read, where the tools compute the same; others are refused."""
