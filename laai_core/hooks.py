"""Temporary changes to a live model, undone however their block ends: hooks, recordings, frozen weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Key = TypeVar("Key")


@contextmanager
def attached(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end of the block, last first; if a generator fails, remove those registered before.

    Within the block the model runs uncompiled: compiled code does not look for hooks that come or go later.
    """
    with torch.compiler.set_stance("force_eager"), ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


@contextmanager
def recorded(
    modules: Mapping[Key, nn.Module], keep: Callable[[Any], Any] = lambda value: value, inputs: bool = False
) -> Iterator[dict[Key, list[Any]]]:
    """Within the block, `keep` of what every call of each module returns, or with `inputs` of its first argument.

    Yields {key: one entry per call, in order}.
    """
    seen: dict[Key, list[Any]] = {key: [] for key in modules}

    def recorder(key: Key) -> Callable[..., None]:
        return lambda module, args, *output: seen[key].append(keep(args[0] if inputs else output[0]))

    def register(module: nn.Module) -> Callable[..., RemovableHandle]:
        return module.register_forward_pre_hook if inputs else module.register_forward_hook

    with attached(register(module)(recorder(key)) for key, module in modules.items()):
        yield seen


@contextmanager
def read_at(head: nn.Module, row: Tensor, column: Tensor) -> Iterator[None]:
    """Within the block, a language-model head gets only the hidden states at row and column [u], as [1, u, hidden]."""

    def chosen(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        return (hidden[row.to(hidden.device), column.to(hidden.device)].unsqueeze(0), *args[1:])

    with attached([head.register_forward_pre_hook(chosen)]):
        yield


# Decoder blocks return a bare tensor in transformers 5 and a tuple in 4; mixtures of experts may return a tuple, the
# first GPT a list.


def hidden_of(output: Any) -> Any:
    """The hidden states in a module's output."""
    return output[0] if isinstance(output, tuple | list) else output


def with_hidden(output: Any, hidden: Any) -> Any:
    """A module's output with other hidden states in it."""
    return type(output)((hidden, *output[1:])) if isinstance(output, tuple | list) else hidden


@contextmanager
def shadowed(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Within the block, set an instance attribute that hides the class's method; restore any earlier attribute."""
    before = module.__dict__.get(name)  # accelerate sets its own `forward` here
    module.__dict__[name] = value
    try:
        yield
    finally:
        if before is None:
            module.__dict__.pop(name, None)
        else:
            module.__dict__[name] = before


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within the block, evaluation mode and no gradients for the weights; earlier states are restored."""
    training = [m for m in model.modules() if m.training]
    learning = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in learning:
            parameter.requires_grad_(True)
