"""The teacher's latents: made once, shared by runs, the same however the work is interrupted or split."""

import json
from pathlib import Path

import pytest
import torch

from prx_post.base.ranks import Ranks
from prx_post.data.cache import TensorCache
from prx_post.data.encoders import Encoders
from prx_post.model.checkpoint import load, open_pipeline
from prx_post.model.sampler import build_sampler
from prx_post.model.text import PromptCleaner
from prx_post.stages.distill import latents as module
from prx_post.stages.distill.config import TeacherConfig
from prx_post.stages.distill.latents import read_training_prompts, teacher_latents
from tests.distilling import arguments
from tests.processes import run

PROMPTS = ["472", "eighty-one", "trois cent six", "neunhundertfünf", "12"]
SIZE = (32, 64)
CPU = torch.device("cpu")


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    return path


def config(prompts_file: Path, cache: Path, **changes) -> TeacherConfig:
    values = {
        "prompts_file": str(prompts_file),
        "cache_dir": str(cache),
        "teacher_num_inference_steps": 3,
        "teacher_guidance_scale": 3.0,
        "teacher_batch_size": 2,
        **changes,
    }
    return TeacherConfig(**values)


class Counting:
    """The teacher's sampler, and how many latents it made; dies after `limit` batches."""

    def __init__(self, limit: int | None = None) -> None:
        self.made, self.batches, self.limit = 0, 0, limit

    def __call__(self):
        sampler = build_sampler(load("tiny"), SIZE, 3, 3.0, CPU)
        latents = sampler.latents

        def counted(embeddings, null, seeds):
            if self.batches == self.limit:
                raise KeyboardInterrupt
            self.batches += 1
            self.made += len(seeds)
            return latents(embeddings, null, seeds)

        sampler.latents = counted
        return sampler


def make(settings: TeacherConfig, sampler: Counting, ranks: Ranks | None = None):
    encoders = Encoders(open_pipeline("tiny"), PromptCleaner(), CPU, torch.float32)
    prompts = read_training_prompts(settings, encoders.cleaner)
    return teacher_latents(settings, prompts, encoders, SIZE, sampler, ranks or Ranks())


def all_latents(samples, cache) -> dict[str, torch.Tensor]:
    return {s.image_key: cache.latents[s.image_key] for s in samples}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_latent_is_what_the_teacher_draws_with_its_guidance_and_steps(prompts_file, tmp_path):
    samples, cache = make(config(prompts_file, tmp_path / "cache"), Counting())
    encoders = Encoders(open_pipeline("tiny"), PromptCleaner(), CPU, torch.float32)
    prompt = read_training_prompts(config(prompts_file, tmp_path), encoders.cleaner)[2]
    assert prompt.text == "trois cent six"
    embedding, null = encoders.prompts(prompt.text), encoders.prompts("")
    guided = build_sampler(load("tiny"), SIZE, 3, 3.0, CPU).latents([embedding], null, [prompt.noise_seed])[0]
    plain = build_sampler(load("tiny"), SIZE, 3, 1.0, CPU).latents([embedding], null, [prompt.noise_seed])[0]
    ours = cache.latents[samples[2].image_key]
    assert torch.allclose(ours, guided, atol=1e-4)  # made in a batch of two: fp32 rounding
    assert (ours - plain).abs().max() > 0.1
    assert ours.dtype == torch.float32


def test_nothing_is_made_twice(prompts_file, tmp_path):
    settings = config(prompts_file, tmp_path / "cache")
    first, again = Counting(), Counting()
    make(settings, first)
    make(settings, again)
    assert (first.made, again.made) == (5, 0)


def test_other_guidance_steps_or_size_are_other_latents(prompts_file, tmp_path):
    make(config(prompts_file, tmp_path / "cache"), Counting())
    for changes in ({"teacher_guidance_scale": 4.0}, {"teacher_num_inference_steps": 4}):
        sampler = Counting()
        make(config(prompts_file, tmp_path / "cache", **changes), sampler)
        assert sampler.made == 5
    folders = list((tmp_path / "cache" / "teacher-latents").iterdir())
    tags = [json.loads((folder / "teacher.json").read_text()) for folder in folders]
    assert sorted((tag["guidance_scale"], tag["num_inference_steps"]) for tag in tags) == [(3, 3), (3, 4), (4, 3)]
    assert {tag["source"] for tag in tags} == {"tiny"}


def test_a_prompt_keeps_its_latents_wherever_it_stands(prompts_file, tmp_path):
    settings = config(prompts_file, tmp_path / "cache", latents_per_prompt=2)
    samples, cache = make(settings, Counting())
    assert len(samples) == 10
    assert not torch.equal(cache.latents[samples[0].image_key], cache.latents[samples[1].image_key])
    turned = tmp_path / "turned.jsonl"
    turned.write_text("".join(reversed(prompts_file.read_text().splitlines(keepends=True))))
    sampler = Counting()
    make(config(turned, tmp_path / "cache", latents_per_prompt=2), sampler)
    assert sampler.made == 0


def test_what_a_broken_off_run_made_is_kept_and_the_rest_is_the_same_to_the_bit(prompts_file, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCHES_A_FILE", 1)
    whole = all_latents(*make(config(prompts_file, tmp_path / "whole"), Counting()))
    settings = config(prompts_file, tmp_path / "broken")
    with pytest.raises(KeyboardInterrupt):
        make(settings, Counting(limit=2))
    rest = Counting()
    assert same(all_latents(*make(settings, rest)), whole)
    assert rest.made == 1


def test_several_processes_share_the_work_and_make_the_same(prompts_file, tmp_path):
    whole = all_latents(*make(config(prompts_file, tmp_path / "one"), Counting()))
    command = arguments(prompts_file, tmp_path / "two", tmp_path / "run", teacher_batch_size=2)
    ranks = run(2, ["data", "teacher-latents", *command[1:]])
    assert "5 latents in" in ranks[0].output
    assert not (tmp_path / "run").exists()
    (folder,) = (tmp_path / "two" / "teacher-latents").iterdir()
    assert len(list(folder.glob("*.safetensors"))) == 2  # both ranks wrote
    cache = TensorCache(folder)
    assert all(torch.equal(cache[key], value) for key, value in whole.items())


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"prompt": "一只猫"}', "prompt 1 is '一只猫', of which prompt cleaning leaves nothing"), ("not json", "line 1")],
)
def test_a_prompt_that_cannot_be_used_is_named(tmp_path, line, message):
    from prx_post.base.errors import PrxPostError

    (tmp_path / "bad.jsonl").write_text(line + "\n")
    with pytest.raises(PrxPostError, match=message):
        read_training_prompts(config(tmp_path / "bad.jsonl", tmp_path), PromptCleaner())
