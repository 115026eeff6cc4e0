"""Training on a GPU against the floor: reading the weights of the layers at and above the vector twice a step.

A random model of Llama-3-8B's shape in bfloat16, made on the device, vector at layer 3, ten examples of 20 + 2 tokens.
The floor is the bytes of those layers' weights, twice (forward and backward), over the copy bandwidth measured here.
`replay` runs the model's code at every step, `captured` plays the step as one CUDA graph (`--forward captured`); a
training's time has the recording in it. Needs CUDA; says so and ends where there is none: nobody has run it yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

import laai_core as laai
from laai_core.encode import encode_examples
from laai_core.hooks import frozen
from laai_core.locate import locate
from laai_core.objective import Objective
from laai_core.products import Products
from laai_core.replay import ReplayForward
from measure import Record, interleaved, median, parser
from models import WORDS, parameters, random_llama, word_examples, word_tokenizer

LAYER = 3
EXAMPLES = 10
STEPS = 100
PATHS = ("replay", "captured")


def bandwidth(device: torch.device, rounds: int, size: int) -> float:
    """Bytes per second, read and written, of a copy on the device."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = median(interleaved({"copy": synchronized(lambda: target.copy_(source), device)}, rounds), "copy")
    return 2 * size / seconds


def synchronized(call: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """`call`, waited for."""

    def done() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return done


def measure(device: torch.device, dtype: torch.dtype, shape: dict[str, int], rounds: int, copied: int) -> Record:
    """Step and training times of a random model of this shape, and the floor."""
    torch.set_default_dtype(dtype)
    with torch.device(device):  # the weights are made where they stay
        model = random_llama(**shape, num_key_value_heads=8, tie_word_embeddings=False)
    torch.set_default_dtype(torch.float32)
    tokenizer, examples = word_tokenizer(), word_examples(EXAMPLES, 20, 2)
    layout, objective = locate(model), Objective(examples)
    batch = encode_examples(tokenizer, examples, stop="")
    products = Products(layout, LAYER)
    vectors = 0.01 * torch.randn(1, math.prod(layout.shape(LAYER, "heads")))

    def step(path: str) -> Callable[[], None]:
        captured = path == "captured"
        forward = ReplayForward(layout, batch, LAYER, "heads", products=products, captured=captured)
        return synchronized(lambda: forward.loss_and_gradient(vectors, objective, [0]), device)

    def training(path: str) -> Callable[[], None]:
        options = {"optimizer": "adam", "steps": STEPS, "stop": "", "forward": path}
        return synchronized(lambda: laai.train(model, tokenizer, examples, LAYER, **options), device)

    speed = bandwidth(device, rounds, copied)
    with frozen(model):
        steps = interleaved({path: step(path) for path in PATHS}, rounds, warmup=3)
    trainings = interleaved({path: training(path) for path in PATHS}, rounds)
    weights = [p for block in layout.blocks[LAYER:] for p in block.parameters()]
    read = 2 * sum(p.numel() * p.element_size() for p in weights)
    floor = read / speed
    record = Record(
        "gpu",
        __doc__ or "",
        {"model": f"random Llama, {parameters(model)} parameters, {dtype}".replace("torch.", "")}
        | {"layer": LAYER, "examples": EXAMPLES, "rounds": rounds},
    )
    record.keep("seconds a step", steps)
    record.keep("seconds a training", trainings)
    record.keep("bytes per second", speed)
    record.table(
        "A step, and a whole training",
        ["forward", "ms per step", "copy bandwidth, GB/s", "floor, ms", "step / floor", f"{STEPS} steps, s"],
        [
            [path, f"{1e3 * median(steps, path):.1f}", f"{speed / 1e9:,.0f}", f"{1e3 * floor:.2f}"]
            + [f"{median(steps, path) / floor:.2f}×", f"{median(trainings, path):.2f}"]
            for path in PATHS
        ],
        "Goals: at most 1.5× the floor, and at most 1.5 s.",
    )
    return record


def main() -> None:
    arguments = parser(__doc__).parse_args()
    quick = arguments.quick
    if not torch.cuda.is_available():
        print("no CUDA device: nothing measured")
        return
    shape = {"hidden": 4096, "intermediate": 14_336, "layers": 32, "heads": 32, "vocabulary": 128_256}
    if quick:
        shape = {"hidden": 512, "intermediate": 1024, "layers": 6, "heads": 16, "vocabulary": WORDS}
    measure(torch.device("cuda"), torch.bfloat16, shape, arguments.rounds, 2**22 if quick else 2**32).save(quick)


if __name__ == "__main__":
    main()
