"""hf-laai wherever the model lives: offloaded, in half precision, quantised, under PEFT adapters."""

from __future__ import annotations

import peft
import pytest
import slow_reference
import torch
import transformers
from accelerate.hooks import AlignDevicesHook
from test_apply import PATHS, intervention, spec
from test_hf_laai import assert_same, multiple_choice, requests, texts
from test_train import RULES, TOKENIZER
from tiny import tiny_model, tiny_tokenizer

import laai_core as laai
from laai_core.locate import locate
from lm_eval_laai.experiments.load import ModelSource
from lm_eval_laai.model import HFLaai

KINDS = [("heads", "last"), ("residual", "generated"), ("mlp", "all")]
NEW_TOKENS = 4
VIRTUAL = 5
GENERATION = {"until": ["\n"], "max_gen_toks": NEW_TOKENS, "do_sample": False}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model's folder, as long as the tokenizer: with `peft=` the harness cuts the embedding to that."""
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = tiny_model("Llama"), tiny_tokenizer(bos=True)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def load(saved: str, kind: tuple[str, str] = KINDS[0], batch_size: int = 3, **arguments) -> HFLaai:
    return HFLaai(saved, intervention("Llama", *kind), device="cpu", batch_size=batch_size, **arguments)


def tokens_of(lm: HFLaai, text: str) -> list[int]:
    return lm.tok_encode(text)


def written(lm: HFLaai, tokens: list[int]) -> str:
    """What the harness makes of generated tokens."""
    if lm.eot_token_id in tokens:
        tokens = tokens[: tokens.index(lm.eot_token_id)]
    return lm.tok_decode(tokens).split("\n")[0]


def assert_equals_reference(lm: HFLaai, loglikelihood, greedy) -> None:
    """Both request types against `loglikelihood(prompt, continuation)` and `greedy(prompt)`, on token ids."""
    pairs = multiple_choice(1, contexts=2)
    want = [loglikelihood(*lm._encode_pair(*pair)) for pair in pairs]
    assert_same(lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True), want)
    contexts = [*texts(3, 7), "a"]
    answers = lm.generate_until(requests("generate_until", [(c, GENERATION) for c in contexts]), disable_tqdm=True)
    assert answers == [written(lm, greedy(tokens_of(lm, context))) for context in contexts]


def assert_equals_plain_model(lm: HFLaai, model, one) -> None:
    assert_equals_reference(
        lm,
        lambda prompt, continuation: slow_reference.loglikelihood(model, prompt, continuation, one),
        lambda prompt: slow_reference.greedy(model, prompt, NEW_TOKENS, one),
    )


# Offloading.

DISK = ["model.layers.1", "model.layers.2", "model.norm", "lm_head"]
BY_HAND = {name: "cpu" for name in ("model.embed_tokens", "model.layers.0", "model.rotary_emb")}
BY_HAND |= {name: "disk" for name in DISK}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spread", [{"max_cpu_memory": "90KB"}, {"device_map": BY_HAND}], ids=["auto", "by-hand"])
def test_offloaded_to_disk(saved, tmp_path, kind, spread):
    lm = load(saved, kind, parallelize=True, offload_folder=str(tmp_path), **spread)
    devices = {p.device.type for p in lm.model.model.layers[1].parameters()}
    assert devices == {"meta"} and lm.model.hf_device_map["model.embed_tokens"] == "cpu"
    assert_equals_plain_model(lm, tiny_model("Llama"), spec("Llama", *kind))


def test_no_step_of_a_training_reads_the_layers_below_its_vector(saved, tmp_path, monkeypatch):
    """The same vector, and no step reads those layers: only the layers from the vector's on need room."""
    read = []
    load_weights = AlignDevicesHook.pre_forward
    monkeypatch.setattr(AlignDevicesHook, "pre_forward", lambda *a, **k: read.append(a[1]) or load_weights(*a, **k))
    below = {"model.layers.0": "disk", "model.layers.1": "disk"}
    others = dict.fromkeys(
        ["model.embed_tokens", "model.layers.2", "model.norm", "model.rotary_emb", "lm_head"], "cpu"
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        saved, device_map=below | others, offload_folder=str(tmp_path)
    )
    lowest = model.model.layers[0].mlp.up_proj
    assert lowest.weight.is_meta
    readings = []
    for steps in (1, 6):
        read.clear()
        offloaded = laai.train(model, TOKENIZER, RULES, 2, steps=steps).intervention.vector(2)
        readings.append(read.count(lowest))
    assert readings == [7, 7]  # checks (two of padding), prompts, targets, few-shot prompts: one forward each
    whole = transformers.AutoModelForCausalLM.from_pretrained(saved)
    assert torch.equal(offloaded, laai.train(whole, TOKENIZER, RULES, 2, steps=6).intervention.vector(2))


def test_device_auto_lets_accelerate_place_the_layers(saved):
    source = ModelSource(saved, device="auto")
    model, _ = source.load()
    assert source.checked_device() == ModelSource(saved).checked_device()
    assert model.device.type == source.checked_device().type and not model.training


# Half precision.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(saved, kind, dtype):
    """The reference's own rounding, and no more: both are as far from float32 as the dtype makes them."""
    lm = load(saved, kind, dtype=str(dtype).removeprefix("torch."), softmax_dtype="float32")
    assert lm.model.dtype == dtype
    model, one = tiny_model("Llama").to(dtype), spec("Llama", *kind)
    pairs = multiple_choice(1, contexts=2)
    got = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    want = [slow_reference.loglikelihood(model, *lm._encode_pair(*pair), one) for pair in pairs]
    unrounded = [slow_reference.loglikelihood(model.float(), *lm._encode_pair(*pair), one) for pair in pairs]
    rounding = max(abs(a - b) for (a, _), (b, _) in zip(want, unrounded, strict=True))
    assert rounding > 1e-4
    assert [score for score, _ in got] == pytest.approx([score for score, _ in want], abs=3 * rounding)
    context = "abcdef"
    (answer,) = lm.generate_until(requests("generate_until", [(context, GENERATION)]), disable_tqdm=True)
    ids = tokens_of(lm, context)
    model = model.to(dtype)
    with torch.no_grad(), slow_reference.writing(model, one, len(ids)):
        cached = model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=False)
    assert answer == written(lm, cached[0, len(ids) :].tolist())


# Quantised linear layers.


def quantised(how: str):
    model = tiny_model("Llama")
    if how == "quanto int8 weights":
        quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
        quanto.quantize(model, weights=quanto.qint8)
        quanto.freeze(model)
    else:
        torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        dynamic = how == "torchao int8 dynamic"
        name = "Int8DynamicActivationInt8WeightConfig" if dynamic else "Int8WeightOnlyConfig"
        torchao.quantize_(model, getattr(torchao, name)())
    return model


@pytest.mark.parametrize("how", ["torchao int8 weights", "torchao int8 dynamic", "quanto int8 weights"])
@pytest.mark.parametrize("kind", KINDS)
def test_quantised(kind, how):
    model = quantised(how)
    plain = tiny_model("Llama")(torch.tensor([[5, 6, 7]])).logits
    assert (model(torch.tensor([[5, 6, 7]])).logits - plain).abs().max() > 1e-2, "nothing was quantised"
    lm = HFLaai(model, intervention("Llama", *kind), tokenizer=tiny_tokenizer(bos=True), batch_size=3)
    one = spec("Llama", *kind)
    if "dynamic" not in how:
        return assert_equals_plain_model(lm, model, one)
    # Activations are rounded to int8 by a scale taken from them: a last bit that differs in another batch can become
    # a whole int8 step. Such layers are exempt from bit-identity and from 1e-4.
    pairs = multiple_choice(1, contexts=2)
    want = [slow_reference.loglikelihood(model, *lm._encode_pair(*pair), one)[0] for pair in pairs]
    untouched = [slow_reference.loglikelihood(model, *lm._encode_pair(*pair), None)[0] for pair in pairs]
    got = [score for score, _ in lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)]
    assert got == pytest.approx(want, abs=0.1)
    assert max(abs(a - b) for a, b in zip(want, untouched, strict=True)) > 0.5


# PEFT adapters.

CAUSAL = {"task_type": "CAUSAL_LM"}
FEED_FORWARD = {"feedforward_modules": ["down_proj"]}
MERGEABLE = {
    "LoRA": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **CAUSAL),
    "LoRA on the projection": peft.LoraConfig(r=4, target_modules=["o_proj", "down_proj"], **CAUSAL),
    "IA3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], **FEED_FORWARD, **CAUSAL),
}
PROMPTS = {
    "prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=VIRTUAL, **CAUSAL),
    "prefix tuning": peft.PrefixTuningConfig(num_virtual_tokens=VIRTUAL, **CAUSAL),
}
if transformers.__version__.startswith("4."):
    del PROMPTS["prefix tuning"]  # PEFT's own prefix raises StopIteration there for a model that is on the CPU only


def adapter(saved: str, folder, config) -> str:
    """A random adapter's folder."""
    from transformers import AutoModelForCausalLM

    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(saved), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MERGEABLE)
def test_adapter_equals_the_merged_model(saved, tmp_path, name, kind):
    folder = adapter(saved, tmp_path, MERGEABLE[name])
    lm = load(saved, kind, peft=folder)
    assert locate(lm.model).virtual_tokens == 0
    merged = peft.PeftModel.from_pretrained(tiny_model("Llama"), folder).merge_and_unload()
    ids = torch.tensor([[5, 6, 7]])
    assert (merged(ids).logits - tiny_model("Llama")(ids).logits).abs().max() > 0.1
    assert_equals_plain_model(lm, merged, spec("Llama", *kind))


class BehindVirtualTokens:
    """Full forwards of one unpadded row behind a soft prompt or a prefix, the vector added by index."""

    def __init__(self, saved: str, folder: str, kind: tuple[str, str]):
        from transformers import AutoModelForCausalLM

        self.peft = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved), folder).eval()
        self.base = self.peft.get_base_model()
        site, self.position = kind
        self.site, self.spec = site, spec("Llama", *kind)
        self.module = self.base.get_submodule(PATHS[site]["Llama"].format(1))

    def inputs(self, ids: torch.Tensor) -> tuple[dict, int]:
        """The base model's arguments, and how many columns stand before the text."""
        prompt = self.peft.get_prompt(batch_size=1)
        if not isinstance(prompt, torch.Tensor):
            return {"input_ids": ids, "past_key_values": prompt}, 0
        return {"inputs_embeds": torch.cat([prompt, self.base.get_input_embeddings()(ids)], 1)}, prompt.shape[1]

    @torch.no_grad()
    def logits(self, tokens: list[int], prompt_length: int) -> torch.Tensor:
        """[tokens, V]"""
        inputs, before = self.inputs(torch.tensor([tokens]))
        columns = [before + i for i in slow_reference.positions(self.position, prompt_length, len(tokens))]

        def changed(x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            x[:, columns] += self.spec["vector"].reshape(-1)
            return x

        if self.site == "heads":
            handle = self.module.register_forward_pre_hook(lambda m, a: (changed(a[0]),))
        else:
            handle = self.module.register_forward_hook(
                lambda m, a, out: (changed(out[0]), *out[1:]) if isinstance(out, tuple) else changed(out)
            )
        try:
            return self.base(**inputs).logits[0, before:]
        finally:
            handle.remove()

    def loglikelihood(self, prompt: list[int], continuation: list[int]) -> tuple[float, bool]:
        logits = self.logits(prompt + continuation[:-1], len(prompt))[len(prompt) - 1 :]
        scores = torch.log_softmax(logits.double(), -1)
        total = sum(float(scores[i, token]) for i, token in enumerate(continuation))
        return total, logits.argmax(-1).tolist() == continuation

    def greedy(self, prompt: list[int]) -> list[int]:
        tokens = list(prompt)
        for _ in range(NEW_TOKENS):
            tokens.append(int(self.logits(tokens, len(prompt))[-1].argmax()))
        return tokens[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PROMPTS)
def test_virtual_tokens_are_no_part_of_the_prompt(saved, tmp_path, name, kind, batch_size):
    folder = adapter(saved, tmp_path, PROMPTS[name])
    lm = load(saved, kind, batch_size, peft=folder)
    assert locate(lm.model).virtual_tokens == VIRTUAL
    reference = BehindVirtualTokens(saved, folder, kind)
    assert_equals_reference(lm, reference.loglikelihood, reference.greedy)


# Tensor parallelism that the harness does not know, or that is not transformers' own; see test_tensor_parallel.py.


@pytest.mark.parametrize("argument", [{"tp_size": 2}, {"distributed_config": {"tp_size": 2}}], ids=["size", "config"])
def test_arguments_that_the_harness_does_not_know_are_refused_before_the_model_loads(argument):
    with pytest.raises(laai.LaaiError, match="is refused with an intervention.*use tp_plan=auto"):
        HFLaai("no/such-model", intervention("Llama"), **argument)


@pytest.fixture()
def mesh(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_sharded_model_is_refused(mesh):
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    model = tiny_model("Llama")
    parallelize_module(model.model.layers[1].self_attn, mesh, {"o_proj": RowwiseParallel()})
    with pytest.raises(laai.LaaiError, match="is sharded inside its layers"):
        HFLaai(model, intervention("Llama"), tokenizer=tiny_tokenizer(bos=True))
    with pytest.raises(laai.LaaiError, match="is sharded inside its layers"), laai.apply(model, intervention("Llama")):
        pass
