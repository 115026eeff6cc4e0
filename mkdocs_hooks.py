"""The site's generated parts: the command line's and the API's reference, made from the code at build."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
from collections.abc import Iterator
from typing import Any

import laai_core
from lm_eval_laai.commands import cli

COMMANDS, API = "<!-- commands -->", "<!-- api -->"
# A link from a page to a file beside docs/, such as ../benchmarks/baseline.yaml: on the site its name remains.
OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+[^)]*\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by MkDocs for every page."""
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, commands())
    if API in markdown:
        markdown = markdown.replace(API, api())
    return OUTSIDE.sub(_name, markdown) if page.file.src_uri.count("/") == 0 else markdown


def _name(link: re.Match[str]) -> str:
    return link[1] if "`" in link[1] else f"`{link[1]}`"


def commands() -> str:
    """A section for each command, with what its --help prints."""
    # argparse wraps at the terminal's width, and newer ones colour.
    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1"}
    sections = []
    for parser in _parsers(cli.make_parser()):
        sections.append(f"## {parser.prog}\n\n```text\n{parser.format_help().rstrip()}\n```")
    return "\n\n".join(sections)


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its commands; --help makes one that loads its flags late have them."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        parser.parse_known_args(["--help"])
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _parsers(command)


def api() -> str:
    """A section for each public name of `laai_core`, for mkdocstrings."""
    names = [name for name in laai_core.__all__ if not name.startswith("_")]
    return "\n\n".join(f"::: {getattr(laai_core, name).__module__}.{name}" for name in names)
