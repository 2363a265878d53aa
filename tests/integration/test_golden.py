"""What the stages compute does not change unnoticed: twenty losses and the final weights of each, as recorded."""

import pytest

from tests import golden

# Losses: another CPU's kernels sum in another order, 1e-7 a step; twenty steps of AdamW, which turns a nearly absent
# gradient into a whole step, were seen to make 1e-4 of it (two processes against one). A change of algorithm, a
# shifted random stream or a wrong learning rate shows at 1e-2 and more.
LOSS = 1e-3
# The weights' change, by eight projections: the same drift, but of single weights, of which each is summed up.
WEIGHTS = 2e-2


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("golden")


# `python -m tests.golden check` compares all of them, to the bit on the machine that recorded them.
CHECKED = [name for name in golden.RUNS if name.endswith("-1") or name.startswith(("sft-", "distill-together-"))]


@pytest.mark.parametrize("name", CHECKED)
def test_losses_and_weights_are_the_recorded_ones(name, image_folder, prompts_file, place):
    found = golden.measure(name, image_folder, prompts_file, place / "cache", place)
    loss, weights = golden.compare(found, golden.recorded()[name])
    assert loss < LOSS
    assert weights < WEIGHTS


def test_the_comparison_tells_runs_apart():
    runs = golden.recorded()
    loss, weights = golden.compare(runs["sft-full-1"], runs["sft-lora-1"])
    assert loss > LOSS
    assert weights > WEIGHTS
