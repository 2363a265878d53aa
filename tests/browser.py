"""A headless Chromium that opens a local page and answers a question about it."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files"),
    *("--hide-scrollbars", "--virtual-time-budget=20000"),
)


def find() -> str:
    """The browser's path. Skips the test where there is none, unless CI says that there must be one."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        if os.environ.get("PRX_POST_REQUIRE_BROWSER"):
            pytest.fail("PRX_POST_REQUIRE_BROWSER is set, but no Chromium is installed")
        pytest.skip("no Chromium is installed")
    return found


def ask(page: Path, script: str, width: int, height: int, folder: Path) -> Any:
    """Show `page` in a frame of that size, run `script` with `page` as its `document`, and return what it returns."""
    frame = folder / "frame.html"
    frame.write_text(
        f"""<body><iframe id="f" src="{page.as_uri()}" style="width:{width}px;height:{height}px;border:0"></iframe>
        <pre id="answer"></pre><script>
        document.getElementById("f").addEventListener("load", (event) => {{
          const page = event.target.contentDocument;
          const answer = (() => {{ {script} }})();
          document.getElementById("answer").textContent = JSON.stringify(answer);
        }});</script></body>"""
    )
    size = f"--window-size={width + 40},{height + 40}"
    command = [find(), *FLAGS, size, f"--user-data-dir={folder / 'profile'}", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    answer = re.search(r'<pre id="answer">(.+?)</pre>', done.stdout, re.DOTALL)
    assert answer, f"the browser gave no answer: {done.stderr[-2000:]}"
    return json.loads(html.unescape(answer[1]))
