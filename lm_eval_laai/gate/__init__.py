"""The regression gate: the harness's results against a baseline."""
