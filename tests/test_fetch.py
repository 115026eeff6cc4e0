"""`fetch` against a real server on this machine: whole, resumed, corrupted, absent."""

import hashlib
import http.server
import os
import re
import threading

import pytest

from laai_core.data import fetch as fetch_function
from laai_core.errors import LaaiError
from lm_eval_laai.commands import cli

fetch_module = __import__("sys").modules[fetch_function.__module__]
NAMES = list(fetch_module.SHA256)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`; `server.cut` bytes per answer at most, `server.ranges` says whether Range is honoured."""

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        asked = self.headers.get("Range")
        self.server.requests.append((name, asked))
        if name not in self.server.files:
            self.send_error(404)
            return
        body = self.server.files[name]
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and self.server.ranges else 0
        if start and start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start + self.server.shift}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        rest = body[start:]
        self.wfile.write(rest if self.server.cut is None else rest[: self.server.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files = {name: os.urandom(1000) + name.encode() * 20_000 for name in NAMES}
    server.cut, server.ranges, server.shift, server.requests = None, True, 0, []
    server.url = f"http://127.0.0.1:{server.server_port}/sets"
    sums = {name: hashlib.sha256(body).hexdigest() for name, body in server.files.items()}
    monkeypatch.setattr(fetch_module, "SHA256", sums)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def refused(server, folder):
    """The one line fetch ends with."""
    with pytest.raises(LaaiError) as error:
        fetch_function(folder, server.url, progress=False)
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_whole(server, folder):
    sets = folder / "function_vectors"
    assert {path.name: path.read_bytes() for path in sets.iterdir()} == server.files


@pytest.mark.parametrize("flags", [["--data", "F", "fetch"], ["fetch", "--output", "F"]], ids=["data", "output"])
def test_the_command(flags, server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", *flags, "--base-url", server.url]) == 0
    assert_whole(server, tmp_path / "F")


def test_whole(server, tmp_path, capsys):
    paths = fetch_function(tmp_path, server.url)
    assert [path.name for path in paths] == NAMES
    assert_whole(server, tmp_path)
    output = capsys.readouterr()
    assert output.out == "" and "antonym.json" in output.err


def test_what_is_there_and_right_is_not_asked_for(server, tmp_path):
    fetch_function(tmp_path, server.url, progress=False)
    (tmp_path / "function_vectors" / NAMES[1]).write_bytes(b"wrong")
    server.requests.clear()
    fetch_function(tmp_path / "function_vectors", server.url, progress=False)  # the folder itself means the same
    assert server.requests == [(NAMES[1], None)]
    assert_whole(server, tmp_path)


@pytest.mark.parametrize("ranges", [True, False])
def test_resumed_after_a_cut(server, tmp_path, ranges):
    server.cut = 5000
    assert "cut after 5000 bytes" in refused(server, tmp_path)
    assert not (tmp_path / "function_vectors" / NAMES[0]).exists()
    server.cut, server.ranges = None, ranges
    server.requests.clear()
    fetch_function(tmp_path, server.url, progress=False)
    assert server.requests[0] == (NAMES[0], "bytes=5000-")
    assert_whole(server, tmp_path)


def test_a_whole_part_needs_no_server(server, tmp_path):
    fetch_function(tmp_path, server.url, progress=False)
    path = tmp_path / "function_vectors" / NAMES[0]
    path.rename(path.with_name(path.name + ".part"))
    server.requests.clear()
    fetch_function(tmp_path, server.url, progress=False)
    assert server.requests == []
    assert_whole(server, tmp_path)


def test_a_part_longer_than_the_file_is_thrown_away(server, tmp_path):
    (tmp_path / "function_vectors").mkdir()
    (tmp_path / "function_vectors" / f"{NAMES[0]}.part").write_bytes(bytes(10_000_000))
    fetch_function(tmp_path, server.url, progress=False)
    assert_whole(server, tmp_path)


def test_another_range_than_asked_is_refused(server, tmp_path):
    server.cut = 5000
    refused(server, tmp_path)
    server.cut, server.shift = None, 1
    assert "another range" in refused(server, tmp_path)


def test_wrong_checksum_deletes_the_part(server, tmp_path):
    server.files[NAMES[0]] = b"something else"
    text = refused(server, tmp_path)
    assert hashlib.sha256(b"something else").hexdigest() in text and fetch_module.SHA256[NAMES[0]] in text
    assert "deleted" in text
    assert list((tmp_path / "function_vectors").iterdir()) == []


def test_not_found(server, tmp_path):
    del server.files[NAMES[0]]
    assert "404" in refused(server, tmp_path)


def test_connection_refused(server, tmp_path):
    server.shutdown()
    server.server_close()
    assert "cannot be reached (Connection refused)" in refused(server, tmp_path)


def test_not_an_address(server, tmp_path):
    server.url = "nonsense"
    assert "cannot be reached" in refused(server, tmp_path)


def test_a_destination_that_cannot_be_a_folder(server, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be made" in refused(server, tmp_path / "file")


def test_the_pinned_sums_are_the_public_sets(public_data):
    for name, expected in fetch_module.SHA256.items():
        assert hashlib.sha256((public_data / "function_vectors" / name).read_bytes()).hexdigest() == expected
