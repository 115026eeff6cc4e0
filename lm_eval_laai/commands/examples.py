"""Training examples from the command line: a task by name, a file of own data, any harness task."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laai_core.data import load_task
from laai_core.data.examples import OwnData, read_examples
from laai_core.data.split import Split, draw
from laai_core.errors import LaaiError
from laai_core.objective import LOSSES
from laai_core.settings import Settings
from lm_eval_laai.chats import INSTRUCTION, TEMPLATE
from lm_eval_laai.commands.options import model_source
from lm_eval_laai.methods import LAAI
from lm_eval_laai.tasks import HARNESS, harness_metadata, harness_task, include_path

if TYPE_CHECKING:
    from lm_eval_laai.rendering import Renderer

logger = logging.getLogger(__name__)

TRAIN, ALL = "train", "all"


def add_own_data_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags `own_data` reads."""
    group = parser.add_argument_group("examples of your own (docs/own_data.md)")
    group.add_argument(
        "--examples",
        metavar="FILE",
        help='rows, .jsonl, .csv, .json or - (JSON lines on standard input): {"prompt", "target"}, '
        '{"input", "output"} or {"prompt", "options", "distribution"}',
    )
    add_template_argument(group)


def add_template_argument(parser: Any) -> None:
    """--prompt-template, in which a shell's \\n is a line break and \\t a tab."""
    parser.add_argument(
        "--prompt-template",
        type=unescaped,
        metavar="TEXT",
        help="with {column} for a row's columns, \\n for a line break and \\t for a tab (default: the row's prompt, "
        "or 'Q: {input}\\nA:')",
    )


def unescaped(text: str) -> str:
    """A text from a command line, where a shell gives \\n and \\t as two characters each."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def add_rendering_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags `training_split` reads besides those of `own_data`."""
    group = parser.add_argument_group("any harness task, and chat models (docs/own_data.md)")
    group.add_argument("--harness-task", metavar="NAME", help="a task of the harness, rendered as its YAML says")
    group.add_argument("--include-path", metavar="DIR", help="where the harness finds tasks besides its own")
    group.add_argument(
        "--split",
        help="the harness task's split to draw from (default: its training split, or else another that is not "
        "evaluated on); all, with --examples: draw from all rows and leave none to test on",
    )
    group.add_argument(
        "--loss",
        choices=LOSSES,
        help="of a multiple choice: the right option's nll, or kl over the options (default: nll)",
    )
    group.add_argument(
        "--apply-chat-template", action="store_true", help="render prompts as the harness does for chats"
    )
    group.add_argument("--system-instruction", metavar="TEXT", help="the harness's --system_instruction")


def own_data(arguments: argparse.Namespace) -> OwnData | None:
    """The rows of --examples, where it is given."""
    if arguments.examples is None:
        if arguments.prompt_template is not None:
            raise LaaiError("--prompt-template is for rows of your own: expected --examples with it")
        return None
    if arguments.data is not None:
        raise LaaiError("--data does not go with --examples: it goes with --task")
    return read_rows(arguments.examples, arguments.prompt_template)


def read_rows(source: str, prompt_template: str | None) -> OwnData:
    """`read_examples`, with a warning of the rows that were left out."""
    data = read_examples(source, prompt_template)
    if data.repeated:
        logger.warning("%s: rows left out because an earlier one has their prompt: %d", source, data.repeated)
    return data


def fitting_split(arguments: argparse.Namespace, rendering: Mapping[str, Any]) -> Split:
    """The split of --examples, or else of --task, in the chat and under the instruction of a recorded rendering.

    Sets `task` for --examples and, where the prompts are rendered so and it is not given, `whitespace`.
    """
    instruction = rendering.get(INSTRUCTION)
    arguments.apply_chat_template = TEMPLATE in rendering
    arguments.system_instruction = instruction if isinstance(instruction, str) else None
    arguments.stop = Settings.stop
    data = own_data(arguments)
    if data is None:
        return _named_split(arguments)
    return _own_split(arguments, data, data.split(arguments.seed, arguments.n_train))


def training_split(arguments: argparse.Namespace) -> Split:
    """The examples to train on, rendered as they will be evaluated.

    Sets `task`, by which the output is named, and, where not given, the `stop` and `whitespace` of the harness's
    rendering.

    Raises:
        LaaiError: unless one of --task, --examples and --harness-task is given; for flags that go with another; for
            data that cannot be read or rendered.
    """
    sources = [
        f"--{name.replace('_', '-')}" for name in ("task", "examples", "harness_task") if _given(arguments, name)
    ]
    if len(sources) != 1:
        got = " and ".join(sources) or "none"
        raise LaaiError(f"expected one of --task, --examples and --harness-task, got {got}")
    _check_companions(arguments, sources[0])
    if (_is_rendered(arguments) or arguments.harness_task) and arguments.method != LAAI.name:
        raise LaaiError(
            f"the method {arguments.method} trains on --task and --examples as they are: expected --method {LAAI.name}"
        )
    data = own_data(arguments)
    if data is not None:
        split = data.split(arguments.seed, arguments.n_train, arguments.split == ALL)
        if arguments.split == ALL:
            logger.warning("--split all: a score on %s would be of rows that were trained on", arguments.examples)
        return _own_split(arguments, data, split)
    if arguments.harness_task is not None:
        return _harness_split(arguments)
    return _named_split(arguments)


def _is_rendered(arguments: argparse.Namespace) -> bool:
    """Whether prompts are put into a chat or under an instruction."""
    return arguments.apply_chat_template or arguments.system_instruction is not None


def _own_split(arguments: argparse.Namespace, data: OwnData, split: Split) -> Split:
    """A split of own rows, rendered where the flags say so."""
    _check_stops(arguments, split)
    arguments.task = f"{HARNESS}:{data.name}"
    return _render_own(arguments, data, split) if _is_rendered(arguments) else replace(split, name=arguments.task)


def _named_split(arguments: argparse.Namespace) -> Split:
    """The split of --task, rendered where the flags say so."""
    split = load_task(arguments.task, seed=arguments.seed, n_train=arguments.n_train, data=arguments.data)
    _check_stops(arguments, split)
    return _render_named(arguments, split) if _is_rendered(arguments) else split


def _given(arguments: argparse.Namespace, name: str) -> bool:
    return getattr(arguments, name) is not None


def _check_companions(arguments: argparse.Namespace, source: str) -> None:
    """LaaiError for a flag of another source of examples."""
    belongs = {
        "include_path": ["--harness-task"],
        "split": ["--harness-task", "--examples"],
        "loss": ["--harness-task"],
        "data": ["--task"],
    }
    for name, where in belongs.items():
        if _given(arguments, name) and source not in where:
            flag = f"--{name.replace('_', '-')}"
            raise LaaiError(f"{flag} does not go with {source}: it goes with {' and '.join(where)}")
    if source == "--examples" and arguments.split not in (None, TRAIN, ALL):
        raise LaaiError(f"--split {arguments.split}: with --examples, expected {TRAIN} or {ALL}")


def _check_stops(arguments: argparse.Namespace, split: Split) -> None:
    """LaaiError for a target inside which generation would stop."""
    stop = Settings.stop if arguments.stop is None else arguments.stop
    for example in split.train:
        if example.target is not None and stop and stop in example.target:
            raise LaaiError(
                f"target {example.target!r:.60} has the stop string {stop!r} inside: "
                f"expected targets without it, or another --stop"
            )


def _renderer(arguments: argparse.Namespace, task: Any) -> Renderer:
    from lm_eval_laai.rendering import Renderer  # here: imports the harness, which takes seconds

    tokenizer = model_source(arguments).tokenizer() if arguments.apply_chat_template else None
    renderer = Renderer(task, tokenizer, arguments.system_instruction)
    if arguments.stop is None:
        arguments.stop = renderer.stop
    if arguments.whitespace is None:
        arguments.whitespace = renderer.whitespace
    return renderer


def _render_own(arguments: argparse.Namespace, data: OwnData, split: Split) -> Split:
    """Own examples as the task that `laai task` writes of them is rendered."""
    from lm_eval_laai.own_task import task_of

    task = task_of(data, split)
    examples = _renderer(arguments, task).examples(list(task.fewshot_docs()), "kl", shares=True)
    template = split.train[0].rendering or {}
    examples = [replace(one, rendering={**template, **(one.rendering or {})}) for one in examples]
    return Split(examples, split.test, arguments.task, split.seed, split.sources)


def _render_named(arguments: argparse.Namespace, split: Split) -> Split:
    """A task of ours, as the harness renders it."""
    metadata = harness_metadata([arguments.task], arguments.seed, arguments.n_train, arguments.data)
    task = _loaded(harness_task(arguments.task), str(include_path()), metadata, include_defaults=False)
    examples = _renderer(arguments, task).examples(list(task.fewshot_docs()), "kl", shares=True)
    return Split(examples, split.test, split.name, split.seed, split.sources)


def _harness_split(arguments: argparse.Namespace) -> Split:
    """`n_train` documents of a split of a harness task, drawn by `seed`."""
    name = arguments.harness_task
    task = _loaded(name, arguments.include_path, {}, include_defaults=True)
    renderer = _renderer(arguments, task)
    docs = _documents(task, arguments.split, name)
    drawn = draw(dict(enumerate(docs)), arguments.seed, arguments.n_train, name)
    arguments.task = f"{HARNESS}:{name}"
    return Split(renderer.examples(drawn, arguments.loss or LOSSES[0]), [], arguments.task, arguments.seed)


def _documents(task: Any, split: str | None, name: str) -> Sequence[Any]:
    """The documents of a split, processed as the task says. LaaiError for the split that the harness evaluates on."""
    config = task.config
    evaluated = config.test_split if task.has_test_docs() else config.validation_split
    known = [one for one in (config.training_split, config.fewshot_split, config.validation_split) if one]
    if split is None:
        split = next((one for one in known if one != evaluated), None)
    if split == evaluated or split is None:
        raise LaaiError(
            f"task {name}: the harness evaluates on its split {evaluated!r}; "
            f"expected --split with another of {', '.join(map(repr, task.dataset))}"
        )
    if split not in task.dataset:
        raise LaaiError(f"task {name} has no split {split!r}; expected one of {', '.join(map(repr, task.dataset))}")
    docs = task.dataset[split]
    return list(docs if config.process_docs is None else config.process_docs(docs))


def _loaded(name: str, include: str | None, metadata: dict[str, Any], include_defaults: bool) -> Any:
    """A task of the harness; every failure to load becomes one line."""
    from lm_eval.tasks import TaskManager

    folder = None if include is None else Path(include).expanduser()
    if folder is not None and not folder.is_dir():
        raise LaaiError(f"--include-path {include}: no such folder")
    # Reading the harness's own tasks takes seconds, and a task of the folder comes before one of theirs.
    manager = TaskManager(include_path=folder, include_defaults=False, metadata=metadata)
    if include_defaults and name not in manager.all_subtasks:
        manager = TaskManager(include_path=folder, metadata=metadata)
    if name not in manager.all_subtasks:
        what = "is a group of tasks" if name in manager.all_groups or name in manager.all_tags else "is no task"
        raise LaaiError(f"{name} {what} of the harness: expected one of `lm_eval ls tasks`, or --include-path")
    try:
        return manager.load([name])["tasks"][name]
    except LaaiError:
        raise
    except Exception as error:  # data sets and task files may raise anything
        from lm_eval_laai.experiments.load import first_line  # here: imports transformers

        raise LaaiError(f"cannot load the task {name}: {first_line(error)}") from error
