"""Commands stopped in mid-work: started in a process of their own, sent SIGKILL or SIGINT, judged by what they left.

A server process imports everything once, and every command runs in a fork of it: a kill then falls into the work and
not into the imports. test_crash stops a few, benchmarks/reliability.py many.
"""

from __future__ import annotations

import atexit
import hashlib
import http.server
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

from tiny import tiny_model, tiny_tokenizer

from laai_core import Intervention, files
from laai_core.data import fetch
from laai_core.files import PARTIAL

INTERRUPTED = 130
PATIENCE = 120.0  # seconds that a command may take; none takes a tenth of it
# What `laai train` imports when it is run: a command line alone imports neither torch nor transformers.
PRELOADED = (
    "lm_eval_laai.commands.train",
    "lm_eval_laai.experiments.load",
    "transformers.models.llama.modeling_llama",
)
fetch_module = sys.modules[fetch.__module__]
# The code that writes. Where one of its lines is about to run, what is on disk may just have changed.
WRITERS = {
    function.__code__
    for function in (files.write, fetch, fetch_module._fetch_one, fetch_module._download, fetch_module._copy)
}


# --- running a command in a process of its own


@dataclass(frozen=True)
class Ended:
    """How a command's process ended: its exit code (negative: the signal), and what it printed."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The last line on stderr, without a progress bar before it."""
        lines = re.split(r"[\r\n]+", self.err.strip())
        return lines[-1]


class Running:
    """`laai ARGV...` in a process of its own, in `folder`.

    Args:
        at_line: kill it when it is about to run this line, counted over the lines of WRITERS that it runs.
        count_lines: its last word on stderr is how many of those there were.
        file_size: bytes to which a file may grow (RLIMIT_FSIZE): what is beyond is refused, as on a full disk.
        sums: what `data fetch` takes for the SHA-256 of the published files.
    """

    def __init__(self, argv: list[str], folder: Path, **how: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._logs = {name: folder.with_name(f"{folder.name}.{os.urandom(4).hex()}.{name}") for name in ("out", "err")}
        logs = {name: str(path) for name, path in self._logs.items()}
        self._pid = _server().ask(start={"argv": argv, "folder": str(folder), **logs, **how})

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        os.kill(self._pid, signal.SIGKILL)  # an ended one stays a zombie, and its number its own, until `wait`

    def interrupt(self) -> bool:
        """SIGINT, as by Ctrl-C. False if it had ended before."""
        runs: bool = _server().ask(runs=self._pid)
        os.kill(self._pid, signal.SIGINT)
        return runs

    def wait(self) -> Ended:
        code = _server().ask(wait=self._pid)
        texts = {name: p.read_text("utf-8", "replace") if p.exists() else "" for name, p in self._logs.items()}
        for path in self._logs.values():
            path.unlink(missing_ok=True)
        assert code is not None, f"hangs: {texts['err'][-500:]}"
        return Ended(code, **texts)


def run(argv: list[str], folder: Path, **how: Any) -> Ended:
    """A command from start to end."""
    return Running(argv, folder, **how).wait()


def preload(*modules: str) -> None:
    """Import what the commands to come import late, which else each of them has to."""
    _server().ask(preload=modules)


@cache
def _server() -> _Server:
    return _Server()


class _Server:
    """The process that forks; it ends with this one."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

        atexit.register(self._end)

    def _end(self) -> None:
        self._process.communicate()  # closes its input, which ends it

    def ask(self, **question: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


def _serve() -> None:
    """The server: starts commands, and says how they ended."""
    for name in PRELOADED:
        importlib.import_module(name)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # a command unblocks it when it can be interrupted
    for line in sys.stdin:
        ((what, value),) = json.loads(line).items()
        if what == "preload":
            answer = [importlib.import_module(name).__name__ for name in value]
        elif what == "runs":
            answer = os.waitid(os.P_PID, value, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        elif what == "wait":
            answer = _ended(value)
        else:
            answer = os.fork()
            if answer == 0:
                _command(**value)
        print(json.dumps(answer), flush=True)


def _ended(pid: int) -> int | None:
    """The exit code; None for a process that had to be killed after PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _command(
    argv: list[str],
    folder: str,
    out: str,
    err: str,
    at_line: int | None = None,
    count_lines: bool = False,
    file_size: int | None = None,
    sums: dict[str, str] | None = None,
) -> None:
    """The new process."""
    from lm_eval_laai.commands import entry

    code = 99
    try:
        os.close(0)
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        os.chdir(folder)
        if sums is not None:
            fetch_module.SHA256 = sums
        if file_size is not None:
            import resource

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error, as of a full disk, and not the end
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        lines = _Lines(at_line)
        if at_line is not None or count_lines:
            sys.settrace(lines)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it runs in background
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        except KeyboardInterrupt:  # it came before the command began
            code = INTERRUPTED
        else:
            code = entry.main(argv)
        sys.settrace(None)
        if count_lines:
            print(lines.seen, file=sys.stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _Lines:
    """A trace function that counts the lines run in WRITERS, and dies at one of them."""

    def __init__(self, last: int | None) -> None:
        self.seen, self._last = 0, last

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code in WRITERS else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        self.seen += event == "line"
        if self.seen == self._last:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._line


# --- what is killed


@dataclass(frozen=True)
class Command:
    """A command line and what it leaves.

    Args:
        argv: without the folder it is run in, where its output goes.
        whole: path of an output to whether its content is whole: as in an undisturbed run, or well-formed where runs
            differ. What else it leaves is litter.
        old: what lies at some of these paths before every second run.
        sums: see Running.
    """

    argv: list[str]
    whole: dict[str, Callable[[bytes], bool]]
    old: dict[str, bytes] = field(default_factory=dict)
    sums: dict[str, str] | None = None


@dataclass
class Kills:
    """What a command left each time it was killed."""

    kills: int = 0
    absent: int = 0  # outputs that were not there, or still the old ones
    whole: int = 0  # outputs that were there, as they have to be
    litter: int = 0  # hidden temporary files, and parts of downloads to go on with
    late: int = 0  # runs that ended before they were killed; they do not count as kills
    faults: list[str] = field(default_factory=list)


def kill_at_random_times(
    command: Command, times: int, folder: Path, draw: random.Random, each: Callable[[], Any] = lambda: None
) -> Kills:
    """Kill it `times` times, at moments spread evenly over the time it takes; run it again after each."""
    kills = Kills()
    start = time.monotonic()
    _finish(command, folder / "first", kills, "undisturbed")
    seconds = time.monotonic() - start
    while kills.kills < times:
        _killed(command, folder / str(kills.kills + kills.late), kills, seconds=draw.uniform(0, seconds))
        each()
    return kills


@dataclass
class Interrupts:
    """What a command did each time it got SIGINT."""

    rounds: int = 0
    absent: int = 0  # outputs, as for kills
    whole: int = 0
    litter: int = 0
    partial: int = 0  # files that say that their training was stopped
    late: int = 0  # runs that ended before the signal; they do not count
    seconds: list[float] = field(default_factory=list)  # from the signal to the end
    faults: list[str] = field(default_factory=list)


def interrupt_at_random_times(
    command: Command, times: int, folder: Path, draw: random.Random, each: Callable[[], Any] = lambda: None
) -> Interrupts:
    """SIGINT `times` times, at moments spread evenly over the time it takes; run it again after each."""
    found = Interrupts()
    start = time.monotonic()
    _finish(command, folder / "first", found, "undisturbed")
    seconds = time.monotonic() - start
    while found.rounds < times:
        late, moment = found.late, draw.uniform(0, seconds)
        _interrupted(command, folder / str(found.rounds + late), found, moment)
        if found.late > late:  # it takes less now: other work on the machine comes and goes
            seconds = moment
        each()
    return found


def _interrupted(command: Command, folder: Path, found: Interrupts, seconds: float) -> None:
    old = _put_old(command, folder, found.rounds)
    running = Running(command.argv, folder, sums=command.sums)
    time.sleep(seconds)
    was_running = running.interrupt()
    start = time.monotonic()
    ended = running.wait()
    took, when = time.monotonic() - start, f"after {seconds:.3f} s"
    if ended.code == 0:
        found.late += 1
        if was_running and took > 1:  # more than the end of a process whose work is done
            found.faults.append(f"{when}: went on for {took:.3f} s, exit 0")
        return
    found.rounds += 1
    found.seconds.append(took)
    if (
        ended.code != INTERRUPTED
        or ended.out
        or not re.fullmatch("|laai: error: (cross-validation at layer [0-9]+: )?interrupted.*", ended.complaint)
    ):
        found.faults.append(f"{when}: exit {ended.code}, {ended.out}{ended.err[-300:]}")
    if re.search("Traceback|Exception ignored|KeyboardInterrupt", ended.err):
        found.faults.append(f"{when}: {ended.err[-300:]}")
    for path in folder.rglob(f"*{PARTIAL}"):
        stopped = Intervention.load(path).metadata["training"]["stopped"]
        if not stopped.startswith("interrupted after "):
            found.faults.append(f"{when}: {path.name} says it was stopped by {stopped}")
        found.partial += 1
        path.unlink()
    litter = found.litter
    found.faults += [f"{when}: {fault}" for fault in judged(command, folder, found, old)]
    if found.litter != litter:
        found.faults.append(f"{when}: left {[str(p) for p in folder.rglob('.*')]}")
    _finish(command, folder, found, f"again after SIGINT {when}")
    shutil.rmtree(folder)


def interrupt_imports(times: int, draw: random.Random) -> Interrupts:
    """SIGINT of `laai` in a process of its own, while it imports: exit code 130, and nothing is printed.

    The first line that the process prints says that Python itself has started.
    """
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); print(flush=True); "
    code += "from lm_eval_laai.commands.entry import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "tasks", "--include-path"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found, seconds, whole = Interrupts(), None, ""
    while found.rounds < times:
        process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        start = time.monotonic()
        if seconds is None:
            whole = process.communicate()[0]
            seconds = time.monotonic() - start
            continue
        moment = draw.uniform(0.05, seconds)
        time.sleep(moment)
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        out, err = process.communicate()
        if process.returncode == 0 or out == whole:  # it had printed its answer before it ended
            found.late += 1
            continue
        found.rounds += 1
        found.seconds.append(time.monotonic() - start)
        if (process.returncode, out) != (INTERRUPTED, "") or err.strip() not in ("", "laai: error: interrupted"):
            found.faults.append(f"after {moment:.3f} s: exit {process.returncode}, {out}{err[-300:]}")
    return found


def kill_at_lines(
    command: Command, times: int | None, folder: Path, draw: random.Random, each: Callable[[], Any] = lambda: None
) -> Kills:
    """Kill it before each line of the code that writes, or before `times` of them; run it again after each."""
    kills = Kills()
    ended = run(command.argv, folder / "first", count_lines=True, sums=command.sums)
    assert ended.code == 0, ended.err
    count = int(ended.err.split()[-1])
    lines = range(1, count + 1)
    for line in lines if times is None else sorted(draw.sample(lines, times)):
        _killed(command, folder / str(line), kills, at_line=line)
        each()
    return kills


def _killed(command: Command, folder: Path, kills: Kills, seconds: float | None = None, **how: Any) -> None:
    old = _put_old(command, folder, kills.kills)
    running = Running(command.argv, folder, sums=command.sums, **how)
    if seconds is not None:
        time.sleep(seconds)
        running.kill()
    ended = running.wait()
    when = f"after {seconds:.3f} s" if seconds is not None else f"at line {how['at_line']}"
    if ended.code != -signal.SIGKILL:
        kills.late += 1
        if ended.code != 0:
            kills.faults.append(f"{when}: exit {ended.code}, {ended.err[-300:]}")
        return
    kills.kills += 1
    kills.faults += [f"{when}: {fault}" for fault in judged(command, folder, kills, old)]
    _finish(command, folder, kills, f"again after a kill {when}")
    shutil.rmtree(folder)


def _put_old(command: Command, folder: Path, number: int) -> dict[str, bytes]:
    """What lies there before a run: in every second one older outputs."""
    old = command.old if number % 2 else {}
    for name, content in old.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(content)
    return old


def judged(command: Command, folder: Path, kills: Kills | Interrupts, old: dict[str, bytes]) -> Iterator[str]:
    """Every output is whole or as before; whatever else there is, is hidden or says that it is a part."""
    for name, whole in command.whole.items():
        content = (folder / name).read_bytes() if (folder / name).exists() else None
        if content == old.get(name):
            kills.absent += 1
        elif content is not None and whole(content):
            kills.whole += 1
        else:
            yield f"{name} is {'gone' if content is None else 'damaged'}"
    for path in (path for path in folder.rglob("*") if path.is_file()):
        if str(path.relative_to(folder)) not in command.whole:
            kills.litter += 1
            if not _says_that_it_is_unfinished(path.relative_to(folder)):
                yield f"{path.relative_to(folder)} was left"


def _finish(command: Command, folder: Path, kills: Kills | Interrupts, when: str) -> None:
    """Run it to its end, whatever lies there: every output must be there and whole."""
    ended = run(command.argv, folder, sums=command.sums)
    if ended.code != 0:
        kills.faults.append(f"{when}: exit {ended.code}, {ended.err[-300:]}")
    for name, whole in command.whole.items():
        if not (folder / name).is_file() or not whole((folder / name).read_bytes()):
            kills.faults.append(f"{when}: {name} is not as it should be")


def _says_that_it_is_unfinished(path: Path) -> bool:
    """Hidden, or in a hidden folder; a part of a download; SQLite's journal of what it had begun."""
    hidden = any(part.startswith(".") for part in path.parts)
    return hidden or path.suffix == ".part" or path.name.endswith(("-journal", "-wal", "-shm"))


def learned(argv: list[str], folder: Path) -> Command:
    """The command with what two undisturbed runs leave: where they differ (times are in it), it has to be well-formed.

    A file that is a time may be the same in both by chance. A data base is whole by what lies beside it, so its
    content is left to SQLite.
    """
    runs = [folder / "one", folder / "two"]
    for one in runs:
        ended = run(argv, one)
        assert ended.code == 0, ended.err[-500:]
    names = [str(path.relative_to(runs[0])) for path in runs[0].rglob("*") if path.is_file()]
    contents = {name: [(one / name).read_bytes() for one in runs] for name in names}
    same = {name: a == b and not name.endswith(".txt") for name, (a, b) in contents.items()}
    return Command(argv, {name: contents[name][0].__eq__ if same[name] else _well_formed(name) for name in names})


def _well_formed(name: str) -> Callable[[bytes], bool]:
    """Whether content has the end that a file of this name has to have."""
    if name.endswith(".json"):
        return _is_json
    if name.endswith(".png"):
        return lambda content: content.startswith(b"\x89PNG") and content.endswith(b"IEND\xaeB`\x82")
    if name.endswith(".sqlite"):
        return lambda content: content.startswith(b"SQLite format 3\0")
    if name.endswith(".txt"):  # seconds
        return lambda content: re.fullmatch(rb"\d+\.\d{3}\n", content) is not None
    assert name.endswith(".md"), name
    return lambda content: content.endswith(b"\n")


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except ValueError:
        return False
    return True


# --- a server to fetch from


class _Slow(http.server.BaseHTTPRequestHandler):
    """Serves `server.files` in pieces, with pauses to be killed in."""

    def do_GET(self) -> None:
        body = self.server.files[self.path.rpartition("/")[2]]  # type: ignore[attr-defined]
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        if start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        try:
            for place in range(start, len(body), 20_000):
                self.wfile.write(body[place : place + 20_000])
                time.sleep(0.01)
        except OSError:
            pass  # killed

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def fetching() -> Iterator[Command]:
    """`laai data fetch` from a server on this machine, of four files of our own."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Slow)
    draw = random.Random(0)
    files = {name: draw.randbytes(100_000) for name in fetch_module.SHA256}
    server.files = files  # type: ignore[attr-defined]
    sums = {name: hashlib.sha256(body).hexdigest() for name, body in files.items()}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    argv = ["data", "fetch", "--output", ".", "--base-url", f"http://127.0.0.1:{server.server_port}"]
    try:
        yield Command(argv, {f"function_vectors/{name}": body.__eq__ for name, body in files.items()}, sums=sums)
    finally:
        server.shutdown()
        server.server_close()


# --- a full disk


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """`folder` is a file system of `size` bytes, in memory. OSError where this user may not mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        raise OSError(error.stderr.decode().strip()) from None
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path: Path) -> None:
    """Write to `path` until nothing more fits."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(512))


# --- commands that need a model


def saved_model(folder: Path) -> Path:
    """A tiny Llama in a folder."""
    tiny_model("Llama").save_pretrained(folder)
    tiny_tokenizer(bos=True).save_pretrained(folder)
    return folder


def train(model: Path, seed: int = 0, steps: int = 4) -> list[str]:
    """A training's command line, with nothing left to cross-validate; it writes x.safetensors."""
    common = ["train", "--model", str(model), "--task", "lexicon_antonym", "--steps", str(steps)]
    fixed = ["--layer", "1", "--l1", "0.0001", "--group", "0.0001"]
    return [*common, *fixed, "--seed", str(seed), "--output", "x.safetensors"]


if __name__ == "__main__":
    _serve()
