import json
import re

import pytest

from prx_post.config import PrxPostError
from prx_post.evaluation import evaluate
from prx_post.tiny.datasets import prompt_set, write_folder, write_prompts
from tests.conftest import numbered_pictures


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    rows = prompt_set("validation")
    write_prompts([{"prompt": '<b>"7"</b> & <script>alert(1)</script>', "group": "odd"}, *rows], folder / "p.jsonl")
    write_folder(numbered_pictures(list(range(10, 90))), folder / "reference")
    return folder


def flags(world, output_dir, *more):
    common = [
        "--prompts_file",
        world / "p.jsonl",
        "--reference_dir",
        world / "reference",
        "--height",
        32,
        "--width",
        64,
    ]
    return [str(f) for f in [*common, "--num_inference_steps", 4, "--output_dir", output_dir, *more]]


@pytest.fixture(scope="module")
def evaluated(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("eval") / "out"
    checkpoints = ["--checkpoints", "plain=tiny", "same=tiny"]
    evaluate.run(flags(world, out, *checkpoints, "--num_prompts", 24, "--guidance_scale", 3, "--batch_size", 12))
    return out, json.loads((out / "results.json").read_text())


def test_results_hold_every_reward_with_an_interval_overall_and_by_group(evaluated):
    _, results = evaluated
    assert results["num_pictures"] == 24
    plain = results["checkpoints"]["plain"]
    assert set(plain["rewards"]) == {"ocr_exact", "ocr_graded", "judge_exact", "judge_graded"}
    for estimate in (*plain["rewards"].values(), plain["fid"]):
        assert estimate["low"] <= estimate["value"] <= estimate["high"]
    assert "odd" in plain["by_group"]
    assert results["settings"]["guidance_scale"] == 3.0
    assert results["versions"]["torch"].startswith("2.")


def test_a_checkpoint_against_itself_on_the_same_noise_differs_by_nothing(evaluated):
    out, results = evaluated
    for estimate in results["differences"]["same"].values():
        assert estimate == {"value": 0.0, "low": 0.0, "high": 0.0}
    names = sorted(p.name for p in (out / "images" / "plain").iterdir())
    assert len(names) == 24
    for name in names:
        assert (out / "images" / "plain" / name).stat().st_size == (out / "images" / "same" / name).stat().st_size


def test_the_report_is_one_file_that_fetches_nothing_and_escapes_prompts(evaluated):
    out, _ = evaluated
    page = (out / "report.html").read_text()
    assert not re.search(r'(src|href)\s*=\s*"(?!data:)', page)
    assert "http" not in page
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert page.count("<img") >= 48
    assert "plain against same" in page


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--checkpoints", "tiny", "--rewards", "taste"], "rewards is 'taste', but must be one of"),
        (["--checkpoints", "a=tiny", "a=tiny"], "distinctly named"),
        (["--checkpoints", "a=./nowhere"], "there is no such folder"),
        (["--checkpoints", "tiny", "--prompts_file", "none"], "there is no such file"),
        (["--checkpoints", "tiny", "--reference_dir", "none"], "has 0 pictures, but must have two or more"),
        (["--checkpoints", "tiny", "--num_prompts", "0"], "num_prompts"),
    ],
)
def test_bad_input_is_refused_before_anything_is_drawn(world, tmp_path, more, message):
    with pytest.raises(PrxPostError, match=message):
        evaluate.run(flags(world, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "not json\n", '{"text": "no prompt"}\n', '"just a string"\n'])
def test_a_prompt_set_without_prompts_is_refused(world, tmp_path, text):
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(PrxPostError, match="no prompt"):
        evaluate.run(flags(world, tmp_path / "out", "--checkpoints", "tiny", "--prompts_file", path))


def test_the_embedded_base_is_mediocre_at_numbers_but_writes_like_a_hand(tmp_path, world):
    """A guard on the weights in the package: clearly above chance, clearly below finished."""
    evaluate.run(
        flags(
            *(world, tmp_path / "out", "--checkpoints", "tiny", "--num_prompts", 120, "--guidance_scale", 3),
            *("--num_inference_steps", 28, "--batch_size", 40, "--rewards", "ocr_exact"),
        )
    )
    exact = json.loads((tmp_path / "out" / "results.json").read_text())["checkpoints"]["tiny"]["rewards"]["ocr_exact"]
    assert 0.35 < exact["value"] < 0.85
