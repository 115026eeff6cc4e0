"""Kill `laai paper` at random moments until it is done, and compare its report with that of a run nobody killed.

    python benchmarks/resume.py --runs 3

Each run: started, killed with SIGKILL after a random time, started again, and so on, at most --kills times, then left
to finish. Checked: report.json and report.md have the bytes of the undisturbed run's, and no file of a finished cell
or fit was written twice. Prints one line of JSON a run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAAI = "import sys; from lm_eval_laai.commands.cli import main; sys.exit(main())"
WORK = ["--tables", "2,4", "--figures", "2", "--seeds", "2", "--limit", "20"]
REPORT = ("report.json", "report.md")


def start(folder: Path) -> subprocess.Popen[bytes]:
    """The command, its report going to `folder`."""
    command = [sys.executable, "-c", LAAI, "paper", "--data", "lexicon", *WORK, "--output", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)


def finished(folder: Path) -> dict[str, tuple[int, int]]:
    """Every cell and fit, with what changes when it is written again."""
    files = [path for part in ("cells", "fits") for path in (folder / part).glob("[!.]*")]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def disturbed(folder: Path, kills: int, longest: float, draw: random.Random) -> dict[str, object]:
    """Run to the end in spite of `kills`; how many struck, and how many files were ever written again."""
    seen: dict[str, tuple[int, int]] = {}
    struck = again = 0
    while True:
        process = start(folder)
        try:
            process.wait(draw.uniform(0, longest) if struck < kills else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            struck += 1
        now = finished(folder)
        again += sum(now.get(name) != stamp for name, stamp in seen.items())
        seen = now
        if process.returncode >= 0:
            return {"kills": struck, "written again": again, "exit code": process.returncode, "files": len(seen)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--kills", type=int, default=5, help="a run")
    parser.add_argument("--longest", type=float, default=40.0, help="seconds until a kill, at most")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch, "whole")
        if start(whole).wait() != 0:
            raise SystemExit("the undisturbed run failed")
        for number in range(arguments.runs):
            folder = Path(scratch, str(number))
            facts = disturbed(folder, arguments.kills, arguments.longest, draw)
            facts["same report"] = all((folder / n).read_bytes() == (whole / n).read_bytes() for n in REPORT)
            print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
