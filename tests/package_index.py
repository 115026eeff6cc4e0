"""A small Python package index over real HTTP, and wheels that hold whatever files they are given."""

from __future__ import annotations

import io
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


def wheel(name: str, version: str, files: dict[str, bytes]) -> tuple[str, bytes]:
    """File name and content of a wheel that pip accepts."""
    stem = f"{name.replace('-', '_')}-{version}"
    info = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: no-such-package\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in files.items():
            archive.writestr(path, data)
        for path, text in info.items():
            archive.writestr(f"{stem}.dist-info/{path}", text)
    return f"{stem}-py3-none-any.whl", content.getvalue()


class PackageIndex:
    """`with PackageIndex() as index:` serves `index.wheels` at `index.url`; `index.log` is what was asked."""

    def __init__(self) -> None:
        self.wheels: dict[str, bytes] = {}
        self.log: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"index": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/simple"

    def __enter__(self) -> PackageIndex:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    index: PackageIndex

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(self.path).strip("/")
        self.index.log.append(path)
        if path.startswith("simple/"):
            stem = path.removeprefix("simple/").replace("-", "_") + "-"
            names = [name for name in self.index.wheels if name.startswith(stem)]
            body = "".join(f'<a href="/files/{name}">{name}</a>' for name in names).encode()
            status, kind = (200, "text/html") if names else (404, "text/plain")
        else:
            body = self.index.wheels.get(path.removeprefix("files/"), b"")
            status, kind = (200, "application/octet-stream") if body else (404, "text/plain")
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
