"""What demo, sweep and paper share: cells, where finished ones are kept, and how the harness computes one."""
