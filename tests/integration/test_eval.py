import json
import re

import pytest
from PIL import Image

from prx_post.config import PrxPostError
from prx_post.evaluation import evaluate
from prx_post.tiny.datasets import prompt_set, write_folder, write_prompts
from prx_post.tiny.world import FORMS
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
        assert (
            Image.open(out / "images" / "plain" / name).tobytes()
            == Image.open(out / "images" / "same" / name).tobytes()
        )


def test_a_part_of_the_prompts_spans_every_group_alike():
    rows = prompt_set("test")
    chosen = evaluate.spread_over_groups(rows, 90)
    targets = {form: [row["target"] for row in chosen if row["group"] == form] for form in FORMS}
    assert {len(t) for t in targets.values()} == {15}
    assert len({tuple(t) for t in targets.values()}) == 1  # the same numbers in every form
    assert targets["it"][0] == rows[0]["target"]
    assert targets["it"][-1] == rows[-1]["target"]
    assert evaluate.spread_over_groups(rows, len(rows)) == rows
    assert len(evaluate.spread_over_groups(rows, 100)) == 100


@pytest.mark.parametrize(
    ("given", "name", "path"),
    [
        ("a=x/y", "a", "x/y"),
        ("runs/lr=1e-4/final", "lr=1e-4", "runs/lr=1e-4/final"),
        ("runs/sft/final", "sft", "runs/sft/final"),
        ("../../x=tiny", "x=tiny", "../../x=tiny"),
        ("tiny", "tiny", "tiny"),
    ],
)
def test_checkpoints_are_named_by_what_stands_before_the_sign_or_by_their_folder(given, name, path):
    config = evaluate.EvalConfig(checkpoints=[given], prompts_file="p", output_dir="o")
    assert config.named_checkpoints() == [(name, path)]


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
        (["--checkpoints", "tiny", "--num_prompts", "1"], "FID needs two or more pictures"),
        (["--checkpoints", "tiny", "--height", "-32"], "height is -32, but must be above 0"),
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


def test_a_prompt_that_cannot_be_scored_stops_before_anything_is_drawn(world, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "472"}\n{"prompt": "a red cube"}\n')
    with pytest.raises(PrxPostError, match="'a red cube' has no text to read"):
        evaluate.run(flags(world, tmp_path / "out", "--checkpoints", "tiny", "--prompts_file", path))
    assert not (tmp_path / "out").exists()


def test_an_earlier_evaluation_is_left_alone(world, evaluated):
    out, _ = evaluated
    before = (out / "results.json").read_bytes()
    with pytest.raises(PrxPostError, match="must be new or empty"):
        evaluate.run(flags(world, out, "--checkpoints", "tiny"))
    assert (out / "results.json").read_bytes() == before


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
