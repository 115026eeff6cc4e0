"""`laai judge`: the share of predictions that a language model accepts, after an estimate of the cost."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from laai_core import files
from laai_core.errors import LaaiError
from lm_eval_laai.commands.outputs import check_no_input, check_writable
from lm_eval_laai.commands.report import Report, table
from lm_eval_laai.judge.cache import Cache
from lm_eval_laai.judge.endpoint import KEY_VARIABLE, OPENAI_URL, REQUEST, Judge
from lm_eval_laai.judge.judgement import Judgement, all_queries, judge_samples, unanswered
from lm_eval_laai.judge.questions import QUERIES, task_named
from lm_eval_laai.judge.samples import Sample, read_samples, task_of

CACHE = "runs/judge.sqlite"
# For the estimate alone: English comes at about four characters a token, and a chat message at a few tokens more.
_CHARACTERS_A_TOKEN, _TOKENS_A_MESSAGE = 4, 7


def add(parser: argparse.ArgumentParser) -> None:
    """The flags of `judge`."""
    parser.set_defaults(command=_command)
    parser.add_argument("files", nargs="+", metavar="SAMPLES.jsonl", help="written by lm_eval run --log_samples")
    parser.add_argument("--task", help="a word task, for all files (default: as each file's name says)")
    add_judge_arguments(parser, required=True)
    parser.add_argument("--dry-run", action="store_true", help="say what it would cost, and ask nothing")
    parser.add_argument(
        "--price-per-million",
        nargs=2,
        type=float,
        metavar=("IN", "OUT"),
        help="of prompt and answer tokens, to have the cost in money",
    )
    parser.add_argument("--output", metavar="FILE.jsonl", help="write the verdict on every pair")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_judge_arguments(parser: Any, required: bool) -> None:
    """The flags `judge_from` reads, --concurrency and --cache."""
    parser.add_argument(
        "--judge-model", required=required, help="the judge's name at the endpoint; the paper's is GPT-4"
    )
    parser.add_argument(
        "--base-url", default=OPENAI_URL, metavar="URL", help=f"default: %(default)s; the key is ${KEY_VARIABLE}"
    )
    parser.add_argument(
        "--request",
        metavar="JSON",
        help=f"fields of every request besides model and messages (default: {json.dumps(dict(REQUEST))})",
    )
    parser.add_argument("--concurrency", type=int, default=8, help="requests at once (default: %(default)s)")
    parser.add_argument(
        "--cache",
        default=CACHE,
        metavar="FILE",
        help="SQLite file of the judge's answers, which are not asked for again (default: %(default)s)",
    )


def judge_from(arguments: argparse.Namespace) -> Judge:
    """The judge the flags name."""
    return Judge(arguments.judge_model, arguments.base_url, _request(arguments.request))


def _command(arguments: argparse.Namespace) -> Report:
    # Cheap checks first.
    prices = arguments.price_per_million
    if prices is not None and not all(math.isfinite(price) and price >= 0 for price in prices):
        raise LaaiError(f"--price-per-million {prices[0]} {prices[1]}: expected two prices of at least 0")
    judge = judge_from(arguments)
    paths = [Path(name).expanduser() for name in arguments.files]
    tasks = [arguments.task or task_of(path) for path in paths]
    for task in tasks:
        task_named(task)
    samples = [read_samples(path) for path in paths]
    output = _output(arguments.output)
    where = Path(arguments.cache).expanduser()
    if output is not None:
        check_no_input(output, *paths)
        if output.resolve() == where.resolve():
            raise LaaiError(
                f"--output {output} is the cache of answers: expected another file to write the verdicts to"
            )
    # A dry run makes no file.
    with Cache(":memory:" if arguments.dry_run and not where.exists() else where) as cache:
        plan = _plan(list(zip(tasks, samples, strict=True)), judge, cache, prices)
        facts = {"judge_model": judge.model, "base_url": judge.base_url, "cache": str(where), "plan": plan}
        if arguments.dry_run:
            return Report(facts, _plan_text(plan))
        print(_plan_text(plan), file=sys.stderr, flush=True)
        judgements = [
            judge_samples(part, task, judge, cache, concurrency=arguments.concurrency, progress=True)
            for task, part in zip(tasks, samples, strict=True)
        ]
    if output is not None:
        files.write(output, _lines(paths, judgements).encode())
    results = [_facts(path, judgement) for path, judgement in zip(paths, judgements, strict=True)]
    return Report({**facts, "results": results, "output": arguments.output}, _text(results))


def _request(text: str | None) -> dict[str, Any]:
    if text is None:
        return dict(REQUEST)
    try:
        request = json.loads(text)
    except (ValueError, RecursionError):
        request = None
    if not isinstance(request, dict):
        raise LaaiError(f"""--request {text!r:.80}: expected a JSON object such as '{{"max_tokens": 16}}'""")
    return request


def _output(name: str | None) -> Path | None:
    if name is None:
        return None
    path = Path(name).expanduser()
    if path.is_dir():
        raise LaaiError(f"--output {name} is a folder; expected a file to write the verdicts to")
    if path.is_file() or not path.exists():  # others are devices and pipes
        check_writable(path.parent)
    return path


def _plan(
    parts: Sequence[tuple[str, Sequence[Sample]]], judge: Judge, cache: Cache, prices: Sequence[float] | None
) -> dict[str, Any]:
    """The number of queries and of cached answers, and the estimated cost of the other queries."""
    queries = list(dict.fromkeys(query for task, samples in parts for query in all_queries(samples, task)))
    todo = unanswered(queries, judge, cache)
    prompt_tokens = sum(math.ceil(len(q.question) / _CHARACTERS_A_TOKEN) + _TOKENS_A_MESSAGE for q in todo)
    plan: dict[str, Any] = {
        "pairs": sum(len(samples) for _, samples in parts),
        "empty": sum(not sample.prediction for _, samples in parts for sample in samples),
        "distinct_pairs": len(queries) // QUERIES,
        "queries": len(queries),
        "cached": len(queries) - len(todo),
        "to_ask": len(todo),
        "prompt_tokens": prompt_tokens,
        "completion_tokens": len(todo),  # one digit each
    }
    if prices is not None:
        plan["price"] = (prompt_tokens * prices[0] + len(todo) * prices[1]) / 1e6
    return plan


def _plan_text(plan: dict[str, Any]) -> str:
    price = f", a price of about {plan['price']:.4g}" if "price" in plan else ""
    return (
        f"{plan['pairs']} pairs, {plan['empty']} of them empty, {plan['distinct_pairs']} to judge: "
        f"{plan['queries']} queries, {plan['cached']} in the cache, {plan['to_ask']} to ask\n"
        f"about {plan['prompt_tokens']} prompt tokens and {plan['completion_tokens']} answer tokens{price}"
    )


def _facts(path: Path, judgement: Judgement) -> dict[str, Any]:
    return {
        "file": str(path),
        "task": judgement.task,
        "pairs": len(judgement.verdicts),
        "empty": sum(not verdict.sample.prediction for verdict in judgement.verdicts),
        "share": judgement.share,
        "stderr": judgement.stderr,
        "unreadable": sum(verdict.unreadable for verdict in judgement.verdicts),
        "asked": judgement.asked,
        "prompt_tokens": judgement.prompt_tokens,
        "completion_tokens": judgement.completion_tokens,
    }


def _text(results: Sequence[dict[str, Any]]) -> str:
    rows: list[Sequence[object]] = [("task", "accepted", "pairs", "empty", "unreadable answers", "asked now", "file")]
    for r in results:
        error = "" if r["stderr"] is None else f" ± {r['stderr']:.3f}"
        share = f"{r['share']:.3f}{error}"
        rows.append((r["task"], share, r["pairs"], r["empty"], r["unreadable"], r["asked"], r["file"]))
    return table(rows)


def _lines(paths: Sequence[Path], judgements: Sequence[Judgement]) -> str:
    """A line of JSON for every pair."""
    rows = [
        {
            "file": str(path),
            "task": judgement.task,
            **verdict.sample._asdict(),
            "answers": verdict.answers,
            "yes": verdict.yes,
            "unreadable": verdict.unreadable,
            "accepted": verdict.accepted,
        }
        for path, judgement in zip(paths, judgements, strict=True)
        for verdict in judgement.verdicts
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)
