"""The opinion metrics against numpy and scipy's entropy, and against what hf-laai's log-likelihoods say."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from scipy.special import softmax
from scipy.stats import entropy
from test_task_yamls import Scripted
from tiny import tiny_model, tiny_tokenizer

from laai_core import Intervention, load_task
from lm_eval_laai.methods.evaluate import task_losses
from lm_eval_laai.metrics import opinion_metrics
from lm_eval_laai.model import HFLaai
from lm_eval_laai.tasks import include_path, list_tasks

EPSILON = 1e-4
SURVEY = [task.name for task in list_tasks() if task.group == "laai_survey"]
METRICS = {"kl", "kl_reverse", "wasserstein", "tv"}


def moved(p, pi, positions):
    """Wasserstein-1 in one dimension: the area between the two cumulative distributions."""
    order = np.argsort(positions)
    excess = np.cumsum((np.asarray(p) - np.asarray(pi))[order])
    return np.abs(excess[:-1]) @ np.diff(np.asarray(positions)[order])


def by_hand(logprobs, distribution, positions):
    """The four metrics, none of them by the code that is tested."""
    p, pi = softmax(np.array(logprobs)), np.array(distribution)
    smooth = (1 - EPSILON) * pi + EPSILON / len(pi)
    return {
        "kl": entropy(p, smooth),
        "kl_reverse": entropy(smooth, p),
        "wasserstein": moved(p, pi, positions) / (max(positions) - min(positions)),
        "tv": np.abs(p - pi).sum() / 2,
    }


@pytest.mark.parametrize("seed", range(40))
def test_against_formulas(seed):
    draw = random.Random(seed)
    count = draw.randint(2, 10)
    shares = [draw.random() * (draw.random() < 0.8) for _ in range(count - 1)] + [1.0]
    distribution = [share / sum(shares) for share in shares]
    positions = [draw.uniform(-3, 3) for _ in range(count)]  # in no order, at no equal distances
    logprobs = [draw.gauss(-5, 4) for _ in range(count)]
    found = opinion_metrics(logprobs, distribution, positions)
    assert found == pytest.approx(by_hand(logprobs, distribution, positions), rel=1e-9, abs=1e-12)


def test_positions_one_to_k_are_normalised_by_k_minus_1():
    logprobs, distribution = [0.0, -800.0, -800.0, -800.0], [0.0, 0.0, 0.0, 1.0]
    for positions in ([0, 1, 2, 3], [4, 3, 2, 1]):
        found = opinion_metrics(logprobs, distribution, positions)
        assert found["wasserstein"] == pytest.approx(1) and found["tv"] == pytest.approx(1)
    one_step = opinion_metrics(logprobs, [0.0, 1.0, 0.0, 0.0], [1, 2, 3, 4])
    assert one_step["wasserstein"] == pytest.approx(1 / 3)
    middle_last = opinion_metrics(logprobs[:3], [0.0, 0.0, 1.0], [1, 2, 1.5])  # "about the same", listed last
    assert middle_last["wasserstein"] == pytest.approx(0.5)


def test_agreement_is_zero_and_an_answer_nobody_gave_costs_a_finite_amount():
    agreed = opinion_metrics([math.log(0.7), math.log(0.3)], [0.7, 0.3], [0, 1])
    assert all(abs(value) < 1e-4 for value in agreed.values())
    assert opinion_metrics([0.0, -50.0], [0.0, 1.0], [0, 1])["kl"] == pytest.approx(math.log(2 / EPSILON))
    far = opinion_metrics([0.0, -2000.0], [0.0, 1.0], [0, 1])  # exp(-2000) is 0 in any float
    assert far["kl_reverse"] == pytest.approx(2000, rel=1e-3)


def test_a_model_that_answers_nan_has_nan_distances():
    found = opinion_metrics([math.nan, -1.0], [0.5, 0.5], [1, 2])
    assert set(found) == METRICS and all(map(math.isnan, found.values()))


def test_an_impossible_option_adds_nothing_to_kl():
    found = opinion_metrics([0.0, -math.inf], [0.5, 0.5], [0, 1])
    assert found["kl"] == pytest.approx(math.log(2), rel=1e-3) and found["kl_reverse"] == math.inf


def test_options_without_order_have_no_wasserstein():
    assert set(opinion_metrics([-1.0, -2.0], [0.5, 0.5], [1, 1])) == METRICS - {"wasserstein"}


# Through the harness


def manager(**metadata):
    return TaskManager(include_path=str(include_path()), include_defaults=False, metadata=metadata)


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_the_metric_sees_the_softmax_of_the_loglikelihoods(kind):
    tokenizer, model = tiny_tokenizer(bos=True, kind=kind), tiny_model("Llama")
    model.config.max_position_embeddings = 512  # the questions are longer than the other tests' texts
    vector = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    iv = Intervention({1: vector}, head_dim=8)
    lm = HFLaai(pretrained=model, tokenizer=tokenizer, intervention=iv, batch_size=4, max_length=512)
    result = simple_evaluate(model=lm, tasks=["laai_survey"], task_manager=manager(), limit=6, bootstrap_iters=0)
    for name in SURVEY:
        test = load_task(name.removeprefix("laai_")).test[:6]
        samples = sorted(result["samples"][name], key=lambda sample: sample["doc_id"])
        assert len(samples) == len(test)
        for sample, example in zip(samples, test, strict=True):
            # Answers of several tokens count by the sum of their tokens' log-probabilities.
            lengths = [
                len(lm.tok_encode(example.prompt + o)) - len(lm.tok_encode(example.prompt)) for o in example.options
            ]
            assert max(lengths) == 2
            scores = lm.loglikelihood(
                [Instance("loglikelihood", {}, (example.prompt, option), 0) for option in example.options]
            )
            expected = by_hand([score for score, _ in scores], example.distribution, range(len(scores)))
            assert {metric: sample[metric] for metric in METRICS} == pytest.approx(expected, abs=1e-5)
        # And it is what training minimises.
        (losses,) = task_losses(model, tokenizer, [(iv, test)])
        assert losses == pytest.approx([sample["kl"] for sample in samples], abs=1e-4)


def test_survey_means_stderrs_and_directions():
    def answer(request):
        """Answers that depend on the question and on the letter, and on nothing else."""
        letter = request.args[1].strip()
        return -float(len(request.args[0]) % 7) * (ord(letter) - ord("A")) / 3, False

    lm = Scripted(None)
    lm.loglikelihood = lambda requests, disable_tqdm=False: [answer(request) for request in requests]
    result = simple_evaluate(model=lm, tasks=["laai_survey"], task_manager=manager(), num_fewshot=0, log_samples=False)
    averages = dict.fromkeys(METRICS, 0.0)
    for name in SURVEY:
        test = load_task(name.removeprefix("laai_")).test
        rows = []
        for example in test:
            steepness = len(example.prompt) % 7
            rows.append(
                by_hand(
                    [-steepness * k / 3 for k in range(len(example.options))],
                    example.distribution,
                    range(len(example.options)),
                )
            )
        for metric in METRICS:
            values = np.array([row[metric] for row in rows])
            assert result["results"][name][f"{metric},none"] == pytest.approx(values.mean())
            stderr = values.std(ddof=1) / math.sqrt(len(values))
            assert result["results"][name][f"{metric}_stderr,none"] == pytest.approx(stderr)
            averages[metric] += values.mean() / len(SURVEY)
        assert result["higher_is_better"][name] == dict.fromkeys(METRICS, False)
    for metric, value in averages.items():
        assert result["results"]["laai_survey"][f"{metric},none"] == pytest.approx(value)
        assert result["results"]["laai_survey"][f"{metric}_stderr,none"] > 0


def test_ten_shots_are_the_training_examples_with_the_groups_most_common_answers():
    task = manager(seed=2).load("laai_survey_divided")["tasks"]["laai_survey_divided"]
    train = load_task("survey_divided", seed=2).train
    solved = "".join(f"{e.prompt}{e.options[int(np.argmax(e.distribution))]}\n\n" for e in train)
    assert solved.count("Question: ") == 10
    for doc in list(task.test_docs())[:5]:
        assert task.fewshot_context(doc, 10) == solved + doc["prompt"]
        assert task.fewshot_context(doc, 0) == doc["prompt"]
    for task in manager().load(SURVEY)["tasks"].values():
        assert task.config.num_fewshot is None
