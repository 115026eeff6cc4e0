"""What test_judge runs in processes of its own, which it kills or sets on one cache."""

from __future__ import annotations

from pathlib import Path

from lm_eval_laai.judge import Cache, Judge, Sample, judge_samples


def pairs(count: int) -> list[Sample]:
    return [Sample(number, f"word{number}", f"answer{number}") for number in range(count)]


def judge_pairs(url: str, cache_path: Path, count: int, concurrency: int) -> tuple[int, float]:
    """Judge `pairs(count)`; returns how many queries this process asked, and the share."""
    with Cache(cache_path) as cache:
        judgement = judge_samples(
            pairs(count), "antonym", Judge("model", url), cache, concurrency=concurrency, backoff=0.01
        )
    return judgement.asked, judgement.share
