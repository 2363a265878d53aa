"""The line that says what a data set holds."""

import pytest
from PIL import Image

from prx_post.data.buckets import Buckets
from prx_post.data.config import DataConfig
from prx_post.data.findings import describe
from prx_post.data.readers import read_rows
from prx_post.data.scan import EMPTY_CAPTION, LOST_CAPTION, is_visible, scan
from prx_post.model.checkpoint import open_pipeline
from prx_post.model.text import PromptCleaner, count_tokens, tokenize


@pytest.fixture(scope="module")
def pipeline():
    return open_pipeline("tiny", None)


def folder_of(tmp_path, pictures):
    """Of (caption, size) each."""
    for i, (caption, size) in enumerate(pictures):
        Image.new("RGB", size, (i, 2 * i, 3 * i)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(caption, encoding="utf-8")
    return read_rows(DataConfig(dataset_name=str(tmp_path)))


def line_of(rows, pipeline, height=32, width=64):
    buckets, tokenizer = Buckets(pipeline, height, width), pipeline.load_tokenizer()
    samples, bad = scan(rows, buckets, PromptCleaner(), tokenizer, decode_all=False)
    return describe("set", f"{len(samples)} images", samples, rows.notes, pipeline.max_prompt_tokens), bad


def test_a_set_with_nothing_to_say_is_short(tmp_path, pipeline):
    assert line_of(folder_of(tmp_path, [("12", (64, 32)), ("13", (64, 32))]), pipeline) == (
        "set: 2 images, all 64x32",
        [],
    )


def test_everything_that_is_done_to_images_and_captions_is_said(tmp_path, pipeline):
    pictures = [
        ("12", (64, 32)),
        ("13", (63, 32)),
        ("14", (10, 10)),
        ("see https://example.org/a 15", (640, 320)),
        ("one two three " * 30, (64, 32)),
    ]
    rows = folder_of(tmp_path, pictures)
    (tmp_path / "notes.txt").write_text("about these")
    rows = read_rows(DataConfig(dataset_name=str(tmp_path)))
    line, bad = line_of(rows, pipeline)
    assert not bad
    assert line == (
        "set: 5 images, all 64x32; 1 text without an image (such as notes.txt); 2 images smaller than that and "
        "enlarged; 1 caption changed by cleaning; 1 caption longer than 24 tokens and cut there"
    )


def test_a_caption_is_cut_if_words_of_it_are_lost(pipeline):
    tokenizer = pipeline.load_tokenizer()
    lost = []
    for count in range(1, 40):
        caption = " ".join(["seven"] * count)
        kept = tokenizer.decode(tokenize(tokenizer, caption)["input_ids"][0], skip_special_tokens=True).count("seven")
        lost.append(kept < count)
        assert (count_tokens(tokenizer, [caption])[0] > tokenizer.model_max_length) == lost[-1]
    assert lost[0] < lost[-1]


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("\u200b", EMPTY_CAPTION),
        (" \u200b\ufeff\n", EMPTY_CAPTION),
        ("\x00", EMPTY_CAPTION),
        ("\u2066\u2069", EMPTY_CAPTION),
        ("中文", LOST_CAPTION),
    ],
)
def test_a_caption_of_which_nothing_can_be_seen_is_empty(tmp_path, pipeline, caption, reason):
    _, bad = line_of(folder_of(tmp_path, [(caption, (64, 32)), ("12", (64, 32))]), pipeline)
    assert [(row.row, row.reason) for row in bad] == [(0, reason)]


@pytest.mark.parametrize("text", ["a", "🚂", "中", "👩\u200d🚀", " . "])
def test_what_can_be_seen_is_no_empty_caption(text):
    assert is_visible(text)
