"""The commands of `laai`, one module each. `add` puts a command on a parser; it returns a Report when it has run."""
