"""A reference by an adapter that is off, a frozen copy or a slow average: the same numbers where they must be."""

import shutil

import pytest
import torch

from prx_post.model.checkpoint import load
from prx_post.model.config import ModelConfig
from prx_post.model.frozen import AdapterOff, EarlierSelf, FrozenCopy, SlowAverage
from prx_post.model.lora import attach
from tests import reference_stage
from tests.faults import differences, numbers
from tests.processes import run

# fp32 rounding of velocities of size 3; ZeRO-3's own linear layer and DDP's graph sum in another order
ROUNDING = 2e-5


def start(mode, images, cache, output_dir, **changes):
    values = {
        **{"model_name_or_path": "tiny", "dataset_name": images, "height": 32, "width": 64, "cache_dir": cache},
        **{"output_dir": output_dir, "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2},
        **{"logging_steps": 1, "sample_steps": 0, "report_to": "none", "save_steps": 1, "save_total_limit": 9},
        **{"ema_decay": 0.0, "resume_from_checkpoint": "latest"},
        **({"deepspeed": mode} if mode.startswith("zero") else {}),
        **changes,
    }
    call = ["references", *(part for name, value in values.items() for part in (f"--{name}", value))]
    run(1 if mode == "one" else 2, call, prepare=reference_stage.register)
    return numbers(output_dir)


@pytest.mark.parametrize("mode", ["one", "ddp", "zero2", "zero3"])
def test_the_policy_without_its_adapter_is_the_frozen_copy_while_the_adapter_learns(
    mode, image_folder, warm_cache, tmp_path
):
    lines = start(mode, image_folder, warm_cache, tmp_path / "run", use_peft="true", lora_r=4)
    assert lines[0]["policy_less_copy"] < ROUNDING  # a fresh adapter says nothing
    whole = sum(p.numel() for p in load("tiny").transformer.parameters())
    assert lines[0]["held_of_copy"] / whole == pytest.approx(0.5 if mode == "zero3" else 1.0, abs=1e-3)
    assert lines[2]["policy_less_copy"] > 1e-2
    assert all(line["off_less_copy"] < ROUNDING for line in lines)


@pytest.mark.parametrize("mode", ["one", "zero1", "zero3"])
def test_a_slow_average_that_keeps_nothing_is_the_policy(mode, image_folder, warm_cache, tmp_path):
    lines = start(mode, image_folder, warm_cache, tmp_path / "run")
    assert lines[2]["policy_less_copy"] > 1e-2
    assert all(line["policy_less_slow"] < ROUNDING for line in lines)


def test_a_slow_average_is_in_the_checkpoint(image_folder, warm_cache, tmp_path):
    start("one", image_folder, warm_cache, tmp_path / "whole", decay=0.5)
    broken = tmp_path / "broken"
    broken.mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-000002", broken / "checkpoint-000002")
    for name in ("metrics.jsonl", "samples.jsonl"):
        shutil.copy(tmp_path / "whole" / name, broken / name)
    lines = start("one", image_folder, warm_cache, broken, decay=0.5)
    assert lines[2]["policy_less_slow"] > 1e-3
    assert differences(broken, tmp_path / "whole") == []  # metrics, too


def test_the_average_moves_by_the_decay():
    """0.75 · 1 + 0.25 · 3 = 1.5."""
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(module.weight, 1.0)
    slow = SlowAverage(module)
    slow.follow({"weight": torch.full((1, 1), 3.0)}, decay=0.75)
    assert module.weight.item() == 1.5


def velocity_of(reference, base):
    generator = torch.Generator().manual_seed(0)
    x_t, embeds = torch.randn(2, 4, 8, 16, generator=generator), torch.randn(2, 3, 128, generator=generator)
    return reference.velocity(x_t, torch.tensor([0.3, 0.9]), (embeds, torch.ones(2, 3, dtype=torch.bool)))


def test_asking_leaves_no_gradient_and_the_policy_as_it_was(base):
    transformer = load(str(base)).transformer
    policy = attach(transformer, ModelConfig(model_name_or_path="tiny", lora_r=4, lora_dropout=0.5)).train()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    answer = velocity_of(AdapterOff(policy), base)
    assert not answer.requires_grad
    assert answer.dtype == torch.float32
    assert policy.training
    assert torch.equal(answer, velocity_of(FrozenCopy(load(str(base)).transformer), base))
    assert not torch.allclose(answer, velocity_of(FrozenCopy(policy), base), atol=1e-2)


def test_an_earlier_self_answers_as_it_was_and_leaves_the_policy_as_it_is(base):
    policy = attach(load(str(base)).transformer, ModelConfig(model_name_or_path="tiny", lora_r=4)).train()
    adapter = {name: p for name, p in policy.named_parameters() if "lora_B" in name}
    earlier = EarlierSelf(policy, torch.device("cpu"))
    before = velocity_of(FrozenCopy(load(str(base)).transformer), base)
    with torch.no_grad():
        for parameter in adapter.values():
            parameter.fill_(0.1)
    assert torch.equal(velocity_of(earlier, base), before)
    assert policy.training
    assert all((p == 0.1).all() for p in adapter.values())
    earlier.follow({name: p.detach() for name, p in adapter.items()}, 0.0)
    with torch.no_grad():
        for parameter in adapter.values():
            parameter.zero_()
    after = velocity_of(earlier, base)
    assert not torch.allclose(after, before, atol=1e-2)
    assert all((p == 0).all() for p in adapter.values())
