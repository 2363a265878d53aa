"""`prx-post data make-pairs`: a checkpoint's own images, ranked; what it writes is what `dpo` reads."""

import json
import shutil
from io import BytesIO

import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageChops

from prx_post.cli import main
from prx_post.stages.dpo.ranking import couples
from tests.pairing import dpo_arguments
from tests.processes import run

PROMPTS = ["472", "81", "trois cent six", "500", "77"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in [*PROMPTS, PROMPTS[0]]))
    return path


def arguments(prompts, folder, **changes):
    values = {
        **{"model_name_or_path": "tiny", "prompts_file": prompts, "output_dir": folder, "height": 32, "width": 64},
        **{"num_generations": 4, "num_inference_steps": 2, "guidance_scale": 4, "batch_size": 8},
        **{"reward": "ocr_graded", "prompts_per_file": 2, "num_threads": 1, **changes},
    }
    return ["data", "make-pairs", *(str(part) for name, value in values.items() for part in (f"--{name}", value))]


def pairs_of(folder):
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def scores_of(folder):
    return [json.loads(line) for path in sorted(folder.glob("scores-*")) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def made(prompts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "pairs"
    assert main(arguments(prompts, folder)) == 0
    return folder


def test_couples_are_best_and_worst_or_all_beyond_the_gap():
    scores = [0.2, 0.9, 0.5, 0.9]
    assert couples(scores, "best_worst", 0.0) == [(1, 0)]
    assert couples(scores, "best_worst", 0.7) == []
    assert couples(scores, "all", 0.35) == [(1, 2), (1, 0), (3, 2), (3, 0)]
    assert couples([0.5, 0.5], "all", 0.0) == []


def test_each_prompt_gives_its_best_image_against_its_worst(made):
    pairs, scores = pairs_of(made), scores_of(made)
    assert [line["prompt"] for line in scores] == PROMPTS  # the one that stands there twice, once
    assert [pair["prompt"] for pair in pairs] == PROMPTS
    for pair, line in zip(pairs, scores, strict=True):
        assert len(line["scores"]) == len(set(line["seeds"])) == 4
        assert pair["chosen_score"] == pytest.approx(max(line["scores"]))
        assert pair["rejected_score"] == pytest.approx(min(line["scores"]))
        assert pair["chosen_seed"] == line["seeds"][line["scores"].index(max(line["scores"]))]
        assert pair["chosen"]["bytes"] != pair["rejected"]["bytes"]
    told = json.loads((made / "pairs.json").read_text())
    assert told["counts"] == {"prompts": 5, "pairs": 5, "prompts_without_a_pair": 0, "prompts_scored_alike": 0}


def test_an_image_is_what_generate_makes_of_its_prompt_and_seed(made, tmp_path):
    pair = pairs_of(made)[1]
    call = ["generate", "--model_name_or_path", "tiny", "--prompts", pair["prompt"], "--seeds", pair["chosen_seed"]]
    size = ["--height", 32, "--width", 64, "--num_inference_steps", 2, "--guidance_scale", 4]
    assert main([*map(str, [*call, *size]), "--output_dir", str(tmp_path / "out")]) == 0
    ours, theirs = Image.open(BytesIO(pair["chosen"]["bytes"])), Image.open(tmp_path / "out" / "00000.png")
    # one image or eight at a time: the last bit of a pixel may differ
    assert max(high for _, high in ImageChops.difference(ours, theirs.convert("RGB")).getextrema()) <= 1


def test_what_is_there_is_not_made_again_and_what_is_missing_is(made, prompts, tmp_path):
    folder = tmp_path / "pairs"
    shutil.copytree(made, folder)
    (folder / "scores-00001.jsonl").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*0000[02].*")}
    assert main(arguments(prompts, folder)) == 0
    assert pairs_of(folder) == pairs_of(made)
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*0000[02].*")} == before


def test_two_processes_make_the_same_pairs(made, prompts, tmp_path):
    run(2, arguments(prompts, tmp_path / "pairs"))
    assert pairs_of(tmp_path / "pairs") == pairs_of(made)


@pytest.mark.parametrize("changes", [{}, {"pair_noise": "own", "beta_by_gap": 0.5}], ids=["shared", "own"])
def test_dpo_trains_on_them(made, warm_cache, tmp_path, changes):
    call = dpo_arguments(made, warm_cache, tmp_path / "run", max_steps=2, per_device_train_batch_size=4, **changes)
    assert main(call) == 0
    assert (tmp_path / "run" / "final" / "model_index.json").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": "ocrr"}, "Did you mean 'ocr'"),
        ({"judge_url": "http://localhost:1/v1", "judge_model": "m"}, "reward is 'ocr_graded', but must be set if"),
        ({"num_generations": 1}, "num_generations is 1, but must be 2 or more"),
        ({"prompts_file": "nowhere"}, "prompts_file is 'nowhere', but there is no such file"),
        ({"height": 30}, "30"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_made(prompts, tmp_path, capsys, changes, message):
    assert main(arguments(prompts, tmp_path / "pairs", **changes)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "pairs").exists()


def test_other_settings_do_not_continue_a_folder(made, prompts, capsys):
    assert main(arguments(prompts, made, guidance_scale=3)) == 2
    assert "whose pairs were made with guidance_scale 4.0, but now guidance_scale is 3.0" in capsys.readouterr().err


def test_a_reward_that_scores_all_images_alike_gives_no_pair(prompts, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def score(images, prompts):\n    return [1.0] * len(images)\n")
    call = arguments(prompts, tmp_path / "pairs", reward=f"{tmp_path}/mine.py:score")
    assert main(call) == 2
    assert "the images of 5 all score alike" in capsys.readouterr().err
