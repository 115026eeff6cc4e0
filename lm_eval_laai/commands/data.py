"""`laai data`: which data sets are found where, and how to get those that are not."""

from __future__ import annotations

import argparse
from typing import Any

from laai_core.data import data_folder, fetch, read_lexicon, read_pairs
from laai_core.data.fetch import BASE_URL, SHA256
from laai_core.data.lexicon import LEXICON
from laai_core.data.opinionqa import find_opinionqa
from laai_core.data.pairs import find_set
from laai_core.errors import LaaiError
from lm_eval_laai.commands.report import Report, table

WAYS = (
    "laai data fetch [--output DIR]    downloads the public sets from their authors' repository, checked",
    "--data DIR, or LAAI_DATA=DIR      points at a folder that has them, in itself or in function_vectors/",
    "OpinionQA                         see github.com/tatsu-lab/opinions_qa; goes into opinionqa/ of that folder",
)


def add(parser: argparse.ArgumentParser) -> None:
    """The flags of `data` and `data fetch`."""
    parser.set_defaults(command=_show)
    parser.add_argument("--data", metavar="DIR", help="where to look (default: $LAAI_DATA, or else the user's cache)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    actions = parser.add_subparsers(title="actions", metavar="fetch")
    fetching = actions.add_parser("fetch", help="download the public sets")
    fetching.set_defaults(command=_fetch)
    fetching.add_argument("--output", metavar="DIR", help="default: where the other commands look")
    fetching.add_argument("--base-url", default=BASE_URL, metavar="URL", help="of a mirror (default: %(default)s)")
    # Suppressed, since this default would overwrite a --json in front of `fetch`.
    fetching.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print the result as JSON")


def _show(arguments: argparse.Namespace) -> Report:
    if arguments.data is not None and not data_folder(arguments.data).is_dir():
        raise LaaiError(f"--data {arguments.data}: no such folder; expected one that has data sets")
    rows, _ = read_lexicon()
    sets = [_state(name, arguments.data) for name in SHA256]
    folder = str(data_folder(arguments.data))
    opinions = _opinionqa(arguments.data)
    facts = {
        "lexicon": {"path": str(LEXICON), "rows": len(rows)},
        "folder": folder,
        "sets": sets,
        "opinionqa": opinions,
    }
    lines = table(
        [
            ("data set", "state", "rows", "path"),
            ("lexicon", "bundled", len(rows), LEXICON),
            *((s["file"], s["state"], s["rows"] or "-", s["path"] or "-") for s in sets),
            ("OpinionQA", opinions["state"], "-", opinions["path"] or "-"),
        ]
    )
    looked = f"looked for the public sets in {folder}, and in function_vectors/ and opinionqa/ there"
    ways = "" if all(s["state"] == "ok" for s in sets) else "\n\nto get them:\n  " + "\n  ".join(WAYS)
    problems = "".join(f"\n{s['problem']}" for s in sets if s["problem"])
    return Report(facts, f"{lines}\n\n{looked}{problems}{ways}")


def _state(file_name: str, data: str | None) -> dict[str, Any]:
    """`ok`, `changed` (readable, not the published file), `malformed` or `missing`."""
    state: dict[str, Any] = {"file": file_name, "path": None, "rows": None, "sha256": None, "problem": None}
    try:
        path = find_set(file_name, data)
    except LaaiError:
        return {**state, "state": "missing"}
    try:
        pairs, digest = read_pairs(path)
    except LaaiError as error:
        return {**state, "path": str(path), "state": "malformed", "problem": str(error)}
    word = "ok" if digest == SHA256[file_name] else "changed"
    return {**state, "path": str(path), "rows": len(pairs), "sha256": digest, "state": word}


def _opinionqa(data: str | None) -> dict[str, Any]:
    """Folder, waves and attributes of OpinionQA; the files themselves are not read."""
    try:
        found = find_opinionqa(data)
    except LaaiError:
        return {"state": "missing", "path": None, "waves": [], "attributes": []}
    waves, attributes = [wave.name for wave in found.waves], list(found.aggregated)
    state = f"{len(waves)} waves" if waves else ", ".join(attributes)
    return {"state": state, "path": str(found.folder), "waves": waves, "attributes": attributes}


def _fetch(arguments: argparse.Namespace) -> Report:
    paths = fetch(arguments.output or arguments.data, arguments.base_url)
    return Report({"files": [str(path) for path in paths]}, "\n".join(map(str, paths)))
