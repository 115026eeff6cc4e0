"""Fixtures that several test files share."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported, here and in the processes that tests start: on models this small, threads that wait for
# one another cost more than the work they share.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def public_data() -> Path:
    """The folder to pass as `data`: $LAAI_DATA, or the copy for development beside the repository."""
    folder = Path(os.environ.get("LAAI_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "function_vectors" / "antonym.json").is_file():
        pytest.skip(f"the public word sets are not in {folder}; set LAAI_DATA")
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny.small_model_folder`, made once."""
    from tiny import small_model_folder  # torch reads OMP_NUM_THREADS, set above, when it is imported

    return small_model_folder(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command line that must end in one line and an exit code; returns the line."""

    from lm_eval_laai.commands import cli  # imports torch, which reads OMP_NUM_THREADS, set above

    def run(*argv: object, code: int = 2, begun: bool = False) -> str:
        capfd.readouterr()
        assert cli.main([str(a) for a in argv]) == code
        out, err = capfd.readouterr()
        assert out == "" and "Traceback" not in err
        (line,) = [line for line in re.split("[\r\n]", err) if line.startswith("laai: error: ")]
        assert err.endswith(f"{line}\n")
        if code == 2 and not begun:  # work that has begun has shown its bar
            assert err == f"{line}\n"
        return line

    return run


@pytest.fixture
def facts_of(capfd: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Runs a command line with --json that must succeed; returns the printed JSON."""
    from lm_eval_laai.commands import cli

    def run(*argv: object) -> dict[str, Any]:
        capfd.readouterr()
        assert cli.main([*map(str, argv), "--json"]) == 0
        return json.loads(capfd.readouterr().out)

    return run
