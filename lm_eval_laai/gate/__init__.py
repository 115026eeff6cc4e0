"""The regression gate: the harness's results against a baseline, or one run's against another's."""
