"""Temporary changes to a live model, undone however their block ends: hooks, recordings, frozen weights."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from laai_core.errors import LaaiError

Key = TypeVar("Key")


# For what blocks share, which begin and end in any thread; the garbage collector may end one while the lock is held.
_lock = threading.RLock()


class _Uncompiled:
    """The compiler's stance while any block needs models uncompiled: one stance for the process."""

    def __init__(self) -> None:
        self._blocks, self._stance = 0, ExitStack()

    def __enter__(self) -> None:
        with _lock:
            stance = torch.compiler.set_stance("force_eager")  # for each block: a caller may set another in between
            if not self._blocks:
                self._stance.enter_context(stance)
            self._blocks += 1

    def __exit__(self, *ignored: Any) -> None:
        with _lock:
            self._blocks -= 1
            if not self._blocks:
                self._stance.close()


_uncompiled = _Uncompiled()


@contextmanager
def attached(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end of the block, last first; if a generator fails, remove those registered before.

    Within the block the model runs uncompiled: compiled code does not look for hooks that come or go later.
    """
    with _uncompiled, ExitStack() as stack:
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


class _Wrapped:
    """A method of a live model whose calls go through the wrappers of all open blocks, that of the latest first."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._name, self._method = name, getattr(module, name)
        self.wrappers: list[Callable[..., Any]] = []
        self.undo = ExitStack()
        self.undo.enter_context(shadowed(module, name, self))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.wrappers:
            raise LaaiError(f"{self._name} was taken off the model inside a laai.apply block that has ended")
        call = self._method
        for wrapper in tuple(self.wrappers):  # blocks of other threads may end meanwhile
            call = partial(wrapper, call)
        return call(*args, **kwargs)


@contextmanager
def wrapped(module: nn.Module, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Within the block, calls of the method become `wrapper(method, *args, **kwargs)`; blocks may end in any order."""
    with _lock:
        found = module.__dict__.get(name)
        method = found if isinstance(found, _Wrapped) else _Wrapped(module, name)
        method.wrappers.append(wrapper)
    try:
        yield
    finally:
        with _lock:
            method.wrappers.remove(wrapper)
            if not method.wrappers:
                method.undo.close()


def refuse_applied(model: nn.Module, what: str) -> None:
    """LaaiError within `laai.apply` on the model, whose vector would act on all that `what` computes."""
    if any(isinstance(value, _Wrapped) for value in vars(model).values()):
        raise LaaiError(f"the model is inside a laai.apply block: expected {what} outside of it")


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within the block, evaluation mode and no gradients for the weights; earlier states are restored.

    Raises:
        LaaiError: within `laai.apply` on the model.
    """
    refuse_applied(model, "training")
    training = [m for m in model.modules() if m.training]
    # A weight made in inference mode has no gradient, and its flag could not be set back.
    learning = [p for p in model.parameters() if p.requires_grad and not p.is_inference()]
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
