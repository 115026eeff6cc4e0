"""The check in front of an OpenAI-compatible server: `vllm serve ... --middleware laai_core.vllm.serving.check`.

A request names its intervention in `vllm_xargs` (`extra_body` of the openai package):

    {"model": ..., "prompt": "Q: hot\\nA:", "vllm_xargs": {"laai": "laai_antonym"}}

A worker that gets a name it does not know can only end the engine; here it is one request that fails, with status 400.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from laai_core.errors import LaaiError
from laai_core.vllm.options import LENGTH, check_request, paths


async def check(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """Answer a request that names no intervention of this server with status 400, and pass on every other."""
    if request.method == "POST":
        try:
            state = request.app.state
            if not hasattr(state, "laai_interventions"):  # a file that came later is not in the engine
                state.laai_interventions = paths(state.vllm_config.additional_config)
            refuse(await request.body(), state.laai_interventions)
        except LaaiError as error:
            fault = {"message": str(error), "type": "BadRequestError", "param": "vllm_xargs", "code": 400}
            return JSONResponse({"error": fault}, status_code=400)
    return await call_next(request)


def refuse(body: bytes, names: Mapping[str, str]) -> None:
    """LaaiError for a request's body with an unknown intervention, or a prompt length that its prompt does not have.

    A body that is no JSON object passes: what it lacks, the server says itself.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return
    if not isinstance(fields, dict):
        return
    parameters = fields.get("sampling_params")
    for arguments in (
        fields.get("vllm_xargs"),
        parameters.get("extra_args") if isinstance(parameters, dict) else None,
    ):
        if not isinstance(arguments, dict):
            continue
        tokens = None
        if LENGTH in arguments:
            prompt = fields.get("prompt", fields.get("token_ids"))
            if not isinstance(prompt, list) or not all(isinstance(token, int) for token in prompt):
                raise LaaiError(f"{LENGTH} was given with a prompt of text: expected one prompt of token ids")
            if fields.get("truncate_prompt_tokens") is not None:
                raise LaaiError(f"{LENGTH} was given with truncate_prompt_tokens: expected one of them")
            tokens = len(prompt)
        check_request(arguments, names, tokens)
