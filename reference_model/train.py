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
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from documents import IGNORE, Documents
from evaluate import print_report, report
from laai_core.data.tasks import RULES
from vocabulary import save_tokenizer, train_tokenizer

VOCABULARY = 4352
LENGTH = 88  # tokens a row: eleven pairs are 81 at the median, and fit whole in 97 of 100 documents
MUON = 2.5  # Muon's learning rate over AdamW's
WARMUP = 50  # steps
FEW, MORE = 64, 200  # words the documents are made of, to begin with and then; then all
FOUND = 0.08  # the probe's running loss at which the model has found out what the context is for: MORE words
MORE_STEPS = 100  # steps with MORE words
ENOUGH = 0.85  # ten-shot accuracy at which training ends: able, but not saturated
CHECK_EVERY = 10  # steps, of that accuracy, once all words are in
COOLDOWN = 30  # steps behind it, in which the learning rate falls to zero
PROBE_LAYER = 3  # the output of the third block
PROBE_WEIGHT = 0.5
CHECKPOINT_EVERY = 50  # steps
LOG_EVERY = 25  # steps


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


def optimizers(model: LlamaForCausalLM, probe: torch.nn.Linear, lr: float, kind: str) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks and AdamW for the rest, or AdamW for all."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2] if kind == "muon" else []
    inside = {id(p) for p in matrices}
    rest = [p for p in [*model.parameters(), *probe.parameters()] if id(p) not in inside]
    built: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    ]
    if matrices:
        built.append(torch.optim.Muon(matrices, lr=MUON * lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    for optimizer in built:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return built


@dataclass
class Progress:
    """How far a run is: steps and seconds done, words in use, the probe's running loss, when the stages began."""

    step: int = 0
    seconds: float = 0.0
    words: int = FEW
    probe_loss: float = 3.0
    more_from: int | None = None
    ending_from: int | None = None

    def rate(self) -> float:
        """The learning rate's factor: linear warm-up, constant, then linear to zero over the last COOLDOWN steps."""
        warm = min((self.step + 1) / WARMUP, 1.0)
        return warm if self.ending_from is None else warm * (1 - (self.step - self.ending_from) / COOLDOWN)

    def advance(self, probe_loss: float, total: int) -> None:
        """Count a step, and take more words when the context is made use of: by a figure, for when it is, is luck."""
        self.step += 1
        self.probe_loss += 0.1 * (probe_loss - self.probe_loss)
        if self.more_from is None and self.probe_loss < FOUND:
            self.words, self.more_from = MORE, self.step
        if self.more_from is not None and self.step >= self.more_from + MORE_STEPS:
            self.words = total

    def done(self) -> bool:
        """Whether the last cool-down step is behind."""
        return self.ending_from is not None and self.step >= self.ending_from + COOLDOWN


def losses(
    model: LlamaForCausalLM,
    decoder,
    probe: torch.nn.Linear,
    ids: torch.Tensor,
    labels: torch.Tensor,
    names: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy over the answer tokens, and over the probe's guesses of the relation behind each answer.

    ids and labels [rows, length], names [rows]. Rows are padded on the right, so causality alone keeps padding out.
    Logits are computed where they are needed.
    """
    known = labels != IGNORE
    ends = known & ~torch.nn.functional.pad(known[:, 1:], (0, 1))  # the line break behind each answer
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = decoder(input_ids=ids, use_cache=False, output_hidden_states=True)
        logits = model.lm_head(output.last_hidden_state[:, :-1][known[:, 1:]])  # [answer tokens, vocabulary]
        guesses = probe(output.hidden_states[PROBE_LAYER][ends])  # [pairs, relations]
    named = names[:, None].expand_as(ids)[ends]
    cross_entropy = torch.nn.functional.cross_entropy
    return cross_entropy(logits.float(), labels[:, 1:][known[:, 1:]]), cross_entropy(guesses.float(), named)


@torch.no_grad()
def ten_shot_accuracy(model: LlamaForCausalLM, documents: Documents, rows: int = 480) -> float:
    """How often every token of the last answer of a document on one of the four rules is the likeliest."""
    generator = np.random.default_rng(2**32)  # no training step's
    right: list[bool] = []
    for _ in range(rows // 60):
        ids, labels, names = documents.batch(generator, 60, sys.maxsize)
        guesses = model(input_ids=ids, use_cache=False).logits.argmax(-1)
        for row in range(len(ids)):
            answers = (labels[row] != IGNORE).nonzero().flatten()
            # The answers' tokens are runs of neighbours; the last run is the last answer.
            last = answers[int((answers.diff() > 1).nonzero()[-1]) + 1 :]
            if documents.names[names[row]] in RULES:
                right.append(bool((guesses[row, last - 1] == ids[row, last]).all()))
    return float(np.mean(right))


def train(arguments: argparse.Namespace) -> None:
    """Run (or resume) the training and write the weights and tokenizer to `arguments.output`."""
    torch.manual_seed(arguments.seed)
    tokenizer = train_tokenizer(VOCABULARY)
    documents = Documents(tokenizer, LENGTH)
    total = max(map(len, documents.pieces.values()))
    model = new_model()
    # Thrown away at the end. Telling which relation led from a question to its answer is what using the context needs;
    # from the answers' loss alone the model learns the answers' language early and then next to nothing for long.
    probe = torch.nn.Linear(model.config.hidden_size, len(documents.names))
    built = optimizers(model, probe, arguments.lr, arguments.optimizer)
    # What must be equal for a checkpoint to be continued.
    recipe = {k: getattr(arguments, k) for k in ("seed", "rows", "lr", "optimizer")}
    progress = resume(arguments.checkpoint, recipe, model, probe, built)
    decoder = torch.compile(model.model) if arguments.compile else model.model
    seen: list[tuple[float, float]] = []
    began = time.monotonic() - progress.seconds
    with tqdm(initial=progress.step, unit="step", file=sys.stderr, mininterval=5) as bar:
        while not progress.done():
            if progress.step >= arguments.steps:
                sys.exit(f"not done after {arguments.steps} steps: it has not learnt what the context is for")
            for optimizer in built:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * progress.rate()
            # A generator of its own for every step: a resumed run sees the very documents an unbroken one does.
            generator = np.random.default_rng([arguments.seed, progress.step])
            batch = documents.batch(generator, arguments.rows, progress.words)
            loss, probe_loss = losses(model, decoder, probe, *batch)
            (loss + PROBE_WEIGHT * probe_loss).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in built:
                optimizer.step()
                optimizer.zero_grad()
            seen.append((loss.item(), probe_loss.item()))
            progress.advance(probe_loss.item(), total)
            progress.seconds = time.monotonic() - began
            bar.update()
            report_step(progress, seen)
            if progress.words == total and progress.ending_from is None and progress.step % CHECK_EVERY == 0:
                accuracy = ten_shot_accuracy(model, documents)
                log(step=progress.step, ten_shot_accuracy=round(accuracy, 4))
                if accuracy >= ENOUGH:
                    progress.ending_from = progress.step
            if progress.step % CHECKPOINT_EVERY == 0:
                save_checkpoint(arguments.checkpoint, recipe, model, probe, built, progress)
    save(model, tokenizer, arguments.output)


def report_step(progress: Progress, seen: list[tuple[float, float]]) -> None:
    """Every LOG_EVERY steps the mean losses since the last time."""
    if progress.step % LOG_EVERY == 0:
        answer_mean, probe_mean = np.mean(seen, axis=0).round(4).tolist()
        seconds = round(progress.seconds)
        log(step=progress.step, words=progress.words, loss=answer_mean, probe_loss=probe_mean, seconds=seconds)
        seen.clear()


def resume(
    path: Path,
    recipe: dict[str, object],
    model: torch.nn.Module,
    probe: torch.nn.Module,
    built: list[torch.optim.Optimizer],
) -> Progress:
    """Load the checkpoint if there is one of this recipe; returns how far it was."""
    if not path.exists():
        return Progress()
    state = torch.load(path, weights_only=True)
    if state["recipe"] != recipe:
        sys.exit(f"{path}: made with {state['recipe']}; expected {recipe}; delete it or name another (--checkpoint)")
    model.load_state_dict(state["model"])
    probe.load_state_dict(state["probe"])
    for optimizer, saved in zip(built, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return Progress(**state["progress"])


def save_checkpoint(
    path: Path,
    recipe: dict[str, object],
    model: torch.nn.Module,
    probe: torch.nn.Module,
    built: Iterable[torch.optim.Optimizer],
    progress: Progress,
) -> None:
    """Write everything `resume` needs; the old checkpoint stays whole until the new one is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    state = {
        "recipe": recipe,
        "model": model.state_dict(),
        "probe": probe.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in built],
        "progress": asdict(progress),
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
    parser.add_argument("--steps", type=int, default=1500, help="give up after so many")
    parser.add_argument("--rows", type=int, default=32, help="documents a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="muon")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="needs a C++ compiler")
    parser.add_argument("--evaluate", action="store_true", help="only evaluate the weights in OUTPUT")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.evaluate:
        train(arguments)
    print_report(evaluate(arguments.output, seeds=[0, 1, 2]))


if __name__ == "__main__":
    main()
