"""The one error type for bad input."""


class LaaiError(Exception):
    """Bad input, in one line: what was wrong, where, and what was expected."""
