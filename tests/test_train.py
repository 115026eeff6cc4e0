"""Training, against hand-written hooks with one example at a time in float64, and against finite differences."""

from __future__ import annotations

import copy
import json
import weakref
from dataclasses import dataclass

import numpy as np
import peft
import pytest
import torch
import transformers
from slow_reference import writing
from tiny import (
    ARCHITECTURES,
    BLOCK_PATHS,
    HEADS,
    HIDDEN,
    LAYERS,
    MLP_PATHS,
    PROJECTION_PATHS,
    VOCABULARY,
    WINDOWED,
    default_dtype,
    head_dim,
    hybrid_model,
    tiny_model,
    tiny_tokenizer,
)

import laai_core as laai
from laai_core import Example, LaaiError, problem
from laai_core.encode import encode_examples
from laai_core.forward import PlainForward
from laai_core.locate import locate
from laai_core.objective import Objective

LAYER = 1
PATHS = {"heads": PROJECTION_PATHS, "residual": BLOCK_PATHS, "mlp": MLP_PATHS}
# Prompts of several lengths, targets of one token and of several, so that padding and teacher forcing matter.
RULES = [
    Example(prompt="Q: hot\nA:", target=" cold"),
    Example(prompt="Q: the wall in there\nA:", target=" a"),
    Example(prompt="Q:", target=" another morning"),
    Example(prompt="Q: here\nA:", target="x"),
]
SURVEY = [
    Example(prompt="Q: and then?\nAnswer:", options=["A", "B", "C"], distribution=[0.7, 0.3, 0.0]),
    Example(prompt="Q: nothing?\nAnswer:", options=[" hot", " in there", " x"], distribution=[0.2, 0.5, 0.3]),
    Example(prompt="Answer:", options=["A", "another"], distribution=[0.5, 0.5]),
]
EXAMPLES = {"nll": RULES, "kl": SURVEY}
MODELS = ("Llama", "GPT2")
TOKENIZER = tiny_tokenizer(bos=True)


def width(name: str, site: str) -> int:
    return HEADS * head_dim(name) if site == "heads" else HIDDEN


@dataclass
class Reference:
    """The objective's task loss as it is defined: no batch, no padding, no cache, float64."""

    name: str
    site: str = "heads"
    layer: int = LAYER
    stop: str = "\n"

    def __post_init__(self) -> None:
        self.model = tiny_model(self.name)
        if self.name != "Mixtral":  # its grouped matrix product has no float64
            self.model.double()
        self.path = PATHS[self.site][self.name].format(self.layer)

    def log_probability(self, prompt: str, target: str, delta: torch.Tensor) -> torch.Tensor:
        prompt_ids = TOKENIZER.encode(prompt)
        ids = TOKENIZER.encode(prompt + target)
        spec = dict(path=self.path, vector=delta, site=self.site, position="last")
        with writing(self.model, spec, len(prompt_ids)):
            logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        total = torch.zeros((), dtype=torch.float64)
        for place in range(len(prompt_ids), len(ids)):
            total = total + torch.log_softmax(logits[place - 1], 0)[ids[place]]
        return total

    def loss(self, examples: list[Example], delta: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for e in examples:
            if e.target is not None:
                total = total - self.log_probability(e.prompt, e.target + self.stop, delta)
                continue
            scores = torch.stack([self.log_probability(e.prompt, option, delta) for option in e.options])
            p = torch.softmax(scores, 0)
            count = len(e.options)
            for k in range(count):
                pi = (1 - 1e-4) * e.distribution[k] + 1e-4 / count
                total = total + p[k] * (p[k].log() - torch.tensor(pi, dtype=torch.float64).log())
        return total / len(examples)

    def gradient(self, examples: list[Example], delta: torch.Tensor) -> torch.Tensor:
        x = delta.double().requires_grad_()
        return torch.autograd.grad(self.loss(examples, x), x)[0]

    @torch.no_grad()
    def activation_rms(self, examples: list[Example]) -> float:
        """Over the last prompt tokens, one an example."""
        seen = []

        def keep(module, args, output):
            value = args[0] if self.site == "heads" else output[0] if isinstance(output, tuple) else output
            seen.append(value.view(-1, value.shape[-1])[-1])

        handle = self.model.get_submodule(self.path).register_forward_hook(keep)
        for e in examples:
            self.model(input_ids=torch.tensor([TOKENIZER.encode(e.prompt)]))
        handle.remove()
        return float(torch.stack(seen).square().mean().sqrt())


class OneRun:
    """The plain path with a single vector."""

    def __init__(self, forward: PlainForward) -> None:
        self.forward = forward

    def loss_and_gradient(self, delta: torch.Tensor, objective: Objective) -> tuple[float, torch.Tensor]:
        losses, gradients, _ = self.forward.loss_and_gradient(delta.unsqueeze(0), objective, [0])
        return float(losses[0]), gradients[0]

    def continuation_logprobs(self, delta: torch.Tensor) -> torch.Tensor:
        return self.forward.continuation_logprobs(delta.unsqueeze(0))

    def activation_rms(self) -> float:
        (rms,) = self.forward.activation_rms()
        return rms


def plain_forward(name: str, examples, site="heads", layer=LAYER, batch_size=None) -> OneRun:
    model = tiny_model(name).requires_grad_(False)
    return OneRun(PlainForward(locate(model), encode_examples(TOKENIZER, examples), layer, site, batch_size))


def some_delta(name: str, site: str = "heads", size: float = 0.5) -> torch.Tensor:
    return size * torch.randn(width(name, site), generator=torch.Generator().manual_seed(3))


def train(name="Llama", kind="nll", model=None, **arguments):
    arguments = {"layer": LAYER, "steps": 8, **arguments}
    return laai.train(model or tiny_model(name), TOKENIZER, arguments.pop("examples", EXAMPLES[kind]), **arguments)


# --- loss and gradient


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", EXAMPLES)
@pytest.mark.parametrize("site", PATHS)
def test_loss_and_gradient_against_hand_written_hooks(name, kind, site):
    reference = Reference(name, site)
    forward = plain_forward(name, EXAMPLES[kind], site)
    for delta in (torch.zeros(width(name, site)), some_delta(name, site)):
        loss, gradient = forward.loss_and_gradient(delta, Objective(EXAMPLES[kind]))
        assert gradient.dtype == torch.float32
        assert loss == pytest.approx(float(reference.loss(EXAMPLES[kind], delta.double()).detach()), rel=1e-5)
        expected = reference.gradient(EXAMPLES[kind], delta)
        assert float((gradient - expected).norm()) < 1e-4 * float(expected.norm())


@pytest.mark.parametrize("name", (*ARCHITECTURES, *WINDOWED))
@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_gradient_on_every_architecture(name, layer):
    reference = Reference(name, layer=layer)
    delta = some_delta(name)
    loss, gradient = plain_forward(name, RULES, layer=layer).loss_and_gradient(delta, Objective(RULES))
    assert loss == pytest.approx(float(reference.loss(RULES, delta.double()).detach()), rel=1e-4)
    expected = reference.gradient(RULES, delta)
    assert float((gradient - expected).norm()) < 1e-3 * float(expected.norm())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", EXAMPLES)
def test_gradient_against_central_differences(name, kind):
    """Of the reference's loss, by the five-point rule, whose large step the rounding of a Llama's norms (float32 in
    a float64 model too) does not reach."""
    reference = Reference(name)
    delta = some_delta(name)
    _, gradient = plain_forward(name, EXAMPLES[kind]).loss_and_gradient(delta, Objective(EXAMPLES[kind]))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for _ in range(4):
            direction = torch.randn(len(delta), generator=generator).double()
            far, near, near_back, far_back = (
                float(reference.loss(EXAMPLES[kind], delta.double() + 2e-3 * k * direction)) for k in (2, 1, -1, -2)
            )
            slope = (8 * (near - near_back) - (far - far_back)) / (12 * 2e-3)
            assert float(gradient.double() @ direction) == pytest.approx(slope, rel=2e-3, abs=1e-3)


@pytest.mark.parametrize("kind", EXAMPLES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_chunks_change_nothing(kind, batch_size):
    """Chunks of 3 cut through the options of one question, whose losses are coupled."""
    objective, delta = Objective(EXAMPLES[kind]), some_delta("Llama")
    whole = plain_forward("Llama", EXAMPLES[kind])
    parts = plain_forward("Llama", EXAMPLES[kind], batch_size=batch_size)
    (loss, gradient), (chunked_loss, chunked_gradient) = (
        f.loss_and_gradient(delta, objective) for f in (whole, parts)
    )
    assert chunked_loss == pytest.approx(loss, rel=1e-6)
    assert torch.allclose(chunked_gradient, gradient, rtol=1e-4, atol=1e-5)
    assert torch.allclose(parts.continuation_logprobs(delta), whole.continuation_logprobs(delta), atol=1e-4)
    assert parts.activation_rms() == pytest.approx(whole.activation_rms(), rel=1e-6)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", EXAMPLES)
def test_log_probabilities_by_continuation(name, kind):
    reference, delta = Reference(name), some_delta(name)
    texts = [(e.prompt, text) for e in EXAMPLES[kind] for text in (e.options or [e.target + "\n"])]
    with torch.no_grad():
        expected = [float(reference.log_probability(*pair, delta)) for pair in texts]
    found = plain_forward(name, EXAMPLES[kind]).continuation_logprobs(delta)
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", [*MODELS, "OPT"])
@pytest.mark.parametrize("kind", EXAMPLES)
@pytest.mark.parametrize("site", PATHS)
def test_activation_rms(name, kind, site):
    expected = Reference(name, site).activation_rms(EXAMPLES[kind])
    assert plain_forward(name, EXAMPLES[kind], site).activation_rms() == pytest.approx(expected, rel=1e-5)


# --- train


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", EXAMPLES)
@pytest.mark.parametrize("optimizer", ["prox", "adam"])
def test_the_result_is_what_it_says(name, kind, optimizer):
    result = train(
        name,
        kind,
        start="zero",
        optimizer=optimizer,
        lr=0.3,
        l1=0.003,
        group=0.002,
        steps=15,
        penalty_scale="absolute",
    )
    iv = result.intervention
    assert (iv.layers, iv.site, iv.position, iv.operation, iv.scale) == ([LAYER], "heads", "last", "add", 1.0)
    delta = iv.vector(LAYER).double()
    assert delta.shape == (HEADS, head_dim(name))
    reference = Reference(name)
    loss = float(reference.loss(EXAMPLES[kind], delta.flatten()).detach())
    penalty = float(0.003 * delta.abs().sum() + 0.002 * sum(row.norm() for row in delta))
    assert result.objective == pytest.approx(loss + penalty, rel=1e-4)
    assert result.objective == min(step.objective for step in result.history)
    assert len(result.history) == 15
    untouched = float(reference.loss(EXAMPLES[kind], torch.zeros(delta.numel()).double()).detach())
    assert result.history[0].objective == pytest.approx(untouched, rel=1e-4)
    assert loss < 0.95 * untouched


@pytest.mark.parametrize("scale", ["relative", "absolute"])
def test_stationarity_is_that_of_the_returned_vector(scale):
    """By the definition, in float64, in the units of the penalty."""
    l1, group = 0.05, 0.04
    result = train(l1=l1, group=group, steps=60, penalty_scale=scale)
    reference = Reference("Llama")
    rms = reference.activation_rms(RULES) if scale == "relative" else 1.0
    delta = result.intervention.vector(LAYER).double()
    x, gradient = delta / rms, rms * reference.gradient(RULES, delta.flatten()).view(delta.shape)
    assert 0 < int((x == 0).sum()) < x.numel()  # both kinds of coordinate are seen
    total = 0.0
    for row, g in zip(x, gradient, strict=True):
        if row.norm() == 0:
            soft = [max(abs(float(v)) - l1, 0) for v in g]
            total += max(sum(v * v for v in soft) ** 0.5 - group, 0) ** 2
            continue
        for value, slope in zip(row, g + group * row / row.norm(), strict=True):
            gap = abs(float(slope) + l1 * float(value.sign())) if value != 0 else max(abs(float(slope)) - l1, 0)
            total += gap**2
    assert result.stationarity == pytest.approx(total**0.5, rel=0.02, abs=2e-3)


def test_prox_ends_near_a_stationary_point_with_exact_zeros():
    result = train(l1=0.05, group=0.05, steps=150, start="zero")
    first = train(l1=0.05, group=0.05, steps=1, start="zero")
    assert not first.intervention.vector(LAYER).any()  # the first evaluation is at zero
    assert result.stationarity < first.stationarity / 100
    assert (result.intervention.vector(LAYER) == 0).any()


def test_an_overwhelming_penalty_leaves_zero():
    result = train(l1=1e4, group=1e4, steps=5)
    assert not result.intervention.vector(LAYER).any()
    assert result.stationarity == 0.0


def test_relative_is_absolute_in_other_units():
    """Delta = rms * x: penalties divided by rms, and for Adam a step multiplied by it."""
    rms = Reference("Llama").activation_rms(RULES)
    assert abs(rms - 1) > 0.2  # or the test shows nothing
    relative = train(l1=0.05, group=0.03, optimizer="adam", lr=0.05, steps=12, penalty_scale="relative")
    absolute = train(
        l1=0.05 / rms, group=0.03 / rms, optimizer="adam", lr=0.05 * rms, steps=12, penalty_scale="absolute"
    )
    assert relative.intervention.metadata["training"]["rms"] == pytest.approx(rms, rel=1e-5)
    assert absolute.intervention.metadata["training"]["rms"] == 1.0
    for a, b in zip(relative.history, absolute.history, strict=True):
        assert (a.objective, a.loss, a.penalty) == pytest.approx((b.objective, b.loss, b.penalty), rel=2e-3)
    assert torch.allclose(relative.intervention.vector(LAYER), absolute.intervention.vector(LAYER), atol=0.02 * rms)
    assert relative.stationarity == pytest.approx(rms * absolute.stationarity, rel=0.05)


def test_objective_of_relative_counts_the_penalty_in_units_of_rms():
    rms = Reference("Llama").activation_rms(RULES)
    result = train(l1=0.05, group=0.03, steps=20)  # relative is the default
    delta = result.intervention.vector(LAYER).double()
    loss = float(Reference("Llama").loss(RULES, delta.flatten()).detach())
    penalty = float(0.05 / rms * delta.abs().sum() + 0.03 / rms * delta.norm(dim=1).sum())
    assert penalty > 0.01
    assert result.objective == pytest.approx(loss + penalty, rel=1e-4)


@pytest.mark.parametrize("site", ["residual", "mlp"])
def test_other_sites(site):
    result = train(site=site, steps=10, l1=0.0, group=0.0)
    iv = result.intervention
    assert (iv.site, tuple(iv.vector(LAYER).shape)) == (site, (HIDDEN,))
    found = float(Reference("Llama", site).loss(RULES, iv.vector(LAYER).double()).detach())
    assert found == pytest.approx(result.objective, rel=1e-4)
    assert found < result.history[0].objective


def test_applying_the_result_gives_the_loss_it_was_trained_to():
    """The same vector through the public `apply`, one example at a time."""
    result = train(l1=0.0, group=0.0, steps=10)
    model, total = tiny_model("Llama"), 0.0
    for e in RULES:
        prompt, ids = TOKENIZER.encode(e.prompt), TOKENIZER.encode(e.prompt + e.target + "\n")
        with torch.no_grad(), laai.apply(model, result.intervention, prompt_lengths=[len(prompt)]):
            logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(float(logprobs[place - 1, ids[place]]) for place in range(len(prompt), len(ids)))
    assert total / len(RULES) == pytest.approx(result.objective, rel=1e-4)


def test_negative_layers_and_chunks():
    front, back, parts = train(layer=2), train(layer=-1), train(layer=2, batch_size=3)
    assert back.intervention.layers == [2]
    assert back.intervention.to_bytes() == front.intervention.to_bytes()
    assert torch.allclose(parts.intervention.vector(2), front.intervention.vector(2), atol=1e-2)
    assert parts.objective == pytest.approx(front.objective, rel=1e-3)


def test_stop_belongs_to_the_target():
    with_stop, without = (train(steps=1, start="zero", stop=stop) for stop in ("\n", ""))
    assert without.objective == pytest.approx(
        float(Reference("Llama", stop="").loss(RULES, torch.zeros(HIDDEN).double()).detach()), rel=1e-5
    )
    assert without.objective < with_stop.objective


def test_whitespace_decides_where_the_vector_goes():
    examples = [Example(prompt="Q: hot\nA: ", target="cold")]
    with pytest.raises(LaaiError, match="whitespace"):
        train(examples=examples)
    scored, generated = (train(examples=examples, whitespace=w, steps=4) for w in ("loglikelihood", "generation"))
    assert not torch.equal(scored.intervention.vector(LAYER), generated.intervention.vector(LAYER))


# --- determinism and the file


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", EXAMPLES)
@pytest.mark.parametrize("optimizer", ["prox", "adam"])
def test_identical_trainings_give_identical_bytes(name, kind, optimizer):
    torch.manual_seed(1)
    first = train(name, kind, optimizer=optimizer).intervention.to_bytes()
    torch.manual_seed(2)
    assert train(name, kind, optimizer=optimizer).intervention.to_bytes() == first
    assert train(name, kind, optimizer=optimizer, seed=5).intervention.to_bytes() != first  # the seed is on record


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", EXAMPLES)
@pytest.mark.parametrize("options", [{"start": "icl"}, {"start": "zero", "forward": "plain", "optimizer": "adam"}])
def test_the_default_dtype_changes_nothing(dtype, kind, options):
    model = tiny_model("Llama")
    expected = train(kind=kind, model=model, **options).intervention.to_bytes()
    with default_dtype(dtype):
        assert train(kind=kind, model=model, **options).intervention.to_bytes() == expected


def test_training_draws_no_random_numbers():
    before = torch.random.get_rng_state()
    model = tiny_model("Llama")
    assert torch.equal(torch.random.get_rng_state(), before)
    train(model=model)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_metadata_says_how_it_was_made(tmp_path):
    result = train(kind="kl", l1=0.01, group=0.02, steps=7, seed=3, task="survey_x", optimizer="adam", lr=0.1)
    result.intervention.save(tmp_path / "x.safetensors")
    facts = laai.Intervention.load(tmp_path / "x.safetensors").metadata
    expected = dict(num_hidden_layers=LAYERS, num_attention_heads=HEADS, head_dim=8, hidden_size=HIDDEN)
    assert {key: facts[key] for key in expected} == expected
    assert (facts["model_type"], facts["task"], facts["method"]) == ("llama", "survey_x", "laai")
    training = facts["training"]
    expected = dict(
        loss="kl",
        epsilon=1e-4,
        l1=0.01,
        group=0.02,
        penalty_scale="relative",
        optimizer="adam",
        lr=0.1,
        steps=7,
        seed=3,
    )
    assert {key: training[key] for key in expected} == expected
    assert training["n_train"] == len(SURVEY)
    assert training["objective"] == pytest.approx(result.objective)
    assert training["stationarity"] == pytest.approx(result.stationarity)
    assert training["dtype"] == "float32"
    assert training["versions"]["torch"] == torch.__version__
    assert training["versions"]["laai"] == laai.__version__
    zeros = (result.intervention.vector(LAYER) == 0).double().mean()
    assert training["sparsity"] == pytest.approx(float(zeros))
    assert len(training["examples_sha256"]) == 64
    assert json.dumps(facts)


def test_examples_have_an_identity():
    def identity(examples):
        return train(examples=examples, steps=1).intervention.metadata["training"]["examples_sha256"]

    assert identity(RULES) == identity(copy.deepcopy(RULES))
    assert len({identity(RULES), identity(RULES[::-1]), identity(RULES[:3]), identity(SURVEY)}) == 4


# --- the model is left as it was


def hooks(model) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) + len(m._backward_pre_hooks)
        for m in model.modules()
    )


def state(model) -> dict:
    return {
        "weights": {k: v.clone() for k, v in model.state_dict().items()},
        "gradients": [p.grad for p in model.parameters()],
        "learning": [p.requires_grad for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "hooks": hooks(model),
        "attributes": sorted(model.__dict__),
        "use_cache": model.config.use_cache,
    }


def assert_unchanged(before: dict, after: dict) -> None:
    assert all(torch.equal(before["weights"][k], after["weights"][k]) for k in before["weights"])
    assert {k: v for k, v in before.items() if k != "weights"} == {k: v for k, v in after.items() if k != "weights"}


def half_frozen(name: str):
    """A model in a state of its own: some modules in training mode, some weights frozen."""
    model = tiny_model(name).train()
    list(model.modules())[5].eval()
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("site", PATHS)
def test_the_model_is_left_as_it_was(name, site):
    model = half_frozen(name)
    before = state(model)
    train(model=model, site=site)
    assert_unchanged(before, state(model))


def test_dropout_is_off_while_training():
    model = half_frozen("GPT2")
    assert any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules())
    assert train(model=model).intervention.to_bytes() == train("GPT2").intervention.to_bytes()


@pytest.mark.parametrize("calls", [1, 2, 3, 6])
def test_the_model_is_left_as_it_was_after_an_exception(calls):
    model = half_frozen("Llama")
    count = 0

    def fail(module, args, output):
        nonlocal count
        count += 1
        if count == calls:
            raise RuntimeError("out of memory")

    handle = model.get_submodule("model.layers.2").register_forward_hook(fail)
    before = state(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(model=model, forward="plain")
    assert count == calls
    assert_unchanged(before, state(model))
    handle.remove()


def test_works_under_no_grad():
    with torch.no_grad():
        found = train().intervention.to_bytes()
    assert found == train().intervention.to_bytes()


# --- refusals

REFUSALS = {
    "optimizer": (dict(optimizer="sgd"), "sgd"),
    "penalty scale": (dict(penalty_scale="rms"), "rms"),
    "site": (dict(site="attention"), "attention"),
    "whitespace": (dict(whitespace="strip"), "strip"),
    "l1 negative": (dict(l1=-0.1), "l1 is -0.1"),
    "l1 nan": (dict(l1=float("nan")), "l1"),
    "group infinite": (dict(group=float("inf")), "group"),
    "lr zero": (dict(lr=0.0), "lr"),
    "no steps": (dict(steps=0), "steps"),
    "no rows a batch": (dict(batch_size=0), "batch_size"),
    "negative rows a batch": (dict(batch_size=-1), "batch_size"),
    "layer too high": (dict(layer=LAYERS), f"layer {LAYERS} is out of range.*0 to {LAYERS - 1}"),
    "layer too low": (dict(layer=-LAYERS - 1), "out of range"),
    "no examples": (dict(examples=[]), "example"),
    "one example": (dict(examples=RULES[0]), "got a Example, expected Examples, as split.train has"),
    "seed as text": (dict(seed="a"), "seed is 'a': expected a whole number"),
    "no task's name": (dict(task=3), "task is 3: expected a name"),
    "mixed examples": (dict(examples=[*RULES, *SURVEY]), "mix"),
    "too long": (dict(examples=[Example(prompt="x." * 100, target=" a")]), "tokens"),
    "projection": (dict(projection="model.layers.{}.nothing"), "nothing"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_in_one_line_before_anything_runs(case):
    arguments, words = REFUSALS[case]
    model = tiny_model("Llama")
    before = state(model)
    forwards = []
    handle = model.register_forward_pre_hook(lambda module, args: forwards.append(1))
    with pytest.raises(LaaiError, match=words) as error:
        train(model=model, **arguments)
    handle.remove()
    assert "\n" not in str(error.value)
    assert not forwards
    assert_unchanged(before, state(model))


def test_numbers_of_numpy_give_the_same_bytes():
    plain = train(l1=0.5, group=0.25, steps=2, seed=3, batch_size=2, tolerance=0.5)
    for kind in (np.float32, np.float64):
        numbers = dict(l1=kind(0.5), group=kind(0.25), tolerance=kind(0.5), layer=np.int64(LAYER))
        found = train(steps=np.int64(2), seed=np.int64(3), batch_size=np.int64(2), **numbers)
        assert found.intervention.to_bytes() == plain.intervention.to_bytes()


_SIZES = dict(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)


def t5():
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


NOT_CAUSAL = {
    "encoder-decoder": (t5, "encoder-decoder"),
    "BERT": (lambda: transformers.BertForMaskedLM(transformers.BertConfig(**_SIZES)), "causal"),
    "RoBERTa": (lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**_SIZES)), "causal"),
    "no head": (lambda: tiny_model("Llama").model, "causal"),
    "no model": (lambda: torch.nn.Linear(2, 2), "transformers model"),
}


@pytest.mark.parametrize("case", NOT_CAUSAL)
def test_models_that_are_not_causal(case):
    build, words = NOT_CAUSAL[case]
    with pytest.raises(LaaiError, match=words) as error:
        train(model=build(), layer=0)
    assert "\n" not in str(error.value)


def test_bert_as_a_decoder_is_not_refused_for_what_it_was():
    """The check looks at what the model does, not at its name."""
    torch.manual_seed(0)
    model = transformers.BertLMHeadModel(transformers.BertConfig(**_SIZES, is_decoder=True))
    result = train(model=model, layer=0, steps=10, l1=0.0, group=0.0)
    assert result.intervention.layers == [0]
    assert result.objective < result.history[0].objective


def test_every_step_is_told_with_the_number_of_its_job():
    model, told = tiny_model("Llama"), {0: [], 1: [], 2: []}
    jobs = [laai.Job(RULES, 2), laai.Job(RULES, 0, l1=0.02), laai.Job(RULES, 2, l1=0.02)]

    def on_steps(done):
        for number, step in done.items():
            told[number].append(step)

    results = laai.train_many(model, TOKENIZER, jobs, steps=5, on_steps=on_steps)
    assert [told[number] for number in range(3)] == [result.history for result in results]
    assert told[0] != told[2]

    steps = []
    result = laai.train(model, TOKENIZER, RULES, 0, l1=0.02, steps=5, on_step=steps.append)
    assert steps == result.history == told[1]


def test_a_layer_without_attention_is_trained_and_recorded():
    result = laai.train(hybrid_model(), TOKENIZER, RULES, 2, site="residual", steps=2)
    assert result.intervention.vector(2).shape == (32,)
    assert result.intervention.metadata["head_dim"] == 32 // HEADS


@pytest.mark.parametrize("batch_size", [None, 1])
def test_a_recurrent_state_is_not_replayed(batch_size, caplog):
    """A step would go on from the state that the step before left."""
    options = dict(site="residual", batch_size=batch_size, steps=4)
    plain, auto = (laai.train(hybrid_model(), TOKENIZER, RULES, 0, forward=f, **options) for f in ("plain", "auto"))
    assert "cannot be replayed (NotImplementedError: DynamicCache with states besides keys and values)" in caplog.text
    assert auto.objective == pytest.approx(plain.objective, rel=1e-6)


@pytest.mark.parametrize(
    "start",
    [
        laai.Intervention({2: torch.zeros(HEADS, 8)}),
        laai.Intervention({LAYER: torch.zeros(HIDDEN)}, site="mlp"),
        laai.Intervention({LAYER: torch.zeros(HIDDEN)}, site="residual", operation="icv"),
    ],
    ids=["layer", "site", "operation"],
)
def test_a_start_of_another_place_is_refused(start):
    site = "residual" if start.operation == "icv" else "heads"
    with pytest.raises(LaaiError, match=f"expected one to add at layer 1, site {site}"):
        laai.train(tiny_model("Llama"), TOKENIZER, RULES, LAYER, start=start, site=site)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"layer": 1.0}, "layer is 1.0: expected an int"),
        ({"layer": "1"}, "layer is '1': expected an int"),
        ({"steps": 1.5}, "steps is 1.5: expected at least one, a whole number"),
        ({"steps": "5"}, "steps is '5': expected at least one, a whole number"),
        ({"l1": "0.1"}, "l1 is '0.1': expected a finite number"),
        ({"l1": None}, "l1 is None: expected a finite number"),
        ({"l1": 1e39}, r"l1 is 1e\+39: expected a finite number, 0 to 1e30"),
        ({"optimizer": None}, "unknown optimizer None"),
        ({"stop": 5}, "stop is 5: expected text"),
        ({"start": laai.Intervention({-1: torch.zeros(HEADS, 8)})}, "layer -1 counts from the end"),
        ({"examples": []}, "examples: got none, expected at least one Example"),
        ({"examples": [{"prompt": "a"}]}, "examples: got dict"),
    ],
)
def test_what_python_callers_may_get_wrong(arguments, said):
    with pytest.raises(LaaiError, match=said):
        laai.train(tiny_model("Llama"), TOKENIZER, **{"examples": RULES, "layer": 1} | arguments)


def test_a_bad_start_is_refused_before_any_job_runs():
    jobs = [laai.Job(RULES, 0), laai.Job(RULES[1:], 2, start=laai.Intervention({1: torch.zeros(HEADS, 8)}))]
    with pytest.raises(LaaiError, match="expected one to add at layer 2"):
        laai.train_many(tiny_model("Llama"), TOKENIZER, jobs, on_steps=lambda steps: pytest.fail("a job has run"))


def test_a_model_behind_a_soft_prompt_is_refused():
    prompt = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(LaaiError, match="soft prompt or prefix of 2 virtual tokens"):
        train(model=peft.get_peft_model(tiny_model("Llama"), prompt))


def test_a_model_under_another_vector_is_refused():
    model = tiny_model("Llama")
    with laai.apply(model, laai.Intervention({0: torch.ones(HIDDEN)}, site="residual")):
        with pytest.raises(LaaiError, match="inside a laai.apply block: expected training outside of it"):
            train(model=model)


def test_inference_mode_is_refused():
    model = tiny_model("Llama")
    with torch.inference_mode():
        made_within = tiny_model("Llama")
        with pytest.raises(LaaiError, match="expected a call outside"):
            train(model=model)
    with pytest.raises(LaaiError, match="expected one loaded outside"):
        train(model=made_within)
    assert all(p.requires_grad for one in (model, made_within) for p in one.parameters())


def test_an_empty_job_beside_another_is_refused():
    with pytest.raises(LaaiError, match="expected at least one Example"):
        laai.train_many(tiny_model("Llama"), TOKENIZER, [laai.Job(RULES, 1), laai.Job([], 1)])


def test_packed_weights_of_one_layer_at_a_time(monkeypatch):
    """Jobs of different examples: each layer's problem packs weights of its own, and frees them before the next."""
    alive = weakref.WeakSet()
    largest = []
    make = problem.Products.__init__

    def counted(self, *arguments):
        make(self, *arguments)
        alive.add(self)
        largest.append(len(alive))

    monkeypatch.setattr(problem.Products, "__init__", counted)
    jobs = [laai.Job(RULES[layer:], layer, start="zero") for layer in (0, 1, 2)]
    laai.train_many(tiny_model("Llama"), TOKENIZER, jobs, steps=2)
    assert largest == [1, 1, 1]
