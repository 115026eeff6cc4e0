"""The direct effect of an intervention on the logits, head by head.

Direct logit attribution (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; the logit lens,
nostalgebraist 2020): the change of the logits if no later attention or feed-forward reacted to the vector. From
the site it goes through the output projection (`heads`), the block's path into the residual stream (with a norm
in Gemma-2 and OLMo-2, a factor in Granite), the final norm, the unembedding, and the model's changes to its logits
(soft-capping, scaling). All steps are the model's own code, linearised at the activations of the last tokens of given
prompts; the result is the average over the prompts. The numbers are logits, to first order: they add up over heads and
layers, include centring and the final norm's scale, and exclude effects through later layers. No weight is read, so
that quantised and transposed weights need no special case.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from laai_core.apply import Edit
from laai_core.errors import LaaiError
from laai_core.hooks import attached, frozen, hidden_of, with_hidden
from laai_core.locate import Layout


@dataclass(frozen=True)
class Writing:
    """The direct effect at one layer. G: the heads at site `heads`, else 1."""

    effects: torch.Tensor  # [G, V] change of the logits, float32 on the CPU
    activation_rms: float  # of the site, over the prompts' last tokens


def written(
    layout: Layout, edit: Edit, prompts: Sequence[Sequence[int]], progress: bool = False
) -> dict[int, Writing]:
    """The direct effect of every group of an edit's vectors, by layer.

    Args:
        edit: its position is ignored; the effect is computed at the last token of each prompt.
        prompts: token ids, one forward each.
        progress: show a tqdm bar on stderr.

    Raises:
        LaaiError: no prompt, or a block whose feed-forward module is not found.
    """
    if not prompts:
        raise LaaiError("no prompts, expected at least one to run the model on")
    with frozen(layout.model), torch.enable_grad():
        bar = tqdm(prompts, desc="inspect", disable=not progress, leave=False)
        found = [_on_one_prompt(layout, edit, prompt) for prompt in bar]
    return {
        layer: Writing(
            torch.stack([one[layer][0] for one in found]).mean(0),
            math.sqrt(sum(one[layer][1] for one in found) / len(found)),
        )
        for layer in edit.vectors
    }


def _on_one_prompt(layout: Layout, edit: Edit, prompt: Sequence[int]) -> dict[int, tuple[torch.Tensor, float]]:
    """{layer: (effects [G, V], mean square of the site's activation)} at the prompt's last token."""
    probes = {layer: _Probe(layout, edit, layer) for layer in edit.vectors}
    entry = _nothing(layout)  # where the residual stream leaves the last block
    tokens = torch.tensor([list(prompt)], device=layout.device)

    def hooks() -> Iterator[RemovableHandle]:
        for probe in probes.values():
            yield from probe.hooks()
        yield layout.blocks[-1].register_forward_hook(lambda module, args, output: _plus_at_end(output, entry))

    with attached(hooks()):
        logits = layout.model(input_ids=tokens, use_cache=False).logits[0, -1]
    return {
        layer: (_pushed(logits, entry, probe.directions).float().cpu(), probe.mean_square)
        for layer, probe in probes.items()
    }


class _Probe:
    """Watches one layer of a forward over one prompt.

    Afterwards `directions` [G, hidden] are what each group adds to the residual stream that leaves the block.
    """

    def __init__(self, layout: Layout, edit: Edit, layer: int) -> None:
        self._layout, self._site, self._layer = layout, edit.site, layer
        self._groups = _groups(edit.vectors[layer], layout.num_heads if edit.site == "heads" else 1)  # [G, D]
        self._entry = _nothing(layout)
        self.directions = torch.empty(0)
        self.mean_square = 0.0

    def hooks(self) -> Iterator[RemovableHandle]:
        """Register all, in this order, because block and site are one module at `residual`."""
        layer = self._layer
        yield self._layout.module(layer, self._site).register_forward_hook(self._at_site)
        if self._site == "heads":
            # The feed-forward that reads what attention wrote is no part of the direct path.
            yield self._layout.module(layer, "mlp").register_forward_pre_hook(_cut_off, with_kwargs=True)
        yield self._layout.blocks[layer].register_forward_hook(self._after_block)

    def _at_site(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        activation = args[0] if self._site == "heads" else hidden_of(output)
        self.mean_square = float(_end(activation).float().square().mean())
        if self._site == "heads":
            # By the module's own forward, less its bias: works for packed, quantised and transposed weights.
            inputs = torch.cat([self._groups, torch.zeros_like(self._groups[:1])]).to(activation)
            outputs = module.forward(inputs.unsqueeze(0))[0].float()
            self._groups = outputs[:-1] - outputs[-1]  # [G, hidden]
        return _plus_at_end(output, self._entry)

    def _after_block(self, module: nn.Module, args: Any, output: Any) -> Any:
        self.directions = _pushed(_end(hidden_of(output)), self._entry, self._groups).float()
        return with_hidden(output, hidden_of(output).detach())


def _nothing(layout: Layout) -> torch.Tensor:
    """Zeros [hidden] to add to the residual stream, for derivatives with respect to it."""
    return torch.zeros(layout.hidden_size, dtype=torch.float32, requires_grad=True)


def _pushed(output: torch.Tensor, source: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """J·w [G, m] for every row w of `directions` [G, n], J being the derivative of `output` [m] by `source` [n].

    Forward mode by two backward passes: Jᵀu is linear in u, so its derivative by u, pulled back along w, is J·w. It
    works where backward does, which forward-mode differentiation of other people's modules does not.
    """
    u = torch.zeros_like(output, requires_grad=True)
    (pulled,) = torch.autograd.grad(output, source, u, create_graph=True)
    return torch.stack(
        [torch.autograd.grad(pulled, u, w.to(pulled), retain_graph=True)[0] for w in directions.detach()]
    ).detach()


def _groups(vector: torch.Tensor, count: int) -> torch.Tensor:
    """A vector [D] as `count` rows [count, D] that sum to it, each with one head's part."""
    width = len(vector) // count
    rows = vector.new_zeros(count, len(vector))
    for number in range(count):
        part = slice(number * width, (number + 1) * width)
        rows[number, part] = vector[part]
    return rows


def _plus_at_end(output: Any, entry: torch.Tensor) -> Any:
    """A module's output with `entry` added at the last token."""
    value = hidden_of(output)
    tokens = value.reshape(-1, value.shape[-1])  # one prompt: some feed-forwards (OPT's) have no batch dimension
    changed = torch.cat([tokens[:-1], (tokens[-1] + entry.to(tokens)).unsqueeze(0)])
    return with_hidden(output, changed.view(value.shape))


def _end(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(-1, value.shape[-1])[-1]


def _cut_off(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    def cut(value: Any) -> Any:
        return value.detach() if isinstance(value, torch.Tensor) else value

    return tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}
