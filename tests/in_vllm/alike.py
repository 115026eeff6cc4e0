"""Requests under several interventions, and how answers of vllm-laai compare with those of hf-laai.

Importing it skips the tests where vLLM is missing: `.ci/vllm` runs them in an environment of theirs. The folder is not
called vllm, since as a folder on the path it would answer `import vllm` where there is no such package.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from test_hf_laai import requests

import laai_core as laai
from laai_core.errors import LaaiError
from laai_core.locate import locate
from laai_core.vllm.options import request_arguments
from lm_eval_laai.known_models.folder import pretrained
from lm_eval_laai.model import HFLaai

# Before vLLM is imported. One process holds engine and test; V2 needs Triton; small caches; no threads to wait for.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

pytest.importorskip("vllm", reason="vLLM is not installed: .ci/vllm makes an environment that has it")

TOLERANCE = 1e-4
# Name, site, position and layers of the interventions of a batch; a request of any other task is untouched.
KINDS = {
    "heads": ("heads", "last", (2,)),
    "several": ("heads", "last", (1, -1)),
    "residual": ("residual", "generated", (1,)),
    "mlp": ("mlp", "all", (2,)),
}
TASKS = [*KINDS, "untouched"]


def hf(pretrained: str | Path, intervention: Any, **more: Any) -> HFLaai:
    """hf-laai in float64, so that what differs is vLLM's rounding: hf's own in float32 reaches the tolerance. Its
    softmax is in float32 as vLLM's: over Gemma's 262,144 words that rounds to 1.8e-4, for any logits alike."""
    how = {"dtype": "float64", "softmax_dtype": "float32", "device": "cpu", "batch_size": 8}
    return HFLaai(str(pretrained), intervention, **{**how, **more})


def here(name: str) -> str:
    """A known model's folder; skips the test where it has not been fetched."""
    try:
        return pretrained(name)
    except LaaiError as error:
        pytest.skip(f"{name} is not here: {error}")


def vectors(model: Any, folder: Path, strength: float = 3.0) -> str:
    """Random vectors of `strength` times the norm of the site's activation, one file for each of KINDS."""
    layout = locate(model)
    ids = torch.arange(3, 35).unsqueeze(0)
    for seed, (name, (site, position, layers)) in enumerate(KINDS.items()):
        found = {}
        for layer in layers:
            seen: list[torch.Tensor] = []
            module = layout.module(layer, site)
            hook = (
                module.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
                if site == "heads"
                else module.register_forward_hook(
                    lambda m, args, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out)
                )
            )
            with torch.no_grad():
                model(ids)
            hook.remove()
            size = float(seen[0].square().mean().sqrt())
            draw = torch.randn(layout.shape(layer, site), generator=torch.Generator().manual_seed(seed))
            found[layer % len(layout.blocks)] = strength * size * draw
        laai.Intervention(found, site, position).save(folder / f"{name}.safetensors")
    return str(folder)


WORDS = "hot cold big small wall there morning nothing another fast quick tree water light night house".split()


def pairs() -> tuple[list[tuple[str, str]], list[str]]:
    """Contexts with continuations, and the tasks: every intervention and none, options that share a context, the same
    text split at three places, a context without text and one of one token."""
    texts = [f"Q: {a}\nA: {b}\n\nQ: {c}\nA:" for a, b, c in zip(WORDS, WORDS[3:], WORDS[6:], strict=False)]
    asked = [(text, option) for text in texts[:4] for option in (" cold", " a big wall", " big")]
    asked += [("Q: hot\nA:", " cold water"), ("Q: hot\nA: cold", " water"), ("Q: hot", "\nA: cold water")]
    asked += [("", "Q: hot"), ("Q", ": hot")]
    both = [(pair, task) for pair in asked for task in TASKS]
    return [pair for pair, _ in both], [task for _, task in both]


def assert_scores_alike(one: Any, other: Any) -> None:
    arguments, tasks = pairs()
    scored = [lm.loglikelihood(requests("loglikelihood", arguments, tasks), disable_tqdm=True) for lm in (one, other)]
    assert_same_scores(*scored)
    untouched = [score for (score, _), task in zip(scored[0], tasks, strict=True) if task == "untouched"]
    for kind in KINDS:  # no vector is too weak to be missed
        touched = [score for (score, _), task in zip(scored[0], tasks, strict=True) if task == kind]
        assert max(abs(a - b) for a, b in zip(touched, untouched, strict=True)) > 100 * TOLERANCE, kind


def assert_same_scores(mine: Any, theirs: Any) -> None:
    differences = [abs(a - b) for (a, _), (b, _) in zip(mine, theirs, strict=True)]
    worst = max(range(len(theirs)), key=differences.__getitem__)
    (arguments, tasks), score = pairs(), theirs[worst]
    print(f"largest difference {differences[worst]:.1e}: {arguments[worst]}, {tasks[worst]}, {score}")
    assert differences[worst] <= TOLERANCE
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in theirs]


def assert_texts_alike(one: Any, other: Any, tokens: int = 12, count: int = 4) -> None:
    contexts = [f"Q: {word}\nA:" for word in WORDS[:count]] + ["Q"]
    both = [(context, task) for context in contexts for task in TASKS]
    how = {"until": ["\n\n"], "max_gen_toks": tokens, "do_sample": False}
    asked = requests("generate_until", [(context, how) for context, _ in both], [task for _, task in both])
    mine, theirs = (lm.generate_until(asked, disable_tqdm=True) for lm in (one, other))
    assert mine == theirs, [(a, b) for a, b in zip(mine, theirs, strict=True) if a != b]
    assert len(set(mine)) > len(contexts)  # the vectors change what is written


def assert_tokens_alike(one: Any, other: Any, tokens: int) -> None:
    """Greedy tokens: a random model writes what is no text, which the two sides decode differently."""
    from vllm import SamplingParams, TokensPrompt

    how = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    for prompt in ([5], [7, 11, 13, 17, 19]):
        names = [*KINDS, None]
        wanted = [SamplingParams(**how, extra_args=request_arguments(name)) for name in names]
        prompts = [TokensPrompt(prompt_token_ids=prompt)] * len(TASKS)
        got = [list(a.outputs[0].token_ids) for a in one.model.generate(prompts, wanted, use_tqdm=False)]
        ivs = [other._routing.get(task) for task in TASKS]
        ids = torch.tensor([prompt] * len(TASKS))
        with laai.apply(other.model, ivs):
            want = other.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=10**6,  # no token: nothing ends early
            )
        assert got == want[:, len(prompt) :].tolist(), f"{got}, {want.tolist()}"
    assert len({*map(tuple, got)}) > 1, got
