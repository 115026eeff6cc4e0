"""`laai paper` and `laai sweep`: experiments as cells that are trained and evaluated once and remembered."""
