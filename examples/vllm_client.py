"""One prompt under several interventions, from a server that holds them all. Start the server first:

    VLLM_USE_V2_MODEL_RUNNER=0 vllm serve MODEL --worker-cls laai_core.vllm.worker.Worker \\
        --middleware laai_core.vllm.serving.check --no-enable-prefix-caching \\
        --additional-config '{"laai": {"interventions": "vectors/"}}'
    python examples/vllm_client.py http://127.0.0.1:8000/v1 "Q: hot" laai_antonym laai_synonym

A name is that of a file in the folder, without suffix. The request goes to the model untouched where none is named.
"""

from __future__ import annotations

import sys

import openai


def answers(server: str, prompt: str, names: list[str], tokens: int = 16) -> dict[str, str]:
    """The greedy continuation of `prompt` without an intervention and under each of `names`."""
    client = openai.OpenAI(base_url=server, api_key="none")
    model = client.models.list().data[0].id
    found = {}
    for name in ["", *names]:
        extra = {"vllm_xargs": {"laai": name}} if name else {}
        answer = client.completions.create(
            model=model, prompt=prompt, max_tokens=tokens, temperature=0, stop="\n", extra_body=extra
        )
        found[name] = answer.choices[0].text
    return found


if __name__ == "__main__":
    for name, text in answers(sys.argv[1], f"{sys.argv[2]}\nA:", sys.argv[3:]).items():
        print(f"{name or 'untouched':>20} {text}")
