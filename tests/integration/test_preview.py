"""`prx-post data preview`: what the page shows of a data set."""

import re

import numpy as np
import pytest
from PIL import Image

from prx_post import cli
from tests import browser

HOSTILE = "<script>document.title = 'owned'</script> 14"


@pytest.fixture
def folder(tmp_path):
    """Five images: a wide one, a tall and small one, a hostile caption, a very long one, a broken file."""
    place = tmp_path / "set"
    place.mkdir()
    captions = ["12", "see https://example.org/a 13", HOSTILE, "seven " * 300, "16"]
    sizes = [(128, 64), (20, 40), (64, 32), (64, 32), (64, 32)]
    for i, (caption, (width, height)) in enumerate(zip(captions, sizes, strict=True)):
        Image.fromarray(np.full((height, width, 3), 50 * i, np.uint8)).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(caption)
    (place / "4.png").write_bytes(b"no image")
    return place


def preview(folder, tmp_path, *more):
    page = tmp_path / "page" / "preview.html"
    given = ["--model_name_or_path", "tiny", "--output_file", str(page), "--cache_dir", str(tmp_path / "cache")]
    code = cli.main(["data", "preview", str(folder), *given, *more])
    return code, page


def test_the_page_shows_crops_lengths_and_what_is_lost(folder, tmp_path, capsys):
    code, page = preview(folder, tmp_path)
    assert code == 0
    assert f"page in {page}" in capsys.readouterr().out
    seen = browser.ask(
        page,
        """return {
          title: page.title,
          found: [...page.querySelectorAll('ul li')].map(i => i.innerText),
          images: [...page.images].map(i => [i.naturalWidth, i.naturalHeight]),
          captions: [...page.querySelectorAll('figcaption')].map(c => c.innerText),
          over: [...page.querySelectorAll('.bar.over')].filter(b => b.getAttribute('height') > 0).length,
          changed: [...page.querySelectorAll('#changed dd')].map(d => d.innerText.split('\\n')),
          cut: page.querySelector('#cut del').innerText,
          bad: page.querySelector('#bad').innerText,
        };""",
        *(1200, 900, tmp_path),
    )
    assert seen["title"] == f"prx-post data: {folder}"
    assert seen["found"] == [
        *("4 of 5 images, all 64x32", "1 image smaller than that and enlarged", "2 captions changed by cleaning"),
        "2 captions longer than 24 tokens and cut there",
    ]
    assert seen["images"] == [[64, 32]] * 4
    assert "1.png, 20×40, enlarged" in seen["captions"][1]
    assert seen["over"] == 2
    assert seen["changed"][0] == ["see https://example.org/a 13", "see 13"]
    assert seen["changed"][1][0] == HOSTILE
    assert re.search(r"(seven )+… and \d+ more words$", seen["cut"])
    assert "no image format that Pillow knows" in seen["bad"]


def test_a_few_of_each_size_are_shown_spread_over_them(image_folder, tmp_path):
    _, page = preview(image_folder, tmp_path, "--images_per_size", "4")
    assert page.read_text().count("<figure>") == 4
    assert "48 images, 4 shown" in page.read_text()


def test_a_data_set_without_a_usable_row_is_an_error(folder, tmp_path, capsys):
    for path in folder.glob("*.png"):
        path.write_bytes(b"no image")
    code, page = preview(folder, tmp_path)
    assert code == 2
    assert "5 of 5 rows cannot be used. The first is" in capsys.readouterr().err
    assert not page.exists()
