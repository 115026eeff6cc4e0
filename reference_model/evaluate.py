"""Exact match of greedy generation on the lexicon's rules, with and without examples in the prompt."""

from __future__ import annotations

import argparse
import sys

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from laai_core.data import load_task
from laai_core.data.tasks import LEXICON_PREFIX, RULES

NEW_TOKENS = 10  # more than the longest answer takes


@torch.no_grad()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], batch: int = 100
) -> list[str]:
    """What the model writes after each prompt, greedily, up to the first line break, stripped."""
    written: list[str] = []
    for start in range(0, len(prompts), batch):
        inputs = tokenizer(prompts[start : start + batch], return_tensors="pt", padding=True, padding_side="left")
        output = model.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            tokenizer=tokenizer,
            stop_strings=["\n"],
        )
        new = output[:, inputs["input_ids"].shape[1] :]
        written += [text.split("\n")[0].strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return written


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rule: str,
    shots: int,
    seed: int = 0,
    limit: int | None = None,
) -> float:
    """The share of the rule's test items (all, or `limit` spread over them) answered exactly, after `shots` examples.

    The examples are the first of the seed's ten training examples, so ten shots are just those an intervention sees.
    """
    split = load_task(LEXICON_PREFIX + rule, seed=seed)
    test = split.test[:: max(1, len(split.test) // limit)][:limit] if limit else split.test
    written = answers(model, tokenizer, [example.behind(split.train[:shots]) for example in test])
    return sum(text == str(example.target).strip() for text, example in zip(written, test, strict=True)) / len(test)


def report(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seeds: list[int],
    rules: list[str] | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """{rule: {"zero-shot": share, "ten-shot, seed 0": share, ...}}, and the same under "average". Bar on stderr."""
    rules = rules or list(RULES)
    columns = [("zero-shot", 0, 0)] + [(f"ten-shot, seed {seed}", 10, seed) for seed in seeds]
    table: dict[str, dict[str, float]] = {rule: {} for rule in rules}
    with tqdm(total=len(rules) * len(columns), desc="evaluate", file=sys.stderr) as bar:
        for rule in rules:
            for name, shots, seed in columns:
                table[rule][name] = exact_match(model, tokenizer, rule, shots, seed, limit)
                bar.update()
    table["average"] = {name: sum(table[rule][name] for rule in rules) / len(rules) for name, _, _ in columns}
    return table


def print_report(table: dict[str, dict[str, float]]) -> None:
    """The table as Markdown, on stdout."""
    columns = list(next(iter(table.values())))
    print("| rule | " + " | ".join(columns) + " |")
    print("|---|" + "---|" * len(columns))
    for rule, row in table.items():
        print(f"| {rule} | " + " | ".join(f"{row[column]:.3f}" for column in columns) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", help="folder of the model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rules", nargs="+", help="default: the four rules; compositions work too")
    parser.add_argument("--limit", type=int, help="test items a rule; default all")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.weights).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.weights)
    print_report(report(model, tokenizer, arguments.seeds, arguments.rules, arguments.limit))


if __name__ == "__main__":
    main()
