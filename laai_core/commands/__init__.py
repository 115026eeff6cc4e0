"""The core's commands, one module each. `add` puts a command on a parser; it returns a Report when it has run."""
