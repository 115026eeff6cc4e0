"""Further examples by the model itself: its answers by hand, whom it may answer for, and a training with them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import slow_reference
import torch
from test_real_models import SMOLLM2, loaded
from test_replay import TOKENIZER
from test_select import EXAMPLES
from tiny import tiny_model

import laai_core as laai
from laai_core.data.split import in_training_pool
from laai_core.data.tasks import load_pairs
from laai_core.example import Example
from laai_core.locate import locate
from lm_eval_laai.methods import select
from lm_eval_laai.methods.pseudo_labels import CONFIDENCE, INPUTS, _frame, _pool_key, _Writer, pseudo_labelled

INSTRUCTION = "Write the past tense of the verb."


def answer_by_hand(model, prompt, room, stop, end):
    """Text up to `stop` or the token `end`, and the probability of the tokens to there; None where neither comes."""
    ids = TOKENIZER.encode(prompt)
    tokens = slow_reference.greedy(model, ids, room, None)
    for count in range(1, room + 1):
        ended = tokens[count - 1] == end
        text = TOKENIZER.decode(tokens[: count - ended], skip_special_tokens=True)
        if ended or (stop and stop in text):
            score, _ = slow_reference.loglikelihood(model, ids, tokens[:count], None)
            return (text.split(stop)[0] if stop else text).strip(), math.exp(score)
    return None


@pytest.mark.parametrize("rows", [1, 3, 32])
def test_answers_end_at_the_stop_or_at_the_models_own_end(rows):
    model = tiny_model("Llama")
    prompts = ["over", "w ab", "over there we", "ab ab ab ab ab"]
    second, third = (slow_reference.greedy(model, TOKENIZER.encode(prompt), 2, None)[1] for prompt in prompts[:2])
    for stop, end in (("", second), (TOKENIZER.decode([third]), None)):
        model.generation_config.eos_token_id = end
        writer = _Writer(locate(model), TOKENIZER, stop, "refuse", rows)
        expected = [answer_by_hand(model, prompt, 6, stop, end) for prompt in prompts]
        found = [answer and (answer.text, answer.probability) for answer in writer.answers(prompts, 6)]
        assert found == [wanted and (wanted[0], pytest.approx(wanted[1], rel=1e-3)) for wanted in expected]
        assert any(expected)


@pytest.mark.parametrize(
    "setting",
    [
        {"cache_implementation": "static"},
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": [*range(3, 200)]},
        {"do_sample": True, "temperature": 9.0},
        {"num_beams": 3},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_texts_are_greedy_whatever_the_models_own_settings(setting):
    model = tiny_model("Llama")
    prompts = [TOKENIZER.encode(f"{'ab ' * 30}{word}") for word in ("over", "there")]
    free = [slow_reference.greedy(model, prompt, 6, None) for prompt in prompts]
    model.generation_config.update(**setting, eos_token_id=None)
    before = model.generation_config.to_dict()
    found = _Writer(locate(model), TOKENIZER, "", "refuse", 2)._generated(prompts, 6).sequences
    assert found[:, -6:].tolist() == free
    assert model.generation_config.to_dict() == before


def test_the_texts_around_the_inputs():
    assert _frame(["Q: hot\nA:", "Q: cold\nA:"]) == ("Q: ", "\nA:")
    assert _frame(["Q: stop\nA:", "Q: step\nA:"]) == ("Q: st", "p\nA:")
    assert _frame(["say hot", "say cold"]) == ("say ", "")  # the "t" of one is no "d"
    assert _frame(["same", "same"]) == ("same", "")


def test_the_text_that_the_split_sorts_by():
    """Read off the examples, which are all in the training pool under it, and under no other."""
    words = [word for word in map("w{}".format, range(100)) if in_training_pool(word)][:10]
    other = {"rendering": {"prompt_template": "Undo {input}!"}}
    cases = [
        ([Example(f"Q: {word}\nA:", " x") for word in words], "Q: w", "\nA:", "Q: new\nA:", "new"),
        ([Example(f"Undo {word}!", " x", **other) for word in words], "Undo w", "!", "Undo new!", "new"),
        ([Example(f"Say {word}.", " x") for word in words], "Say ", ".", "Say new.", "new"),
    ]
    for examples, head, tail, prompt, text in cases:
        assert _pool_key(examples, "", head, tail)(prompt) == text
    prompts = [prompt for prompt in map("Say w{}.".format, range(100)) if in_training_pool(prompt)][:10]
    assert _pool_key([Example(prompt, " x") for prompt in prompts], "", "Say w", ".")("Say w7.") == "Say w7."
    elsewhere = [Example(f"Say w{number}.", " x") for number in range(10)]
    assert _pool_key(elsewhere, "", "Say w", ".") is None
    # Behind an instruction, of whose end the prompt may have the white space.
    for again, space in (("Be brief.", ""), ("Be brief.", "\n\n"), ("Be brief.\n", "")):
        told = [Example(f"{again}{space}{prompt}", " x") for prompt in prompts]
        assert _pool_key(told, again, f"{space}Say w", ".")(f"{again}{space}Say w7.") == "Say w7."
        told = [Example(f"{again}{space}Say {word}.", " x") for word in words]
        assert _pool_key(told, again, f"{space}Say ", ".")(f"{again}{space}Say new.") == "new"


def test_none_where_they_cannot_be_made():
    layout = locate(tiny_model("Llama"))
    options = [Example(e.prompt, options=[" a", " b"], distribution=[0.5, 0.5]) for e in EXAMPLES]
    endless = [Example(f"say {word}", e.target) for word, e in zip("abcdefg", EXAMPLES, strict=False)]
    long = [replace(e, prompt=f"{'ab ' * 40}{e.prompt}\nA:") for e in EXAMPLES]
    for examples in (options, endless, long):
        assert pseudo_labelled(layout, TOKENIZER, examples, "\n") == []
    chats = [replace(e, prompt=f"{e.prompt}<eos>") for e in EXAMPLES]  # the model's text is read without such tokens
    layout.model.generate = None  # would raise if it were called
    assert pseudo_labelled(layout, TOKENIZER, chats, "\n") == []
    layout.model.can_generate = lambda: False
    assert pseudo_labelled(layout, TOKENIZER, [replace(e, prompt=f"{e.prompt} we") for e in EXAMPLES], "\n") == []


# On a pretrained model


def past_tense():
    """Ten examples, and the right answer to every word of the set."""
    pairs, _ = load_pairs("pairs:past_tense", None)
    return laai.load_task("pairs:past_tense", seed=0).train, {pair.input: pair.output for pair in pairs}


def test_a_model_that_follows_the_rule_labels_new_words_rightly():
    model, tokenizer = loaded(SMOLLM2)
    layout = locate(model)
    examples, known = past_tense()
    found = pseudo_labelled(layout, tokenizer, examples, "\n")
    assert 10 <= len(found) <= INPUTS
    assert not {one.prompt for one in found} & {one.prompt for one in examples}
    assert len({one.prompt for one in found}) == len(found)
    words = [(one.prompt.removeprefix("Q: ").removesuffix("\nA:"), one.target.removeprefix(" ")) for one in found]
    assert all(in_training_pool(word) for word, _ in words)  # no input of a test item, in no word set
    right = [known[word] == answer for word, answer in words if word in known]
    assert len(right) >= 5 and sum(right) >= 0.8 * len(right)
    # Each as the harness's ten-shot prompt is answered, and as surely as is said.
    for one in found[:3]:
        ids = [tokenizer.encode(one.behind(examples)), tokenizer.encode(one.target + "\n")]
        score, greedy = slow_reference.loglikelihood(model, *ids, None)
        assert greedy and math.exp(score) >= CONFIDENCE

    # Ten answers to the wrong words are no rule that it could follow.
    targets = [one.target for one in examples]
    mixed = [replace(one, target=target) for one, target in zip(examples, targets[1:] + targets[:1], strict=True)]
    assert pseudo_labelled(layout, tokenizer, mixed, "\n") == []


@dataclass(frozen=True)
class Described(Example):
    """Behind an instruction, which a few-shot prompt has once, as the harness's description of a task."""

    def behind(self, shots):
        again = INSTRUCTION + "\n\n"
        return (
            again
            + "".join(shot.prompt.removeprefix(again) + shot.answer + "\n\n" for shot in shots)
            + (self.prompt.removeprefix(again))
        )


def test_an_instruction_comes_once_and_every_label_has_it():
    model, tokenizer = loaded(SMOLLM2)
    bare, known = past_tense()
    examples = [Described(f"{INSTRUCTION}\n\n{one.prompt}", one.target) for one in bare]
    found = pseudo_labelled(locate(model), tokenizer, examples, "\n")
    assert len(found) >= 10
    for one in found[:3]:
        asked = examples[0].behind(examples).removesuffix(bare[0].prompt) + one.prompt.split("\n\n")[1]
        assert one.prompt.startswith(f"{INSTRUCTION}\n\nQ: ") and asked.count(INSTRUCTION) == 1
        ids = [tokenizer.encode(asked), tokenizer.encode(one.target + "\n")]
        score, greedy = slow_reference.loglikelihood(model, *ids, None)
        assert greedy and math.exp(score) >= CONFIDENCE


def test_none_where_the_question_comes_otherwise_behind_shots():
    class Chat(Example):
        def behind(self, shots):
            return "".join(f"<{shot.prompt}>{shot.answer}" for shot in shots) + f"<{self.prompt}>"

    examples = [Chat(f"{e.prompt} we", e.target) for e in EXAMPLES]
    model = tiny_model("Llama")
    model.generate = None  # would raise if it were called
    assert pseudo_labelled(locate(model), TOKENIZER, examples, "\n") == []


# The training


@pytest.fixture
def further(monkeypatch):
    """Two further examples that every model makes."""
    found = [Example("ab we", " no"), Example("there", " wx")]
    monkeypatch.setattr(select, "pseudo_labelled", lambda *arguments: found)
    return found


def test_the_vector_is_trained_on_all_and_the_record_is_of_those_given(further):
    model, seen = tiny_model("Llama"), []
    result, choice = select.train_chosen(model, TOKENIZER, EXAMPLES, seed=3, task="x", on_step=seen.append)
    assert choice.further == further
    setting = choice.layer, choice.l1, choice.group
    start = laai.train(model, TOKENIZER, EXAMPLES, *setting, steps=1, start="icl").intervention
    whole = laai.train(model, TOKENIZER, [*EXAMPLES, *further], *setting, steps=choice.steps, start=start)
    vectors = [one.intervention.vector(choice.layer) for one in (result, whole)]
    torch.testing.assert_close(*vectors, atol=1e-4, rtol=1e-3)
    assert seen == result.history and len(seen) == choice.steps
    assert result.objective == pytest.approx(whole.objective, abs=1e-5)
    facts = result.intervention.metadata["training"]
    of_given = laai.train(model, TOKENIZER, EXAMPLES, *setting, steps=1).intervention.metadata["training"]
    assert (facts["pseudo_labels"], facts["start"], facts["n_train"]) == (2, "icl", len(EXAMPLES))
    assert facts["examples_sha256"] == of_given["examples_sha256"]


def test_the_papers_training_has_none(further):
    choice = select.choose(tiny_model("Llama"), TOKENIZER, EXAMPLES, start="zero")
    assert not choice.further
    assert not select.choose(tiny_model("Llama"), TOKENIZER, EXAMPLES, 1, 0.1, 0.1, 5).further
