"""The network of the lesson's spreadsheet: small enough to follow each number of it."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

import convext
from convext.inspection.filters import as_weight


def conv_example() -> nn.Sequential:
    """Two 3x3 convolutions with ReLU, a 2x2 max pool and a dense layer, on 28x28 images.

    The first convolution's two filters find top edges and left edges; the other weights are drawn
    from torch's global generator. Nothing is padded and no convolution has a bias, as in fastai's
    conv-example.xlsx, so that a cell is a sum of products and nothing else.

    Returns:
        A module from (N, 1, 28, 28) to (N, 10).
    """
    model = nn.Sequential(
        OrderedDict(
            conv1=convext.Conv2d(1, 2, 3, bias=False),
            relu1=nn.ReLU(),
            conv2=convext.Conv2d(2, 2, 3, bias=False),
            relu2=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            dense=nn.Linear(2 * 12 * 12, 10),
        )
    )
    with torch.no_grad():
        model.conv1.weight.copy_(as_weight(("top-edge", "left-edge")))
    return model
