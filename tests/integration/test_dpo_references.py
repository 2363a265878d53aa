"""`prx-post dpo` against other references than its start: another checkpoint, and errors computed before training."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from prx_post.cli import main
from prx_post.model.checkpoint import open_pipeline
from tests.faults import differences, numbers
from tests.pairing import dpo_arguments, number_pairs, write_pairs
from tests.processes import run

BEFORE = {"precompute_ref_errors": 2}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(number_pairs(12), tmp_path_factory.mktemp("pairs") / "set")


@pytest.fixture(scope="module")
def of_one(pairs, warm_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("before") / "one"
    assert main(dpo_arguments(pairs, warm_cache, folder, **BEFORE)) == 0
    return folder


def test_training_on_errors_computed_before_begins_at_log_2(of_one):
    lines = numbers(of_one)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert lines[-1]["loss"] != pytest.approx(math.log(2), abs=1e-3)


def test_it_resumes_to_the_bit_without_asking_the_reference_again(pairs, warm_cache, tmp_path, of_one, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    shutil.copytree(of_one / "checkpoint-000002", broken / "checkpoint-000002")
    for name in ("metrics.jsonl", "samples.jsonl"):
        shutil.copy(of_one / name, broken / name)
    capsys.readouterr()
    assert main(dpo_arguments(pairs, warm_cache, broken, **BEFORE)) == 0
    assert "errors of the reference" not in capsys.readouterr().err
    assert differences(broken, of_one) == []


@pytest.mark.parametrize("mode", ["ddp", "zero2"])
def test_two_processes_compute_half_of_the_errors_each(pairs, warm_cache, tmp_path, of_one, mode):
    """In a cache of their own, in which nothing is there yet."""
    cache = tmp_path / "cache"
    shutil.copytree(warm_cache, cache)
    shutil.rmtree(cache / "ref-errors", ignore_errors=True)
    changes = {**BEFORE, "per_device_train_batch_size": 4} | ({"deepspeed": mode} if mode != "ddp" else {})
    run(2, dpo_arguments(pairs, cache, tmp_path / "run", **changes))
    assert len(list((cache / "ref-errors").glob("*/*.safetensors"))) == 2
    ours, theirs = numbers(tmp_path / "run"), numbers(of_one)
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=1e-3, abs=1e-3)


def test_its_plan_holds_no_other_network_and_counts_the_cache(pairs, warm_cache, tmp_path, capsys):
    assert main(["plan", "--stage", *dpo_arguments(pairs, warm_cache, tmp_path / "run", **BEFORE)]) == 0
    said = capsys.readouterr().out
    assert "of other networks" not in said
    assert "24 rows" in said


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The embedded base with a transformer that is a little worse."""
    folder = tmp_path_factory.mktemp("other") / "pipeline"
    shutil.copytree(open_pipeline("tiny").path, folder)
    (file,) = (folder / "transformer").glob("*.safetensors")
    torch.manual_seed(0)
    weights = {name: value + 0.02 * torch.randn_like(value) for name, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("changes", [{}, {"use_peft": "true", "lora_r": 4}, BEFORE], ids=["full", "lora", "before"])
def test_the_reference_may_be_another_checkpoint(pairs, warm_cache, tmp_path, other, changes):
    """The start is better than it on both images: an error below the reference's, and a loss that is not log 2."""
    call = dpo_arguments(
        pairs, warm_cache, tmp_path / "run", ref_model_name_or_path=other, max_steps=1, save_steps=0, **changes
    )
    assert main(call) == 0
    (line,) = numbers(tmp_path / "run")
    assert line["win_change"] < 0
    assert line["loss"] != pytest.approx(math.log(2), abs=1e-3)


def test_a_reference_of_another_architecture_or_with_other_encoders_is_refused(
    pairs, warm_cache, tmp_path, other, dc_ae_pipeline, capsys
):
    call = dpo_arguments(pairs, warm_cache, tmp_path / "run", ref_model_name_or_path=dc_ae_pipeline)
    assert main(call) == 2
    assert "tiny has a transformer with" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    for component, file in (("tokenizer", "tokenizer_config.json"), ("text_encoder", "config.json")):
        changed = tmp_path / f"other-{component}"
        shutil.copytree(other, changed)
        path = changed / component / file
        path.write_text(path.read_text() + "\n")
        out = tmp_path / f"run-{component}"
        assert main(dpo_arguments(pairs, warm_cache, out, ref_model_name_or_path=changed)) == 2
        assert f"tiny has another {component} than the reference" in capsys.readouterr().err
        assert not list(out.glob("checkpoint-*"))


def test_without_a_reference_nothing_is_said_of_decay(pairs, warm_cache, tmp_path, capsys):
    assert main(dpo_arguments(pairs, warm_cache, tmp_path / "run", reference_free="true", save_steps=0)) == 0
    assert numbers(tmp_path / "run")[-1]["both_rise"] == 1
    said = capsys.readouterr()
    assert "denoises both images worse" not in said.out + said.err


def test_both_images_decaying_is_said_once(pairs, warm_cache, tmp_path, capsys):
    """A policy that is worse than its reference on everything, and stays so."""
    changes = {"learning_rate": 1e-2, "max_steps": 6, "save_steps": 0}
    assert main(dpo_arguments(pairs, warm_cache, tmp_path / "run", **changes)) == 0
    lines = numbers(tmp_path / "run")
    assert lines[-1]["both_rise"] > 0.5
    said = capsys.readouterr()
    assert (said.out + said.err).count("denoises both images worse than the reference") == 1
    assert "set lose_weight below 1" in said.out + said.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pair_noise": "own"}, "pair_noise is 'own', but pair 0 of"),
        ({"beta_by_gap": 1}, "beta_by_gap is set, but pair 0 of"),
        ({"reference_free": "true", "precompute_ref_errors": 2}, "precompute_ref_errors is 2, but must be left out"),
        ({"loss_type": "kto", "precompute_ref_errors": 2}, "precompute_ref_errors is 2, but must be 0"),
        ({"loss_type": "kto", "pair_noise": "own"}, "pair_noise is 'own', but must be 'shared'"),
        ({"desirable_weight": 2}, "desirable_weight is 2.0, but must be 1.0 because loss_type is 'sigmoid'"),
        ({"dataset_name": None}, "dataset_name is None, but must be a folder, a parquet file or a Hub id"),
        ({"reward": "ocr_graded"}, "reward is 'ocr_graded', but must be left out because pairs is 'dataset'"),
        ({"min_gap": 0.1}, "min_gap is 0.1, but must be left out because pairs is 'dataset'"),
        ({"judge_url": "http://localhost:1/v1", "judge_model": "m"}, "judge_url is 'http://localhost:1/v1', but must"),
        ({"ref_model_revision": "main"}, "ref_model_revision is 'main', but must be left out"),
        ({"loss_type": "kto", "reference_free": "true"}, "reference_free is True, but must be False"),
        ({"ref_model_name_or_path": "nowhere/at/all"}, "nowhere/at/all"),
    ],
)
def test_what_cannot_be_done_is_said_before_training(pairs, warm_cache, tmp_path, capsys, changes, message):
    assert main(dpo_arguments(pairs, warm_cache, tmp_path / "run", **changes)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
