"""`apply` against the slow reference, on every architecture."""

from __future__ import annotations

import copy
import gc
import io
import random
import threading

import pytest
import slow_reference
import torch
import transformers
from packaging.version import Version
from tiny import ARCHITECTURES, BLOCK_PATHS, HEADS, HIDDEN, MLP_PATHS, PROJECTION_PATHS, WINDOWED, head_dim, tiny_model

import laai_core as laai
from laai_core.apply import icv_step
from laai_core.hooks import hidden_of, recorded
from laai_core.locate import locate

EVERY = (*ARCHITECTURES, *WINDOWED)
PATHS = {"heads": PROJECTION_PATHS, "residual": BLOCK_PATHS, "mlp": MLP_PATHS}
NEW_TOKENS = 4


def vector_at(name: str, site: str, seed: int) -> torch.Tensor:
    shape = (HEADS, head_dim(name)) if site == "heads" else (HIDDEN,)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def intervention(name: str, site: str = "heads", position: str = "last", layer: int = 1, seed: int = 0, scale=1.0):
    return laai.Intervention({layer: vector_at(name, site, seed)}, site=site, position=position, scale=scale)


def spec(name: str, site: str = "heads", position: str = "last", layer: int = 1, seed: int = 0, scale=1.0) -> dict:
    vector = scale * vector_at(name, site, seed)
    return {"path": PATHS[site][name].format(layer), "vector": vector, "site": site, "position": position}


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Random prompts; the first has one token, where a prefill looks like a decode step."""
    draw = random.Random(seed)
    lengths = [1] + [draw.randint(2, 20) for _ in range(count - 1)]
    return [[draw.randint(3, 299) for _ in range(length)] for length in lengths]


def padded(rows: list[list[int]], left: bool) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("name", EVERY)
def test_forward_equals_reference_row_by_row(name, left):
    """Different interventions, sites and positions in one padded batch; one row untouched."""
    model = tiny_model(name)
    rows = prompts(6)
    kinds = [("heads", "last"), ("heads", "generated"), ("residual", "last"), ("mlp", "all"), None, ("heads", "all")]
    lengths = [1] + [max(1, len(row) - 2) for row in rows[1:]]
    ivs = [None if k is None else intervention(name, *k, seed=i, scale=0.5) for i, k in enumerate(kinds)]
    specs = [None if k is None else spec(name, *k, seed=i, scale=0.5) for i, k in enumerate(kinds)]
    batch = padded(rows, left)
    with torch.no_grad(), laai.apply(model, ivs, prompt_lengths=lengths):
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
        extra = {} if name in ("OPT",) else {"position_ids": positions}
        got = model(**batch, **extra).logits
    for i, row in enumerate(rows):
        with torch.no_grad(), slow_reference.writing(model, specs[i], lengths[i]):
            want = model(input_ids=torch.tensor([row]), use_cache=False).logits[0]
        mine = got[i, -len(row) :] if left else got[i, : len(row)]
        torch.testing.assert_close(mine.log_softmax(-1), want.log_softmax(-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("cache", [True, False], ids=["cache", "nocache"])
@pytest.mark.parametrize("name", EVERY)
def test_generate_equals_reference(name, cache, beams):
    model = tiny_model(name)
    rows = prompts(4, seed=1)
    kinds = [("heads", "last"), ("residual", "generated"), None, ("mlp", "last")]
    ivs = [None if k is None else intervention(name, *k, seed=i) for i, k in enumerate(kinds)]
    specs = [None if k is None else spec(name, *k, seed=i) for i, k in enumerate(kinds)]
    with laai.apply(model, ivs):
        out = model.generate(
            **padded(rows, left=True),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            num_beams=beams,
            do_sample=False,
            use_cache=cache,
        )
    width = max(map(len, rows))
    for i, row in enumerate(rows):
        want = slow_reference.beams(model, row, NEW_TOKENS, beams, specs[i])
        assert out[i, width:].tolist() == want


def test_a_model_that_cannot_generate(monkeypatch):
    monkeypatch.delattr(transformers.GenerationMixin, "generate")
    model, ids = tiny_model("Llama"), torch.tensor([[5, 6, 7]])
    plain = model(input_ids=ids).logits
    with laai.apply(model, laai.Intervention({1: torch.ones(HEADS, head_dim("Llama"))})):
        changed = model(input_ids=ids).logits
    assert torch.equal(plain[:, :2], changed[:, :2]) and not torch.allclose(plain[:, 2], changed[:, 2])


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma2Window"])
def test_generate_in_chunks_and_with_a_static_cache(name):
    model = tiny_model(name)
    rows = prompts(3, seed=2)
    iv, wanted = intervention(name), spec(name)
    width = max(map(len, rows))
    arguments = dict(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, **padded(rows, left=True))
    for extra in ({"prefill_chunk_size": 5}, {"cache_implementation": "static"}):
        if "prefill_chunk_size" in extra and Version(transformers.__version__) < Version("5.1"):
            continue  # raises in 5.0 and drops the padding mask in 4.57, without any intervention
        with laai.apply(model, iv):
            out = model.generate(**arguments, **extra)
        for i, row in enumerate(rows):
            assert out[i, width:].tolist() == slow_reference.beams(model, row, NEW_TOKENS, 1, wanted), extra


def test_sampled_sequences_share_their_rows_intervention():
    """num_return_sequences repeats rows: with a vector that forces one token, every sequence starts with it."""
    model = tiny_model("Llama")
    rows = prompts(2, seed=3)
    strong = [intervention("Llama", "residual", layer=2, seed=s, scale=1000.0) for s in (5, 6)]
    first = [
        slow_reference.greedy(model, r, 1, spec("Llama", "residual", layer=2, seed=s, scale=1000.0))[0]
        for r, s in zip(rows, (5, 6), strict=True)
    ]
    with laai.apply(model, strong):
        out = model.generate(
            **padded(rows, left=True), max_new_tokens=1, do_sample=True, temperature=1e-3, num_return_sequences=3
        )
    assert out[:, -1].tolist() == [first[0]] * 3 + [first[1]] * 3


@pytest.mark.parametrize("site", ["heads", "residual", "mlp"])
@pytest.mark.parametrize("name", EVERY)
def test_earlier_positions_and_lower_layers_are_untouched(name, site):
    """With position last nothing moves before the last prompt token, nor anywhere below the layer: bit for bit."""
    model = tiny_model(name)
    row = prompts(3)[2]
    end, layer = len(row) - 3, 1
    ids = torch.tensor([row])

    def block_outputs() -> list[torch.Tensor]:
        # Hooked anew for each run: behind the intervention's own hooks, so that they see what it wrote.
        outputs: list[torch.Tensor] = []
        blocks = [model.get_submodule(BLOCK_PATHS[name].format(i)) for i in range(3)]
        hooks = [
            b.register_forward_hook(lambda m, a, o: outputs.append(o[0] if isinstance(o, tuple) else o))
            for b in blocks
        ]
        with torch.no_grad():
            model(ids)
        for hook in hooks:
            hook.remove()
        return outputs

    before = block_outputs()
    with laai.apply(model, intervention(name, site), prompt_lengths=[end]):
        after = block_outputs()
    tolerance = 1e-5 if name == "Mixtral" else 0.0  # experts see groups of other sizes, which changes rounding
    for i in range(3):
        difference = (after[i] - before[i]).abs()[0].amax(-1)
        assert difference[: end - 1].max() <= tolerance
        if i < layer:
            assert difference.max() == 0
        else:
            assert difference[end - 1] > 1e-3


def test_manual_decoding_continues_the_prefill():
    """A user's own prefill and decode calls: the vector acts in the first only."""
    model = tiny_model("Llama")
    row = prompts(3)[1]
    with torch.no_grad(), laai.apply(model, intervention("Llama")):
        out = model(torch.tensor([row]), use_cache=True)
        tokens = [int(out.logits[0, -1].argmax())]
        for _ in range(3):
            out = model(torch.tensor([[tokens[-1]]]), past_key_values=out.past_key_values, use_cache=True)
            tokens.append(int(out.logits[0, -1].argmax()))
    assert tokens == slow_reference.greedy(model, row, 4, spec("Llama"))


def test_a_cache_filled_elsewhere_is_refused():
    model = tiny_model("Llama")
    ids = torch.tensor([prompts(2)[1]])
    cache = model(ids, use_cache=True).past_key_values
    with laai.apply(model, intervention("Llama")), pytest.raises(laai.LaaiError, match="prompt_lengths"):
        model(ids[:, :1], past_key_values=cache)


def test_caches_are_continued_each_where_its_own_prompt_ended():
    model, iv = tiny_model("Llama"), intervention("Llama", position="generated")
    rows = [[5, 6, 7, 8], [9, 10]]
    with torch.no_grad(), laai.apply(model, iv):
        alone = []
        for row in rows:
            cache = model(torch.tensor([row]), use_cache=True).past_key_values
            alone.append(model(torch.tensor([[3, 4]]), past_key_values=cache).logits)
        caches = [model(torch.tensor([row]), use_cache=True).past_key_values for row in rows]
        turns = [model(torch.tensor([[3, 4]]), past_key_values=cache).logits for cache in caches]
        assert all(torch.equal(a, b) for a, b in zip(alone, turns, strict=True))
        with pytest.raises(laai.LaaiError, match="prompt_lengths"):
            model(torch.tensor([[3]]), past_key_values=copy.deepcopy(caches[0]))


def test_the_rows_of_a_cache_are_put_in_another_order():
    model, iv = tiny_model("Llama"), intervention("Llama", position="generated")
    prompt = padded([[5, 6, 7, 8], [9, 10]], left=False)
    step = {
        "input_ids": torch.tensor([[3], [4]]),
        "attention_mask": torch.cat([prompt["attention_mask"], torch.ones(2, 1)], 1),
    }
    order = torch.tensor([1, 0, 1])
    with torch.no_grad(), laai.apply(model, iv):
        cache = model(**prompt, use_cache=True).past_key_values
        wanted = model(**step, past_key_values=cache).logits
        cache = model(**prompt, use_cache=True).past_key_values
        cache.batch_select_indices(order)
        found = model(**{name: value[order] for name, value in step.items()}, past_key_values=cache).logits
    torch.testing.assert_close(found, wanted[order])


def test_caches_of_any_class_are_continued():
    class Equal(transformers.DynamicCache):  # not hashable
        def __eq__(self, other):
            return True

    model, iv, ids = tiny_model("Llama"), intervention("Llama", position="generated"), torch.tensor([[5, 6, 7]])
    with torch.no_grad(), laai.apply(model, iv):
        logits = []
        for kind in (transformers.DynamicCache, Equal):
            cache = kind()
            model(ids, past_key_values=cache)
            logits.append(model(ids[:, :1], past_key_values=cache).logits)
    assert torch.equal(*logits)


def test_threads_call_one_model_at_once():
    """One thread waits between the first layer and the edited one until another has made a call of other lengths."""
    model, iv = tiny_model("Llama"), intervention("Llama")
    calls = {"slow": torch.tensor([[5, 6, 7, 8]]), "quick": torch.tensor([[9, 10], [11, 12]])}
    halfway, done = threading.Event(), threading.Event()
    found = {}

    def wait(module, args):
        if threading.current_thread().name == "slow":
            halfway.set()
            done.wait(60)

    def run(how):
        with torch.no_grad():
            found[threading.current_thread().name] = how(calls[threading.current_thread().name])

    def generate(ids):
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)

    for how in (lambda ids: model(ids).logits, generate):
        with torch.no_grad(), laai.apply(model, iv):
            wanted = {name: how(ids) for name, ids in calls.items()}
            hook = model.model.layers[0].register_forward_pre_hook(wait)
            slow = threading.Thread(target=run, args=(how,), name="slow")
            slow.start()
            halfway.wait(60)
            quick = threading.Thread(target=run, args=(how,), name="quick")
            quick.start()
            quick.join()
            done.set()
            slow.join()
            hook.remove()
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
        for event in (halfway, done):
            event.clear()
        found.clear()


def test_a_block_that_ends_while_another_thread_generates():
    model, ids = tiny_model("Llama"), torch.tensor([[5, 6, 7]])
    begun, ended, said = threading.Event(), threading.Event(), []

    class Wait(transformers.StoppingCriteria):
        def __call__(self, *ignored, **named):
            begun.set()
            ended.wait(60)
            return torch.tensor([False])

    def run():
        try:
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, stopping_criteria=[Wait()])
        except laai.LaaiError as error:
            said.append(str(error))

    with laai.apply(model, intervention("Llama")):
        thread = threading.Thread(target=run)
        thread.start()
        begun.wait(60)
    ended.set()
    thread.join()
    assert said == ["a laai.apply block ended while generate ran in a thread: its last tokens are untouched"]


def test_blocks_that_the_garbage_collector_ends():
    """One may end while another begins or ends in the same thread."""

    class Server:
        def __init__(self, model, iv):
            self.me, self.block = self, laai.apply(model, iv)
            self.block.__enter__()

    model, other, iv = tiny_model("Llama"), tiny_model("Llama"), intervention("Llama")
    for _ in range(300):
        Server(other, iv)
        with laai.apply(model, iv):
            pass
    gc.collect()
    assert not {"generate", "init_continuous_batching"} & (vars(model).keys() | vars(other).keys())


def test_a_layer_without_its_decoder_is_refused():
    model = tiny_model("Llama")
    layer, seen = model.model.layers[1], []
    hook = layer.register_forward_pre_hook(lambda *given: seen.append(given[1:]), with_kwargs=True)
    with torch.no_grad():
        model(torch.tensor([[5, 6]]))
    hook.remove()
    ((args, kwargs),) = seen
    with laai.apply(model, intervention("Llama")), pytest.raises(laai.LaaiError, match="without its decoder"):
        layer(*args, **kwargs)


def test_the_default_device_changes_nothing():
    """`meta` stands for another device than the model's: its tensors cannot be mixed with others."""
    model, rows = tiny_model("Llama"), [intervention("Llama"), None]
    batch = {"input_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]), "attention_mask": torch.tensor([[0, 1, 1], [1] * 3])}

    def results():
        with torch.no_grad(), laai.apply(model, rows, prompt_lengths=[1, 3]):
            logits = model(**batch).logits
        with laai.apply(model, rows):
            return logits, model.generate(**batch, max_new_tokens=2, do_sample=False)

    wanted = results()
    with torch.device("meta"):
        found = results()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_gradient_checkpointing_gives_the_same_gradients():
    model, iv = tiny_model("Llama"), intervention("Llama")
    ids = [torch.tensor([[5, 6, 7, 8]]), torch.tensor([[9, 10, 11, 12]])]
    weight = model.model.layers[0].mlp.up_proj.weight

    def gradients(together):
        model.zero_grad()
        with laai.apply(model, iv, prompt_lengths=[2]):
            losses = []
            for row in ids:
                loss = model(row, use_cache=False).logits.square().mean()
                model(row[:, :3], use_cache=False)  # whose graph is gone at once
                losses += [loss] if together else []
                if not together:
                    loss.backward()
            if together:
                sum(losses).backward()
        return weight.grad.clone()

    model.train()
    wanted = gradients(together=False)
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(together=False), wanted)
    with pytest.raises(laai.LaaiError, match="one backward after each forward"):
        gradients(together=True)


def test_several_layers_and_algebra():
    model = tiny_model("Llama")
    row = prompts(2)[1]
    a, b = intervention("Llama", seed=1), intervention("Llama", layer=-1, seed=2)
    total = 2 * a + (-b)
    with torch.no_grad(), laai.apply(model, total):
        got = model(torch.tensor([row])).logits[0, -1]
    with (
        torch.no_grad(),
        slow_reference.writing(model, spec("Llama", seed=1, scale=2.0), len(row)),
        slow_reference.writing(model, spec("Llama", layer=2, seed=2, scale=-1.0), len(row)),
    ):
        want = model(torch.tensor([row])).logits[0, -1]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_nested_apply_adds_and_everything_comes_off():
    model = tiny_model("GPT2")
    row = torch.tensor([prompts(2)[1]])
    with torch.no_grad():
        clean = model(row).logits
        with laai.apply(model, intervention("GPT2", seed=1)):
            one = model(row).logits
            with laai.apply(model, intervention("GPT2", seed=2)):
                both = model(row).logits
            assert torch.equal(model(row).logits, one)
        with laai.apply(model, intervention("GPT2", seed=1) + intervention("GPT2", seed=2)):
            torch.testing.assert_close(model(row).logits, both, atol=1e-4, rtol=1e-4)
        assert not torch.equal(one, clean)
        with pytest.raises(RuntimeError, match="inside"):
            with laai.apply(model, intervention("GPT2")):
                raise RuntimeError("inside")
        assert torch.equal(model(row).logits, clean)
    assert "generate" not in vars(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_blocks_end_in_any_order():
    model, ids = tiny_model("Llama"), torch.tensor([[5, 6, 7]])
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    first, second = (laai.apply(model, intervention("Llama", seed=seed)) for seed in (0, 1))
    wanted = slow_reference.greedy(model, [5, 6, 7], 4, spec("Llama", seed=1))
    compiled = torch.compile(lambda x: torch.compiler.is_compiling(), backend="eager")
    first.__enter__()
    taken = model.generate
    second.__enter__()
    first.__exit__(None, None, None)
    assert model.generate(ids, **options)[0, 3:].tolist() == wanted and not compiled(ids)
    second.__exit__(None, None, None)
    assert compiled(ids) and not {"generate", "init_continuous_batching"} & vars(model).keys()
    with pytest.raises(laai.LaaiError, match="inside a laai.apply block that has ended"):
        taken(ids, **options)


def test_a_model_in_use_is_not_copied():
    model = tiny_model("Llama")
    with laai.apply(model, intervention("Llama")):
        for copied in (copy.deepcopy, lambda model: torch.save(model, io.BytesIO())):
            with pytest.raises(laai.LaaiError, match="cannot be copied or pickled"):
                copied(model)
    copy.deepcopy(model)


def test_two_models_at_once():
    first, second = tiny_model("Llama", seed=1), tiny_model("Llama", seed=2)
    row = torch.tensor([prompts(2)[1]])
    with torch.no_grad():
        with laai.apply(first, intervention("Llama", seed=1)):
            alone = first(row).logits
        with laai.apply(first, intervention("Llama", seed=1)), laai.apply(second, intervention("Llama", seed=2)):
            second(row)
            assert torch.equal(first(row).logits, alone)


def test_a_compiled_model_runs_uncompiled_while_it_is_edited():
    """Compiled code keeps the hooks it was compiled with."""
    model, ids = tiny_model("Llama"), torch.tensor([[5, 6, 7]])
    edits = [intervention("Llama", seed=seed) for seed in (0, 1)]

    def edited(iv):
        with torch.no_grad(), laai.apply(model, iv):
            return model(ids).logits

    wanted = [edited(iv) for iv in edits]
    model.compile(backend="eager")
    before = model(ids).logits
    assert all(torch.equal(edited(iv), want) for iv, want in zip(edits, wanted, strict=True))
    assert torch.equal(model(ids).logits, before)


def test_a_block_that_returns_a_list():
    config = transformers.OpenAIGPTConfig(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=8)
    model, ids, vector = transformers.OpenAIGPTLMHeadModel(config).eval(), torch.tensor([[5, 6, 7]]), torch.randn(16)
    with torch.no_grad():
        before = model(ids).logits
        with laai.apply(model, laai.Intervention({1: vector}, site="residual")):
            moved = model(ids).logits - before
    torch.testing.assert_close(moved[0, -1], model.lm_head(vector))
    assert not moved[0, :-1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_casts_the_vector_when_it_is_added(dtype):
    model = tiny_model("Llama").to(dtype)
    row = prompts(2)[1]
    with torch.no_grad():
        with laai.apply(model, intervention("Llama", scale=0.7)):
            got = model(torch.tensor([row])).logits
        with slow_reference.writing(model, spec("Llama", scale=0.7), len(row)):
            want = model(torch.tensor([row])).logits
    assert got.dtype == dtype
    assert torch.equal(got, want)


def test_icv_follows_the_published_rule():
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(5, 16, generator=generator), torch.randn(16, generator=generator)
    got = icv_step(x, v, 0.1)
    for i in range(5):
        a, b = x[i].double().numpy(), v.double().numpy()
        cosine = (a @ -b) / ((a @ a) ** 0.5 * (b @ b) ** 0.5)
        y = 0.1 * (1 + max(0.0, cosine)) * b / (b @ b) ** 0.5
        moved = a / (a @ a) ** 0.5 + y
        want = (a @ a) ** 0.5 * moved / (moved @ moved) ** 0.5
        torch.testing.assert_close(got[i].double(), torch.tensor(want), atol=1e-5, rtol=1e-5)


def test_icv_is_applied_at_every_token():
    model = tiny_model("Llama")
    row = prompts(3)[2]
    v = vector_at("Llama", "mlp", 3)
    iv = laai.Intervention({1: v}, site="mlp", position="all", operation="icv", scale=0.1)
    module = model.get_submodule("model.layers.1.mlp")
    with torch.no_grad():
        with laai.apply(model, iv):
            got = model(torch.tensor([row])).logits
        hook = module.register_forward_hook(lambda m, a, o: icv_step(o[0], v, 0.1).unsqueeze(0))
        want = model(torch.tensor([row])).logits
        hook.remove()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: intervention("Llama", layer=3), "layer 3 is out of range"),
        (lambda: laai.Intervention({0: torch.ones(4, 16)}), "expects"),
        (lambda: laai.Intervention({0: torch.ones(7)}, site="residual"), "expects"),
    ],
)
def test_an_intervention_that_does_not_fit_is_refused(make, message):
    with pytest.raises(laai.LaaiError, match=message), laai.apply(tiny_model("Llama"), make()):
        pass


ATTENTION_FREE = {
    "Mamba": ({"state_size": 4}, "mixer.out_proj"),
    "Mamba2": ({"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1}, "mixer.out_proj"),
    "FalconMamba": ({"state_size": 4}, "mixer.out_proj"),
    "Rwkv": ({"attention_hidden_size": 16}, "attention.output"),
    "xLSTM": ({"num_heads": 4, "num_blocks": 2}, "mlstm_layer.out_proj"),
}


@pytest.mark.parametrize("name", ATTENTION_FREE)
@pytest.mark.parametrize("projection", [None, "backbone.layers.{}.mixer.out_proj"])
def test_models_without_attention_are_refused(name, projection):
    sizes, linear = ATTENTION_FREE[name]
    config = getattr(transformers, f"{name}Config")(vocab_size=50, hidden_size=16, num_hidden_layers=2, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        laai.LaaiError, match="has no attention heads: expected num_attention_heads in its conf"
    ) as error:
        locate(model, projection)
    assert type(model).__name__ in str(error.value) and linear in str(error.value)


@pytest.mark.parametrize(
    "given",
    ["vectors/antonym.safetensors", [{1: torch.ones(4, 8)}], None, (intervention("Llama") for _ in range(2))],
    ids=["a path", "vectors", "None", "an iterator"],
)
def test_what_is_no_intervention_is_refused(given):
    with pytest.raises(laai.LaaiError, match="expected an Intervention, as"), laai.apply(tiny_model("Llama"), given):
        pass


def test_wrong_rows_are_refused():
    model = tiny_model("Llama")
    ids = torch.tensor([[5, 6, 7], [5, 6, 8]])
    iv = intervention("Llama")
    for rows in ([iv], [], [None, None, None]):
        with (
            laai.apply(model, rows),
            pytest.raises(laai.LaaiError, match=f"{len(rows)} interventions were given for a batch of 2 rows"),
        ):
            model(ids)
    with laai.apply(model, iv, prompt_lengths=[3]), pytest.raises(laai.LaaiError, match="1 entries.*2 rows"):
        model(ids)
    with (
        laai.apply(model, iv, prompt_lengths=[3, 4]),
        pytest.raises(laai.LaaiError, match=r"prompt_lengths\[1\] is 4"),
    ):
        model(ids)
    for lengths in ([0], [], 5, ["a"], [2.5], torch.tensor([0, 3])):
        with pytest.raises(laai.LaaiError, match="a positive whole"), laai.apply(model, iv, prompt_lengths=lengths):
            pass
    own = transformers.GenerationConfig(pad_token_id=5, eos_token_id=2, max_new_tokens=1)
    without = transformers.GenerationConfig(max_new_tokens=1)
    for first, given in ((0, ()), (0, (without,)), (5, (own,))):
        with laai.apply(model, iv), pytest.raises(laai.LaaiError, match="attention_mask"):
            model.generate(torch.tensor([[first, 6, 7]]), *given)


def test_calls_with_rows_that_the_vector_does_not_know_are_refused():
    model, ids = tiny_model("Llama"), torch.tensor([[5, 6, 7, 8]])
    guided = transformers.GenerationConfig(guidance_scale=1.5, max_new_tokens=1)
    with laai.apply(model, intervention("Llama")):
        for options in ({"guidance_scale": 2.0}, {"generation_config": guided}):
            with pytest.raises(laai.LaaiError, match="guidance_scale runs a second"):
                model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        model.generate(ids, attention_mask=torch.ones_like(ids), guidance_scale=1.0, max_new_tokens=1)
        with pytest.raises(laai.LaaiError, match="packed in a row"):
            model(ids, position_ids=torch.tensor([[0, 1, 0, 1]]))
        for padded_left in ([0, 0, 0, 1], [1, 1, 0, 1]):
            model(ids, position_ids=torch.tensor([padded_left]))
        if hasattr(model, "generate_batch"):
            with pytest.raises(laai.LaaiError, match="packed in a row"):
                model.generate_batch([[5, 6], [7]], max_new_tokens=1)


def test_wrong_rows_are_refused_by_generate_too():
    """Four prompts are no two prompts of two beams each."""
    model, ids, iv = tiny_model("Llama"), torch.tensor([[5, 6, 7]] * 4), intervention("Llama")
    for rows, lengths, said in (
        ([iv, None], None, "2 interventions were given for 4 prompts"),
        (iv, [3, 2], "2 prompt_lengths were given for 4 prompts"),
        (iv, [3, 3, 3, 9], r"prompt_lengths\[3\] is 9, the row has 3 tokens"),
    ):
        with laai.apply(model, rows, prompt_lengths=lengths), pytest.raises(laai.LaaiError, match=said):
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1)


@pytest.mark.parametrize("position", ["last", "generated", "all"])
def test_a_row_of_nothing_but_padding_stays_as_it_is(position):
    model = tiny_model("Llama")
    iv = laai.Intervention({1: torch.ones(HIDDEN)}, site="residual", position=position)
    inputs = {"input_ids": torch.tensor([[0, 0, 0], [5, 6, 7]]), "attention_mask": torch.tensor([[0] * 3, [1] * 3])}
    block = model.model.layers[1]
    plain = recorded_once(block, lambda: model(**inputs))
    with laai.apply(model, iv):
        steered = recorded_once(block, lambda: model(**inputs))
    assert torch.equal(plain[0], steered[0]) and not torch.equal(plain[1], steered[1])


def recorded_once(module, run):
    with torch.no_grad(), recorded({"block": module}, hidden_of) as seen:
        run()
    (output,) = seen["block"]
    return output
