"""Apply interventions to a live model: hooks that edit activations at exact tokens, removed however the block ends."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from laai_core.errors import LaaiError
from laai_core.hooks import attached, hidden_of, with_hidden, wrapped
from laai_core.intervention import Intervention
from laai_core.locate import Layout, locate
from laai_core.positions import Call, PositionTracker, check_lengths, repeated

if TYPE_CHECKING:  # importing transformers takes a second
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)  # eq=False: compared and hashed by identity, as tensors have no truth value
class Edit:
    """Vectors to write into rows: by layer [D], or [B, D] with one per row of the call.

    For `add` the vectors include the scale. They may require gradients: training uses the hooks of `apply`.
    """

    vectors: Mapping[int, torch.Tensor]
    site: str = "heads"
    position: str = "last"
    operation: str = "add"
    step: float = 1.0  # step size of the operation `icv`

    @classmethod
    def of(cls, intervention: Intervention, layout: Layout) -> Edit:
        """The edit of an intervention on a model; LaaiError when shapes or layers do not fit."""
        vectors = intervention.for_model(layout)
        if intervention.operation == "add":
            vectors = {layer: vector * intervention.scale for layer, vector in vectors.items()}
        return cls(vectors, intervention.site, intervention.position, intervention.operation, intervention.scale)


@contextmanager
def apply(
    model: PreTrainedModel,
    intervention: Intervention | Sequence[Intervention | None],
    prompt_lengths: Sequence[int] | None = None,
    projection: str | None = None,
) -> Iterator[None]:
    """Within the block, `model(...)` and `model.generate(...)` run with the intervention, in every thread.

    Args:
        model: a causal language model of transformers, or a PeftModel around one.
        intervention: one for every row, or a sequence with one per row of the batch (None leaves a row untouched).
            In `generate` a row covers its beams and returned sequences.
        prompt_lengths: non-padding tokens of each row's prompt. Default: the prompt is all of the row, so that in
            `model(...)` it ends at the row's last non-padding token.
        projection: module path of the output projection, see `locate`.

    Raises:
        LaaiError: when an intervention does not fit the model, or the rows of a call are not the announced ones; for
            several prompts packed in a row, and for `guidance_scale`.
    """
    layout = locate(model, projection)
    rows: Edit | list[Edit | None]
    if isinstance(intervention, Intervention):
        rows = Edit.of(intervention, layout)
    elif isinstance(intervention, Sequence) and all(isinstance(one, Intervention | None) for one in intervention):
        edits = {id(iv): Edit.of(iv, layout) for iv in intervention if iv is not None}
        rows = [None if iv is None else edits[id(iv)] for iv in intervention]
    else:
        raise LaaiError(f"got {intervention!r:.60}: expected an Intervention, as Intervention.load(FILE) gives")
    with hooked(layout, rows, prompt_lengths):
        yield


@contextmanager
def hooked(
    layout: Layout, rows: Edit | Sequence[Edit | None], prompt_lengths: Sequence[int] | None = None
) -> Iterator[None]:
    """`apply` for edits: rows that share one Edit object share its indices."""
    steering = _Steering(layout, rows, prompt_lengths)
    with attached(steering.hooks()), ExitStack() as methods:
        for name, method in (("generate", steering.generate), ("init_continuous_batching", _refuse_packing)):
            if hasattr(layout.model, name):
                methods.enter_context(wrapped(layout.model, name, method))
        try:
            yield
        finally:
            steering.ended = True


@dataclass(eq=False)  # hashed by identity
class _Running:
    """A forward call, and the rows and columns in it that each edit changes, by edit and device."""

    call: Call
    backward: int = field(default_factory=torch._C._current_graph_task_id)  # number of the `backward` around it, or -1
    hits: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


class _Thread(threading.local):
    """State of the thread that calls the model."""

    prompt: torch.Tensor | None = None  # mask [R, P] of the `generate` in progress
    outer: Mapping[str, Any] | None = None  # arguments of the module around the decoder
    running: _Running | None = None  # the latest forward call


class _Steering:
    """The hooks of one `apply`, and the forward calls that they run in."""

    def __init__(
        self, layout: Layout, rows: Edit | Sequence[Edit | None], prompt_lengths: Sequence[int] | None
    ) -> None:
        self._layout = layout
        self._edits, self._row_edits = _distinct(rows)
        self._lengths = lengths = None if prompt_lengths is None else _checked(prompt_lengths)
        if lengths is not None and self._row_edits is not None and len(lengths) != len(self._row_edits):
            raise LaaiError(f"{len(self._row_edits)} interventions for {len(lengths)} prompt_lengths: one a row")
        self._tracker = PositionTracker(layout.virtual_tokens, lengths)
        self._parameters = list(inspect.signature(layout.decoder.forward).parameters)
        self._here = _Thread()
        self._with_graph: WeakSet[_Running] = WeakSet()  # calls whose graph lives, since a backward ran layers again
        self._ran_again = False  # whether a backward did since the latest of these calls
        self.ended = False  # the block, while calls in other threads may go on
        self._cast: dict[tuple[int, int, torch.device, torch.dtype], torch.Tensor] = {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise LaaiError(
            "a model inside a laai.apply block cannot be copied or pickled with its hooks: leave the block"
        )

    def hooks(self) -> Iterator[Any]:
        """Register every hook, one at a time."""
        layout = self._layout
        for module in layout.around:
            yield module.register_forward_pre_hook(self._before_outer, with_kwargs=True)
        yield layout.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True)
        yield layout.decoder.register_forward_hook(self._after_decoder, with_kwargs=True)
        for layer, site in sorted({(layer, edit.site) for edit in self._edits for layer in edit.vectors}):
            module = layout.module(layer, site)
            if site == "heads":
                yield module.register_forward_pre_hook(partial(self._edit_input, layer, site))
            else:
                yield module.register_forward_hook(partial(self._edit_output, layer, site))

    def generate(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate`, with its prompt kept: a forward call alone does not show whether it is a step of
        `generate` without a cache, or a chunk of a prefill.
        """
        outer = self._here.prompt
        setting = partial(_setting, self._layout.model, args, kwargs)
        if setting("guidance_scale") not in (None, 1):
            raise LaaiError(
                "guidance_scale runs a second, unconditional prompt, where the vector has no place: expected None"
            )
        mask = _prompt_mask(setting, args, kwargs)
        for name, given in (("interventions", self._row_edits), ("prompt_lengths", self._lengths)):
            if given is not None and len(given) != len(mask):
                raise LaaiError(f"{len(given)} {name} were given for {len(mask)} prompts: expected one a prompt")
        if self._lengths is not None:
            check_lengths(self._lengths, mask.sum(1))
        edited = (self._layout.blocks[layer] for edit in self._edits for layer in edit.vectors)
        if any(getattr(module, "is_kv_shared_layer", False) for block in edited for module in block.modules()):
            kwargs.setdefault("logits_to_keep", 0)  # else Gemma 4 runs such layers for the last column alone
        self._here.prompt = mask
        try:
            generated = method(*args, **kwargs)
        finally:
            self._here.prompt = outer
        if self.ended:
            raise LaaiError("a laai.apply block ended while generate ran in a thread: its last tokens are untouched")
        return generated

    def _before_outer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._here.outer = kwargs

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The decoder's arguments by name."""
        return {**dict(zip(self._parameters, args, strict=False)), **kwargs}

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record where this call's prompts end. A hook of the decoder, so that `model.model(...)` is covered too."""
        given = self._given(args, kwargs)
        tokens = _first(given.get("input_ids"), given.get("inputs_embeds"))
        if tokens is None:
            raise LaaiError(f"{type(module).__name__} was called without input_ids or inputs_embeds")
        batch, length = tokens.shape[:2]
        prompt, outer = self._here.prompt, self._here.outer
        if self._row_edits is not None and prompt is None and len(self._row_edits) != batch:
            raise LaaiError(f"{len(self._row_edits)} interventions were given for a batch of {batch} rows")
        mask = given.get("attention_mask")
        if isinstance(mask, dict) and outer is not None:  # made by Gemma 3, say, from the mask that it was given
            mask = outer.get("attention_mask")
        if mask is None and prompt is None and _packed(given):
            _refuse_packing()
        self._here.outer = None
        call = self._tracker.call(batch, length, given.get("past_key_values"), mask, prompt)
        self._here.running = _Running(call)

    def _after_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        running = self._here.running
        if running is None:
            return
        returned = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
        if self._here.prompt is None:
            given = self._given(args, kwargs).get("past_key_values")
            self._tracker.remember((given, *returned), running.call)
        node = next((one.grad_fn for one in returned if isinstance(one, torch.Tensor)), None)
        if node is not None:
            if self._ran_again:
                self._with_graph.clear()
                self._ran_again = False
            metadata: Any = node.metadata
            metadata[self] = kept = replace(running)  # which lives as long as the graph
            self._with_graph.add(kept)

    def _running(self) -> _Running:
        """The forward call whose layers run. With gradient checkpointing `backward` runs them again, maybe in a thread
        of autograd's: then the one call that can be meant.
        """
        running = self._here.running
        if running is not None and running.backward == torch._C._current_graph_task_id():
            return running
        if torch._C._current_graph_task_id() == -1:
            raise LaaiError("a layer was called without its decoder, or in another thread: its tokens are not known")
        alive = list(self._with_graph)
        if len(alive) != 1:
            raise LaaiError(
                "with gradient checkpointing, expected one backward after each forward call, inside laai.apply, and "
                "other calls under torch.no_grad(): which call's layers run again is not known"
            )
        self._ran_again = True
        return alive[0]

    def _edit_input(self, layer: int, site: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._edited(args[0], layer, site), *args[1:])

    def _edit_output(self, layer: int, site: str, module: nn.Module, args: Any, output: Any) -> Any:
        return with_hidden(output, self._edited(hidden_of(output), layer, site))

    def _where(self, edit: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and columns of the current call that one edit changes, on `device`."""
        running = self._running()
        key = (edit, device)
        if key not in running.hits:
            batch = len(running.call.ordinals)
            if self._row_edits is None:
                rows = torch.arange(batch, device="cpu")
            else:
                rows = (repeated(self._row_edits, batch) == edit).nonzero().squeeze(1)
            row, column = running.call.hits(self._edits[edit].position, rows)
            running.hits[key] = row.to(device), column.to(device)
        return running.hits[key]

    def _edited(self, x: torch.Tensor, layer: int, site: str) -> torch.Tensor:
        """x [B, T, D] with every edit of this layer and site; x itself when nothing is to change."""
        shape, tokens = x.shape, self._running().call.ordinals.shape
        if x.ndim == 2:  # some feed-forwards (OPT's) flatten all rows into one
            x = x.view(*tokens, -1) if len(x) == tokens.numel() else x
        for index, edit in enumerate(self._edits):
            if edit.site != site or layer not in edit.vectors:
                continue
            rows, columns = self._where(index, x.device)
            if not len(rows):
                continue
            add = edit.operation == "add"
            vector = self._vector(index, layer, site, x) if add else edit.vectors[layer].to(x.device)
            expected = [*tokens, vector.shape[-1]]
            if list(x.shape) != expected or isinstance(x, DTensor):
                raise LaaiError(
                    f"layer {layer}, site {site}: the activation is a {type(x).__name__} of shape {list(x.shape)}, "
                    f"expected a whole one of shape {expected}: the model is sharded in a way that cannot be edited"
                )
            if add:
                values = vector[rows] if vector.ndim == 2 else vector.expand(len(rows), -1)
                x = x.index_put((rows, columns), values, accumulate=True)
            else:
                x = x.index_put((rows, columns), icv_step(x[rows, columns], vector, edit.step))
        return x.view(shape)

    def _vector(self, index: int, layer: int, site: str, x: torch.Tensor) -> torch.Tensor:
        """The vector in the activation's dtype, on its device: cast once per device, unless it is being trained. Under
        tensor parallelism the slice of it that belongs to the activation's.

        Under autocast the activation's dtype differs from the model's.
        """
        key = (index, layer, x.device, x.dtype)
        if key not in self._cast:
            vector = self._edits[index].vectors[layer].to(x.device)
            if x.shape[-1] < vector.shape[-1]:
                vector = self._layout.own_slice(vector, layer, site)
            if vector.requires_grad:
                return vector.to(x.dtype)
            self._cast[key] = vector.to(x.dtype)
            if not bool(torch.isfinite(self._cast[key]).all()):
                raise LaaiError(f"layer {layer}: the intervention's vector is infinite in the activation's {x.dtype}")
        return self._cast[key]


def icv_step(x: torch.Tensor, vector: torch.Tensor, step: float) -> torch.Tensor:
    """The rule of in-context vectors (Liu et al. 2023, as their code has it) on x [n, hidden].

    y = step * (1 + max(0, cos(x, -v))) * v / |v|;  x' = |x| * normalize(normalize(x) + y), computed in float32.
    """
    x32 = x.float()
    direction = nn.functional.normalize(vector.float(), dim=-1)
    unit = nn.functional.normalize(x32, dim=-1)
    pull = step * (1 + (unit @ -direction).clamp_min(0)).unsqueeze(-1) * direction
    return (x32.norm(dim=-1, keepdim=True) * nn.functional.normalize(unit + pull, dim=-1)).to(x.dtype)


def _checked(prompt_lengths: Sequence[int]) -> torch.Tensor:
    """Prompt lengths [R]; LaaiError for other than positive whole numbers."""
    try:
        lengths = torch.as_tensor(prompt_lengths, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        lengths = torch.tensor(0, device="cpu")
    if lengths.ndim != 1 or not len(lengths) or lengths.is_floating_point() or int(lengths.min()) < 1:
        raise LaaiError(f"prompt_lengths is {prompt_lengths!r:.60}: expected a positive whole number per row")
    return lengths.long()


def _distinct(rows: Edit | Sequence[Edit | None]) -> tuple[list[Edit], torch.Tensor | None]:
    """The distinct edits, and each row's index among them (-1: untouched), or None when one edit is for all rows."""
    if isinstance(rows, Edit):
        return [rows], None
    edits = list(dict.fromkeys(edit for edit in rows if edit is not None))
    numbers = [-1 if edit is None else edits.index(edit) for edit in rows]
    return edits, torch.tensor(numbers, dtype=torch.long, device="cpu")


def _packed(given: Mapping[str, Any]) -> bool:
    """Whether a forward call without a mask has several prompts in a row."""
    if given.get("cu_seq_lens_q") is not None:
        return True
    positions = given.get("position_ids")
    if positions is None or positions.ndim != 2:
        return False
    # Rows that begin at another number than 0 may have padding on the left, which transformers numbers 0 or 1.
    begins_again = (positions[:, 1:] == 0) & (positions[:, :-1] > 0) & (positions[:, :1] == 0)
    return bool(begins_again.any())


def _refuse_packing(*ignored: Any, **named: Any) -> None:
    raise LaaiError("got several prompts packed in a row (continuous batching, flattened batches): expected one a row")


def _setting(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """A setting as `generate` finds it: among its arguments, in its generation_config, or in the model's."""
    if name in kwargs:
        return kwargs[name]
    configs = (*args[1:2], kwargs.get("generation_config"), getattr(model, "generation_config", None))
    return _first(*(getattr(config, name, None) for config in configs))


def _first(*values: Any) -> Any:
    """The first that is given, or None."""
    return next((value for value in values if value is not None), None)


def _prompt_mask(setting: Callable[[str], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """[R, P] mask of the prompt given to `generate`: 1 for tokens, 0 for padding. LaaiError when unknown."""
    prompt = _first(kwargs.get("input_ids"), *args[:1], kwargs.get("inputs"), kwargs.get("inputs_embeds"))
    if prompt is None:
        raise LaaiError("generate was called without a prompt: pass input_ids")
    mask = kwargs.get("attention_mask")
    if mask is not None:
        return mask.cpu().ne(0).long()
    pad, eos = setting("pad_token_id"), setting("eos_token_id")
    ends = eos if isinstance(eos, list | tuple) else [eos]
    if prompt.ndim == 2 and pad is not None and pad not in ends and bool((prompt == pad).any()):
        # transformers would guess the mask here; a guess must not decide where the vector goes.
        raise LaaiError("generate got padding tokens without attention_mask: pass the mask")
    return torch.ones(prompt.shape[:2], dtype=torch.long, device="cpu")
