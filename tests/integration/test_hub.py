"""Loading by Hub id, from a stand-in Hub on loopback."""

import http.server
import json
import subprocess
import sys
import threading

import pytest


@pytest.fixture
def hub(base):
    """Serves the embedded base as `someone/prx-tiny`, the way huggingface_hub asks for a repository."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    files = {str(p.relative_to(base)): p for p in base.rglob("*") if p.is_file()}

    class Handler(http.server.BaseHTTPRequestHandler):
        def reply(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in {"Content-Length": len(body), "Content-Type": "application/json", **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            path = self.path.split("?")[0]
            if path.startswith("/api/models/someone/prx-tiny/tree"):
                tree = [{"type": "file", "path": n, "size": p.stat().st_size, "oid": n} for n, p in files.items()]
                return self.reply(200, json.dumps(tree).encode())
            if path.startswith("/api/models/someone/prx-tiny"):
                siblings = [{"rfilename": name} for name in files]
                info = {"id": "someone/prx-tiny", "sha": revision, "siblings": siblings, "tags": [], "downloads": 0}
                return self.reply(200, json.dumps(info).encode())
            prefix = "/someone/prx-tiny/resolve/"
            name = path.removeprefix(prefix).split("/", 1)[-1]
            if path.startswith(prefix) and name in files:
                body = files[name].read_bytes()
                return self.reply(200, body, ETag=f'"{hash(name) & 0xFFFFFFFF:x}"', X_Repo_Commit=revision)
            return self.reply(404, b'{"error": "Repository not found"}', X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


PROGRAM = """
import sys
from prx_post.model.checkpoint import load
from prx_post.base.errors import PrxPostError
try:
    checkpoint = load(sys.argv[1])
except PrxPostError as error:
    sys.exit(str(error))
print(checkpoint.pipeline.is_from_hub, checkpoint.pipeline.variant, checkpoint.transformer.config.depth)
"""


def run(endpoint, repo, tmp_path):
    import os

    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    env |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    command = [sys.executable, "-c", PROGRAM, repo]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


def test_a_hub_id_is_fetched_checked_and_loaded(hub, tmp_path):
    result = run(hub, "someone/prx-tiny", tmp_path)
    assert result.stdout.split() == ["True", "flux-kl", "6"], result.stderr


def test_an_id_that_the_hub_does_not_have_is_an_error_of_one_line(hub, tmp_path):
    result = run(hub, "someone/else", tmp_path)
    assert result.returncode == 1
    assert "'someone/else', which is neither a local folder nor could be fetched" in result.stderr
    assert "Traceback" not in result.stderr
