"""An evaluation split over two processes, and two at a time in one folder."""

import json

import pytest

from prx_post.base.files import FolderLock
from prx_post.evaluation import evaluate
from prx_post.tiny.datasets import prompt_set, write_folder, write_prompts
from tests.conftest import numbered_images
from tests.processes import Processes, run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_prompts(prompt_set("validation"), folder / "p.jsonl")
    write_folder(numbered_images(list(range(10, 60))), folder / "reference")
    return folder


def arguments(world, output_dir):
    return [
        *("eval", "--checkpoints", "a=tiny", "b=tiny?num_inference_steps=2", "--prompts_file", world / "p.jsonl"),
        *("--num_prompts", 21, "--num_inference_steps", 3, "--height", 32, "--width", 64, "--batch_size", 4),
        *(
            "--rewards",
            "ocr_exact",
            "judge_exact",
            "--metrics",
            "fid=judge",
            "--reference_dir",
            world / "reference",
            "--output_dir",
            output_dir,
        ),
    ]


def without_what_may_differ(results):
    results["settings"].pop("output_dir")
    results.pop("num_processes")
    for checkpoint in results["checkpoints"].values():
        assert checkpoint.pop("timing")["images_per_second"] > 0
    return results


def test_two_processes_draw_the_same_images_and_find_the_same_numbers_as_one(world, tmp_path):
    run(1, arguments(world, tmp_path / "one"))
    run(2, arguments(world, tmp_path / "two"))
    one, two = (tmp_path / name for name in ("one", "two"))
    images = sorted(path.relative_to(one) for path in one.rglob("*.png"))
    assert len(images) == 2 * 21 + 2 * (3 + 2)  # and two trajectories of each checkpoint
    for image in images:
        assert (one / image).read_bytes() == (two / image).read_bytes()
    ranks = {json.loads(line)["rank"] for line in (two / "images" / "a" / "speed.jsonl").read_text().splitlines()}
    assert ranks == {0, 1}
    found = [without_what_may_differ(json.loads((out / "results.json").read_text())) for out in (one, two)]
    assert found[0] == found[1]


def test_eval_is_launched_on_several_processes_by_its_own_flags(world, tmp_path, prx_post):
    out = tmp_path / "out"
    prx_post(*arguments(world, out), "--num_processes", 2, check=True)
    assert json.loads((out / "results.json").read_text())["num_processes"] == 2


def test_a_second_evaluation_in_the_same_folder_is_refused(world, tmp_path, prx_post):
    out = tmp_path / "out"
    out.mkdir()
    with FolderLock(out):
        refused = prx_post(*arguments(world, out))
    assert refused.returncode == 2
    assert "another run writes there" in refused.stderr


def test_a_rank_that_cannot_go_on_ends_the_others(world, tmp_path):
    config = arguments(world, tmp_path / "out")
    broken = [*config, "--rewards", "ocr_exact", f"{tmp_path}/mine.py:score"]
    (tmp_path / "mine.py").write_text(
        "import os\ndef score(images, prompts):\n"
        "    return [1.0] * len(images) if os.environ['RANK'] == '0' else [float('nan')] * len(images)\n"
    )
    first, second = Processes(2, broken).wait()
    assert second.returncode == 2
    assert "gave nan" in second.output
    assert first.returncode != 0
    assert not (tmp_path / "out" / "results.json").exists()
    assert evaluate.MARK in {path.name for path in (tmp_path / "out").iterdir()}
