import copy

import pytest
import torch

from prx_post.base.errors import PrxPostError
from prx_post.model import lora
from prx_post.model.checkpoint import inspect, load
from prx_post.model.config import ModelConfig
from prx_post.model.denoiser import predict_velocity
from prx_post.model.merging import merge


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    x, embeds = torch.randn(2, 4, 8, 16, generator=generator), torch.randn(2, 5, 128, generator=generator)
    return x, torch.tensor([0.2, 0.9]), embeds, torch.ones(2, 5, dtype=torch.bool)


def adapted(base):
    model = lora.attach(load(str(base)).transformer, ModelConfig(model_name_or_path="tiny", use_peft=True, lora_r=4))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start; a trained adapter is not
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def test_a_fresh_adapter_changes_nothing(base, inputs):
    plain = load(str(base)).transformer
    fresh = lora.attach(copy.deepcopy(plain), ModelConfig(model_name_or_path="tiny", use_peft=True))
    with torch.no_grad():
        assert torch.equal(predict_velocity(plain, *inputs), predict_velocity(fresh, *inputs))


def test_only_the_adapter_trains_and_it_sits_on_every_projection_of_every_block(base):
    model = adapted(base)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in trainable)
    assert len(trainable) == 6 * 6 * 2  # six blocks, six projections, A and B


def test_merged_weights_equal_the_attached_adapter(base, inputs):
    model = adapted(base)
    with torch.no_grad():
        attached = predict_velocity(model, *inputs)
        plain = predict_velocity(load(str(base)).transformer, *inputs)
        merged = predict_velocity(merge(model), *inputs)
    # W x + s B A x against (W + s B A) x: fp32 rounding in six blocks
    assert (attached - merged).abs().max().item() < 5e-5
    assert (attached - plain).abs().max().item() > 1e-2


def test_a_saved_adapter_is_loaded_by_peft_alone(base, inputs, tmp_path):
    from peft import PeftModel

    model = adapted(base)
    lora.save_adapter(model, tmp_path / "adapter", "a card")
    again = PeftModel.from_pretrained(load(str(base)).transformer, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(predict_velocity(model, *inputs), predict_velocity(again, *inputs))
    assert (tmp_path / "adapter" / "README.md").read_text() == "a card"
    assert '"base_model_name_or_path": "tiny"' in (tmp_path / "adapter" / "adapter_config.json").read_text()


def test_an_unknown_target_is_named_with_those_there_are(base):
    lora.check_targets(inspect(base), None)
    with pytest.raises(PrxPostError, match=r"'to_q' is no linear layer of the transformer.*img_qkv_proj"):
        lora.check_targets(inspect(base), ["to_out.0", "to_q"])
