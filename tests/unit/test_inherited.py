"""What a stage takes from the checkpoint it starts from."""

import pytest

from prx_post.base.parsing import parse
from prx_post.model.inference import Inference
from prx_post.stages.inherited import inherited
from prx_post.stages.registry import find

OWN = Inference(8, 1.0, 32, 96, skip_text_cleaning=True)


@pytest.fixture
def run_folder(tmp_path):
    """A run that emitted a pipeline which says how it is sampled."""
    (tmp_path / "run" / "final").mkdir(parents=True)
    (tmp_path / "run" / "final" / "model_index.json").write_text("{}")
    OWN.write(tmp_path / "run" / "final")
    return str(tmp_path / "run")


@pytest.mark.parametrize("stage", ["sft", "dpo", "grpo"])
def test_a_stage_goes_on_as_its_checkpoint_was_left(stage, run_folder):
    found = inherited(find(stage).configs(), {"model_name_or_path": run_folder}.get)
    assert found == vars(OWN)


def test_online_pairs_of_a_student_are_compared_on_its_own_steps(run_folder):
    given = {"model_name_or_path": run_folder, "pairs": "online"}
    assert inherited(find("dpo").configs(), given.get)["log_ratio"] == "steps"
    assert "log_ratio" not in inherited(find("dpo").configs(), {**given, "log_ratio": "noised"}.get)
    assert "log_ratio" not in inherited(find("grpo").configs(), given.get)


@pytest.mark.parametrize("own", [Inference(9, 1.0), Inference(8, 4.0), Inference(2, 1.0)])
def test_those_of_another_checkpoint_are_noised(run_folder, own, tmp_path):
    own.write(tmp_path / "run" / "final")
    given = {"model_name_or_path": run_folder, "pairs": "online"}
    assert "log_ratio" not in inherited(find("dpo").configs(), given.get)


def test_what_is_given_is_not_taken(run_folder):
    given = {"model_name_or_path": run_folder, "num_inference_steps": 4, "width": 64}
    assert inherited(find("sft").configs(), given.get) == {"guidance_scale": 1.0, "skip_text_cleaning": True}


@pytest.mark.parametrize("given", ["teacher_model_name_or_path", "model_name_or_path"])
def test_a_distillation_takes_its_teachers(given, run_folder):
    found = inherited(find("distill").configs(), {given: run_folder}.get)
    assert found == {
        "teacher_num_inference_steps": 8,
        "teacher_guidance_scale": 1.0,
        "height": 32,
        "width": 96,
        "skip_text_cleaning": True,
    }


@pytest.mark.parametrize("path", [None, "Photoroom/prx-512-t2i", "no/such/folder"])
def test_a_checkpoint_that_is_not_here_leaves_the_defaults(path):
    assert inherited(find("sft").configs(), {"model_name_or_path": path}.get) == {}


def test_a_file_and_the_command_line_win(run_folder, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(f"model_name_or_path: {run_folder}\ndataset_name: x\nguidance_scale: 3.0\noutput_dir: {tmp_path}\n")
    kinds = find("sft").configs()
    _, data, config = parse(kinds, ["--config", str(path), "--num_inference_steps", "2"], "prx-post sft", vars(OWN))
    assert (config.num_inference_steps, config.guidance_scale, data.height, data.width) == (2, 3.0, 32, 96)
