"""Training and evaluation see the same tokens: what training maximises is what hf-laai's loglikelihood returns."""

from __future__ import annotations

import math

import pytest
from test_hf_laai import requests
from tiny import tiny_model, tiny_tokenizer

import laai_core as laai
from laai_core.encode import encode_examples
from laai_core.forward import PlainForward
from laai_core.locate import locate
from laai_core.replay import ReplayForward
from lm_eval_laai.model import HFLaai

EXAMPLES = [
    laai.Example("Q: hot\nA:", " cold"),
    laai.Example("Q: in the morning\nA:", " le matin, très tôt"),
    laai.Example("q", "u"),
    laai.Example("the", " wallpaper"),
]
SURVEY = [laai.Example("Question: and then?\nAnswer:", options=[" A", " B", " nothing"], distribution=[0.2, 0.3, 0.5])]
STOP = "\n"


@pytest.mark.parametrize("path", [PlainForward, ReplayForward])
@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize("bos", [True, False], ids=["bos", "nobos"])
@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma2"])
def test_training_scores_equal_the_harness(name, bos, kind, path):
    model, tokenizer = tiny_model(name), tiny_tokenizer(bos=bos, kind=kind)
    layout = locate(model)
    for examples in (EXAMPLES, SURVEY):
        iv = laai.train(model, tokenizer, examples, layer=1, steps=5).intervention
        forward = path(layout, encode_examples(tokenizer, examples, STOP), 1, "heads")
        trained = forward.continuation_logprobs(iv.vector(1).flatten().unsqueeze(0)).tolist()
        pairs = [(e.prompt, text) for e in examples for text in (e.options or [e.target + STOP])]
        lm = HFLaai(pretrained=model, tokenizer=tokenizer, batch_size=3, intervention=iv)
        scored = [score for score, _ in lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)]
        assert trained == pytest.approx(scored, abs=1e-4)


@pytest.mark.parametrize("bos", [True, False], ids=["bos", "nobos"])
def test_a_vector_trained_on_a_token_generates_it(bos):
    """A random model says next to nothing, but at its last block a vector can force any token."""
    model, tokenizer = tiny_model("Llama"), tiny_tokenizer(bos=bos)
    example = laai.Example("Q: hot\nA:", "z")
    arguments = [(example.prompt, {"until": ["\n"], "max_gen_toks": 1})]
    free = HFLaai(pretrained=model, tokenizer=tokenizer)
    assert free.generate_until(requests("generate_until", arguments), disable_tqdm=True) != ["z"]
    result = laai.train(model, tokenizer, [example], layer=-1, site="residual", l1=0, group=0, stop="")
    assert result.objective < math.log(2)  # over half of the probability: the greedy choice
    lm = HFLaai(pretrained=model, tokenizer=tokenizer, intervention=result.intervention)
    assert lm.generate_until(requests("generate_until", arguments), disable_tqdm=True) == ["z"]
