"""OpinionQA (Santurkar et al. 2023): how groups of people answered the Pew American Trends Panel.

Two layouts are read. The authors' own has a folder for each wave of the panel:

    human_resp/American_Trends_Panel_W<n>/
        info.csv       key, question, references (option texts, refusals last), option_ordinal (positions on the scale)
        metadata.csv   key (an attribute, such as SEX), options (its groups)
        responses.csv  a row for each person: answers as text, attributes, the weight WEIGHT_W<n>

The aggregated one (Meister et al. 2024) has a file of counts for each attribute, <attribute>_data.json. An info.csv
beside it gives the options and their order: the aggregated files cut option texts at every comma.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from laai_core.data.aggregated import counts_of_file
from laai_core.data.opinion import Opinion, shares
from laai_core.data.pairs import data_folder
from laai_core.data.panel import counts_of_waves, is_wave, wave_number
from laai_core.errors import LaaiError

FOLDER = "opinionqa"
AGGREGATED = "_data.json"


class Found(NamedTuple):
    """The data's folder and files; `waves` or `aggregated` is not empty."""

    folder: Path
    waves: list[Path]  # folders
    aggregated: dict[str, Path]  # attribute -> file


def find_opinionqa(data: str | os.PathLike[str] | None = None) -> Found:
    """Looks in `<data>/opinionqa`, and in `<data>` itself when that is the folder meant.

    Raises LaaiError naming the folder and how to get the data.
    """
    candidates = [data_folder(data) / FOLDER, data_folder(data)]
    for folder in candidates:
        below = [*folder.glob("human_resp/*")] or [*folder.glob("*")]
        waves = sorted((path for path in below if is_wave(path)), key=wave_number)
        files = {path.name.removesuffix(AGGREGATED): path for path in sorted(folder.glob(f"*{AGGREGATED}"))}
        if waves or files:
            return Found(folder, waves, files)
    raise LaaiError(
        f"{candidates[0]}: no OpinionQA there; expected human_resp/American_Trends_Panel_W*/, or *{AGGREGATED}; "
        f"its authors' repository, github.com/tatsu-lab/opinions_qa, says where to get it; "
        f"point --data DIR (or LAAI_DATA) at a folder that has it"
    )


def load_opinionqa(
    attribute: str, group: str, data: str | os.PathLike[str] | None = None
) -> tuple[list[Opinion], dict[str, str]]:
    """How the people whose `attribute` is `group` answered each question, and {file: SHA-256} of the files read.

    Shares are weighted (authors' layout) or counted (aggregated form, read where there are no waves), refusals left
    out. Questions without an answer of the group are left out too, and people without a weight, with a warning.

    Raises LaaiError, one line, with file, row and column: files that are missing or malformed, an attribute or a group
    that is not in them, a group without any answer.
    """
    found = find_opinionqa(data)
    if found.waves:
        counted, sources = counts_of_waves(found.waves, attribute, group)
    elif attribute in found.aggregated:
        counted, sources = counts_of_file(found.aggregated[attribute], group)
    else:
        has = ", ".join(found.aggregated)
        raise LaaiError(f"{found.folder}: no {attribute}{AGGREGATED} there; the attributes it has are {has}")
    return shares(counted, f"{attribute}={group}", str(found.folder)), sources
