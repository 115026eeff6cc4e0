"""The fast path: tokens before the last prompt token do not depend on the vector, so they run once.

A prompt's tokens before its last go through the model once; their keys and values are cached. A step then runs only
[last prompt token + targets] through layers >= l, forward and backward, against the cache, which is never appended to.
A step calls the model's own forward; the blocks below l return their recorded output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

from laai_core.apply import Edit, hooked
from laai_core.cache import REFUSALS, model_inputs, padded, read_only, selected
from laai_core.encode import Batch
from laai_core.forward import Forward, Part
from laai_core.hooks import read_at, recorded, shadowed, with_hidden
from laai_core.locate import Layout
from laai_core.products import Products, Rows

Text = tuple[int, tuple[int, ...]]  # number of prompt tokens, all token ids of a row


@dataclass(frozen=True)
class _Suffixes:
    """Distinct texts from their last prompt token on, with the model's arguments and the cache of their prefixes."""

    number: dict[Text, int]  # the row of each text in the tensors below
    inputs: dict[str, torch.Tensor]  # tokens [U, T], mask [U, P + T] over prefixes too, positions [U, T]
    cache: Any  # a row for each distinct prefix; None where all are empty
    prefix: torch.Tensor  # [U]: the cache row of each text's prefix
    entering: dict[int, Any]  # layer: output of the block below, [U, T, hidden] or a tuple that begins so

    def take(self, texts: Sequence[Text], layer: int) -> tuple[dict[str, Any], Any]:
        """The model's arguments and the hidden states that enter a layer: a row for each text, repeats allowed."""
        rows = torch.tensor([self.number[text] for text in texts], device=self.prefix.device)
        inputs: dict[str, Any] = {name: tensor[rows] for name, tensor in self.inputs.items()}
        inputs |= {"past_key_values": None, "use_cache": self.cache is not None}
        if self.cache is not None:
            prefix = self.prefix[rows]
            whole = prefix.tolist() == list(range(int(self.prefix.max()) + 1))  # then no rows need to be copied
            # By indices on the CPU: the layers' caches may lie on several devices.
            inputs["past_key_values"] = read_only(self.cache if whole else selected(self.cache, prefix.cpu()))
        return inputs, _taken(self.entering[layer], rows)


class Prefixes:
    """A batch's rows up to their last prompt tokens, run once for all `layers` that will be trained on it."""

    def __init__(self, layout: Layout, batch: Batch, layers: Sequence[int]) -> None:
        self._layout, self._layers = layout, layers
        rows = zip(batch.prompt_lengths, batch.input_ids.tolist(), batch.attention_mask.sum(1).tolist(), strict=True)
        self.texts: list[Text] = [(prompt, tuple(ids[:length])) for prompt, ids, length in rows]
        self._kept: dict[tuple[int, int], _Suffixes] = {}

    def suffixes(self, rows: Sequence[int], layer: int, batch_size: int) -> tuple[dict[str, Any], Any]:
        """The model's arguments for some rows (ascending), and the hidden states that enter `layer`.

        Runs and caches the whole chunk of `batch_size` rows around `rows`: later steps with fewer active runs, and
        other layers, take their rows from the same chunk.
        """
        texts = [self.texts[row] for row in rows]
        start = rows[0] // batch_size * batch_size
        if rows[-1] >= start + batch_size:
            return _run(self._layout, texts, [layer]).take(texts, layer)
        # After memory ran out, chunks of the larger batch size must not stay in memory.
        self._kept = {key: suffixes for key, suffixes in self._kept.items() if key[1] == batch_size}
        if (start, batch_size) not in self._kept:
            chunk = self.texts[start : start + batch_size]
            self._kept[start, batch_size] = _run(self._layout, chunk, self._layers)
        return self._kept[start, batch_size].take(texts, layer)


class ReplayForward(Forward):
    """Forwards over the tokens from the last prompt token on.

    Args:
        prefixes: may be shared by the layers of one batch; default: this layer's own.
        products: of the blocks from this layer on; default: the modules' own.
        captured: as for `Forward`.
    """

    _begins_at_end = True

    def __init__(
        self,
        layout: Layout,
        batch: Batch,
        layer: int,
        site: str,
        batch_size: int | None = None,
        prefixes: Prefixes | None = None,
        products: Products | None = None,
        captured: bool = False,
    ) -> None:
        super().__init__(layout, batch, layer, site, batch_size, captured=captured)
        self._prefixes = prefixes or Prefixes(layout, batch, [layer])
        self._products = products

    def difference_from(self, plain: Forward) -> float | str:
        """Largest difference from `plain` in a token's log-probability over two rows under a random vector, or, where
        the model's code or cache does not allow a replay, the reason."""
        # The shortest and the longest row have padding, a short prefix and targets of unequal length, if any rows do.
        shapes = {(len(ids), prompt): row for row, (prompt, ids) in enumerate(self._prefixes.texts)}
        rows = sorted({shapes[min(shapes)], shapes[max(shapes)]})
        runs = sorted({self._batch.run_of_row[row] for row in rows})
        width = torch.Size(self._layout.shape(self._layer, self._site)).numel()
        vectors = torch.randn(len(runs), width, generator=torch.Generator().manual_seed(0))
        try:
            mine, theirs = (forward.token_logprobs(vectors, rows, runs) for forward in (self, plain))
        except REFUSALS as error:
            if should_reduce_batch_size(error):  # full forwards take more memory
                raise
            return " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return float((mine - theirs).abs().max())

    def _inputs(self, rows: list[int]) -> tuple[dict[str, Any], Any, Rows, torch.Tensor]:
        inputs, entering = self._prefixes.suffixes(rows, self._layer, self._batch_size)
        tokens = inputs["input_ids"]
        real = inputs["attention_mask"][:, -tokens.shape[1] :].bool()
        batch = self._batch
        learnt = torch.zeros(len(batch.prompt_lengths), dtype=torch.bool, device=real.device)
        learnt[batch.row[batch.share[batch.example[batch.continuation]] > 0]] = True  # the others are held out
        learnt = learnt[rows]
        return inputs, entering, Rows(tokens.shape, _indices(real), _indices(real & learnt.unsqueeze(1))), learnt

    def _logits(self, part: Part, edit: Edit) -> torch.Tensor:
        inputs, entering, rows, learnt = part.inputs
        read = Rows((1, len(part.row)), None, _indices(learnt[part.row]))
        with (
            self._products.used(rows, read) if self._products else nullcontext(),
            _replayed(self._layout, self._layer, entering),
            read_at(self._layout.model.get_output_embeddings(), part.row, part.column),
            hooked(self._layout, edit, part.lengths),
        ):
            logits = self._layout.model(**inputs).logits
        if logits.shape[:2] != (1, len(part.row)):
            raise RuntimeError(f"logits of shape {list(logits.shape)} for {len(part.row)} positions")
        return logits.squeeze(0)  # not logits[0], whose backward allocates a second [u, V]


def _indices(chosen: torch.Tensor) -> torch.Tensor | None:
    """Where `chosen` is true, in its flat form; None if it is everywhere."""
    return None if bool(chosen.all()) else chosen.flatten().nonzero().squeeze(1)


def _run(layout: Layout, texts: Sequence[Text], layers: Sequence[int]) -> _Suffixes:
    """Run the distinct prefixes for their cache, then the distinct suffixes for the outputs below `layers`."""
    device = layout.device
    distinct = list(dict.fromkeys(texts))
    prefixes = list(dict.fromkeys(ids[: prompt - 1] for prompt, ids in distinct))
    number = {prefix: row for row, prefix in enumerate(prefixes)}
    owner = torch.tensor([number[ids[: prompt - 1]] for prompt, ids in distinct], device=device)
    cache = None
    prefix_mask = torch.zeros(len(distinct), 0, dtype=torch.long, device=device)
    if any(prefixes):
        # Padded on the left, so that every suffix starts right behind its prefix.
        tokens, mask = padded(prefixes, device, left=True)
        cache = layout.model(**model_inputs(layout, tokens, mask), use_cache=True, logits_to_keep=1).past_key_values
        prefix_mask = mask[owner]
    tokens, mask = padded([ids[prompt - 1 :] for prompt, ids in distinct], device)
    before = torch.tensor([prompt - 1 for prompt, _ in distinct], device=device)
    inputs = model_inputs(layout, tokens, mask, prefix_mask, before)
    suffixes = _Suffixes({text: row for row, text in enumerate(distinct)}, inputs, cache, owner, {0: None})
    everything, _ = suffixes.take(distinct, 0)
    below = {layer: layout.blocks[layer - 1] for layer in set(layers) if layer}  # layer 0 has no block below
    with recorded(below) as outputs:
        if below:
            layout.model(**everything)
    suffixes.entering.update({layer: output for layer, (output,) in outputs.items()})
    return suffixes


def _taken(output: Any, rows: torch.Tensor) -> Any:
    """Rows of a block's output."""
    if isinstance(output, tuple):
        return tuple(_taken(part, rows) for part in output)
    return output[rows.to(output.device)] if isinstance(output, torch.Tensor) else output


@contextmanager
def _replayed(layout: Layout, layer: int, entering: Any) -> Iterator[None]:
    """Blocks below `layer` return their input, the last of them its recorded output: no work and no gradients."""

    def passed_on(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return with_hidden(entering, hidden)

    with ExitStack() as stack:
        for number, block in enumerate(layout.blocks[:layer], 1):
            forward = passed_on if number < layer else lambda *args, **kwargs: entering
            stack.enter_context(shadowed(block, "forward", forward))
        yield
