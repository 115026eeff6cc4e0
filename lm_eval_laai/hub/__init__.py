"""Interventions on the Hugging Face Hub: the model card."""
