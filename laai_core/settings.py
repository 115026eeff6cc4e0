"""The settings of a training: default, range and help of each are in its field, and flags are made of the fields."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from laai_core.encode import WHITESPACE, Whitespace
from laai_core.errors import LaaiError
from laai_core.example import Example
from laai_core.intervention import Intervention
from laai_core.numeric import real, whole
from laai_core.optimize import OPTIMIZERS, OptimizerName
from laai_core.words import POSITIONS, SITES, Site

PenaltyScale = Literal["relative", "absolute"]
PENALTY_SCALES: tuple[PenaltyScale, ...] = get_args(PenaltyScale)
ForwardName = Literal["auto", "plain", "replay", "captured"]
StartName = Literal["icl", "zero"]

# A value is converted first: no file takes NumPy's numbers, and they widen tensors.
_COUNT = {"number": whole, "fits": lambda n: (n or 0) >= 1, "expected": "at least one, a whole number"}
_WEIGHT = {"number": real, "fits": lambda x: 0 <= x < 1e30, "expected": "a finite number, 0 to 1e30"}
_POSITIVE = {"number": real, "fits": lambda x: 0 < x < math.inf, "expected": "a finite number above 0"}


def _setting(default: Any, text: str, **limits: Any) -> Any:
    return field(default=default, metadata={"help": text, **limits})


def check(kind: type, **values: Any) -> dict[str, Any]:
    """The values as Python's own. LaaiError for one outside the range of its field in `kind` (Settings or Job)."""
    for one in fields(kind):
        value, limits = values.get(one.name, one.default), one.metadata
        if value is one.default or isinstance(value, Intervention):  # a start may be an Intervention
            continue
        if value not in limits.get("choices", (value,)):
            raise LaaiError(f"unknown {one.name} {value!r}: expected one of {', '.join(limits['choices'])}")
        number = limits["number"](value) if "number" in limits else value
        if "fits" in limits and not limits["fits"](number):
            raise LaaiError(f"{one.name} is {value!r:.60}: expected {limits['expected']}")
        values[one.name] = number
    return values


@dataclass(frozen=True)
class Settings:
    """Settings shared by all jobs of one `train_many`. Raises LaaiError for a value out of range.

    The penalty scale `absolute` penalises Δ itself, as the paper does. `relative` writes Δ = rms * x and penalises x,
    rms being the root mean square of the site's activation at the last prompt tokens, so that one setting fits any
    model. Exactly `steps` evaluations are made, unless `tolerance` is met or `prox` stops progressing in float32.
    """

    steps: int = _setting(100, "optimisation steps, each one loss and gradient", **_COUNT)
    tolerance: float | None = _setting(
        None, "stop early, at this share of the first stationarity residual", **_POSITIVE
    )
    batch_size: int | None = _setting(None, "rows per forward; default all. Changes memory, not the result", **_COUNT)
    projection: str | None = _setting(
        None, "module path of the attention output projection, {} for the layer's number"
    )
    penalty_scale: PenaltyScale = _setting(
        "relative", "whether penalties are relative to the size of the activation", choices=PENALTY_SCALES
    )
    optimizer: OptimizerName = _setting(
        "prox", "prox: proximal gradient, exact zeros; adam: no exact zeros", choices=OPTIMIZERS
    )
    forward: ForwardName = _setting(
        "auto",
        "plain: full forwards; replay: only what depends on the vector, the same result faster; captured: a replay "
        "whose operations are recorded once, on a GPU as a CUDA graph; auto: a replay where the model allows one",
        choices=get_args(ForwardName),
    )
    whitespace: Whitespace = _setting(
        "refuse",
        "a prompt that ends in whitespace; loglikelihood: the whitespace goes to the target, generation: it stays, "
        "each as the harness does for such requests",
        choices=WHITESPACE,
    )
    stop: str = _setting(
        "\n",
        "appended to every target, so that generation ends where the answer ends",
        fits=lambda value: isinstance(value, str),
        expected="text, which may be empty",
    )
    site: Site = _setting("heads", "the activation that the vector is added to", choices=SITES)
    position: str = _setting(
        "last",
        "the tokens it is added to; last: the prompt's last, generated: that and all generated ones, all: every token "
        "(generated and all run full forwards)",
        choices=POSITIONS,
    )

    def __post_init__(self) -> None:
        vars(self).update(check(Settings, **vars(self)))
        if self.position != "last" and self.must_replay:
            raise LaaiError(f"position {self.position} cannot be replayed: expected forward auto or plain")

    @property
    def must_replay(self) -> bool:
        """Whether full forwards are no way out for a model that cannot be replayed."""
        return self.forward in ("replay", "captured")


@dataclass(frozen=True)
class Job:
    """One vector to train: its examples, its layer (0-based, negative from the end) and its own settings.

    Raises LaaiError for a value out of range and for no examples. Training draws no random numbers: `seed`, which drew
    the examples, and `task` are recorded in the file.
    """

    examples: Sequence[Example]
    layer: int
    l1: float = _setting(0.0001, "weight of the sum of absolute values, the paper's gamma", **_WEIGHT)
    group: float = _setting(0.0001, "weight of the sum of the heads' norms, the paper's lambda", **_WEIGHT)
    lr: float = _setting(0.05, "learning rate of adam; prox finds its own step sizes", **_POSITIVE)
    seed: int = field(
        default=0, metadata={"number": whole, "fits": lambda n: n is not None, "expected": "a whole number"}
    )
    task: str | None = field(default=None, metadata={"fits": lambda s: isinstance(s, str), "expected": "a name"})
    start: StartName | Intervention | None = _setting(
        None,
        "where training begins: icl, the mean difference that the other examples as a few-shot prompt make to the "
        "activation, or zero, the paper's; default: icl where there are at least two examples",
        choices=get_args(StartName),
    )

    def __post_init__(self) -> None:
        if not isinstance(self.examples, Iterable):
            raise LaaiError(f"examples: got a {type(self.examples).__name__}, expected Examples, as split.train has")
        # The class is frozen; a generator of examples runs once.
        vars(self).update(check(Job, **vars(self) | {"examples": tuple(self.examples)}))
        if isinstance(self.start, Intervention):
            self.start.to_bytes()  # LaaiError now, not when the identity is recorded at the training's end
        strange = [type(one).__name__ for one in self.examples if not isinstance(one, Example)]
        if strange or not self.examples:
            raise LaaiError(f"examples: got {strange[0] if strange else 'none'}, expected at least one Example")

    @property
    def begin(self) -> StartName | Intervention:
        """`start`, or its default."""
        if self.start is None:
            return "icl" if len(self.examples) > 1 else "zero"
        return self.start
