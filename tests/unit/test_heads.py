import pytest
import torch

from prx_post.base.errors import ConfigError
from prx_post.model.checkpoint import load
from prx_post.model.heads import DiscriminatorHeads, block_tokens, check_blocks, default_blocks


@pytest.mark.parametrize(
    ("depth", "blocks"), [(16, [3, 7, 11, 15]), (24, [5, 11, 17, 23]), (6, [0, 2, 3, 5]), (1, [0])]
)
def test_heads_sit_by_default_at_the_end_of_each_quarter(depth, blocks):
    assert default_blocks(depth) == blocks


@pytest.mark.parametrize("blocks", [[16], [-1, 3], [3, 3], []])
def test_a_block_that_is_not_there_is_an_error_that_says_which_are(blocks):
    with pytest.raises(ConfigError, match=r"head_blocks is .* Choose from 0 to 15"):
        check_blocks(blocks, depth=16)


@pytest.fixture(scope="module")
def transformer(base):
    return load(str(base)).transformer.eval().requires_grad_(False)


def inputs(count: int = 2):
    generator = torch.Generator().manual_seed(0)
    x_t, t = torch.randn(count, 4, 8, 16, generator=generator), torch.full((count,), 0.6)
    embeds = torch.randn(count, 3, 128, generator=generator)
    return x_t, t, embeds, torch.ones(count, 3, dtype=torch.bool)


def test_tokens_are_what_the_blocks_give_in_row_order(transformer):
    """The last block's tokens, through the final layer and put together again, are the transformer's own output."""
    x_t, t, embeds, mask = inputs()
    (last,) = block_tokens(transformer, [5], x_t, t, embeds, mask)
    whole = transformer(x_t, t, embeds, mask, return_dict=False)[0]
    vector = transformer._compute_timestep_embedding(t, dtype=last.dtype)
    patches = transformer.final_layer(last, vector)  # [B, 4 · 8, C · 2 · 2]
    grid = patches.view(2, 4, 8, 4, 2, 2)
    assert torch.equal(grid.permute(0, 3, 1, 4, 2, 5).reshape(2, 4, 8, 16), whole)


def test_gradients_reach_the_input_and_no_weight_of_the_teacher(transformer):
    x_t, t, embeds, mask = inputs()
    tokens = block_tokens(transformer, [1, 4], x_t.requires_grad_(), t, embeds, mask)
    tokens.square().mean().backward()
    assert x_t.grad.abs().sum() > 0
    assert all(p.grad is None for p in transformer.parameters())


def test_checkpointing_the_teacher_changes_neither_tokens_nor_gradients(base):
    results = []
    for checkpointing in (False, True):
        transformer = load(str(base)).transformer.requires_grad_(False)
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        x_t, t, embeds, mask = inputs()
        tokens = block_tokens(transformer, [1, 4], x_t.requires_grad_(), t, embeds, mask)
        tokens.square().mean().backward()
        results.append((tokens.detach(), x_t.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_hooks_are_gone_afterwards(transformer):
    block_tokens(transformer, [0, 3], *inputs())
    assert not any(block._forward_hooks for block in transformer.blocks)


def heads() -> DiscriminatorHeads:
    torch.manual_seed(0)
    return DiscriminatorHeads([1, 4], channels=8, text_width=6, width=16)


def given(count: int = 2):
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(count, 3, 6, generator=generator)
    tokens = torch.randn(2, count, 12, 8, generator=generator)
    return tokens, torch.full((count,), 0.3), embeds, torch.ones(count, 3, dtype=torch.bool), (3, 4)


def test_there_is_a_logit_for_every_head_sample_and_token():
    assert heads()(*given(5)).shape == (2, 5, 12)


def test_logits_depend_on_prompt_and_noise_level_but_not_on_padding():
    model = heads()
    tokens, t, embeds, mask, grid = given()
    plain = model(tokens, t, embeds, mask, grid)
    assert not torch.allclose(plain, model(tokens, t + 0.2, embeds, mask, grid))
    assert not torch.allclose(plain, model(tokens, t, embeds.flip(0), mask, grid))
    longer = torch.nn.functional.pad(embeds, (0, 0, 0, 2), value=7.0)
    assert torch.allclose(plain, model(tokens, t, longer, torch.nn.functional.pad(mask, (0, 2)), grid), atol=1e-6)


def test_a_head_sees_its_neighbourhood_in_the_grid_and_no_further():
    """Two 3×3 convolutions: a token reaches two rows and columns away."""
    model = heads()
    tokens, t, embeds, mask, _ = given(1)
    tokens = torch.randn(2, 1, 7 * 8, 8, generator=torch.Generator().manual_seed(2))
    changed = tokens.clone()
    changed[:, :, 0] += 1  # row 0, column 0
    difference = (model(tokens, t, embeds, mask, (7, 8)) - model(changed, t, embeds, mask, (7, 8))).abs()
    touched = (difference.view(2, 7, 8) > 1e-7).any(0)
    assert touched[:3, :3].all()
    assert not touched[3:].any()
    assert not touched[:, 3:].any()


def test_calibration_standardises_each_channel_and_keeps_what_tells_samples_apart():
    model = heads()
    generator = torch.Generator().manual_seed(3)
    tokens = 5 + torch.tensor([1.0, 10.0]).repeat(4) * torch.randn(2, 64, 12, 8, generator=generator)
    model.calibrate(tokens.split(20, dim=1))
    head = model.heads[0]
    standard = (tokens[0] - head.mean) / head.std
    assert standard.mean((0, 1)).abs().max() < 1e-4
    assert (standard.std((0, 1)) - 1).abs().max() < 1e-2
    shifted = (tokens[0, 0] + 3 * head.std - head.mean) / head.std
    assert shifted.mean().item() == pytest.approx(standard[0].mean().item() + 3, abs=1e-4)
