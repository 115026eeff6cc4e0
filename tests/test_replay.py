"""The fast path against the plain one and against the slow reference's idea of a row, on every architecture."""

from __future__ import annotations

import pytest
import torch
from test_apply import EVERY
from tiny import HEADS, HIDDEN, head_dim, tiny_model, tiny_tokenizer
from torch.utils.flop_counter import FlopCounterMode

import laai_core as laai
from laai_core import products
from laai_core.encode import encode_examples
from laai_core.errors import NotFinite
from laai_core.forward import PlainForward
from laai_core.hooks import frozen
from laai_core.locate import locate
from laai_core.objective import Objective
from laai_core.products import Products
from laai_core.replay import ReplayForward

TOKENIZER = tiny_tokenizer(bos=False)
# Ragged prompts and targets, and prompts of one token, whose prefix is empty.
RAGGED = [("q", " ab"), ("the long story of a word", " x"), ("so", " bcd ef"), ("hello there", " yes")]
ONE_TOKEN = [("q", " ab"), ("w", " c")]
SURVEY = [
    laai.Example("which one", options=[" a", " b", " other"], distribution=[0.5, 0.3, 0.2]),
    laai.Example("or that", options=[" a", " none at all"], distribution=[0.9, 0.1]),
]


def rules(pairs):
    return [laai.Example(prompt, target) for prompt, target in pairs]


def both(name, examples, site="heads", layer=1, runs=None, batch_size=None):
    layout = locate(tiny_model(name))
    batch = encode_examples(TOKENIZER, examples, runs=runs)
    return [kind(layout, batch, layer, site, batch_size) for kind in (PlainForward, ReplayForward)]


def vectors(name, count, site="heads"):
    width = HEADS * head_dim(name) if site == "heads" else HIDDEN
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("examples", [rules(RAGGED), rules(ONE_TOKEN), SURVEY], ids=["ragged", "one_token", "kl"])
@pytest.mark.parametrize("name", EVERY)
def test_objective_and_gradient_equal_the_plain_path(name, examples):
    plain, replay = both(name, examples)
    delta = vectors(name, 1)
    (loss, gradient, _), (fast_loss, fast_gradient, _) = (
        forward.loss_and_gradient(delta, Objective(examples), [0]) for forward in (plain, replay)
    )
    assert float(fast_loss) == pytest.approx(float(loss), rel=1e-5)
    assert (fast_gradient - gradient).norm() <= 1e-4 * gradient.norm()
    assert replay.difference_from(plain) < 1e-3


@pytest.mark.parametrize("site", ["heads", "residual", "mlp"])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma3TextWindow", "OPT"])
def test_every_layer_and_site(name, layer, site):
    examples = rules(RAGGED)
    results = [
        f.loss_and_gradient(vectors(name, 1, site), Objective(examples), [0])
        for f in both(name, examples, site, layer)
    ]
    (loss, gradient, _), (fast_loss, fast_gradient, _) = results
    assert float(fast_loss) == pytest.approx(float(loss), rel=1e-5)
    assert (fast_gradient - gradient).norm() <= 1e-4 * gradient.norm()


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("path", [PlainForward, ReplayForward])
def test_many_vectors_in_one_batch_equal_separate_runs(path, batch_size):
    """Three runs with examples of their own; then only two of them go on."""
    sets = [rules(RAGGED), rules(RAGGED[:2]), rules(ONE_TOKEN + RAGGED[2:])]
    together = [e for examples in sets for e in examples]
    runs = [number for number, examples in enumerate(sets) for _ in examples]
    layout = locate(tiny_model("Llama"))
    joint = path(layout, encode_examples(TOKENIZER, together, runs=runs), 1, "heads", batch_size)
    deltas = vectors("Llama", 3)
    for active in ([0, 1, 2], [0, 2]):
        losses, gradients, _ = joint.loss_and_gradient(deltas[active], Objective(together), active)
        for number, loss, gradient in zip(active, losses, gradients, strict=True):
            alone = PlainForward(layout, encode_examples(TOKENIZER, sets[number]), 1, "heads")
            want_loss, want_gradient, _ = alone.loss_and_gradient(
                deltas[number : number + 1], Objective(sets[number]), [0]
            )
            assert float(loss) == pytest.approx(float(want_loss), rel=1e-5)
            assert (gradient - want_gradient[0]).norm() <= 1e-4 * want_gradient.norm()


def test_a_step_runs_only_what_depends_on_the_vector():
    """Counted in tokens: blocks below the layer never run, those above see the last prompt token and the target."""
    examples = rules([("a" * 40, " b"), ("c" * 30, " d")])
    _, replay = both("Llama", examples)
    objective = Objective(examples)
    replay.loss_and_gradient(vectors("Llama", 1), objective, [0])
    seen = {0: [], 1: [], 2: []}
    model = replay._layout.model
    for layer, tokens in seen.items():
        block = model.model.layers[layer]
        block.mlp.register_forward_hook(lambda m, a, o, tokens=tokens: tokens.append(o.shape[:2].numel()))
    replay.loss_and_gradient(vectors("Llama", 1), objective, [0])
    suffix = max(
        replay._batch.attention_mask.sum(1).tolist()[i] - n + 1 for i, n in enumerate(replay._batch.prompt_lengths)
    )
    assert seen == {0: [], 1: [2 * suffix], 2: [2 * suffix]}


def calls_without_cache(model, work):
    """How often the model read texts from their beginning while `work` ran."""
    seen = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("past_key_values")), with_kwargs=True
    )
    work()
    handle.remove()
    return sum(cache is None for cache in seen)


@pytest.mark.parametrize("layers", [[1], [0, 1, 2]])
def test_layers_share_what_is_before_the_vector(layers):
    """One look whether the model is causal, one pass over the prefixes, one over whole rows to compare with."""
    model = tiny_model("Llama")
    jobs = [laai.Job(rules(RAGGED), layer, l1=l1, start="zero") for layer in layers for l1 in (0.0, 0.01)]
    assert calls_without_cache(model, lambda: laai.train_many(model, TOKENIZER, jobs, steps=4)) == 3


def test_the_model_is_left_as_it_was():
    model = tiny_model("Llama")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = model(ids).logits
        laai.train(model, TOKENIZER, rules(RAGGED), layer=2, steps=3, forward="replay")
        assert torch.equal(model(ids).logits, before)
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("optimizer", ["prox", "adam"])
def test_both_paths_train_the_same_vector(optimizer):
    results = [
        laai.train(
            tiny_model("Qwen2"), TOKENIZER, rules(RAGGED), layer=1, steps=15, optimizer=optimizer, forward=forward
        )
        for forward in ("plain", "replay", "auto")
    ]
    for result in results[1:]:
        assert result.objective == pytest.approx(results[0].objective, rel=1e-3)


def test_train_many_equals_separate_trainings():
    model = tiny_model("Llama")
    jobs = [
        laai.Job(rules(RAGGED), layer, l1=l1, group=l1, lr=lr)
        for layer in (1, 2)
        for l1, lr in ((0.0, 0.05), (0.01, 0.05), (0.1, 0.02))
    ] + [laai.Job(rules(RAGGED[:2]), 0)]
    for optimizer in ("prox", "adam"):
        many = laai.train_many(model, TOKENIZER, jobs, steps=20, optimizer=optimizer)
        for job, result in zip(jobs, many, strict=True):
            alone = laai.train(
                model, TOKENIZER, job.examples, job.layer, job.l1, job.group, optimizer=optimizer, steps=20, lr=job.lr
            )
            assert result.objective == pytest.approx(alone.objective, rel=0.01)
            assert result.intervention.layers == [job.layer]


def test_a_model_that_cannot_be_replayed_says_so_once_and_trains(caplog):
    """A block that ignores its cache: replayed numbers would be wrong, so the plain path is used."""
    model = tiny_model("Llama")
    attention = model.model.layers[2].self_attn
    original = attention.forward
    attention.forward = lambda *args, past_key_values=None, **kwargs: original(*args, **kwargs)
    examples = rules(RAGGED[1:])
    with caplog.at_level("WARNING"):
        result = laai.train(model, TOKENIZER, examples, layer=1, steps=5)
    assert [r.message for r in caplog.records if "cannot be replayed" in r.message].__len__() == 1
    plain = laai.train(model, TOKENIZER, examples, layer=1, steps=5, forward="plain")
    assert result.objective == plain.objective
    with pytest.raises(laai.LaaiError, match="cannot be replayed .*: expected forward auto or plain"):
        laai.train(model, TOKENIZER, examples, layer=1, steps=5, forward="replay")


@pytest.mark.parametrize("forward", ["plain", "replay"])
def test_running_out_of_memory_splits_the_batch_and_changes_nothing(forward, caplog):
    """More than two rows at once do not fit: as on a GPU, where PyTorch raises this error."""
    model, examples = tiny_model("Llama"), rules(RAGGED)
    options = {"layer": 1, "steps": 6, "forward": forward, "penalty_scale": "absolute", "start": "zero"}
    whole = laai.train(model, TOKENIZER, examples, **options)

    def limited(module, args, kwargs):
        if len(kwargs.get("input_ids", ())) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate too much")

    handle = model.register_forward_pre_hook(limited, with_kwargs=True)
    with caplog.at_level("WARNING"):
        split = laai.train(model, TOKENIZER, examples, **options)
    handle.remove()
    assert [r.message for r in caplog.records] == ["memory ran out: going on with 2 rows a forward"]
    assert split.objective == pytest.approx(whole.objective, rel=1e-5)


def test_memory_that_one_row_does_not_fit_is_told_as_it_is():
    """Not as a model that cannot be replayed, whose full forwards would take more memory."""
    model = tiny_model("Llama")

    def full(module, args, kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate too much")

    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(full, with_kwargs=True)
    options = {"layer": 1, "steps": 2, "penalty_scale": "absolute", "start": "zero"}
    for forward in ("auto", "replay"):
        with pytest.raises(torch.OutOfMemoryError):
            laai.train(model, TOKENIZER, rules(RAGGED), forward=forward, **options)
    handle.remove()


def test_a_loss_that_is_not_finite_names_the_example():
    model = tiny_model("Llama")
    examples = rules(RAGGED)
    seen = []

    def later(module, args, output):
        seen.append(1)
        if len(seen) > 12:  # the checks before training, and a few steps
            output = output.clone()
            output[1] = float("nan")
        return output

    handle = model.model.norm.register_forward_hook(later)
    with pytest.raises(NotFinite, match="not finite at evaluation") as stopped:
        laai.train(model, TOKENIZER, examples, layer=1, steps=20)
    handle.remove()
    (result,) = stopped.value.results
    assert result.intervention.metadata["training"]["stopped"] == result.stopped
    assert "not finite at evaluation" in result.stopped and "(example 1)" in result.stopped
    assert result.objective == min(step.objective for step in result.history)


PACKED = ["Llama", "Gemma3Text", "GPT2", "OPT"]


@pytest.mark.parametrize("fits", [True, False], ids=["packed", "too large"])
@pytest.mark.parametrize("name", PACKED)
def test_products_of_some_rows_equal_the_plain_path(name, fits, monkeypatch):
    """Three folds of ragged rows, each with other examples held out."""
    monkeypatch.setattr(products, "SMALLEST", 0)
    monkeypatch.setattr(products, "LIBRARIES", 0 if fits else -(1 << 30))
    examples, layout = rules(RAGGED), locate(tiny_model(name))
    held_out = [number % 3 == fold for fold in range(3) for number in range(len(examples))]
    runs = [fold for fold in range(3) for _ in examples]
    batch = encode_examples(TOKENIZER, examples * 3, runs=runs, held_out=held_out)
    assert bool(products.packed_bytes(layout, 1)) is fits
    deltas, objective = vectors(name, 3), Objective(examples * 3)
    for size in (None, 2, 1):
        arguments = layout, batch, 1, "heads", size
        plain, replay = PlainForward(*arguments), ReplayForward(*arguments, products=Products(layout, 1))
        with frozen(layout.model):
            (loss, gradient, every), (fast_loss, fast_gradient, fast_every) = (
                forward.loss_and_gradient(deltas, objective, [0, 1, 2]) for forward in (plain, replay)
            )
        torch.testing.assert_close(fast_loss, loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(fast_every, every, rtol=1e-5, atol=0)
        assert (fast_gradient - gradient).norm() <= 1e-4 * gradient.norm()


def test_a_product_may_be_modified_in_place(monkeypatch):
    """As Llama 4 does with the output of its shared expert."""
    monkeypatch.setattr(products, "SMALLEST", 0)
    model = tiny_model("Llama")
    for block in model.model.layers:
        block.mlp.down_proj.register_forward_hook(lambda module, inputs, output: output.add_(1.0))
    plain, replay = (
        laai.train(model, TOKENIZER, rules(RAGGED), layer=1, steps=3, forward=f) for f in ("plain", "replay")
    )
    assert replay.objective == pytest.approx(plain.objective, rel=1e-5)


def test_products_leave_the_model_as_it_was(monkeypatch):
    monkeypatch.setattr(products, "SMALLEST", 0)
    model = tiny_model("GPT2")
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    laai.train(model, TOKENIZER, rules(RAGGED), layer=1, steps=3, forward="replay")
    for name, value in model.state_dict().items():
        assert (value.data_ptr(), True) == (before[name][0], torch.equal(value, before[name][1]))
    assert not any("forward" in vars(m) for m in model.modules())


def test_padding_and_held_out_rows_are_not_multiplied(monkeypatch):
    """Counted in operations, forward and backward: two a weight and row."""
    monkeypatch.setattr(products, "SMALLEST", 0)
    monkeypatch.setattr(products, "LIBRARIES", -(1 << 30))  # nothing packed: the counter knows torch's products only
    examples = rules([("q", " a long answer"), ("w", " c"), ("r", " of"), ("t", " b")])
    layout = locate(tiny_model("Llama"))
    batch = encode_examples(TOKENIZER, examples, held_out=[False, False, True, False])
    replay = ReplayForward(layout, batch, 0, "heads", products=Products(layout, 0))
    with frozen(layout.model):
        replay.loss_and_gradient(vectors("Llama", 1), Objective(examples), [0])
        with FlopCounterMode(display=False) as counter:
            replay.loss_and_gradient(vectors("Llama", 1), Objective(examples), [0])
    counts = counter.get_flop_counts()["Global"]
    tokens = [int(n) - p + 1 for n, p in zip(batch.attention_mask.sum(1), batch.prompt_lengths, strict=True)]
    weights = sum(m.weight.numel() for m in layout.model.modules() if isinstance(m, torch.nn.Linear))
    assert max(tokens) > min(tokens)
    assert sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm)) <= 2 * weights * (
        2 * sum(tokens) - tokens[2]
    )
