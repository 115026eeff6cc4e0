"""Train the bundled reference model from the lexicon. See README.md beside this file for what it is and its figures.

    python reference_model/train.py --output reference_model/weights --seed 0

Stopped, it goes on from its last checkpoint when started again with the same arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from documents import IGNORE, Documents
from evaluate import print_report, report
from vocabulary import save_tokenizer, train_tokenizer

VOCABULARY = 4352
LENGTH = 88  # tokens a row: eleven pairs are 81 at the median, and fit whole in 97 of 100 documents
WARMUP = 100  # steps
COOLDOWN = 0.4  # of the steps
CHECKPOINT_EVERY = 200  # steps
LOG_EVERY = 50  # steps


def new_model() -> LlamaForCausalLM:
    """The untrained network, 4.7 M parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            # At 88 tokens plain matrix products beat PyTorch's fused CPU attention (its backward pass) by far.
            attn_implementation="eager",
        )
    )


def optimizers(model: LlamaForCausalLM, lr: float, kind: str) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks and AdamW for the rest, or AdamW for all."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2] if kind == "muon" else []
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside]
    built: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    ]
    if matrices:
        built.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    return built


def rate(step: int, steps: int) -> float:
    """The learning rate's factor: linear warm-up, constant, then linear to near zero over the last COOLDOWN.

    Before the cool-down nothing depends on `steps`, so a run can be continued to another end while it is going.
    """
    return min((step + 1) / WARMUP, (steps - step) / (COOLDOWN * steps), 1.0)


def answer_loss(model: LlamaForCausalLM, decoder, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the answer tokens only; ids and labels [rows, length].

    Rows are padded on the right, so causality alone keeps padding out. Logits are computed where they are needed.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state  # [rows, length, hidden]
        wanted = labels[:, 1:] != IGNORE
        logits = model.lm_head(hidden[:, :-1][wanted])  # [answers, vocabulary]
    return torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][wanted])


def train(arguments: argparse.Namespace) -> None:
    """Run (or resume) the training and write the weights and tokenizer to `arguments.output`."""
    torch.manual_seed(arguments.seed)
    tokenizer = train_tokenizer(VOCABULARY)
    documents = Documents(tokenizer, LENGTH)
    model = new_model()
    built = optimizers(model, arguments.lr, arguments.optimizer)
    # What must be equal for a checkpoint to be continued.
    recipe = {k: getattr(arguments, k) for k in ("seed", "rows", "lr", "optimizer")}
    first, seconds = resume(arguments.checkpoint, recipe, model, built)
    decoder = torch.compile(model.model) if arguments.compile else model.model
    losses: list[float] = []
    began = time.monotonic() - seconds
    bar = tqdm(range(first, arguments.steps), initial=first, total=arguments.steps, file=sys.stderr, mininterval=5)
    for step in bar:
        for optimizer in built:
            for group in optimizer.param_groups:
                group["lr"] = arguments.lr * rate(step, arguments.steps)
        # A generator of its own for every step: a resumed run sees the very documents an unbroken one does.
        ids, labels = documents.batch(np.random.default_rng([arguments.seed, step]), arguments.rows)
        loss = answer_loss(model, decoder, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in built:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        done = step + 1
        if done % LOG_EVERY == 0:
            mean = sum(losses) / len(losses)
            log(step=done, loss=round(mean, 4), seconds=round(time.monotonic() - began))
            losses.clear()
        if done % CHECKPOINT_EVERY == 0 or done == arguments.steps:
            save_checkpoint(arguments.checkpoint, recipe, model, built, done, time.monotonic() - began)
        if arguments.evaluate_every and done % arguments.evaluate_every == 0:
            save(model, tokenizer, arguments.checkpoint.parent / "now")
            log(step=done, **evaluate(arguments.checkpoint.parent / "now", [0], limit=40)["average"])
    save(model, tokenizer, arguments.output)


def resume(
    path: Path, recipe: dict[str, object], model: torch.nn.Module, built: list[torch.optim.Optimizer]
) -> tuple[int, float]:
    """Load the checkpoint if there is one of this recipe; returns the steps done and the seconds they took."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    if state["recipe"] != recipe:
        sys.exit(f"{path}: made with {state['recipe']}; expected {recipe}; delete it or name another (--checkpoint)")
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(built, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"], state["seconds"]


def save_checkpoint(
    path: Path,
    recipe: dict[str, object],
    model: torch.nn.Module,
    built: Iterable[torch.optim.Optimizer],
    step: int,
    seconds: float,
) -> None:
    """Write everything `resume` needs; the old checkpoint stays whole until the new one is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    state = {"recipe": recipe, "model": model.state_dict(), "step": step, "seconds": seconds}
    torch.save(state | {"optimizers": [optimizer.state_dict() for optimizer in built]}, part)
    os.replace(part, path)


def save(model: LlamaForCausalLM, tokenizer, folder: Path) -> None:
    """Store the weights in bfloat16 with a configuration that has them run in float32."""
    stored = LlamaForCausalLM(LlamaConfig.from_dict(model.config.to_dict()))
    stored.load_state_dict(model.state_dict())
    stored.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def evaluate(folder: Path, seeds: list[int], limit: int | None = None) -> dict[str, dict[str, float]]:
    """The report on the weights as they were stored, loaded the way a user loads them."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return report(model, AutoTokenizer.from_pretrained(folder), seeds, limit=limit)


def log(**figures: float) -> None:
    """One JSON line on stdout."""
    print(json.dumps(figures), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the weights and tokenizer")
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/reference_model/state.pt"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--rows", type=int, default=32, help="documents a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="muon")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="needs a C++ compiler")
    parser.add_argument("--evaluate-every", type=int, default=0, help="steps; quick figures on 40 words a rule")
    parser.add_argument("--evaluate", action="store_true", help="only evaluate the weights in OUTPUT")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.evaluate:
        train(arguments)
    print_report(evaluate(arguments.output, seeds=[0, 1, 2]))


if __name__ == "__main__":
    main()
