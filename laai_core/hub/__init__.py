"""Interventions on the Hugging Face Hub: names, and the file on this machine that a name stands for."""

from laai_core.hub.path import HubPath, is_repository
from laai_core.hub.read import explained, local_file

__all__ = ["HubPath", "explained", "is_repository", "local_file"]
