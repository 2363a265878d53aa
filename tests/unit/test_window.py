import pytest
import torch
from accelerate import Accelerator

from prx_post.engine.metrics import Window


def test_a_metric_that_is_not_in_every_step_is_averaged_over_those_it_is_in():
    window = Window()
    window.add({"loss": torch.tensor(1.0)}, images=4)
    window.add({"loss": torch.tensor(2.0), "generator_loss": torch.tensor(8.0)}, images=4)
    window.commit(1.0, {})
    means = window.close(Accelerator(cpu=True))
    assert means["loss"] == pytest.approx(1.5)
    assert means["generator_loss"] == pytest.approx(8.0)


def test_a_resumed_window_goes_on_where_it_was():
    window = Window()
    window.resume({"loss": torch.tensor(6.0)}, {"loss": 2}, images=8)
    window.start()
    window.add({"loss": torch.tensor(3.0)}, images=4)
    window.commit(1.0, {})
    assert window.close(Accelerator(cpu=True))["loss"] == pytest.approx(3.0)


def test_a_skipped_step_leaves_no_trace():
    window = Window()
    window.add({"loss": torch.tensor(1.0)}, images=4)
    window.commit(1.0, {"policy": torch.tensor(2.0)})
    window.add({"loss": torch.tensor(torch.nan)}, images=4)
    window.discard()
    means = window.close(Accelerator(cpu=True))
    assert means["loss"] == 1.0
    assert means["grad_norm/policy"] == 2.0
    assert window.images == 4
