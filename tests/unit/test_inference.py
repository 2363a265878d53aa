"""Settings of sampling that a checkpoint carries with it."""

import json
from types import SimpleNamespace

import pytest

from prx_post.base.errors import PrxPostError
from prx_post.model.inference import Inference, choose, describe

OWN = Inference(8, 1.0, 32, 64, skip_text_cleaning=True)
NOTHING = dict.fromkeys(("num_inference_steps", "guidance_scale", "height", "width", "skip_text_cleaning"))


def chosen(own, **given):
    return choose(SimpleNamespace(**{**NOTHING, **given}), own)


def test_what_is_written_is_read(tmp_path):
    OWN.write(tmp_path)
    assert Inference.read(tmp_path) == OWN


def test_a_folder_may_have_none(tmp_path):
    assert Inference.read(tmp_path) is None


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "no",
        '{"num_inference_steps": 0}',
        '{"num_inference_steps": "8"}',
        '{"guidance_scale": 0.5}',
        '{"height": "512"}',
        '{"skip_text_cleaning": "false"}',
    ],
)
def test_a_file_that_holds_something_else_is_refused(tmp_path, text):
    (tmp_path / "inference.json").write_text(text)
    with pytest.raises(PrxPostError, match=r"inference\.json does not hold settings of sampling"):
        Inference.read(tmp_path)


def test_settings_of_a_later_version_are_passed_over(tmp_path):
    (tmp_path / "inference.json").write_text(json.dumps({"num_inference_steps": 4, "of_a_later_version": 1}))
    assert Inference.read(tmp_path) == Inference(num_inference_steps=4)


def test_without_anything_said_it_is_as_prx_is():
    assert chosen(None) == (Inference(28, 5.0, None, None, skip_text_cleaning=False), [])


def test_a_checkpoint_decides_what_is_not_asked_for():
    settings, own = chosen(OWN, guidance_scale=2.0)
    assert settings == Inference(8, 2.0, 32, 64, skip_text_cleaning=True)
    assert own == ["num_inference_steps", "height", "width", "skip_text_cleaning"]


def test_a_size_is_taken_whole():
    settings, own = chosen(OWN, width=128)
    assert (settings.height, settings.width) == (None, 128)
    assert own == ["num_inference_steps", "guidance_scale", "skip_text_cleaning"]


@pytest.mark.parametrize(
    ("own", "sampler", "line"),
    [
        (
            ["num_inference_steps", "guidance_scale", "height", "width"],
            "euler",
            "64x32, 8 steps, guidance 1 (from the checkpoint)",
        ),
        ([], "euler", "64x32, 8 steps, guidance 1"),
        (
            ["num_inference_steps"],
            "renoise",
            "64x32, 8 steps, guidance 1, sampler renoise (steps from the checkpoint)",
        ),
    ],
)
def test_the_line_says_what_comes_from_the_checkpoint(own, sampler, line):
    assert describe((32, 64), Inference(8, 1.0), sampler, own) == line
