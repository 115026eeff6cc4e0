"""Choosing by cross-validation: every fold trained alone and scored by hand gives the same numbers."""

from __future__ import annotations

import math

import pytest
import slow_reference
import torch
import transformers
from test_replay import RAGGED, TOKENIZER, calls_without_cache, rules
from tiny import MAX_POSITIONS, PROJECTION_PATHS, VOCABULARY, gemma4_model, hybrid_model, tiny_model
from tqdm.auto import tqdm

import laai_core as laai
from laai_core.encode import encode_pair
from laai_core.errors import LaaiError
from laai_core.optimize import Step
from lm_eval_laai.methods import select
from lm_eval_laai.methods.evaluate import task_losses
from lm_eval_laai.methods.select import (
    EVALUATIONS,
    FOLDS,
    HEAD_START,
    LONE_DEPTH,
    PATIENCE,
    PENALTIES,
    _Curve,
    choose,
    last_good,
    train_chosen,
)

EXAMPLES = rules([*RAGGED, ("over there", " no"), ("w", " wx")])
USUAL = PENALTIES[-1]


def loss_by_hand(model, example, iv):
    prompt, target = encode_pair(TOKENIZER, example.prompt, example.target + "\n")
    (layer,) = iv.layers
    path = PROJECTION_PATHS["Llama"].format(layer)
    spec = {"path": path, "vector": iv.vector(layer), "site": "heads", "position": "last"}
    return -slow_reference.loglikelihood(model, prompt, target, spec)[0]


@pytest.fixture
def low_floor(monkeypatch):
    """A bound that the losses of random models do not all reach."""
    monkeypatch.setattr(select, "FLOOR", 1e-9)


def bounded(loss: float) -> float:
    return -math.log((1 - select.FLOOR) * math.exp(-loss) + select.FLOOR)


def held_out_by_hand(model, examples, one, steps, **settings):
    """Mean bounded loss of `steps` evaluations in one setting; every third example is in the same fold."""
    losses = []
    for fold in range(min(3, len(examples))):
        numbers = range(fold, len(examples), 3)
        rest = [example for n, example in enumerate(examples) if n not in numbers]
        job = laai.Job(rest, one.layer, one.l1, one.group, start=settings.get("start"))
        shared = {name: value for name, value in settings.items() if name != "start"}
        (result,) = laai.train_many(model, TOKENIZER, [job], steps=steps, **shared)
        losses += [bounded(loss_by_hand(model, examples[n], result.intervention)) for n in numbers]
    assert len(losses) == len(examples)
    return sum(losses) / len(losses)


def deep_model(layers: int):
    """A tiny Llama of so many layers, random."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval()


def test_task_losses():
    model = tiny_model("Llama")
    ivs = [laai.train(model, TOKENIZER, EXAMPLES[:4], layer=1, steps=n).intervention for n in (2, 6)]
    found = task_losses(model, TOKENIZER, [(ivs[0], EXAMPLES[:4]), (ivs[1], EXAMPLES[:2])])
    assert [len(part) for part in found] == [4, 2]
    for iv, part in zip(ivs, found, strict=True):
        for example, loss in zip(EXAMPLES, part, strict=False):
            assert loss == pytest.approx(loss_by_hand(model, example, iv), abs=1e-4)


# What was tried, by hand


@pytest.mark.usefixtures("low_floor")
@pytest.mark.parametrize("count", [6, 4, 3])
def test_every_held_out_loss_is_that_of_folds_trained_alone(count):
    model, examples = tiny_model("Llama"), EXAMPLES[:count]
    choice = choose(model, TOKENIZER, examples)
    for one in choice.tried:
        expected = held_out_by_hand(model, examples, one, one.steps)
        assert one.held_out_loss == pytest.approx(expected, rel=2e-3)
    best = min(choice.tried, key=lambda one: one.smallest_loss)
    assert (choice.layer, choice.l1, choice.group, choice.steps) == (best.layer, best.l1, best.group, best.steps)


@pytest.mark.parametrize(
    "settings",
    [{"start": "zero"}, {"optimizer": "adam"}, {"penalty_scale": "absolute"}, {"batch_size": 5}, {"forward": "plain"}],
)
@pytest.mark.usefixtures("low_floor")
def test_the_settings_are_those_of_the_training(settings):
    model = tiny_model("Llama")
    (one,) = choose(model, TOKENIZER, EXAMPLES, 1, 0.02, 0.03, **settings).tried
    assert (one.layer, one.l1, one.group) == (1, 0.02, 0.03)
    expected = held_out_by_hand(model, EXAMPLES, one, one.steps, **settings)
    assert one.held_out_loss == pytest.approx(expected, rel=2e-3)


@pytest.mark.usefixtures("low_floor")
def test_the_smallest_loss_is_that_of_the_curve_by_hand():
    """The whole curve by hand, to PATIENCE evaluations behind its lowest point."""
    model = tiny_model("Llama")
    (one,) = choose(model, TOKENIZER, EXAMPLES, 1, USUAL, USUAL).tried
    assert 1 <= one.steps <= EVALUATIONS
    curve = [held_out_by_hand(model, EXAMPLES, one, steps) for steps in range(1, one.steps + 1)]
    assert one.smallest_loss == pytest.approx(min(curve), rel=2e-3)
    assert curve[-1] == pytest.approx(one.held_out_loss, rel=2e-3)


@pytest.mark.parametrize(
    ("losses", "steps"),
    [
        ([[5.0, 3.0]], 1),
        ([[5.0, 3.0], [4.0, 2.0], [3.0, 1.0]], 3),
        ([[5.0, 3.0], [4.0, 2.0], [4.1, 2.1]], 2),  # worse for all by as much: surely worse
        ([[5.0, 3.0], [4.0, 2.0], [4.5, 1.9]], 3),  # by 0.2 with a standard error of 0.3
        ([[5.0, 3.0], [4.0, 2.0], [4.5, 1.9], [4.6, 2.5]], 3),
        ([[5.0, 3.0], [4.0, 2.0], [4.5, 2.5], [4.2, 1.9]], 4),
    ],
)
def test_the_last_number_of_evaluations_that_is_not_surely_worse_is_taken(losses, steps):
    assert last_good(torch.tensor(losses)) == steps


@pytest.mark.usefixtures("low_floor")
def test_two_examples_are_folds_that_begin_at_zero():
    model = tiny_model("Llama")
    (one,) = choose(model, TOKENIZER, EXAMPLES[:2], 1, USUAL, USUAL).tried
    expected = held_out_by_hand(model, EXAMPLES[:2], one, one.steps, start="zero")
    assert one.held_out_loss == pytest.approx(expected, rel=2e-3)


def test_surveys(monkeypatch):
    """Loss kl: the reference is the training's own loss, of a vector that has not seen the examples.

    After 20 evaluations the last bits of a batch of another size have grown to a different path.
    """
    monkeypatch.setattr(select, "EVALUATIONS", 20)
    from test_train import SURVEY

    model = tiny_model("Llama")
    (one,) = choose(model, TOKENIZER, SURVEY, 1, 1e-3, 1e-3).tried
    losses = []
    for left_out in SURVEY:
        rest = [example for example in SURVEY if example is not left_out]
        iv = laai.train(model, TOKENIZER, rest, 1, 1e-3, 1e-3, steps=one.steps).intervention
        losses += map(bounded, task_losses(model, TOKENIZER, [(iv, [left_out])])[0])
    assert one.held_out_loss == pytest.approx(sum(losses) / 3, rel=1e-4)


@pytest.mark.parametrize(
    ("rival", "losses", "ends"),
    [
        ([], [9.0 - n for n in range(9)], None),
        ([9.0, 3.0], [9.0 - n / 2 for n in range(9)], HEAD_START),  # behind a setting that ended sooner
        ([9.0 - n / 2 for n in range(9)], [9.0 - n for n in range(9)], None),
        ([9.0 - n for n in range(20)], [9.0 - n / 2 for n in range(9)], HEAD_START),
        ([9.0] * 7 + [1.0], [9.0 - n / 2 for n in range(9)], 8),  # overtaken after the head start
        ([], [9.0, 5.0] + [6.0, 5.5, 7.0, 5.1] * 3, 2 + PATIENCE),
    ],
)
def test_a_setting_ends_behind_the_best_or_when_it_no_longer_falls(rival, losses, ends):
    behind = [bounded(loss / 5) for loss in rival]
    curve = _Curve(torch.tensor([[True, False]]), behind, tqdm(disable=True))
    stopped = []
    for number, loss in enumerate(losses):
        curve.see(torch.tensor([loss / 5, 100.0]))  # the example that the fold trains on does not count
        step = Step(number, -float(number), 0.0, 0.0, 0, 0)
        stopped.append(curve.add({0: step}))
    assert (stopped.index(True) + 1 if True in stopped else None) == ends


# What is tried


@pytest.mark.parametrize(("count", "coarse", "gap"), [(24, [3, 7, 10, 14, 18], 1), (32, [4, 9, 14, 19, 24], 2)])
def test_layers_from_coarse_to_fine_then_penalties(count, coarse, gap):
    model = deep_model(count)
    choice = choose(model, TOKENIZER, EXAMPLES[:3], steps=2)
    layers = [(one.layer, one.l1, one.group) for one in choice.tried]
    middle_first = sorted(coarse, key=lambda layer: abs(layer - LONE_DEPTH * count))
    assert layers[:5] == [(layer, USUAL, USUAL) for layer in middle_first]
    first = min(choice.tried[:5], key=lambda one: one.held_out_loss)
    near = [(first.layer - gap, USUAL, USUAL), (first.layer + gap, USUAL, USUAL)]
    assert layers[5:7] == near
    second = min(choice.tried[:7], key=lambda one: one.held_out_loss)
    assert layers[7:] == [(second.layer, PENALTIES[0], PENALTIES[0])]
    assert choice.steps == 2
    assert len(set(layers)) == len(layers)


@pytest.mark.parametrize("count", [1, 2, 3, 6, 12])
def test_models_of_few_layers(count):
    choice = choose(deep_model(count), TOKENIZER, EXAMPLES[:3], steps=1)
    tried = [(one.layer, one.l1) for one in choice.tried]
    assert len(set(tried)) == len(tried)
    assert all(0 <= layer < count for layer, _ in tried)


@pytest.mark.parametrize("count", [1, 3])
def test_layers_without_attention_are_not_tried(count):
    """A hybrid model: of its three layers the middle one has attention."""
    result, choice = train_chosen(hybrid_model(), TOKENIZER, EXAMPLES[:count], steps=2)
    assert result.intervention.layers == [1] and {one.layer for one in choice.tried} <= {1}
    with pytest.raises(LaaiError, match="no attention output projection found in layer 2"):
        train_chosen(hybrid_model(), TOKENIZER, EXAMPLES[:count], 2)


@pytest.mark.parametrize("start", ["icl", "zero"])
def test_layers_whose_heads_differ_in_width(start):
    _, choice = train_chosen(gemma4_model(), TOKENIZER, EXAMPLES[:4], steps=2, start=start)
    assert len({one.layer % 2 for one in choice.tried}) == 2


def test_what_is_fixed_stays_fixed():
    model = tiny_model("Llama")
    at_layer = choose(model, TOKENIZER, EXAMPLES, -1)
    assert at_layer.layer == 2
    assert [(one.layer, one.l1, one.group) for one in at_layer.tried] == [(2, p, p) for p in reversed(PENALTIES)]
    grouped = choose(model, TOKENIZER, EXAMPLES, 1, group=0.0, steps=4)
    assert [(one.l1, one.group) for one in grouped.tried] == [(p, 0.0) for p in reversed(PENALTIES)]
    assert (grouped.group, grouped.steps) == (0.0, 4) and all(one.steps <= 4 for one in grouped.tried)
    both = choose(model, TOKENIZER, EXAMPLES, l1=0.5, group=0.25)
    assert {(one.l1, one.group) for one in both.tried} == {(0.5, 0.25)}


def test_nothing_is_tried_where_nothing_is_left_to_choose():
    model = tiny_model("Llama")
    for_all = []
    assert calls_without_cache(model, lambda: for_all.append(choose(model, TOKENIZER, EXAMPLES, -1, 0.5, 0.0, 7))) == 0
    (choice,) = for_all
    assert (choice.layer, choice.l1, choice.group, choice.steps, choice.tried) == (2, 0.5, 0.0, 7, [])


def test_of_one_example_nothing_can_be_held_out():
    model = deep_model(10)
    choice = choose(model, TOKENIZER, EXAMPLES[:1])
    assert (choice.layer, choice.l1, choice.group, choice.steps) == (4, USUAL, USUAL, EVALUATIONS)
    assert choice.tried == []
    assert choose(model, TOKENIZER, EXAMPLES[:1], -1, steps=3).layer == 9


def test_what_is_before_the_vector_runs_once_for_all_settings():
    """One look whether the model is causal, one pass over the prefixes, one over whole rows to compare with; and one
    over the few-shot and bare prompts of the starts, behind two that try padding."""
    model = tiny_model("Llama")
    assert calls_without_cache(model, lambda: choose(model, TOKENIZER, EXAMPLES, start="zero")) == 3
    few = EXAMPLES[:3]  # two shuffles of three folds of two examples: 12 prompts at most, one forward
    assert calls_without_cache(model, lambda: choose(model, TOKENIZER, few)) == 6


def test_the_model_is_left_as_it_was():
    model = tiny_model("Llama").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    choose(model, TOKENIZER, EXAMPLES, 1)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_equal_arguments_give_equal_choices():
    model = tiny_model("Llama")
    assert choose(model, TOKENIZER, EXAMPLES) == choose(model, TOKENIZER, EXAMPLES)


# The training with what was chosen


def test_train_chosen_from_zero_is_the_training_on_all_examples():
    model = tiny_model("Llama")
    result, choice = train_chosen(model, TOKENIZER, EXAMPLES, seed=3, task="x", start="zero")
    assert choice == choose(model, TOKENIZER, EXAMPLES, start="zero")
    penalties = choice.l1, choice.group
    direct = laai.train(
        model, TOKENIZER, EXAMPLES, choice.layer, *penalties, steps=choice.steps, seed=3, task="x", start="zero"
    )
    assert result.intervention.to_bytes() == direct.intervention.to_bytes()


@pytest.mark.parametrize(("start", "count"), [(None, 7), ("icl", 7), ("icl", 2)])
def test_train_chosen_is_the_mean_over_all_examples_and_the_folds(start, count):
    model, examples = tiny_model("Llama"), EXAMPLES[:count]
    seen = []
    result, choice = train_chosen(model, TOKENIZER, examples, seed=3, task="x", start=start, on_step=seen.append)
    assert choice == choose(model, TOKENIZER, examples, start=start)

    parts = [[e for n, e in enumerate(examples) if n % 3 != fold] for fold in range(min(count, 3))]
    jobs = [laai.Job(part, choice.layer, choice.l1, choice.group) for part in (examples, *parts)]
    trained = laai.train_many(model, TOKENIZER, jobs, steps=choice.steps)
    vectors = [one.intervention.vector(choice.layer) for one in trained]
    found = result.intervention.vector(choice.layer)
    torch.testing.assert_close(found, sum(vectors) / len(vectors))
    assert not torch.allclose(found, vectors[0], atol=1e-3)

    mean = laai.Intervention({choice.layer: found})
    there = laai.train(
        model, TOKENIZER, examples, choice.layer, choice.l1, choice.group, start=mean, steps=1
    ).intervention.metadata["training"]
    facts = result.intervention.metadata["training"]
    assert facts["objective"] == pytest.approx(there["objective"], abs=1e-5) == result.objective
    assert facts["stationarity"] == pytest.approx(there["stationarity"], rel=1e-3, abs=1e-6) == result.stationarity
    assert (facts["mean_of"], facts["start"]) == (1 + len(parts), "icl")
    assert facts["steps"] == choice.steps
    assert seen == trained[0].history == result.history


# Refusals


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"penalty_scale": "absolute"}, "penalty_scale absolute: .* expected l1 and group"),
        ({"penalty_scale": "absolute", "l1": 0.1}, "penalty_scale absolute: .* expected l1 and group"),
        ({"steps": 0}, "steps is 0: expected at least one"),
        ({"l1": -1.0}, "l1 is -1.0: expected"),
        ({"layer": 7}, "layer 7 is out of range"),
        ({"optimizer": "sgd"}, "unknown optimizer 'sgd'"),
        ({"start": "ice"}, "unknown start 'ice': expected one of icl, zero"),
        ({"start": laai.Intervention({0: torch.zeros(4, 8)})}, "start is an Intervention: a choice has starts of its"),
    ],
)
def test_refusals(settings, said):
    with pytest.raises(laai.LaaiError, match=said):
        choose(tiny_model("Llama"), TOKENIZER, EXAMPLES, **settings)


# After what is known of one vector


def test_the_critical_penalty_is_where_zero_begins():
    model, options = tiny_model("Llama"), {"layer": 1, "start": "zero"}
    critical = laai.train(model, TOKENIZER, EXAMPLES, steps=1, **options).critical_penalty
    above, below = (
        laai.train(model, TOKENIZER, EXAMPLES, l1=p, group=p, steps=10, **options).intervention.vector(1)
        for p in (1.01 * critical, 0.9 * critical)
    )
    assert not above.any() and below.any()


def test_folds():
    assert FOLDS == 3  # `held_out_by_hand` has the same
