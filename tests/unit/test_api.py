"""The Python interface: settings of a file and of the call, joined."""

import pytest

import prx_post
from prx_post.base.errors import ConfigError
from prx_post.stages import run as stages_run


@pytest.fixture
def given(monkeypatch):
    """What would be run."""
    found = {}
    monkeypatch.setattr(stages_run, "run", lambda stage, configs: found.update(stage=stage, configs=configs))
    return found


def test_settings_win_over_the_files_also_null_empty_and_lists(given, tmp_path):
    file = tmp_path / "sft.yaml"
    file.write_text(
        "model_name_or_path: tiny\ndataset_name: images\nlearning_rate: 1e-5\nsample_prompts: ['1', '2']\n"
        "resume_from_checkpoint: latest\n"
    )
    prx_post.train("sft", file, output_dir=tmp_path / "run", resume_from_checkpoint=None, sample_prompts=[])
    model, data, config = given["configs"]
    assert (model.model_name_or_path, data.dataset_name, config.learning_rate) == ("tiny", "images", 1e-5)
    assert config.resume_from_checkpoint is None
    assert config.sample_prompts == []
    assert config.output_dir == str(tmp_path / "run")


def test_a_mistake_is_named_with_the_place_where_it_stands(given, tmp_path):
    file = tmp_path / "sft.yaml"
    file.write_text("model_name_or_path: tiny\nbatch_size: 8\n")
    with pytest.raises(ConfigError, match=f"batch_size in {file} is not a setting of this command"):
        prx_post.train("sft", file)
    with pytest.raises(ConfigError, match=r"lr in train\(\) is not a setting"):
        prx_post.train("sft", file, lr=1)
    assert given == {}


def test_public_names_are_found_when_they_are_first_used():
    assert callable(prx_post.objectives.ladd.generator_loss)
    assert prx_post.rewards.Reward.__name__ == "Reward"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        prx_post.nothing  # noqa: B018
