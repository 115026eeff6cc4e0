"""A sweep on a Ray cluster: each of so many workers runs the same command on the same folder, and takes what no other
worker is at.

    python examples/ray_sweep.py --workers 8 -- --model meta-llama/Llama-3.1-8B --task antonym --output /shared/sweep

What follows `--` are the flags of `laai sweep`; --output is a folder that all machines see, on a file system with
locks. `pip install "ray[default]"`; LAAI, the model and the data sets are on every machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import ray


def sweep(flags: list[str]) -> int:
    """The exit code of one process of the sweep."""
    return subprocess.run(["laai", "sweep", *flags]).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes at once (default: %(default)s)")
    parser.add_argument("--gpus", type=float, default=1, help="GPUs of each; 0 runs on CPUs (default: %(default)s)")
    parser.add_argument("flags", nargs="+", metavar="-- FLAGS", help="of `laai sweep`")
    arguments = parser.parse_args()
    ray.init()
    # A lost machine's worker is started again: it goes on where the store is.
    worker = ray.remote(num_gpus=arguments.gpus, max_retries=3)(sweep)
    return max(ray.get([worker.remote(arguments.flags) for _ in range(arguments.workers)]))


if __name__ == "__main__":
    sys.exit(main())
