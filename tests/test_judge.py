"""GPT-Eval over real HTTP: what is asked, how answers count, and that no answer is paid for twice, come what may."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judge_process import judge_pairs, pairs
from judge_server import CLOSE, CUT, Body, JudgeServer, Request, Status, completion
from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from tiny import tiny_model, tiny_tokenizer
from transformers.utils import import_utils

from laai_core.data import load_pairs
from laai_core.errors import LaaiError, WorkFailed
from lm_eval_laai.commands import cli
from lm_eval_laai.judge import Cache, Judge, Sample, judge_samples, read_samples
from lm_eval_laai.judge.endpoint import ATTEMPTS
from lm_eval_laai.judge.judgement import TRIAL
from lm_eval_laai.judge.questions import read_answer

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-test-0123456789"
needs_openai = pytest.mark.skipif(
    find_spec("openai") is None, reason='openai is not installed: pip install "lm-eval-laai[judge]"'
)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    with Cache(tmp_path / "cache.sqlite") as opened:
        yield opened


def judged(samples: list[Sample], url: str, cache: Cache, task: str = "antonym", **options: Any) -> Any:
    return judge_samples(samples, task, Judge("model", url), cache, **{"backoff": 0.001, **options})


def always_yes(request: Request, number: int) -> str:
    return "1"


def rows_of(path: Path) -> int:
    """How many answers a cache holds, which must be whole."""
    connection = sqlite3.connect(path)
    try:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        (count,) = connection.execute("SELECT COUNT(*) FROM answers").fetchone()
    finally:
        connection.close()
    return count


def until(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited a minute in vain")


def write_samples(path: Path, samples: list[Sample]) -> Path:
    rows = [
        {"doc_id": s.doc_id, "doc": {"prompt": f"Q: {s.input}\nA:", "target": " t"}, "filtered_resps": [s.prediction]}
        for s in samples
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# What is asked

QUESTIONS = {
    "antonym": '"hot" is an antonym of "p".',
    "synonym": '"hot" is a synonym of "p".',
    "en_fr": '"hot" translated to French is "p".',
    "en_de": '"hot" translated to German is "p".',
    "en_fr_antonym": 'An antonym of "hot" translated to French is "p".',
    "en_de_antonym": 'An antonym of "hot" translated to German is "p".',
    "en_fr_synonym": 'A synonym of "hot" translated to French is "p".',
    "en_de_synonym": 'A synonym of "hot" translated to German is "p".',
}


@needs_openai
@pytest.mark.parametrize("task", QUESTIONS)
def test_the_requests(task: str, cache: Cache) -> None:
    with JudgeServer(always_yes) as server:
        for name in (task, f"laai_{task}", f"laai_lexicon_{task}"):
            judged([Sample(0, "hot", "p")], server.url, cache, name)
    text = f"Answer 0 if what I say is wrong and 1 if it is correct. {QUESTIONS[task]}"
    body = {"model": "model", "messages": [{"role": "user", "content": text}], "max_tokens": 16}
    assert [request.body for request in server.requests] == [body] * 5  # the other names' answers were known
    assert {request.key for request in server.requests} == {f"Bearer {KEY}"}


@needs_openai
def test_words_that_are_hard_to_send(cache: Cache) -> None:
    samples = [Sample(0, 'a "b" {c} \\', "é \u2028 \0"), Sample(1, "x", "half \ud800")]
    with JudgeServer(lambda request, number: "1 \ud800") as server:
        assert judged(samples, server.url, cache).asked == 10
        assert judged(samples, server.url, cache).asked == 0
    end = {request.question.partition("correct. ")[2] for request in server.requests}
    assert end == {'"a "b" {c} \\" is an antonym of "é \u2028 \0".', '"x" is an antonym of "half ?".'}


@needs_openai
def test_fields_of_the_request(cache: Cache) -> None:
    judge = {"request": {"max_completion_tokens": 99, "reasoning": {"effort": "low"}}}
    with JudgeServer(always_yes) as server:
        judge_samples(pairs(1), "antonym", Judge("m", server.url, **judge), cache)
    assert {key: value for key, value in server.requests[0].body.items() if key not in ("model", "messages")} == judge[
        "request"
    ]
    for taken in ("model", "messages", "stream", "n"):
        with pytest.raises(LaaiError, match=f"request sets {taken};"):
            Judge("m", server.url, {taken: 1})


# How answers count


@pytest.mark.parametrize("text", ["1", " 1\n", "1.", "1, it is", "**1**", '"1"', "1 (correct)", "(1)", "1!", "1\n\n0"])
def test_yes(text: str) -> None:
    assert read_answer(text) is True
    assert read_answer(text.replace("1", "0", 1)) is False


@pytest.mark.parametrize(
    "text", ["", "yes", "10", "0.5", "1/2", "1,5", "-1", "2", "01", "Answer 1", "1st", "correct: 1"]
)
def test_neither(text: str) -> None:
    assert read_answer(text) is None


@needs_openai
def test_more_than_two_yes(cache: Cache) -> None:
    """Pair k gets k yes; the rest are no, or for the last pairs unreadable, which is not yes either."""
    said: Counter[str] = Counter()

    def decide(request: Request, number: int) -> str:
        (pair,) = re.findall(r"word(\d+)", request.question)
        said[pair] += 1
        if said[pair] <= int(pair) % 6:
            return "1"
        return "0" if int(pair) < 6 else "perhaps"

    with JudgeServer(decide) as server:
        result = judged(pairs(12), server.url, cache, concurrency=1)
    assert [v.yes for v in result.verdicts] == [0, 1, 2, 3, 4, 5] * 2
    accepted = [False, False, False, True, True, True] * 2
    assert [v.accepted for v in result.verdicts] == accepted
    assert [v.unreadable for v in result.verdicts] == [0] * 6 + [5, 4, 3, 2, 1, 0]
    assert result.share == 0.5
    assert result.stderr == pytest.approx(np.std(accepted, ddof=1) / np.sqrt(12))
    assert result.asked == len(server.paid) == 60
    assert (result.prompt_tokens, result.completion_tokens) == (60 * 30, 60 * 2)


@needs_openai
def test_a_single_pair_has_no_standard_error(cache: Cache) -> None:
    with JudgeServer(always_yes) as server:
        result = judged(pairs(1), server.url, cache)
    assert (result.share, result.stderr) == (1.0, None)


@needs_openai
def test_equal_pairs_are_asked_once_and_empty_ones_never(cache: Cache) -> None:
    samples = [Sample(0, "hot", "cold"), Sample(1, "wet", ""), Sample(2, "hot", "cold"), Sample(3, "hot", "cool")]
    with JudgeServer(always_yes) as server:
        result = judged(samples, server.url, cache)
    assert len(server.paid) == 10
    assert [v.accepted for v in result.verdicts] == [True, False, True, True]
    assert result.share == 0.75


@needs_openai
def test_a_judge_that_never_answers_the_question_is_stopped(cache: Cache) -> None:
    with JudgeServer(lambda request, number: "What a question!") as server:
        for _ in range(2):  # the second time it is known
            with pytest.raises(WorkFailed, match=f"none of {TRIAL} answers of model is 0 or 1, .*What a question!"):
                judged(pairs(20), server.url, cache)
        assert len(server.requests) == TRIAL
        with pytest.raises(WorkFailed, match="none of 10 answers"):
            judged([Sample(0, "a", "b"), Sample(1, "c", "d")], server.url, cache)
    with JudgeServer(lambda request, number: None) as server, pytest.raises(WorkFailed, match="the last: ''"):
        judged(pairs(1), server.url, cache)  # no content: a refusal


# The cache


@needs_openai
def test_everything_that_defines_a_query_is_its_key(cache: Cache) -> None:
    with JudgeServer(always_yes) as server, JudgeServer(always_yes) as other:

        def asked(task: str = "antonym", model: str = "model", url: str = server.url, **request: Any) -> int:
            judge = Judge(model, url, request) if request else Judge(model, url)
            return judge_samples(pairs(2), task, judge, cache).asked

        assert asked() == 10
        assert asked("synonym") == asked(model="another") == asked(url=other.url) == asked(temperature=0.5) == 10
        assert asked(temperature=0.5, top_p=1) == 10
        assert asked() == asked(url=server.url + "/") == asked(top_p=1, temperature=0.5) == asked("synonym") == 0
    assert (len(server.paid), len(other.paid)) == (50, 10)


@needs_openai
def test_stopped_by_an_error_and_resumed(cache: Cache) -> None:
    with JudgeServer(lambda request, number: "1" if number < 33 else Status(402)) as server:
        with pytest.raises(LaaiError, match="402"):
            judged(pairs(20), server.url, cache)
        assert len(server.paid) == 33
        server.decide = always_yes
        assert judged(pairs(20), server.url, cache).asked == 67
        assert len(server.paid) == 100
        assert len(set((r.question, n) for r, n in zip(server.paid, range(100), strict=True))) == 100
    assert set(Counter(request.question for request in server.paid).values()) == {5}


@needs_openai
def test_ctrl_c_keeps_what_is_under_way(cache: Cache) -> None:
    """Stopped while 7 requests are under way and one waits out a failure."""
    arrived, stopped = threading.Event(), threading.Event()

    def decide(request: Request, number: int) -> Any:
        if number < 40:
            return "1"
        if number == 40:
            return Status(503)  # to be sent again in half a minute, if nobody stops that
        if number == 47:
            arrived.set()
        stopped.wait(60)
        return "1"

    def interrupt() -> None:
        arrived.wait(60)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(2.0)  # for the other thread to hear of it
        stopped.set()

    # A shell starts its background jobs with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with JudgeServer(decide) as server:
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            judged(pairs(20), server.url, cache, concurrency=8, backoff=600.0)
        thread.join()
        signal.signal(signal.SIGINT, before)
        assert (len(server.requests), len(server.paid)) == (48, 47)
        assert judged(pairs(20), server.url, cache).asked == 100 - 47
        assert len(server.paid) == 100


@pytest.fixture(scope="module")
def processes() -> Any:
    """Starts processes that have imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lm_eval_laai.judge", "openai"])
    return context


@needs_openai
@pytest.mark.parametrize("paid", [1, 30, 101])
def test_killed_at_any_moment(paid: int, processes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 in full flight: only answers that were under way are paid for again."""
    path, concurrency, killed = tmp_path / "cache.sqlite", 4, threading.Event()

    def decide(request: Request, number: int) -> str:
        if number >= paid + 40:  # were this process too slow to kill the other one
            killed.wait(60)
        return "1"

    with JudgeServer(decide) as server:
        process = processes.Process(target=judge_pairs, args=(server.url, path, 40, concurrency))
        process.start()
        until(lambda: len(server.paid) >= paid or not process.is_alive())
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        killed.set()
        kept = rows_of(path)
        # Another key, since requests of the killed process may still reach the server.
        monkeypatch.setenv("OPENAI_API_KEY", "second")
        with Cache(path) as cache:
            assert judged(pairs(40), server.url, cache).asked == 200 - kept
        until(lambda: server.at_once == 0)
        by = Counter(request.key for request in server.paid)
    assert by["Bearer second"] == 200 - kept
    assert paid <= by[f"Bearer {KEY}"] <= kept + concurrency
    assert rows_of(path) == 200


@needs_openai
def test_two_processes_on_one_cache(processes: Any, tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    with JudgeServer(lambda request, number: str(number % 2)) as server:
        with ProcessPoolExecutor(2, mp_context=processes) as pool:
            futures = [pool.submit(judge_pairs, server.url, path, 30, 4) for _ in range(2)]
            (first, share), (second, other_share) = (future.result() for future in futures)
        assert first + second == len(server.paid)
        assert 150 <= len(server.paid) < 300
        assert share == other_share  # the answers kept are those that count, whoever asked
        assert rows_of(path) == 150


def test_the_first_answer_stays(tmp_path: Path) -> None:
    judge = Judge("model")
    with Cache(tmp_path / "cache") as one, Cache(tmp_path / "cache") as other:
        one.put(judge, "question", 3, "1")
        other.put(judge, "question", 3, "0")
        other.put(judge, "question", 4, "0")
        assert one.get(judge, "question") == other.get(judge, "question") == {3: "1", 4: "0"}


@needs_openai
def test_the_command_killed_and_resumed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`laai judge`, killed while its requests are under way: the exact number of requests, then the exact rest."""
    samples = write_samples(tmp_path / "samples_laai_antonym_2026-01-01.jsonl", pairs(20))
    path, over = tmp_path / "runs" / "cache.sqlite", threading.Event()

    def decide(request: Request, number: int) -> str:
        if number >= 60:
            over.wait(60)
        return "1"

    with JudgeServer(decide) as server:
        line = ["judge", str(samples), "--judge-model", "m", "--base-url", server.url, "--cache", str(path)]
        line += ["--concurrency", "3", "--output", str(tmp_path / "verdicts.jsonl"), "--json"]
        code = "import sys; from lm_eval_laai.commands.cli import main; sys.exit(main(sys.argv[1:]))"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        process = subprocess.Popen(
            [sys.executable, "-c", code, *line], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            until(lambda: process.poll() is not None or len(server.requests) == 63 and rows_of(path) == 60)
        finally:
            process.kill()
            _, log = process.communicate()
        assert process.returncode == -signal.SIGKILL, log
        assert not (tmp_path / "verdicts.jsonl").exists()
        assert KEY.encode() not in log and KEY.encode() not in path.read_bytes()
        server.decide = always_yes
        capfd.readouterr()
        assert cli.main(line) == 0
        over.set()
        out, err = capfd.readouterr()
        facts = json.loads(out)
        assert facts["plan"]["cached"] == 60 and facts["plan"]["to_ask"] == 40
        assert "60 in the cache, 40 to ask" in err
        assert facts["results"][0]["asked"] == 40 and facts["results"][0]["share"] == 1.0
        assert len(server.requests) == 63 + 40
    verdicts = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    assert [(v["doc_id"], v["input"], v["answers"], v["yes"], v["accepted"]) for v in verdicts] == [
        (n, f"word{n}", ["1"] * 5, 5, True) for n in range(20)
    ]
    assert {(v["file"], v["task"]) for v in verdicts} == {(str(samples), "laai_antonym")}


@pytest.mark.parametrize("content", [b"no database at all, only some text" * 40, b""])
def test_a_file_that_is_no_cache(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    path.write_bytes(content)
    if not content:  # an empty file is an empty database
        with Cache(path):
            return
    with pytest.raises(LaaiError, match="cannot be opened .*expected the judge's cache"):
        Cache(path)
    assert path.read_bytes() == content


def test_other_databases_and_places(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE things (x)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(LaaiError, match="another program's database"):
        Cache(path)
    assert path.read_bytes() == before
    for bad in (tmp_path, path / "below", "a\0b"):
        with pytest.raises(LaaiError, match="cannot be opened"):
            Cache(bad)


# A server in trouble

TROUBLES = {
    "500": Status(500),
    "503 with a page": Status(503, {"Content-Type": "text/html"}),
    "rate limit": Status(429),
    "closed": CLOSE,
    "cut": CUT,
    "a page": Body(b"<html>hello</html>", "text/html"),
    "broken JSON": Body(b'{"choices": ['),
    "no choices": Body(b'{"choices": []}'),
    "null": Body(b"null"),
    "choices by name": Body(b'{"choices": {"a": 1}}'),
    "choices that are text": Body(b'{"choices": "1"}'),
    "choices of numbers": Body(b'{"choices": [1]}'),
    "an error with 200": Body(b'{"error": {"message": "upstream"}}'),
}


@needs_openai
@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES.keys())
def test_trouble_that_passes(trouble: Any, cache: Cache) -> None:
    """Every request fails twice."""
    seen: Counter[str] = Counter()

    def decide(request: Request, number: int) -> Any:
        seen[request.question] += 1
        return trouble if number % 3 < 2 else "1"

    with JudgeServer(decide) as server:
        result = judged(pairs(3), server.url, cache, concurrency=1)
    assert (result.asked, result.share, len(server.paid), len(server.requests)) == (15, 1.0, 15, 45)


@needs_openai
@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES.keys())
def test_trouble_that_stays(trouble: Any, cache: Cache) -> None:
    with JudgeServer(lambda request, number: trouble if number >= 3 else "1") as server:
        with pytest.raises(WorkFailed, match=f"attempt {ATTEMPTS} of {ATTEMPTS}.*the same command goes on from here"):
            judged(pairs(3), server.url, cache, concurrency=1)
        assert len(server.requests) == 3 + ATTEMPTS
        server.decide = always_yes
        assert judged(pairs(3), server.url, cache).asked == 12
        assert len(server.paid) == 15


@needs_openai
@pytest.mark.parametrize(
    ("usage", "told"),
    [
        ('{"prompt_tokens": "many", "completion_tokens": 2}', "'many'"),
        ('{"prompt_tokens": [1], "completion_tokens": 2}', "list"),
        ('{"prompt_tokens": 1.5, "completion_tokens": 2}', "1.5"),
        ('{"prompt_tokens": -1, "completion_tokens": 2}', "int"),
        ('{"prompt_tokens": 1' + "0" * 4000 + ', "completion_tokens": 2}', "int"),
    ],
)
def test_a_usage_that_is_none(usage: str, told: str, cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    """What was paid for counts; one line says that the numbers of tokens do not."""
    content = json.dumps({**completion("model", "1"), "usage": "USAGE"}).replace('"USAGE"', usage)
    with JudgeServer(lambda request, number: Body(content.encode()) if number >= 3 else "1") as server:
        result = judged(pairs(2), server.url, cache, concurrency=1)
        assert (result.asked, result.share) == (10, 1.0)
        assert (result.prompt_tokens, result.completion_tokens) == (3 * 30, 10 * 2)
        (record,) = caplog.records
        assert f"usage.prompt_tokens is {told}; expected a whole number" in record.getMessage()
        assert "\n" not in record.getMessage()
        assert judged(pairs(2), server.url, cache).asked == 0 and len(server.requests) == 10


@needs_openai
@pytest.mark.parametrize("code", [200, 500])
def test_a_reply_that_is_too_large(code: int, cache: Cache, tmp_path: Path) -> None:
    """Paid for once, never read to its end and never kept; the answers before it are."""
    text = "1" + "x" * (60 << 20)
    large = (
        Body(json.dumps(completion("model", text)).encode()) if code == 200 else Status(code, {}, {"message": text})
    )
    with JudgeServer(lambda request, number: large if number >= 3 else "1") as server:
        with pytest.raises(WorkFailed, match="answered more than 1048576 bytes; expected a chat completion"):
            judged(pairs(2), server.url, cache, concurrency=1)
        assert len(server.requests) == 4
        assert rows_of(tmp_path / "cache.sqlite") == 3
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1 << 20
        server.decide = always_yes
        assert judged(pairs(2), server.url, cache).asked == 7


@needs_openai
def test_stalls(cache: Cache) -> None:
    """A server that says nothing for the first three requests is not waited for."""
    over = threading.Event()

    def decide(request: Request, number: int) -> Any:
        if number < 3:
            over.wait(60)
            return CLOSE
        return "1"

    with JudgeServer(decide) as server:
        result = judged(pairs(2), server.url, cache, concurrency=3, timeout=1.5)
        over.set()
    assert (result.asked, len(server.requests), len(server.paid)) == (10, 13, 10)


@needs_openai
def test_no_server(cache: Cache) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(WorkFailed, match="connection failed"):
        judged(pairs(1), url, cache)


@needs_openai
@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_retry_after_holds_for_all(kind: str, cache: Cache) -> None:
    """The first of four requests under way is told to wait; the threads of the others wait too."""
    named: dict[str, float] = {}

    def decide(request: Request, number: int) -> Any:
        if number == 0:
            until(lambda: len(server.requests) == 4)
            named["until"] = time.monotonic() + 2.0
            moment = datetime.now(timezone.utc) + timedelta(seconds=3)  # whose header is cut to whole seconds
            return Status(429, {"Retry-After": "2" if kind == "seconds" else format_datetime(moment, usegmt=True)})
        if number < 4:
            until(lambda: "until" in named and time.monotonic() > named["until"] - 1.0)
        return "1"

    with JudgeServer(decide) as server:
        assert judged(pairs(4), server.url, cache, concurrency=4).asked == 20
    assert len(server.requests) == 21
    assert [request for request in server.requests[4:] if request.moment < named["until"]] == []


@needs_openai
def test_a_wait_that_is_too_long_is_refused(cache: Cache) -> None:
    with JudgeServer(lambda request, number: Status(429, {"Retry-After": "3600"})) as server:
        with pytest.raises(WorkFailed, match="asking for 3600 s"):
            judged(pairs(1), server.url, cache, concurrency=1)
    assert len(server.requests) == 1


@needs_openai
def test_back_off_doubles(cache: Cache) -> None:
    with JudgeServer(lambda request, number: Status(500) if number < 5 else "1") as server:
        judged(pairs(1), server.url, cache, concurrency=1, backoff=0.04)
    moments = [request.moment for request in server.requests[:6]]
    waits = [after - before for before, after in zip(moments, moments[1:], strict=False)]
    for number, wait in enumerate(waits):
        assert wait >= 0.75 * 0.04 * 2**number


@needs_openai
@pytest.mark.parametrize("code", [400, 401, 403, 404, 422])
def test_refusals_are_final(code: int, cache: Cache) -> None:
    with JudgeServer(lambda request, number: Status(code, {}, {"message": f"no such thing\nas {KEY}"})) as server:
        with pytest.raises(LaaiError, match=rf"{code} no such thing as \*\*\*; expected") as caught:
            judged(pairs(3), server.url, cache, concurrency=1)
    assert len(server.requests) == 1 and not isinstance(caught.value, WorkFailed)


@needs_openai
def test_an_account_without_credit_is_final(cache: Cache) -> None:
    error = {"message": "You exceeded your current quota", "code": "insufficient_quota"}
    with JudgeServer(lambda request, number: Status(429, {}, error)) as server:
        with pytest.raises(WorkFailed, match="exceeded your current quota"):
            judged(pairs(3), server.url, cache, concurrency=1)
    assert len(server.requests) == 1


@needs_openai
@pytest.mark.parametrize("concurrency", [1, 6])
def test_concurrency(concurrency: int, cache: Cache) -> None:
    """The server answers the first requests only when as many as allowed are there, and sees no more at once."""
    together = threading.Barrier(concurrency)

    def decide(request: Request, number: int) -> str:
        if number < concurrency:
            together.wait(30)
        return "1"

    with JudgeServer(decide) as server:
        judged(pairs(10), server.url, cache, concurrency=concurrency)
    assert server.most_at_once == concurrency


# Keys and addresses


@needs_openai
def test_without_a_key(monkeypatch: pytest.MonkeyPatch, cache: Cache) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", " ")
    with JudgeServer(always_yes) as server:
        assert judged(pairs(1), server.url, cache).share == 1.0  # local servers want none
    with pytest.raises(LaaiError, match="OPENAI_API_KEY is not set"):
        judge_samples(pairs(1), "antonym", Judge("gpt-4"), cache)


@needs_openai
def test_a_key_that_is_none_is_not_shown(monkeypatch: pytest.MonkeyPatch, cache: Cache) -> None:
    for bad in ("sk-se cret", "sk-se\ncret", "sk-sécret"):
        monkeypatch.setenv("OPENAI_API_KEY", bad)
        with JudgeServer(always_yes) as server, pytest.raises(LaaiError, match="no key has") as caught:
            judged(pairs(1), server.url, cache)
        assert "cret" not in str(caught.value) and server.requests == []


@pytest.mark.parametrize("url", ["nonsense", "", "ftp://host/v1", "http://", "http://[::1/v1"])
def test_not_an_address(url: str) -> None:
    with pytest.raises(LaaiError, match="base_url is .*; expected an address such as https://api.openai.com/v1"):
        Judge("m", url)


@pytest.mark.parametrize("url", ["https://me:secret@host/v1", "https://host/v1?key=secret", "https://host/v1#secret"])
def test_an_address_with_a_secret(url: str) -> None:
    with pytest.raises(LaaiError, match="OPENAI_API_KEY") as caught:
        Judge("m", url)
    assert "secret" not in str(caught.value)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, cache: Cache) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(LaaiError, match=re.escape('pip install "lm-eval-laai[judge]"')):
        judged(pairs(1), "http://127.0.0.1:9/v1", cache)


def test_bad_arguments(cache: Cache) -> None:
    url = "http://127.0.0.1:9/v1"
    with pytest.raises(LaaiError, match="no samples"):
        judged([], url, cache)
    with pytest.raises(LaaiError, match="no question for task 'opinionqa_moderate'; expected one of antonym, "):
        judged(pairs(1), url, cache, "opinionqa_moderate")
    for concurrency in (0, 257):
        with pytest.raises(LaaiError, match=f"concurrency is {concurrency}"):
            judged(pairs(1), url, cache, concurrency=concurrency)


# The harness's samples


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Samples and results as `lm_eval run --log_samples` writes them, of the reference model."""
    tracker = EvaluationTracker(str(tmp_path_factory.mktemp("harness")))
    results = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(ROOT / "reference_model" / "weights")},
        tasks=["laai_lexicon_antonym"],
        task_manager=TaskManager(include_path=str(ROOT / "task_yamls"), include_defaults=False),
        batch_size=24,
        device="cpu",
        limit=24,
        log_samples=True,
        evaluation_tracker=tracker,
    )
    samples = results.pop("samples")["laai_lexicon_antonym"]
    tracker.save_results_aggregated(results, {"laai_lexicon_antonym": samples})
    tracker.save_results_samples("laai_lexicon_antonym", samples)
    (path,) = Path(tracker.output_path).glob("**/samples_*")
    return path, results["results"]["laai_lexicon_antonym"]


@needs_openai
def test_a_judge_that_knows_the_lexicon_accepts_what_exact_match_does(
    logged: tuple[Path, dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    samples, results = logged
    known = {f'"{pair.input}" is an antonym of "{pair.output}".' for pair in load_pairs("lexicon_antonym")[0]}
    with JudgeServer(lambda request, number: str(int(request.question.partition("correct. ")[2] in known))) as server:
        line = ["judge", str(samples), "--judge-model", "m", "--base-url", server.url]
        line += ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "out.jsonl")]
        assert cli.main([*line, "--json"]) == 0
        (facts,) = json.loads(capfd.readouterr().out)["results"]
        assert cli.main(line) == 0
    out = capfd.readouterr().out
    assert facts["task"] == "laai_lexicon_antonym" and facts["pairs"] == 24
    assert facts["share"] == pytest.approx(results["exact_match,none"])
    assert facts["stderr"] == pytest.approx(results["exact_match_stderr,none"])
    assert 0 < facts["share"] < 1
    assert f"{facts['share']:.3f} ± {facts['stderr']:.3f}" in out
    rows = [json.loads(row) for row in samples.read_text().splitlines()]
    verdicts = [json.loads(row) for row in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [v["accepted"] for v in verdicts] == [row["exact_match"] == 1.0 for row in rows]


GOOD = {"doc_id": 0, "doc": {"prompt": "Q: hot\nA:", "target": " t"}, "filtered_resps": [" cold\nQ: x"]}


def test_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    rows = [
        GOOD,
        {**GOOD, "doc_id": 1, "filtered_resps": [" \n"]},
        {**GOOD, "doc_id": 2, "filtered_resps": ["a\u2028b"]},
    ]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    assert read_samples(path) == [Sample(0, "hot", "cold"), Sample(1, "hot", ""), Sample(2, "hot", "a\u2028b")]


BAD_ROWS = {
    "{": "line 2 is not valid JSON",
    "[" * 100_000: "line 2 is not valid JSON",
    "[]": "line 2 is no sample of a word task",
    '"text"': "line 2 is no sample of a word task",
    json.dumps({**GOOD, "doc": {}}): "line 2 is no sample of a word task",
    json.dumps({**GOOD, "filtered_resps": []}): "line 2 is no sample of a word task",
    json.dumps({**GOOD, "filtered_resps": [["-1.5", "True"]]}): "line 2: expected text in filtered_resps",
    json.dumps({**GOOD, "doc": {"prompt": "Question: x\nAnswer:"}}): "line 2: doc.prompt is 'Question",
    json.dumps({**GOOD, "doc": {"prompt": 3}}): "line 2: doc.prompt is 3",
    json.dumps(GOOD): "line 2: doc_id 0 comes again",
}


@pytest.mark.parametrize("row", BAD_ROWS, ids=[message[:40] for message in BAD_ROWS.values()])
def test_bad_samples(row: str, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{row}\n")
    with pytest.raises(LaaiError, match=re.escape(f"{path}: {BAD_ROWS[row]}")):
        read_samples(path)


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    for content, message in (
        (b"", "holds no samples"),
        (b"\n\n", "holds no samples"),
        (b"{\xff", "not UTF-8 at byte 1"),
    ):
        path.write_bytes(content)
        with pytest.raises(LaaiError, match=message):
            read_samples(path)
    for bad in (tmp_path, tmp_path / "none.jsonl", Path("a\0b")):
        with pytest.raises(LaaiError, match="cannot be read"):
            read_samples(bad)


# The command


def run(*argv: object) -> int:
    return cli.main(["judge", *map(str, argv)])


def test_dry_run(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Needs no key, no package and no server, and leaves nothing."""
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.delenv("OPENAI_API_KEY")
    first = write_samples(tmp_path / "a.jsonl", [*pairs(3), Sample(9, "x", "")])
    second = write_samples(tmp_path / "b.jsonl", pairs(4))
    before = sorted(tmp_path.iterdir())
    line = [first, second, "--task", "antonym", "--judge-model", "gpt-4", "--cache", tmp_path / "cache", "--dry-run"]
    assert run(*line, "--json", "--price-per-million", 30, 60) == 0
    plan = json.loads(capfd.readouterr().out)["plan"]
    # 84 characters of the paper's words, and 21 tokens and some for the message
    assert plan == {
        "pairs": 8,
        "empty": 1,
        "distinct_pairs": 4,
        "queries": 20,
        "cached": 0,
        "to_ask": 20,
        "prompt_tokens": plan["prompt_tokens"],
        "completion_tokens": 20,
        "price": pytest.approx((plan["prompt_tokens"] * 30 + 20 * 60) / 1e6),
    }
    question = 'Answer 0 if what I say is wrong and 1 if it is correct. "word0" is an antonym of "answer0".'
    assert 20 * len(question) / 5 < plan["prompt_tokens"] < 20 * len(question) / 2
    assert run(*line) == 0
    assert "20 queries, 0 in the cache, 20 to ask" in capfd.readouterr().out
    assert sorted(tmp_path.iterdir()) == before


@needs_openai
def test_several_files_share_answers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = write_samples(tmp_path / "samples_laai_antonym_1.jsonl", pairs(3))
    second = write_samples(tmp_path / "samples_laai_lexicon_antonym_1.jsonl", pairs(4))
    third = write_samples(tmp_path / "samples_laai_en_fr_1.jsonl", pairs(2))
    with JudgeServer(always_yes) as server:
        line = [first, second, third, "--judge-model", "m", "--base-url", server.url, "--cache", tmp_path / "cache"]
        assert run(*line) == 0
        assert len(server.paid) == 30
        out, err = capfd.readouterr()
        assert run(*line, "--dry-run", "--json") == 0
    assert "9 pairs" in err and "30 to ask" in err
    rows = [line.split() for line in out.splitlines()[1:]]
    assert [row[:7] for row in rows] == [
        ["laai_antonym", "1.000", "±", "0.000", "3", "0", "0"],
        ["laai_lexicon_antonym", "1.000", "±", "0.000", "4", "0", "0"],
        ["laai_en_fr", "1.000", "±", "0.000", "2", "0", "0"],
    ]
    assert [row[7] for row in rows] == ["15", "5", "10"]
    plan = json.loads(capfd.readouterr().out)["plan"]
    assert (plan["cached"], plan["to_ask"], plan["prompt_tokens"]) == (30, 0, 0)


def test_refused_command_lines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    samples = write_samples(tmp_path / "samples_laai_antonym_1.jsonl", pairs(1))
    unnamed = write_samples(tmp_path / "pairs.jsonl", pairs(1))
    common = ["--judge-model", "m", "--cache", tmp_path / "cache", "--base-url", "http://127.0.0.1:9/v1"]
    before = sorted(tmp_path.iterdir())
    for line, message in (
        ([unnamed], "its name does not say the task"),
        ([samples, "--task", "opinionqa_moderate"], "no question for task"),
        ([samples, "--request", "16"], "expected a JSON object"),
        ([samples, "--request", "{"], "expected a JSON object"),
        ([samples, "--request", '{"stream": true}'], "request sets stream"),
        ([samples, "--request", '{"a": NaN}'], "expected finite numbers"),
        ([samples, "--request", '{"a": [1e999]}'], "expected finite numbers"),
        ([samples, "--request", '{"a": "\\ud800"}'], "Unicode text"),
        ([samples, "--price-per-million", "-1", "2"], "expected two prices"),
        ([samples, "--price-per-million", "nan", "2"], "expected two prices"),
        ([samples, "--output", tmp_path], "is a folder"),
        ([samples, "--output", tmp_path / "cache"], "is the cache of answers"),
        ([samples, "--output", samples / "x"], "cannot write to"),
        ([tmp_path / "samples_laai_antonym_2.jsonl"], "cannot be read"),
    ):
        capfd.readouterr()
        assert run(*line, *common) == 2
        out, err = capfd.readouterr()
        assert out == "" and err.startswith("laai: error: ") and err.count("\n") == 1 and message in err
        assert sorted(tmp_path.iterdir()) == before


# A real model behind a real server


@pytest.mark.slow
@needs_openai
@pytest.mark.skipif(
    not getattr(import_utils, "is_serve_available", lambda: False)() or shutil.which("transformers") is None,
    reason="transformers serve is not installed: pip install transformers[serving]",
)
@pytest.mark.parametrize("digit", ["0", "1"])
def test_transformers_serve(digit: str, tmp_path: Path, cache: Cache) -> None:
    """A Llama whose next token is always the same digit."""
    import torch

    model, tokenizer = tiny_model("Llama"), tiny_tokenizer(bos=True)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (token,) = tokenizer.encode(digit, add_special_tokens=False)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[token] = 1.0
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["transformers", "serve", str(tmp_path / "model"), "--device", "cpu", "--host", "127.0.0.1"]
    server = subprocess.Popen([*command, "--port", str(port)], env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        until(lambda: server.poll() is not None or socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        judge = Judge(str(tmp_path / "model"), f"http://127.0.0.1:{port}/v1", {"max_tokens": 1})
        result = judge_samples(pairs(4), "antonym", judge, cache, concurrency=2)
        again = judge_samples(pairs(4), "antonym", judge, cache)
    finally:
        server.terminate()
        server.wait()
    assert result.share == again.share == float(digit)
    assert [v.answers for v in result.verdicts] == [[digit] * 5] * 4
    assert (result.asked, result.completion_tokens, again.asked) == (20, 20, 0)
    assert result.prompt_tokens > 20 * 20
