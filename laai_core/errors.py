"""The one error type for bad input, and its one kind that is nobody's input."""


class LaaiError(Exception):
    """Bad input, in one line: what was wrong, where, and what was expected."""


class WorkFailed(LaaiError):
    """The input was fine and the work still failed: a server, the memory, a loss that is not finite."""
