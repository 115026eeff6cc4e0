"""The split of items into training pool and test items, and the draw of training items by a seed."""

from __future__ import annotations

import hashlib
import random
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from laai_core.errors import LaaiError
from laai_core.example import Example
from laai_core.numeric import whole

Item = TypeVar("Item")


@dataclass(frozen=True)
class Split:
    """A task's examples. `train` is in the order drawn, `test` in file order; no item is in both, for any seed.

    `sources` maps each file that was read (its name in its data set's folder) to the SHA-256 of its bytes.
    """

    train: list[Example]
    test: list[Example]
    name: str
    seed: int = 0
    sources: dict[str, str] = field(default_factory=dict)


def item_key(text: str) -> str:
    """The identity of an item: its input, stripped and in Unicode normal form C."""
    return unicodedata.normalize("NFC", text.strip())


def check_unicode(text: str, where: str) -> None:
    """LaaiError, starting with `where`, for half of a surrogate pair, which JSON can escape and no file can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise LaaiError(f"{where} is {text!r:.60}, which is not valid Unicode; expected text") from None


def in_training_pool(key: str) -> bool:
    """Whether the item may ever be trained on: about three in ten may.

    Depends on the input alone, never on the task or the seed: a composition's test words are then test words of its
    rules too, and no seed's intervention has seen a test item.
    """
    return int(hashlib.sha256(item_key(key).encode("utf-8")).hexdigest()[:8], 16) % 10 < 3


def split_items(
    items: Iterable[Item], key: Callable[[Item], str], seed: int, n_train: int, name: str
) -> tuple[list[Item], list[Item]]:
    """Draw `n_train` training items from the pool; the test items are all outside it, in the order given.

    `key` gives an item's input; keys must be distinct. `name` is the task's, for the error.
    Raises LaaiError when n_train is below 1 or above the size of the pool, or seed is below 0.
    """
    items = list(items)
    pool = {item_key(key(item)): item for item in items if in_training_pool(key(item))}
    return draw(pool, seed, n_train, name), [item for item in items if not in_training_pool(key(item))]


def draw(pool: Mapping[Any, Item], seed: int, n_train: int, name: str) -> list[Item]:
    """`n_train` of the pool's items by its sorted keys, in the order drawn; errors as `split_items`."""
    count, number = whole(n_train), whole(seed)
    if count is None or not 1 <= count <= len(pool):
        raise LaaiError(
            f"task {name}: n_train is {n_train!r:.60}; "
            f"expected a whole number from 1 to {len(pool)}, its training pool"
        )
    if number is None or number < 0:  # random.Random draws alike for -1 and 1
        raise LaaiError(f"task {name}: seed is {seed!r:.60}; expected a whole number, 0 or above")
    # Sorted, so that the draw does not depend on the order of the file.
    return [pool[key] for key in random.Random(number).sample(sorted(pool), count)]
