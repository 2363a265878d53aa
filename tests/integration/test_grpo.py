"""`prx-post grpo` from its command line: every method, resuming, and what rollouts may not depend on."""

import json

import pytest
import torch

from prx_post.cli import main
from prx_post.engine.checkpointing import open_checkpoint
from prx_post.model.checkpoint import open_pipeline
from tests.faults import differences, numbers, stopped_after
from tests.rolling import LORA, grpo_arguments

FORWARD = {"rollout_sampler": "ode", "epsilon": 1e-2}
METHODS = {
    "grpo": {"beta": 0.01},
    "guard": {"normalise_ratio": "true", "rollout_sampler": "sde"},
    "dppo": {"max_divergence": 1e-6, "window": "subset", "window_size": 1},
    "climbing": {"reward_funcs": ["judge_graded"], "last_step_reward_weight": 0.1, "last_step_reward_margin": -0.1},
    "nft": {"method": "nft", "rollout_sampler": "ode", "noises_per_image": 2},
    "dgpo": {"method": "dgpo", **FORWARD, "beta": 0.01, "sync_ref_model": "true", "ref_model_sync_steps": 4},
    "awm": {"method": "awm", **FORWARD, "awm_power": 0.25},
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": str(n), "wanted": n}) + "\n" for n in range(100, 106)))
    return path


@pytest.fixture(scope="module")
def whole(prompts, warm_cache, tmp_path_factory):
    """A finished run of each method, made once."""
    folder, made = tmp_path_factory.mktemp("whole"), {}

    def of(name):
        if name not in made:
            assert main(grpo_arguments(prompts, warm_cache, folder / name, **METHODS[name])) == 0
            made[name] = folder / name
        return made[name]

    return of


@pytest.mark.parametrize("name", METHODS)
def test_a_method_runs_resumes_inside_a_rollout_to_the_bit_and_begins_at_ratio_one(
    whole, prompts, warm_cache, tmp_path, name
):
    lines = numbers(whole(name))
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["step"] for line in lines if "zero_std_ratio" in line] == [1, 5]
    if name != "nft":
        # the rollout's first step: nothing has moved since
        exact = 0 if name in ("grpo", "guard", "dppo", "climbing") else 1e-6
        assert lines[0]["log_ratio_abs"] == pytest.approx(0, abs=exact)
        assert lines[1]["log_ratio_abs"] > 1e-7
    broken = stopped_after(whole(name), 6, tmp_path / "broken")
    assert main(grpo_arguments(prompts, warm_cache, broken, **METHODS[name])) == 0
    assert differences(broken, whole(name)) == []


def test_the_card_says_what_was_rewarded(whole):
    card = (whole("grpo") / "final" / "README.md").read_text()
    assert "its own images of the 6 prompts of prompts.jsonl, rewarded by jpeg_compressibility" in card


def test_a_checkpoint_holds_whole_groups_and_the_trained_steps_alone(whole):
    saved = open_checkpoint(whole("dppo") / "checkpoint-000002")
    tensors = saved.joined("source")
    assert sorted(tensors["current/places"].tolist()) == list(range(16))
    assert tensors["current/x_t"].shape == (16, 1, 4, 8, 16)  # one of the two random steps
    advantages = tensors["current/advantages"].view(4, 4)
    assert advantages.sum(1).abs().max() < 1e-5


def test_recorded_rows_give_the_losses_of_the_online_run(whole):
    """A checkpoint's rows and weights, without the stage that made them: the loss of the step that follows."""
    from prx_post.model.checkpoint import load
    from prx_post.objectives.grpo import clipped_policy_loss
    from prx_post.sampling import cps_step

    run = whole("grpo")
    saved = open_checkpoint(run / "checkpoint-000002")
    rows, network = saved.joined("source"), load("tiny").transformer
    weights = dict(saved.tensors().under("model"))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(weights[f"policy.{name}"])
    from prx_post.data.encoders import Encoders
    from prx_post.flow import inference_sigmas
    from prx_post.model.checkpoint import open_pipeline
    from prx_post.model.text import PromptCleaner, pad_embeddings

    pipeline = open_pipeline("tiny", None)
    encoders = Encoders(pipeline, PromptCleaner(False), torch.device("cpu"), torch.float32)
    described = [json.loads(line)["prompt"] for line in (run / "samples.jsonl").read_text().splitlines()]
    from prx_post.data.plan import DrawPlan

    draws = DrawPlan(["all"] * len(described), 4, 0, 3).draws(0, range(4))
    texts = [described[draws[g].index] for g in (0, 1) for _ in range(4)]  # step 3 begins the second pass
    embeds, mask = pad_embeddings([encoders.prompts(text) for text in texts])
    sigmas, losses = inference_sigmas(pipeline.load_scheduler(), 3), []
    for step in (0, 1):
        of_step = {name: rows[f"current/{name}"][:8, step] for name in ("x_t", "x_next", "log_prob")}
        level = sigmas[step].expand(8)
        with torch.no_grad():
            velocity = network(of_step["x_t"], level, embeds, mask, return_dict=False)[0]
        made = cps_step(of_step["x_t"], velocity, level, sigmas[step + 1], noise_level=0.8, x_next=of_step["x_next"])
        advantages, weight = (rows[f"current/{name}"][:8] for name in ("advantages", "weight"))
        losses.append(clipped_policy_loss(made.log_prob, of_step["log_prob"], advantages, epsilon=1e-3, weight=weight))
    logged = numbers(run)[2]
    policy_loss = logged["loss"] - 0.01 * logged["divergence"]  # beta; every group teaches, so that weights are 1
    assert sum(loss.item() for loss, _ in losses) / 2 == pytest.approx(policy_loss, rel=1e-4, abs=1e-7)
    assert sum(metrics["ratio"].item() for _, metrics in losses) / 2 == pytest.approx(logged["ratio"], abs=1e-6)
    assert logged["ratio"] != pytest.approx(1, abs=1e-7)


def test_an_evaluation_does_not_reach_the_next_rollout(whole, prompts, warm_cache, tmp_path):
    """The averaged weights are swapped in for it, and out again."""
    changes = {"eval_steps": 2, "eval_prompts_file": prompts, "eval_num_prompts": 2, "eval_rewards": "ocr"}
    arguments = grpo_arguments(prompts, warm_cache, tmp_path / "run", **METHODS["grpo"], **changes)
    assert main(arguments) == 0
    assert numbers(tmp_path / "run") == numbers(whole("grpo"))


@pytest.mark.parametrize("mode", ["off", "rollout"])
def test_waiting_for_scores_changes_nothing_and_a_rollout_ahead_lags_and_says_so(
    whole, prompts, warm_cache, tmp_path, mode
):
    changes = {**METHODS["grpo"], "async_rewards": mode}
    assert main(grpo_arguments(prompts, warm_cache, tmp_path / "run", **changes)) == 0
    ours, theirs = numbers(tmp_path / "run"), numbers(whole("grpo"))
    lags = [line["policy_lag"] for line in ours if "policy_lag" in line]
    if mode == "off":
        assert ours == theirs
        assert lags == [0, 0]
        return
    assert lags == [0, 4]
    assert ours[:4] == theirs[:4]
    assert ours[4]["ratio"] != pytest.approx(1, abs=1e-7)  # of images that the policy of four steps ago generated
    broken = stopped_after(tmp_path / "run", 2, tmp_path / "broken")
    assert main(grpo_arguments(prompts, warm_cache, broken, **changes)) == 0
    assert differences(broken, tmp_path / "run") == []


def test_pref_grpo_rewards_win_rates_beside_a_pointwise_reward(prompts, warm_cache, tmp_path):
    changes = {
        **{"method": "pref_grpo", "pairwise_reward": "ocr_graded", "pairwise_temperature": 0, "pairwise_weight": 0.7},
        **{"reward_weights": 0.3, "max_steps": 4},
    }
    assert main(grpo_arguments(prompts, warm_cache, tmp_path / "run", **changes)) == 0
    line = numbers(tmp_path / "run")[0]
    assert line["reward/win_rate"] == pytest.approx(0.5)
    assert line["reward_std/win_rate"] > 0
    assert line["log_ratio_abs"] == 0


def test_a_judge_that_prefers_the_first_image_teaches_nothing(prompts, warm_cache, tmp_path, capsys):
    from tests.judging import answer, judging

    with judging() as judge:
        judge.reply = lambda first, second, question: answer("<answer>Image 1</answer>")
        changes = {
            **{"method": "pref_grpo", "reward_funcs": None, "judge_url": judge.url, "judge_model": "stub"},
            **{"judge_cache_dir": tmp_path / "answers"},
        }
        assert main(grpo_arguments(prompts, warm_cache, tmp_path / "run", **changes)) == 2
        assert len(judge.asked) == 4 * 6 * 2  # four groups, six pairs of four images, both orders
    said = capsys.readouterr().err
    assert "no group has images that score differently by win_rate" in said
    assert "score is 0.5" in said


def test_a_judge_that_goes_down_leaves_the_state_and_resuming_continues(prompts, warm_cache, tmp_path, capsys):
    from tests.judging import answer, error, judging

    def later(first, second, question):
        """Prefers the image whose data come later in the alphabet, whichever is shown first."""
        parts = question["messages"][0]["content"]
        one, other = (part["image_url"]["url"] for part in parts if part["type"] == "image_url")
        return answer(f"<answer>{'Tie' if one == other else f'Image {1 if one > other else 2}'}</answer>")

    changes = {
        **{"method": "pref_grpo", "reward_funcs": None, "judge_model": "stub", "judge_cache_dir": tmp_path / "answers"},
        **{"judge_max_attempts": 1, "save_steps": 0},
    }
    run = tmp_path / "run"
    with judging() as judge:
        judge.reply = lambda *asked: later(*asked) if len(judge.asked) <= 60 else error(500, "down")
        changes["judge_url"] = judge.url
        assert main(grpo_arguments(prompts, warm_cache, run, **changes)) == 2
        assert "500" in capsys.readouterr().err
        assert [p.name for p in run.glob("checkpoint-*")] == [
            "checkpoint-000004"
        ]  # of the first rollout, of 48 answers
        judge.reply = later
        assert main(grpo_arguments(prompts, warm_cache, run, **changes)) == 0
    assert [line["step"] for line in numbers(run)] == list(range(1, 9))


def test_a_columns_reward_reads_the_prompts_other_keys(prompts, warm_cache, tmp_path, capsys):
    reward = tmp_path / "mine.py"
    reward.write_text(
        "import random\n"
        "def score(prompts, completions, wanted):\n"
        "    assert [str(w) for w in wanted] == prompts\n"
        "    return [float(sum(image.resize((1, 1)).getpixel((0, 0)))) for image in completions]\n"
    )
    changes = {"reward_funcs": f"{reward}:score", "max_steps": 4}
    assert main(grpo_arguments(prompts, warm_cache, tmp_path / "run", **changes)) == 0
    plain = tmp_path / "plain.txt"
    plain.write_text("100\n101\n")
    assert main(grpo_arguments(plain, warm_cache, tmp_path / "other", **changes)) == 2
    assert "the reward score reads wanted, which prompts_file lacks for the prompt '100'" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_lora_trains_and_resumes_with_its_lagged_policy(prompts, warm_cache, tmp_path):
    changes = {"method": "dgpo", **FORWARD, **LORA}
    assert main(grpo_arguments(prompts, warm_cache, tmp_path / "whole", **changes)) == 0
    broken = stopped_after(tmp_path / "whole", 6, tmp_path / "broken")
    assert main(grpo_arguments(prompts, warm_cache, broken, **changes)) == 0
    assert differences(broken, tmp_path / "whole") == []
    assert (tmp_path / "whole" / "final-adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("changes", [{"noise_level": 0.5}, {"shift_terminal": 0.2}, {"max_divergence": 1e-6}])
def test_a_rollout_is_not_continued_with_settings_that_its_rows_mean_nothing_under(
    whole, prompts, warm_cache, tmp_path, capsys, changes
):
    stopped_after(whole("grpo"), 6, tmp_path)
    given = {**METHODS["grpo"], **changes}
    assert main(grpo_arguments(prompts, warm_cache, tmp_path, **given)) == 2
    assert "rollout was generated with another grid, window, noise level or trust region" in capsys.readouterr().err


def test_other_rewards_on_resuming_are_named(whole, prompts, warm_cache, tmp_path, capsys):
    stopped_after(whole("grpo"), 6, tmp_path)
    assert main(grpo_arguments(prompts, warm_cache, tmp_path, **METHODS["grpo"], reward_funcs="ocr_probability")) == 2
    assert "the rewards are ocr probability" in capsys.readouterr().err


def test_a_rollout_that_was_gone_through_is_not_saved(whole):
    assert open_checkpoint(whole("grpo") / "checkpoint-000004").joined("source") == {}


def test_dpo_given_the_settings_of_grpo_runs_it(prompts, warm_cache, tmp_path, capsys):
    arguments = grpo_arguments(prompts, warm_cache, tmp_path / "run", max_steps=1)
    assert main(["dpo", *arguments[1:]]) == 0
    assert "the settings are those of prx-post grpo, which is run" in capsys.readouterr().out
    assert open_checkpoint(tmp_path / "run" / "checkpoint-000001").info["stage"] == "grpo"


def test_the_emitted_scheduler_steps_as_rollouts_do(prompts, warm_cache, tmp_path, capsys):
    changes = {"rollout_sampler": "renoise", "max_steps": 1}
    assert main(grpo_arguments(prompts, warm_cache, tmp_path / "as-it-is", **changes)) == 0
    assert "the emitted sampler does not re-noise, and that of rollouts does" in capsys.readouterr().out
    assert main(grpo_arguments(prompts, warm_cache, tmp_path / "changed", sampler="renoise", **changes)) == 0
    assert "warning: the emitted sampler" not in capsys.readouterr().out
    emitted = [open_pipeline(str(tmp_path / name / "final")).sampler for name in ("as-it-is", "changed")]
    assert emitted == ["euler", "renoise"]
