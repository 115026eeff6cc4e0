"""`laai push`: an intervention onto the Hugging Face Hub, with a model card."""

from __future__ import annotations

import argparse
import sys

from lm_eval_laai.commands.report import Report
from lm_eval_laai.gate.results_file import Results, read_results


def add(parser: argparse.ArgumentParser) -> None:
    """The flags of `push`."""
    parser.set_defaults(command=_command)
    parser.add_argument("file", metavar="FILE", help="a .safetensors file")
    parser.add_argument("repository", metavar="ORG/NAME", help="made if it is new; its README.md is replaced")
    parser.add_argument("--name", metavar="FILE", help="in the repository (default: TASK.safetensors)")
    parser.add_argument("--results", metavar="PATH", help="the card's scores: a results file, or a folder: its newest")
    parser.add_argument("--license", metavar="NAME", help="of the intervention, for the card, such as apache-2.0")
    parser.add_argument(
        "--private", action="store_true", help="if the repository is new (default: the account's setting)"
    )
    parser.add_argument("--revision", metavar="BRANCH", help="the branch to commit to")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _command(arguments: argparse.Namespace) -> Report:
    from laai_core.intervention import Intervention
    from lm_eval_laai.hub import push_to_hub

    intervention = Intervention.load(arguments.file)
    scores = _scores(read_results(arguments.results), intervention.sha256) if arguments.results else None
    commit = push_to_hub(
        intervention,
        arguments.repository,
        arguments.name,
        scores,
        private=True if arguments.private else None,
        revision=arguments.revision,
        license=arguments.license,
    )
    return Report({"commit": commit}, commit)


def _scores(results: Results, sha256: str) -> dict[str, dict[str, float]]:
    """{task: {`metric,filter`: value}}, with a warning where the run was not under the intervention."""
    if sha256 not in {one.get("sha256") for one in results.interventions.values()}:
        print(f"{results.path} names no intervention of SHA-256 {sha256}: are its scores this one's?", file=sys.stderr)
    return {name: {key: metric.value for key, metric in task.metrics.items()} for name, task in results.tasks.items()}
