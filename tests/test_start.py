"""The in-context start against full forwards of one prompt each, and the vectors that begin there."""

from __future__ import annotations

import random

import pytest
import slow_reference
import torch
from test_apply import EVERY, PATHS
from test_replay import RAGGED, SURVEY, TOKENIZER, rules
from tiny import MAX_POSITIONS, decoder_with_positions, tiny_model, tiny_tokenizer

import laai_core as laai
from laai_core import start
from laai_core.encode import encode_pair
from laai_core.locate import locate
from laai_core.start import MOST_SHOTS, in_context_starts

EXAMPLES = rules(RAGGED)


def text_of(shots, prompt):
    parts = []
    for shot in shots:
        best = shot.target or max(zip(shot.distribution, shot.options, strict=True))[1]
        parts.append(shot.prompt + best + "\n\n")
    return "".join(parts) + prompt


@torch.no_grad()
def last_activation(model, path, site, ids):
    """The site at the last token of one unpadded prompt, read by a hook made here."""
    seen = []
    module = model.get_submodule(path)
    if site == "heads":
        handle = module.register_forward_pre_hook(lambda m, given: seen.append(given[0]))
    else:
        handle = module.register_forward_hook(
            lambda m, given, out: seen.append((out[0] if isinstance(out, tuple) else out).clone())  # Falcon adds to it
        )
    model(input_ids=torch.tensor([ids]), use_cache=False)
    handle.remove()
    (value,) = seen
    return value.reshape(-1, value.shape[-1])[-1]


def by_hand(model, path, examples, site="heads", tokenizer=TOKENIZER, limit=MAX_POSITIONS):
    """Mean difference over two orders of the others; and how many shots each few-shot prompt had."""
    total, shown = 0, []
    for seed in (0, 1):
        draw = random.Random(seed)
        for left_out in range(len(examples)):
            shots = examples[:left_out] + examples[left_out + 1 :]
            draw.shuffle(shots)
            prompt = examples[left_out].prompt
            while len(ids := tokenizer.encode(text_of(shots, prompt))) > limit:
                shots = shots[1:]
            shown.append(len(shots))
            bare = tokenizer.encode(prompt)
            total = total + last_activation(model, path, site, ids) - last_activation(model, path, site, bare)
    return total / (2 * len(examples)), shown


def close(found, expected):
    torch.testing.assert_close(found.flatten(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("site", PATHS)
@pytest.mark.parametrize("name", EVERY)
def test_every_architecture_and_site(name, site):
    model = tiny_model(name)
    (found,) = in_context_starts(locate(model), TOKENIZER, [EXAMPLES], [1], site)[1]
    expected, shown = by_hand(model, PATHS[site][name].format(1), EXAMPLES, site)
    assert shown == [3] * 8 and expected.norm() > 0.1
    close(found, expected)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("Roberta", "roberta.encoder.layer.{}.attention.output.dense"),
        ("Bart", "model.decoder.layers.{}.self_attn.out_proj"),
    ],
)
def test_decoders_that_number_tokens_by_themselves(name, path):
    model = decoder_with_positions(name)
    (found,) = in_context_starts(locate(model, path), TOKENIZER, [EXAMPLES], [1])[1]
    close(found, by_hand(model, path.format(1), EXAMPLES)[0])


@pytest.mark.parametrize("examples", [SURVEY, EXAMPLES[:2], [*EXAMPLES, *SURVEY]], ids=["kl", "two", "both"])
def test_the_shots_of_a_survey_are_its_most_frequent_answers(examples):
    model, tokenizer = tiny_model("Llama"), tiny_tokenizer(bos=True)
    (found,) = in_context_starts(locate(model), tokenizer, [examples], [2])[2]
    close(found, by_hand(model, PATHS["heads"]["Llama"].format(2), examples, tokenizer=tokenizer)[0])


@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_sets_and_layers_together_are_those_alone(batch_size):
    model = tiny_model("GPT2")
    sets = [EXAMPLES, EXAMPLES[1:], EXAMPLES[:2]]
    found = in_context_starts(locate(model), TOKENIZER, sets, [0, 2], batch_size=batch_size)
    assert set(found) == {0, 2}
    for layer, starts in found.items():
        for one, examples in zip(starts, sets, strict=True):
            close(one, by_hand(model, PATHS["heads"]["GPT2"].format(layer), examples)[0])


def test_a_model_whose_forward_takes_no_other_arguments():
    """As remote code's may: the start needs tokens, mask and positions alone."""
    model, found = tiny_model("Llama"), []
    usual = model.forward

    def strict(input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
        options = {"position_ids": position_ids, "past_key_values": past_key_values, "use_cache": use_cache}
        return usual(input_ids, attention_mask, **options)

    for forward in (usual, strict):
        model.forward = forward
        found.append(in_context_starts(locate(model), TOKENIZER, [EXAMPLES], [1])[1])
    assert torch.equal(*found)


def test_equal_examples_give_equal_bytes():
    model = tiny_model("Llama")
    first, again = (in_context_starts(locate(model), TOKENIZER, [EXAMPLES], [1])[1] for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("words", [30, 55, 110])
def test_a_prompt_that_is_too_long_has_the_last_shots_that_fit(words):
    model = tiny_model("Llama")
    examples = [laai.Example("q" * (words + number), f" {number}") for number in range(5)]
    expected, shown = by_hand(model, PATHS["heads"]["Llama"].format(1), examples)
    assert set(shown) == {{30: 2, 55: 1, 110: 0}[words]}
    (found,) = in_context_starts(locate(model), TOKENIZER, [examples], [1])[1]
    close(found, expected)


def test_of_many_examples_a_prompt_has_some_as_shots():
    letters = "abcdefghijklmnopqrs"[: MOST_SHOTS + 3]
    examples = [laai.Example(letter, " x") for letter in letters]
    pairs = start._prompts(locate(tiny_model("GPT2")), TOKENIZER, examples, "refuse")
    assert len(pairs) == 2 * len(examples)
    assert {TOKENIZER.decode(few_shot).count("x") for few_shot, _ in pairs} == {MOST_SHOTS}


def test_running_out_of_memory_halves_the_rows(caplog):
    model = tiny_model("Llama")
    expected, _ = by_hand(model, PATHS["heads"]["Llama"].format(1), EXAMPLES)
    sizes = []

    def limited(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate too much")

    handle = model.register_forward_pre_hook(limited, with_kwargs=True)
    with caplog.at_level("WARNING"):
        (found,) = in_context_starts(locate(model), TOKENIZER, [EXAMPLES], [1], batch_size=10)[1]
    handle.remove()
    close(found, expected)
    assert sizes == [1, 1, 10, 5, 5, 1]  # a try of padding, then 11 prompts
    assert [r.message for r in caplog.records] == ["memory ran out: going on with 5 rows a forward"]


def test_whitespace_at_the_end_is_the_targets():
    model = tiny_model("Llama")
    spaced = [laai.Example(e.prompt + " ", e.target.strip()) for e in EXAMPLES]
    (found,) = in_context_starts(locate(model), TOKENIZER, [spaced], [1], whitespace="loglikelihood")[1]
    close(found, by_hand(model, PATHS["heads"]["Llama"].format(1), EXAMPLES)[0])


# The trainings that begin there


def loss_by_hand(model, examples, vector):
    spec = {"path": PATHS["heads"]["Llama"].format(1), "vector": vector, "site": "heads", "position": "last"}
    pairs = [encode_pair(TOKENIZER, e.prompt, e.target + "\n") for e in examples]
    return -sum(slow_reference.loglikelihood(model, *pair, spec)[0] for pair in pairs) / len(pairs)


@pytest.mark.parametrize("scale", ["relative", "absolute"])
def test_training_begins_there(scale):
    model = tiny_model("Llama")
    vector, _ = by_hand(model, PATHS["heads"]["Llama"].format(1), EXAMPLES)
    for choice in ({}, {"start": "icl"}):
        result = laai.train(model, TOKENIZER, EXAMPLES, 1, penalty_scale=scale, steps=3, **choice)
        assert result.history[0].loss == pytest.approx(loss_by_hand(model, EXAMPLES, vector), rel=1e-4)
        assert result.intervention.metadata["training"]["start"] == "icl"


def test_zero_is_the_papers_start():
    model = tiny_model("Llama")
    result = laai.train(model, TOKENIZER, EXAMPLES, 1, steps=3, start="zero")
    assert result.history[0].loss == pytest.approx(loss_by_hand(model, EXAMPLES, torch.zeros(32)), rel=1e-5)
    assert result.history[0].nonzero == 0
    assert result.intervention.metadata["training"]["start"] == "zero"


def test_one_example_begins_at_zero():
    model = tiny_model("Llama")
    result = laai.train(model, TOKENIZER, EXAMPLES[:1], 1, steps=2)
    assert result.history[0].nonzero == 0
    assert result.intervention.metadata["training"]["start"] == "zero"
    with pytest.raises(laai.LaaiError, match="start icl needs at least two examples, got 1"):
        laai.train(model, TOKENIZER, EXAMPLES[:1], 1, steps=2, start="icl")
    with pytest.raises(laai.LaaiError, match="unknown start 'ice': expected one of icl, zero"):
        laai.train(model, TOKENIZER, EXAMPLES, 1, start="ice")


def test_an_intervention_as_start_is_recorded_by_its_hash():
    model = tiny_model("Llama")
    first = laai.train(model, TOKENIZER, EXAMPLES, layer=1, steps=20)
    (again,) = laai.train_many(model, TOKENIZER, [laai.Job(EXAMPLES, 1, start=first.intervention)], steps=1)
    assert again.objective == pytest.approx(first.objective, rel=1e-5)
    assert again.intervention.metadata["training"]["start"] == first.intervention.sha256


def test_jobs_of_one_batch_begin_where_they_say():
    """Jobs that begin at zero, in context or at a vector, at two layers, are those trained alone."""
    model = tiny_model("Llama")
    given = laai.train(model, TOKENIZER, EXAMPLES, layer=1, steps=2).intervention
    starts = [(1, "zero"), (1, "icl"), (1, given), (2, "icl"), (2, "zero"), (2, None)]
    sets = [EXAMPLES[:2], EXAMPLES, EXAMPLES[1:]] * 2
    jobs = [laai.Job(examples, layer, start=begin) for examples, (layer, begin) in zip(sets, starts, strict=True)]
    together = laai.train_many(model, TOKENIZER, jobs, steps=1)
    for job, found in zip(jobs, together, strict=True):
        (alone,) = laai.train_many(model, TOKENIZER, [job], steps=1)
        assert found.history[0].loss == pytest.approx(alone.history[0].loss, rel=1e-5)
        for key in ("start", "examples_sha256"):
            assert found.intervention.metadata["training"][key] == alone.intervention.metadata["training"][key]
        torch.testing.assert_close(
            found.intervention.vector(job.layer), alone.intervention.vector(job.layer), atol=1e-5, rtol=1e-4
        )
