"""A stage that is written outside the package and registered trains, resumes, plans and shows its settings."""

import inspect
import shutil
from pathlib import Path

import pytest
import torch

from prx_post.cli import main
from prx_post.stages import registry
from tests import third_stage
from tests.faults import differences, numbers, weights
from tests.processes import run


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(registry, "REGISTRY", dict(registry.REGISTRY))
    monkeypatch.setattr("prx_post.cli.REGISTRY", registry.REGISTRY)
    third_stage.register()


def arguments(images, cache, output_dir, **changes) -> list[str]:
    values = {
        **{"model_name_or_path": "tiny", "dataset_name": images, "height": 32, "width": 64, "cache_dir": cache},
        **{"output_dir": output_dir, "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3},
        **{"logging_steps": 1, "save_steps": 2, "sample_steps": 0, "report_to": "none", "num_inference_steps": 2},
        **changes,
    }
    return ["denoise", *(str(part) for name, value in values.items() for part in (f"--{name}", value))]


def test_it_takes_fewer_than_sixty_lines():
    code = Path(third_stage.__file__).read_text().splitlines()
    assert len([line for line in code if line.strip()]) < 60


def test_it_trains_emits_and_resumes_to_the_bit(image_folder, warm_cache, tmp_path):
    assert main(arguments(image_folder, warm_cache, tmp_path / "whole", max_steps=30)) == 0
    losses = [line["loss"] for line in numbers(tmp_path / "whole")]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    card = (tmp_path / "whole" / "final" / "README.md").read_text()
    assert "| Stage | denoise |" in card
    assert "48 of 48 images" in card
    broken = tmp_path / "broken"
    broken.mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-000028", broken / "checkpoint-000028")
    for name in ("metrics.jsonl", "samples.jsonl"):
        shutil.copy(tmp_path / "whole" / name, broken / name)
    again = arguments(image_folder, warm_cache, broken, max_steps=30, resume_from_checkpoint="latest")
    assert main(again) == 0
    assert differences(broken, tmp_path / "whole") == []


def test_its_settings_are_checked_shown_and_kept_on_resuming(image_folder, warm_cache, tmp_path, capsys):
    call = arguments(image_folder, warm_cache, tmp_path / "run", max_steps=2)
    assert main([*call, "--noise_level", "1.5"]) == 2
    assert "noise_level is 1.5, but must be between 0 and 1" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "denoise       undo a little noise" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["denoise", "--help"])
    assert "Noise level that every latent is brought to" in " ".join(capsys.readouterr().out.split())
    assert main(call) == 0
    shutil.rmtree(tmp_path / "run" / "final")
    changed = ["--resume_from_checkpoint", "latest", "--noise_level", "0.5", "--max_steps", "3"]
    assert main([*call[:-2], *changed]) == 2
    assert "noise_level is 0.5, but must be 0.3" in capsys.readouterr().err


def test_it_is_planned(capsys):
    common = ["--dataset_name", "/no/such/data", "--height", "32", "--width", "64", "--output_dir", "unused"]
    assert main(["plan", "--stage", "denoise", "--model_name_or_path", "tiny", *common]) == 0
    printed = capsys.readouterr().out
    assert "trained            2,320,208   100.00 %, every weight" in printed
    assert "noise_level: 0.3" in printed


def test_from_the_command_to_the_loss_are_at_most_six_frames(image_folder, warm_cache, tmp_path, monkeypatch):
    """Of ours: torch's and accelerate's own lie between them."""
    frames = []
    forward = third_stage.DenoiseObjective.forward

    def spy(self, batch):
        ours = [frame for frame in inspect.stack()[1:] if "/prx_post/" in frame.filename]
        frames.append([frame.function for frame in reversed(ours)] + ["forward"])
        return forward(self, batch)

    monkeypatch.setattr(third_stage.DenoiseObjective, "forward", spy)
    assert main(arguments(image_folder, warm_cache, tmp_path / "run", max_steps=1)) == 0
    assert frames == [["main", "run", "fit", "_train_step", "forward"]]


def test_two_processes_compute_what_one_does(image_folder, warm_cache, tmp_path):
    for count in (1, 2):
        call = arguments(image_folder, warm_cache, tmp_path / str(count), per_device_train_batch_size=4 // count)
        run(count, call, prepare=third_stage.register)
    ours, theirs = ([line["loss"] for line in numbers(tmp_path / name)] for name in ("2", "1"))
    assert ours == pytest.approx(theirs, rel=1e-5)
    a, b = weights(tmp_path / "2"), weights(tmp_path / "1")
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-3  # a step of AdamW where a gradient is nearly nothing
    assert all(torch.isfinite(value).all() for value in a.values())
