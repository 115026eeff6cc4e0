"""Choosing by cross-validation: leave-one-out done by hand gives the same numbers, and nothing else is looked at."""

from __future__ import annotations

import pytest
import slow_reference
from test_replay import RAGGED, TOKENIZER, calls_without_cache, rules
from tiny import PROJECTION_PATHS, tiny_model

import laai_core as laai
from laai_core.encode import encode_pair
from lm_eval_laai.methods import select
from lm_eval_laai.methods.evaluate import task_losses
from lm_eval_laai.methods.select import SHARES, STEPS, choose_layer, choose_penalty

EXAMPLES = rules(RAGGED)


def loss_by_hand(model, example, iv):
    prompt, target = encode_pair(TOKENIZER, example.prompt, example.target + "\n")
    (layer,) = iv.layers
    path = PROJECTION_PATHS["Llama"].format(layer)
    spec = {"path": path, "vector": iv.vector(layer), "site": "heads", "position": "last"}
    return -slow_reference.loglikelihood(model, prompt, target, spec)[0]


def test_task_losses():
    model = tiny_model("Llama")
    ivs = [laai.train(model, TOKENIZER, EXAMPLES, layer=1, steps=n).intervention for n in (2, 6)]
    found = task_losses(model, TOKENIZER, [(ivs[0], EXAMPLES), (ivs[1], EXAMPLES[:2])])
    assert [len(part) for part in found] == [4, 2]
    for iv, part in zip(ivs, found, strict=True):
        for example, loss in zip(EXAMPLES, part, strict=False):
            assert loss == pytest.approx(loss_by_hand(model, example, iv), abs=1e-4)


def test_a_layer_is_chosen_by_leaving_one_out():
    model = tiny_model("Llama")
    choice = choose_layer(model, TOKENIZER, EXAMPLES, layers=[0, 2])
    for one in choice.tried:
        losses = []
        for left_out in EXAMPLES:
            others = [e for e in EXAMPLES if e is not left_out]
            iv = laai.train(model, TOKENIZER, others, layer=one.layer, steps=STEPS).intervention
            losses.append(loss_by_hand(model, left_out, iv))
        assert one.validation_loss == pytest.approx(sum(losses) / len(losses), rel=0.02)
    assert choice.layer == min(choice.tried, key=lambda one: one.validation_loss).layer
    assert {one.layer for one in choice.tried} == {0, 2}


def test_penalties_run_from_strong_to_weak():
    model = tiny_model("Llama")
    choice = choose_penalty(model, TOKENIZER, EXAMPLES, layer=1)
    critical = laai.train(model, TOKENIZER, EXAMPLES, layer=1, steps=1).critical_penalty
    assert [one.l1 for one in choice.tried] == pytest.approx([share * critical for share in SHARES])
    assert all(one.l1 == one.group for one in choice.tried)
    assert choice.l1 in [one.l1 for one in choice.tried]
    fixed = choose_penalty(model, TOKENIZER, EXAMPLES, layer=1, group=0.0)
    assert {one.group for one in fixed.tried} == {0.0}


@pytest.mark.parametrize("choose", [lambda *given: choose_penalty(*given, layer=1), choose_layer])
def test_what_is_before_the_vector_runs_once_for_all_settings(choose):
    """Besides: one look whether the model is causal, one pass over whole rows to compare with."""
    model = tiny_model("Llama")
    assert calls_without_cache(model, lambda: choose(model, TOKENIZER, EXAMPLES)) == 3


def test_folds_of_unequal_size(monkeypatch):
    """Three folds of four examples: the first leaves two out. Every example counts once."""
    monkeypatch.setattr(select, "MAX_FOLDS", 3)
    model = tiny_model("Llama")
    choice = choose_layer(model, TOKENIZER, EXAMPLES, layers=[1])
    losses = []
    for fold in ([0, 3], [1], [2]):
        others = [e for n, e in enumerate(EXAMPLES) if n not in fold]
        iv = laai.train(model, TOKENIZER, others, layer=1, steps=STEPS).intervention
        losses += [loss_by_hand(model, EXAMPLES[n], iv) for n in fold]
    assert choice.tried[0].validation_loss == pytest.approx(sum(losses) / 4, rel=0.02)


def test_the_critical_penalty_is_where_zero_begins():
    model = tiny_model("Llama")
    critical = laai.train(model, TOKENIZER, EXAMPLES, layer=1, steps=1).critical_penalty
    above, below = (
        laai.train(model, TOKENIZER, EXAMPLES, layer=1, l1=p, group=p, steps=10).intervention.vector(1)
        for p in (1.01 * critical, 0.9 * critical)
    )
    assert not above.any() and below.any()


def test_a_start_is_where_training_begins():
    model = tiny_model("Llama")
    first = laai.train(model, TOKENIZER, EXAMPLES, layer=1, steps=20)
    (again,) = laai.train_many(model, TOKENIZER, [laai.Job(EXAMPLES, 1, start=first.intervention)], steps=1)
    assert again.objective == pytest.approx(first.objective, rel=1e-5)


def test_one_example_cannot_be_cross_validated():
    with pytest.raises(laai.LaaiError, match="at least two examples"):
        choose_penalty(tiny_model("Llama"), TOKENIZER, EXAMPLES[:1], layer=1)
