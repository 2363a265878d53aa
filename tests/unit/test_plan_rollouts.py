"""`prx-post plan --stage grpo`: network evaluations of a rollout, counted by hand."""

import pytest

from prx_post.planning.generation import Timing
from prx_post.planning.plan import check, lines

COMMON = ["--stage", "grpo", "--model_name_or_path", "tiny", "--prompts_file", "none.txt", "--output_dir", "unused"]
COMMON += ["--height", "32", "--width", "64", "--reward_funcs", "ocr", "--guard", "off", "--num_generations", "4"]
COMMON += ["--prompts_per_rollout", "6", "--rollout_num_inference_steps", "5", "--per_device_train_batch_size", "4"]


def work(*args):
    found = check([*COMMON, *args])[0].stage.rollout_work()
    return found.images, found.generated, found.trained, found.frozen


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        # 24 images of 5 steps; 4 of them random and trained
        (["--method", "grpo"], (24, 120, 96, 0)),
        # guidance doubles both; the KL asks the reference as often
        (["--method", "grpo", "--rollout_guidance_scale", "4", "--beta", "0.1"], (24, 240, 192, 192)),
        (["--method", "grpo", "--window", "subset", "--num_iterations", "3"], (24, 120, 144, 0)),
        # each image at 2 noises; reference and lagged policy
        (["--method", "dgpo", "--noises_per_image", "2"], (24, 120, 48, 96)),
        (["--method", "dgpo", "--epsilon", "null"], (24, 120, 24, 24)),
        (["--method", "nft"], (24, 120, 24, 24)),
    ],
)
def test_evaluations_by_hand(args, expected):
    assert work(*args) == expected


def test_the_common_steps_of_a_fast_group_are_made_once():
    images, generated, trained, _ = work("--method", "grpo", "--window", "fast", "--window_size", "1", "--seed", "3")
    branch = 5 - (generated - 6 * 5) / (24 - 6)  # 24 images from the branch on, 6 before: 24 (5 - b) + 6 b
    assert (images, trained) == (24, 24)
    assert generated == 24 * (5 - branch) + 6 * branch
    assert branch in (0, 1, 2, 3)


def test_seconds_are_those_of_the_passes_shared_out_over_the_processes():
    stage = check([*COMMON, "--method", "dgpo", "--noises_per_image", "2"])[0].stage
    timing = Timing("cpu", 4, forward=0.4, forward_and_backward=1.2)
    # (120 + 96)·0.1 + 48·0.3 = 36
    assert timing.of(stage.rollout_work(), 2) == pytest.approx(18)


def test_the_report_has_the_section_and_a_batch_that_follows_from_the_rollout():
    text = "\n".join(lines(*check([*COMMON, "--method", "grpo", "--num_processes", "2", "--measure", "true"])))
    assert "  generated          120   network evaluations" in text
    assert "s on 2 process(es), without decoding and scoring" in text
    # 6 prompts × 4 images × 4 steps: each of 2 processes 3 batches of 4 images, 4 times
    assert "of 96 samples: 4 a device x 2 x 12 accumulated" in text
