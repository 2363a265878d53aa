"""Every fault is caused for real; afterwards nothing is lost, and a resumed run ends as if never disturbed."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prx_post.base.errors import PrxPostError
from prx_post.base.files import FolderLock
from prx_post.data.cache import checksum
from prx_post.engine import checkpointing
from prx_post.engine.checkpointing import DamagedCheckpoint, checkpoints
from tests.faults import Limits, differences, kill_trials, numbers, run_child, sft_arguments, weights
from tests.integration.test_sft import settings
from tests.processes import Processes, wait_for
from tests.running import train_sft as train


@pytest.fixture(scope="module")
def undisturbed(image_folder, warm_cache, tmp_path_factory):
    """A run of ten steps that nothing happened to, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("undisturbed")
    arguments = sft_arguments(image_folder, warm_cache, folder / "run", save_total_limit=9)
    outcome = run_child(arguments, folder / "log")
    assert outcome.returncode == 0, outcome.output[-3000:]
    return folder / "run"


@pytest.fixture
def half_done(undisturbed, tmp_path):
    """A copy of that run as it was when it had saved step 4, and had gone on to log step 6."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("checkpoint-000002", "checkpoint-000004"):
        shutil.copytree(undisturbed / name, run / name)
    lines = (undisturbed / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:40])  # the last line was cut off
    shutil.copy(undisturbed / "samples.jsonl", run)
    return run


def test_eight_runs_killed_at_random_moments_and_inside_saves_lose_nothing(image_folder, warm_cache, tmp_path):
    found = kill_trials(image_folder, warm_cache, tmp_path, trials=8)
    assert found.trials == 8
    assert found.kills >= 8
    assert found.kills_in_a_save >= 2
    assert found.resumed >= 5
    assert found.lost_or_changed == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP], ids=lambda n: n.name)
def test_a_signal_finishes_the_step_saves_and_exits_with_75(image_folder, warm_cache, tmp_path, undisturbed, number):
    run = tmp_path / "run"
    arguments = sft_arguments(image_folder, warm_cache, run, save_steps=100)
    training = lambda: (run / "metrics.jsonl").exists()  # noqa: E731
    outcome = run_child(arguments, tmp_path / "log", signal_when=(number, training))
    assert outcome.returncode == 75
    assert f"error: stopped by {number.name} after step" in outcome.output
    (saved,) = checkpoints(run)
    assert f"after step {int(saved.name.split('-')[1])}, which is saved" in outcome.output
    assert not (run / "final").exists()
    assert run_child(arguments, tmp_path / "log").returncode == 0
    assert differences(run, undisturbed) == []


def test_a_resumed_run_repeats_what_was_logged_after_its_checkpoint(
    image_folder, warm_cache, tmp_path, undisturbed, half_done
):
    outcome = run_child(sft_arguments(image_folder, warm_cache, half_done), tmp_path / "log")
    assert outcome.returncode == 0, outcome.output
    assert f"resuming from {half_done / 'checkpoint-000004'}" in outcome.output
    assert differences(half_done, undisturbed) == []
    assert [line["step"] for line in numbers(half_done)] == [3, 6, 9, 10]


@pytest.mark.parametrize(
    ("first_save", "changes"),
    [(2, {"use_peft": True, "lora_r": 4, "lora_dropout": 0.2}), (1, {"optim": "muon", "bf16": True})],
    ids=["lora", "muon"],  # of Muon few steps: its matrix products are in bfloat16, which a CPU does slowly
)
def test_lora_with_dropout_and_muon_resume_exactly_too(image_folder, warm_cache, tmp_path, first_save, changes):
    changes = {**changes, "save_steps": first_save, "max_steps": 2 * first_save}
    whole, broken = (sft_arguments(image_folder, warm_cache, tmp_path / name, **changes) for name in ("a", "b"))
    assert run_child(whole, tmp_path / "log").returncode == 0
    assert run_child(broken, tmp_path / "log", Limits(dies_at_flush=9)).returncode == -signal.SIGKILL
    assert [p.name for p in checkpoints(tmp_path / "b")] == [f"checkpoint-{first_save:06d}"]
    assert run_child(broken, tmp_path / "log").returncode == 0
    assert differences(tmp_path / "b", tmp_path / "a") == []


def test_only_the_newest_checkpoints_are_kept_and_a_finished_run_is_left_alone(
    image_folder, warm_cache, tmp_path, undisturbed
):
    run = tmp_path / "run"
    arguments = sft_arguments(image_folder, warm_cache, run, save_total_limit=2)
    assert run_child(arguments, tmp_path / "log").returncode == 0
    assert [p.name for p in checkpoints(run)] == ["checkpoint-000008", "checkpoint-000010"]
    assert not list(run.glob(".checkpoint*"))
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != ".lock"}
    assert run_child(arguments, tmp_path / "log").returncode == 0  # as a requeued job would
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != ".lock"} == before


def test_a_write_that_fails_leaves_the_checkpoint_before_and_says_what_it_needed(
    image_folder, warm_cache, tmp_path, undisturbed, half_done
):
    arguments = sft_arguments(image_folder, warm_cache, half_done)
    size = (half_done / "checkpoint-000004" / "rank-00000.safetensors").stat().st_size
    outcome = run_child(arguments, tmp_path / "log", Limits(largest_file=size // 2))
    assert outcome.returncode == 2
    needed = f"checkpoint-000006 needs {size / 2**30:.2f} GiB in {half_done}, but writing it failed"
    assert needed in outcome.output
    assert "resume from checkpoint-000004" in outcome.output
    assert [p.name for p in checkpoints(half_done)] == ["checkpoint-000002", "checkpoint-000004"]
    assert not list(half_done.glob(".checkpoint*"))
    assert run_child(arguments, tmp_path / "log").returncode == 0
    assert differences(half_done, undisturbed) == []


def test_a_disk_too_full_is_noticed_before_a_checkpoint_is_begun(image_folder, warm_cache, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpointing.shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    with pytest.raises(PrxPostError, match=r"checkpoint-000002 needs 0\.03 GiB in .*, but 0\.00 GiB are free"):
        train(*settings(image_folder, warm_cache, tmp_path / "run", save_steps=2))
    assert checkpoints(tmp_path / "run") == []


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("file", "damage", "found"),
    [
        ("rank-00000.safetensors", lambda p: flip(p, -5), "is corrupt: its sha256"),
        ("rank-00000.safetensors", truncate, "bytes, but was written with"),
        ("rank-00000.safetensors", lambda p: p.unlink(), "is missing"),
        ("state.json", lambda p: p.write_text(p.read_text().replace('"step": 4', '"step": 5')), "is corrupt"),
        ("state.json", truncate, "cannot be read"),
    ],
    ids=["flipped", "truncated", "missing", "edited state", "truncated state"],
)
def test_a_damaged_checkpoint_is_named_and_passed_over_only_when_told_to(
    image_folder, warm_cache, tmp_path, undisturbed, half_done, file, damage, found
):
    damage(half_done / "checkpoint-000004" / file)
    outcome = run_child(sft_arguments(image_folder, warm_cache, half_done), tmp_path / "log")
    assert outcome.returncode == 2
    (error,) = [line for line in outcome.output.splitlines() if line.startswith("error: ")]
    assert f"checkpoint-000004/{file}" in error
    assert found in error
    assert "To resume from checkpoint-000002 instead, set resume_past_damage: true" in error
    told = sft_arguments(image_folder, warm_cache, half_done, resume_past_damage=True, save_total_limit=9)
    outcome = run_child(told, tmp_path / "log")
    assert outcome.returncode == 0, outcome.output[-3000:]
    assert "Resuming from checkpoint-000002" in outcome.output
    assert differences(half_done, undisturbed) == []
    assert (half_done / "superseded-checkpoint-000004").exists()


def test_a_checkpoint_folder_can_be_named_and_nothing_else(image_folder, warm_cache, tmp_path, undisturbed):
    with pytest.raises(PrxPostError, match=r"which is no checkpoint folder. Did you mean .*checkpoint-000010"):
        train(*settings(image_folder, warm_cache, tmp_path / "a", resume_from_checkpoint=str(undisturbed)))
    with pytest.raises(DamagedCheckpoint, match="state.json cannot be read"):
        train(
            *settings(
                image_folder, warm_cache, tmp_path / "b", resume_from_checkpoint=str(tmp_path / "checkpoint-000001")
            )
        )
    named = sft_arguments(
        image_folder, warm_cache, tmp_path / "c", resume_from_checkpoint=undisturbed / "checkpoint-000006"
    )
    assert run_child(named, tmp_path / "log").returncode == 0
    assert differences(tmp_path / "c", undisturbed)[-1:] != ["transformer"]
    assert numbers(tmp_path / "c") == [line for line in numbers(undisturbed) if line["step"] > 6]


def test_settings_that_would_make_the_state_meaningless_cannot_change(image_folder, warm_cache, half_done):
    def resumed(**changes):
        common = {"per_device_train_batch_size": 4, "resume_from_checkpoint": "latest", "max_steps": 10}
        train(*settings(image_folder, warm_cache, half_done, **{**common, **changes}))

    with pytest.raises(PrxPostError, match="seed is 1, but must be 0 because .*checkpoint-000004 was saved with it"):
        resumed(seed=1)
    with pytest.raises(PrxPostError, match="must divide the 4 samples per step"):
        resumed(per_device_train_batch_size=3)


def test_other_data_than_the_run_began_with_is_refused_and_named(image_folder, warm_cache, half_done, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(image_folder, changed)
    shutil.copy(changed / "00008.png", changed / "00007.png")
    with pytest.raises(PrxPostError, match=r"holds other data than .*48 samples, 48 before; .*00007\.png differs"):
        train(*settings(changed, warm_cache, half_done, per_device_train_batch_size=4, resume_from_checkpoint="latest"))


def test_a_corrupt_cache_shard_is_named_not_trained_on(image_folder, tmp_path):
    cache = tmp_path / "cache"
    train(*settings(image_folder, cache, tmp_path / "first", max_steps=1))
    (shard,) = (cache / "latents").rglob("*.safetensors")
    flip(shard, -5)  # in the last tensor's data
    with pytest.raises(PrxPostError, match=rf"cache file {shard} is corrupt: the checksum of .* Delete that file"):
        train(*settings(image_folder, cache, tmp_path / "second", max_steps=12))
    shard.unlink()
    train(*settings(image_folder, cache, tmp_path / "third", max_steps=12))


def test_a_run_killed_before_its_first_checkpoint_starts_afresh_and_no_other_folder_is_taken_for_one(
    image_folder, warm_cache, tmp_path
):
    run = tmp_path / "run"
    run.mkdir()
    (run / "samples.jsonl").write_text("{}")
    again = settings(image_folder, warm_cache, run, max_steps=1, resume_from_checkpoint="latest")
    with pytest.raises(PrxPostError, match="must be new or empty"):
        train(*again)
    (run / ".lock").write_text("process 1 on elsewhere")
    train(*again)
    assert (run / "final").exists()


def test_a_checkpoint_of_another_base_or_without_an_average_is_refused(
    image_folder, warm_cache, half_done, base, tmp_path
):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    (file,) = (other / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    tensors["img_in.bias"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    common = {"per_device_train_batch_size": 4, "resume_from_checkpoint": "latest", "max_steps": 10}
    with pytest.raises(PrxPostError, match="was trained from another transformer"):
        train(*settings(image_folder, warm_cache, half_done, model_name_or_path=str(other), **common))
    with pytest.raises(PrxPostError, match="ema_decay is 0.0, but must be above 0"):
        train(*settings(image_folder, warm_cache, half_done, ema_decay=0.0, **common))


def test_files_are_flushed_before_the_folder_is_renamed_and_old_ones_go_last(tmp_path, monkeypatch):
    """With save_total_limit 1 there is a whole checkpoint at every moment of the second save."""
    done: list[str] = []
    fsync, rename, rmtree = os.fsync, Path.rename, shutil.rmtree

    def watched(name, act, path_of):
        def call(*args):
            done.append(f"{name} {path_of(args[0])}")
            return act(*args)

        return call

    monkeypatch.setattr(os, "fsync", watched("fsync", fsync, lambda fd: Path(os.readlink(f"/proc/self/fd/{fd}")).name))
    monkeypatch.setattr(Path, "rename", watched("rename", rename, lambda path: path.name))
    monkeypatch.setattr(checkpointing.shutil, "rmtree", watched("delete", rmtree, lambda path: path.name))
    writer = checkpointing.CheckpointWriter(tmp_path, rank=0, world_size=1, keep=1, timeout_s=10)
    for step in (1, 2):
        writer.save({"model/w": torch.zeros(3)}, {"step": step})
        writer.join()
        writer.check()
    second = done[done.index("rename .checkpoint-000001.partial") + 1 :]
    in_place = second.index("rename .checkpoint-000002.partial")
    for file in ("rank-00000.safetensors", ".state.json.", ".checkpoint-000002.partial"):
        flushed = next(i for i, name in enumerate(second) if name.startswith(f"fsync {file}"))
        assert flushed < in_place
    assert second.index("rename checkpoint-000001") > in_place
    assert second.index("delete .checkpoint-000001.old") > in_place


def test_two_runs_cannot_share_an_output_dir(image_folder, warm_cache, tmp_path):
    (tmp_path / "run").mkdir()
    lock = FolderLock(tmp_path / "run")
    with pytest.raises(PrxPostError, match=r"another run writes there \(process \d+ on .*\)"):
        train(*settings(image_folder, warm_cache, tmp_path / "run"))
    lock.release()
    train(*settings(image_folder, warm_cache, tmp_path / "run", max_steps=1))


@pytest.fixture(scope="module")
def poisoned_cache(image_folder, tmp_path_factory):
    """A cache in which the latents of one image of 48 are NaN, with a checksum that agrees."""
    cache = tmp_path_factory.mktemp("poisoned")
    train(*settings(image_folder, cache, cache / "run", max_steps=1))
    (shard,) = (cache / "latents").rglob("*.safetensors")
    tensors = load_file(shard)
    line = json.loads((cache / "run" / "samples.jsonl").read_text().splitlines()[7])
    tensors[line["image"]] = torch.full_like(tensors[line["image"]], torch.nan)
    save_file(tensors, shard, metadata={key: checksum(tensor) for key, tensor in tensors.items()})
    return cache


@pytest.mark.parametrize("deepspeed", [None, "zero2", "zero3"])
def test_a_step_that_is_not_finite_is_skipped_on_all_ranks_and_written_out(
    image_folder, poisoned_cache, tmp_path, deepspeed
):
    """48 images, 16 a step: one step of every three meets image 7."""
    changes = {"max_steps": 6, "per_device_train_batch_size": 8, "logging_steps": 1}
    changes |= {"deepspeed": deepspeed} if deepspeed else {}
    for finished in Processes(2, sft_arguments(image_folder, poisoned_cache, tmp_path / "run", **changes)).wait():
        assert finished.returncode == 0, finished.output[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines()]
    skipped = sorted({line["step"] for line in lines})
    assert len(skipped) == 2
    for step in skipped:
        mine = [line for line in lines if line["step"] == step]
        assert [line["rank"] for line in mine] == [0, 1]
        assert len({row for line in mine for row in line["rows"]}) == 16
        assert [7 in line["rows"] for line in mine] == [line["loss"] == "nan" for line in mine]
        assert all(len(line["seeds"]) == 8 for line in mine)
    assert [line["step"] for line in numbers(tmp_path / "run") if line["loss"] is None] == skipped
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / "run").values())


def test_a_rank_that_dies_takes_the_others_with_it_and_they_say_why(image_folder, warm_cache, tmp_path):
    arguments = sft_arguments(image_folder, warm_cache, tmp_path / "run", max_steps=100000, save_steps=0)
    processes = Processes(2, arguments)
    wait_for(tmp_path / "run" / "metrics.jsonl")
    processes.ranks[1].kill()
    survivor, killed = processes.wait(timeout_s=120)  # ddp_timeout is 60
    assert killed.returncode == -signal.SIGKILL
    assert survivor.returncode == 2
    assert "error: rank 0 stops, because another process died or did not answer within 60 s" in survivor.output
    assert "Traceback" not in survivor.output


def test_a_signal_to_one_rank_stops_all_of_them_at_one_step(image_folder, warm_cache, tmp_path):
    run = tmp_path / "run"
    processes = Processes(2, sft_arguments(image_folder, warm_cache, run, max_steps=100000, save_steps=0))
    wait_for(run / "metrics.jsonl")
    processes.ranks[1].send_signal(signal.SIGUSR1)
    finished = processes.wait(timeout_s=120)
    assert [f.returncode for f in finished] == [75, 75]
    (saved,) = checkpoints(run)
    assert "error: stopped by SIGUSR1" in finished[0].output
    checkpointing.open_checkpoint(saved).verify()
