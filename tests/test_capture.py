"""A recorded step against the step itself, on every architecture and for other runs, and what cannot be recorded."""

from __future__ import annotations

import pytest
import torch
from test_apply import EVERY
from test_replay import ONE_TOKEN, RAGGED, SURVEY, TOKENIZER, rules, vectors
from tiny import tiny_model

import laai_core as laai
from laai_core.capture import Captured
from laai_core.encode import encode_examples
from laai_core.hooks import frozen
from laai_core.locate import locate
from laai_core.objective import Objective
from laai_core.products import Products
from laai_core.replay import ReplayForward


def both(model, examples, runs=None, batch_size=None, products=None):
    layout = locate(model)
    batch = encode_examples(TOKENIZER, examples, runs=runs)
    return [
        ReplayForward(layout, batch, 1, "heads", batch_size, products=products, captured=captured)
        for captured in (False, True)
    ]


@pytest.mark.parametrize("examples", [rules(RAGGED), SURVEY], ids=["nll", "kl"])
@pytest.mark.parametrize("name", EVERY)
def test_equals_the_step_at_other_vectors(name, examples):
    model = tiny_model(name)
    step, captured = both(model, examples)
    objective, delta = Objective(examples), vectors(name, 1)
    with frozen(model):
        for scale in (1.0, 0.0, -2.5):
            wanted, found = (forward.loss_and_gradient(scale * delta, objective, [0]) for forward in (step, captured))
            assert all(torch.allclose(*pair, rtol=1e-5, atol=1e-6) for pair in zip(wanted, found, strict=True))
        captured.loss_and_gradient(delta, objective, [0])


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_other_runs_and_objectives_are_recorded_anew(packed, batch_size, monkeypatch):
    monkeypatch.setattr("laai_core.products.SMALLEST", 0)
    sets = [rules(RAGGED), rules(RAGGED[:2]), rules(ONE_TOKEN + RAGGED[2:])]
    together = [e for examples in sets for e in examples]
    runs = [number for number, examples in enumerate(sets) for _ in examples]
    model = tiny_model("Llama")
    products = Products(locate(model), 1) if packed else None
    step, captured = both(model, together, runs, batch_size, products)
    deltas = vectors("Llama", 3)
    with frozen(model):
        for active in ([0, 1, 2], [0, 2], [0, 1, 2], [1]):
            for objective in (Objective(together), Objective(together)):
                wanted, found = (f.loss_and_gradient(deltas[active], objective, active) for f in (step, captured))
                assert all(torch.allclose(*pair, rtol=1e-5, atol=1e-6) for pair in zip(wanted, found, strict=True))


def test_the_models_code_runs_only_while_recording():
    model = tiny_model("Llama")
    _, captured = both(model, rules(RAGGED))
    objective, calls = Objective(rules(RAGGED)), []
    model.model.layers[2].register_forward_hook(lambda *args: calls.append(1))
    with frozen(model):
        captured.loss_and_gradient(vectors("Llama", 1), objective, [0])
        recorded = len(calls)
        for scale in (0.5, 2.0):
            captured.loss_and_gradient(scale * vectors("Llama", 1), objective, [0])
    assert recorded and len(calls) == recorded


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"optimizer": "adam", "steps": 5}])
def test_trains_the_vector_of_a_replay(options):
    model = tiny_model("Llama")
    replay, captured = (
        laai.train(model, TOKENIZER, rules(RAGGED), 1, forward=forward, **{"steps": 12} | options)
        for forward in ("replay", "captured")
    )
    assert torch.allclose(captured.intervention.vector(1), replay.intervention.vector(1), rtol=1e-4, atol=1e-5)
    assert [step.loss for step in captured.history] == pytest.approx([step.loss for step in replay.history], rel=1e-4)


BUFFER = torch.zeros(3)


def changed():
    """A constant that is another one at every call."""
    BUFFER.add_(1)
    return BUFFER.clone()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: (x * 2 if float(x.sum()) > 0 else x,), "depends on values (aten._local_scalar_dense"),
        (lambda x: (x[x > 0].sum(),), "depends on values (aten.index.Tensor"),
        (lambda x: (x[x.gt(0).nonzero()].sum(),), "depends on values (aten.nonzero"),
        (lambda x: (BUFFER.add_(x),), "gives other numbers"),
        (lambda x: (x + changed(),), "gives other numbers"),
    ],
)
def test_refuses_what_would_not_be_the_same(function, message):
    with pytest.raises(laai.LaaiError, match="expected forward auto") as error:
        Captured(function, torch.ones(3))
    assert message in str(error.value)


def test_a_position_that_cannot_be_replayed_is_refused():
    with pytest.raises(laai.LaaiError, match="position all cannot be replayed"):
        laai.train(tiny_model("Llama"), TOKENIZER, rules(RAGGED), 1, forward="captured", position="all")
