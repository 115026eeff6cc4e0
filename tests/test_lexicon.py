"""The bundled lexicon is what the tasks over it take it to be."""

import pytest

from laai_core.data import COLUMNS, load_pairs, read_lexicon
from laai_core.data.lexicon import LEXICON
from laai_core.errors import LaaiError


@pytest.fixture(scope="module")
def rows():
    return read_lexicon()[0]


def test_header_and_size(rows):
    assert LEXICON.read_text(encoding="utf-8").splitlines()[0].split("\t") == list(COLUMNS)
    assert len(rows) >= 500


def test_no_cell_is_empty_or_padded():
    for line in LEXICON.read_text(encoding="utf-8").splitlines():
        cells = line.split("\t")
        assert len(cells) == len(COLUMNS) and all(cell and cell == cell.strip() for cell in cells), line


def test_no_word_comes_twice(rows):
    words = [row["english"] for row in rows]
    assert len(set(words)) == len(words)


def test_antonyms_and_synonyms_are_rows(rows):
    words = {row["english"] for row in rows}
    assert {row["antonym"] for row in rows} <= words
    assert {row["synonym"] for row in rows} <= words


def test_antonyms_are_symmetric(rows):
    antonym = {row["english"]: row["antonym"] for row in rows}
    assert [word for word in antonym if antonym[antonym[word]] != word] == []


def test_no_answer_is_the_word_itself(rows):
    for row in rows:
        assert row["english"] not in (row["french"], row["german"], row["antonym"], row["synonym"]), row
        assert row["antonym"] != row["synonym"], row


def test_compositions_never_drop_out(rows):
    for name in ("en_fr_antonym", "en_de_antonym", "en_fr_synonym", "en_de_synonym"):
        assert len(load_pairs(f"lexicon_{name}")[0]) == len(rows)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", "expected the tab-separated header"),
        ("english\tfrench\n", "expected the tab-separated header"),
        ("\t".join(COLUMNS) + "\n", "has a header and no row"),
        ("\t".join(COLUMNS) + "\nhot\tchaud\n", "line 2 has 2 cells; expected 5"),
        ("\t".join(COLUMNS) + "\nhot\tchaud\t \tcold\ttorrid\n", "line 2: german is empty"),
    ],
)
def test_a_broken_table_is_named(tmp_path, text, expected):
    path = tmp_path / "lexicon.tsv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(LaaiError, match=expected) as error:
        read_lexicon(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(LaaiError, match="cannot be read"):
        read_lexicon(tmp_path / "lexicon.tsv")
