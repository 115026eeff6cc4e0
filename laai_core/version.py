"""The version of this project, which setup.cfg reads and every trained file records."""

__version__ = "0.1.0"
