"""The lesson's network under torch.func.functional_call, of our layers and of PyTorch's."""

import copy

import pytest
import torch
from torch import func, nn
from torch.nn import functional as F

import convext
from convext.mnist.model import lesson_cnn

LABELS = torch.arange(6) % 10


@pytest.fixture(params=[True, False], ids=["train", "eval"])
def training(request):
    return request.param


def network(layers, training, seed=0):
    torch.manual_seed(seed)
    model = lesson_cnn(layers).double().train(training)
    for name, buffer in model.named_buffers():
        if "running" in name:
            nn.init.uniform_(buffer, 0.5, 1.5)
    return model


def state(model):
    """Copies of parameters and buffers, detached, for functional_call."""
    return tuple(
        {name: t.detach().clone() for name, t in named()}
        for named in (model.named_parameters, model.named_buffers)
    )


def loss(model, parameters, buffers, x, labels=LABELS):
    return F.cross_entropy(func.functional_call(model, (parameters, buffers), (x,)), labels)


def images(*size):
    torch.manual_seed(1)
    return torch.randn(*size, 1, 28, 28, dtype=torch.float64)


def both(compute, training):
    """What `compute` gives of both networks, and the buffers it leaves, must be equal."""
    results = []
    for layers in ("convext", "torch"):
        model = network(layers, training)
        before = state(model)
        parameters, buffers = state(model)
        results.append((compute(model, parameters, buffers), buffers))
        torch.testing.assert_close(state(model), before, rtol=0, atol=0)
    torch.testing.assert_close(*results)
    return results[0]


def like(parameters):
    """A direction for every parameter."""
    return {name: torch.sin(3 * t) for name, t in parameters.items()}


def test_grad(training):
    """By parameters and input; statistics are kept in the buffers given, not in the module."""

    def compute(model, parameters, buffers):
        gradient = func.grad(lambda p, x, b: loss(model, p, b, x), (0, 1))
        return gradient(parameters, images(6), buffers)

    (gradients, _), buffers = both(compute, training)
    assert all(g.abs().max() > 0 for g in gradients.values())
    assert int(buffers["norm1.num_batches_tracked"]) == int(training)


def test_captured_buffers_are_refused_in_training():
    """To count the batch would change a tensor that the transform does not see, as in PyTorch."""
    for layers in ("convext", "torch"):
        model = network(layers, training=True)
        parameters, buffers = state(model)
        with pytest.raises(RuntimeError, match="mutate a captured Tensor"):
            func.grad(lambda p: loss(model, p, buffers, images(6)))(parameters)  # noqa: B023


def test_jvp_and_hessian_vector_product(training):
    def compute(model, parameters, buffers):
        def f(p):
            fresh = {name: t.clone() for name, t in buffers.items()}
            return loss(model, p, fresh, images(6))

        direction = like(parameters)
        _, vjp = func.vjp(func.grad(f), parameters)
        return (
            func.jvp(f, (parameters,), (direction,)),
            func.jvp(func.grad(f), (parameters,), (direction,)),
            vjp(direction),
        )

    (_, forward_over_reverse, reverse_over_reverse), _ = both(compute, training)
    torch.testing.assert_close(forward_over_reverse[1], reverse_over_reverse[0])


def per_sample(model, parameters, buffers):
    def of_one(p, x, label):
        return loss(model, p, buffers, x[None], label[None])

    return func.vmap(func.grad(of_one), (None, 0, 0))(parameters, images(6), LABELS)


def test_gradient_of_each_sample():
    gradients, _ = both(per_sample, training=False)
    model = network("convext", training=False)
    loss(model, dict(model.named_parameters()), {}, images(6)).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name].mean(0), parameter.grad)


def test_gradient_of_each_sample_in_training():
    """Once no statistics are kept, each sample is its own batch."""

    def compute(model, parameters, buffers):
        patched = func.replace_all_batch_norm_modules_(copy.deepcopy(model))
        assert not dict(patched.named_buffers())
        return per_sample(patched, parameters, {})

    both(compute, training=True)


def test_ensemble(training):
    """Three networks at once, each with its own parameters and statistics."""
    results = []
    for layers in ("convext", "torch"):
        models = [network(layers, training, seed) for seed in range(3)]
        parameters, buffers = func.stack_module_state(models)
        base = copy.deepcopy(models[0]).to("meta")
        one = func.grad(lambda p, b, x, base=base: loss(base, p, b, x))
        gradients = func.vmap(one, (0, 0, None))(parameters, buffers, images(6))
        for i, model in enumerate(models):
            loss(model, dict(model.named_parameters()), {}, images(6)).backward()
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(gradients[name][i], parameter.grad)
            for name, buffer in model.named_buffers():
                torch.testing.assert_close(buffers[name][i], buffer)
        results.append((gradients, buffers))
    torch.testing.assert_close(*results)


def test_a_layer_in_training_refuses_a_batch_of_batches():
    for layer in (convext.BatchNorm2d(3), nn.BatchNorm2d(3)):
        with pytest.raises(RuntimeError, match="batched"):
            func.vmap(layer)(torch.randn(2, 4, 3, 5, 5))
        func.replace_all_batch_norm_modules_(layer)
        assert func.vmap(layer)(torch.randn(2, 4, 3, 5, 5)).shape == (2, 4, 3, 5, 5)
