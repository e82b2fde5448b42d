"""A stand-in for the Hugging Face hub on the loopback address, with what huggingface_hub asks of
it."""

import hashlib
import http.server
import json
import re
import threading
import urllib.parse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves repositories; use it as a context manager.

    Attributes:
      url: of the server, for HF_ENDPOINT.
      asked: what was asked for, as "METHOD path".
      tokens: what clients called themselves by.
    """

    def __init__(self, repositories, gated=(), damaged=()):
        """`repositories`: {"owner/name" or "datasets/owner/name": {path: bytes}}; of those in
        `gated` terms must be accepted; files in `damaged` arrive with another byte."""
        self.asked, self.tokens = [], []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer(body=True)

            def answer(self, body):
                path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
                hub.asked.append(f"{self.command} {path}")
                hub.tokens.append(self.headers.get("Authorization"))
                match = re.fullmatch(
                    r"/(datasets/[^/]+/[^/]+|[^/]+/[^/]+)/resolve/(.+?)/(.+)", path
                )
                if match:
                    return self.file(body, *match.groups())
                match = re.fullmatch(
                    r"/api/(models|datasets)/([^/]+/[^/]+)/(tree|revision)/(.+)", path
                )
                if match:
                    return self.listing(*match.groups())
                return self.send(404, b"{}")

            def refused(self, name, revision):
                if name not in repositories:
                    return self.send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
                if name in gated:
                    return self.send(403, b"{}", {"X-Error-Code": "GatedRepo"})
                if revision not in ("main", COMMIT):
                    return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                return None

            def file(self, body, name, revision, path):
                if self.refused(name, revision) is not None:
                    return True
                content = repositories[name].get(path)
                if content is None:
                    return self.send(
                        404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
                    )
                digest = hashlib.sha256(content).hexdigest()
                headers = {
                    "X-Repo-Commit": COMMIT,
                    "ETag": f'"{digest}"',
                    "X-Linked-ETag": f'"{digest}"',
                    "X-Linked-Size": str(len(content)),
                    "Accept-Ranges": "bytes",
                }
                if path in damaged and body:
                    content = bytes([content[0] ^ 1]) + content[1:]
                span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
                if span and body:
                    start, stop = int(span[1]), int(span[2] or len(content) - 1) + 1
                    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
                    return self.send(206, content[start:stop], headers)
                return self.send(200, content, headers)

            def listing(self, kind, name, what, revision):
                full = name if kind == "models" else f"datasets/{name}"
                revision = revision.partition("/")[0]
                if self.refused(full, revision) is not None:
                    return True
                files = repositories[full]
                if what == "tree":
                    entries = [
                        {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
                        for path, content in files.items()
                    ]
                    return self.send(200, json.dumps(entries).encode())
                siblings = [{"rfilename": path} for path in files]
                answer = {
                    "id": name,
                    "modelId": name,
                    "sha": COMMIT,
                    "siblings": siblings,
                    "private": False,
                    "tags": [],
                }
                return self.send(200, json.dumps(answer).encode())

            def send(self, status, content, headers=None):
                self.send_response(status)
                for key, value in (headers or {}).items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)
                return True

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
