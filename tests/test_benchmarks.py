"""What the documentation says of speed is what was measured. Nothing here is timed."""

from __future__ import annotations

import importlib
import sys

import pytest
from conftest import ROOT


@pytest.fixture
def report(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    return importlib.import_module("report")


def test_the_document_is_rendered_from_the_results(report):
    written = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert written == report.render(), "run python benchmarks/report.py"


def test_a_ratio_is_taken_within_rounds(report):
    """A machine that is ten times slower in one round does not change it."""
    measure = importlib.import_module("measure")
    assert measure.ratio({"slow": [2.0, 20.0, 2.0], "fast": [1.0, 10.0, 1.0]}, "slow", "fast") == 2.0
