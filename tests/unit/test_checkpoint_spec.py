import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from prx_post.base.errors import ConfigError
from prx_post.evaluation.config import CheckpointSpec
from prx_post.flow import inference_sigmas
from prx_post.model.scheduler import rescheduled


def test_a_checkpoint_may_sample_in_another_way_than_its_scheduler_says():
    spec = CheckpointSpec.parse("s=run/final?num_inference_steps=8&shift_terminal=0.3&sampler=renoise", 28, 5.0)
    assert spec.scheduler_changes == {"shift_terminal": 0.3, "sampler": "renoise"}
    scheduler = rescheduled(FlowMatchEulerDiscreteScheduler(shift=3.0), **spec.scheduler_changes)
    assert scheduler.config.stochastic_sampling
    assert inference_sigmas(scheduler, 8)[-2].item() == pytest.approx(0.3)


def test_zero_takes_a_schedulers_own_stretching_away():
    spec = CheckpointSpec.parse("s=run?shift_terminal=0&sampler=euler", 8, 1.0)
    student = FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.3, stochastic_sampling=True)
    plain = rescheduled(student, **spec.scheduler_changes)
    assert inference_sigmas(plain, 8)[-2] < 0.01
    assert not plain.config.stochastic_sampling


def test_without_changes_the_scheduler_is_the_checkpoints_own():
    spec = CheckpointSpec.parse("s=run", 8, 1.0)
    student = FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.3, stochastic_sampling=True)
    assert spec.scheduler_changes == {}
    assert dict(rescheduled(student).config) == dict(student.config)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("sampler=sde", "sampler of checkpoint s is 'sde'"),
        ("shift_terminal=1", "shift_terminal is 1.0, but must be from"),
    ],
)
def test_what_cannot_be_is_named(query, message):
    with pytest.raises(ConfigError, match=message):
        CheckpointSpec.parse(f"s=run?{query}", 8, 1.0)


def test_cps_has_a_noise_level_and_no_other_sampler_has_one():
    spec = CheckpointSpec.parse("s=run?sampler=cps&noise_level=0.3", 8, 1.0)
    assert (spec.sampler, spec.noise_level) == ("cps", 0.3)
    assert CheckpointSpec.parse("s=run?sampler=cps", 8, 1.0).noise_level == 0.5
    assert CheckpointSpec.parse("s=run?sampler=renoise", 8, 1.0).noise_level is None
    with pytest.raises(ConfigError, match="noise_level is 0.3, but must be null because sampler is 'renoise'"):
        CheckpointSpec.parse("s=run?sampler=renoise&noise_level=0.3", 8, 1.0)
    with pytest.raises(ConfigError, match=r"noise_level is 1.5, but must be between 0 and 1"):
        CheckpointSpec.parse("s=run?sampler=cps&noise_level=1.5", 8, 1.0)
