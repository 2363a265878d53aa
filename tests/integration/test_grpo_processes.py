"""Two processes of `prx-post grpo` compute what one does: rollouts, advantages, updates."""

import shutil

import pytest

from prx_post.cli import main
from tests.faults import numbers
from tests.processes import run
from tests.rolling import LORA, grpo_arguments

FORWARD = {"method": "dgpo", "rollout_sampler": "ode", "epsilon": 1e-2}
KINDS = {
    "grpo": {"beta": 0.01},
    "dgpo": FORWARD,
    "nft": {"method": "nft", "rollout_sampler": "ode"},
    "lora": {**FORWARD, **LORA},
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("".join(f"{number}\n" for number in range(100, 106)))
    return path


@pytest.fixture(scope="module")
def alone(prompts, warm_cache, tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("one"), {}

    def of(kind):
        if kind not in made:
            assert main(grpo_arguments(prompts, warm_cache, folder / kind, **KINDS[kind])) == 0
            made[kind] = numbers(folder / kind)
        return made[kind]

    return of


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("grpo", "ddp"), ("grpo", "zero3"), ("dgpo", "zero1"), ("dgpo", "zero3")),
        *(("nft", "zero2"), ("lora", "ddp"), ("lora", "zero2")),
    ],
)
def test_two_processes_are_one(prompts, warm_cache, tmp_path, alone, kind, mode):
    changes = {**KINDS[kind], "per_device_train_batch_size": 4, "save_steps": 0}
    changes |= {"deepspeed": mode} if mode != "ddp" else {}
    run(2, grpo_arguments(prompts, warm_cache, tmp_path / "run", **changes))
    ours, theirs = numbers(tmp_path / "run"), alone(kind)
    for ours_line, theirs_line in zip(ours, theirs, strict=True):
        assert ours_line.keys() == theirs_line.keys()
    for name in ("reward/jpeg_compressibility", "reward_std/jpeg_compressibility", "zero_std_ratio"):
        first, second = zip(*([line[name] for line in lines if name in line] for lines in (ours, theirs)), strict=True)
        assert first[0] == pytest.approx(first[1], rel=1e-4)
        # after four updates by Adam, whose first steps make as much of a small gradient's last bits as of a large one's
        assert second[0] == pytest.approx(second[1], rel=3e-2)
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=2e-2, abs=2e-4)


def test_a_checkpoint_of_two_processes_goes_on_with_one(prompts, warm_cache, tmp_path, alone):
    changes = {**KINDS["dgpo"], "save_steps": 2}
    run(2, grpo_arguments(prompts, warm_cache, tmp_path / "run", **changes, per_device_train_batch_size=4))
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "run" / "checkpoint-000008")
    assert main(grpo_arguments(prompts, warm_cache, tmp_path / "run", **changes)) == 0
    ours, theirs = numbers(tmp_path / "run")[-1], alone("dgpo")[-1]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-2, abs=2e-4)
