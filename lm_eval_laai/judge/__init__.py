"""GPT-Eval: a language model behind an OpenAI-compatible endpoint says which predictions are right.

with Cache("runs/judge.sqlite") as cache:
    judgement = judge_samples(read_samples(path), "antonym", Judge("gpt-4"), cache)
judgement.share, judgement.stderr
"""

from lm_eval_laai.judge.cache import Cache
from lm_eval_laai.judge.endpoint import Judge
from lm_eval_laai.judge.judgement import Judgement, Verdict, judge_samples
from lm_eval_laai.judge.samples import Sample, read_samples

__all__ = ["Cache", "Judge", "Judgement", "Sample", "Verdict", "judge_samples", "read_samples"]
