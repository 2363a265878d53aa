"""When the guard acts, by evaluations as they are recorded; and its page."""

import pytest
from PIL import Image

from prx_post.evaluation.pixels import edge_energy, entropy
from prx_post.evaluation.training_report import FILM, TrainingReport, write_training_report
from prx_post.stages.grpo.config import GRPOConfig
from prx_post.stages.grpo.guard import HackingDetector


def watch(metric="judge_exact", weights=None, **changes):
    given = {
        **{"output_dir": "runs/x", "reward_funcs": ["ocr"], "eval_steps": 5, "eval_rewards": ["judge_exact"]},
        **{"eval_encoder": "judge", "metric_for_best_model": metric, "guard_patience": 2, "num_inference_steps": 4},
    }
    return HackingDetector(GRPOConfig(**{**given, **changes}), {"ocr": 1.0} if weights is None else weights)


def acts(watched, *pairs, metric="judge_exact"):
    """The steps at which it acts, of (optimised, held-out) pairs."""
    found = []
    for step, (optimised, held_out) in enumerate(pairs):
        line = {"step": step, f"eval/{metric}/4_steps": held_out, "eval/ocr/4_steps": optimised}
        if watched.add(watched.point(line)) is not None:
            found.append(step)
    return found


def test_it_acts_when_the_reward_rose_and_judgement_fell_so_many_times_in_a_row():
    assert acts(watch(), (0.1, 0.3), (0.2, 0.5), (0.3, 0.4), (0.4, 0.45)) == [3]
    assert acts(watch(guard_patience=3), (0.1, 0.3), (0.2, 0.5), (0.3, 0.4), (0.4, 0.45)) == []


def test_it_is_silent_while_both_rise_both_fall_or_stand_still():
    assert acts(watch(), (0.1, 0.3), (0.2, 0.4), (0.3, 0.5), (0.4, 0.6)) == []
    assert acts(watch(), (0.5, 0.5), (0.4, 0.4), (0.3, 0.3), (0.2, 0.2)) == []
    assert acts(watch(), (0.5, 0.5), (0.6, 0.5), (0.7, 0.5), (0.8, 0.5)) == []


def test_a_recovery_between_begins_the_count_again_and_it_may_act_again():
    assert acts(watch(), (1, 5), (2, 4), (3, 6), (4, 5), (5, 5), (6, 4), (7, 3)) == [4, 6]


def test_a_fall_within_the_tolerance_does_not_count():
    """Of what was gained since the start, 0.4, a tenth."""
    assert acts(watch(), (1, 0.5), (2, 0.9), (3, 0.87), (4, 0.87), (5, 0.85), (6, 0.85)) == [5]


def test_each_reward_counts_by_its_own_range():
    """One of 0.02 falls to its lowest while one of 10 rises by a tenth of its range: by raw sums that were a rise."""
    watched = watch(weights={"ocr": 1.0, "large": 1.0})
    for step, (small, large, held_out) in enumerate([(0.00, 0, 1), (0.02, 9, 5), (0.00, 10, 2), (0.00, 10, 1)]):
        line = {"step": step, "eval/judge_exact/4_steps": held_out, "eval/ocr/4_steps": small}
        assert watched.add(watched.point({**line, "eval/large/4_steps": large})) is None


def test_a_distance_is_better_when_it_is_lower():
    watched = watch("fid")
    assert acts(watched, (0.1, 9.0), (0.2, 12.0), (0.3, 11.0), metric="fid") == [2]
    assert "but fid, which is held out, from 9 to 11" in acts_reason("fid", (0.1, 9.0), (0.2, 12.0), (0.3, 11.0))


def acts_reason(metric, *pairs):
    watched = watch(metric)
    for step, (optimised, held_out) in enumerate(pairs):
        line = {"step": step, f"eval/{metric}/4_steps": held_out, "eval/ocr/4_steps": optimised}
        reason = watched.add(watched.point(line))
    return reason


def test_without_a_pointwise_reward_falling_judgement_counts_alone():
    assert acts(watch(weights={}), (0, 0.5), (0, 0.4), (0, 0.3)) == [2]


def test_a_logged_line_is_no_evaluation():
    assert watch().point({"step": 3, "loss": 0.1}) is None


@pytest.mark.parametrize(
    ("value", "edges", "bits"),
    [
        (lambda x, y: 128, 0.0, 0.0),
        (lambda x, y: 255 * (x % 2), 127.5, 1.0),
        (lambda x, y: 255 * ((x + y) % 2), 255.0, 1.0),
    ],
)
def test_edges_and_entropy_by_hand(value, edges, bits):
    """Stripes differ by 255 across and by 0 down."""
    image = Image.new("L", (8, 8))
    image.putdata([value(x, y) for y in range(8) for x in range(8)])
    assert edge_energy(image) == pytest.approx(edges)
    assert entropy(image) == pytest.approx(bits)


def test_the_page_shows_the_film_the_curves_and_where_the_guard_acted(tmp_path):
    (tmp_path / FILM).mkdir()
    for step in (0, 5, 10, 15):
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_text("rows", "2")
        Image.new("RGB", (16, 16), (step, 0, 0)).save(tmp_path / FILM / f"{step:06d}.png", pnginfo=info)
    lines = [{"step": s, "eval/ocr/4_steps": s / 10, "eval/fid/4_steps": float(s)} for s in (0, 5, 10)]
    report = TrainingReport(
        title="a <run>",
        points=[(0, 0.1, 0.5), (5, 0.2, 0.6), (10, 0.3, 0.4)],
        held_out="judge_exact",
        acted=[10],
        guard="warn",
        prompts=["478, seed 0", "<b>81</b>, seed 1", "unused"],
        evaluations=lines,
        metrics=[{"step": s, "loss": 1 / s, "time": 0.0} for s in range(1, 11)],
    )
    write_training_report(tmp_path, tmp_path / "report.html", report)
    page = (tmp_path / "report.html").read_text()
    assert "a &lt;run&gt;" in page
    assert "&lt;b&gt;81&lt;/b&gt;" in page
    assert page.count("data:image/png") == 2 * 3  # the frame of step 15, which no evaluation knows, is left out
    assert "acted at step 10" in page
    for curve in (
        "optimised rewards, as fractions of their range",
        "held-out judgement: judge_exact",
        "fid/4_steps",
        "loss",
    ):
        assert curve in page
    assert 'class="mark"' in page
