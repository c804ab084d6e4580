"""What PyTorch users do to a model besides training it: the same results as with stock layers."""

import copy
import io
import pickle

import pytest
import torch
from networks import DOUBLE, assert_alike, images, network, networks, step
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import convext


def last_algorithm(model):
    """What the model's convolutions ran on in a call that leaves no trace in it."""
    one = torch.ones(1, 1, 1, 1)
    convext.functional.conv2d(one, one, algorithm="direct")  # in place of what earlier tests left
    copy.deepcopy(model)(images())
    return convext.last_algorithm().forward


# --------------------------------------------------------------------------------------------------
# Parametrizations, weight norm's older form, pruning


def parametrized(model, name):
    """Both convolutions with the parametrization, drawn from the same generator every time."""
    torch.manual_seed(1)
    for layer in (model.conv1, model.conv2):
        getattr(parametrizations, name)(layer)
    return model


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrizations(name):
    ours, stock = (parametrized(model, name) for model in networks())
    assert list(ours.state_dict()) == list(stock.state_dict())
    stock.load_state_dict(ours.state_dict())
    assert_alike(ours, stock)
    with parametrize.cached():
        assert_alike(ours, stock, steps=1)
    for model in (ours, stock):
        for layer in (model.conv1, model.conv2):
            parametrize.remove_parametrizations(layer, "weight")
    assert type(ours.conv1) is convext.Conv2d
    assert_alike(ours, stock)


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal"])
def test_replacing_parametrized_layers(name):
    stock = parametrized(network(nn).to(DOUBLE), name)
    model = copy.deepcopy(stock)  # which shares the classes that parametrize made
    parameters = dict(model.named_parameters())
    convext.replace_layers(model, algorithm="im2col")
    assert isinstance(model.conv1, convext.Conv2d)
    assert not isinstance(stock.conv1, convext.Conv2d)
    assert all(parameters[key] is value for key, value in model.named_parameters())
    assert_alike(model, stock)
    assert last_algorithm(model) == "im2col"
    twin = copy.deepcopy(model)

    convext.restore_layers(model)
    assert isinstance(model.conv1, nn.Conv2d)
    assert not isinstance(model.conv1, convext.Conv2d)
    assert isinstance(twin.conv1, convext.Conv2d)
    assert_alike(model, copy.deepcopy(stock))
    assert_alike(twin, stock)
    parametrize.remove_parametrizations(twin.conv1, "weight")
    assert type(twin.conv1) is convext.Conv2d
    assert isinstance(twin.conv2, convext.Conv2d)
    assert parametrize.is_parametrized(twin.conv2)


def test_replacing_leaves_parametrized_subclasses():
    class Special(nn.Conv2d):
        pass

    layer = parametrizations.weight_norm(Special(2, 3, 2))
    before = type(layer)
    assert type(convext.replace_layers(layer)) is before


def test_replacing_lazy_layers():
    model, restored = (
        convext.replace_layers(
            nn.Sequential(nn.LazyConv2d(4, (3, 2)), nn.LazyBatchNorm2d()), algorithm="im2col"
        )
        for _ in range(2)
    )
    assert [type(layer) for layer in model] == [convext.LazyConv2d, convext.LazyBatchNorm2d]
    convext.restore_layers(restored)
    assert [type(layer) for layer in restored] == [nn.LazyConv2d, nn.LazyBatchNorm2d]
    for layers, module in ((model, convext), (restored, nn)):
        layers(images(torch.float32))
        assert [type(layer) for layer in layers] == [module.Conv2d, module.BatchNorm2d]
    assert model[0].algorithm == "im2col"
    assert model[0].weight.shape == (4, 2, 3, 2)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_weight_norm_by_hooks():
    ours, stock = networks()
    replaced = copy.deepcopy(stock)
    for model in (ours, stock, replaced):
        nn.utils.weight_norm(model.conv1)
        nn.utils.spectral_norm(model.conv2)
        model.conv2.load_state_dict(ours.conv2.state_dict())
    convext.replace_layers(replaced)
    assert type(replaced.conv1) is convext.Conv2d
    for _ in range(2):
        x = images()
        results = [step(model, x) for model in (ours, stock, replaced)]
        torch.testing.assert_close(results[0], results[1])
        torch.testing.assert_close(results[2], results[1])
    for model in (ours, stock):
        nn.utils.remove_weight_norm(model.conv1)
        nn.utils.remove_spectral_norm(model.conv2)
    assert_alike(ours, stock)


def test_pruning():
    ours, stock = networks()
    for model in (ours, stock):
        prune.l1_unstructured(model.conv1, "weight", amount=0.3)
        prune.ln_structured(model.conv1, "weight", amount=2, n=2, dim=0)
        prune.global_unstructured(
            [(model.conv2, "weight"), (model.conv1, "bias")], prune.L1Unstructured, amount=0.5
        )
    assert (ours.conv1.weight == 0).sum() >= 24
    assert_alike(ours, stock)
    for model in (ours, stock):
        prune.remove(model.conv1, "weight")
        prune.remove(model.conv2, "weight")
    assert_alike(ours, stock)
    assert torch.equal(ours.conv2.weight == 0, stock.conv2.weight == 0)


# --------------------------------------------------------------------------------------------------
# Copies, files, processes


def test_shallow_copy_shares_parameters():
    layer = convext.Conv2d(2, 3, (3, 2), algorithm="im2col")
    other = copy.copy(layer)
    assert other.weight is layer.weight
    assert other.algorithm == "im2col"
    x = torch.randn(1, 2, 5, 4)
    assert torch.equal(other(x), layer(x))


def test_safe_loading():
    """`torch.load(weights_only=True)`, also of whole modules whose classes one has named safe."""
    model = network(convext, algorithm="direct").eval()
    state, whole = io.BytesIO(), io.BytesIO()
    torch.save(model.state_dict(), state)
    torch.save(model, whole)
    for file in (state, whole):
        file.seek(0)
    stock = network(nn).eval()
    stock.load_state_dict(torch.load(state, weights_only=True))
    with pytest.raises(pickle.UnpicklingError, match="Unsupported"):
        torch.load(whole, weights_only=True)
    whole.seek(0)
    ours = [convext.Conv2d, convext.BatchNorm2d]
    with torch.serialization.safe_globals([*ours, nn.Sequential, nn.ReLU, set]):
        loaded = torch.load(whole, weights_only=True)
    assert loaded.conv1.algorithm == "direct"
    x = images(torch.float32)
    assert torch.equal(loaded(x), model(x))
    torch.testing.assert_close(stock(x), model(x))


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_go_both_ways(assign):
    ours, stock = networks()
    step(ours, images())
    stock.load_state_dict(ours.state_dict(), strict=True, assign=assign)
    assert_alike(copy.deepcopy(ours), copy.deepcopy(stock))
    step(stock, images())
    fresh = network(convext)
    fresh.load_state_dict(stock.state_dict(), strict=True, assign=assign)
    assert fresh.conv1.weight.dtype == (DOUBLE if assign else torch.float32)
    assert_alike(fresh.to(DOUBLE), stock)
    state = stock.state_dict()
    del state["conv1.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"conv1.bias"'):
        ours.load_state_dict(state)


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="in the extra convext[test]")
    model, stock = networks()
    step(model, images())
    safetensors.save_model(model, tmp_path / "ours.safetensors")
    safetensors.load_model(stock, tmp_path / "ours.safetensors", strict=True)
    assert_alike(copy.deepcopy(model), stock)
    safetensors.save_model(stock, tmp_path / "stock.safetensors")
    safetensors.load_model(model, tmp_path / "stock.safetensors", strict=True)
    assert_alike(model, stock)


def train_a_step(rank, model, x):
    """In a process of its own, on parameters that it shares."""
    torch.set_num_threads(1)
    model(x).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(parameter.grad)


@pytest.mark.slow
def test_sharing_with_another_process():
    model, stock = networks()
    stock.load_state_dict(model.state_dict())
    assert model.share_memory() is model
    assert model.conv1.weight.is_shared()
    x = images()
    torch.multiprocessing.spawn(train_a_step, (model, x), nprocs=1)
    train_a_step(0, stock, x)
    torch.testing.assert_close(model.state_dict(), stock.state_dict())
