import json
import os
import re
import time

import pytest

from prx_post.base.errors import ConfigError, PrxPostError
from prx_post.base.parsing import parse, setting
from prx_post.data.config import DataConfig
from prx_post.engine.config import TrainConfig
from prx_post.engine.processes import check_no_abandoned_build, read_deepspeed_json
from prx_post.generate import GenerateConfig
from prx_post.model.config import ModelConfig
from prx_post.stages.sft.config import SFTConfig

KINDS = [ModelConfig, DataConfig, SFTConfig]
COMPLETE = ["--model_name_or_path", "tiny", "--dataset_name", "data", "--output_dir", "run"]


def write(tmp_path, text: str) -> list[str]:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return ["--config", str(path)]


def test_yaml_is_read_and_the_command_line_overrides_it(tmp_path):
    config = write(tmp_path, "learning_rate: 1e-4\nmax_steps: 7\noutput_dir: run\n")
    (train,) = parse([TrainConfig], [*config, "--max_steps", "9"], "test")
    assert train.learning_rate == 1e-4  # YAML 1.1 reads 1e-4 as text; the parser makes it a number
    assert train.max_steps == 9


def test_integers_are_taken_where_a_number_is_expected(tmp_path):
    (train,) = parse([TrainConfig], write(tmp_path, "guidance_scale: 3\noutput_dir: run\n"), "test")
    assert train.guidance_scale == 3.0
    assert isinstance(train.guidance_scale, float)


def test_a_mistyped_key_in_the_file_names_the_nearest_setting(tmp_path):
    with pytest.raises(ConfigError, match=r"lerning_rate in .*config.yaml .* Did you mean learning_rate\?"):
        parse(KINDS, write(tmp_path, "lerning_rate: 0.1\n"), "test")


def test_a_mistyped_flag_names_the_nearest_setting():
    with pytest.raises(ConfigError, match=r"max_step on the command line .* Did you mean max_steps\?"):
        parse(KINDS, [*COMPLETE, "--max_step", "5"], "test")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("max_steps: soon", "max_steps"),
        ("max_steps: 2.5", "max_steps is 2.5, but must be a whole number"),
        ("max_steps: true", "max_steps is True, but must be a whole number"),
        ("bf16: 3", "bf16 is 3, but must be true or false"),
        ("sample_seeds: [0, a]", "sample_seeds"),
        ("sample_prompts: [1, 2]", "sample_prompts is .*, but must be a list, each text"),
        ("sample_prompts: [one, 472]", "because its element 472 is int. Write sample_prompts as a list, each text"),
        ("sample_seeds: [0, null]", "because its element None is NoneType"),
        ("learning_rate: [1.0e-4]", "learning_rate is .*, but must be a number"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(tmp_path, line, message):
    with pytest.raises(ConfigError, match=message):
        parse([TrainConfig], write(tmp_path, f"output_dir: run\n{line}\n"), "test")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_steps", "0"], "max_steps is 0, but must be above 0"),
        (["--optim", "adam"], r"optim is 'adam', but must be one of adamw, muon .* Did you mean 'adamw'"),
        (["--caption_dropout", "1.5"], "caption_dropout is 1.5, but must be between 0 and 1"),
        (["--guidance_scale", "0.5"], "guidance_scale is 0.5, but must be 1 or more"),
        (["--adam_beta1", "1"], "adam_beta1 is 1.0, but must be below 1"),
        (["--seed", "-1"], "seed is -1, but must be 0 or more"),
        (["stray"], "'stray' on the command line belongs to no setting"),
        (["--height", "32"], "height is 32, but must be set together with width"),
        (["--cache", "ram"], "cache is 'ram', but must be one of disk, none"),
        (["--contrastive_weight", "0.05", "--per_device_train_batch_size", "1"], "per_device_train_batch_size is 1"),
        (["--lr_scheduler_type", "cosin"], "lr_scheduler_type is 'cosin'.* Did you mean 'cosine'"),
        (["--report_to", "tensorbord"], "report_to is 'tensorbord'.* Did you mean 'tensorboard'"),
    ],
)
def test_a_value_out_of_range_is_named_with_the_rule_and_what_to_do(flags, message):
    with pytest.raises(ConfigError, match=message):
        parse(KINDS, [*COMPLETE, *flags], "test")


@pytest.mark.parametrize("missing", ["model_name_or_path", "dataset_name", "output_dir"])
def test_what_a_run_cannot_do_without_is_asked_for(missing):
    position = COMPLETE.index(f"--{missing}")
    with pytest.raises(ConfigError, match=f"{missing} is None"):
        parse(KINDS, COMPLETE[:position] + COMPLETE[position + 2 :], "test")


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "is not valid YAML"), ("- a\n- b\n", "must hold `key: value` lines"), ("just text", "must hold")],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        parse(KINDS, write(tmp_path, text), "test")


def test_config_may_be_written_with_an_equals_sign(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("output_dir: run\nmax_steps: 3\n")
    (train,) = parse([TrainConfig], [f"--config={path}"], "test")
    assert train.max_steps == 3


def test_a_file_of_another_encoding_or_with_a_wrong_env_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes("run_name: \xe9".encode("latin-1"))
    with pytest.raises(ConfigError, match="is not valid YAML"):
        parse(KINDS, ["--config", str(path)], "test")
    path.write_text("env: 3\n")
    with pytest.raises(ConfigError, match="env in .* must hold `NAME: value` lines"):
        parse(KINDS, ["--config", str(path)], "test")


def test_a_missing_config_file_is_named():
    with pytest.raises(ConfigError, match=r"no-such\.yaml.*there is no such file"):
        parse(KINDS, ["--config", "no-such.yaml"], "test")
    with pytest.raises(ConfigError, match="--config is without a file"):
        parse(KINDS, ["--config"], "test")


@pytest.mark.parametrize(("given", "meant"), [("none", []), (["none"], []), ("wandb", ["wandb"]), ([], [])])
def test_report_to_takes_what_training_arguments_takes(given, meant):
    assert SFTConfig(output_dir="unused", report_to=given).report_to == meant


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"deepspeed": "zero4"}, "deepspeed is 'zero4', but must be one of zero1, zero2"),
        ({"deepspeed": "zero2", "optim": "muon"}, "optim is 'muon', but must be adamw with deepspeed"),
        ({"save_total_limit": 0}, "save_total_limit is 0, but must be above 0"),
        ({"save_steps": -1}, "save_steps is -1, but must be 0 or more"),
        ({"max_nonfinite_steps": 0}, "max_nonfinite_steps is 0, but must be above 0"),
    ],
)
def test_what_cannot_be_trained_so_is_refused_when_the_config_loads(changes, message):
    with pytest.raises(ConfigError, match=message):
        SFTConfig(output_dir="unused", **changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"optimizer": {"type": "AdamW"}}, "has 'optimizer', which belongs to optim"),
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}, "enables 'bf16', but the weights stay fp32"),
        ({"train_batch_size": "auto"}, "has no zero_optimization with stage"),
    ],
)
def test_a_deepspeed_file_may_not_contradict_the_run(tmp_path, content, message):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        read_deepspeed_json(str(path))
    with pytest.raises(ConfigError, match="which cannot be read"):
        read_deepspeed_json(str(tmp_path / "absent.json"))


def test_the_lock_of_a_killed_build_is_named_and_a_new_one_is_let_be(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    check_no_abandoned_build()
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    check_no_abandoned_build()
    os.utime(lock, (0, time.time() - 3 * 3600))
    with pytest.raises(PrxPostError, match=rf"{lock} is 3\.0 h old: .* Delete {lock.parent}\."):
        check_no_abandoned_build()


def test_a_key_that_stands_twice_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"is not valid YAML: max_steps stands there twice .*line 3"):
        parse(KINDS, write(tmp_path, "max_steps: 5\noutput_dir: run\nmax_steps: 6\n"), "test")


def test_all_unknown_keys_are_named_at_once_by_what_they_are_called_here(tmp_path):
    text = "lr: 1.0e-4\nbatch_size: 4\nepochs: 3\ncaption_column: text\nwarmup_step: 5\n"
    with pytest.raises(ConfigError) as caught:
        parse(KINDS, write(tmp_path, text), "test")
    message = str(caught.value)
    for hint in (
        "lr in .* Here it is learning_rate.",
        "batch_size in .* Here it is per_device_train_batch_size.",
        "epochs in .*num_train_epochs",
        "caption_column in .* Here it is prompt_column.",
        r"warmup_step in .* Did you mean warmup_steps\?",
    ):
        assert re.search(hint, message), hint


@pytest.mark.parametrize("value", [".inf", ".nan", "-.inf"])
def test_every_number_must_be_finite(tmp_path, value):
    with pytest.raises(ConfigError, match="learning_rate is .*, but must be finite"):
        parse(KINDS, [*write(tmp_path, f"learning_rate: {value}\n"), *COMPLETE], "test")


@pytest.mark.parametrize(
    "spelling", ["--guidance-scale=2", "--guidance_scale 2", "--guidance_scale 3 --guidance_scale 2"]
)
def test_a_setting_is_found_however_its_flag_is_spelt(spelling, tmp_path):
    args = spelling.split()
    assert float(setting(args, "guidance_scale")) == 2
    common = ["--model_name_or_path", "tiny", "--output_dir", str(tmp_path)]
    assert parse([GenerateConfig], [*common, *args], "test")[0].guidance_scale == 2


@pytest.mark.parametrize(
    ("flags", "value"), [([], None), (["--skip_text_cleaning"], True), (["--skip-text-cleaning", "false"], False)]
)
def test_a_flag_that_may_be_null_needs_no_value(flags, value, tmp_path):
    common = ["--model_name_or_path", "tiny", "--output_dir", str(tmp_path)]
    assert parse([GenerateConfig], [*common, *flags], "test")[0].skip_text_cleaning is value


@pytest.mark.parametrize("value", ["$HOME/runs", "${HOME}/runs", "runs/$USER", "[a, $DATA/b]"])
def test_variables_in_a_file_are_refused_rather_than_taken_for_names(tmp_path, value):
    with pytest.raises(ConfigError, match=r"output_dir in .* is .*\$.*, but variables are not expanded in a file"):
        parse(KINDS, write(tmp_path, f"output_dir: {value}\n"), "test")


def test_a_price_in_a_prompt_is_no_variable(tmp_path):
    parse(KINDS, [*write(tmp_path, "sample_prompts: [a $5 note, $ and cents]\n"), *COMPLETE], "test")
