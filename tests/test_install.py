"""That extras can be installed beside the core, as pip resolves them, without installing anything."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OFFLINE = ("Temporary failure in name resolution", "Failed to establish a new connection", "Network is unreachable")


def test_hpsv2_installs_beside_the_tested_set(tmp_path):
    """It asks for protobuf < 4, which tensorboard's versions after 2.20 refuse."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["hps"]]
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", str(report)]
    done = subprocess.run(
        [*command, "-c", str(ROOT / "constraints.txt"), *asked], cwd=tmp_path, capture_output=True, text=True
    )
    if done.returncode and any(words in done.stderr for words in OFFLINE):
        pytest.skip("pip reaches no index")
    assert done.returncode == 0, done.stderr[-2000:]
    found = {
        item["metadata"]["name"]: item["metadata"]["version"] for item in json.loads(report.read_text())["install"]
    }
    assert found["hpsv2"] == "1.2.0"
    assert not {"torch", "transformers", "diffusers"} & set(found)  # they stay as they are
