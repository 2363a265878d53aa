"""The README's way from a folder of one's own images to generated ones, line by line."""

import os
import sys
from pathlib import Path

import yaml
from PIL import Image

from tests.new_user import make_images, readme_lines, run


def test_a_folder_of_twelve_jpegs_becomes_a_checkpoint_and_images(tmp_path):
    make_images(tmp_path / "my" / "images")
    activate, *lines = readme_lines()
    assert activate.startswith(". .venv/bin/activate")
    assert [line.split()[:2] for line in lines] == [
        *(["prx-post", "data"], ["prx-post", "sft"], ["prx-post", "generate"]),
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for line in lines:
        run(line, tmp_path, environment)
    assert "12 images" in (tmp_path / "preview.html").read_text()
    settings = yaml.safe_load((tmp_path / "runs" / "mine" / "config.yaml").read_text())
    assert settings["max_steps"] == 30  # 20 epochs of 12 images in batches of 8
    images = sorted((tmp_path / "runs" / "images").glob("*.png"))
    assert len(images) == 4
    assert {Image.open(image).size for image in images} == {(64, 32)}
