"""`prx-post eval` with a vision-language judge."""

import json

import pytest

from prx_post.base.errors import PrxPostError
from prx_post.evaluation import evaluate
from tests.judging import answer, judging


def evaluation(tmp_path, *more):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": str(number)}) + "\n" for number in range(100, 112)))
    return [
        *("--checkpoints", "a=tiny", "b=tiny?num_inference_steps=1", "--prompts_file", str(prompts)),
        *("--num_inference_steps", "2", "--height", "32", "--width", "64", "--rewards", "ocr_exact"),
        *("--output_dir", str(tmp_path / "out"), "--judge_model", "some/model", *more),
    ]


def test_eval_reports_a_judges_wins_and_its_position_bias(tmp_path):
    cache = str(tmp_path / "cache")
    with judging() as server:
        server.reply = lambda first, second, question: answer("<answer>Image 1</answer>")
        evaluate.run(evaluation(tmp_path, "--judge_url", server.url, "--judge_cache_dir", cache))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    wins = results["wins"]["b"]["judge model"]
    assert wins["value"] == 0.5  # it always prefers the first place, so both orders cancel
    assert wins["low"] < 0.5 < wins["high"]
    (counts,) = results["judge"]["counts_by_process"]
    assert (counts["asked"], counts["contradictions"], counts["position_bias"]) == (24, 12, 1.0)


def test_a_judge_that_cannot_be_reached_leaves_the_images_and_scores(tmp_path):
    unreachable = ("--judge_url", "http://127.0.0.1:9/v1", "--judge_max_attempts", "1")
    with pytest.raises(PrxPostError, match="127.0.0.1:9"):
        evaluate.run(evaluation(tmp_path, *unreachable, "--judge_cache_dir", str(tmp_path / "cache")))
    assert len(list((tmp_path / "out" / "images").rglob("*.png"))) == 24
    assert sum(len(path.read_text().splitlines()) for path in (tmp_path / "out" / "scores").iterdir()) == 24
