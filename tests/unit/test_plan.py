"""`prx-post plan`: bytes counted by hand, how ZeRO divides them, what is said when something does not fit."""

import dataclasses
import json
import shutil

import huggingface_hub
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from prx_post.base.errors import ConfigError
from prx_post.data.encoders import Encoders
from prx_post.data.readers import read_rows
from prx_post.data.sizes import CacheSize
from prx_post.model.text import PromptCleaner
from prx_post.planning.disk import run_size
from prx_post.planning.dry_run import DryRun, StorageWatch
from prx_post.planning.memory import memory
from prx_post.planning.parallel import Parallel
from prx_post.planning.plan import check, lines

MIB = 2**20
NO_DATA = ["--dataset_name", "/no/such/data", "--height", "32", "--width", "64", "--output_dir", "unused"]


TINY = ["--model_name_or_path", "tiny", *NO_DATA]


def planner(*args: object):
    return check(["--model_name_or_path", "tiny", *NO_DATA, *map(str, args)])[0]


def report(*args: object) -> str:
    return "\n".join(lines(*check(["--model_name_or_path", "tiny", *NO_DATA, *map(str, args)])))


def test_the_watch_counts_what_autograd_keeps():
    # x [256, 1024] fp32 is 1 MiB, and so are x·W and its relu. Relu keeps its result alone, so x·W goes.
    with FakeTensorMode():
        weight = nn.Parameter(torch.empty(1024, 1024))
        watch = StorageWatch([weight])
        weight.register_post_accumulate_grad_hook(watch.mark_gradient)
        with watch:
            x = torch.empty(256, 1024)
            y = (x @ weight).relu()
            assert (watch.live, watch.peak) == (2 * MIB, 3 * MIB)
            y.sum().backward()
        # x, y and the gradient of the weight, 4 MiB
        assert (watch.live, watch.gradients) == (6 * MIB, 4 * MIB)
        # at most x, y, the gradients of x·W and of the weight, and two scalars: the sum and its gradient
        assert watch.peak == 7 * MIB + 2 * 4
        del y
        assert watch.live == 5 * MIB


def test_state_of_the_embedded_network_counted_by_hand():
    run = planner().dry_run()
    assert run.parameters == run.trained_parameters == 2_320_208  # the model card's 2.3M
    assert run.weights == run.gradients == 9_280_832
    # Two moments, and a step counter of 4 bytes a tensor. Of these a block has 11 (qkv, text kv, out, 3 norms, 3 in the
    # MLP, 2 in the modulation), 6 blocks; and the four embeddings and the final layer 12.
    assert run.optimizer == 18_561_664 + 4 * 78
    assert run.step_temporaries < 64  # AdamW is fused


def test_operations_of_a_step_counted_by_hand():
    run = planner("--per_device_train_batch_size", 3, "--gradient_accumulation_steps", 5).dry_run(operations=True)
    # 8 × 16 latents in patches of 2 × 2 are 32 image tokens, beside 24 of text; the width is 128. A block: projections
    # of the image (qkv 3, out 1, the MLP's three 3.5 each: 14.5) and of the text (2), modulation (6, once a sample),
    # and attention of the image's tokens to both, its scores and their sum. Two operations a product.
    width, image, text = 128, 32, 24
    block = width**2 * (14.5 * image + 2 * text + 6) + 2 * width * image * (image + text)
    # in: 16 values a patch; text: 128; time: 256 to 128 to 128; out: modulation 2, 16 values
    ends = image * 16 * width + text * width**2 + 3 * width**2 + 2 * width**2 + image * width * 16
    forward = 2 * (6 * block + ends)
    assert run.flops_of_sample == forward
    # backward takes twice as much, attention's two and a half times, for it makes its scores again; what comes first
    # needs no gradient of its input
    attention, first = 6 * 2 * 2 * width * image * (image + text), 2 * (image * 16 + text * width + 2 * width) * width
    assert run.flops == 15 * (3 * forward + attention // 2 - first)


def test_muon_keeps_one_moment_of_the_blocks_matrices():
    run = planner("--optim", "muon").dry_run()
    # Of 128² in a block: qkv 3, text kv 2, out 1, the MLP's three 3.5 each, modulation 6: 22.5, times 6 blocks.
    matrices = 2_211_840
    one_moment, two_moments = 4 * matrices, 8 * (2_320_208 - matrices)
    assert 0 <= run.optimizer - one_moment - two_moments < 4 * 78
    assert run.step_temporaries > 0


def test_lora_trains_the_adapter_and_still_holds_every_weight():
    run = planner("--use_peft", "true").dry_run()
    # Rank 16, (in + out) of qkv 512, text kv 384, out 256, gate, up and down 576 each: 2,880, in 6 blocks.
    assert run.trained_parameters == 276_480
    assert run.weights == 4 * (2_320_208 + 276_480)
    assert run.gradients == 4 * 276_480


def test_checkpointing_and_autocast_keep_less():
    plain = planner().dry_run()
    assert planner("--gradient_checkpointing", "true").dry_run().activations < plain.activations / 2
    assert planner("--bf16", "true").dry_run().activations < plain.activations


def test_activations_grow_with_the_batch_and_not_the_state():
    one, four = (planner("--per_device_train_batch_size", n).dry_run() for n in (16, 64))
    assert four.activations == pytest.approx(4 * one.activations, rel=0.03)
    assert four.optimizer == one.optimizer


RUN = DryRun(
    parameters=1000,
    trained_parameters=1000,
    weights=4000,
    gradients=4000,
    optimizer=8000,
    activations=500,
    activations_and_gradients=4100,
    step_temporaries=0,
)


def bucketed(processes: int, stage: int, **settings: object) -> Parallel:
    return Parallel(processes, stage, reduce_bucket_size=25, **settings)


def test_alone_the_gradients_come_while_the_activations_go():
    assert memory(RUN, Parallel(), has_ema=True).peak == 4000 + 8000 + 4000 + 4100
    assert memory(RUN, Parallel(), has_ema=False).peak == 4000 + 8000 + 4100


def test_data_parallel_keeps_the_gradients_buckets():
    assert memory(RUN, Parallel(2), has_ema=False).peak == 4000 + 8000 + 4000 + 500


def test_zero_2_on_4_processes_keeps_a_quarter_of_gradients_and_state():
    split = memory(RUN, bucketed(4, 2), has_ema=True)
    assert (split.weights, split.ema) == (4000, 4000)
    assert split.gradients == 1000
    assert split.optimizer == 1000 + 2000  # a quarter of the weights once more, and of the moments
    # at the end of a step the gradients twice, 2000; that is more than activations 500, bucket 100 and gradients 1000
    assert split.peak == 4000 + 4000 + 3000 + 2000


def test_zero_2_holds_two_shares_of_gradients_while_it_accumulates():
    accumulating = dataclasses.replace(RUN, accumulates=True)
    assert memory(accumulating, bucketed(4, 2), has_ema=False).gradients == 2000
    assert planner("--gradient_accumulation_steps", 2).dry_run().accumulates


def test_zero_1_keeps_whole_gradients():
    split = memory(RUN, bucketed(4, 1), has_ema=False)
    assert (split.gradients, split.optimizer) == (4000, 3000)


def test_zero_3_splits_the_weights_and_gathers_them():
    split = memory(RUN, bucketed(4, 3), has_ema=True)
    assert (split.weights, split.gradients, split.optimizer, split.ema) == (1000, 1000, 1000 + 2000, 1000)
    # 4000 gathered, the bucket thrice; the zeros of the first step, 4000, are 2000 more than the moments after it
    assert split.buffers == 4000 + 300 + 2000
    assert split.peak == 1000 + 1000 + 1000 + 1000 + 4000 + 500 + 4300


def test_offloading_moves_the_optimizer_to_the_host():
    there = memory(RUN, bucketed(4, 2), has_ema=False)
    offloaded = memory(RUN, bucketed(4, 2, offload=True), has_ema=False)
    assert (offloaded.optimizer, offloaded.gradients) == (0, 0)
    assert offloaded.host > there.host
    assert offloaded.peak == 4000 + 500 + 100


def test_a_checkpoint_is_copied_to_the_host_in_shares():
    assert memory(RUN, Parallel(), has_ema=True).host == 4000 + 8000 + 4000
    assert memory(RUN, Parallel(4), has_ema=True).host == 4000


def test_checkpoints_on_disk_are_one_more_than_are_kept():
    planned = planner("--max_steps", 1000, "--save_steps", 300, "--save_total_limit", 2)
    size = run_size(RUN, planned.config, use_peft=False)
    assert (size.saves, size.held) == (4, 3)  # after 300, 600, 900 and 1000
    assert size.checkpoint == 4000 + 8000 + 4000


@pytest.mark.parametrize(
    ("args", "processes", "stage", "offload"),
    [
        ([], 1, 0, False),
        (["--accelerate_config", "zero2"], 8, 2, False),
        (["--accelerate_config", "zero3", "--num_processes", "4"], 4, 3, False),
        (["--accelerate_config", "multi_gpu", "--deepspeed", "zero2_offload"], 8, 2, True),
        (["--num_processes", "2"], 2, 0, False),
    ],
)
def test_the_launch_settings_are_read_as_the_launcher_would(args, processes, stage, offload):
    parallel = planner(*args).parallel
    assert (parallel.num_processes, parallel.zero_stage, parallel.offload) == (processes, stage, offload)


def test_a_deepspeed_file_is_read(tmp_path):
    file = tmp_path / "zero.json"
    zero = {"stage": 3, "reduce_bucket_size": 1e6, "sub_group_size": "auto", "offload_optimizer": {"device": "cpu"}}
    file.write_text(json.dumps({"zero_optimization": zero}))
    parallel = planner("--deepspeed", file, "--num_processes", 2).parallel
    assert parallel == Parallel(2, 3, offload=True, reduce_bucket_size=1_000_000)


@pytest.mark.parametrize("name", ["fsdp1", "zero9"])
def test_an_accelerate_config_that_cannot_be_followed_is_refused(name):
    with pytest.raises(ConfigError, match=f"accelerate_config is '{name}'"):
        planner("--accelerate_config", name)


def test_the_cache_of_a_local_data_set_is_what_encoding_makes(image_folder):
    planned = planner("--dataset_name", image_folder)
    found = planned.stage.cache_size()
    encoders = Encoders(planned.stage.pipeline, PromptCleaner(), torch.device("cpu"), torch.float32)
    embeddings = sum(encoders.prompts(prompt).nbytes for prompt in set(read_rows(planned.stage.data_config).prompts))
    # 48 images of 32×64: 4 channels of 8×16, fp32
    assert found == CacheSize(rows=48, looked_at=48, latents=48 * 4 * 8 * 16 * 4, embeddings=embeddings, entries=48)


def test_of_a_long_data_set_some_rows_are_looked_at(image_folder, monkeypatch):
    monkeypatch.setattr("prx_post.data.sizes.LOOKED_AT", 12)
    planned = planner("--dataset_name", image_folder)
    found = planned.stage.cache_size()
    assert (found.rows, found.looked_at, found.latents) == (48, 12, 48 * 4 * 8 * 16 * 4)


def test_data_that_is_elsewhere_is_a_line_and_no_error():
    assert "cache        unknown: /no/such/data is not on this machine" in report()


def test_what_does_not_fit_is_said_with_what_would_help():
    text = report("--device_memory_gib", 0.1, "--per_device_train_batch_size", 64)
    assert "warning: does not fit" in text
    assert "gradient_checkpointing: true saves" in text
    assert "GiB, fits" in text
    assert "warning" not in report("--device_memory_gib", 80)


def test_a_pipeline_without_any_weights_is_planned(base, tmp_path, prx_post):
    folder = tmp_path / "pipeline"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    result = prx_post("plan", "--model_name_or_path", folder, *NO_DATA, "--bf16", "true", check=True)
    assert "trained            2,320,208   100.00 %, every weight" in result.stdout
    assert "bf16: true" in result.stdout
    assert not (tmp_path / "unused").exists()


def test_settings_are_checked_as_by_the_stage_itself(prx_post):
    result = prx_post("plan", "--model_name_or_path", "tiny", *NO_DATA, "--lerning_rate", "1")
    assert result.returncode == 2
    assert "lerning_rate on the command line is not a setting of this command" in result.stderr
    result = prx_post("plan", "--model_name_or_path", "tiny", *NO_DATA, "--stage", "stf")
    assert result.returncode == 2
    assert "stage is 'stf', but must be one of sft" in result.stderr


def test_the_plan_answers_first():
    assert report().startswith("plan\n  fits         not known: ")
    text = report("--device_memory_gib", 0.01)
    assert text.startswith("plan\n  fits         no: ")
    flops = planner().dry_run(operations=True).flops
    common = ("--device_memory_gib", 8, "--max_steps", 7200, "--num_processes", 4, "--price_per_hour", 3)
    for given, seconds in (
        (("--seconds_per_step", 2.5), 2.5),
        (("--utilisation", 0.4, "--peak_tflops", flops / 1e12), 2.5),
    ):
        text = report(*common, *given)
        assert text.startswith("plan\n  fits         yes: ")
        assert f"  time         5 hours on 4 GPUs: {seconds} s per step" in text
        assert "  price        60.00 for 20 GPU hours\n" in text
    with pytest.raises(ConfigError, match=r"utilisation is 0.4, but must be .* together with peak_tflops"):
        planner("--utilisation", 0.4)


def test_epochs_are_planned_where_the_data_are_there(image_folder):
    given = ("--num_train_epochs", 2.5, "--per_device_train_batch_size", 16)
    planned = "\n".join(lines(*check([*TINY, "--dataset_name", str(image_folder), *map(str, given)])))
    assert "  optimizer            8   of 16 samples" in planned
    assert "2.67 epochs of 48\n" in planned
    assert "num_train_epochs is 2.5, but how much there is to train on is not known here" in report(*given)


@pytest.mark.parametrize(
    ("name", "size", "latents"),
    [("prx-512-t2i", (512, 512), (16, 64, 64)), ("prx-512-t2i-dc-ae-sft", (512, 512), (32, 16, 16))],
)
def test_published_checkpoints_are_planned_by_their_shapes_without_a_network(name, size, latents, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)  # is not asked
    found = check(["--model_name_or_path", f"Photoroom/{name}", "--dataset_name", "/none", "--output_dir", "unused"])[0]
    assert found.stage.pipeline.latent_shape(*size) == latents
    assert found.stage.pipeline.max_prompt_tokens == 256
    assert found.dry_run().parameters == pytest.approx(1_170_691_648, rel=1e-3)
