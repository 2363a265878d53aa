from collections import Counter

import pytest
import torch

from prx_post.data.plan import DrawPlan, MixedPlan
from prx_post.data.scan import Sample
from prx_post.data.source import LatentSource


def test_every_sample_is_drawn_once_an_epoch_though_batches_do_not_divide_it():
    plan = DrawPlan(["square"] * 10, global_batch_size=4, seed=0, num_steps=5)
    indices = [draw.index for step in range(5) for draw in plan.draws(step, range(plan.global_batch_size))]
    assert sorted(indices[:10]) == list(range(10))
    assert sorted(indices[10:]) == list(range(10))
    assert indices[:10] != indices[10:]


def test_a_batch_is_of_one_group_and_groups_come_up_in_proportion():
    groups = ["wide"] * 75 + ["tall"] * 25
    plan = DrawPlan(groups, global_batch_size=4, seed=0, num_steps=2000)
    seen = Counter()
    for step in range(2000):
        of_step = {groups[draw.index] for draw in plan.draws(step, range(plan.global_batch_size))}
        assert len(of_step) == 1
        seen.update(of_step)
    assert seen["wide"] / 2000 == pytest.approx(0.75, abs=0.04)  # four standard deviations


def test_a_group_smaller_than_the_batch_is_repeated_evenly():
    plan = DrawPlan(["only"] * 3, global_batch_size=8, seed=0, num_steps=3)
    counts = Counter(draw.index for step in range(3) for draw in plan.draws(step, range(plan.global_batch_size)))
    assert set(counts.values()) == {8}


def test_seeds_of_draws_never_repeat_but_are_the_same_in_another_run():
    plan, again = (DrawPlan([0, 0, 1, 1], global_batch_size=4, seed=5, num_steps=50) for _ in range(2))
    seeds = [draw.seed for step in range(50) for draw in plan.draws(step, range(plan.global_batch_size))]
    assert len(set(seeds)) == 200
    assert seeds == [draw.seed for step in range(50) for draw in again.draws(step, range(again.global_batch_size))]
    other = DrawPlan([0, 0, 1, 1], global_batch_size=4, seed=6, num_steps=50)
    assert seeds[0] != other.draws(0, [0])[0].seed


class _Encoders:
    @staticmethod
    def cleaner(prompt):
        return prompt

    @staticmethod
    def latents(data, size):
        return torch.full((1, 2, 2), float(data))

    @staticmethod
    def prompts(prompt):
        return torch.zeros(1, 3)


class _Rows:
    @staticmethod
    def image_bytes(row):
        return row


def source(rank=0, world=1, size=8, **changes):
    """16 samples, of two sizes; latents are filled with the row's number."""
    groups = ["a"] * 7 + ["b"] * 9
    plan = DrawPlan(groups, global_batch_size=8, seed=3, num_steps=6)
    samples = [Sample(i, str(i), group, "", "") for i, group in enumerate(groups)]
    return LatentSource(
        *(samples, _Rows(), None, _Encoders(), plan),
        **{"micro_batch_size": size, "rank": rank, "world_size": world, **changes},
    )


@pytest.mark.parametrize(("world", "size"), [(1, 8), (2, 4), (2, 2), (4, 1), (1, 2)])
def test_the_global_batch_is_the_same_for_any_split_into_processes_and_micro_batches(world, size):
    for step in range(6):
        per_rank = [list(source(rank, world, size).batches(step)) for rank in range(world)]
        rows = [row for micro in zip(*per_rank, strict=True) for batch in micro for row in batch["rows"]]
        seeds = [seed for micro in zip(*per_rank, strict=True) for batch in micro for seed in batch["seeds"]]
        (whole,) = source().batches(step)
        assert rows == whole["rows"]
        assert seeds == whole["seeds"]


def test_a_step_is_a_function_of_its_number_alone():
    made = source(size=4)
    first = [batch["rows"] for batch in made.batches(4)]
    list(made.batches(0))
    assert [batch["rows"] for batch in made.batches(4)] == first
    assert [batch["rows"] for batch in source(size=4).batches(4)] == first


def test_a_rank_makes_no_draws_but_its_own(monkeypatch):
    asked = []
    draws = DrawPlan.draws

    def spy(self, step, positions):
        asked.extend(positions)
        return draws(self, step, positions)

    monkeypatch.setattr(DrawPlan, "draws", spy)
    list(source(rank=1, world=2, size=2).batches(0))
    assert asked == [2, 3, 6, 7]


def test_a_batch_holds_what_is_random_about_each_sample_by_its_own_seed():
    def randomness(draw, shape, step):
        return {"noise": torch.full(tuple(shape), float(draw.seed % 1000)), "t": torch.tensor(step / 10)}

    (batch,) = source(randomness=randomness).batches(3)
    assert batch["latents"][:, 0, 0, 0].tolist() == [float(row) for row in batch["rows"]]
    assert batch["noise"][:, 0, 1, 1].tolist() == [float(seed % 1000) for seed in batch["seeds"]]
    assert batch["t"].tolist() == pytest.approx([0.3] * 8)
    assert batch["step"] == 3


def test_seeds_use_32_bits_all_of_which_torchs_generator_takes():
    """Its CPU generator drops the upper half of 64: two seeds that differ there alone gave the same noise."""
    seeds = [seed for batch in source().batches(0) for seed in batch["seeds"]]
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert max(seeds) > 2**30
    one, other = (torch.randn(4, generator=torch.Generator().manual_seed(s)) for s in (5, 5 + 2**32))
    assert torch.equal(one, other)


@pytest.mark.parametrize(("fraction", "of_second"), [(0.0, 0), (0.25, 2), (0.3, 2), (1.0, 8)])
def test_two_sets_are_mixed_in_the_same_proportion_in_every_batch(fraction, of_second):
    plan = MixedPlan(10, 6, fraction, global_batch_size=8, seed=0, num_steps=6)
    for step in range(6):
        indices = [draw.index for draw in plan.draws(step, range(plan.global_batch_size))]
        assert len(indices) == 8
        assert sum(index >= 10 for index in indices) == of_second
        assert all(index < 16 for index in indices)


def test_a_mixed_plan_is_shuffled_by_step_and_the_same_in_another_run():
    plan, again = (MixedPlan(10, 6, 0.5, global_batch_size=8, seed=0, num_steps=6) for _ in range(2))
    places = [tuple(draw.index >= 10 for draw in plan.draws(step, range(plan.global_batch_size))) for step in range(6)]
    assert len(set(places)) > 1
    assert [plan.draws(step, range(plan.global_batch_size)) for step in range(6)] == [
        again.draws(step, range(again.global_batch_size)) for step in range(6)
    ]
    seeds = [draw.seed for step in range(6) for draw in plan.draws(step, range(plan.global_batch_size))]
    assert len(set(seeds)) == len(seeds)
