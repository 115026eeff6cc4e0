"""The same training gives the same bytes; in other batches and on other numbers of threads, the same to rounding.

Rounding grows with the steps, since every step starts from the last one's. The bounds are ten times what was measured
on these models and steps; docs/reliability.md has what real trainings come to.
"""

from __future__ import annotations

import crashing
import pytest
import repeating
import torch
from crashing import run
from tiny import tiny_model, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import laai_core as laai
from lm_eval_laai.commands import cli

STEPS = 5
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def wide() -> tuple[LlamaForCausalLM, object]:
    """Wide enough for PyTorch to share its products among threads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return LlamaForCausalLM(config).eval(), tiny_tokenizer(bos=True)


@pytest.mark.parametrize("optimizer", ["prox", "adam"])
def test_same_bytes_in_every_process(optimizer, tmp_path, monkeypatch):
    model = crashing.saved_model(tmp_path / "model")
    argv = [*crashing.train(model), "--optimizer", optimizer]
    contents = []
    for number in range(2):
        folder = tmp_path / f"here {number}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        assert cli.main(argv) == 0
        contents.append((folder / "x.safetensors").read_bytes())
    for number in range(2):  # in two processes, with another hash seed than this one's
        folder = tmp_path / f"there {number}"
        assert run(argv, folder).code == 0
        contents.append((folder / "x.safetensors").read_bytes())
    assert len(set(contents)) == 1


def test_other_batch_sizes(wide):
    found = repeating.by_batch_size(*wide, sizes=[1, 3], layer=1, steps=STEPS)
    assert found.vector < ROUNDING and found.objective < ROUNDING


def test_other_numbers_of_threads(wide):
    found = repeating.by_threads(*wide, counts=[2, 3], layer=1, steps=STEPS)
    assert found.vector < ROUNDING and found.objective < ROUNDING


def test_other_vectors_in_the_batch(wide):
    found = repeating.by_company(*wide, layer=1, steps=STEPS)
    assert found.vector < ROUNDING and found.objective < ROUNDING


def test_other_batch_sizes_of_an_evaluation():
    draw = torch.Generator().manual_seed(0)
    iv = laai.Intervention({1: torch.randn(4, 8, generator=draw)})
    difference, changed = repeating.by_evaluation_batch(tiny_model("Llama"), tiny_tokenizer(bos=True), iv, [3, 16], 16)
    assert difference < ROUNDING
    assert changed == 0


def test_what_differs_would_be_noticed(wide):
    """A step more is not rounding."""
    examples = laai.load_task("lexicon_antonym").train
    one, other = (laai.train(*wide, examples, layer=1, steps=n, optimizer="adam") for n in (STEPS, STEPS + 1))
    assert repeating.apart([(one, other)]).vector > 10 * ROUNDING
