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


def test_the_documents_are_rendered_from_the_results(report):
    for name, text in report.render().items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, "run python benchmarks/report.py"


def test_a_ratio_is_taken_within_rounds(report):
    """A machine that is ten times slower in one round does not change it."""
    measure = importlib.import_module("measure")
    assert measure.ratio({"slow": [2.0, 20.0, 2.0], "fast": [1.0, 10.0, 1.0]}, "slow", "fast") == 2.0
