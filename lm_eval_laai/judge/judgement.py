"""Asking a judge about samples and counting its answers."""

from __future__ import annotations

import math
import statistics
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from tqdm.auto import tqdm

from laai_core.errors import LaaiError, WorkFailed
from lm_eval_laai.judge.cache import Cache
from lm_eval_laai.judge.endpoint import Answer, Endpoint, Judge, Stopped
from lm_eval_laai.judge.questions import NEEDED, QUERIES, question, read_answer, task_named
from lm_eval_laai.judge.samples import Sample

TRIAL = 25  # after this many answers without a 0 or 1 the judge is given up


@dataclass(frozen=True)
class Verdict:
    """The verdict on one pair. `answers` are raw; an empty prediction has none, because it is not sent."""

    sample: Sample
    answers: list[str]

    @property
    def yes(self) -> int:
        """How many answers are 1."""
        return sum(read_answer(text) is True for text in self.answers)

    @property
    def unreadable(self) -> int:
        """How many answers are neither 0 nor 1. They count as no."""
        return sum(read_answer(text) is None for text in self.answers)

    @property
    def accepted(self) -> bool:
        """More than two yes."""
        return self.yes >= NEEDED


@dataclass(frozen=True)
class Judgement:
    """The verdicts on a task: `share` of accepted pairs, and its standard error (None for a single pair)."""

    task: str
    verdicts: list[Verdict]
    asked: int  # queries of this call; other answers were in the cache
    prompt_tokens: int  # of the queries of this call, as the server counts
    completion_tokens: int

    @property
    def share(self) -> float:
        """Share of accepted pairs, empty predictions among them."""
        return statistics.fmean(v.accepted for v in self.verdicts)

    @property
    def stderr(self) -> float | None:
        """As the harness's: the sample's standard deviation over the root of its size."""
        if len(self.verdicts) < 2:
            return None
        return statistics.stdev(float(v.accepted) for v in self.verdicts) / math.sqrt(len(self.verdicts))


class Query(NamedTuple):
    """One request: a question, and which of its `QUERIES` this is."""

    question: str
    number: int


def all_queries(samples: Sequence[Sample], task: str) -> list[Query]:
    """The distinct queries in order. An empty prediction is wrong without a query."""
    task = task_named(task)
    questions = dict.fromkeys(question(task, s.input, s.prediction) for s in samples if s.prediction)
    return [Query(text, number) for text in questions for number in range(QUERIES)]


def unanswered(queries: Sequence[Query], judge: Judge, cache: Cache) -> list[Query]:
    """The queries whose answers are not in the cache."""
    known = {text: cache.get(judge, text) for text in dict.fromkeys(query.question for query in queries)}
    return [query for query in queries if query.number not in known[query.question]]


def judge_samples(
    samples: Sequence[Sample],
    task: str,
    judge: Judge,
    cache: Cache,
    *,
    concurrency: int = 8,
    timeout: float = 120.0,
    backoff: float = 1.0,
    progress: bool = False,
) -> Judgement:
    """GPT-Eval (paper, section 4): five queries a pair, accepted when more than two say yes.

    Every answer is stored in the cache on arrival, and stored answers are not asked for again: after an error, Ctrl-C
    or a kill the next call resumes. At most `concurrency` answers, those under way, can be lost.

    Args:
        samples: the pairs, at least one.
        task: a word task's name, with or without `laai_` and `lexicon_`.
        judge: who is asked.
        cache: the store of answers.
        concurrency: requests at the same time.
        timeout: seconds to wait for a server that says nothing.
        backoff: seconds before a failed request is sent again, doubled each time; Retry-After is honoured.
        progress: show a tqdm bar on stderr.

    Raises:
        LaaiError: bad arguments, or a request the endpoint refuses.
        WorkFailed: an endpoint that keeps failing, or none of whose answers can be read.
    """
    if not samples:
        raise LaaiError("no samples to judge; expected at least one")
    check_concurrency(concurrency)
    queries = all_queries(samples, task)
    todo = unanswered(queries, judge, cache)
    _check_readable(queries, judge, cache)
    paid: list[Answer] = []
    with tqdm(total=len(todo), desc=f"judge {task}", unit="query", disable=not progress, leave=False) as bar:
        for part in (todo[:TRIAL], todo[TRIAL:]):
            if part:
                with Endpoint(judge, timeout, backoff) as endpoint:
                    paid += _ask(part, endpoint, judge, cache, concurrency, bar)
                _check_readable(queries, judge, cache)
    return Judgement(
        task,
        [Verdict(sample, _answers(sample, task, judge, cache)) for sample in samples],
        asked=len(paid),
        prompt_tokens=sum(answer.prompt_tokens for answer in paid),
        completion_tokens=sum(answer.completion_tokens for answer in paid),
    )


def check_concurrency(concurrency: int) -> None:
    """LaaiError for a number of requests at the same time that is out of range."""
    if not 1 <= concurrency <= 256:
        raise LaaiError(f"concurrency is {concurrency}; expected 1 to 256 requests at the same time")


def _ask(
    queries: Sequence[Query], endpoint: Endpoint, judge: Judge, cache: Cache, concurrency: int, bar: tqdm
) -> list[Answer]:
    """Ask, and store each answer at once. Returns the answers of this call."""
    stop = threading.Event()

    def ask(query: Query) -> Answer | None:
        try:
            if not unanswered([query], judge, cache):  # another process was faster
                return None
            answer = endpoint.ask(query.question, stop)
            cache.put(judge, query.question, query.number, answer.text)
            return answer
        except BaseException:
            stop.set()  # here, since this thread may take its next query before the other one hears of it
            raise

    paid = []
    with ThreadPoolExecutor(concurrency) as pool:
        futures = [pool.submit(ask, query) for query in queries]
        try:
            for future in as_completed(futures):
                with suppress(Stopped):  # by another query's error, which is raised later
                    answer = future.result()
                    if answer is not None:
                        paid.append(answer)
                    bar.update()
        except BaseException:
            stop.set()  # waits end now; requests under way may have been paid for, so that their answers are kept
            pool.shutdown(cancel_futures=True)
            raise
    return paid


def _check_readable(queries: Sequence[Query], judge: Judge, cache: Cache) -> None:
    """Refuse to go on, and to report a share, with a judge that has said much and never 0 or 1."""
    texts: list[str] = []
    for text in dict.fromkeys(query.question for query in queries):
        texts += cache.get(judge, text).values()
        if any(read_answer(answer) is not None for answer in texts):
            return
    if texts and len(texts) >= min(TRIAL, len(queries)):
        raise WorkFailed(
            f"{judge.base_url}: none of {len(texts)} answers of {judge.model} is 0 or 1, the last: {texts[-1]!r:.80}; "
            f"expected a model that follows the question (if its answers are cut off: --request; if it was repaired "
            f"under the same name: another --cache)"
        )


def _answers(sample: Sample, task: str, judge: Judge, cache: Cache) -> list[str]:
    known = cache.get(judge, question(task_named(task), sample.input, sample.prediction)) if sample.prediction else {}
    return [known[number] for number in sorted(known)]
