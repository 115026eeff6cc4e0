"""Make `lm_eval --model hf-laai` work with lm-eval 0.4.13, which reads no entry points.

PyTorch calls `register` at the end of every `import torch` (entry point group `torch.backends`), and the harness
imports torch before it looks a model up. An exception here would break `import torch`, and most programs that import
torch have nothing to do with the harness. So this imports nothing, not even lm_eval: it waits for `lm_eval.models`.
Releases of lm-eval that read the entry point group `lm_eval.models` find the same name with the same target.
"""

import sys

NAME = "hf-laai"
TARGET = "lm_eval_laai.model:HFLaai"
# Every look-up of a model imports this module first. A name added earlier would leave lm-eval 0.4.13 with that one
# model, because lm-eval imports its own models only into an empty registry.
AWAITED = "lm_eval.models"


def register() -> None:
    """Add `hf-laai` to the harness's models, now or when lm_eval is imported. Never raises, imports nothing."""
    if sys.modules.get(AWAITED) is not None:
        _add_name()
    elif _Watcher not in sys.meta_path:
        # Never removed: a removal while another thread iterates over the list would hide a finder from that thread.
        sys.meta_path.insert(0, _Watcher)


class _Watcher:
    """A finder that finds nothing; being the first in the list, it notices the import of `lm_eval.models`."""

    @staticmethod
    def find_spec(fullname: str, path: object = None, target: object = None) -> None:
        if fullname == AWAITED:
            _add_name()


def _add_name() -> None:
    """Register the name as a string: the class behind it is imported when the model is asked for."""
    try:
        from lm_eval.api.registry import model_registry

        if NAME not in model_registry:
            model_registry.register(NAME, target=TARGET)
    except Exception:
        # An unknown kind of registry: `hf-laai` stays unknown, and the harness says so when asked for it.
        import logging

        logging.getLogger(__name__).debug("%s was not registered with lm_eval", NAME, exc_info=True)
