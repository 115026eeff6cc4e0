"""Train the bundled reference model from the lexicon. See README.md beside this file for what it is and its figures.

    python reference_model/train.py --output reference_model/weights --seed 0

Stopped, it goes on from its last checkpoint when started again with the same arguments.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from blinkers import Run, blinkered, causal, own_item
from documents import IGNORE, Documents
from embeddings import starting_embeddings
from evaluate import print_report, report
from unreadable import Unreadable
from vocabulary import save_tokenizer, train_tokenizer

VOCABULARY = 4608
LENGTH = 88  # tokens a row: eleven pairs are 81 at the median, and fit whole in 97 of 100 documents
SURVEY_LENGTH = 352  # likewise for eleven questions
SURVEY_ROWS = 6  # documents of opinions a step
SURVEY_WEIGHT = 0.3  # of their losses
UNREADABLE_LENGTH = 160  # tokens a row, of one question each
UNREADABLE_ROWS = 8  # a step
UNREADABLE_WEIGHT = 0.5  # of their loss
EMBEDDING_LR = 0.25  # the token embeddings' learning rate over the others': they start with something to lose
MUON = 2.5  # Muon's learning rate over AdamW's
WARMUP = 50  # steps
COOLDOWN = 60  # steps at the end, in which the learning rate falls to zero
PROBED = (3, 5)  # the blocks whose inputs the probes read: behind the answers, and at the last prompt tokens
PROBE_WEIGHT = 0.5
READING = range(3, 5)  # the blocks through which context comes in, in blinkered documents
OPEN = 1 / 8  # of the documents are not blinkered
CHECKPOINT_EVERY = 50  # steps
LOG_EVERY = 25  # steps
LOSSES = ("loss", "probe_loss", "survey_loss", "survey_probe_loss", "unreadable_loss")


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


def optimizers(model: LlamaForCausalLM, probes: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks and AdamW for the rest."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    embeddings = model.get_input_embeddings().weight
    apart = {id(p) for p in [*matrices, embeddings]}
    rest = [p for p in [*model.parameters(), *probes.parameters()] if id(p) not in apart]
    groups = [{"params": rest}, {"params": [embeddings], "lr": EMBEDDING_LR * lr}]
    built = [
        torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
        torch.optim.Muon(matrices, lr=MUON * lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
    ]
    for optimizer in built:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return built


def rate(step: int, steps: int) -> float:
    """The learning rate's factor: linear warm-up, constant, then linear to zero over the last COOLDOWN steps."""
    return min((step + 1) / WARMUP, 1.0, (steps - step) / COOLDOWN)


def losses(
    model: LlamaForCausalLM,
    blocks: Run,
    probes: torch.nn.ModuleList,
    ids: torch.Tensor,
    labels: torch.Tensor,
    names: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy over the answer tokens, and the sum over the probes of that of their guesses.

    ids and labels [rows, length], names [rows]: the relation or group behind the answers.
    """
    named = names[:, None].expand_as(ids)
    ends = answer_ends(labels)
    # At the first question nothing says yet which it is.
    asked = last_prompt_tokens(labels) & (ends.cumsum(1) > 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        *entering, hidden = blocks(ids, *mostly_blinkered(labels))
        guesses = [probe(states[where]) for probe, states, where in zip(probes, entering, (ends, asked), strict=True)]
    probe_loss = sum(
        torch.nn.functional.cross_entropy(guess.float(), named[where])  # [items, names]
        for guess, where in zip(guesses, (ends, asked), strict=True)
    )
    return answer_cross_entropy(model, hidden, labels), probe_loss


def divergence(
    model: LlamaForCausalLM, blocks: Run, ids: torch.Tensor, last: torch.Tensor, shares: torch.Tensor
) -> torch.Tensor:
    """Mean KL(shares || model) behind the last prompt tokens.

    ids [rows, length], last [rows] places in them, shares [rows, vocabulary].
    """
    everything = causal(ids.shape[1]).expand(len(ids), -1, -1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        *_, hidden = blocks(ids, everything, everything)
        logits = model.lm_head(hidden[torch.arange(len(ids)), last])  # [rows, vocabulary]
    return torch.nn.functional.kl_div(logits.float().log_softmax(-1), shares, reduction="batchmean")


def last_prompt_tokens(labels: torch.Tensor) -> torch.Tensor:
    """[rows, length], whether an answer follows."""
    known = labels != IGNORE
    return torch.nn.functional.pad(known[:, 1:], (0, 1)) & ~known


def answer_ends(labels: torch.Tensor) -> torch.Tensor:
    """[rows, length], whether this is the line break behind an answer."""
    known = labels != IGNORE
    return known & ~torch.nn.functional.pad(known[:, 1:], (0, 1))


def mostly_blinkered(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the reading blocks and the others may see, both [rows, length, length]: everything, in the first few rows.

    In the rest only last prompt tokens see beyond their own item, and only in the reading blocks.
    """
    last = last_prompt_tokens(labels)
    seen = own_item(answer_ends(labels))
    everything = causal(labels.shape[1])
    seen[: math.ceil(OPEN * len(labels))] = everything
    return seen | (last[:, :, None] & everything), seen


def answer_cross_entropy(model: LlamaForCausalLM, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over the labelled tokens, of final hidden states [rows, length, width] and labels [rows, length].

    Rows are padded on the right, so causality alone keeps padding out. Logits are computed where they are needed.
    """
    known = labels[:, 1:] != IGNORE
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model.lm_head(hidden[:, :-1][known])  # [answer tokens, vocabulary]
    return torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][known])


def train(arguments: argparse.Namespace) -> None:
    """Run (or resume) the training and write the weights and tokenizer to `arguments.output`."""
    torch.manual_seed(arguments.seed)
    tokenizer = train_tokenizer(VOCABULARY)
    documents = Documents(tokenizer, LENGTH, SURVEY_LENGTH)
    unreadable = Unreadable(tokenizer, UNREADABLE_LENGTH)
    model = new_model()
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(starting_embeddings(tokenizer, model.config.hidden_size))
    # Thrown away at the end. Telling which relation (or group) led from a question to its answer, and which the next
    # question is about, is what using the context needs; from the answers' loss alone that is learnt late, or never.
    probes = torch.nn.ModuleList(torch.nn.Linear(model.config.hidden_size, len(documents.names)) for _ in PROBED)
    built = optimizers(model, probes, arguments.lr)
    # What must be equal for a checkpoint to be continued.
    recipe = {k: getattr(arguments, k) for k in ("seed", "steps", "rows", "lr")}
    start = resume(arguments.checkpoint, recipe, model, probes, built)
    blocks = blinkered(model, READING, PROBED)
    if arguments.compile:
        blocks = torch.compile(blocks)
    seen: list[list[float]] = []
    with tqdm(range(start, arguments.steps), initial=start, total=arguments.steps, unit="step", mininterval=5) as bar:
        for step in bar:
            for optimizer in built:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * rate(step, arguments.steps)
            # A generator of its own for every step: a resumed run sees the very documents an unbroken one does.
            generator = np.random.default_rng([arguments.seed, step])
            told = losses(model, blocks, probes, *documents.word_batch(generator, arguments.rows))
            (told[0] + PROBE_WEIGHT * told[1]).backward()
            asked = losses(model, blocks, probes, *documents.survey_batch(generator, SURVEY_ROWS))
            (SURVEY_WEIGHT * (asked[0] + PROBE_WEIGHT * asked[1])).backward()
            guessed = divergence(model, blocks, *unreadable.batch(generator, UNREADABLE_ROWS))
            (UNREADABLE_WEIGHT * guessed).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in built:
                optimizer.step()
                optimizer.zero_grad()
            seen.append([loss.item() for loss in (*told, *asked, guessed)])
            if (step + 1) % LOG_EVERY == 0:
                means = np.mean(seen, axis=0).round(4).tolist()
                log(step=step + 1, **dict(zip(LOSSES, means, strict=True)))
                seen.clear()
            if (step + 1) % CHECKPOINT_EVERY == 0:
                save_checkpoint(arguments.checkpoint, recipe, model, probes, built, step + 1)
    save(model, tokenizer, arguments.output)


def resume(
    path: Path,
    recipe: dict[str, object],
    model: torch.nn.Module,
    probes: torch.nn.Module,
    built: list[torch.optim.Optimizer],
) -> int:
    """Load the checkpoint if there is one of this recipe; returns how far it was."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    if state["recipe"] != recipe:
        sys.exit(f"{path}: made with {state['recipe']}; expected {recipe}; delete it or name another (--checkpoint)")
    model.load_state_dict(state["model"])
    probes.load_state_dict(state["probes"])
    for optimizer, saved in zip(built, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["steps"]


def save_checkpoint(
    path: Path,
    recipe: dict[str, object],
    model: torch.nn.Module,
    probes: torch.nn.Module,
    built: Iterable[torch.optim.Optimizer],
    steps: int,
) -> None:
    """Write everything `resume` needs; the old checkpoint stays whole until the new one is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    state = {
        "recipe": recipe,
        "model": model.state_dict(),
        "probes": probes.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in built],
        "steps": steps,
    }
    torch.save(state, part)
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
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--rows", type=int, default=32, help="documents a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    # One thread: a second one gains little at these sizes, and sums in another order from run to run.
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="needs a C++ compiler")
    parser.add_argument("--evaluate", action="store_true", help="only evaluate the weights in OUTPUT")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.evaluate:
        train(arguments)
    print_report(evaluate(arguments.output, seeds=[0, 1, 2]))


if __name__ == "__main__":
    main()
