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


# --------------------------------------------------------------------------------------------------
# Conversions and initialisation


@pytest.fixture(params=[False, True], ids=["assign", "swap"])
def swaps_tensors(request):
    """Whether a module's conversion keeps its Parameter objects and swaps what is in them."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield request.param
    torch.__future__.set_swap_module_params_on_conversion(before)


@pytest.mark.parametrize("name", ["half", "bfloat16", "float", "double"])
def test_conversion_of_dtype(name, swaps_tensors):
    ours, stock = networks(torch.float32)
    reference = copy.deepcopy(stock).double()
    parameter = ours.conv1.weight
    for model in (ours, stock):
        getattr(model, name)()
    dtype = ours.conv1.weight.dtype
    assert dtype == {"half": torch.float16, "double": DOUBLE}.get(name, getattr(torch, name))
    if dtype != torch.float32 and swaps_tensors:
        assert ours.conv1.weight is parameter
    assert [v.dtype for v in ours.state_dict().values()] == [
        v.dtype for v in stock.state_dict().values()
    ]
    x = images(dtype)
    output = ours(x)
    assert output.dtype == stock(x).dtype == dtype
    limit = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), reference(x.double()), rtol=limit, atol=limit)
    output.sum().backward()
    assert {p.grad.dtype for p in ours.parameters()} == {dtype}


@pytest.mark.parametrize(
    "convert",
    [
        lambda model: model.to(memory_format=torch.channels_last),
        lambda model: nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last),
    ],
    ids=["to", "convert_conv2d_weight_memory_format"],
)
def test_conversion_of_memory_format(convert, swaps_tensors):
    ours, stock = (convert(model) for model in networks())
    assert ours.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert ours(images()).is_contiguous(memory_format=torch.channels_last)
    assert_alike(ours, copy.deepcopy(ours))
    stock.load_state_dict(ours.state_dict())
    assert_alike(ours, stock)


def test_meta_device_and_skip_init():
    with torch.device("meta"):
        model = network(convext)
        # In training, momentum=None needs to know a count, here as with stock layers.
        assert model.eval()(torch.ones(3, 2, 7, 6)).shape == (3, 4, 3, 5)
    model.train()
    _, stock = networks()
    model.to_empty(device="cpu").to(DOUBLE).load_state_dict(stock.state_dict())
    assert_alike(model, copy.deepcopy(stock))
    layer = nn.utils.skip_init(
        convext.Conv2d, 2, 6, (3, 2), (2, 1), (1, 0), algorithm="im2col", dtype=DOUBLE
    )
    layer.load_state_dict(stock.conv1.state_dict())
    assert layer.algorithm == "im2col"
    assert_alike(layer, stock.conv1)


def initialise(layer):
    """As users write it, by the stock layers' types."""
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        if layer.bias is not None:
            nn.init.uniform_(layer.bias)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1, 0.02)
        nn.init.constant_(layer.bias, 0.5)


def test_initialisation():
    states = []
    for module in (convext, nn):
        torch.manual_seed(1)
        states.append(network(module).apply(initialise).state_dict())
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert (states[0]["norm1.bias"] == 0.5).all()


# --------------------------------------------------------------------------------------------------
# Optimizers, averaged models

OPTIMIZERS = {
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
    "Adam, fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "RMSprop, foreach": lambda p: torch.optim.RMSprop(p, lr=0.01, foreach=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name, memory_format):
    ours, stock = (model.to(memory_format=memory_format) for model in networks())
    before = copy.deepcopy(ours.state_dict())
    optimizers = [OPTIMIZERS[name](model.parameters()) for model in (ours, stock)]
    for _ in range(4):
        assert_alike(ours, stock, steps=1)
        norms = [
            nn.utils.clip_grad_norm_(model.parameters(), 0.5, foreach=True)
            for model in (ours, stock)
        ]
        torch.testing.assert_close(*norms)
        assert norms[0] > 0.5
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours.state_dict(), stock.state_dict())
    assert not any(torch.equal(before[key], value) for key, value in ours.state_dict().items())


@pytest.mark.parametrize("use_buffers", [False, True], ids=["parameters", "buffers too"])
def test_averaged_model_and_update_bn(use_buffers):
    models = networks()
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.8)
    averaged = [
        torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average, use_buffers=use_buffers)
        for model in models
    ]
    assert type(averaged[0].module.conv1) is convext.Conv2d
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in models]
    batches = [images() for _ in range(3)]
    for x in batches:
        assert_alike(*models, x, steps=1)
        for mean, model, optimizer in zip(averaged, models, optimizers, strict=True):
            optimizer.step()
            mean.update_parameters(model)
    torch.testing.assert_close(averaged[0].state_dict(), averaged[1].state_dict())
    before = averaged[0].module.norm1.running_mean.clone()
    for mean in averaged:
        torch.optim.swa_utils.update_bn(batches, mean)
    torch.testing.assert_close(averaged[0].state_dict(), averaged[1].state_dict())
    assert not torch.allclose(averaged[0].module.norm1.running_mean, before)
    assert averaged[0].module.norm1.momentum == 0.1
