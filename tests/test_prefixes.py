"""The prefix that a task's prompts share is run once, and every answer stays the slow reference's."""

from __future__ import annotations

import random
import string

import pytest
import slow_reference
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_apply import EVERY, intervention, spec
from test_hf_laai import assert_same, folder_of, harness_model, reference_scores, requests
from tiny import HEADS, VOCABULARY, hybrid_model, tiny_model, tiny_tokenizer

import laai_core as laai
from laai_core.apply import Edit
from laai_core.locate import locate
from lm_eval_laai.model import HFLaai
from lm_eval_laai.prefixes import SharedPrefixes
from lm_eval_laai.scoring import Row, Scorer

KINDS = [("heads", "last"), ("residual", "generated"), ("mlp", "all")]
SHOTS = "Q: qwe\nA: rty\n\nQ: uio\nA: pas\n\nQ: dfg\nA: hjk\n\n"  # some forty tokens: five sliding windows
ENDS = ["Q: d\nA:", "Q: fghjk\nA:", "Q: lz\nA:", "Q: xcvbnmqwe\nA:", "Q: r\nA:"]
GREEDY = {"until": ["\n"], "max_gen_toks": 3, "do_sample": False}


def few_shot(shots: str = SHOTS) -> list[str]:
    """Prompts of unequal length."""
    return [shots + end for end in ENDS]


def options(prompts: list[str]) -> list[tuple[str, str]]:
    """For every other prompt one-token options, one of which begins the other; for the others longer ones."""
    several = [[" a", " b", " ab"], [" hot", " cold", " ho"]]
    return [(prompt, option) for number, prompt in enumerate(prompts) for option in several[number % 2]]


def counted(lm: HFLaai) -> list[int]:
    """Tokens of every forward call from here on, padding included."""
    seen: list[int] = []
    lm._layout.model.register_forward_pre_hook(
        lambda m, a, k: seen.append((a[0] if a else k["input_ids"]).numel()), with_kwargs=True
    )
    return seen


def generated(lm: HFLaai, prompts: list[str], tasks: list[str] | None = None, how: dict = GREEDY) -> list[str]:
    return lm.generate_until(requests("generate_until", [(p, how) for p in prompts], tasks), disable_tqdm=True)


def assert_greedy(lm: HFLaai, prompts: list[str], got: list[str], specs: list) -> None:
    for prompt, text, one in zip(prompts, got, specs, strict=True):
        tokens = slow_reference.greedy(lm.model, lm.tok_encode(prompt), GREEDY["max_gen_toks"], one)
        if lm.eot_token_id in tokens:
            tokens = tokens[: tokens.index(lm.eot_token_id)]
        assert text == lm.tok_decode(tokens).split("\n")[0]


def tokens_of(lm: HFLaai, text: str) -> int:
    return len(lm.tok_encode(text))


@pytest.mark.parametrize("name", EVERY)
def test_every_architecture(name):
    """Positions, batch sizes, sliding windows shorter than the prefix, rows that are padded within it."""
    for kind, batch_size in zip(KINDS, (1, 4, 64), strict=True):
        lm = harness_model(name, intervention(name, *kind), batch_size)
        prompts, one = few_shot(), spec(name, *kind)
        seen = counted(lm)
        texts = generated(lm, prompts)
        assert sum(seen) < len(prompts) * tokens_of(lm, SHOTS), "the prefix ran more than once"
        assert_greedy(lm, prompts, texts, [one] * len(prompts))
        pairs = options(prompts)
        got = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
        assert_same(got, reference_scores(lm, pairs, [one] * len(pairs)))


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("kind", ["generate_until", "loglikelihood"])
def test_the_prefix_runs_once_a_task(kind, batch_size):
    """Counted in tokens, against the same requests as one-request tasks."""
    prompts = few_shot()
    arguments = [(p, GREEDY) for p in prompts] if kind == "generate_until" else options(prompts)
    found = []
    for tasks in (["task"] * len(arguments), [str(number) for number in range(len(arguments))]):
        lm = harness_model(iv=intervention("Llama"), batch_size=batch_size)
        seen = counted(lm)
        found.append((getattr(lm, kind)(requests(kind, arguments, tasks), True), sum(seen)))
    (got, together), (want, apart) = found
    trial = 5 + 2 * (14 + 4)  # whether the model continues a cache: a prefix, and two rows whole and behind it, twice
    assert together <= apart - (len(prompts) - 1) * (tokens_of(lm, SHOTS) - 2) + trial
    if kind == "loglikelihood":
        assert_same(got, want)
    else:
        assert got == want


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_tasks_with_shots_and_vectors_of_their_own(tmp_path, kind, batch_size):
    """Two vectors behind one prefix, a third behind another, and an untouched task, in shared batches."""
    shots = {"a": SHOTS, "b": SHOTS, "c": SHOTS[::-1] + "\n", "free": SHOTS}
    ivs = {task: intervention("Llama", *kind, seed=number) for number, task in enumerate("abc")}
    more = {"max_batch_size": 3, "max_length": 128} if batch_size == "auto" else {}
    lm = harness_model(iv=folder_of(tmp_path, ivs), batch_size=batch_size, unrouted="none", **more)
    specs = {task: spec("Llama", *kind, seed=number) for number, task in enumerate("abc")}
    rows = [(task, prompt) for number in range(len(ENDS)) for task in shots for prompt in [shots[task] + ENDS[number]]]
    tasks, prompts = [task for task, _ in rows], [prompt for _, prompt in rows]
    assert_greedy(lm, prompts, generated(lm, prompts, tasks), [specs.get(task) for task in tasks])
    pairs = [(task, pair) for task, prompt in rows for pair in options([prompt, prompt])[2:5]]
    got = lm.loglikelihood(requests("loglikelihood", [p for _, p in pairs], [t for t, _ in pairs]), disable_tqdm=True)
    assert_same(got, reference_scores(lm, [p for _, p in pairs], [specs.get(task) for task, _ in pairs]))


def test_truncated_prompts_run_whole():
    """The longest prompts of a task lose their first tokens, and with them the prefix."""
    lm = harness_model(iv=intervention("Llama"), batch_size=2)
    lm._max_length = tokens_of(lm, SHOTS + ENDS[1]) + GREEDY["max_gen_toks"]
    prompts = few_shot()
    got = generated(lm, prompts)
    for prompt, text in zip(prompts, got, strict=True):
        tokens = lm.tok_encode(prompt)[-(lm.max_length - GREEDY["max_gen_toks"]) :]
        answer = slow_reference.greedy(lm.model, tokens, GREEDY["max_gen_toks"], spec("Llama"))
        assert text == lm.tok_decode(answer).split("\n")[0].split("<eos>")[0]


def test_truncated_prompts_of_one_token_again_and_again():
    """They begin as the prefix does that they have lost, which is longer than the model's table of positions."""
    options = {"iv": intervention("GPT2"), "batch_size": 2, "tokenizer": tiny_tokenizer(bos=False)}
    lm = harness_model("GPT2", **options)
    pairs = [(f"{' a' * 600} {word}", " we") for word in ("over", "there", "we")]
    got = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    plain = harness_model("GPT2", **options)
    plain._prefixes.cache = lambda *args, **kwargs: None
    assert_same(got, plain.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True))


def test_a_prompt_that_is_all_prefix_keeps_its_last_token():
    """One prompt begins the others, so that the prefix is all of it: the vector still finds its last token."""
    lm = harness_model(iv=intervention("Llama"), batch_size=4)
    prompts = [SHOTS + "Q: d", SHOTS + "Q: d\nA:", SHOTS + "Q: d\nA: b\n"]
    assert_greedy(lm, prompts, generated(lm, prompts), [spec("Llama")] * 3)
    pairs = options(prompts)
    got = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    assert_same(got, reference_scores(lm, pairs, [spec("Llama")] * len(pairs)))


@pytest.mark.parametrize("how", [{"num_beams": 2, "do_sample": False}, {"do_sample": True, "temperature": 1.0}])
def test_beams_and_sampling_run_whole_prompts(how):
    lm = harness_model(iv=intervention("Llama"), batch_size=2)
    seen, prompts = counted(lm), few_shot()
    generated(lm, prompts, how={"until": ["\n"], "max_gen_toks": 1, **how})
    assert sum(seen) >= len(prompts) * tokens_of(lm, SHOTS)


def test_what_shares_nothing_runs_as_before():
    """One prompt, or a prefix of a few tokens: the very same calls as for tasks of one request."""
    for prompts in ([SHOTS + ENDS[0]] * 3, [SHOTS + ENDS[0]], ENDS):
        lm = harness_model(iv=intervention("Llama"), batch_size=2)
        seen = counted(lm)
        generated(lm, prompts)
        together = list(seen)
        seen.clear()
        generated(lm, prompts, [str(number) for number in range(len(prompts))])
        assert together == seen


def test_a_recurrent_state_runs_whole_prompts():
    """A convolution's state cannot be cut to a column."""
    model = hybrid_model()
    iv = laai.Intervention({1: torch.ones(HEADS, 8)})
    lm = HFLaai(pretrained=model, tokenizer=tiny_tokenizer(bos=True), batch_size=1, intervention=iv)
    prompts = few_shot()
    seen = counted(lm)
    got = generated(lm, prompts)
    assert sum(seen) > len(prompts) * tokens_of(lm, SHOTS)
    one = {"path": "model.layers.1.self_attn.out_proj", "vector": iv.vector(1), "site": "heads", "position": "last"}
    assert_greedy(lm, prompts, got, [one] * len(prompts))


def test_prefixes_are_freed():
    """While a run goes on, the least recently used ones above a limit; afterwards all."""
    lm = harness_model(iv=intervention("Llama"), batch_size=1)
    prefixes = lm._prefixes
    draw = random.Random(0)
    for _ in range(3):
        long = [draw.randrange(3, VOCABULARY) for _ in range(2000)]
        assert prefixes.cache([[*long, 5]], [None], [long], left=True) is not None
    assert len(prefixes._kept) == 2 and list(prefixes._kept)[-1][0] == tuple(long)
    shots = ["".join(draw.choices(string.ascii_letters, k=30)) for _ in range(4)]
    generated(lm, [s + end for s in shots for end in ENDS], [s for s in shots for _ in ENDS])
    assert not prefixes._kept


_MODEL = tiny_model("Llama")
_TOKENS = st.lists(st.integers(3, 6), max_size=5)  # few tokens, so that rows often begin alike
_ROW = st.tuples(_TOKENS, st.lists(st.integers(3, 299), min_size=1, max_size=4), st.sampled_from([0, 1, 2, None]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(_ROW, min_size=2, max_size=7), batch_size=st.integers(1, 5), task=st.integers(1, 3))
def test_random_batches_equal_the_reference(rows, batch_size, task):
    """Prompts that go on differently behind one of two prefixes, or begin with it for a while only."""
    layout = locate(_MODEL)
    edits = [Edit.of(intervention("Llama", *kind, seed=i), layout) for i, kind in enumerate(KINDS)]
    specs = [spec("Llama", *kind, seed=i) for i, kind in enumerate(KINDS)]
    prefixes = [tuple(range(10, 40)), tuple(range(20, 44))]
    asked = []
    for number, (tail, continuation, which) in enumerate(rows):
        prefix = prefixes[number // task % 2]
        prompt = [*prefix[: len(prefix) - (number % 3) * 2], *tail, 7]
        asked.append((prompt, continuation, which, prefix))
    with torch.no_grad():
        got = Scorer(_MODEL, layout, 128, None, SharedPrefixes(layout)).score(
            [Row(p, c, None if w is None else edits[w], "", prefix) for p, c, w, prefix in asked], batch_size
        )
    want = [slow_reference.loglikelihood(_MODEL, p, c, None if w is None else specs[w]) for p, c, w, _ in asked]
    assert_same(got, want)
