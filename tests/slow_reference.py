"""The slow reference: one request, batch 1, no padding, no cache, full forward, Δ added by index. Shares no code with
the packages; module paths are written by hand in tiny.py."""

from __future__ import annotations

import torch


def positions(position: str, prompt_length: int, length: int) -> list[int]:
    """Indices of an unpadded row that a position selects."""
    return {
        "last": [prompt_length - 1],
        "generated": list(range(prompt_length - 1, length)),
        "all": list(range(length)),
    }[position]


class AddByIndex:
    """Adds `vector` to unpadded rows whose prompt has `prompt_length` tokens; every call is a full one."""

    def __init__(self, model, path, vector, site, position, prompt_length):
        self.model, self.module = model, model.get_submodule(path)
        self.vector, self.site, self.position, self.prompt_length = vector, site, position, prompt_length

    def __enter__(self):
        self.model_handle = self.model.register_forward_pre_hook(self.on_call, with_kwargs=True)
        if self.site == "heads":
            self.handle = self.module.register_forward_pre_hook(lambda m, a: (self.changed(a[0]),) + tuple(a[1:]))
        else:
            self.handle = self.module.register_forward_hook(self.on_output)
        return self

    def __exit__(self, *error):
        self.handle.remove()
        self.model_handle.remove()

    def on_call(self, module, args, kwargs):
        self.tokens = (args[0] if args else kwargs["input_ids"]).shape

    def on_output(self, module, args, output):
        if isinstance(output, tuple):
            return (self.changed(output[0]),) + output[1:]
        return self.changed(output)

    def changed(self, x):
        rows = x.clone().view(*self.tokens, -1)  # OPT's feed-forward sees all rows of the batch in one
        for index in positions(self.position, self.prompt_length, rows.shape[1]):
            rows[:, index] = rows[:, index] + self.vector.reshape(-1).to(x.dtype)
        return rows.view(x.shape)


class Nothing:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


def writing(model, spec, prompt_length):
    """spec: None, or a dict with path, vector, site, position."""
    if spec is None:
        return Nothing()
    return AddByIndex(model, spec["path"], spec["vector"], spec["site"], spec["position"], prompt_length)


@torch.no_grad()
def loglikelihood(
    model, prompt: list[int], continuation: list[int], spec, dtype: torch.dtype = torch.float64
) -> tuple[float, bool]:
    """log p(continuation | prompt), its softmax in `dtype`, and whether it is the greedy one."""
    ids = torch.tensor([prompt + continuation[:-1]])
    with writing(model, spec, len(prompt)):
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
    logprobs = torch.log_softmax(logits.to(dtype), -1)
    total = sum(float(logprobs[i, token]) for i, token in enumerate(continuation))
    return total, logits.argmax(-1).tolist() == continuation


@torch.no_grad()
def greedy(model, prompt: list[int], count: int, spec) -> list[int]:
    """`count` greedy tokens, the whole sequence run anew for each."""
    ids = list(prompt)
    for _ in range(count):
        with writing(model, spec, len(prompt)):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@torch.no_grad()
def beams(model, prompt: list[int], count: int, width: int, spec) -> list[int]:
    """transformers' own beam search over one unpadded prompt without a cache."""
    with writing(model, spec, len(prompt)):
        out = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=count,
            min_new_tokens=count,
            num_beams=width,
            do_sample=False,
            use_cache=False,
        )
    return out[0, len(prompt) :].tolist()
