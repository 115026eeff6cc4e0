"""vLLM: what vllm-laai costs over the harness's own `vllm`, and how fast it is beside hf-laai.

The same requests through three model classes on one random Llama, in float32 on the CPU, every engine eager: `vllm`;
`vllm-laai` with a vector of scale 0 for every request, so that all write the same text while rows and tables work; and
`hf-laai` with that vector. Generation: contexts of 20 to 80 tokens, 16 new ones. Multiple choice: questions with four
options of three to six tokens behind a 100-token prompt, where hf-laai runs each prompt once and vLLM four times.
Run it in the environment of docs/vllm.md.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

import laai_core as laai
from evaluation import NEW_TOKENS, compared, generation, multiple_choice
from lm_eval_laai.model import HFLaai
from measure import Record, median, parser, ratio
from models import WORDS, parameters, random_llama, word_tokenizer

BATCH = 16  # of hf-laai; vLLM makes its own batches of at most as many requests
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": BATCH,
    "block_size": 32,
    "enforce_eager": True,
    "distributed_executor_backend": "uni",
}


def models(folder: Path, layer: int) -> dict[str, Any]:
    """The three model classes on the model in `folder`."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from lm_eval_laai.vllm_model import VLLMLaai

    hf: dict[str, Any] = {"dtype": "float32", "device": "cpu", "batch_size": BATCH}
    plain = HFLaai(str(folder), **hf)
    width = plain.model.config.num_attention_heads * plain.model.config.head_dim
    vector = torch.randn(width, generator=torch.Generator().manual_seed(0))
    steered = {
        "intervention": laai.Intervention({layer: vector}, head_dim=plain.model.config.head_dim),
        "scale": 0.0,
    }
    return {
        "vllm": VLLMLaai(str(folder), enable_prefix_caching=False, **ENGINE),
        "vllm-laai": VLLMLaai(str(folder), **steered, **ENGINE),
        "hf-laai": HFLaai(str(folder), **steered, **hf),
    }


def main() -> None:
    arguments = parser(__doc__).parse_args()
    quick, rounds = arguments.quick, arguments.rounds
    contexts, questions = (4, 2) if quick else (48, 16)
    small = {
        "hidden": 128,
        "intermediate": 128,
        "layers": 4,
        "heads": 4,
        "vocabulary": WORDS,
    }  # heads of 32: vLLM's least
    model, layer = (random_llama(**small), 1) if quick else (random_llama(), 4)
    settings = {"model": f"random Llama, {parameters(model)} parameters", "contexts": contexts}
    settings |= {"new tokens": NEW_TOKENS, "questions": questions, "batch": BATCH, "rounds": rounds}
    record = Record("vllm_overhead", __doc__ or "", settings)
    with tempfile.TemporaryDirectory() as work:
        model.save_pretrained(work)
        word_tokenizer().save_pretrained(work)
        compare = models(Path(work), layer)
        rows = []
        for title, kind, requests in [
            (f"generation, {contexts} contexts", "generate_until", generation(contexts)),
            (f"multiple choice, {questions} questions", "loglikelihood", multiple_choice(questions)),
        ]:
            times = compared(compare, kind, requests, rounds)
            record.keep(f"{title}, seconds", times)
            overhead = ratio(times, "vllm-laai", "vllm") - 1
            rows.append(
                [title, *(f"{median(times, name):.2f}" for name in compare), f"{overhead:+.1%}", "≤ 3 %"]
                + [f"{ratio(times, 'hf-laai', 'vllm-laai'):.2f}×"]
            )
        columns = ["requests", *(f"{name}, s" for name in compare), "overhead", "goal", "hf-laai / vllm-laai"]
        record.table("The same requests", columns, rows)
    record.save(quick)


if __name__ == "__main__":
    main()
