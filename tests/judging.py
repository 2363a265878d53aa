"""A vision-language judge on this machine, which answers, fails and lies as each test says."""

import base64
import contextlib
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


def flat(*reds):
    return [Image.new("RGB", (8, 8), (red, 0, 0)) for red in reds]


def red_of(part):
    assert part["type"] == "image_url"
    head, data = part["image_url"]["url"].split(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data))).getpixel((0, 0))[0]


def answer(text, prompt_tokens=1000, completion_tokens=100):
    """A chat completion's body, with the status 200."""
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}}], "usage": usage})


def redder(first, second, question):
    """Honest: the redder image is the better one."""
    verdict = "Tie" if first == second else f"Image {1 if first > second else 2}"
    return answer(f"<think>{first} and {second}</think><answer>{verdict}</answer>")


def error(status, message="busy", **headers):
    return status, {k.replace("_", "-"): v for k, v in headers.items()}, json.dumps({"error": {"message": message}})


DROP = "drop"
"""Send half of an answer, and hang up."""


class Judge:
    """A server; `reply(first red, second red, question)` gives (status, headers, body) or DROP."""

    def __init__(self):
        self.reply, self.asked, self.questions, self.headers = redder, [], [], []
        self.most_at_a_time = self._at_a_time = 0
        self._lock = threading.Lock()
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                judge.serve(self)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=[0.01], daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    def serve(self, handler):
        question = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        assert handler.path == "/v1/chat/completions"
        (message,) = question["messages"]
        said, image_1, also_said, image_2, text = message["content"]
        assert (said["text"], also_said["text"]) == ("Image 1:", "Image 2:")
        with self._lock:
            self._at_a_time += 1
            self.most_at_a_time = max(self.most_at_a_time, self._at_a_time)
            shown = (red_of(image_1), red_of(image_2))
            self.asked.append(shown)
            self.questions.append({**question, "text": text["text"]})
            self.headers.append(dict(handler.headers))
        reply = self.reply(*shown, question)
        with self._lock:
            self._at_a_time -= 1
        status, headers, body = answer("cut") if reply == DROP else reply
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body.encode()[: len(body) // 2 if reply == DROP else None])
        handler.close_connection = reply == DROP

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@contextlib.contextmanager
def judging():
    """A Judge that answers until the end."""
    judge = Judge()
    try:
        yield judge
    finally:
        judge.close()
