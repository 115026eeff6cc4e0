"""Ten-shot prompts under a vector: the shots run once a task, against once a request.

SmolLM2-135M-Instruct (`laai models fetch smollm2-135m`) under the example vector for antonyms, behind the ten solved
examples that seed 0 draws from the bundled lexicon. Generation: greedy, to the end of the line. Multiple choice: four
answers of the lexicon as log-likelihood requests of one question. Once a request: the same requests, each as a task of
its own, since requests share the prefix of their task. Every round runs the shots anew.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.instance import Instance

import laai_core as laai
from lm_eval_laai.experiments.load import ModelSource
from lm_eval_laai.model import HFLaai
from measure import Record, Timings, interleaved, median, parser, ratio
from models import REFERENCE_MODEL

VECTOR = REFERENCE_MODEL.parents[1] / "examples/vectors/smollm2-135m-antonym/laai_antonym.safetensors"
HOW = {"until": ["\n"], "max_gen_toks": 16, "do_sample": False}
ONCE, EACH = "once a task", "once a request"


def asked(kind: str, arguments: list[tuple[Any, ...]], apart: bool) -> list[Instance]:
    """Requests of one task, or each of its own."""
    return [
        Instance(kind, {}, one, 0, metadata=(f"task {number}" if apart else "task", number, 1))
        for number, one in enumerate(arguments)
    ]


def arguments(items: int) -> dict[str, list[tuple[Any, ...]]]:
    """{kind of request: its arguments} for `items` words."""
    split = laai.load_task("lexicon_antonym", seed=0)
    shots = "".join(f"{example.prompt}{example.target}\n\n" for example in split.train)
    words = split.test[:items]
    answers = [example.target for example in split.test]
    return {
        "generate_until": [(shots + word.prompt, HOW) for word in words],
        "loglikelihood": [
            (shots + word.prompt, answers[(number + step) % len(answers)])
            for number, word in enumerate(words)
            for step in (0, 7, 13, 29)
        ],
    }


def compared(lm: HFLaai, kind: str, given: list[tuple[Any, ...]], rounds: int) -> tuple[Timings, dict[str, list[Any]]]:
    """Seconds of each round both ways, and the answers."""
    answers: dict[str, list[Any]] = {}

    def run(name: str) -> None:
        answers[name] = getattr(lm, kind)(asked(kind, given, apart=name == EACH), disable_tqdm=True)

    return interleaved({name: lambda name=name: run(name) for name in (EACH, ONCE)}, rounds), answers


def difference(once: list[Any], each: list[Any]) -> str:
    """Of answers: how many texts, or the largest of the log-probabilities."""
    if isinstance(once[0], str):
        return f"{sum(a != b for a, b in zip(once, each, strict=True))} of {len(once)} texts"
    return f"{max(abs(a - b) for (a, _), (b, _) in zip(once, each, strict=True)):.0e} nats"


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--items", type=int, default=24, help="words asked for (default: %(default)s)")
    flags.set_defaults(rounds=3)
    options = flags.parse_args()
    items, rounds = (2, 1) if options.quick else (options.items, options.rounds)
    model, tokenizer = ModelSource("smollm2-135m", dtype="float32", device="cpu").load()
    vector = laai.Intervention.load(VECTOR)
    settings = {"model": "smollm2-135m, float32", "items": items, "rounds": rounds}
    record = Record("few_shot_prefix", __doc__ or "", settings)
    rows = []
    for kind, batch_size in (("generate_until", 1), ("generate_until", 16), ("loglikelihood", 16)):
        given = arguments(items)[kind]
        lm = HFLaai(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, intervention=vector)
        times, answers = compared(lm, kind, given, rounds)
        record.keep(f"{kind}, batch {batch_size}, seconds", times)
        rows.append(
            [f"{kind}, batch {batch_size}", len(lm.tok_encode(given[0][0]))]
            + [f"{median(times, EACH):.2f}", f"{median(times, ONCE):.2f}", f"{ratio(times, EACH, ONCE):.1f}×", "≥ 2×"]
            + [difference(answers[ONCE], answers[EACH])]
        )
    columns = ["requests", "prompt tokens", f"{EACH}, s", f"{ONCE}, s", "ratio", "goal", "answers differ by"]
    record.table(f"Ten shots, {items} items", columns, rows)
    record.save(options.quick)


if __name__ == "__main__":
    main()
