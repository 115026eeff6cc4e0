"""Interventions inside vLLM: a worker class that adds each request's own vector at its own tokens.

    vllm serve MODEL --worker-cls laai_core.vllm.worker.Worker --middleware laai_core.vllm.serving.check \\
        --additional-config '{"laai": {"interventions": "vectors/"}}' --no-enable-prefix-caching

`options` says which files an engine knows and what a request names (no vLLM), `placing` which rows of a step a vector
goes to (no vLLM), `sites` how a module adds it, `verify` that the engine does, `worker` puts them together. Imports
nothing, and no other file of the core imports this wing.
"""
