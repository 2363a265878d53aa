"""The student's losses, and the ways in which distillations are known to go wrong, each a test."""

import copy
from collections import Counter

import pytest
import torch

from prx_post.data.plan import Draw
from prx_post.flow import interpolate
from prx_post.model.denoiser import predict_velocity
from prx_post.objectives import ladd
from prx_post.stages.distill.levels import Randomness
from tests.distilling import DENSITIES, GUIDANCE, SIGMAS, batch, config, objective


def gradients(model: torch.nn.Module, data: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss, _ = model(data)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def size(grads: dict[str, torch.Tensor], prefix: str) -> float:
    return sum(g.square().sum().item() for name, g in grads.items() if name.startswith(prefix)) ** 0.5


def test_every_method_gives_the_student_a_gradient_and_the_teacher_none():
    for method in ("ladd", "trajectory", "dmd2"):
        model = objective(method=[method])
        grads = gradients(model, batch())
        assert size(grads, "policy.") > 1e-6, method
        assert all(p.grad is None for p in model.teacher.transformer.parameters())


def test_the_teacher_is_no_part_of_the_module():
    model = objective(method=["ladd", "trajectory", "dmd2"])
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"policy", "networks"}
    ours = {id(p) for p in model.parameters()}
    assert not ours & {id(p) for p in model.teacher.transformer.parameters()}


def test_pure_noise_goes_to_the_student_only_at_level_one():
    """The student of level i sees the teacher's latent noised to sigmas[i], not noise at every level."""
    model = objective()
    data = batch()
    for level, sigma in enumerate(SIGMAS[:-1]):
        step = model.student_step({**data, "level": torch.full((3,), level)})
        assert torch.equal(step.t, sigma.expand(3))
        assert torch.equal(step.t_next, SIGMAS[level + 1].expand(3))
        noise = (step.x_t - (1 - sigma) * data["latents"]) / sigma
        # what is left after taking the latent away is standard noise, the same at every level
        assert noise.std().item() == pytest.approx(1, abs=0.1)
        if level == 0:
            pure = noise
        assert torch.allclose(noise, pure, atol=1e-5)


def test_levels_are_drawn_as_often_as_their_weights_say():
    draw = Randomness(torch.tensor([0.7, 0.1, 0.1, 0.1]))
    counts = Counter(int(draw(Draw(0, seed), (1,), 0)["level"]) for seed in range(600))
    # binomial with n = 600: 420 ± 4·11 and 60 ± 4·7.4
    assert 376 < counts[0] < 464
    assert all(30 < counts[level] < 90 for level in (1, 2, 3))


def test_a_warm_up_narrows_the_levels_and_then_widens_them():
    narrow, wide = torch.tensor([0.0, 0, 1, 0]), torch.tensor([1.0, 0, 0, 0])
    draw = Randomness(wide, warmup_level_weights=narrow, num_warmup_steps=5)
    assert {int(draw(Draw(0, seed), (1,), 4)["level"]) for seed in range(20)} == {2}
    assert {int(draw(Draw(0, seed), (1,), 5)["level"]) for seed in range(20)} == {0}
    model = objective()
    assert model.student_step(batch(levels=[0, 0, 1, 0])).t.tolist() == pytest.approx([0.7] * 3)


def test_the_sample_is_x0_and_not_the_velocity():
    """At each level, x_t less sigma times the velocity: for a perfect velocity that is the latent itself."""
    model = objective()
    data = batch()
    step = model.student_step(data)
    noise = (step.x_t - (1 - step.t.view(-1, 1, 1, 1)) * data["latents"]) / step.t.view(-1, 1, 1, 1)
    perfect = copy.copy(step)
    object.__setattr__(perfect, "velocity", noise - data["latents"])
    assert torch.allclose(perfect.sample, data["latents"], atol=1e-5)


def test_the_teacher_is_followed_with_guidance():
    model = objective(method=["trajectory"])
    step = model.student_step(batch())
    embeds, mask = step.prompts
    null = model.teacher.null.expand(3, -1, -1)
    with torch.no_grad():
        cond = predict_velocity(model.teacher.transformer, step.x_t, step.t, embeds, mask)
        null_mask = torch.ones(null.shape[:2], dtype=torch.bool)
        uncond = predict_velocity(model.teacher.transformer, step.x_t, step.t, null, null_mask)
    expected = uncond + GUIDANCE * (cond - uncond)
    # the two halves run in one batch, padded to one length: fp32 rounding, GUIDANCE times
    assert torch.allclose(model.teacher.velocity(step.x_t, step.t, step.prompts), expected, atol=2e-4)
    assert (expected - cond).abs().max() > 0.05


def test_a_student_that_already_does_what_its_teacher_does_has_nothing_to_learn():
    """One unguided teacher step from the same point: the student is the teacher, so the regression is zero."""
    model = objective(method=["trajectory"], trajectory_teacher_steps=1)
    model.teacher.guidance_scale = 1
    loss, _ = model(batch())
    assert loss.item() < 1e-8
    model.teacher.guidance_scale = GUIDANCE
    assert model(batch())[0].item() > 1e-3


def test_several_teacher_steps_end_where_a_sampler_on_the_finer_grid_ends():
    from prx_post.sampling import euler_sample

    model = objective(method=["trajectory"])
    step = model.student_step(batch(levels=[0.0, 1.0, 0.0, 0.0]))
    ours = model.teacher.follow(step.x_t, step.t, step.t_next, step.prompts, 4)
    fine = torch.tensor([0.9, 0.85, 0.8, 0.75, 0.7])
    theirs = euler_sample(lambda x, t: model.teacher.velocity(x, t, step.prompts), step.x_t, fine)
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_real_and_fake_are_judged_at_the_same_level_with_the_same_noise():
    """So a student whose sample is the teacher's latent cannot be told from it: both get the same logits."""
    model = objective()
    data = batch()
    seen = []
    tokens = model.teacher.tokens

    def spy(blocks, x_t, t, prompts):
        seen.append((x_t.detach(), t))
        return tokens(blocks, x_t, t, prompts)

    model.teacher.tokens = spy
    model(data)
    (fake, t_fake), (real, t_real) = seen
    assert torch.equal(t_fake, t_real)
    step = model.student_step(data)
    level = t_real.view(-1, 1, 1, 1)
    difference = (1 - level) * (step.sample.detach() - data["latents"])  # the noise cancels
    assert torch.allclose(fake - real, difference, atol=1e-5)


def test_one_backward_pass_gives_both_networks_the_gradients_of_two_separate_ones():
    """The combined update against the alternating one: the student's loss alone, then the heads' loss alone."""
    model = objective()
    data = batch()
    combined = gradients(model, data)
    heads, teacher = model.networks["ladd"], model.teacher
    step = model.student_step(data)
    t, noise = (data["ladd_t"], data["ladd_noise"])

    def logits(x0):
        return heads(teacher.tokens([1, 4], interpolate(x0, noise, t), t, step.prompts), t, *step.prompts, (4, 8))

    model.zero_grad()
    ladd.generator_loss(logits(step.sample)).backward()
    for name, parameter in model.policy.named_parameters():
        assert torch.allclose(combined[f"policy.{name}"], parameter.grad, rtol=1e-4, atol=1e-8), name
    model.zero_grad()
    ladd.discriminator_loss(logits(data["latents"]), logits(step.sample.detach())).backward()
    for name, parameter in heads.named_parameters():
        assert torch.allclose(combined[f"networks.ladd.{name}"], parameter.grad, rtol=1e-4, atol=1e-8), name


def test_following_the_gradients_the_student_fools_and_the_heads_tell_apart():
    model = objective()
    data = batch(levels=[1, 0, 0, 0])
    before = model(data)[1]
    grads = gradients(model, data)

    def moved(prefix: str, rate: float) -> dict[str, torch.Tensor]:
        other = copy.deepcopy(model)
        other.teacher = model.teacher
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if name.startswith(prefix):
                    parameter -= rate * grads[name]
        return other(data)[1]

    assert moved("policy.", 1e-2)["generator_loss"] < before["generator_loss"]
    assert moved("networks.", 1e-2)["discriminator_loss"] < before["discriminator_loss"]


@pytest.mark.parametrize("method", ["ladd", "dmd2"])
def test_while_the_student_waits_only_the_other_network_gets_a_gradient(method):
    model = objective(method=[method], discriminator_warmup_steps=3)
    waiting = gradients(model, batch(step=2))
    assert size(waiting, "policy.") == 0
    assert {n for n, _ in model.policy.named_parameters()} == {
        n.removeprefix("policy.") for n in waiting if n.startswith("policy.")
    }  # zeros, which processes can reduce
    assert size(waiting, "networks.") > 0
    assert size(gradients(model, batch(step=3)), "policy.") > 0


def test_the_student_learns_in_every_nth_step():
    settings = config(discriminator_warmup_steps=2, discriminator_steps_per_generator=3)
    assert [settings.student_learns(step) for step in range(9)] == [False] * 4 + [True, False, False, True, False]


def test_methods_add_up_by_their_weights():
    data = batch()
    alone = {m: gradients(objective(method=[m]), data) for m in ("trajectory", "ladd")}
    both = gradients(objective(method=["trajectory", "ladd"], method_weights=[2.0, 0.5]), data)
    for name, gradient in both.items():
        if name.startswith("policy."):
            expected = 2 * alone["trajectory"][name] + 0.5 * alone["ladd"][name]
            assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-7), name
        else:  # the heads' own loss is not scaled
            assert torch.allclose(gradient, alone["ladd"][name], rtol=1e-4, atol=1e-8), name


def test_a_samples_draws_depend_on_its_seed_alone_and_no_method_on_the_others():
    everything = Randomness(torch.ones(4), renoising=DENSITIES, has_r1=True)
    dmd2_alone = Randomness(torch.ones(4), renoising={"dmd2": DENSITIES["dmd2"]})
    all_of_it, some = everything(Draw(0, 7), (4, 8, 16), 0), dmd2_alone(Draw(0, 7), (4, 8, 16), 0)
    assert set(some) == {"level", "noise", "dmd2_t", "dmd2_noise"}
    assert all(torch.equal(some[name], all_of_it[name]) for name in some)
    noises = [all_of_it[name] for name in ("noise", "ladd_noise", "dmd2_noise", "r1_noise")]
    for i, one in enumerate(noises):  # independent normals differ by sqrt(2)
        assert all((one - other).std() > 1 for other in noises[:i])


@pytest.mark.parametrize("options", [{"r1_weight": 10.0, "r1_noise": 0.1}, {"mismatch_fraction": 0.25}])
def test_what_only_the_heads_learn_from_leaves_the_student_alone(options):
    data = batch()
    plain, more = gradients(objective(), data), gradients(objective(**options), data)
    assert all(torch.equal(plain[n], more[n]) for n in plain if n.startswith("policy."))
    assert any(not torch.equal(plain[n], more[n]) for n in plain if n.startswith("networks."))
