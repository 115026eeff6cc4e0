"""Training one vector: replay against plain hooked forwards and against PEFT, on the same model, data and loss.

A step is one loss and its gradient over ten examples, on a random Llama of 65 M parameters (12 layers, layer 4,
float32). Every method gets the same rows and scores the same target tokens; weights are frozen, only what is trained
has gradients. LoRA has rank 4 on q_proj and v_proj of that one layer; the soft prompt has 8 tokens. LoReFT has
rank 4 at the last prompt token of that layer's output; pyreft 0.1.0 pins transformers 4.45.1, so pip refuses it beside
ours, but after `pip install -c constraints.txt pyvene` and `pip install --no-deps pyreft` it runs; without it its
column is missing. A whole training is 100 steps of Adam with everything it takes to get there: for replay the
activation's scale, the prefix pass and the check against the plain path; for the others wrapping a copy of the model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model

import laai_core as laai
from laai_core.encode import Batch, encode_examples
from laai_core.forward import PlainForward
from laai_core.hooks import frozen
from laai_core.locate import locate
from laai_core.objective import Objective
from laai_core.replay import ReplayForward
from measure import Record, Timings, interleaved, median, milliseconds, parser, ratio
from models import parameters, random_llama, small_llama, word_examples, word_tokenizer

LAYER = 4
EXAMPLES = 10
SHAPES = [(120, 1), (8, 2), (250, 3)]  # prompt and target tokens
TRAININGS = [(120, 1), (8, 2)]
GOALS = {(120, 1): "20", (8, 2): "2.3"}  # times as fast


class Peer:
    """Another way to adapt the frozen model, trained on the scored tokens of a batch."""

    def __init__(self, model: Any, kind: str, batch: Batch, layer: int) -> None:
        self._batch = batch
        self._logits, self._learnt = METHODS[kind](model, batch, layer)

    def step(self) -> None:
        """One loss and its gradient."""
        batch = self._batch
        logits = self._logits()
        virtual = logits.shape[1] - batch.input_ids.shape[1]
        scores = logits[batch.row, batch.column + virtual].log_softmax(-1)
        loss = -scores.gather(1, batch.token.unsqueeze(1)).sum() / EXAMPLES
        for parameter, gradient in zip(self._learnt, torch.autograd.grad(loss, self._learnt), strict=True):
            parameter.grad = gradient

    def train(self, steps: int) -> None:
        """Adam, as our own trainings."""
        optimizer = torch.optim.Adam(self._learnt, lr=1e-3)
        for _ in range(steps):
            self.step()
            optimizer.step()


def peft(model: Any, batch: Batch, config: Any) -> Method:
    """An adapter of PEFT."""
    adapted = get_peft_model(model, config).eval()

    def logits() -> torch.Tensor:
        return adapted(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits

    return logits, [p for p in adapted.parameters() if p.requires_grad]


def lora(model: Any, batch: Batch, layer: int) -> Method:
    """Rank 4 on q_proj and v_proj of one layer."""
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[layer]
    )
    return peft(model, batch, config)


def soft_prompt(model: Any, batch: Batch, layer: int) -> Method:
    """Eight virtual tokens."""
    return peft(model, batch, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=8))


def loreft(model: Any, batch: Batch, layer: int) -> Method:
    """Rank 4 at the last prompt token of one layer's output."""
    import pyreft

    width = model.config.hidden_size
    intervention = pyreft.LoreftIntervention(embed_dim=width, low_rank_dimension=4, dtype=torch.float32)
    place = {"layer": layer, "component": "block_output", "low_rank_dimension": 4, "intervention": intervention}
    adapted = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=place))
    where = {"sources->base": (None, [[[length - 1] for length in batch.prompt_lengths]])}
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}

    def logits() -> torch.Tensor:
        return adapted(inputs, unit_locations=where)[1].logits

    return logits, [p for p in adapted.parameters() if p.requires_grad]


Method = tuple[Callable[[], torch.Tensor], list[Any]]  # the logits as they are with what is learnt, and what that is
METHODS = {"PEFT LoRA": lora, "PEFT soft prompt": soft_prompt}
if find_spec("pyreft"):  # not among the requirements: it pins an old transformers
    METHODS["pyreft LoReFT"] = loreft
PEERS = ["plain hook", *METHODS]


def steps_timed(model: Any, tokenizer: Any, prompt: int, target: int, layer: int, rounds: int) -> Timings:
    """Seconds per step of each method."""
    examples = word_examples(EXAMPLES, prompt, target)
    batch = encode_examples(tokenizer, examples, stop="")
    objective, layout = Objective(examples), locate(model)
    vectors = 0.01 * torch.randn(1, math.prod(layout.shape(layer, "heads")))
    cases: dict[str, Callable[[], Any]] = {}
    for name, kind in (("replay", ReplayForward), ("plain hook", PlainForward)):
        forward = kind(layout, batch, layer, "heads")
        cases[name] = lambda forward=forward: forward.loss_and_gradient(vectors, objective, [0])
    for name in PEERS[1:]:
        cases[name] = Peer(copy.deepcopy(model), name, batch, layer).step
    with frozen(model):
        return interleaved(cases, rounds, warmup=2)


def trainings_timed(
    model: Any, tokenizer: Any, prompt: int, target: int, layer: int, steps: int, rounds: int
) -> Timings:
    """Seconds per whole training of each method."""
    examples = word_examples(EXAMPLES, prompt, target)
    batch = encode_examples(tokenizer, examples, stop="")
    cases: dict[str, Callable[[], Any]] = {}
    for name, path in (("replay", "auto"), ("plain hook", "plain")):

        def ours(path: str = path) -> None:
            laai.train(model, tokenizer, examples, layer, optimizer="adam", steps=steps, stop="", forward=path)

        cases[name] = ours
    for name in PEERS[1:]:
        cases[name] = lambda name=name: Peer(copy.deepcopy(model), name, batch, layer).train(steps)
    cases["replay"]()  # the warm-up: the slow ones would only warm the same memory
    return interleaved(cases, rounds, warmup=0)


def rows_of(timings: dict[tuple[int, int], Timings], unit: Callable[[float], str]) -> list[list[str]]:
    """Table rows: a length, the methods' medians, and how many times longer the others take than replay."""
    rows = []
    for (prompt, target), times in timings.items():
        goal = GOALS.get((prompt, target))
        rows.append(
            [f"{prompt} + {target}", *(unit(median(times, name)) for name in times)]
            + [f"{ratio(times, name, 'replay'):.1f}×" for name in PEERS]
            + [f"≥ {goal}×" if goal else ""]
        )
    return rows


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--steps", type=int, default=100, help="of a whole training (default: %(default)s)")
    flags.add_argument("--skip-trainings", action="store_true", help="only the steps: the trainings take an hour")
    arguments = flags.parse_args()
    quick = arguments.quick
    model = small_llama() if quick else random_llama()
    layer = 1 if quick else LAYER
    tokenizer = word_tokenizer()
    record = Record(
        "training",
        __doc__ or "",
        {"model": f"random Llama, {parameters(model)} parameters", "layer": layer, "examples": EXAMPLES}
        | {"training steps": arguments.steps, "rounds": arguments.rounds},
    )
    columns = ["prompt + target tokens", "replay", *PEERS, *(f"{name} / replay" for name in PEERS), "goal"]
    stepped = {
        shape: steps_timed(model, tokenizer, *shape, layer, arguments.rounds)
        for shape in ([(12, 2)] if quick else SHAPES)
    }
    record.keep("seconds per step", {f"{p}+{t}": times for (p, t), times in stepped.items()})
    record.table("Milliseconds per step", columns, rows_of(stepped, milliseconds))
    record.save(quick)
    if arguments.skip_trainings:
        return
    trained = {}
    for shape in [(12, 2)] if quick else reversed(TRAININGS):
        trained[shape] = trainings_timed(
            model, tokenizer, *shape, layer, 3 if quick else arguments.steps, arguments.rounds
        )
    record.keep("seconds per training", {f"{p}+{t}": times for (p, t), times in trained.items()})
    record.table("Seconds per whole training", columns, rows_of(trained, lambda seconds: f"{seconds:.2f}"))
    record.save(quick)


if __name__ == "__main__":
    main()
