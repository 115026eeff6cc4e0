"""What the documentation says of reliability is what was counted."""

from __future__ import annotations

import importlib
import sys

from conftest import ROOT


def test_the_document_is_rendered_from_the_results(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    reliability = importlib.import_module("reliability")
    written = reliability.DOCUMENT.read_text(encoding="utf-8")
    assert written == reliability.render(), "run python benchmarks/reliability.py, or one part of it"
    assert "Faults:" not in written
