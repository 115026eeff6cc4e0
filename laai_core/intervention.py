"""Intervention: vectors at one site of one or more layers, with arithmetic, checks, and a file format."""

from __future__ import annotations

import copy
import hashlib
import math
import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat

import torch

from laai_core import files, storage
from laai_core.errors import LaaiError
from laai_core.numeric import layer_number, real, whole
from laai_core.words import OPERATIONS, POSITIONS, SITES

if TYPE_CHECKING:
    from laai_core.locate import Layout

# Metadata about the model; a sum of two interventions keeps those entries on which both agree.
_MODEL_KEYS = ("base_model", "model_type", "num_hidden_layers", "num_attention_heads", "head_dim", "hidden_size")


class Intervention:
    """Vectors to write into a frozen model: {layer: vector} at one site, position and operation.

    Not to be changed, but for entries of `metadata`: operations return new ones.

    Args:
        vectors: layer (negative counts from the end) to tensor: [H, d], or [H * d] together with `head_dim`, at
            `heads`; [hidden] at `residual` and `mlp`. Kept as float32 on the CPU.
        site: `heads` (input of the attention output projection), `residual` (output of the block) or `mlp`.
        position: `last` (last prompt token), `generated` (that and all after it) or `all` (no padding).
        head_dim: d, width of one head.
        scale: factor applied to every vector when it is applied.
        operation: `add`, or `icv` (the norm-preserving rule of in-context vectors; scale is its step).
        metadata: JSON-able facts: base_model, task, method, training, ...

    Raises:
        LaaiError: on an unknown word, a wrong shape, no layer at all, or a NaN or infinite entry.
    """

    site: str
    position: str
    operation: str
    scale: float
    metadata: dict[str, Any]
    _vectors: dict[int, torch.Tensor]

    def __init__(
        self,
        vectors: Mapping[int, torch.Tensor],
        site: str = "heads",
        position: str = "last",
        head_dim: int | None = None,
        scale: float = 1.0,
        operation: str = "add",
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        vars(self).update(site=site, position=position, operation=operation, scale=finite(scale))
        for word, allowed in (("site", SITES), ("position", POSITIONS), ("operation", OPERATIONS)):
            if getattr(self, word) not in allowed:
                raise LaaiError(f"unknown {word} {getattr(self, word)!r:.60}: expected one of {', '.join(allowed)}")
        if not isinstance(vectors, Mapping):
            raise LaaiError(f"vectors are a {type(vectors).__name__}: expected {{layer: tensor}}")
        if not vectors:
            raise LaaiError("an intervention needs at least one layer, got none")
        if head_dim is not None and (whole(head_dim) or 0) < 1:
            raise LaaiError(f"head_dim is {head_dim!r:.60}: expected a whole number, at least 1")
        checked = {layer_number(layer): _checked(v, layer, site, head_dim) for layer, v in vectors.items()}
        vars(self).update(metadata=copy.deepcopy(dict(metadata or {})), _vectors=dict(sorted(checked.items())))

    def __setattr__(self, name: str, value: Any) -> None:
        if type(self) is not Intervention and name not in Intervention.__annotations__:  # a subclass's own
            return super().__setattr__(name, value)
        instead = "rescaled(factor) gives one of another scale" if name == "scale" else "make a new Intervention"
        raise LaaiError(f"an Intervention's {name} is not to be changed: {instead}")

    @classmethod
    def load(cls, source: str | Path, local_files_only: bool = False) -> Intervention:
        """Read a file written by `save`. Checks everything before returning; LaaiError names the fault.

        Args:
            source: a file, or `org/repo[:file][@revision]` on the Hugging Face Hub (an existing path wins).
            local_files_only: use the Hub's cache only, no network.
        """
        from laai_core.hub import local_file  # huggingface_hub, which nothing else in the flat core needs

        path = local_file(source, local_files_only)
        arguments = storage.read(path)
        try:
            loaded = cls(**arguments)
            loaded._resolved(loaded.metadata.get("num_hidden_layers"))
            return loaded
        except LaaiError as error:
            raise LaaiError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write one .safetensors file (see `laai_core.storage`), atomically. Equal content gives equal bytes."""
        files.write(Path(path).expanduser(), self.to_bytes())

    def to_bytes(self) -> bytes:
        """The bytes of the file that `save` writes.

        Raises:
            LaaiError: when a layer is negative and the metadata does not say how many layers there are; when
                the metadata is no JSON.
        """
        vectors = self._resolved(self.metadata.get("num_hidden_layers"))
        return storage.encode(vectors, {key: getattr(self, key) for key in storage.ACT}, self.metadata)

    @property
    def layers(self) -> list[int]:
        """The layers that have a vector, in ascending order."""
        return list(self._vectors)

    @property
    def sha256(self) -> str:
        """Hex digest of the file's bytes: the identity of an intervention."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def vector(self, layer: int) -> torch.Tensor:
        """The unscaled float32 vector of one layer: [H, d] at `heads`, [hidden] elsewhere."""
        if layer not in self._vectors:
            raise LaaiError(f"the intervention has no layer {layer}: its layers are {self.layers}")
        return self._vectors[layer].clone()

    def rescaled(self, factor: float) -> Intervention:
        """The same vectors with `scale` multiplied: what the harness's `scale=` does, for every operation."""
        scale = self.scale * finite(factor)
        return Intervention(self._vectors, self.site, self.position, None, scale, self.operation, self.metadata)

    def for_model(self, layout: Layout) -> dict[int, torch.Tensor]:
        """{layer: vector, unscaled and flat [D]} with layers resolved and shapes checked against a model."""
        vectors = self._resolved(len(layout.blocks))
        for layer, vector in vectors.items():
            expected = layout.shape(layer, self.site)
            if tuple(vector.shape) != expected:
                raise LaaiError(
                    f"the intervention's vector at layer {layer}, site {self.site}, has shape "
                    f"{tuple(vector.shape)}, this model expects {expected}"
                )
            # `add` casts the vector to the model's dtype; `icv` computes in float32.
            dtype = layout.dtype if self.operation == "add" else torch.float32
            if not bool(torch.isfinite((vector * self.scale).to(dtype)).all()):
                name = str(dtype).removeprefix("torch.")
                raise LaaiError(
                    f"scale {self.scale:g} makes the intervention's vector at layer {layer} infinite in {name}"
                )
        return {layer: vector.flatten() for layer, vector in vectors.items()}

    def _resolved(self, num_layers: Any) -> dict[int, torch.Tensor]:
        resolved: dict[int, torch.Tensor] = {}
        count = num_layers if isinstance(num_layers, int) else None
        for layer, vector in self._vectors.items():
            if layer < 0 and count is None:
                raise LaaiError(f"layer {layer} counts from the end: count from 0 or set num_hidden_layers")
            layer = layer_number(layer, count)
            if layer in resolved:
                raise LaaiError(f"layer {layer} is given twice, once counted from the end")
            resolved[layer] = vector
        return dict(sorted(resolved.items()))

    # Arithmetic folds the scales into the vectors, so that equal results are equal objects.

    def __mul__(self, factor: Any) -> Intervention:
        imaginary = isinstance(factor, numbers.Complex) and not isinstance(factor, numbers.Real)
        if imaginary or not isinstance(factor, SupportsFloat):
            return NotImplemented
        factor = float(factor) if isinstance(factor, bool) else finite(factor)  # True and False switch a vector
        if self.operation != "add":
            raise LaaiError(f"operation {self.operation!r} is not linear: change its scale instead of multiplying it")
        return self._like({k: v * (self.scale * factor) for k, v in self._vectors.items()}, self.metadata)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Intervention:
        if not isinstance(divisor, SupportsFloat):
            return NotImplemented
        if real(divisor) == 0:
            raise LaaiError("an intervention cannot be divided by 0")
        return self * (1 / finite(divisor))

    def __neg__(self) -> Intervention:
        return self * -1.0

    def __add__(self, other: Intervention) -> Intervention:
        if not isinstance(other, Intervention):
            return NotImplemented
        for word in ("site", "position", "operation"):
            mine, theirs = getattr(self, word), getattr(other, word)
            if mine != theirs:
                raise LaaiError(f"cannot add interventions of different {word}: {mine!r} and {theirs!r}")
        left, right = self * 1.0, other * 1.0
        total = dict(left._vectors)
        for layer, vector in right._vectors.items():
            if layer in total and total[layer].shape != vector.shape:
                raise LaaiError(
                    f"cannot add vectors of different shapes at layer {layer}: "
                    f"{tuple(total[layer].shape)} and {tuple(vector.shape)}"
                )
            total[layer] = total[layer] + vector if layer in total else vector
        shared = {k: v for k, v in self.metadata.items() if k in _MODEL_KEYS and other.metadata.get(k) == v}
        return self._like(total, shared)

    def __radd__(self, other: Any) -> Intervention:
        """0 + self, with which `sum` begins."""
        return self * 1.0 if type(other) is int and other == 0 else NotImplemented

    def __sub__(self, other: Intervention) -> Intervention:
        return self + -other

    def _like(self, vectors: Mapping[int, torch.Tensor], metadata: Mapping[str, Any]) -> Intervention:
        return Intervention(vectors, self.site, self.position, operation=self.operation, metadata=metadata)

    def __repr__(self) -> str:
        shapes = {layer: tuple(v.shape) for layer, v in self._vectors.items()}
        return (
            f"Intervention({shapes}, site={self.site!r}, position={self.position!r}, "
            f"scale={self.scale:g}, operation={self.operation!r})"
        )


def finite(scale: Any) -> float:
    """A factor on an intervention's scale; LaaiError for anything but a finite number."""
    number = real(scale)
    if not math.isfinite(number):
        raise LaaiError(f"scale is {scale!r:.60}: expected a finite number")
    return number


def _checked(vector: torch.Tensor, layer: int, site: str, head_dim: int | None) -> torch.Tensor:
    if not isinstance(vector, torch.Tensor) or not vector.is_floating_point():
        found = vector.dtype if isinstance(vector, torch.Tensor) else type(vector).__name__
        raise LaaiError(f"layer {layer}: expected a floating-point tensor, got {found}")
    vector = vector.detach().to("cpu", torch.float32).contiguous().clone()
    shape = tuple(vector.shape)
    if site == "heads":
        if vector.ndim == 1:
            if head_dim is None:
                raise LaaiError(f"layer {layer}: a flat vector at site heads needs head_dim=, or give it as [H, d]")
            if vector.numel() % head_dim:
                raise LaaiError(f"layer {layer}: width {vector.numel()} does not split into heads of {head_dim}")
            vector = vector.view(-1, head_dim)
        elif vector.ndim != 2 or (head_dim is not None and shape[1] != head_dim):
            raise LaaiError(f"layer {layer}: expected [H, {head_dim or 'd'}] at site heads, got {list(shape)}")
    elif vector.ndim != 1:
        raise LaaiError(f"layer {layer}: expected [hidden] at site {site}, got {list(shape)}")
    if vector.numel() == 0:
        raise LaaiError(f"layer {layer}: the vector is empty")
    if not bool(torch.isfinite(vector).all()):
        raise LaaiError(f"layer {layer}: the vector has NaN or infinite entries")
    return vector
