"""Interventions on the Hugging Face Hub: names, and the file on this machine that a name stands for."""

from laai_core.hub.path import HubPath, hub_path
from laai_core.hub.read import explained, local_file

__all__ = ["HubPath", "explained", "hub_path", "local_file"]
