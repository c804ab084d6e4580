"""convext.mnist.loop: the short training loop of docs/lesson13.md."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from convext.mnist.data import Split
from convext.mnist.loader import BatchLoader
from convext.mnist.loop import accuracy, fit
from convext.mnist.model import lesson_cnn


def noise(count=40):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, 1, 28, 28, generator=generator)
    return Split(images, torch.randint(10, (count,), generator=generator))


def lesson():
    torch.manual_seed(2)
    return lesson_cnn()


def test_with_a_constant_rate_it_is_the_plain_loop():
    data, model, other = noise(), lesson(), lesson()
    losses = fit(model, data, 0.01, epochs=2, batch_size=16, one_cycle=False, seed=3)
    loader = BatchLoader(data.images, data.labels, 16, seed=3, drop_last=True)
    optimizer = torch.optim.Adam(other.parameters(), 0.01)
    expected = []
    for loader.epoch in range(2):
        for images, labels in loader:
            loss = F.cross_entropy(other(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            expected.append(loss.item())
    assert losses == expected
    assert len(losses) == 2 * (40 // 16)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert not model.training


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 13, 40])
def test_one_cycle_rises_to_the_rate_and_falls_to_almost_nothing(count):
    rates, momenta = [], []

    def note(optimizer, *_):
        rates.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[0]["betas"][0])

    hook = register_optimizer_step_post_hook(note)
    try:
        fit(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), noise(count), 0.01, batch_size=1)
    finally:
        hook.remove()
    assert len(rates) == count
    assert max(rates) <= 0.01
    if count > 4:
        top = rates.index(max(rates))
        assert rates[top] == pytest.approx(0.01, rel=0.2)
        assert rates == sorted(rates[:top]) + sorted(rates[top:], reverse=True)
        assert rates[-1] < 1e-5
        assert momenta[top] == pytest.approx(0.85, abs=0.02)


def test_the_seed_is_that_of_the_order():
    one, same, other = (fit(lesson(), noise(), 0.01, batch_size=8, seed=s) for s in (0, 0, 1))
    assert one == same != other


def test_accuracy_counts_the_highest_scores():
    data = Split(torch.eye(4), torch.tensor([0, 1, 0, 3]))
    assert accuracy(nn.Identity(), data) == 0.75


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        fit(lesson(), noise(), 0.01, epochs=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        fit(lesson(), noise(), 0.01, batch_size=0)
