"""The site's generated parts: the references of commands and API, made from the code at build, and the notebooks."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
from collections.abc import Iterator
from typing import Any

from mkdocs.structure.files import File, Files

import laai_core
from lm_eval_laai.commands import cli

COMMANDS, API = "<!-- commands -->", "<!-- api -->"
# A link from a page to a file beside docs/, such as ../benchmarks/baseline.yaml: on the site its name remains.
OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+[^)]*\)")


def on_files(files: Files, config: Any) -> Files:
    """Called by MkDocs once: a page for every notebook, which stays beside it to be downloaded."""
    for file in [one for one in files if one.src_uri.endswith(".ipynb")]:
        page = file.src_uri.removesuffix(".ipynb") + ".md"
        files.append(File.generated(config, page, content=notebook(file.content_string, file.name)))
    return files


def notebook(text: str, name: str) -> str:
    """A notebook as Markdown: its texts, its code, and the text that its cells wrote."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        code = source.removeprefix("%%bash\n")
        parts.append(f"```{'python' if code == source else 'bash'}\n{code}\n```")
        written = "".join(line for output in cell["outputs"] for line in output.get("text", []))
        if written:
            parts.append(f"```text\n{written.rstrip()}\n```")
    return "\n\n".join([*parts, f"[Download the notebook]({name}.ipynb)"])


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by MkDocs for every page."""
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, commands())
    if API in markdown:
        markdown = markdown.replace(API, api())
    if not page.file.src_uri.startswith("notebooks/"):  # these offer the file itself
        markdown = markdown.replace(".ipynb)", ".md)")
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
