"""The `laai` console script: Ctrl-C ends it in silence while it imports, which takes seconds, and after its work."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

INTERRUPTED = 130  # as in lm_eval_laai.commands.cli, which is not imported yet


def main(argv: Sequence[str] | None = None) -> int:
    """Import the command line and run it; returns the exit code."""
    # Where SIGINT is ignored (`nohup`, a shell's background) or handled by a caller it stays so.
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        # No exception: imported modules may catch it, or take it for a missing module.
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    from lm_eval_laai.commands.cli import main as laai

    try:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = laai(argv)
    except KeyboardInterrupt:  # a second Ctrl-C, while the first is being reported
        code = INTERRUPTED
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the interpreter's end would print a traceback
    return code
