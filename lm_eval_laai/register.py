"""Make `lm_eval --model hf-laai` and `--model vllm-laai` work with lm-eval 0.4.13, which reads no entry points.

PyTorch calls `register` at the end of every `import torch` (entry point group `torch.backends`), and the harness
imports torch before it looks a model up. An exception here would break `import torch`, and most programs that import
torch have nothing to do with the harness. So this imports nothing, not even lm_eval: it waits for `lm_eval.models`.
Releases of lm-eval that read the entry point group `lm_eval.models` find the same names with the same targets.
"""

import sys

TARGETS = {"hf-laai": "lm_eval_laai.model:HFLaai", "vllm-laai": "lm_eval_laai.vllm_model:VLLMLaai"}
# Every look-up of a model imports this module first. A name added earlier would leave lm-eval 0.4.13 with these
# models, because lm-eval imports its own models only into an empty registry.
AWAITED = "lm_eval.models"


def register() -> None:
    """Add the names to the harness's models, now or when lm_eval is imported. Never raises, imports nothing."""
    if sys.modules.get(AWAITED) is not None:
        _add_names()
    elif _Watcher not in sys.meta_path:
        # Never removed: a removal while another thread iterates over the list would hide a finder from that thread.
        sys.meta_path.insert(0, _Watcher)


class _Watcher:
    """A finder that finds nothing; being the first in the list, it notices the import of `lm_eval.models`."""

    @staticmethod
    def find_spec(fullname: str, path: object = None, target: object = None) -> None:
        if fullname == AWAITED:
            _add_names()


def _add_names() -> None:
    """Register the names as strings: the class behind one is imported when that model is asked for."""
    try:
        from lm_eval.api.registry import model_registry

        for name, target in TARGETS.items():
            if name not in model_registry:
                model_registry.register(name, target=target)
    except Exception:
        # An unknown kind of registry: the names stay unknown, and the harness says so when asked for it.
        import logging

        logging.getLogger(__name__).debug("%s not registered with lm_eval", ", ".join(TARGETS), exc_info=True)
