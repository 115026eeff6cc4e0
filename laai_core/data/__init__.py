"""Data: word-rule tasks and compositions, opinions of groups, examples of one's own, and the split of all of them."""

from laai_core.data.examples import load_examples
from laai_core.data.fetch import fetch
from laai_core.data.lexicon import COLUMNS, lexicon_pairs, read_lexicon
from laai_core.data.pairs import data_folder, read_pairs
from laai_core.data.split import in_training_pool
from laai_core.data.tasks import load_pairs, load_task, task_names

__all__ = [
    "COLUMNS",
    "data_folder",
    "fetch",
    "in_training_pool",
    "lexicon_pairs",
    "load_examples",
    "load_pairs",
    "load_task",
    "read_lexicon",
    "read_pairs",
    "task_names",
]
