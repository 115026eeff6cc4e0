"""Sharing interventions on the Hugging Face Hub: upload with a model card. Downloading is in `laai_core.hub`."""

from lm_eval_laai.hub.push import push_to_hub

__all__ = ["push_to_hub"]
