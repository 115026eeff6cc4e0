"""The one error type for bad input, and its one kind that is nobody's input."""

LONGEST = 1000  # characters of a message


class LaaiError(Exception):
    """Bad input, in one line: what was wrong, where, and what was expected."""

    def __init__(self, message: object) -> None:
        # Names of files, and what is in them, may be long, and hold line breaks, terminal commands, or no Unicode.
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(message)[: LONGEST + 1])
        super().__init__(text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}...")


class WorkFailed(LaaiError):
    """The input was fine and the work still failed: a server, the memory, a loss that is not finite."""
