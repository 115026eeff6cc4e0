"""One training or test example."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

from laai_core.errors import LaaiError

# Published distributions are rounded; a sum further from 1 is a mistake.
SUM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Example:
    """A prompt with its answer.

    Either `target` (the text that continues the prompt, for the task loss `nll`), or `options` (K answer texts) with
    `distribution` (K probabilities, the humans' answers, for the task loss `kl`). Sequences are stored as tuples.
    `rendering`: how the prompt was made (template, chat template, system instruction), if known. Training records the
    rendering in the file's metadata; equality and hash ignore it.

    Raises LaaiError, naming the prompt, when neither or both are given, or when options and distribution do not match.
    """

    prompt: str
    target: str | None = None
    options: Sequence[str] | None = None
    distribution: Sequence[float] | None = None
    rendering: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    @property
    def answer(self) -> str:
        """The target, or the option with the largest share: the text that solves the example in a few-shot prompt."""
        if self.target is not None:
            return self.target
        assert self.options is not None and self.distribution is not None
        return self.options[max(range(len(self.options)), key=self.distribution.__getitem__)]

    def behind(self, shots: Sequence[Example]) -> str:
        """The harness's few-shot prompt: `shots` solved, in order, each before a blank line, then the prompt."""
        return "".join(f"{shot.prompt}{shot.answer}\n\n" for shot in shots) + self.prompt

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise LaaiError(f"Example: prompt is {self.prompt!r}; expected non-empty text")
        if self.target is not None:
            self._check_target()
        elif self.options is not None and self.distribution is not None:
            self._check_distribution(self._listed("options"), self._listed("distribution"))
        else:
            self._refuse("got neither a target nor options with a distribution", "one of the two")

    def _check_target(self) -> None:
        if self.options is not None or self.distribution is not None:
            self._refuse("got a target together with options or a distribution", "one of the two")
        if not isinstance(self.target, str) or not self.target.strip():
            self._refuse(f"target is {self.target!r}", "non-empty text")

    def _listed(self, name: str) -> tuple[Any, ...]:
        """The entries of `options` or `distribution`, whatever they came in; a generator gives them once."""
        value = getattr(self, name)
        if not isinstance(value, str | set | frozenset | Mapping):  # a set has no order
            with suppress(TypeError):
                return tuple(value)
        self._refuse(f"{name} is {value!r:.60}", "a list")

    def _check_distribution(self, options: tuple[Any, ...], distribution: tuple[Any, ...]) -> None:
        if len(options) < 2 or not all(isinstance(o, str) and o.strip() for o in options):
            self._refuse(f"options are {options!r}", "two or more non-empty texts")
        if len(set(options)) != len(options):
            self._refuse(f"options {options!r} repeat one another", "distinct texts")
        if len(distribution) != len(options):
            self._refuse(f"{len(distribution)} probabilities for {len(options)} options", "one probability an option")
        try:
            shares = tuple(float(p) for p in distribution)
        except (TypeError, ValueError, OverflowError):
            shares = (math.nan,)
        if not all(math.isfinite(p) and p >= 0 for p in shares):
            self._refuse(f"distribution is {distribution!r}", "finite numbers, none below 0")
        if abs(sum(shares) - 1) > SUM_TOLERANCE:
            self._refuse(f"distribution sums to {sum(shares):g}", "1")
        # Tuples: hashable, and no caller can change them. object.__setattr__, because the class is frozen.
        object.__setattr__(self, "options", options)
        object.__setattr__(self, "distribution", shares)

    def _refuse(self, found: str, expected: str) -> NoReturn:
        raise LaaiError(f"Example with prompt {self.prompt!r:.60}: {found}; expected {expected}")
