"""`laai check`: what passes and fails against a baseline, and that the shipped one catches planted regressions."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from conftest import ROOT
from lm_eval._cli import HarnessCLI
from test_apply import intervention
from tiny import tiny_model, tiny_tokenizer

from lm_eval_laai.commands import cli
from lm_eval_laai.gate.baseline import Baseline, load_baseline
from lm_eval_laai.gate.check import FAILED, NOTE, OK, Finding, compare
from lm_eval_laai.gate.results_file import read_results
from lm_eval_laai.register import register
from lm_eval_laai.tasks import include_path, list_tasks

TASK, METRIC = "laai_lexicon_antonym", "exact_match,none"


@pytest.fixture(scope="module")
def model_and_vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, and a file for each of a group's four tasks."""
    folder = tmp_path_factory.mktemp("run")
    tiny_model("Llama").save_pretrained(folder / "model")
    tiny_tokenizer(bos=True).save_pretrained(folder / "model")
    for seed, task in enumerate(t.name for t in list_tasks() if t.group == "laai_lexicon"):
        intervention("Llama", seed=seed).save(folder / "vectors" / f"{task}.safetensors")
    register()
    return folder


@pytest.fixture(scope="module")
def regressions() -> Iterator[Any]:
    """The script that plants regressions; the scripts of that folder import one another by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
        yield importlib.import_module("regressions")


@pytest.fixture(scope="module")
def harness_run(model_and_vectors: Path, regressions: Any) -> Path:
    """The same folder, with results."""
    folder = model_and_vectors
    model_args = f"pretrained={folder}/model,intervention={folder}/vectors,scale=0.5"
    arguments = {"model": "hf-laai", "model_args": model_args, "tasks": ["laai_lexicon"], "device": "cpu"}
    regressions.write_results(folder / "results", **arguments, limit=4, batch_size=4)
    return folder


def written(folder: Path) -> Path:
    (path,) = folder.rglob("results_*.json")
    return path


@pytest.fixture
def document(harness_run: Path) -> dict[str, Any]:
    """The results file's content, with a score for the antonyms that leaves room on both sides."""
    content = json.loads(written(harness_run / "results").read_text())
    content["results"][TASK] |= {METRIC: 0.8, "exact_match_stderr,none": 0.02}
    return content


@pytest.fixture
def put(tmp_path: Path) -> Callable[[Any], Path]:
    def write(content: Any) -> Path:
        path = tmp_path / "results.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.fixture
def baseline(document: dict[str, Any], put: Callable[[Any], Path], tmp_path: Path) -> Path:
    """Of that file, as --update writes it."""
    path = tmp_path / "baseline.yaml"
    assert cli.main(["check", str(put(document)), "--against", str(path), "--update"]) == 0
    return path


def test_a_new_baseline_is_met_by_the_run_it_is_of(
    document: dict[str, Any], put: Callable[[Any], Path], tmp_path: Path
) -> None:
    document["results"][TASK] |= {METRIC: 0.12039043, "exact_match_stderr,none": 1e-7}
    line = ["check", str(put(document)), "--against", str(tmp_path / "new.yaml")]
    assert cli.main([*line, "--update"]) == cli.main(line) == 0


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content))
    return path


def bad(findings: list[Finding], state: str = FAILED) -> list[tuple[str, str]]:
    return [(finding.task, finding.item) for finding in findings if finding.state == state]


# What the harness writes


def assert_names_every_intervention(output: Path, vectors: Path) -> None:
    applied = read_results(output).interventions
    digests = {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in vectors.iterdir()}
    assert len(digests) == 4 and {name: one["sha256"] for name, one in applied.items()} == digests
    for one in applied.values():
        assert (one["layers"], one["site"], one["position"], one["scale"]) == ([1], "heads", "last", 0.5)


def test_a_results_file_names_every_intervention(harness_run: Path) -> None:
    assert_names_every_intervention(harness_run / "results", harness_run / "vectors")


@pytest.mark.slow
def test_a_results_file_of_the_command_line_names_every_intervention(model_and_vectors: Path, tmp_path: Path) -> None:
    """The gate of .ci/run checks this in every run, with the reference model; here also where it is not run."""
    folder = model_and_vectors
    line = f"run --model hf-laai --model_args pretrained={folder}/model,intervention={folder}/vectors,scale=0.5"
    line += f" --tasks laai_lexicon --include_path {include_path()} --limit 4 --batch_size 4 --device cpu"
    harness = HarnessCLI()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lm_eval", *line.split(), "--output_path", str(tmp_path / "results")])
        harness.execute(harness.parse_args())
    assert_names_every_intervention(tmp_path / "results", folder / "vectors")


def test_reading_a_results_file(harness_run: Path) -> None:
    results = read_results(harness_run / "results")
    content = json.loads(written(harness_run / "results").read_text())
    assert set(results.tasks) == set(content["results"]) and "laai_lexicon" in results.tasks
    for name, task in results.tasks.items():
        (metric,) = task.metrics.values()
        assert metric.value == content["results"][name][METRIC]
        assert metric.stderr == content["results"][name]["exact_match_stderr,none"]
        assert metric.higher_is_better is True
        assert (task.setting["version"], task.setting["shots"]) == ("1.0", 0)
        assert task.setting["samples"] == (16 if name == "laai_lexicon" else 4)
        assert task.setting.get("data") == content["task_hashes"].get(name)
    assert len(results.tasks[TASK].setting["data"]) == 64


def test_the_newest_file_of_a_folder_is_read(harness_run: Path, document: dict[str, Any], tmp_path: Path) -> None:
    for folder, date, score in (("b", "2026-01-02T03-04-05.1", 0.2), ("a", "2026-01-02T03-04-06.1", 0.3)):
        document["results"][TASK][METRIC] = score
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"results_{date}.json").write_text(json.dumps(document))
        (tmp_path / folder / "samples_x_2027.jsonl").touch()
    assert read_results(tmp_path).tasks[TASK].metrics[METRIC].value == 0.3


# Comparing


def test_the_same_results_pass(baseline: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(tmp_path / "results.json"), "--against", str(baseline)]) == 0
    out, err = capfd.readouterr()
    assert "checks passed" in out and "FAILED" not in out
    assert any(line.split()[:3] == [TASK, METRIC, "0.8"] for line in out.splitlines())


@pytest.mark.parametrize(
    ("tolerance", "better", "passing", "failing"),
    [
        ({"absolute": 0.05}, True, [0.75, 0.8, 0.84, 1.0], [0.7499, 0.0]),
        ({"absolute": 0.05}, False, [0.85, 0.8, 0.0], [0.8501, 3.0, math.inf]),
        ({"absolute": 0.05}, None, [0.75, 0.85], [0.7499, 0.8501]),
        ({"relative": 0.1}, True, [0.72, 0.9], [0.7199]),
        ({"standard_errors": 2}, True, [0.76, 0.9], [0.7599]),
        ({"absolute": 0}, True, [0.8, 0.81], [0.7999]),
        ({"absolute": 0.05}, True, [], [math.nan]),
        ({"absolute": 0.05}, False, [], [math.nan]),
        ({"absolute": 0.05}, None, [], [math.nan]),
    ],
)
def test_tolerances_and_directions(
    tolerance: dict[str, float],
    better: bool | None,
    passing: list[float],
    failing: list[float],
    document: dict[str, Any],
    put: Callable[[Any], Path],
    baseline: Path,
) -> None:
    expected = load_baseline(
        edited(baseline, lambda c: c["tasks"][TASK]["metrics"][METRIC].update(tolerance=tolerance))
    )
    document["higher_is_better"][TASK] = {} if better is None else {"exact_match": better}
    for score in passing + failing:
        document["results"][TASK][METRIC] = score
        findings = compare(read_results(put(document)), expected)
        assert bad(findings) == ([(TASK, METRIC)] if score in failing else []), score


def test_a_failure_by_little_shows_the_digits_that_differ(
    document: dict[str, Any], put: Callable[[Any], Path], baseline: Path
) -> None:
    document["results"][TASK][METRIC] = 0.759996  # a tolerance of two standard errors is 0.04
    (one,) = (one for one in compare(read_results(put(document)), load_baseline(baseline)) if one.state == FAILED)
    assert (one.expected, one.found) == ("0.8 (at least 0.76)", "0.759996")
    assert one.reason == "0.759996 is worse than 0.8 by 0.040004, allowed is 0.04 (2 standard errors)"


def test_much_better_is_told_and_passes(document: dict[str, Any], put: Callable[[Any], Path], baseline: Path) -> None:
    document["results"][TASK][METRIC] = 0.9  # a tolerance of two standard errors is 0.04
    findings = compare(read_results(put(document)), load_baseline(baseline))
    assert bad(findings) == [] and bad(findings, NOTE) == [(TASK, METRIC)]


def lose_task(content: dict[str, Any]) -> None:
    del content["results"][TASK]


def lose_metric(content: dict[str, Any]) -> None:
    content["results"][TASK]["other,none"] = content["results"][TASK].pop(METRIC)


def spoil_metric(content: dict[str, Any]) -> None:
    content["results"][TASK][METRIC] = "N/A"


def other_version(content: dict[str, Any]) -> None:
    content["versions"][TASK] = 2.0


def other_data(content: dict[str, Any]) -> None:
    content["task_hashes"][TASK] = "0" * 64


def no_data_hash(content: dict[str, Any]) -> None:
    content["task_hashes"] = {}


def fewer_items(content: dict[str, Any]) -> None:
    content["results"][TASK]["sample_len"] = 3


def more_shots(content: dict[str, Any]) -> None:
    content["n-shot"][TASK] = 10


def no_intervention(content: dict[str, Any]) -> None:
    content["config"]["interventions"].pop(0)


def moved(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["config"]["interventions"][0][key] = value

    return change


def other_delta(content: dict[str, Any]) -> None:
    content["config"]["interventions"][0]["sha256"] = "0" * 64


def new_task(content: dict[str, Any]) -> None:
    content["results"]["new"] = {"alias": "new", "acc,none": 0.5}


@pytest.mark.parametrize(
    ("change", "failed", "told"),
    [
        (lose_task, ["task"], []),
        (lose_metric, [METRIC], []),
        (spoil_metric, [METRIC], []),
        (other_version, ["version"], []),
        (other_data, ["data"], []),
        (no_data_hash, ["data"] * 4, []),
        (fewer_items, ["samples"], []),
        (more_shots, ["shots"], []),
        (no_intervention, ["intervention"], []),
        (moved("layers", [2]), ["layers"], []),
        (moved("position", "generated"), ["position"], []),
        (moved("scale", 1.0), ["scale"], []),
        (other_delta, [], ["sha256"]),
        (new_task, [], ["task"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_else_must_be_the_same(
    change: Callable[[dict[str, Any]], None],
    failed: list[str],
    told: list[str],
    document: dict[str, Any],
    put: Callable[[Any], Path],
    baseline: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    change(document)
    code = cli.main(["check", str(put(document)), "--against", str(baseline), "--json"])
    facts = json.loads(capfd.readouterr().out)
    assert (code, facts["passed"]) == ((1, False) if failed else (0, True))
    assert [f["item"] for f in facts["findings"] if f["state"] == FAILED] == failed
    assert [f["item"] for f in facts["findings"] if f["state"] == NOTE] == told


# What is printed


def test_outputs_of_a_failure(
    document: dict[str, Any],
    put: Callable[[Any], Path],
    baseline: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    document["results"][TASK][METRIC] = 0.5
    document["versions"]["laai_lexicon"] = "2\n::error::%"
    other_delta(document)
    line = [
        "check",
        str(put(document)),
        "--against",
        str(baseline),
        "--github",
        "--junit",
        str(tmp_path / "new" / "j.xml"),
    ]
    capfd.readouterr()
    assert cli.main(line) == 1
    out, err = capfd.readouterr()
    assert err == ""
    table, annotations = out.split("\n\n")[0].splitlines(), [row for row in out.splitlines() if row.startswith("::")]
    assert [row.split()[:2] for row in table if row.endswith(FAILED)] == [[TASK, METRIC], ["laai_lexicon", "version"]]
    reason = "0.5 is worse than 0.8 by 0.3, allowed is 0.04 (2 standard errors)"
    assert f"FAILED: {TASK} {METRIC}: {reason}" in out
    assert f"::error title=laai check::{TASK} {METRIC}: {reason}" in annotations
    assert [row.split(" ")[0] for row in annotations] == ["::error", "::error"]

    root = ElementTree.parse(tmp_path / "new" / "j.xml").getroot()
    cases = root.findall("testsuite/testcase")
    assert {(c.get("classname"), c.get("name")) for c in cases if c.find("failure") is not None} == {
        (TASK, METRIC),
        ("laai_lexicon", "version"),
    }
    failure = next(c for c in cases if c.get("name") == METRIC and c.get("classname") == TASK).find("failure")
    assert failure is not None and failure.get("message") == reason
    assert root.get("failures") == "2" and root.get("tests") == str(len(cases))


def test_names_that_xml_and_github_cannot_hold(
    document: dict[str, Any], put: Callable[[Any], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = "a\x00\n::error::\x1b<&%"
    document["results"] = {name: {METRIC: 0.8}}
    path = tmp_path / "hostile.yaml"
    assert cli.main(["check", str(put(document)), "--against", str(path), "--update"]) == 0
    document["results"][name][METRIC] = 0.1
    put(document)
    capfd.readouterr()
    line = [
        "check",
        str(tmp_path / "results.json"),
        "--against",
        str(path),
        "--github",
        "--junit",
        f"{tmp_path}/j.xml",
    ]
    assert cli.main(line) == 1
    assert sum(row.startswith("::") for row in capfd.readouterr().out.splitlines()) == 1
    (case,) = (c for c in ElementTree.parse(tmp_path / "j.xml").iter("testcase") if c.get("name") == METRIC)
    assert case.get("classname", "").endswith("<&%")


@pytest.mark.parametrize("name", ["::error::x", "  ::add-mask::y", "##[add-mask]y", "a ##[error]x"])
@pytest.mark.parametrize("flags", [[], ["--github"]])
def test_a_name_that_is_a_command_of_the_runner(
    name: str,
    flags: list[str],
    document: dict[str, Any],
    put: Callable[[Any], Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The runner strips a line before it looks for `::`, and finds `##[` anywhere in it."""
    document["results"] = {name: {METRIC: 0.8}}
    path = tmp_path / "hostile.yaml"
    assert cli.main(["check", str(put(document)), "--against", str(path), "--update"]) == 0
    document["results"] = {"new": {METRIC: 0.1}, name: {METRIC: 0.1}}
    for more in (flags, ["--update"]):
        assert cli.main(["check", str(put(document)), "--against", str(path), *more]) == ("--update" not in more)
    out = capfd.readouterr().out
    commands = [row for row in out.splitlines() if row.strip().startswith("::") or "##[" in row]
    if flags:
        commands.remove(next(row for row in commands if row.startswith("::error title=laai check::")))
    assert commands == [] and re.split(r"[:\[]", name)[-1] in out


@pytest.mark.parametrize("flag", [["--alpha", "0.1"], ["--metric", METRIC], ["--junit", "x.xml"], ["--github"]])
def test_an_update_checks_nothing(
    flag: list[str], document: dict[str, Any], put: Callable[[Any], Path], tmp_path: Path, capfd: Any
) -> None:
    path = tmp_path / "new.yaml"
    assert cli.main(["check", str(put(document)), "--against", str(path), "--update", *flag]) == 2
    assert f"--update checks nothing: expected no {flag[0]} with it" in capfd.readouterr().err
    assert not path.exists()


# Baselines


def test_update_keeps_tolerances_and_absent_tasks(
    document: dict[str, Any], put: Callable[[Any], Path], baseline: Path
) -> None:
    edited(baseline, lambda c: c["tasks"][TASK]["metrics"][METRIC].update(tolerance={"relative": 0.3}))
    before = load_baseline(baseline)
    lose = "laai_lexicon_en_fr"
    del document["results"][lose]
    applied = document["config"]["interventions"]
    document["config"]["interventions"] = [one for one in applied if lose not in one["source"]]
    del document["task_hashes"][TASK]  # as a run without --log_samples
    document["results"][TASK][METRIC] = 0.7
    document["results"]["new"] = {"acc,none": 0.5, "acc_stderr,none": 0.1, "nll,none": 3.0, "nll_stderr,none": "N/A"}
    assert cli.main(["check", str(put(document)), "--against", str(baseline), "--update"]) == 0
    after = load_baseline(baseline)
    assert after.tasks[lose] == before.tasks[lose]
    assert after.interventions == before.interventions and lose in after.interventions
    assert after.tasks[TASK].setting == before.tasks[TASK].setting and "data" in after.tasks[TASK].setting
    mine = after.tasks[TASK].metrics[METRIC]
    assert (mine.value, mine.tolerance) == (0.7, ("relative", 0.3))
    new = after.tasks["new"].metrics
    assert new["acc,none"].tolerance == ("standard_errors", 2.0) and new["nll,none"].tolerance == ("relative", 0.02)
    assert {path.name for path in baseline.parent.iterdir()} == {"baseline.yaml", "results.json"}
    del document["results"]["new"]
    unmet = [(TASK, "data"), (lose, "task"), ("new", "task"), (lose, "intervention")]
    assert bad(compare(read_results(put(document)), after)) == unmet


def test_a_written_baseline_is_read_back(document: dict[str, Any], put: Callable[[Any], Path], baseline: Path) -> None:
    results = read_results(put(document))
    assert load_baseline(baseline) == Baseline.of(results)
    assert {finding.state for finding in compare(results, load_baseline(baseline))} == {OK}


def metric_entry(**changes: Any) -> str:
    entry = {"value": 0.5, "stderr": 0.1, "tolerance": {"absolute": 0.1}, **changes}
    return yaml.safe_dump({"tasks": {"t": {"metrics": {"acc,none": {k: v for k, v in entry.items() if v != "-"}}}}})


# 3**12 values in some 250 bytes.
BOMB = (
    "interventions: {x: {layers: &a0 [1, 1, 1]"
    + "".join(f", a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]" for n in range(1, 12))
    + "}}\ntasks: {t: {}}\n"
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "found NoneType"),
        ("tasks: {}", "always passes"),
        ("tasks: {a: {}\n", "not valid YAML"),
        ("tasks: {a: {}}\nwhatever: 1", "unknown entry 'whatever'"),
        ("tasks: {a: {}, b: {}, a: {}}", "a key is given twice"),
        ("tasks: {a: {metrics: [1]}}", "a: metrics: expected names"),
        ("tasks: {a: {version: [1]}}", "version is a list"),
        ("tasks: {1: {}}", "expected names"),
        ("tasks: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("[" * 1200, "nests over 16 levels"),
        ("tasks: {a: &a {x: *a}}", "an alias without its anchor"),
        (BOMB, "holds over 40000 values"),
        ("tasks: {a: {metrics: {" + "b, " * 50_000 + "}}}", "holds over 40000 values"),
        ("#" * (600 << 10), "has over 524288 bytes"),
        (metric_entry(value=10**400), "a number of 401 digits"),
        ("tasks: {a: {samples: 0x" + "F" * 20_000 + "}}", "a number of 20002 digits"),
        ("tasks: {a: {version: !!bool maybe}}", "not valid YAML"),
        ("tasks: {a: {version: !!timestamp x}}", "not valid YAML"),
        ("tasks: {" + "a" * 301 + ": {}}", "a name has 301 characters"),
        ("tasks: {a: {}}\ninterventions: {a: {layers: [[1]]}}", "'layers' holds a list"),
        ("tasks: {a: {}}\ninterventions: {a: {layers: {b: 1}}}", "'layers' holds a dict"),
        (metric_entry(value="-"), "value is NoneType"),
        (metric_entry(value=math.nan), "value is nan"),
        (metric_entry(value=True), "value is True"),
        (metric_entry(tolerance="-"), "tolerance: expected names"),
        (metric_entry(tolerance={}), "has 0 entries"),
        (metric_entry(tolerance={"absolute": 1, "relative": 1}), "has 2 entries"),
        (metric_entry(tolerance={"percent": 1}), "unknown entry 'percent'"),
        (metric_entry(tolerance={"absolute": -1}), "0 or above"),
        (metric_entry(tolerance={"standard_errors": 2}, stderr="-"), "needs stderr"),
        (metric_entry(expected=1), "unknown entry 'expected'"),
    ],
)
def test_bad_baselines(
    text: str,
    said: str,
    document: dict[str, Any],
    put: Callable[[Any], Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    for more in ([], ["--update"]):
        assert cli.main(["check", str(put(document)), "--against", str(path), *more]) == 2
        err = capfd.readouterr().err
        assert said in err and str(path) in err and err.count("\n") == 1
        assert path.read_text() == text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "not a JSON object"),
        ("{}", "it has no 'results'"),
        ('{"results": {"a": 1}}', "'a' is not a JSON object"),
        ('{"results": {"a": {}}, "versions": []}', "'versions' is not a JSON object"),
        ('{"results": {"a": {}}, "config": {"interventions": [1]}}', "not a list of objects"),
        ('{"results": {"a": {}}}', "holds no metric"),
        ('{"results": {"a": {"acc,none": 1' + "0" * 400 + "}}}", "a number of 401 digits"),
        ('{"results": {"a": {"sample_len": 1' + "0" * 400 + "}}}", "a number of 401 digits"),
        ('{"results": {"\\ud800": {"acc,none": 1}}}', "no Unicode text"),
        ('{"results": {"' + "a" * 301 + '": {}}}', "a name has 301 characters"),
        ('{"results": {"a": {}}, "config": {"interventions": [{"layers": [[1]]}]}}', "'layers' holds a list"),
        ('{"results": [' + "0," * 500_001 + "0]}", "holds over 300000 values"),
        (
            json.dumps({"results": {"a": {}}, "config": {"interventions": [{"layers": [0] * 1001}]}}),
            "'layers' is a list of 1001",
        ),
        (json.dumps({"results": {f"{n}": {} for n in range(10_001)}}), "holds 10001 tasks"),
        (json.dumps({"results": {"a": {f"{n},none": 0.5 for n in range(1001)}}}), "'a' holds over 1000 values"),
        (" " * ((8 << 20) + 1), "has over 8388608 bytes"),
        ('{"results": {"a": {"acc,none": NaN}}}', "a, acc,none is nan"),
    ],
)
def test_bad_results(
    content: str, said: str, put: Callable[[Any], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "baseline.yaml"
    assert cli.main(["check", str(put(content)), "--against", str(path), "--update"]) == 2
    err = capfd.readouterr().err
    assert said in err and err.count("\n") == 1
    assert not path.exists()


def test_a_baseline_that_could_not_be_read_is_not_written(
    put: Callable[[Any], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Results may be larger than a baseline."""
    document = {"results": {f"task {n}": {"acc,none": 0.5, "f1,none": 0.5} for n in range(5000)}}
    path = tmp_path / "baseline.yaml"
    assert cli.main(["check", str(put(document)), "--against", str(path), "--update"]) == 2
    err = capfd.readouterr().err
    assert "too large for a baseline" in err and err.count("\n") == 1 and not path.exists()


def test_other_refusals(baseline: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    results = str(tmp_path / "results.json")
    for argv, said in [
        ([str(tmp_path / "empty"), "--against", str(baseline)], "no results_*.json"),
        ([str(tmp_path / "none.json"), "--against", str(baseline)], "cannot read"),
        ([results, "--against", str(tmp_path / "none.yaml")], "cannot read the baseline"),
        ([results], "--against"),
        ([results, "--against", str(baseline), "--update", "--github"], "--update"),
        ([results, "--against", str(baseline), "--json", "--github"], "--json"),
        ([results, "--against", str(baseline), "--junit", str(baseline / "x.xml")], "cannot write"),
        ([results, "--against", str(baseline), "--junit", str(baseline)], "is what this command reads"),
    ]:
        capfd.readouterr()
        assert cli.main(["check", *argv]) == 2
        assert said in capfd.readouterr().err


# The shipped gate


def test_both_ci_scripts_run_the_gate() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "regression.yml").read_text())
    steps = [step.get("run", "") for step in workflow["jobs"]["gate"]["steps"]]
    assert any(step.startswith(".ci/gate") for step in steps)
    assert any("pip install" in step and "-c constraints.txt -e ." in step for step in steps)
    assert ".ci/gate" in (ROOT / ".ci" / "run").read_text().splitlines()
    shipped = load_baseline(ROOT / "benchmarks" / "baseline.yaml")
    rules = {task.name for task in list_tasks() if task.group == "laai_lexicon"}
    assert set(shipped.tasks) == {*rules, "laai_lexicon"} and set(shipped.interventions) == rules
    assert all("data" in shipped.tasks[rule].setting for rule in rules)


@pytest.fixture(scope="module")
def gate(regressions: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return regressions.Gate(["antonym"], tmp_path_factory.mktemp("gate"))


def test_the_shipped_baseline_passes_what_is_trained_today(
    gate: Any, regressions: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """Fails after the reference model, the lexicon or training changed: docs/check.md has the one-line update."""
    results = gate.evaluate(regressions.as_trained)
    assert cli.main(["check", str(results), "--against", str(gate.baseline)]) == 0, capfd.readouterr().out


@pytest.mark.parametrize("name", ["largest head zeroed", "one layer up", "one token early"])
def test_the_shipped_baseline_catches(
    name: str, gate: Any, regressions: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    change, breaking, expected = regressions.PLANTED[name]
    with breaking():
        results = gate.evaluate(change)
    capfd.readouterr()
    assert cli.main(["check", str(results), "--against", str(gate.baseline), "--json"]) == 1
    findings = [Finding(**finding) for finding in json.loads(capfd.readouterr().out)["findings"]]
    assert METRIC in expected and regressions.failed(findings) == {"laai_lexicon_antonym": expected}


@pytest.mark.slow
def test_the_shipped_baseline_catches_everything_in_every_rule(regressions: Any, tmp_path: Path) -> None:
    gate = regressions.Gate(["antonym", "synonym", "en_fr", "en_de"], tmp_path)
    for name, (change, breaking, expected) in regressions.PLANTED.items():
        with breaking():
            found = regressions.failed(gate.findings(change))
        assert found == (dict.fromkeys(gate.tasks, expected) if expected else {}), name
