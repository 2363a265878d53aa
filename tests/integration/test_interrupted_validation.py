"""What interrupts a validation, or is found by it: nothing is lost, and every rank knows."""

import json
import shutil

from prx_post.engine.checkpointing import checkpoints
from tests.faults import numbers, run_child, sft_arguments
from tests.processes import Processes, run


def full_disk() -> None:
    """Where images are written, that is on the main rank alone."""
    from prx_post.engine.tracking import RunLog

    def image(self, *args):
        raise OSError(28, "No space left on device", "samples")

    RunLog.image = image


def killed_at_its_second() -> None:
    """A kill while the evaluation of step 2 generates, once the step's checkpoint is written."""
    import os
    import signal
    import time

    from prx_post.evaluation.monitor import ImageMonitor

    measure, calls = ImageMonitor._measure, []

    def measured(self, *args):
        calls.append(args)
        if len(calls) == 2:
            while not any(self.run.output_dir.glob("checkpoint-*")):
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        return measure(self, *args)

    ImageMonitor._measure = measured


EVALUATED = {"max_steps": 4, "eval_steps": 2, "eval_rewards": "jpeg_compressibility", "eval_encoder": "judge"}


def test_a_sheet_that_cannot_be_written_ends_both_ranks_with_the_state_saved(image_folder, warm_cache, tmp_path):
    changes = {"sample_steps": 2, "save_steps": 3, "max_steps": 4, "sample_prompts": "472", "sample_seeds": 0}
    call = sft_arguments(image_folder, warm_cache, tmp_path / "run", **changes)
    ranks = Processes(2, [*call], full_disk).wait()
    assert [rank.returncode for rank in ranks] == [2, 2]
    errors = [line for rank in ranks for line in rank.output.splitlines() if line.startswith("error")]
    assert errors == ["error: samples cannot be used: No space left on device. Check the disk."]


def test_an_evaluation_that_was_killed_is_made_again(image_folder, warm_cache, tmp_path):
    for name in ("whole", "broken"):
        call = sft_arguments(image_folder, warm_cache, tmp_path / name, **EVALUATED)
        if name == "broken":
            (killed,) = Processes(1, call, killed_at_its_second).wait()
            assert killed.returncode == -9
            assert [p.name for p in checkpoints(tmp_path / name)] == ["checkpoint-000002"]
        run(1, call)
    whole, broken = ((tmp_path / name / "evaluations.jsonl").read_text() for name in ("whole", "broken"))
    assert [json.loads(line)["step"] for line in whole.splitlines()] == [0, 2, 4]
    assert [json.loads(line) for line in broken.splitlines()] == [json.loads(line) for line in whole.splitlines()]


def test_a_run_that_stops_early_emits_and_has_finished(image_folder, warm_cache, tmp_path):
    """The files of noisy images cannot get smaller than those of the first, by a learning rate of almost nothing."""
    changes = {"max_steps": 20, "learning_rate": 1e-30, "eval_steps": 2, "eval_rewards": "jpeg_compressibility"}
    changes |= {"metric_for_best_model": "jpeg_compressibility", "early_stopping_patience": 2}
    changes |= {"load_best_model_at_end": "true"}
    call = sft_arguments(image_folder, warm_cache, tmp_path / "run", **changes)
    first = run_child(call, tmp_path / "log")
    assert first.returncode == 0, first.output[-2000:]
    assert "stopped early at step 4: jpeg_compressibility has not been better than" in first.output
    assert numbers(tmp_path / "run")[-1]["step"] <= 4
    card = (tmp_path / "run" / "final" / "README.md").read_text()
    assert "| optimizer steps | 4 |" in card
    assert "| best weights | of step 0 |" in card
    again = run_child(call, tmp_path / "log")
    assert again.returncode == 0
    assert "has finished: there is nothing to do" in again.output


def evaluations(folder):
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def test_a_resumed_run_wins_against_its_start_at_every_number_of_steps(image_folder, warm_cache, tmp_path):
    """Also at the first of ascending numbers, which is not that of the start."""
    changes = {**EVALUATED, "num_inference_steps": 2, "save_steps": 2}
    steps = ["--eval_num_inference_steps", "1", "2"]
    run(1, [*sft_arguments(image_folder, warm_cache, tmp_path / "whole", **changes), *steps])
    broken = tmp_path / "broken"
    broken.mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-000002", broken / "checkpoint-000002")
    for name in ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl", "validated.json", "start.safetensors"):
        shutil.copy(tmp_path / "whole" / name, broken / name)
    run(1, [*sft_arguments(image_folder, warm_cache, broken, **changes), *steps])
    assert evaluations(broken) == evaluations(tmp_path / "whole")
    assert "eval/jpeg_compressibility_wins/1_steps" in evaluations(broken)[-1]


def test_a_start_that_drew_other_prompts_is_not_compared_with(image_folder, warm_cache, tmp_path):
    """As many of them: win rates of one prompt's images against another's would mean nothing."""
    files = []
    for first in (100, 200):
        path = tmp_path / f"{first}.jsonl"
        path.write_text("".join(json.dumps({"prompt": str(n)}) + "\n" for n in range(first, first + 2)))
        files.append(path)
    changes = {**EVALUATED, "num_inference_steps": 2, "save_steps": 2, "max_steps": 2}
    changes.pop("eval_encoder")
    run(1, sft_arguments(image_folder, warm_cache, tmp_path / "run", **changes, eval_prompts_file=files[0]))
    (tmp_path / "run" / "final").rename(tmp_path / "final")
    more = {**changes, "max_steps": 4, "eval_prompts_file": files[1]}
    (resumed,) = run(1, sft_arguments(image_folder, warm_cache, tmp_path / "run", **more))
    assert "was not evaluated by this run: compared is with step 4" in resumed.output
    *_, last = evaluations(tmp_path / "run")
    assert last["step"] == 4
    assert last["eval/jpeg_compressibility_wins/2_steps"] == 0.5
