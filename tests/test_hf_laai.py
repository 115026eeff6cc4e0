"""hf-laai against the slow reference: exact for every request type, at any batch size, on every architecture."""

from __future__ import annotations

import copy
import math
import random
import string

import peft
import pytest
import slow_reference
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from test_apply import EVERY, intervention, spec
from tiny import (
    HEADS,
    MAX_POSITIONS,
    decoder_with_positions,
    gemma4_model,
    head_dim,
    longrope_model,
    multimodal_model,
    parallel_hybrid_model,
    tiny_model,
    tiny_tokenizer,
)
from transformers import LlamaForCausalLM

import laai_core as laai
from laai_core.errors import LaaiError, WorkFailed
from lm_eval_laai.model import HFLaai

TOLERANCE = 1e-4
KINDS = [("heads", "last"), ("residual", "generated"), ("mlp", "all")]


def requests(kind: str, arguments: list[tuple], tasks: list[str] | None = None) -> list[Instance]:
    tasks = tasks or ["task"] * len(arguments)
    return [
        Instance(kind, {}, argument, 0, (task, number, 1))
        for number, (argument, task) in enumerate(zip(arguments, tasks, strict=True))
    ]


def texts(count: int, seed: int, longest: int = 12) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(1, longest))) for _ in range(count)]


def multiple_choice(seed: int, contexts: int = 3, options: int = 4) -> list[tuple[str, str]]:
    """Contexts with options of one and of several tokens, some alike but for the end, some beginnings of others."""
    pairs = []
    for context in texts(contexts, seed):
        endings = texts(options - 2, seed + 1, 5)
        pairs += [(context, " " + e) for e in [*endings, endings[0] + "x", endings[0] + "xy"]]
    return pairs


def reference_scores(lm, pairs, specs):
    model = lm.model
    answers = []
    for (context, continuation), one in zip(pairs, specs, strict=True):
        prompt, target = lm._encode_pair(context, continuation)
        answers.append(slow_reference.loglikelihood(model, prompt, target, one))
    return answers


def assert_same(got, want):
    assert len(got) == len(want)
    for (a, a_greedy), (b, b_greedy) in zip(got, want, strict=True):
        assert a == pytest.approx(b, abs=TOLERANCE)
        assert a_greedy == b_greedy


def harness_model(name="Llama", iv=None, batch_size=1, tokenizer=None, **kwargs):
    return HFLaai(
        pretrained=tiny_model(name),
        tokenizer=tokenizer or tiny_tokenizer(bos=True),
        batch_size=batch_size,
        intervention=iv,
        **kwargs,
    )


def folder_of(path, ivs: dict[str, laai.Intervention]):
    for task, iv in ivs.items():
        iv.save(path / f"{task}.safetensors")
    return str(path)


@pytest.mark.parametrize("name", EVERY)
def test_loglikelihood(name):
    for number, (kind, batch_size) in enumerate(zip(KINDS, (1, 3, 64), strict=True)):
        lm = harness_model(name, intervention(name, *kind), batch_size)
        pairs = multiple_choice(number, contexts=2) + [("", " abc"), ("q", "w")]
        prompts = reference_scores(lm, pairs[:-2], [spec(name, *kind)] * (len(pairs) - 2))
        got = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
        assert_same(got[:-2], prompts)
        # An empty context: the prefix token is the prompt.
        target = lm.tok_encode(" abc", add_special_tokens=False)
        want = slow_reference.loglikelihood(lm.model, [lm.prefix_token_id], target, spec(name, *kind))
        assert_same(got[-2:-1], [want])


@pytest.mark.parametrize("name", EVERY)
def test_generate_until(name):
    for kind, batch_size in zip(KINDS[:2], (1, 3), strict=True):
        lm = harness_model(name, intervention(name, *kind), batch_size)
        contexts = texts(3, 7) + ["a"]
        arguments = [(c, {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}) for c in contexts]
        got = lm.generate_until(requests("generate_until", arguments), disable_tqdm=True)
        for context, text in zip(contexts, got, strict=True):
            tokens = slow_reference.greedy(lm.model, lm.tok_encode(context), 4, spec(name, *kind))
            if lm.eot_token_id in tokens:
                tokens = tokens[: tokens.index(lm.eot_token_id)]
            assert text == lm.tok_decode(tokens).split("\n")[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_loglikelihood_rolling(kind, batch_size):
    """A text of several windows: position last acts once, at the prefix token of the first."""
    lm = harness_model(iv=intervention("Llama", *kind), batch_size=batch_size, max_length=10)
    documents = ["abcdefghijklmnopqrstuvwxyz", "ab", "the quick brown fox"]
    got = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(d,) for d in documents]), disable_tqdm=True)
    for document, value in zip(documents, got, strict=True):
        tokens = lm.tok_encode(document)
        want, done = 0.0, 0
        while done < len(tokens):
            # By hand: the first window is predicted from the prefix token, each later one continues after the last.
            part = tokens[done : done + 10]
            if done == 0:
                context, one = [lm.prefix_token_id], spec("Llama", *kind)
            else:
                context = tokens[max(0, done + len(part) - 11) : done]
                one = None if kind[1] == "last" else {**spec("Llama", *kind), "position": "all"}
            want += slow_reference.loglikelihood(lm.model, context, part, one)[0]
            done += len(part)
        assert value == pytest.approx(want, abs=TOLERANCE)


def test_the_same_text_split_elsewhere_is_another_request():
    """The harness's own grouping would score both at one split."""
    lm = harness_model(iv=intervention("Llama"), batch_size=4)
    pairs = [("abcdef", "g"), ("abcde", "fg"), ("abcd", "efg"), ("abcdef", "h")]
    want = reference_scores(lm, pairs, [spec("Llama")] * 4)
    assert_same(lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True), want)
    assert len({round(score, 3) for score, _ in want}) == 4


@pytest.mark.parametrize("batch_size", [1, 8])
def test_tasks_of_one_run_get_their_own_interventions(tmp_path, batch_size):
    """Same texts in four tasks: three interventions and, with unrouted=none, an untouched task, in shared batches."""
    tasks = ["a", "b", "group::c", "free"]
    folder = folder_of(tmp_path, {t: intervention("Llama", seed=i) for i, t in enumerate(tasks[:3])})
    lm = harness_model(iv=folder, batch_size=batch_size, unrouted="none")
    specs = [*(spec("Llama", seed=i) for i in range(3)), None]
    pairs = multiple_choice(3, contexts=2)
    all_pairs, all_tasks = pairs * 4, [t for t in tasks for _ in pairs]
    want = reference_scores(lm, all_pairs, [s for s in specs for _ in pairs])
    assert_same(lm.loglikelihood(requests("loglikelihood", all_pairs, all_tasks), disable_tqdm=True), want)
    arguments = [(c, {"until": ["\n"], "max_gen_toks": 3}) for c in texts(3, 1)] * 4
    got = lm.generate_until(requests("generate_until", arguments, [t for t in tasks for _ in range(3)]), True)
    for (context, _), text, one in zip(arguments, got, [s for s in specs for _ in range(3)], strict=True):
        tokens = slow_reference.greedy(lm.model, lm.tok_encode(context), 3, one)
        assert text == lm.tok_decode(tokens).split("\n")[0].split("<eos>")[0]


def test_an_unrouted_task_is_refused_before_any_request_runs(tmp_path):
    lm = harness_model(iv=folder_of(tmp_path, {"a": intervention("Llama")}))
    ran = []
    lm.model.register_forward_pre_hook(lambda *args: ran.append(1))
    pairs = [("ab", "c"), ("ab", "d")]
    with pytest.raises(laai.LaaiError, match="no intervention for b, z: the folder has a"):
        lm.loglikelihood(requests("loglikelihood", [*pairs, pairs[0]], ["a", "b", "z"]), disable_tqdm=True)
    with pytest.raises(laai.LaaiError, match="no intervention for b"):
        lm.generate_until(requests("generate_until", [("ab", {})], ["b"]), disable_tqdm=True)
    with pytest.raises(laai.LaaiError, match="no intervention for b"):
        lm.loglikelihood_rolling(requests("loglikelihood_rolling", [("ab",)], ["b"]), disable_tqdm=True)
    assert not ran


@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until", "loglikelihood_rolling"])
def test_no_intervention_is_identical_to_hf_and_a_zero_one_agrees(kind):
    zero = laai.Intervention({1: torch.zeros(4, 8)})
    model, tokenizer = tiny_model("Llama"), tiny_tokenizer(bos=True)
    arguments = {
        "loglikelihood": multiple_choice(5, contexts=4),
        "generate_until": [(t, {"until": ["\n"], "max_gen_toks": 6}) for t in texts(6, 2)],
        "loglikelihood_rolling": [(t,) for t in texts(4, 3, 40)],
    }[kind]
    hf = getattr(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3), kind)(requests(kind, arguments), True)
    none = getattr(HFLaai(pretrained=model, tokenizer=tokenizer, batch_size=3), kind)(requests(kind, arguments), True)
    zeroed = getattr(HFLaai(pretrained=model, tokenizer=tokenizer, batch_size=3, intervention=zero), kind)(
        requests(kind, arguments), True
    )
    assert none == hf
    if kind == "loglikelihood":
        assert_same(zeroed, hf)
    elif kind == "generate_until":
        assert zeroed == hf
    else:
        assert zeroed == pytest.approx(hf, abs=TOLERANCE)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("bos", [True, False])
def test_tokenizers(padding_side, bos):
    for form in ("bytes", "metaspace"):
        tokenizer = tiny_tokenizer(bos=bos, kind=form)
        tokenizer.padding_side = padding_side
        lm = harness_model(iv=intervention("Llama"), batch_size=4, tokenizer=tokenizer)
        pairs = multiple_choice(9)
        want = reference_scores(lm, pairs, [spec("Llama")] * len(pairs))
        assert_same(lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True), want)


def test_left_truncation_and_windows(caplog):
    lm = harness_model(iv=intervention("Llama"), batch_size=2, max_length=8)
    token = lm.tok_encode("q", add_special_tokens=False)[0]
    prompt = [token + i for i in range(12)]
    # (continuation length, what is left of the prompt): of 8 + 1 tokens the last ones stay.
    for count, left in ((1, 8), (3, 6), (8, 1)):
        continuation = [token + 5 + i for i in range(count)]
        lm._routed_rows = [(next(iter(lm._edits.values())), "", None)]
        try:
            caplog.clear()
            got = lm._loglikelihood_tokens([(("", ""), prompt, continuation)], disable_tqdm=True)
        finally:
            lm._routed_rows = None
        assert "a prompt of 12 tokens is too long for the model: truncated from the left, as 1 of 1" in caplog.text
        assert_same(got, [slow_reference.loglikelihood(lm.model, prompt[-left:], continuation, spec("Llama"))])
    with pytest.raises(laai.LaaiError, match="continuation of 9 tokens does not fit"):
        lm.loglikelihood(requests("loglikelihood", [("a", "b" * 9)]), disable_tqdm=True)
    # Generation truncates to max_length - max_gen_toks.
    context = "abcdefghijkl"
    got = lm.generate_until(requests("generate_until", [(context, {"until": [], "max_gen_toks": 3})]), True)
    tokens = slow_reference.greedy(lm.model, lm.tok_encode(context)[-5:], 3, spec("Llama"))
    assert got == [lm.tok_decode(tokens)]
    for name in ("max_gen_toks", "max_new_tokens"):
        whole = [(context, {"until": [], "max_gen_toks": 7}), (context, {"until": [], name: 8})]
        with pytest.raises(laai.LaaiError, match="document 1.* max_gen_toks is 8, which leaves no room for a prompt"):
            lm.generate_until(requests("generate_until", whole), True)


def test_another_precision_than_the_trainings_is_told(caplog):
    """Of the model, or of the harness's autocast around it."""
    made = intervention("Llama")
    made = laai.Intervention({1: made.vector(1)}, metadata={"training": {"dtype": "float32"}})
    harness_model(iv=made)
    assert "was trained in" not in caplog.text
    harness_model(iv=made, mixed_precision_dtype="bfloat16")
    assert "the intervention was trained in float32, the model runs in torch.bfloat16" in caplog.text


@pytest.mark.parametrize("batch_size", [1, 16])
def test_longrope_has_other_factors_beyond_its_border(batch_size):
    """Of every token: rows of 36 tokens and more continue no cache of shorter ones, and share no batch with these."""
    lm = HFLaai(longrope_model(35), intervention("Phi3"), tokenizer=tiny_tokenizer(bos=True), batch_size=batch_size)
    contexts = [f"{'abcde' * 6}{'x' * more}" for more in (0, 2, 3, 4, 12)]
    pairs = [(context, option) for context in contexts for option in ("q", "qw", "we", "wer")]
    pairs += [
        (context + "y", option) for context in contexts for option in ("e", "er", "erq")
    ]  # one row but for length
    prompts = reference_scores(lm, pairs, [spec("Phi3")] * len(pairs))
    lengths = {len(lm.tok_encode(context)) for context in contexts}
    assert min(lengths) < 35 < max(lengths) and len(lengths) == 5
    assert_same(lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True), prompts)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_continuation_without_tokens_is_refused(batch_size, monkeypatch):
    """An option that merges with the last token of its context leaves nothing to score: that is no certainty of 1."""
    lm = harness_model(iv=intervention("Llama"), batch_size=batch_size)
    encode = lm._encode_pair

    def merging(context, continuation):
        context_ids, continuation_ids = encode(context, continuation)
        return context_ids, [] if continuation == "c" else continuation_ids

    monkeypatch.setattr(lm, "_encode_pair", merging)
    pairs = [("ab", "d"), ("ab", "c"), ("ab", "de")]
    with pytest.raises(
        laai.LaaiError, match="task task, document 1, request 0, which ends in 'ab'.*no tokens of its own"
    ):
        lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    assert len(lm.loglikelihood(requests("loglikelihood", pairs[::2]), disable_tqdm=True)) == 2


def test_automatic_batch_size():
    lm = harness_model(iv=intervention("Llama"), batch_size="auto", max_batch_size=4, max_length=MAX_POSITIONS)
    pairs = multiple_choice(4)
    want = reference_scores(lm, pairs, [spec("Llama")] * len(pairs))
    assert_same(lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True), want)
    assert len(lm.generate_until(requests("generate_until", [("abc", {"max_gen_toks": 2})]), True)) == 1


def test_scale_multiplies_the_interventions_own():
    lm = harness_model(iv=intervention("Llama", scale=0.5), scale=-3.0)
    pairs = multiple_choice(6)
    want = reference_scores(lm, pairs, [spec("Llama", scale=-1.5)] * len(pairs))
    assert_same(lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True), want)
    assert lm.get_model_info()["interventions"][0]["scale"] == -1.5


def test_the_results_name_the_exact_intervention(tmp_path):
    iv = intervention("Llama")
    iv.save(tmp_path / "x.safetensors")
    lm = harness_model(iv=str(tmp_path / "x.safetensors"))
    (reported,) = lm.get_model_info()["interventions"]
    assert reported["sha256"] == iv.sha256
    assert (reported["layers"], reported["site"], reported["position"]) == ([1], "heads", "last")


@pytest.mark.parametrize("batch_size", [1, 8])
def test_continuations_of_one_prompt_share_its_pass(batch_size):
    """Counted in tokens: four options of several tokens run the prompt once."""
    lm = harness_model(iv=intervention("Llama"), batch_size=batch_size)
    pairs = [("a" * 60, " " + option) for option in ("bcd", "efgh", "ijk", "lmno")]
    lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)  # the first tries whether it is exact
    seen = []
    lm.model.register_forward_pre_hook(
        lambda m, a, k: seen.append((a[0] if a else k["input_ids"]).numel()), with_kwargs=True
    )
    lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    prompt = len(lm.tok_encode("a" * 60))
    assert sum(seen) < prompt + 4 * 6 + 2


@pytest.mark.parametrize("options", [[" b"], [" bcd", " efgh"]], ids=["one row", "shared prompt"])
def test_the_head_runs_at_the_answers_columns(options):
    """Over a large vocabulary, logits of the prompt's other tokens would take most of the time."""
    lm = harness_model(iv=intervention("Llama"), batch_size=8)
    pairs = [(letter * 60, option) for letter in "acd" for option in options]
    lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)  # the first tries whether it is exact
    seen = []
    handle = lm.model.lm_head.register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[:2].numel()))
    lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    handle.remove()
    answers = [lm.tok_encode(option, add_special_tokens=False) for _, option in pairs]
    assert sum(seen) <= sum(map(len, answers))


class _AllLogits(LlamaForCausalLM):
    """A model whose own code computes the logits of every token, as some have."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, use_cache=use_cache)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_model_that_computes_all_logits(batch_size):
    lm = harness_model(iv=intervention("Llama"), batch_size=batch_size)
    model = _AllLogits(lm.model.config).eval()
    model.load_state_dict(lm.model.state_dict())
    lm = HFLaai(model, intervention("Llama"), tokenizer=tiny_tokenizer(bos=True), batch_size=batch_size)
    pairs = multiple_choice(3)
    want = reference_scores(lm, pairs, [spec("Llama")] * len(pairs))
    assert_same(lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True), want)


def test_bad_arguments(tmp_path):
    model, tokenizer = tiny_model("Llama"), tiny_tokenizer(bos=True)
    iv = intervention("Llama")
    cases = [
        (dict(intervention=str(tmp_path / "none.safetensors")), "no intervention file"),
        (dict(intervention=str(tmp_path)), "has no .safetensors file"),
        (dict(intervention=iv, scale=float("nan")), "scale is nan"),
        (dict(intervention=iv, scale="big"), "scale is 'big'"),
        (dict(scale=2.0), "scale is 2.0 without an intervention"),
        (dict(intervention=iv, unrouted="maybe"), "unrouted is 'maybe'"),
        (dict(intervention=laai.Intervention({0: torch.ones(4, 16)})), "expects"),
        (dict(intervention=intervention("Llama", layer=7)), "out of range"),
    ]
    for arguments, message in cases:
        with pytest.raises(laai.LaaiError, match=message):
            HFLaai(pretrained=model, tokenizer=tokenizer, **arguments)


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_a_model_under_another_vector_is_refused(kind):
    lm = harness_model(iv=intervention("Llama"))
    given = {"loglikelihood": ("a", " b"), "loglikelihood_rolling": ("a",), "generate_until": ("a", {"until": []})}
    with laai.apply(lm.model, intervention("Llama")):
        with pytest.raises(LaaiError, match="apply block: expected hf-laai with an intervention outside of it"):
            getattr(lm, kind)(requests(kind, [given[kind]]), disable_tqdm=True)


def test_the_default_device_changes_nothing():
    lm = harness_model(iv=intervention("Llama"), batch_size=2)
    pairs, texts = [("a", " b c"), ("b c", " d"), ("a", " e f")], [("a b", {"until": ["q"], "max_gen_toks": 3})] * 2

    def results():
        scored = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
        return scored, lm.generate_until(requests("generate_until", texts), disable_tqdm=True)

    wanted = results()
    with torch.device("meta"):
        assert results() == wanted


def test_tokens_without_their_task_are_refused():
    """Their intervention would be unknown; without interventions they are HFLM's own business."""
    tokens = [(("a", " b"), [5], [6])]
    with pytest.raises(LaaiError, match="expected a call of loglikelihood"):
        harness_model(iv=intervention("Llama"))._loglikelihood_tokens(tokens, disable_tqdm=True)
    assert len(harness_model()._loglikelihood_tokens(tokens, disable_tqdm=True)) == 1


@pytest.mark.parametrize("vectors", [{"layer": -1}, {"metadata": {"note": object()}}])
def test_what_cannot_be_reported_at_the_end_is_refused_at_the_start(vectors):
    unwritable = laai.Intervention({vectors.pop("layer", 0): torch.ones(4, 8)}, **vectors)
    with pytest.raises(LaaiError, match="counts from the end|cannot be written as JSON"):
        HFLaai(tiny_model("Llama"), unwritable, tokenizer=tiny_tokenizer(bos=True))


def test_response_cache_is_refused(tmp_path):
    from lm_eval.api.model import CachingLM

    with pytest.raises(laai.LaaiError, match="--use_cache is refused"):
        CachingLM(harness_model(iv=intervention("Llama")), str(tmp_path / "cache.db"))
    CachingLM(harness_model(), str(tmp_path / "cache.db"))  # without an intervention it is the harness's own


_MODEL = tiny_model("Llama")
_TOKEN = st.integers(3, 299)
_ROW = st.tuples(
    st.lists(_TOKEN, min_size=1, max_size=9),
    st.lists(_TOKEN, min_size=1, max_size=4),
    st.sampled_from([0, 1, 2, None]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(_ROW, min_size=1, max_size=7),
    share=st.booleans(),
    batch_size=st.integers(1, 5),
    scale=st.sampled_from([1.0, -0.5, 2.0]),
)
def test_random_batches_equal_the_reference(rows, share, batch_size, scale):
    """Lengths, splits, interventions per row and scale drawn at random; with `share` all rows have one prompt."""
    from laai_core.apply import Edit
    from laai_core.locate import locate
    from lm_eval_laai.prefixes import SharedPrefixes
    from lm_eval_laai.scoring import Row, Scorer

    layout = locate(_MODEL)
    kinds = [("heads", "last"), ("heads", "generated"), ("residual", "all")]
    edits = [Edit.of(intervention("Llama", *k, seed=i, scale=scale), layout) for i, k in enumerate(kinds)]
    specs = [spec("Llama", *k, seed=i, scale=scale) for i, k in enumerate(kinds)]
    if share:
        rows = [(rows[0][0], continuation, which) for _, continuation, which in rows]
    with torch.no_grad():
        got = Scorer(_MODEL, layout, 64, None, SharedPrefixes(layout)).score(
            [Row(p, c, None if w is None else edits[w], "") for p, c, w in rows], batch_size
        )
    want = [slow_reference.loglikelihood(_MODEL, p, c, None if w is None else specs[w]) for p, c, w in rows]
    assert_same(got, want)


# A NaN or infinite logit


CALLS = {
    "loglikelihood": [("ab", " cd"), ("ef", " gh"), ("ef", " gx")],
    "loglikelihood_rolling": [("ab cd",), ("ef gh ij",)],
    "generate_until": [("ab", {"until": ["\n"], "max_gen_toks": 1}), ("ef", {"until": ["\n"], "max_gen_toks": 1})],
}


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("logit", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_not_finite_names_the_request(kind, batch_size, logit):
    """The second document alone, whatever else is in its batch."""
    lm = harness_model("Llama", intervention("Llama", "heads", "last"), batch_size)
    arguments = CALLS[kind]
    (mark,) = lm.tok_encode("ef"[0], add_special_tokens=False)[:1]

    def spoil(module, args, kwargs, output):
        tokens = kwargs.get("input_ids", args[0] if args else None)
        output.logits[(tokens == mark).any(1), :, 5] = logit

    handle = lm.model.register_forward_hook(spoil, with_kwargs=True)
    with pytest.raises(WorkFailed, match="^task task, document 1, request 0, which ends in 'ef.*': .*NaN or infinite"):
        getattr(lm, kind)(requests(kind, arguments), disable_tqdm=True)
    handle.remove()
    getattr(lm, kind)(requests(kind, arguments), disable_tqdm=True)


@pytest.mark.parametrize("kind", CALLS)
def test_without_an_intervention_such_a_logit_is_as_in_hf(kind, tmp_path):
    """A task that its folder leaves untouched, beside one that is steered."""
    folder = folder_of(tmp_path, {"other": intervention("Llama", "heads", "last")})
    lm = harness_model("Llama", folder, 4, unrouted="none")

    def spoil(module, args, kwargs, output):
        output.logits[..., 5] = math.inf

    handle = lm.model.register_forward_hook(spoil, with_kwargs=True)
    getattr(lm, kind)(requests(kind, CALLS[kind]), disable_tqdm=True)
    handle.remove()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", CALLS)
def test_a_scale_that_overflows_is_no_score(kind, dtype):
    """The vector itself, which is refused at once, or what the model makes of it."""
    model = copy.deepcopy(tiny_model("Llama")).to(dtype)
    ones = laai.Intervention({2: torch.ones(HEADS, head_dim("Llama"))})
    arguments = {"pretrained": model, "tokenizer": tiny_tokenizer(bos=True), "batch_size": 2, "intervention": ones}
    lm = HFLaai(**arguments, scale=0.9 * torch.finfo(dtype).max)
    with pytest.raises(WorkFailed, match="^task task, document [012], .*NaN or infinite under the intervention in"):
        getattr(lm, kind)(requests(kind, CALLS[kind]), disable_tqdm=True)
    with pytest.raises(LaaiError, match=f"layer 2 infinite in {str(dtype).removeprefix('torch.')}$"):
        HFLaai(**arguments, scale=1.1 * torch.finfo(dtype).max)


def test_a_vector_that_overflows_under_autocast_alone():
    """Float32 weights, whose activation is another at the place where the vector is added."""
    ones = laai.Intervention({2: torch.ones(HEADS, head_dim("Llama"))}, scale=1e5)
    lm = harness_model("Llama", ones, 2, mixed_precision_dtype="float16")
    with pytest.raises(LaaiError, match="layer 2: the intervention's vector is infinite in .*float16"):
        lm.loglikelihood(requests("loglikelihood", CALLS["loglikelihood"]), disable_tqdm=True)


# Models that are called otherwise


def of_layer(path: str, layer: int, head_dim: int = 8) -> tuple[laai.Intervention, dict]:
    """An intervention at a layer's head outputs, and the same for the slow reference."""
    iv = laai.Intervention({layer: torch.randn(HEADS, head_dim, generator=torch.Generator().manual_seed(0))})
    return iv, {"path": path, "vector": iv.vector(layer), "site": "heads", "position": "last"}


OTHERWISE = {
    "FalconH1": (parallel_hybrid_model, "model.layers.1.self_attn.o_proj", 8),
    "Roberta": (lambda: decoder_with_positions("Roberta"), "roberta.encoder.layer.1.attention.output.dense", 8),
    "Bart": (lambda: decoder_with_positions("Bart"), "model.decoder.layers.1.self_attn.out_proj", 8),
    "multimodal": (multimodal_model, "model.language_model.layers.1.self_attn.o_proj", 16),
    "Gemma4": (lambda: gemma4_model(2), "model.layers.1.self_attn.o_proj", 16),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_prompts_of_several_lengths_with_long_options(name):
    """Each prompt in one pass with all its options, some behind a common beginning, where the model allows it."""
    make, path, width = OTHERWISE[name]
    iv, one = of_layer(path, 1, width)
    lm = HFLaai(make(), intervention=iv, tokenizer=tiny_tokenizer(bos=True), batch_size=64, backend="causal")
    pairs = multiple_choice(3, contexts=3)
    pairs += [("there is a long beginning: " + context, option) for context, option in pairs]
    got = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    assert_same(got, reference_scores(lm, pairs, [one] * len(pairs)))


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("name", ["multimodal", "Gemma4"])
def test_texts_of_models_with_masks_of_their_own(name, layer):
    """The last two layers of this Gemma 4 have other layers' keys and values."""
    make, path, _ = OTHERWISE[name]
    layer = min(layer, 2) if name == "multimodal" else layer
    iv, one = of_layer(path.replace(".1.", f".{layer}."), layer, 16 if name == "multimodal" or layer % 2 else 8)
    lm = HFLaai(make(), intervention=iv, tokenizer=tiny_tokenizer(bos=True), batch_size=4)
    contexts = ["there is a long beginning: " + text for text in texts(3, 7)] + ["a"]
    arguments = [(c, {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}) for c in contexts]
    got = lm.generate_until(requests("generate_until", arguments), disable_tqdm=True)
    for context, text in zip(contexts, got, strict=True):
        tokens = slow_reference.greedy(lm.model, lm.tok_encode(context), 4, one)
        if lm.eot_token_id in tokens:
            tokens = tokens[: tokens.index(lm.eot_token_id)]
        assert text == lm.tok_decode(tokens).split("\n")[0]


def test_a_multimodal_model_is_trained():
    model, tokenizer = multimodal_model(), tiny_tokenizer(bos=True)
    examples = [laai.Example(f"Q: {a}", f" {b}") for a, b in zip(texts(4, 1), texts(4, 2), strict=True)]
    plain, replay = (laai.train(model, tokenizer, examples, 1, steps=3, forward=f) for f in ("plain", "replay"))
    assert replay.objective == pytest.approx(plain.objective, rel=1e-5)
    with laai.apply(model, replay.intervention):
        model(input_ids=torch.tensor([[5, 6, 7]]))


def test_a_context_without_tokens_is_named():
    """The harness moves white space at a context's end to the continuation."""
    lm = harness_model(iv=intervention("Llama"), tokenizer=tiny_tokenizer(bos=False))
    with pytest.raises(LaaiError, match="task task, document 1, request 0.*its context has no tokens"):
        lm.loglikelihood(requests("loglikelihood", [("a", " b"), ("  ", "b")]), disable_tqdm=True)


def test_an_activated_lora_is_refused():
    """It finds its beginning in the tokens of a call, of which a cache leaves the first out."""
    config = peft.LoraConfig(alora_invocation_tokens=[5], target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(LaaiError, match="activated LoRA"):
        laai.train(
            peft.get_peft_model(tiny_model("Llama"), config), tiny_tokenizer(bos=True), [laai.Example("a", "b")], 1
        )
