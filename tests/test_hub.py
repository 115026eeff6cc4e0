"""Sharing on the Hub: loading, offline use, pushing and every refusal, against tests/fake_hub.py over real HTTP."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml
from fake_hub import TOKEN, FakeHub, Repository, reachable_hub, set_offline
from tiny import tiny_model, tiny_tokenizer

import laai_core as laai
from lm_eval_laai.commands import cli
from lm_eval_laai.experiments.load import ModelSource
from lm_eval_laai.experiments.setting import Setting
from lm_eval_laai.hub import push_to_hub
from lm_eval_laai.hub.card import model_card
from lm_eval_laai.model import HFLaai

ROOT = Path(__file__).resolve().parent.parent


def example(seed: int = 0, **metadata) -> laai.Intervention:
    vector = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
    return laai.Intervention({1: vector}, metadata={"base_model": "org/base", "task": "laai_toy", **metadata})


@pytest.fixture()
def hub(monkeypatch, tmp_path):
    """A Hub that the client of this process talks to, with an empty cache and no login."""
    with reachable_hub(monkeypatch, tmp_path) as server:
        yield server


@pytest.fixture()
def shared(hub) -> FakeHub:
    """org/one holds one intervention, an older one under its first commit's id, and another on the branch `dev`."""
    hub.repositories["org/one"] = repository = Repository()
    hub.old = repository.commit({"a.safetensors": example(1).to_bytes(), "README.md": b"hello"})
    repository.commit({"a.safetensors": example(2).to_bytes()})
    repository.commit({"deep/b.safetensors": example(3).to_bytes()}, "dev/x")
    hub.repositories["org/two"] = two = Repository()
    two.commit({"a.safetensors": example(4).to_bytes(), "b.safetensors": example(5).to_bytes()})
    hub.repositories["org/none"] = Repository()
    hub.repositories["org/gated"] = gated = Repository(gated=True)
    gated.commit({"a.safetensors": example(6).to_bytes()})
    hub.repositories["org/private"] = private = Repository(private=True)
    private.commit({"a.safetensors": example(7).to_bytes()})
    return hub


def test_every_form_of_the_name(shared):
    for spec, seed in [
        ("org/one", 2),
        ("org/one:a.safetensors", 2),
        (f"org/one@{shared.old}", 1),
        (f"org/one:a.safetensors@{shared.old}", 1),
        ("org/one@dev/x", 3),
        ("org/one:deep/b.safetensors@dev/x", 3),
        ("org/two:b.safetensors", 5),
    ]:
        assert laai.Intervention.load(spec).sha256 == example(seed).sha256, spec


def test_a_models_commits_are_other_models(hub):
    """Cells of one revision must not be taken for those of another."""
    hub.repositories["org/model"] = repository = Repository()
    config = {"model_type": "llama", "num_hidden_layers": 2}
    old = repository.commit({"config.json": json.dumps(config).encode()})
    new = repository.commit({"config.json": json.dumps({**config, "hidden_size": 64}).encode()})
    identities = [Setting(ModelSource("org/model", revision=revision)).model for revision in (old, None, "main")]
    assert identities == [{"hub": "org/model", "commit": commit} for commit in (old, new, new)]


def test_the_cache_answers_offline_and_when_the_hub_is_down(shared, monkeypatch):
    laai.Intervention.load("org/one")
    laai.Intervention.load("org/one@dev/x")
    asked = len(shared.log)
    set_offline(monkeypatch, True)
    assert laai.Intervention.load("org/one").sha256 == example(2).sha256
    assert laai.Intervention.load("org/one@dev/x").sha256 == example(3).sha256
    set_offline(monkeypatch, False)
    assert laai.Intervention.load("org/one:a.safetensors", local_files_only=True).sha256 == example(2).sha256
    assert len(shared.log) == asked
    shared.broken = True
    assert laai.Intervention.load("org/one").sha256 == example(2).sha256


def test_a_file_is_downloaded_once_and_again_when_it_changed(shared):
    for _ in range(2):
        laai.Intervention.load("org/one")
    assert sum(line.startswith("GET /objects") for line in shared.log) == 1
    shared.repositories["org/one"].commit({"a.safetensors": example(9).to_bytes()})
    assert laai.Intervention.load("org/one").sha256 == example(9).sha256


def refusal(spec: str, **arguments) -> str:
    with pytest.raises(laai.LaaiError) as caught:
        laai.Intervention.load(spec, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_refusals(shared, monkeypatch):
    assert "org/missing is neither a local file nor a repository on http://127.0.0.1" in refusal("org/missing")
    assert "hf auth login" in refusal("org/private")
    assert refusal("org/one@v9") == "org/one has no revision 'v9'"
    assert refusal("org/one:a.safetensors@v9") == "org/one has no revision 'v9'"
    expected = "org/one has no file 'c.safetensors'; its .safetensors files: a.safetensors"
    assert refusal("org/one:c.safetensors") == expected
    several = "org/two holds a.safetensors, b.safetensors: name one, as in org/two:a.safetensors"
    assert refusal("org/two") == several
    assert refusal("org/none") == "org/none holds no .safetensors file"
    for spec in ("org/gated", "org/gated:a.safetensors"):
        assert refusal(spec) == "org/gated is gated: ask for access on its page, then `hf auth login`"
    assert "org/a--b is no repository name" in refusal("org/a--b")
    shared.repositories["org/one"].commit({"a.safetensors": b"not an intervention"})
    assert "is not a safetensors file" in refusal("org/one")
    for arguments, offline in (({"local_files_only": True}, False), ({}, True)):
        set_offline(monkeypatch, offline)
        for spec in ("org/two", "org/two:a.safetensors"):
            assert refusal(spec, **arguments).endswith(
                "is not in the cache, and the Hub is switched off (offline mode)"
            )


def test_no_network(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert refusal("org/one").startswith("cannot reach the Hub at http://127.0.0.1:9 (")
    hub.broken = True
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
    assert refusal("org/one").startswith(f"cannot reach the Hub at {hub.endpoint} (")


def test_a_login_opens_private_and_gated_repositories(shared, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert laai.Intervention.load("org/private").sha256 == example(7).sha256
    assert laai.Intervention.load("org/gated").sha256 == example(6).sha256


def test_what_exists_here_wins_and_misspelt_paths_stay_here(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example(8).save("org/one")
    assert laai.Intervention.load("org/one").sha256 == example(8).sha256
    assert "no intervention file at org/x.safetensors" in refusal("org/x.safetensors")
    assert "no intervention file at org/two" in refusal("./org/two")
    with pytest.raises(laai.LaaiError, match="no intervention file"):
        laai.Intervention.load(Path("org/two"))
    assert not shared.log


SCORES = {
    "laai_toy": {
        "alias": "toy",
        "sample_len": 8,
        "exact_match,none": 0.875,
        "exact_match_stderr,none": "N/A",
        "nll": 1.5,
    }
}


def test_push_writes_the_file_and_a_card(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    training = {"steps": 200, "stop": "\n", "versions": {"torch": "2"}}
    iv = example(training=training, method="laai")
    url = push_to_hub(iv, "org/new", scores=SCORES, license="apache-2.0")
    files = hub.repositories["org/new"].commits[hub.repositories["org/new"].branches["main"]]
    assert sorted(files) == ["README.md", "laai_toy.safetensors"]
    assert url == f"{hub.endpoint}/org/new/commit/{hub.repositories['org/new'].branches['main']}"
    assert files["laai_toy.safetensors"] == iv.to_bytes()
    _, header, text = files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(header) == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "lm-eval-laai",
        "license": "apache-2.0",
        "model-index": [
            {
                "name": "new",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": "laai_toy", "type": "laai_toy"},
                        "metrics": [
                            {"name": "exact_match", "type": "exact_match", "value": 0.875},
                            {"name": "nll", "type": "nll", "value": 1.5},
                        ],
                    }
                ],
            }
        ],
        "pipeline_tag": "text-generation",
        "tags": ["laai", "activation-steering"],
    }
    for line in (
        "| base model | [org/base](https://huggingface.co/org/base) |",
        "| task | laai_toy |",
        "| layers (from 0) | 1 |",
        "| site | `heads`: attention-head outputs (the input of the attention output projection) |",
        "| vector | 4 x 8 |",
        f"| SHA-256 of the file | `{iv.sha256}` |",
        "| steps | 200 |",
        "| stop | '\\n' |",
        "| versions.torch | 2 |",
        "| laai_toy | exact_match | 0.875 |",
        "| laai_toy | nll | 1.5 |",
        "lm_eval --model hf-laai --model_args pretrained=org/base,intervention=org/new:laai_toy.safetensors "
        '--tasks laai_toy --include_path "$(laai tasks --include-path)"',
    ):
        assert line in text.splitlines(), line
    assert "N/A" not in text and "sample_len" not in text
    monkeypatch.delenv("HF_TOKEN")
    assert laai.Intervention.load("org/new").sha256 == iv.sha256


def test_the_command_pushes_with_the_scores_of_a_results_file(hub, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    example().save(tmp_path / "a.safetensors")
    results = {"results": {"laai_toy": {"alias": "laai_toy", "exact_match,none": 0.875, "sample_len": 8}}}
    (tmp_path / "results_2026.json").write_text(json.dumps(results))
    arguments = ["push", str(tmp_path / "a.safetensors"), "org/new", "--results", str(tmp_path), "--private"]
    assert cli.main(arguments) == 0
    repository = hub.repositories["org/new"]
    told = capsys.readouterr()
    assert told.out.strip() == f"{hub.endpoint}/org/new/commit/{repository.branches['main']}"
    assert f"names no intervention of SHA-256 {example().sha256}" in told.err
    files = repository.commits[repository.branches["main"]]
    assert repository.private and files["laai_toy.safetensors"] == example().to_bytes()
    assert "| laai_toy | exact_match | 0.875 |" in files["README.md"].decode().splitlines()
    results["config"] = {"interventions": [{"source": "a.safetensors", "sha256": example().sha256}]}
    (tmp_path / "results_2026.json").write_text(json.dumps(results))
    assert cli.main(arguments) == 0
    assert "names no intervention" not in capsys.readouterr().err


def test_push_again_replaces_and_to_a_branch_or_privately(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push_to_hub(example(1), "org/new", private=True)
    push_to_hub(example(2), "org/new")
    assert hub.repositories["org/new"].private
    assert laai.Intervention.load("org/new").sha256 == example(2).sha256
    hub.repositories["org/new"].branches["dev"] = hub.repositories["org/new"].branches["main"]
    push_to_hub(example(3), "org/new", file="x.safetensors", revision="dev")
    assert laai.Intervention.load("org/new:x.safetensors@dev").sha256 == example(3).sha256
    assert laai.Intervention.load("org/new").sha256 == example(2).sha256


def test_a_card_tells_nothing_of_the_machine(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push_to_hub(example(base_model=str(tmp_path / "somebody" / "model-7b")), "org/new")
    repository = hub.repositories["org/new"]
    card = repository.commits[repository.branches["main"]]["README.md"].decode()
    assert str(tmp_path) not in card and "| base model | model-7b |" in card and "base_model:" not in card


@pytest.mark.parametrize(
    ("task", "metadata"),
    [
        ("laai_antonym", None),
        ("laai_pairs:my words.json", {"file": "my words.json"}),
        ("laai_pairs:/home/me/words.json", {"file": "words.json"}),
        ("laai_pairs", None),
        ("laai_opinionqa_group:POLIDEOLOGY=Very liberal", {"attribute": "POLIDEOLOGY", "group": "Very liberal"}),
    ],
)
def test_the_cards_command_has_the_tasks_data_and_the_dtype(task, metadata):
    card = model_card(example(task=task, training={"dtype": "float32"}), "org/new", "a.safetensors")
    words = shlex.split(next(line for line in card.splitlines() if line.startswith("lm_eval ")))
    assert words[words.index("--tasks") + 1] == task.partition(":")[0]
    assert ",dtype=float32,intervention=org/new:a.safetensors" in words[words.index("--model_args") + 1]
    assert metadata == (json.loads(words[words.index("--metadata") + 1]) if "--metadata" in words else None)


def test_the_card_of_a_known_model_names_it_as_the_hub_does():
    card = model_card(example(base_model="smollm2-135m"), "org/new", "a.safetensors")
    header = yaml.safe_load(card.split("---\n")[1])
    on_hub = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (header["base_model"], header["base_model_relation"]) == (on_hub, "adapter")
    assert "| trained on | its copy that `laai models fetch smollm2-135m` gets |" in card.splitlines()
    assert "pretrained=smollm2-135m,intervention=org/new:a.safetensors" in card  # the weights it was trained on
    assert "trained on" not in model_card(example(), "org/new", "a.safetensors")


def test_a_file_of_word_pairs_is_named_by_its_task_alone(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push_to_hub(example(task="laai_pairs:words.json"), "org/new")
    repository = hub.repositories["org/new"]
    files = repository.commits[repository.branches["main"]]
    assert set(files) >= {"laai_pairs.safetensors", "README.md"}
    assert "--tasks laai_pairs --include_path" in files["README.md"].decode()


def test_push_refusals(hub, monkeypatch):
    hub.repositories["org/there"] = Repository()

    def refused(repo: str, **arguments) -> str:
        with pytest.raises(laai.LaaiError) as caught:
            push_to_hub(example(), repo, **arguments)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert refused("org/new") == "the Hub does not let you write to org/new: log in with a write token"
    assert refused("org/there") == "the Hub does not let you write to org/there: log in with a write token"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert refused("forbidden/x") == "the Hub does not let you write to forbidden/x: log in with a write token"
    for name in ("a/b/c", "alone"):
        assert "is no repository name" in refused(name)
    assert "alone" not in hub.repositories
    assert refused("org/new", revision="nowhere") == "org/new has no revision 'nowhere'"
    assert "expected a name that ends in .safetensors" in refused("org/new", file="x.bin")
    set_offline(monkeypatch, True)
    assert "offline" in refused("org/new")
    set_offline(monkeypatch, False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert refused("org/new").startswith("cannot reach the Hub at http://127.0.0.1:9 (")


def test_hf_laai_and_inspect_take_the_same_name(shared, capsys):
    lm = HFLaai(tiny_model("Llama"), "org/one:a.safetensors", tokenizer=tiny_tokenizer(bos=True))
    (reported,) = lm.get_model_info()["interventions"]
    assert (reported["source"], reported["sha256"]) == ("org/one:a.safetensors", example(2).sha256)
    assert cli.main(["inspect", "org/one", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sha256"] == example(2).sha256


@pytest.mark.slow
def test_a_process_with_nothing_but_environment_variables(tmp_path):
    """HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE, as people set them: push, load, load offline, no network."""
    script = (
        "import sys, torch, laai_core as laai\n"
        "from lm_eval_laai.hub import push_to_hub\n"
        "iv = laai.Intervention({1: torch.ones(4, 8)}, metadata={'task': 'laai_toy'})\n"
        "if sys.argv[1] == 'push': push_to_hub(iv, 'org/new')\n"
        "try: print(laai.Intervention.load(sys.argv[2]).sha256 == iv.sha256)\n"
        "except laai.LaaiError as error: print(error)\n"
    )

    def run(*arguments: str, **environment: str) -> str:
        variables = {"HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        variables |= {"PYTHONPATH": str(ROOT), **environment}
        return subprocess.run(
            [sys.executable, "-c", script, *arguments],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    with FakeHub() as server:
        assert run("push", "org/new", HF_ENDPOINT=server.endpoint, HF_TOKEN=TOKEN) == "True"
        assert run("load", "org/new:laai_toy.safetensors@main", HF_ENDPOINT=server.endpoint) == "True"
    assert run("load", "org/new", HF_ENDPOINT=server.endpoint) == "True"  # the server is gone, the cache is not
    assert run("load", "org/new", HF_HUB_OFFLINE="1") == "True"
    assert "switched off" in run("load", "org/other:x.safetensors", HF_HUB_OFFLINE="1")
    assert "cannot reach" in run("load", "org/other:x.safetensors", HF_ENDPOINT=server.endpoint)


@pytest.mark.parametrize("task", ["antonym", "synonym"])
def test_the_example_vectors_have_their_cards(task):
    folder = ROOT / "examples" / "vectors" / f"smollm2-135m-{task}"
    name = f"laai_{task}.safetensors"
    iv = laai.Intervention.load(folder / name)
    card = (folder / "README.md").read_text(encoding="utf-8")
    score = float(card.partition(f"| laai_{task} | exact_match | ")[2].partition(" |")[0])
    scores = {f"laai_{task}": {"exact_match,none": score}}
    assert card == model_card(iv, f"ORG/{folder.name}", name, scores, "apache-2.0")
