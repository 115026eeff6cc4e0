"""The lm-evaluation-harness side of LAAI: the model `hf-laai`, its tasks, its command line.

Imports nothing: `import torch` reaches this file, in every process of an environment where LAAI is installed, on its
way to `lm_eval_laai.register`.
"""
