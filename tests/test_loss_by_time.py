"""The weight `uncertainty` of eq. 5: the mean loss by time is followed, and divided by."""

import pytest
import torch
from training_helpers import config_for, files_of

from jlt.config import LossConfig
from jlt.training.loop import train
from jlt.training.loss_by_time import LossByTime


def loss_at(t):
    return 0.3 + 2 * t**2


def test_it_follows_the_mean_loss_at_every_time():
    by_time, generator, keep = LossByTime("cpu"), torch.Generator().manual_seed(0), torch.tensor(False)
    for _ in range(1000):
        t = torch.sigmoid(torch.randn(256, generator=generator))
        noise = torch.rand(256, generator=generator) + 0.5
        by_time.update(by_time.collect(t, loss_at(t) * noise), keep)
    times = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    torch.testing.assert_close(by_time.mean(times), loss_at(times), rtol=0.04, atol=0)
    # Nothing was drawn there: the mean stays near what it began with.
    assert by_time.mean(torch.tensor([0.0, 1.0])).isfinite().all()


def test_a_skipped_batch_leaves_it_as_it_was():
    by_time = LossByTime("cpu")
    by_time.update(by_time.collect(torch.tensor([0.5]), torch.tensor([3.0])), torch.tensor(False))
    before = by_time.sums.clone()
    by_time.update(by_time.collect(torch.tensor([0.5]), torch.tensor([float("nan")])), torch.tensor(True))
    assert by_time.sums.equal(before)


@pytest.mark.parametrize("micro", [0, 4])
def test_a_training_divides_by_it_and_saves_it(store, tmp_path, micro):
    """The first update knows nothing and is that of `matched`; later ones differ."""
    config = config_for(store, steps=4, checkpoint_every=1, keep_last=0, log_every=1, micro_batch_size=micro)
    train(config, store, tmp_path / "matched")
    train(config_for(store, **{**vars(config), "loss": LossConfig(weighting="uncertainty")}), store, tmp_path / "run")
    name = "network.safetensors"
    first, other = (files_of(tmp_path / run, 1)[name] for run in ("matched", "run"))
    assert all(weight.equal(other[key]) for key, weight in first.items())
    last, other = (files_of(tmp_path / run, 4)[name] for run in ("matched", "run"))
    assert not all(weight.equal(other[key]) for key, weight in last.items())
    losses, samples = files_of(tmp_path / "run", 4)["optimizer.safetensors"]["loss_by_time"]
    assert samples.sum() == pytest.approx(16 * (1 + 0.99 + 0.99**2 + 0.99**3), rel=1e-5)
    assert (losses >= 0).all()
