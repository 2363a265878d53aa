"""What batches of pairs may hold besides images: an image's own noise, a pair's own beta, the reference's errors."""

from types import SimpleNamespace

import datasets
import pytest
import torch

from prx_post.base.ranks import ALONE
from prx_post.data.buckets import Buckets
from prx_post.data.config import PreferenceConfig
from prx_post.data.encoders import Encoders
from prx_post.data.pairs import PairSource, prepare_pairs, read_pairs
from prx_post.data.plan import DrawPlan
from prx_post.data.rows import DataError
from prx_post.data.source import timestep_and_noise
from prx_post.flow import interpolate, velocity_target
from prx_post.model.checkpoint import load, open_pipeline
from prx_post.model.config import ModelConfig
from prx_post.model.frozen import AdapterOff, FrozenCopy
from prx_post.model.lora import attach
from prx_post.model.text import PromptCleaner
from prx_post.stages.dpo.config import DPOConfig
from prx_post.stages.dpo.objective import PairObjective, pair_errors
from prx_post.stages.dpo.references import ReferenceErrors
from tests.pairing import number_pairs

SIZE = (32, 64)


def write_made(folder, count=4, **columns):
    """As make-pairs writes them: with scores and seeds."""
    pairs = number_pairs(count)
    rows = {
        "prompt": [pair.prompt for pair in pairs],
        "chosen": [{"bytes": pair.chosen, "path": None} for pair in pairs],
        "rejected": [{"bytes": pair.rejected, "path": None} for pair in pairs],
        "chosen_score": [1.0, 2.0, 4.0, 1.0][:count],
        "rejected_score": [0.0] * count,
        "chosen_seed": list(range(10, 10 + count)),
        "rejected_seed": list(range(50, 50 + count)),
        **columns,
    }
    rows = {name: values for name, values in rows.items() if values is not None}
    folder.mkdir()
    set_ = datasets.Dataset.from_dict(rows)
    for name in ("chosen", "rejected"):
        set_ = set_.cast_column(name, datasets.Image())
    set_.to_parquet(str(folder / "train.parquet"))
    return folder


def opened(folder, cache, out, size=SIZE, draws=None, columns=None, **needs):
    config = PreferenceConfig(
        dataset_name=str(folder), height=size[0], width=size[1], cache_dir=str(cache), **(columns or {})
    )
    pipeline = open_pipeline("tiny")
    encoders = Encoders(pipeline, PromptCleaner(False), torch.device("cpu"), torch.float32)
    out.mkdir(exist_ok=True)
    pairs, encoded = prepare_pairs(
        config, read_pairs(config), encoders, Buckets(pipeline, *size), out, [], ALONE, **needs
    )
    plan = DrawPlan([pair.chosen.size for pair in pairs], 4, 0, 8, draws)

    def source(**options):
        return PairSource(
            *([pair.chosen for pair in pairs], None, encoded, encoders, plan, 4),
            randomness=timestep_and_noise,
            pairs=pairs,
            **options,
        )

    return pairs, plan, source, config


def test_each_image_may_have_the_noise_that_it_was_generated_from(warm_cache, tmp_path):
    _, _, source, _ = opened(write_made(tmp_path / "set"), warm_cache, tmp_path / "run")
    (batch,) = source(own_noise=True).batches(3)
    shape = batch["latents"].shape[1:]
    for i, number in enumerate(batch["rows"]):
        for name, seed in (("noise", 10 + number), ("rejected_noise", 50 + number)):
            expected = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
            assert torch.equal(batch[name][i], expected)
    (fresh,) = source().batches(3)
    assert torch.equal(batch["t"], fresh["t"])
    assert "rejected_noise" not in fresh


def test_the_objective_takes_each_images_own_noise(warm_cache, tmp_path):
    """A policy that knows the velocity of every image along its own noise has no error there."""
    _, _, source, _ = opened(write_made(tmp_path / "set"), warm_cache, tmp_path / "run")
    (batch,) = source(own_noise=True).batches(0)
    x0 = torch.cat([batch["latents"], batch["rejected"]])
    noise = torch.cat([batch["noise"], batch["rejected_noise"]])
    asked = {}

    class Knows(torch.nn.Module):
        def forward(self, hidden_states, **others):
            asked["x_t"] = hidden_states
            return (velocity_target(x0, noise),)

    _, metrics = PairObjective(Knows(), 1e-4, None, beta=1.0)(batch)
    assert metrics["win_change"].item() == metrics["lose_change"].item() == 0
    assert torch.allclose(asked["x_t"], interpolate(x0, noise, torch.cat([batch["t"]] * 2)))


def test_beta_grows_with_the_gap_of_a_pair(warm_cache, tmp_path):
    """Gaps 1, 2, 4, 1, mean 2: square roots of 0.5, 1, 2, 0.5."""
    _, _, source, _ = opened(write_made(tmp_path / "set"), warm_cache, tmp_path / "run")
    (batch,) = source(beta_by_gap=0.5).batches(0)
    by_row = dict(zip(batch["rows"], batch["beta_scale"].tolist(), strict=True))
    assert by_row == pytest.approx({0: 0.707107, 1: 1.0, 2: 1.414214, 3: 0.707107})


@pytest.mark.parametrize(
    ("columns", "size", "needs", "message"),
    [
        ({"chosen_seed": None}, SIZE, {"own_noise": True}, "pair 0 of .* has no chosen_seed and rejected_s"),
        ({}, (64, 64), {"own_noise": True}, "or its images are not of the size at which they are trained"),
        ({"rejected_score": None}, SIZE, {"by_gap": True}, "pair 0 of .* no chosen_score above rejected"),
        (
            {"chosen_score": [1.0, 0.0, 1.0, 1.0]},
            SIZE,
            {"by_gap": True},
            "beta_by_gap is set, but pair 1",
        ),
    ],
)
def test_what_a_loss_needs_and_the_set_lacks_is_said(tmp_path, columns, size, needs, message):
    with pytest.raises(DataError, match=message):
        opened(write_made(tmp_path / "set", **columns), tmp_path / "cache", tmp_path / "run", size, **needs)
    assert not list((tmp_path / "cache").glob("latents/*/*.safetensors"))  # before anything is encoded


def test_seeds_and_scores_go_with_their_images_when_the_columns_are_exchanged(warm_cache, tmp_path):
    folder = write_made(tmp_path / "set", chosen_score=[1.0] * 4, rejected_score=[4.0] * 4)
    exchanged = {"chosen_column": "rejected", "rejected_column": "chosen"}
    pairs, *_ = opened(folder, warm_cache, tmp_path / "run", columns=exchanged)
    assert [pair.seeds for pair in pairs] == [(50, 10), (51, 11), (52, 12), (53, 13)]
    assert {pair.gap for pair in pairs} == {3.0}


def test_scores_that_are_no_numbers_are_named(tmp_path):
    folder = write_made(tmp_path / "set", chosen_score=["good"] * 4)
    with pytest.raises(DataError, match="the column 'chosen_score' holds string, but must hold numbers"):
        read_pairs(PreferenceConfig(dataset_name=str(folder)))


def test_a_pair_has_as_many_draws_as_are_fixed_and_takes_them_in_turn():
    plan = DrawPlan(["all"] * 4, 4, 0, 6, draws_per_sample=2)
    steps = [{(draw.index, draw.seed) for draw in plan.draws(step, range(4))} for step in range(6)]
    assert steps[0] == steps[2] == steps[4]
    assert steps[1] == steps[3] == steps[5]
    assert not steps[0] & steps[1]
    assert {index for index, _ in steps[0]} == {0, 1, 2, 3}
    assert (2, plan.fixed_draw(2, 1).seed) in steps[1]


def reference_errors(source, plan, cache_dir, asked, draws=2):
    config = DPOConfig(output_dir="unused", max_steps=8, precompute_ref_errors=draws, per_device_train_batch_size=4)

    def transformer(pipeline, dtype):
        asked.append(pipeline.source)
        return load("tiny").transformer.to(dtype)

    run = SimpleNamespace(
        ranks=ALONE, device=torch.device("cpu"), transformer=transformer, place=lambda module: module, config=config
    )
    errors = ReferenceErrors(run, config, open_pipeline("tiny"), source, plan, torch.float32, cache_dir)
    return errors.compute()


def test_three_references_give_the_same_losses_and_gradients_for_the_same_draws(warm_cache, tmp_path):
    """The policy without its adapter, a copy, and errors that were computed before; the adapter has moved."""
    _, plan, source, _ = opened(write_made(tmp_path / "set"), warm_cache, tmp_path / "run", draws=2)
    asked = []
    errors = reference_errors(source(), plan, tmp_path / "cache", asked)
    assert len(errors) == 8
    results = []
    for kind in ("off", "copy", "before"):
        torch.manual_seed(1)
        policy = attach(load("tiny").transformer, ModelConfig(model_name_or_path="tiny", use_peft=True, lora_r=4))
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.02 * torch.randn_like(parameter))
        copy = FrozenCopy(load("tiny").transformer)
        reference = {"off": AdapterOff(policy), "copy": copy, "before": None}[kind]
        (batch,) = source(ref_errors=errors if kind == "before" else None).batches(3)
        loss, metrics = PairObjective(policy, 1e-4, reference, beta=500.0)(batch)
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        results.append((loss.item(), metrics["win_change"].item(), gradients))
    assert abs(results[0][0] - 0.6931) > 0.01
    for loss, change, gradients in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-4)
        assert change == pytest.approx(results[0][1], rel=1e-3, abs=1e-6)
        assert torch.allclose(gradients, results[0][2], rtol=1e-3, atol=1e-5)


def test_errors_do_not_depend_on_how_draws_fall_into_batches(warm_cache, tmp_path):
    """Three draws a pair in batches of four: a pair's draws are computed in two."""
    _, plan, source, _ = opened(write_made(tmp_path / "set"), warm_cache, tmp_path / "run", draws=3)
    errors = reference_errors(source(), plan, tmp_path / "cache", [], draws=3)
    assert len(errors) == 12
    copy = FrozenCopy(load("tiny").transformer)
    for index in range(4):
        for number in range(3):
            draw = plan.fixed_draw(index, number)
            own = pair_errors(copy.velocity, source().batch([draw], 0))[0].tolist()
            assert errors[index, draw.seed] == pytest.approx(own, rel=1e-4)


def test_errors_of_the_reference_are_kept_and_not_computed_again(warm_cache, tmp_path):
    _, plan, source, _ = opened(write_made(tmp_path / "set"), warm_cache, tmp_path / "run", draws=2)
    asked = []
    first = reference_errors(source(), plan, tmp_path / "cache", asked)
    second = reference_errors(source(), plan, tmp_path / "cache", asked)
    assert first == second
    assert len(asked) == 1
