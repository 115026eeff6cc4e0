"""The reference model's tokenizer: byte-level BPE learnt from the lexicon's words and the survey's."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from documents import relations
from laai_core.data.opinion import LETTERS, question_prompt
from laai_core.data.survey import survey_records
from laai_core.data.tasks import rule_prompt

# Words with their leading space and a colon that follows; every whitespace character else by itself, so that an
# answer's line break is a token of its own whatever comes next.
WORDS = r" ?\p{L}+:?| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s"
SPECIAL = ["<pad>", "<s>", "</s>"]


def train_tokenizer(vocabulary: int) -> Tokenizer:
    """A tokenizer of `vocabulary` tokens that puts BOS before every text. Deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pairs = [f"{rule_prompt(word)} {answer}\n\n" for table in relations().values() for word, answer in table.items()]
    questions = [
        question_prompt(record["question_text"], record["MC_options"])
        + "".join(f" {letter}\n\n" for letter in LETTERS[: len(record["MC_options"])])
        for record in survey_records().values()
    ]
    tokenizer.train_from_iterator(pairs + questions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files AutoTokenizer reads."""
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],  # Llama takes no token types
    ).save_pretrained(folder)
    # transformers 5 writes a class that 4 does not know; both read this one.
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2)
    )
