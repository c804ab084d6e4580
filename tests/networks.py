"""A small network of our layers, the same of stock layers, and what one step gives on each."""

from collections import OrderedDict

import torch
from torch import nn

import convext

DOUBLE = torch.float64


def network(module, **options):
    """Convolutions of every kind of setting, and batch norm, from convext or torch.nn."""
    return nn.Sequential(
        OrderedDict(
            conv1=module.Conv2d(2, 6, (3, 2), stride=(2, 1), padding=(1, 0), **options),
            relu=nn.ReLU(),
            norm1=module.BatchNorm2d(6),
            conv2=module.Conv2d(6, 4, (2, 3), padding=(0, 1), groups=2, bias=False, **options),
            norm2=module.BatchNorm2d(4, momentum=None),
        )
    )


def networks(dtype=DOUBLE):
    """Our network and the stock one, of the same state."""
    ours, stock = network(convext).to(dtype), network(nn).to(dtype)
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def images(dtype=DOUBLE):
    return torch.randn(3, 2, 7, 6, dtype=dtype)


def step(model, x):
    """The output, the gradients and the buffers after it."""
    model.zero_grad()
    output = model(x)
    output.pow(3).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {"output": output, **gradients, **dict(model.named_buffers())}


def assert_alike(one, other, x=None, steps=2):
    for _ in range(steps):
        given = images() if x is None else x
        torch.testing.assert_close(step(one, given), step(other, given))
