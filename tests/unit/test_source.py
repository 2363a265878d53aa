from collections import Counter

import pytest

from prx_post.data.plan import DrawPlan, MixedPlan
from prx_post.data.source import BatchSource


def test_every_sample_is_drawn_once_an_epoch_though_batches_do_not_divide_it():
    plan = DrawPlan(["square"] * 10, global_batch_size=4, seed=0, num_steps=5)
    indices = [draw.index for step in range(5) for draw in plan.draws(step)]
    assert sorted(indices[:10]) == list(range(10))
    assert sorted(indices[10:]) == list(range(10))
    assert indices[:10] != indices[10:]


def test_a_batch_is_of_one_group_and_groups_come_up_in_proportion():
    groups = ["wide"] * 75 + ["tall"] * 25
    plan = DrawPlan(groups, global_batch_size=4, seed=0, num_steps=2000)
    seen = Counter()
    for step in range(2000):
        of_step = {groups[draw.index] for draw in plan.draws(step)}
        assert len(of_step) == 1
        seen.update(of_step)
    assert seen["wide"] / 2000 == pytest.approx(0.75, abs=0.04)  # four standard deviations


def test_a_group_smaller_than_the_batch_is_repeated_evenly():
    plan = DrawPlan(["only"] * 3, global_batch_size=8, seed=0, num_steps=3)
    counts = Counter(draw.index for step in range(3) for draw in plan.draws(step))
    assert set(counts.values()) == {8}


def test_seeds_of_draws_never_repeat_but_are_the_same_in_another_run():
    plan, again = (DrawPlan([0, 0, 1, 1], global_batch_size=4, seed=5, num_steps=50) for _ in range(2))
    seeds = [draw.seed for step in range(50) for draw in plan.draws(step)]
    assert len(set(seeds)) == 200
    assert seeds == [draw.seed for step in range(50) for draw in again.draws(step)]
    other = DrawPlan([0, 0, 1, 1], global_batch_size=4, seed=6, num_steps=50)
    assert seeds[0] != other.draws(0)[0].seed


class _Encoders:
    @staticmethod
    def cleaner(prompt):
        return prompt


def micro_batches(rank, world, size, start=0, steps=6):
    plan = DrawPlan(["a"] * 7 + ["b"] * 9, global_batch_size=8, seed=3, num_steps=steps)
    source = BatchSource(
        [], None, None, _Encoders(), plan, micro_batch_size=size, num_steps=steps, rank=rank, world_size=world
    )
    source.load_state_dict({"step": start})
    return list(source._micro_batches())


@pytest.mark.parametrize(("world", "size"), [(1, 8), (2, 4), (2, 2), (4, 1), (1, 2)])
def test_the_global_batch_is_the_same_for_any_split_into_processes_and_micro_batches(world, size):
    plan = DrawPlan(["a"] * 7 + ["b"] * 9, global_batch_size=8, seed=3, num_steps=6)
    per_rank = [micro_batches(rank, world, size) for rank in range(world)]
    accumulation = 8 // (world * size)
    for step in range(6):
        drawn = [
            draw
            for micro in range(step * accumulation, (step + 1) * accumulation)
            for rank in range(world)
            for draw in per_rank[rank][micro]
        ]
        assert drawn == plan.draws(step)


class _Rows:
    @staticmethod
    def image_bytes(row):
        return b""


def test_state_says_which_steps_are_all_out_and_a_new_source_goes_on_there(monkeypatch):
    from prx_post.data.encoding import Sample

    def source(start=0):
        plan = DrawPlan(["a"] * 7, global_batch_size=4, seed=3, num_steps=5)
        samples = [Sample(i, str(i), "a", "", "") for i in range(7)]
        made = BatchSource(samples, _Rows(), None, _Encoders(), plan, micro_batch_size=2, num_steps=5)
        made.load_state_dict({"step": start})
        made._collate = lambda items: {"rows": [item["sample"].row for item in items]}
        return made

    first = source()
    batches = iter(first)
    seen = [next(batches) for _ in range(3)]  # a step is two micro-batches
    assert [batch["step"] for batch in seen] == [0, 0, 1]
    assert first.state_dict() == {"step": 1}
    seen.append(next(batches))
    assert first.state_dict() == {"step": 2}
    rest = list(source(first.state_dict()["step"]))
    assert seen + rest == list(source())


def test_a_source_restarted_at_a_step_continues_where_the_first_would():
    assert micro_batches(0, 1, 8, start=4) == micro_batches(0, 1, 8)[4:]


@pytest.mark.parametrize(("fraction", "of_second"), [(0.0, 0), (0.25, 2), (0.3, 2), (1.0, 8)])
def test_two_sets_are_mixed_in_the_same_proportion_in_every_batch(fraction, of_second):
    plan = MixedPlan(10, 6, fraction, global_batch_size=8, seed=0, num_steps=6)
    for step in range(6):
        indices = [draw.index for draw in plan.draws(step)]
        assert len(indices) == 8
        assert sum(index >= 10 for index in indices) == of_second
        assert all(index < 16 for index in indices)


def test_a_mixed_plan_is_shuffled_by_step_and_the_same_in_another_run():
    plan, again = (MixedPlan(10, 6, 0.5, global_batch_size=8, seed=0, num_steps=6) for _ in range(2))
    places = [tuple(draw.index >= 10 for draw in plan.draws(step)) for step in range(6)]
    assert len(set(places)) > 1
    assert [plan.draws(step) for step in range(6)] == [again.draws(step) for step in range(6)]
    seeds = [draw.seed for step in range(6) for draw in plan.draws(step)]
    assert len(set(seeds)) == len(seeds)
