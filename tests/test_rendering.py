"""Harness tasks and chats as training data: the tokens and log-probabilities that the harness evaluates."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import slow_reference
import torch
from lm_eval.tasks import TaskManager
from tiny import PROJECTION_PATHS, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import laai_core as laai
from laai_core.data.examples import read_examples
from laai_core.encode import encode_examples
from laai_core.forward import PlainForward
from laai_core.locate import locate
from lm_eval_laai import own_task
from lm_eval_laai.commands import cli
from lm_eval_laai.known_models.folder import pretrained
from lm_eval_laai.model import HFLaai
from lm_eval_laai.rendering import Renderer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}{% if shout %}!{% endif %}"
)
WORDS = "there in the morning a cold wall and then another story of nothing".split()
DOCS = {
    split: [{"q": f"{w} {split}?", "opts": ["cold", "a wall", "nothing"], "gold": n % 3} for n, w in enumerate(WORDS)]
    for split in ("train", "test")
}
KEYS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "Q {{q}}\nA:",
        "doc_to_choice": "{{opts}}",
        "doc_to_target": "gold",
        "description": "Choose.\n\n",
        "target_delimiter": "  ",
    },
    "letters": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}\n",
        "doc_to_choice": ["A", "B", "C"],
        "doc_to_target": "{{['A','B','C'][gold]}}",
        "gen_prefix": "It is",
    },
    "blank": {  # several contexts, one continuation
        "output_type": "multiple_choice",
        "doc_to_text": "gold",
        "doc_to_choice": "{{opts}}",
        "doc_to_target": "{{q}}",
    },
    "write": {
        "output_type": "generate_until",
        "doc_to_text": "Q {{q}}",
        "doc_to_target": "{{opts[gold]}}",
        "target_delimiter": " => ",
        "fewshot_delimiter": " ## ",
        "generation_kwargs": {"until": [" ##", "\n"], "max_gen_toks": 8},
    },
    "likelihood": {"output_type": "loglikelihood", "doc_to_text": "{{q}} ", "doc_to_target": "{{opts[gold]}}"},
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for split, docs in DOCS.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, keys in KEYS.items():
        config = {
            "task": f"local_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {s: str(folder / f"{s}.jsonl") for s in DOCS}},
            "training_split": "train",
            "test_split": "test",
            "fewshot_split": "train",
            "fewshot_config": {"sampler": "first_n"},
            **keys,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(config))  # JSON is YAML
    return folder


def loaded(folder: Path, name: str) -> Any:
    return TaskManager(include_path=str(folder), include_defaults=False).load([name])["tasks"][name]


def tiny(bos: bool) -> tuple[Any, Any]:
    tokenizer = tiny_tokenizer(bos=bos)
    tokenizer.chat_template = TEMPLATE
    return tiny_model("Llama"), tokenizer


def requests_of(task: Any, lm: Any, chat: bool, system: str | None, shots: int) -> list[Any]:
    """What the harness asks of the training documents, as `simple_evaluate` builds it."""
    task.set_config(key="num_fewshot", value=shots)
    task.task_docs = task.training_docs()
    task._config.test_split = None  # has_test_docs: documents are then the validation's
    task._config.validation_split = "train"
    task.build_all_requests(
        system_instruction=system,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        chat_template=lm.apply_chat_template if chat else None,
    )
    return task.instances


@pytest.mark.parametrize("bos", [True, False], ids=["bos", "nobos"])
@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("name", KEYS)
def test_training_sees_what_the_harness_asks(name: str, chat: bool, system: Any, bos: bool, tasks: Path) -> None:
    parity(*tiny(bos), loaded(tasks, f"local_{name}"), loaded(tasks, f"local_{name}"), chat, system)


def parity(model: Any, tokenizer: Any, task: Any, twin: Any, chat: bool, system: str | None) -> None:
    """Prompts, continuations and log-probabilities under a vector, in training and in hf-laai."""
    renderer = Renderer(task, tokenizer if chat else None, system)
    docs = list(task.training_docs())
    layout = locate(model)
    vector = laai.Intervention({1: torch.full(layout.shape(1, "heads"), 0.5)})
    lm = HFLaai(pretrained=model, tokenizer=tokenizer, batch_size=5, intervention=vector)
    asked = requests_of(twin, lm, chat, system, 0)
    kinds = ["nll", "kl"] if task.OUTPUT_TYPE == "multiple_choice" and not task.multiple_input else ["nll"]
    for loss in kinds:
        examples = renderer.examples(docs, loss)
        texts = [(example.prompt, text) for example in examples for text in (example.options or [str(example.target)])]
        if task.OUTPUT_TYPE == "generate_until":
            assert [request.args[0] for request in asked] == [example.prompt for example in examples]
        elif loss == "kl":
            assert texts == [request.args for request in asked]
        else:
            assert set(texts) <= {request.args for request in asked} and len(texts) == len(docs)
        batch = encode_examples(tokenizer, examples, renderer.stop, None, renderer.whitespace)
        trained = PlainForward(layout, batch, 1, "heads").continuation_logprobs(
            vector.vector(1).flatten().unsqueeze(0)
        )
        if task.OUTPUT_TYPE == "generate_until":
            scored = [generated_score(lm, prompt, text + renderer.stop, vector) for prompt, text in texts]
        else:
            instances = [lm_eval.api.instance.Instance("loglikelihood", {}, pair, 0) for pair in texts]
            scored = [score for score, _ in lm.loglikelihood(instances, disable_tqdm=True)]
        assert trained.tolist() == pytest.approx(scored, abs=1e-4)


def generated_score(lm: HFLaai, prompt: str, answer: str, vector: laai.Intervention) -> float:
    """The slow reference's log-probability of generating an answer behind a prompt as generation encodes prompts: a
    prompt's last newline stays in the prompt, where loglikelihood moves it to the continuation."""
    whole, tokens = (lm.tok_batch_encode([text])[0][0].tolist() for text in (prompt + answer, prompt))
    assert whole[: len(tokens)] == tokens
    path = PROJECTION_PATHS["Llama"].format(1)
    spec = {"path": path, "vector": vector.vector(1), "site": "heads", "position": "last"}
    return slow_reference.loglikelihood(lm.model, tokens, whole[len(tokens) :], spec, torch.float32)[0]


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("name", KEYS)
def test_few_shot_prompts_are_the_harness_s(name: str, chat: bool, tasks: Path) -> None:
    """What the in-context start is read from: descriptions once, delimiters, turns of a chat."""
    model, tokenizer = tiny(bos=True)
    few_shot(model, tokenizer, loaded(tasks, f"local_{name}"), loaded(tasks, f"local_{name}"), chat)


def few_shot(model: Any, tokenizer: Any, task: Any, twin: Any, chat: bool) -> None:
    lm = HFLaai(pretrained=model, tokenizer=tokenizer, batch_size=5)
    docs = list(task.training_docs())
    renderer = Renderer(task, tokenizer if chat else None, "Be brief.")
    shots = renderer.examples(docs[:3])
    twin.sampler.df = docs[:3]  # first_n
    asked = {}
    for request in requests_of(twin, lm, chat, "Be brief.", 3):
        asked.setdefault(request.doc_id, []).append(request.args[0])
    for number, example in enumerate(renderer.examples(docs)[3:], start=3):
        assert example.behind(shots) in asked[number]


def test_the_answer_is_what_the_harness_shows(tasks: Path) -> None:
    """Behind the delimiter in a text; as the assistant's turn, as the template writes it, in a chat."""
    _, tokenizer = tiny(bos=True)
    docs = DOCS["train"][:2]
    plain = Renderer(loaded(tasks, "local_write"))
    assert [example.target for example in plain.examples(docs)] == [" => cold", " => a wall"]
    assert (plain.stop, plain.whitespace) == (" ##", "generation")
    chat = Renderer(loaded(tasks, "local_write"), tokenizer)
    first, second = chat.examples(docs)
    assert (first.prompt, first.target) == ("<bos>[user]Q there train?<eos>\n[assistant]", "cold")
    assert second.behind([first]).startswith("<bos>[user]Q there train?<eos>\n[assistant]cold<eos>\n[user]Q in")


@pytest.fixture
def smollm2() -> Any:
    try:
        folder = pretrained("smollm2-135m")
    except laai.LaaiError as error:
        pytest.skip(str(error))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.mark.slow
def test_a_real_chat_template(smollm2: Any, tasks: Path) -> None:
    model, tokenizer = smollm2
    for name in ("choice", "write", "likelihood"):
        for system in (None, "Be brief."):
            parity(model, tokenizer, loaded(tasks, f"local_{name}"), loaded(tasks, f"local_{name}"), True, system)
        few_shot(model, tokenizer, loaded(tasks, f"local_{name}"), loaded(tasks, f"local_{name}"), True)


# The command, and what evaluation says of it


@pytest.fixture(scope="module")
def chatty(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("models") / "chatty"
    AutoModelForCausalLM.from_pretrained(small).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(small)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def train(*argv: object) -> int:
    return cli.main(["train", "--layer", "1", "--steps", "2", "--l1", "0", "--group", "0", *map(str, argv)])


def test_train_on_a_harness_task_and_evaluate_its_test_split(tasks: Path, small: Path, tmp_path: Path) -> None:
    for loss in ("nll", "kl"):
        line = ["--model", small, "--harness-task", "local_choice", "--include-path", tasks, "--split", "train"]
        assert train(*line, "--n-train", 5, "--loss", loss, "--output", f"{tmp_path}/{loss}/") == 0
        made = laai.Intervention.load(tmp_path / loss / "local_choice.safetensors")
        training = made.metadata["training"]
        assert (made.metadata["task"], training["loss"], training["n_train"]) == ("local_choice", loss, 5)
        assert training["rendering"] == {"harness_task": "local_choice"} and training["stop"] == ""
    found = lm_eval.simple_evaluate(
        "hf-laai",
        model_args={"pretrained": str(small), "intervention": str(tmp_path / "kl")},
        tasks=["local_choice"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        device="cpu",
    )
    assert len(found["samples"]["local_choice"]) == len(DOCS["test"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--harness-task", "nosuch"], "nosuch is no task of the harness"),
        (["--harness-task", "local_choice", "--split", "test"], "the harness evaluates on its split 'test'"),
        (["--harness-task", "local_choice", "--split", "dev"], "has no split 'dev'; expected one of 'train', 'test'"),
        (["--harness-task", "local_choice", "--n-train", "99"], "n_train is 99"),
        (["--harness-task", "local_blank", "--loss", "kl"], "expected --loss nll"),
        (["--harness-task", "local_choice", "--apply-chat-template"], "has no chat template"),
    ],
)
def test_refusals(flags: Any, said: str, tasks: Path, small: Path, tmp_path: Path, capfd: Any) -> None:
    line = [*flags, "--include-path", tasks, "--model", small, "--output", f"{tmp_path}/out/"]
    assert train(*line) == 2
    err = capfd.readouterr().err
    assert said in err and err.splitlines()[-1].startswith("laai: error: ")
    assert not (tmp_path / "out").exists()


CHAT, BRIEF, LONG = (
    ["--apply-chat-template"],
    ["--system-instruction", "Be brief."],
    ["--system-instruction", "Go on."],
)


@pytest.mark.parametrize(
    ("flags", "chat", "system", "said"),
    [
        ([], False, None, None),
        (CHAT, True, None, None),
        ([*CHAT, *BRIEF], True, "Be brief.", None),
        (BRIEF, False, "Be brief.", None),
        (CHAT, False, None, "trained with a chat template and is evaluated without one"),
        ([], True, None, "trained without a chat template and is evaluated with one"),
        ([*CHAT, *BRIEF], True, None, "trained under the system message 'Be brief.', evaluated under None"),
        ([*CHAT, *LONG], True, "Be brief.", "trained under the system message 'Go on.', evaluated under 'Be brief.'"),
        (BRIEF, False, None, "trained under the instruction 'Be brief.', this prompt is not"),
        (["--prompt-template", "say {input} as"], False, None, "trained with the template 'say {input} as', this"),
        (["--prompt-template", "Please: {input}\nA:"], False, None, "trained with the template 'Please: "),
        ([], False, "Be brief.", "trained with the template 'Q: {input}"),
        (CHAT, {"chat_template_args": {"shout": True}}, None, "trained without arguments of the chat template"),
        (CHAT, {"chat_template_args": {"unheard": True}}, None, None),
    ],
)
def test_hf_laai_says_where_evaluation_differs(
    flags: Any,
    chat: Any,
    system: Any,
    said: Any,
    chatty: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On stderr, as in a process of `lm_eval`, which sets up its own logger and gives the root logger no handler."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input": f"word{n}", "output": f"a{n}"}) + "\n" for n in range(40)))
    own_task.write(read_examples(rows), tmp_path / "tasks")
    vector = tmp_path / "v.safetensors"
    assert train("--model", chatty, "--examples", rows, "--n-train", 4, *flags, "--output", vector) == 0
    monkeypatch.setattr(logging.root, "handlers", [])
    told = warned(chatty, vector, tmp_path, chat, system, capfd)
    assert [] == told if said is None else len(told) == 1 and said in told[0]


def test_hf_laai_knows_the_prompts_of_the_word_tasks(
    small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training on one records no rendering: its prompts are as they are."""
    vector = tmp_path / "v.safetensors"
    assert train("--model", small, "--task", "lexicon_antonym", "--n-train", 4, "--output", vector) == 0
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input": f"word{n}", "output": f"a{n}"}) + "\n" for n in range(40)))
    own_task.write(read_examples(rows), tmp_path / "tasks")
    monkeypatch.setattr(logging.root, "handlers", [])
    assert warned(small, vector, tmp_path, False, None, capfd) == []
    (told,) = warned(small, vector, tmp_path, False, "You are a pirate.\n", capfd)
    assert "trained with the template 'Q: {input}\\nA:', this prompt has another" in told


def warned(model: Path, vector: Path, folder: Path, chat: Any, system: str | None, capfd: Any) -> list[str]:
    """What an evaluation of the task `rows`, in a chat with the given arguments, says of the training prompts."""
    capfd.readouterr()
    found = lm_eval.simple_evaluate(
        "hf-laai",
        model_args={"pretrained": str(model), "intervention": str(vector), **(chat if isinstance(chat, dict) else {})},
        tasks=["rows"],
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        apply_chat_template=bool(chat),
        fewshot_as_multiturn=bool(chat),
        system_instruction=system,
        limit=3,
        bootstrap_iters=0,
        device="cpu",
    )
    assert len(found["samples"]["rows"]) == 3
    return [line for line in capfd.readouterr().err.splitlines() if "the intervention was trained" in line]


def test_hf_laai_refuses_a_chat_without_a_template(small: Path) -> None:
    lm = HFLaai(pretrained=str(small), device="cpu")
    with pytest.raises(laai.LaaiError, match="the model's tokenizer has no chat template: expected a chat model"):
        lm.apply_chat_template([{"role": "user", "content": "hot"}])


@pytest.mark.parametrize("source", ["--examples", "--task"])
def test_a_fit_is_on_prompts_like_the_vectors_own(source: str, chatty: Path, tmp_path: Path) -> None:
    """In their chat and under their instruction: the very examples they were trained on."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input": f"word{n}", "output": f"a{n}"}) + "\n" for n in range(40)))
    data = [source, rows if source == "--examples" else "lexicon_antonym", "--n-train", 4, "--model", chatty]
    vector, fitted = tmp_path / "v.safetensors", tmp_path / "fit.safetensors"
    assert train(*data, *CHAT, *BRIEF, "--output", vector) == 0
    line = ["compose", vector, vector, "--method", "fit", *data, "-o", fitted]
    assert cli.main([*map(str, line)]) == 0
    trained, training = (laai.Intervention.load(path).metadata["training"] for path in (vector, fitted))
    assert training["rendering"] == trained["rendering"] and "chat_template_sha256" in trained["rendering"]
    assert training["examples_sha256"] == trained["examples_sha256"]


@pytest.mark.parametrize(
    ("flags", "chat", "said"),
    [
        ([CHAT + BRIEF, CHAT + BRIEF], True, None),
        ([CHAT + BRIEF, CHAT + BRIEF], False, "trained with a chat template and is evaluated without one"),
        ([[], []], True, "trained without a chat template and is evaluated with one"),
        ([CHAT + BRIEF, CHAT + LONG], True, None),
        ([[], CHAT + BRIEF], True, None),
        ([[], CHAT + BRIEF], False, None),
        ([["--prompt-template", "Please: {input}\nA:"]] * 2, False, "trained with the template 'Please: "),
    ],
)
def test_a_composition_has_what_its_parents_have_in_common(
    flags: Any, chat: bool, said: Any, chatty: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of parents that were trained on prompts of different kinds nothing is known, and nothing said."""
    rows, other = tmp_path / "rows.jsonl", tmp_path / "other.jsonl"
    for path in (rows, other):
        path.write_text("".join(json.dumps({"input": f"word{n}", "output": f"a{n}"}) + "\n" for n in range(40)))
    own_task.write(read_examples(rows), tmp_path / "tasks")
    parents = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for path, data, more in zip(parents, (rows, other), flags, strict=True):
        assert train("--model", chatty, "--examples", data, "--n-train", 4, *more, "--output", path) == 0
    both, again = tmp_path / "both.safetensors", tmp_path / "again.safetensors"
    assert cli.main(["compose", *map(str, parents), "-o", str(both)]) == 0
    assert cli.main(["compose", str(both), str(parents[0]), "-o", str(again)]) == 0
    monkeypatch.setattr(logging.root, "handlers", [])
    for vector in (both, again):
        told = warned(chatty, vector, tmp_path, chat, "Be brief." if chat else None, capfd)
        assert [] == told if said is None else len(told) == 1 and said in told[0]
