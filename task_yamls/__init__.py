"""Task definitions for lm-evaluation-harness; installed as `lm_eval_laai.task_yamls`."""
