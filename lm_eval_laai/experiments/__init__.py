"""Shared by demo, sweep and paper: cells, the store of finished cells, and their evaluation by the harness."""
