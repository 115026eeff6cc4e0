"""Find decoder blocks, attention output projections and feed-forward modules by structure, never by model name.

The rule reads the module tree only: the decoder's module list of length `num_hidden_layers`, each block's attention
child, and the attention's one output projection. Widths come from the modules, never from the config: several
families have heads x head_dim != hidden_size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DeviceMesh, DTensor, Replicate, Shard
from transformers.pytorch_utils import Conv1D

from laai_core.errors import LaaiError
from laai_core.hooks import recorded
from laai_core.numeric import layer_number
from laai_core.words import SITES

if TYPE_CHECKING:  # importing transformers takes a second
    from transformers import PreTrainedModel

_ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
_PROJECTION_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "wo", "Wo", "attention_out")
# OPT has no feed-forward module; the output of its last feed-forward layer `fc2` is the same tensor.
_FEED_FORWARD_NAMES = ("mlp", "ffn", "feed_forward", "feedforward", "block_sparse_moe", "fc2")


@dataclass(frozen=True)
class Layout:
    """Modules and sizes of a causal language model that interventions need. Made by `locate`."""

    model: PreTrainedModel  # the causal LM itself, without a PEFT wrapper
    decoder: nn.Module  # its forward receives the tokens, the mask and the cache
    blocks: tuple[nn.Module, ...]
    projections: tuple[nn.Module | str, ...]  # per layer: the module, or the error message if none
    num_heads: int
    hidden_size: int
    virtual_tokens: int  # PEFT prompt learning puts this many in front of every row

    @cached_property
    def paths(self) -> dict[nn.Module, str]:
        """The path of every module of the model."""
        return {module: path for path, module in self.model.named_modules()}

    @cached_property
    def around(self) -> list[nn.Module]:
        """The modules between the model and its decoder, from the outside in: those of a multimodal model."""
        parts = self.paths[self.decoder].split(".")
        return [self.model.get_submodule(".".join(parts[:count])) for count in range(1, len(parts))]

    @property
    def device(self) -> torch.device:
        """Device of the input embedding; the CPU if offloaded, because accelerate then moves the inputs."""
        embedding: Any = self.model.get_input_embeddings()
        return torch.device("cpu") if embedding.weight.is_meta else embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations."""
        return self.model.dtype

    @property
    def is_half(self) -> bool:
        """Whether activations have 16 bits, so that what should be equal differs by more than float32 rounds."""
        return self.dtype.itemsize < 4

    @property
    def max_positions(self) -> int | None:
        """The most tokens of a text by the configuration (`max_position_embeddings`); None if not given."""
        return getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)

    @property
    def vocabulary(self) -> int | None:
        """The number of the model's tokens: of its embeddings, of which a slice may be here, or by its configuration,
        whichever is larger. None if neither is known.
        """
        weight = getattr(self.model.get_input_embeddings(), "weight", None)
        sizes = [getattr(self.model.config.get_text_config(decoder=True), "vocab_size", None)]
        sizes += [len(weight)] if isinstance(weight, torch.Tensor) else []
        return max((size for size in sizes if size is not None), default=None)

    def layer(self, index: int) -> int:
        """`index` counted from the front, or LaaiError when the model has no such layer."""
        return layer_number(index, len(self.blocks))

    def having(self, site: str) -> list[int]:
        """The layers that have a site: hybrid models have blocks without attention. LaaiError where none has it."""
        found = [n for n, one in enumerate(self.projections) if site != "heads" or not isinstance(one, str)]
        if not found:
            self.module(0, site)
        return found

    def module(self, layer: int, site: str) -> nn.Module:
        """The module to hook: `heads` is its input, `residual` and `mlp` are its output. LaaiError if it has none."""
        layer = self.layer(layer)
        if site == "heads":
            projection = self.projections[layer]
            if isinstance(projection, str):
                raise LaaiError(projection)
            return projection
        if site == "residual":
            return self.blocks[layer]
        if site == "mlp":
            return _feed_forward(self.blocks[layer], layer)
        raise LaaiError(f"unknown site {site!r}: expected one of {', '.join(SITES)}")

    def shape(self, layer: int, site: str) -> tuple[int, ...]:
        """Shape of a vector at the site: (H, d) for `heads`, (hidden,) for `residual` and `mlp`."""
        if site != "heads":
            self.module(layer, site)
            return (self.hidden_size,)
        return (self.num_heads, widths(self.module(layer, site))[0] // self.num_heads)

    def own_slice(self, vector: torch.Tensor, layer: int, site: str) -> torch.Tensor:
        """The part of a site's vector [..., D] that this process's slice of the activation takes, where tensor
        parallelism splits the site; else the vector. Its gradient is gathered from all processes.
        """
        mesh = _slices(self.module(layer, site)) if site == "heads" else None
        if mesh is None:
            return vector
        whole = DTensor.from_local(vector, mesh, [Replicate()], run_check=False)
        return whole.redistribute(placements=[Shard(vector.ndim - 1)]).to_local()

    def whole(self, activation: torch.Tensor, layer: int, site: str) -> torch.Tensor:
        """A site's activation [..., D], gathered from all processes where each has a slice of it."""
        width = torch.Size(self.shape(layer, site)).numel()
        mesh = _slices(self.module(layer, site)) if activation.shape[-1] < width else None
        if mesh is None:
            return activation
        slices = [Shard(activation.ndim - 1)]
        return DTensor.from_local(activation.to(mesh.device_type), mesh, slices, run_check=False).full_tensor()


def locate(model: PreTrainedModel, projection: str | None = None) -> Layout:
    """Describe `model`'s blocks and sites.

    Args:
        model: a causal language model of transformers, or a PeftModel around one.
        projection: module path of the output projection with `{}` for the layer, for architectures that
            do not follow the common pattern; e.g. "model.layers.{}.self_attn.o_proj".

    Raises:
        LaaiError: when it is not such a model, or when none or several modules fit; names those considered.
    """
    virtual_tokens = 0
    if hasattr(model, "get_base_model"):
        adapted: Any = model  # a PeftModel, a type of a package that the core does not import
        if getattr(adapted.active_peft_config, "alora_invocation_tokens", None):
            raise LaaiError(
                "the adapter is an activated LoRA, which looks for its invocation tokens in every call, and not in a "
                "cache: expected another kind of adapter"
            )
        if adapted.active_peft_config.is_prompt_learning:
            virtual_tokens = adapted.active_peft_config.num_virtual_tokens
        model = adapted.get_base_model()
    if not (hasattr(model, "config") and hasattr(model, "named_modules")):
        raise LaaiError(f"expected a transformers model, got {type(model).__name__}")
    config = model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False):
        raise LaaiError(f"{type(model).__name__} is an encoder-decoder: expected a causal (decoder-only) model")
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise LaaiError(f"{type(model).__name__} has no language-model head: expected a causal language model")
    described = describe(model, config, projection)
    _refuse_sharded(model, described["blocks"])
    return Layout(model, virtual_tokens=virtual_tokens, **described)


def describe(model: nn.Module, config: Any, projection: str | None = None) -> dict[str, Any]:
    """Decoder, blocks, projections and sizes of a Layout, read off the module tree and the text model's config."""
    decoder, blocks = _find_blocks(model, config.num_hidden_layers)
    heads, hidden = _number_of_heads(model, config, blocks[0]), config.hidden_size
    if projection is None:
        projections = tuple(_find_projection(block, i, heads, hidden) for i, block in enumerate(blocks))
    else:
        projections = tuple(_named_projection(model, projection, i, heads) for i in range(len(blocks)))
    return {
        "decoder": decoder,
        "blocks": blocks,
        "projections": projections,
        "num_heads": heads,
        "hidden_size": hidden,
    }


def verify_causal(layout: Layout) -> None:
    """One dry forward over two rows that differ in their second token only.

    Raises:
        LaaiError: when the first position sees the second token (the model is not causal), or when an output
            projection does not run exactly once (a hook there would miss, or act twice).
    """
    projections = {i: module for i, module in enumerate(layout.projections) if isinstance(module, nn.Module)}
    with torch.no_grad(), recorded(projections, keep=lambda x: None, inputs=True) as calls:
        logits = layout.model(torch.tensor([[1, 1], [1, 2]], device=layout.device)).logits[:, 0].float()
    name = type(layout.model).__name__
    # On a causal model the two rows differ only by the rounding of quantised and half-precision layers.
    tolerance = 1e-3 if layout.is_half else 1e-5
    if (logits[0] - logits[1]).abs().max() > tolerance * logits.abs().max():
        raise LaaiError(f"{name}'s first position sees later tokens: expected a causal language model")
    for i, seen in calls.items():
        if len(seen) != 1:
            raise LaaiError(f"{name}: layer {i}'s output projection ran {len(seen)} times in a forward, expected once")


def require_gradients(layout: Layout) -> None:
    """LaaiError where torch computes no gradients with the model's weights."""
    if torch.is_inference_mode_enabled():
        raise LaaiError("training needs gradients, which torch.inference_mode has not: expected a call outside of it")
    if any(parameter.is_inference() for parameter in layout.model.parameters()):
        raise LaaiError("the model was made within torch.inference_mode: expected one loaded outside of it")


def _find_blocks(model: Any, count: int) -> tuple[nn.Module, tuple[nn.Module, ...]]:
    """The innermost module around the decoder blocks that receives the tokens, and the blocks."""
    # get_decoder() first: it skips vision towers. For a few model types it is wrong, so larger modules follow.
    roots = [model.get_decoder()] if hasattr(model, "get_decoder") else []
    found: list[str] = []
    for root in [*roots, getattr(model, "base_model", model), model]:
        lists = [(n, m) for n, m in root.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
        paths = [n for n, _ in lists]
        top = [(n, m) for n, m in lists if not any(n.startswith(other + ".") for other in paths)]
        if len(top) == 1:
            path, blocks = top[0]
            owner = path.rpartition(".")[0]
            while owner and not _takes_tokens(root.get_submodule(owner)):  # BERT's relatives have an `encoder` between
                owner = owner.rpartition(".")[0]
            return root.get_submodule(owner), tuple(blocks)
        found += [n for n, _ in top]
    lengths = [f"{n} ({len(m)})" for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    raise LaaiError(
        f"{type(model).__name__}: expected one module list of {count} decoder blocks, "
        f"found {found or 'none'}; module lists: {', '.join(lengths[:12]) or 'none'}"
    )


def _number_of_heads(model: nn.Module, config: Any, block: nn.Module) -> int:
    """The attention's number of query heads; state-space and recurrent models have none."""
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int) or heads < 1:
        linears = _quoted(n for n, m in block.named_modules() if _is_linear(m))
        raise LaaiError(
            f"{type(model).__name__} has no attention heads: expected num_attention_heads in its config and an "
            f"attention output projection in each block; num_attention_heads is {heads!r:.40}, "
            f"linear modules in layer 0: {linears}"
        )
    return heads


def _refuse_sharded(model: PreTrainedModel, blocks: Iterable[nn.Module]) -> None:
    """LaaiError for layers that are sharded otherwise than by transformers' tensor parallelism over all processes."""
    tp_size = getattr(model, "_tp_size", None) or 1  # set by transformers, whose plans do not all leave DTensors
    sharded = tp_size > 1 or any(isinstance(p, DTensor) for block in blocks for p in block.parameters())
    if sharded and not 1 < tp_size == torch.distributed.get_world_size():
        raise LaaiError(
            f"{type(model).__name__} is sharded inside its layers otherwise than by tensor parallelism over all "
            f"processes: load it with tp_plan='auto' under torchrun, or spread whole layers with device_map"
        )


def _slices(module: nn.Module) -> DeviceMesh | None:
    """The processes that each hold a slice of a linear module's input width (tensor parallelism), or None."""
    weight: Any = getattr(module, "weight", None)
    split = isinstance(weight, DTensor) and weight.placements == (Shard(weight.ndim - 1),)
    return weight.device_mesh if split else None


def _takes_tokens(module: nn.Module) -> bool:
    return "input_ids" in inspect.signature(module.forward).parameters


def _find_projection(block: nn.Module, layer: int, heads: int, hidden: int) -> nn.Module | str:
    """The attention output projection of one block, or the error message if there is none.

    Not an exception, because hybrid models have blocks with and without attention.
    """
    attentions = [(n, m) for n, m in block.named_children() if n in _ATTENTION_NAMES]
    found = [
        (f"{name}.{leaf}", module)
        for name, attention in attentions
        for leaf, module in attention.named_modules()
        if leaf.rpartition(".")[2] in _PROJECTION_NAMES and _is_linear(module)
    ]
    if len(found) == 1:
        path, module = found[0]
        width, output = widths(module)
        if output == hidden and width % heads == 0:
            return module
        reason = f"{path} maps {width} to {output}, expected a multiple of {heads} to {hidden}"
    else:
        reason = f"{len(found)} output projections fit {_quoted(n for n, _ in found)}"
    linears = _quoted(n for n, m in block.named_modules() if _is_linear(m))
    return (
        f"no attention output projection found in layer {layer}: {reason}; linear modules there: {linears}; "
        f"name it with projection='path.to.layers.{{}}.its.module'"
    )


def _named_projection(model: nn.Module, path: str, layer: int, heads: int) -> nn.Module | str:
    """The projection at the user's own module path."""
    if not isinstance(path, str) or "{}" not in path:  # the harness makes a number of projection=7
        raise LaaiError(f"projection={path!r}: expected a module path with {{}} where the layer's number goes")
    name = path.replace("{}", str(layer))
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return f"projection={path!r}: the model has no module {name!r}"
    if not _is_linear(module) or widths(module)[0] % heads:
        return f"projection={path!r}: {name} is no linear module whose input splits into {heads} heads"
    return module


def _feed_forward(block: nn.Module, layer: int) -> nn.Module:
    found = [(n, m) for n, m in block.named_children() if n in _FEED_FORWARD_NAMES]
    if len(found) != 1:
        children = _quoted(n for n, _ in block.named_children())
        raise LaaiError(f"layer {layer} has {len(found)} feed-forward modules, expected one; its children: {children}")
    return found[0][1]


# A linear module's attributes for its widths: torch's, and vLLM's (of all ranks together, where it is sharded).
_WIDTHS = (("in_features", "out_features"), ("input_size", "output_size"))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, Conv1D) or any(all(hasattr(module, name) for name in names) for names in _WIDTHS)


def widths(module: Any) -> tuple[int, int]:
    """Widths of a linear module's input and output. A quantised layer packs its weight, whose shape says nothing."""
    if isinstance(module, Conv1D):
        width, output = module.weight.shape
        return width, output
    first, second = next(names for names in _WIDTHS if hasattr(module, names[0]))
    return getattr(module, first), getattr(module, second)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
