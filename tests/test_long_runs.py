"""Many times over in one process, and two threads at once: nothing stays behind, nothing changes.

The bounds are several times what was measured over a thousand rounds (docs/reliability.md).
"""

from __future__ import annotations

import torch
from endurance import Cycles, Grown, Trainings, disturbances, grown, hooks
from tiny import tiny_model

import laai_core as laai

KIB = 1 << 10


def assert_nothing_left(found: Grown, python: int, resident: int) -> None:
    assert found.hooks == 0
    assert found.tensors <= 0
    assert found.python < python
    assert found.resident < resident


def test_applying_and_removing_leaves_nothing():
    cycles = Cycles()
    found = grown(cycles.model, cycles.once, 18)
    assert cycles.disturbed == 0
    assert_nothing_left(found, 64 * KIB, 4096 * KIB)


def test_trainings_leave_nothing():
    trainings = Trainings()
    found = grown(trainings.model, trainings.once, 10)
    assert trainings.changed == 0
    assert_nothing_left(found, 64 * KIB, 8192 * KIB)


def test_what_stays_behind_would_be_noticed():
    model = tiny_model("Llama")
    kept = []

    def leak(number: int) -> None:
        model.model.layers[0].register_forward_hook(lambda *_: None)
        kept.append(torch.zeros(10_000 + number))
        kept.append(bytes(10_000))

    found = grown(model, leak, 5)
    assert found.hooks == 15
    assert found.tensors == 5
    assert found.python > 5 * 10_000


def test_a_method_put_over_generate_counts_as_a_hook():
    model = tiny_model("Llama")
    iv = laai.Intervention({0: torch.ones(32)}, "residual")
    with laai.apply(model, iv):
        assert hooks(model) >= 3
    assert hooks(model) == 0


def test_two_models_in_two_threads_do_not_disturb_each_other():
    assert disturbances(rounds=3) == 0
