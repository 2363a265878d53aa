"""`prx-post distill` on the embedded base, a few steps at a time."""

import json
import re
import shutil

import pytest
import torch
from diffusers import PRXPipeline
from safetensors.torch import load_file

from prx_post.cli import main
from prx_post.engine.checkpointing import open_checkpoint
from prx_post.engine.signals import StopTraining
from prx_post.evaluation import monitor
from prx_post.flow import inference_sigmas, seeded_noise
from prx_post.model.checkpoint import open_pipeline
from prx_post.stages.distill.pipelines import student_scheduler
from tests.distilling import BY_LEVEL, PROMPTS, arguments, settings
from tests.faults import weights
from tests.running import train_distill as train


def metrics(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Recorder:
    """What stock PRXPipeline asks of its transformer."""

    def __init__(self, pipe) -> None:
        self.timesteps: list[float] = []
        self.batch_sizes: list[int] = []
        pipe.transformer.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs) -> None:
        self.timesteps.append(float(kwargs["timestep"][0]))
        self.batch_sizes.append(kwargs["hidden_states"].shape[0])


def draw(pipe, steps):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        *("472",),
        height=32,
        width=64,
        num_inference_steps=steps,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        use_resolution_binning=False,
        output_type="latent",
    ).images


@pytest.mark.parametrize("steps", [8, 4])
def test_the_stock_pipeline_visits_exactly_the_levels_of_training_and_none_is_idle(
    prompts_file, warm_cache, tmp_path, steps
):
    changes = {"num_inference_steps": steps, "max_steps": 1, "eval_num_inference_steps": [steps]}
    final = train(*settings(prompts_file, warm_cache, tmp_path / "run", **changes))
    pipe = PRXPipeline.from_pretrained(final)
    recorder = Recorder(pipe)
    draw(pipe, steps)
    trained = student_scheduler(open_pipeline("tiny"), settings(prompts_file, warm_cache, tmp_path, **changes)[2])[1]
    assert recorder.timesteps == pytest.approx(trained[:-1].tolist(), abs=1e-6)
    assert recorder.batch_sizes == [1] * steps  # no guidance
    assert trained[-2].item() == pytest.approx(0.3)
    assert (-trained.diff()).min() > 0.03
    card = (final / "README.md").read_text()
    assert f"num_inference_steps={steps}, guidance_scale=1.0" in card
    # it keeps what it needs at inference and nothing of the discriminator
    assert {p.name for p in final.iterdir()} == {
        *(
            "README.md",
            "inference.json",
            "model_index.json",
            "scheduler",
            "text_encoder",
            "tokenizer",
            "transformer",
            "vae",
        )
    }


def test_the_teachers_own_eight_step_grid_would_waste_its_last_step():
    sigmas = inference_sigmas(open_pipeline("tiny").load_scheduler(), 8)
    assert sigmas[-2] < 0.01


def test_every_step_of_a_renoising_sampler_has_noise_of_its_own():
    from prx_post.model.checkpoint import load
    from prx_post.model.sampler import build_sampler

    sampler = build_sampler(load("tiny"), (32, 64), 4, 1.0, torch.device("cpu"))
    drawn = [seeded_noise([7], sampler.latent_shape), *(sampler.fresh_noise([7], step) for step in (1, 2, 3))]
    drawn.append(sampler.fresh_noise([8], 1))
    for i, one in enumerate(drawn):
        assert all((one - other).std() > 1 for other in drawn[:i])  # independent normals differ by sqrt(2)


@pytest.mark.parametrize("sampler", ["euler", "renoise"])
def test_our_sampler_draws_what_the_stock_pipeline_draws_from_a_student(prompts_file, warm_cache, tmp_path, sampler):
    from prx_post.data.encoders import Encoders
    from prx_post.model.checkpoint import load
    from prx_post.model.sampler import build_sampler
    from prx_post.model.text import PromptCleaner

    final = train(*settings(prompts_file, warm_cache, tmp_path / "run", max_steps=1, sampler=sampler, method=["ladd"]))
    checkpoint = load(str(final))
    assert checkpoint.scheduler.config.stochastic_sampling == (sampler == "renoise")
    cpu = torch.device("cpu")
    encoders = Encoders(checkpoint.pipeline, PromptCleaner(), cpu, torch.float32)
    ours = build_sampler(checkpoint, (32, 64), 4, 1.0, cpu)
    latents = ours.latents([encoders.prompts("472")], encoders.prompts(""), [0])
    pipe = PRXPipeline.from_pretrained(final)
    if sampler == "renoise":  # the pipeline takes its fresh noise from torch's global generator; hand it ours
        fresh = iter([ours.fresh_noise([0], step) for step in (1, 2, 3)])
        from diffusers.schedulers import scheduling_flow_match_euler_discrete as module

        original = module.randn_tensor
        module.randn_tensor = lambda *_, **__: next(fresh, torch.zeros_like(latents))
        try:
            theirs = draw(pipe, 4)
        finally:
            module.randn_tensor = original
    else:
        theirs = draw(pipe, 4)
    assert (latents - theirs).abs().max().item() < 2e-4  # see test_pipeline.py on rounding
    assert theirs.std() > 0.3


METHODS = [
    {"method": ["trajectory"]},
    {"method": ["ladd"], "discriminator_warmup_steps": 1, "discriminator_steps_per_generator": 2, "r1_weight": 1.0},
    {"method": ["dmd2", "ladd"]},
    {"method": ["trajectory", "ladd"], "use_peft": True, "lora_r": 4, "lora_dropout": 0.2},
    {"method": ["dmd2"], "use_peft": True, "lora_r": 4, "velocity_weight": 0.1},
    # the heads have what AdamW takes beside Muon; of a full student Muon would take 2 s a step here
    {"method": ["ladd"], "bf16": True, "gradient_checkpointing": True, "optim": "muon", "use_peft": True, "lora_r": 4},
    {**BY_LEVEL, "mismatch_fraction": 0.4},
]


@pytest.mark.parametrize(
    "changes", METHODS, ids=["trajectory", "ladd", "dmd2+ladd", "lora", "dmd2-lora", "bf16-muon", "by-level"]
)
def test_a_resumed_run_is_bit_identical(prompts_file, warm_cache, tmp_path, changes):
    common = {"save_steps": 2, "gradient_accumulation_steps": 2, **changes}
    train(*settings(prompts_file, warm_cache, tmp_path / "whole", **common))
    broken = tmp_path / "broken"
    broken.mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-000002", broken / "checkpoint-000002")
    for name in ("samples.jsonl", "metrics.jsonl"):
        shutil.copy(tmp_path / "whole" / name, broken / name)
    train(*settings(prompts_file, warm_cache, broken, resume_from_checkpoint="latest", **common))
    ours, theirs = weights(broken), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    base = load_file(open_pipeline("tiny").path / "transformer" / "diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(theirs[name], base[name].float()) for name in theirs)
    ours, theirs = (open_checkpoint(run / "checkpoint-000004").tensors() for run in (broken, tmp_path / "whole"))
    keys = [f"{part}/{key}" for part in ("model", "optimizer", "ema") for key, _ in theirs.under(part)]
    assert all(torch.equal(ours[key], theirs[key]) for key in keys)
    trained_besides = any(key.startswith(("model/ladd.", "model/dmd2.")) for key in keys)
    assert trained_besides == (changes["method"] != ["trajectory"])
    assert all(key.startswith("ema/policy.") for key in keys if key.startswith("ema/"))


def test_while_the_heads_warm_up_the_student_stays_as_it_is(prompts_file, warm_cache, tmp_path):
    """To the bit, with weight decay and moments of an earlier step."""
    changes = {"method": ["ladd"], "weight_decay": 0.1, "save_steps": 1, "save_total_limit": None}
    train(
        *settings(
            *(prompts_file, warm_cache, tmp_path / "run"),
            discriminator_warmup_steps=2,
            discriminator_steps_per_generator=1,
            **changes,
        )
    )
    states = [open_checkpoint(tmp_path / "run" / f"checkpoint-{n:06d}").tensors() for n in (1, 2, 3)]

    def moved(a, b, prefix):
        keys = [key for key, _ in a.under("model") if key.startswith(prefix)]
        return sum(not torch.equal(a[f"model/{k}"], b[f"model/{k}"]) for k in keys) / len(keys)

    assert moved(states[0], states[1], "policy.") == 0
    assert moved(states[0], states[1], "ladd.") > 0.9
    assert moved(states[1], states[2], "policy.") > 0.9
    assert not any(key.startswith("policy.") for key, _ in states[1].under("optimizer"))


def test_metrics_tell_how_the_game_stands(prompts_file, warm_cache, tmp_path):
    train(*settings(prompts_file, warm_cache, tmp_path / "run", method=["ladd"], head_blocks=[2, 5]))
    last = metrics(tmp_path / "run")[-1]
    assert {
        *("generator_loss", "discriminator_loss", "real_logit", "fake_logit", "discriminator_accuracy"),
        *("discriminator_accuracy/block2", "discriminator_accuracy/block5", "real_logit/block2", "fake_logit/block5"),
        *("grad_norm/policy", "grad_norm/ladd", "grad_norm"),
    } <= last.keys()
    assert last["grad_norm/policy"] > 0
    both = (last["grad_norm/policy"] ** 2 + last["grad_norm/ladd"] ** 2) ** 0.5
    assert last["grad_norm"] == pytest.approx(both, rel=1e-4)


EVALUATED = {
    "eval_steps": 2,
    "eval_num_prompts": 3,
    "eval_rewards": ["judge_exact", "judge_graded"],
    "eval_encoder": "judge",
    "min_diversity": 0.0,
}


def test_the_average_is_evaluated_at_each_number_of_steps_and_the_best_is_emitted(
    prompts_file, warm_cache, tmp_path, monkeypatch
):
    values = iter([0.1, 0.9, 0.5])  # of the evaluations at steps 0, 2 and 4
    measure = monitor.ImageMonitor._measure

    def rigged(self, sampler, reference):
        measured = measure(self, sampler, reference)
        if sampler is self.sampler and sampler.num_inference_steps == 4:
            measured.metrics["judge_graded"] = next(values)
        return measured

    monkeypatch.setattr(monitor.ImageMonitor, "_measure", rigged)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "judge_graded", "save_steps": 2}
    common = {**EVALUATED, **best, "eval_prompts_file": str(prompts_file), "ema_decay": 0.0}
    train(*settings(prompts_file, warm_cache, tmp_path / "run", **common))
    lines = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert {f"eval/{name}/{steps}_steps" for name in ("judge_exact", "fid", "diversity") for steps in (4, 1)} < set(
        lines[0]
    )
    assert "eval/judge_exact/teacher" in lines[0]
    assert (tmp_path / "run" / "samples" / "eval-000004.png").exists()
    best = json.loads((tmp_path / "run" / "best.json").read_text())
    assert (best["step"], best["metrics"]["eval/judge_graded/4_steps"]) == (2, 0.9)
    emitted = weights(tmp_path / "run")
    states = {n: open_checkpoint(tmp_path / "run" / f"checkpoint-{n:06d}").tensors() for n in (2, 4)}
    name = "img_in.weight"
    assert torch.equal(emitted[name], states[2][f"model/policy.{name}"])
    assert not torch.equal(emitted[name], states[4][f"model/policy.{name}"])


def test_evaluating_does_not_touch_training(prompts_file, warm_cache, tmp_path):
    train(*settings(prompts_file, warm_cache, tmp_path / "plain"))
    common = {**EVALUATED, "eval_prompts_file": str(prompts_file)}
    train(*settings(prompts_file, warm_cache, tmp_path / "watched", **common))
    ours, theirs = weights(tmp_path / "watched"), weights(tmp_path / "plain")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("changes", [{}, {"method": ["dmd2"], "timestep_weights": [2, 1, 1, 0]}, BY_LEVEL])
def test_a_plan_says_what_it_takes(prompts_file, warm_cache, tmp_path, capsys, changes):
    (_, *given) = arguments(prompts_file, warm_cache, tmp_path / "run", **changes)
    assert main(["plan", "--stage", "distill", *given]) == 0
    report = capsys.readouterr().out
    assert re.search(r"peak +[\d.]+ GiB", report)
    assert re.search(r"frozen +[\d.]+ GiB in other networks", report)
    assert f"epochs of {len(PROMPTS)}" in report
    assert not (tmp_path / "run").exists()


def test_a_collapsed_student_ends_the_run_with_its_state_saved(prompts_file, warm_cache, tmp_path, monkeypatch):
    """The same image for every noise: diversity is nothing of the teacher's."""
    generate = monitor.ImageMonitor._generate

    def collapsed(self, sampler, jobs):
        images = generate(self, sampler, jobs)
        return images if sampler is self.reference else {i: images[i % 3] for i in images}

    monkeypatch.setattr(monitor.ImageMonitor, "_generate", collapsed)
    common = {**EVALUATED, "eval_prompts_file": str(prompts_file), "min_diversity": 0.5, "save_steps": 0}
    with pytest.raises(StopTraining, match=r"differ by 0.0000 at step 2, .* they have collapsed"):
        # the untrained student, at step 0, is not judged
        train(*settings(prompts_file, warm_cache, tmp_path / "run", **common))
    open_checkpoint(tmp_path / "run" / "checkpoint-000002").verify()
    assert not (tmp_path / "run" / "final").exists()


def test_a_discriminator_that_is_never_wrong_ends_the_run(prompts_file, warm_cache, tmp_path):
    changes = {"method": ["ladd"], "max_discriminator_accuracy": 0.01, "saturation_patience": 2, "save_steps": 0}
    with pytest.raises(StopTraining, match=r"in 2 logged windows in a row, .* stopped at step 3"):
        train(*settings(prompts_file, warm_cache, tmp_path / "run", discriminator_warmup_steps=1, **changes))
    open_checkpoint(tmp_path / "run" / "checkpoint-000003").verify()


def test_real_images_take_their_share_of_every_batch(prompts_file, image_folder, warm_cache, tmp_path, monkeypatch):
    from prx_post.stages.distill.objective import DistillationObjective

    keys = []
    forward = DistillationObjective.forward

    def spy(self, batch):
        keys.append(list(batch["rows"]))
        return forward(self, batch)

    monkeypatch.setattr(DistillationObjective, "forward", spy)
    changes = {"real_fraction": 0.25, "dataset_name": str(image_folder)}
    train(*settings(prompts_file, warm_cache, tmp_path / "run", **changes))
    names = [json.loads(line)["name"] for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert len([name for name in names if name.startswith("train.jsonl:")]) == len(PROMPTS)
    assert len([name for name in names if name.endswith(".png")]) == 48
    # rows above the prompts' can only be images; one of four in each batch is one
    assert all(sum(row >= len(PROMPTS) for row in rows) <= 1 for rows in keys)
    assert sum(row >= len(PROMPTS) for rows in keys for row in rows) >= 3


def test_the_dc_ae_variant_is_distilled_as_well(prompts_file, dc_ae_pipeline, tmp_path):
    changes = {"model_name_or_path": str(dc_ae_pipeline), "method": ["ladd", "trajectory"]}
    final = train(*settings(prompts_file, tmp_path / "cache", tmp_path / "run", **changes))
    pipe = PRXPipeline.from_pretrained(final)
    assert draw(pipe, 4).shape == (1, 8, 8, 16)


def test_heads_begin_with_the_statistics_of_the_teachers_latents(prompts_file, warm_cache, tmp_path, monkeypatch):
    from prx_post.stages.distill.terms import Adversarial

    seen = []
    forward = Adversarial.__call__

    def spy(self, step):
        seen.append([(head.mean.clone(), head.std.clone()) for head in self.heads.heads])
        return forward(self, step)

    monkeypatch.setattr(Adversarial, "__call__", spy)
    train(*settings(prompts_file, warm_cache, tmp_path / "run", method=["ladd"], max_steps=1))
    for mean, std in seen[0]:
        assert mean.abs().max() > 0.1
        assert (std - 1).abs().max() > 0.1
