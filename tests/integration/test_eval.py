import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from prx_post.base.errors import PrxPostError
from prx_post.evaluation import evaluate
from prx_post.evaluation.config import CheckpointSpec
from prx_post.evaluation.jobs import spread_over_groups
from prx_post.rewards.scorers import ocr
from prx_post.rewards.scorers.numbers import FORMS
from prx_post.tiny.datasets import prompt_set, write_folder, write_prompts
from tests.conftest import numbered_images

READERS = ("ocr_exact", "ocr_graded", "judge_exact", "judge_graded")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    rows = prompt_set("validation")
    write_prompts([{"prompt": '<b>"7"</b> & <script>alert(1)</script>', "group": "odd"}, *rows], folder / "p.jsonl")
    write_folder(numbered_images(list(range(10, 90))), folder / "reference")
    return folder


def flags(world, output_dir, *more):
    common = ("--prompts_file", f"numbers={world / 'p.jsonl'}", "--height", 32, "--width", 64, "--rewards", *READERS)
    return [str(f) for f in [*common, "--num_inference_steps", 4, "--output_dir", output_dir, *more]]


def results_of(out):
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def evaluated(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("eval") / "out"
    evaluate.run(
        flags(
            *(world, out, "--checkpoints", "plain=tiny", "same=tiny", "rough=tiny?num_inference_steps=2"),
            *("--num_prompts", 24, "--guidance_scale", 3, "--batch_size", 12, "--seeds", 0, 1),
            *("--metrics", "fid=judge", "diversity=judge", "edge_energy", "--reference_dir", world / "reference"),
        )
    )
    return out, results_of(out)


def test_results_hold_every_reward_and_metric_with_an_interval_overall_and_by_group(evaluated):
    _, results = evaluated
    assert results["num_images"] == 48
    plain = results["checkpoints"]["plain"]
    assert set(plain["rewards"]) == set(READERS)
    assert set(plain["metrics"]) == {"fid", "diversity", "edge_energy"}
    for estimate in (*plain["rewards"].values(), *plain["metrics"].values()):
        assert estimate["low"] <= estimate["value"] <= estimate["high"]
    groups = {part["value"]: part for part in results["slices"] if part["kind"] == "group"}
    assert set(groups) == {"odd", *FORMS}
    # `odd` has one prompt: a mean, but too little for an interval
    assert groups["odd"]["num_prompts"] == 1
    assert groups["odd"]["means"]["plain"]["ocr_exact"]["low"] is None
    assert results["settings"]["guidance_scale"] == 3.0
    assert results["versions"]["torch"].startswith("2.")
    assert plain["timing"]["images_per_second"] > 0
    assert plain["timing"]["images_per_second"] * plain["timing"]["seconds_per_image"] == pytest.approx(1, rel=0.02)


def test_distances_are_compared_pair_by_pair_too(evaluated):
    _, results = evaluated
    differences, checkpoints = results["differences"], results["checkpoints"]
    for metric in ("fid", "diversity", "edge_energy"):
        same, rough = (differences[name][metric] for name in ("same", "rough"))
        assert [same["value"], same["low"], same["high"]] == [0, 0, 0]
        values = [checkpoints[name]["metrics"][metric]["value"] for name in ("rough", "plain")]
        assert rough["value"] == pytest.approx(values[0] - values[1])
        assert rough["low"] < rough["value"] < rough["high"]


def test_a_checkpoint_against_itself_on_the_same_noise_differs_by_nothing(evaluated):
    out, results = evaluated
    for estimate in results["differences"]["same"].values():
        assert estimate == {"value": 0.0, "low": 0.0, "high": 0.0}
    for estimate in results["wins"]["same"].values():
        assert estimate["value"] == 0.5
    names = sorted(p.name for p in (out / "images" / "plain" / "numbers").iterdir())
    assert len(names) == 48
    for name in names:
        plain, same = (Image.open(out / "images" / run / "numbers" / name) for run in ("plain", "same"))
        assert plain.tobytes() == same.tobytes()
        assert plain.text["prompt"] == same.text["prompt"]


def test_a_checkpoints_own_settings_are_its_alone(evaluated):
    out, results = evaluated
    steps = {name: result["num_inference_steps"] for name, result in results["checkpoints"].items()}
    assert steps == {"plain": 4, "same": 4, "rough": 2}
    evaluations = {name: result["num_network_evaluations"] for name, result in results["checkpoints"].items()}
    assert evaluations == {"plain": 8, "same": 8, "rough": 4}  # with guidance, twice a step
    (image, *_) = sorted((out / "images" / "rough" / "numbers").iterdir())
    assert Image.open(image).text["num_inference_steps"] == "2"
    assert results["differences"]["rough"]["judge_graded"]["value"] < 0


def test_the_last_step_of_a_trajectory_is_the_image_itself(evaluated):
    out, results = evaluated
    folders = sorted((out / "trajectories" / "plain" / "numbers").iterdir())
    assert len(folders) == results["settings"]["trajectory_prompts"] == 2
    for folder in folders:
        steps = [np.asarray(Image.open(path), int) for path in sorted(folder.iterdir())]
        assert len(steps) == 4
        final = np.asarray(Image.open(out / "images" / "plain" / "numbers" / f"{folder.name}.png"), int)
        assert abs(steps[-1] - final).max() <= 1
        assert abs(steps[0] - final).mean() > 2


def test_a_second_run_draws_and_scores_nothing_again_and_takes_a_further_checkpoint(world, tmp_path, monkeypatch):
    out = tmp_path / "out"
    common = ("--num_prompts", 12, "--guidance_scale", 3, "--rewards", "ocr_exact", "--batch_size", 6)
    evaluate.run(flags(world, out, "--checkpoints", "a=tiny", *common))
    first, files = results_of(out), sorted((out / "images" / "a" / "numbers").iterdir())
    stamps = [path.stat().st_mtime_ns for path in files]
    scored = []
    read = ocr.OCRReward.__call__
    monkeypatch.setattr(ocr.OCRReward, "__call__", lambda self, *given: scored.append(given) or read(self, *given))
    evaluate.run(flags(world, out, "--checkpoints", "a=tiny", *common))
    again = results_of(out)
    assert (scored, [path.stat().st_mtime_ns for path in files]) == ([], stamps)
    assert again["checkpoints"]["a"]["timing"] == first["checkpoints"]["a"]["timing"]
    assert again["checkpoints"]["a"]["rewards"] == first["checkpoints"]["a"]["rewards"]

    evaluate.run(flags(world, out, "--checkpoints", "a=tiny", "b=tiny?guidance_scale=1", *common))
    assert sum(len(images) for images, _ in scored) == 12  # b's
    assert [path.stat().st_mtime_ns for path in files] == stamps
    with pytest.raises(PrxPostError, match=r"generated with guidance_scale 3\.0, but now guidance_scale is 2\.0"):
        evaluate.run(flags(world, out, "--checkpoints", "a=tiny?guidance_scale=2", *common))


def test_a_broken_off_run_goes_on_and_ends_with_the_same_images(world, tmp_path):
    common = ("--checkpoints", "a=tiny", "--num_prompts", 12, "--rewards", "ocr_exact", "--batch_size", 4)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for out in (whole, broken):
        evaluate.run(flags(world, out, *common))
    folder = broken / "images" / "a" / "numbers"
    first, second, *_ = sorted(folder.iterdir())
    first.unlink()
    second.write_bytes(second.read_bytes()[:200])  # as a full disk would leave it
    (broken / "results.json").unlink()
    evaluate.run(flags(world, broken, *common))
    for path in sorted((whole / "images" / "a" / "numbers").iterdir()):
        assert path.read_bytes() == (folder / path.name).read_bytes()
    assert results_of(whole)["checkpoints"]["a"]["rewards"] == results_of(broken)["checkpoints"]["a"]["rewards"]


def test_what_was_drawn_and_scored_is_kept_when_a_reward_fails(world, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("def score(images, prompts):\n    return [float('nan')] * len(images)\n")
    common = ("--checkpoints", "a=tiny", "--num_prompts", 6)
    with pytest.raises(PrxPostError, match="the reward score gave nan for image 0 of 6"):
        evaluate.run(flags(world, tmp_path / "out", *common, "--rewards", "ocr_exact", f"{mine}:score"))
    assert len(list((tmp_path / "out" / "images" / "a" / "numbers").glob("*.png"))) == 6
    assert sum(len(path.read_text().splitlines()) for path in (tmp_path / "out" / "scores").iterdir()) == 6
    mine.write_text("def score(images, prompts):\n    return [1.0] * len(images)\n")
    evaluate.run(flags(world, tmp_path / "out", *common, "--rewards", "ocr_exact", f"{mine}:score"))
    assert results_of(tmp_path / "out")["checkpoints"]["a"]["rewards"]["score"]["value"] == 1.0


def test_sets_lengths_and_languages_are_reported_apart_and_a_reward_scores_the_sets_it_can(world, tmp_path, capsys):
    words = tmp_path / "words.jsonl"
    rows = [
        {"prompt": "a red cube", "language": "en"},
        {"prompt": "ein roter Wuerfel", "language": "de"},
        {"prompt": " ".join(["a very long description"] * 11), "language": "en"},
    ]
    words.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine = tmp_path / "mine.py"
    mine.write_text(
        "def score(prompts, completions, language, **columns):\n"
        "    return [{'en': 1.0, 'de': 2.0, None: 3.0}[name] for name in language]\n"
    )
    out = tmp_path / "out"
    evaluate.run(
        flags(
            *(world, out, "--checkpoints", "a=tiny", "b=tiny", "--num_prompts", 12, "--num_inference_steps", 1),
            *("--prompts_file", f"numbers={world / 'p.jsonl'}", words, "--rewards", "ocr_exact", f"{mine}:score"),
        )
    )
    results = results_of(out)
    assert results["rewards_score"] == {"ocr_exact": ["numbers"], "score": ["numbers", "words"]}
    assert "ocr_exact does not score words" in capsys.readouterr().out
    parts = {(part["kind"], part["value"]): part for part in results["slices"]}
    assert {value for kind, value in parts if kind == "length"} == {"short", "long"}
    assert parts["length", "long"]["num_prompts"] == 1
    assert parts["language", "de"]["means"]["a"] == {"score": {"value": 2.0, "low": None, "high": None}}
    assert parts["set", "words"]["means"]["a"]["score"]["value"] == pytest.approx(4 / 3)
    assert "ocr_exact" not in parts["set", "words"]["differences"]["b"]
    assert results["checkpoints"]["a"]["rewards"]["score"]["value"] == pytest.approx((12 * 3 + 4) / 15)
    assert ("group", "numbers: fr") in parts


def test_no_rewards_at_all_still_gives_images_and_a_report(world, tmp_path):
    out = tmp_path / "out"
    evaluate.evaluate(
        evaluate.EvalConfig(
            checkpoints=["tiny"],
            prompts_file=[str(world / "p.jsonl")],
            num_prompts=3,
            rewards=[],
            num_inference_steps=1,
            height=32,
            width=64,
            output_dir=str(out),
        )
    )
    assert results_of(out)["checkpoints"]["tiny"]["rewards"] == {}
    assert (out / "report.html").read_text().count("<img") >= 3


def test_prompts_may_be_given_as_they_are_or_in_a_table(tmp_path, capsys):
    (tmp_path / "p.csv").write_text("prompt,language\n007,en\n,de\n8,de\n")
    out = tmp_path / "out"
    sets = ["--prompts", "472", "a red cube", "--prompts_file", str(tmp_path / "p.csv")]
    steps = ["--num_inference_steps", "1", "--guidance_scale", "1"]  # the size is the checkpoint's
    evaluate.run(["--checkpoints", "tiny", *sets, *steps, "--output_dir", str(out)])
    assert "tiny: 64x32, 1 step, guidance 1 (size from the checkpoint)\n" in capsys.readouterr().out
    parts = {(part["kind"], part["value"]): part["num_prompts"] for part in results_of(out)["slices"]}
    assert parts["set", "prompts"] == 2
    assert parts["set", "p"] == 2
    with Image.open(out / "images" / "tiny" / "p" / "00000-seed0.png") as image:
        assert (image.size, image.text["prompt"]) == ((64, 32), "007")


def test_a_part_of_the_prompts_spans_every_group_and_asks_for_as_many_things_as_it_can():
    rows = prompt_set("test")
    chosen = [rows[i] for i in spread_over_groups(rows, 90)]
    targets = {form: [row["target"] for row in chosen if row["group"] == form] for form in FORMS}
    assert {len(t) for t in targets.values()} == {15}
    assert len({target for t in targets.values() for target in t}) == 90  # another number every time
    assert spread_over_groups(rows, len(rows)) == list(range(len(rows)))
    assert len(spread_over_groups(rows, 100)) == 100
    halves = spread_over_groups([{"prompt": "x"}] * 10, 5)
    assert halves == [0, 2, 4, 6, 8]


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
    spec = CheckpointSpec.parse(given, 28, 5.0)
    assert (spec.name, spec.source, spec.num_inference_steps, spec.guidance_scale) == (name, path, 28, 5.0)


def test_a_checkpoints_settings_follow_a_question_mark():
    spec = CheckpointSpec.parse("student=runs/s/final?num_inference_steps=8&guidance_scale=1", 28, 5.0)
    assert spec == CheckpointSpec("student", "runs/s/final", 8, 1.0)
    for query, message in (
        ("steps=8", "must be one of num_inference_steps, guidance_scale"),
        ("num_inference_steps=many", "must be a number"),
        ("guidance_scale=0.5", "guidance_scale is 0.5, but must be 1 or more"),
        ("num_inference_steps=0", "num_inference_steps is 0, but must be above 0"),
    ):
        with pytest.raises(PrxPostError, match=message):
            CheckpointSpec.parse(f"runs/s/final?{query}", 28, 5.0)


def test_the_report_is_one_file_that_fetches_nothing_and_escapes_prompts(evaluated):
    out, _ = evaluated
    page = (out / "report.html").read_text()
    assert not re.search(r'src\s*=\s*"(?!data:)', page)
    assert all((out / link).is_file() for link in re.findall(r'href="(.*?)"', page))
    assert "http" not in page
    assert page.count("<script") == 1  # its own
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "plain against same against rough" in page


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--checkpoints", "tiny", "--rewards", "taste"], "rewards is 'taste', but must be one of"),
        (["--checkpoints", "a=tiny", "a=tiny"], "distinctly named"),
        (["--checkpoints", "a=./nowhere"], "there is no such folder"),
        (["--checkpoints", "tiny", "--prompts_file", "none"], "there is no such file"),
        (["--checkpoints", "tiny", "--metrics", "fid=judge", "--reference_dir", "none"], "must have two or more"),
        (["--checkpoints", "tiny", "--metrics", "fid=judge"], "Set reference_dir"),
        (["--checkpoints", "tiny", "--reference_dir", "none"], "no metric uses it"),
        (["--checkpoints", "tiny", "--metrics", "taste"], "metrics is 'taste', but must be one of"),
        (["--checkpoints", "tiny", "--metrics", "diversity=judge"], "Give two seeds or more"),
        (["--checkpoints", "tiny", "--metrics", "diversity=./none", "--seeds", "0", "1"], "is no folder"),
        (["--checkpoints", "tiny", "--num_prompts", "0"], "num_prompts"),
        (["--checkpoints", "tiny", "--seeds", "-1"], "seeds is -1, but must be from 0"),
        (["--checkpoints", "tiny", "--height", "-32"], "height is -32, but must be above 0"),
        (["--checkpoints", "tiny", "--rewards", "http://127.0.0.1:9/ocr"], "127.0.0.1:9"),
    ],
)
def test_bad_input_is_refused_before_anything_is_drawn(world, tmp_path, more, message):
    with pytest.raises(PrxPostError, match=message):
        evaluate.run(flags(world, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_a_broken_reference_image_is_named_before_anything_is_drawn(world, tmp_path):
    shutil.copytree(world / "reference", tmp_path / "reference")
    first, *_ = sorted((tmp_path / "reference").glob("**/*.png"))
    first.write_bytes(first.read_bytes()[:-40])  # whole as far as its header goes
    more = ("--checkpoints", "tiny", "--metrics", "fid=judge", "--reference_dir", tmp_path / "reference")
    with pytest.raises(PrxPostError, match=f"{first.name} cannot be read as an image"):
        evaluate.run(flags(world, tmp_path / "out", *more))
    assert not list((tmp_path / "out" / "images").glob("**/*.png"))


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
        evaluate.run(flags(world, out.parent, "--checkpoints", "tiny"))
    with pytest.raises(PrxPostError, match="were generated with num_inference_steps 4, but now"):
        evaluate.run(flags(world, out, "--checkpoints", "plain=tiny?num_inference_steps=5"))
    assert (out / "results.json").read_bytes() == before


def test_the_embedded_base_is_mediocre_at_numbers_but_writes_like_a_hand(tmp_path, world):
    """A guard on the weights in the package: clearly above chance, clearly below finished."""
    evaluate.run(
        flags(
            *(world, tmp_path / "out", "--checkpoints", "tiny", "--num_prompts", 120, "--guidance_scale", 3),
            *("--num_inference_steps", 14, "--batch_size", 40, "--rewards", "ocr_exact"),
        )
    )
    exact = json.loads((tmp_path / "out" / "results.json").read_text())["checkpoints"]["tiny"]["rewards"]["ocr_exact"]
    assert 0.35 < exact["value"] < 0.85
