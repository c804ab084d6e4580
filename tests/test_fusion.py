"""fuse, unfuse and fold: same results, same Parameters, and the way back."""

import copy
import pickle

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import convext
from convext import ConvBlock2d, fold, fuse, to_fused, to_unfused, unfuse
from convext.mnist.model import lesson_cnn


def blocks(model: nn.Module) -> list[ConvBlock2d]:
    return [module for module in model.modules() if isinstance(module, ConvBlock2d)]


def trained(model: nn.Module, *size: int) -> nn.Module:
    """The model with running statistics and affine parameters that are not the initial ones."""
    for _ in range(3):
        model.train()(torch.randn(size) * 2 + 1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                module.weight.uniform_(-1, 2)
                module.bias.uniform_(-1, 1)
    return model


def conv_norm_relu() -> nn.Sequential:
    """Rows in the other order, within another Sequential, with stock layers."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 6, (3, 2), (2, 1)), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
        nn.Sequential(
            nn.Conv2d(6, 4, (1, 3), bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.0)
        ),
    )


class Functional(nn.Module):
    """ReLUs as functions and methods, which only a trace shows; and a row below another module."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict(
            {"conv1": nn.Conv2d(3, 6, (3, 2)), "norm1": nn.BatchNorm2d(6), "relu3": nn.ReLU()}
        )
        self.conv2, self.norm2 = nn.Conv2d(6, 5, (1, 3)), nn.BatchNorm2d(5)
        self.conv3, self.norm3 = nn.Conv2d(5, 4, (2, 1)), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.body["norm1"](F.relu(self.body["conv1"](x)))
        x = self.norm2(self.conv2(x)).relu()
        return self.body["relu3"](self.norm3(self.conv3(x)))


MODELS = {
    "lesson": (lambda: lesson_cnn(), (4, 1, 28, 28), 4),
    "stock lesson": (lambda: lesson_cnn("torch"), (4, 1, 28, 28), 4),
    "nested": (conv_norm_relu, (4, 3, 9, 8), 2),
    "traced": (lambda: fx.symbolic_trace(Functional()), (4, 3, 9, 8), 3),
    "traced lesson": (lambda: fx.symbolic_trace(lesson_cnn("torch")), (4, 1, 28, 28), 4),
}
models = pytest.mark.parametrize(("make", "size", "count"), MODELS.values(), ids=MODELS)


@models
def test_fused_computes_the_same(make, size, count):
    model = trained(make(), *size)
    twin = fuse(copy.deepcopy(model))
    assert len(blocks(twin)) == count
    for training in (True, False):
        x = torch.randn(size, requires_grad=True)
        results = []
        for m in (model.train(training), twin.train(training)):
            m.zero_grad()
            output = m(x)
            (grad,) = torch.autograd.grad(output.square().sum(), x)
            results.append([output, grad])
        for expected, got in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@models
def test_unfuse_restores_the_very_layers(make, size, count):
    model = make()
    before = dict(model.named_modules())
    classes = {name: type(module) for name, module in before.items()}
    parameters = {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}
    assert unfuse(fuse(model)) is model
    after = dict(model.named_modules())
    assert {name: type(module) for name, module in after.items()} == classes
    for name, module in after.items():
        assert module is before[name] or isinstance(module, nn.ReLU), name
    assert {name: id(t) for name, t in model.state_dict(keep_vars=True).items()} == parameters
    model.eval()
    x = torch.randn(size)
    torch.testing.assert_close(model(x), make_like(make, model)(x))


def make_like(make, model: nn.Module) -> nn.Module:
    """A new model with the parameters of another."""
    twin = make()
    twin.load_state_dict(model.state_dict())
    return twin.eval()


@models
def test_state_dicts_go_both_ways(make, size, count):
    separate = trained(make(), *size)
    fused = fuse(make())
    fused.load_state_dict(to_fused(separate.state_dict(), fused))
    x = torch.randn(size)
    torch.testing.assert_close(fused.eval()(x), separate.eval()(x), rtol=1e-4, atol=1e-4)
    back = to_unfused(fused.state_dict(), fused)
    assert back.keys() == separate.state_dict().keys()
    for name, value in separate.state_dict().items():
        assert torch.equal(back[name], value), name


def test_parameters_are_shared_with_an_optimizer():
    model = lesson_cnn("torch")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    fuse(model)
    before = model[0].conv.weight.detach().clone()
    model(torch.randn(3, 1, 28, 28)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].conv.weight, before)


def test_a_fused_model_is_copied_and_pickled():
    model = fuse(lesson_cnn()).eval()
    x = torch.randn(2, 1, 28, 28)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        assert not blocks(unfuse(twin))


def test_a_block_of_ones_own_becomes_a_sequential():
    block = ConvBlock2d(3, 4, 3, order="conv-norm-relu")
    model = nn.ModuleDict({"block": block})
    state = model.state_dict()
    unfuse(model)
    assert [name for name, _ in model["block"].named_children()] == ["conv", "norm", "relu"]
    assert model.state_dict().keys() == state.keys()
    assert isinstance(unfuse(block), nn.Sequential)
    assert isinstance(unfuse(nn.Linear(1, 2)), nn.Linear)


def test_what_is_left_as_it_is():
    class Special(nn.Conv2d):
        pass

    shared = nn.Conv2d(3, 3, 1)
    hooked = nn.Conv2d(3, 3, 1)
    hooked.register_forward_hook(lambda *_: None)
    norm = nn.BatchNorm2d(3)
    for model in (
        nn.Sequential(Special(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)),
        nn.Sequential(shared, nn.ReLU(), nn.BatchNorm2d(3), shared),
        nn.Sequential(hooked, nn.ReLU(), nn.BatchNorm2d(3)),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.GELU(), nn.BatchNorm2d(3)),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(3)),
        nn.Sequential(nn.Conv2d(3, 3, 1), norm, nn.ReLU(), nn.Conv2d(3, 3, 1), norm, nn.ReLU()),
        nn.ModuleList([nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)]),
    ):
        names = [type(m) for m in model.modules()]
        assert [type(m) for m in fuse(model).modules()] == names


def test_a_value_that_others_use_is_kept_in_a_trace():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(F.relu(y)) + y

    assert not blocks(fuse(fx.symbolic_trace(Skip())))


def test_sync_batch_norm_in_a_block_is_called_by_itself():
    """convert_sync_batchnorm finds the part; the block then calls its parts one after another."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(fuse(lesson_cnn()))
    assert type(model[0].norm) is nn.SyncBatchNorm
    assert not model[0].is_fused()
    x = torch.randn(3, 1, 28, 28)
    assert model.eval()(x).shape == (3, 10)  # in evaluation it needs no process group


# --------------------------------------------------------------------------------------------------
# Folding


@models
def test_folded_computes_the_same(make, size, count):
    model = trained(make(), *size).eval()
    x = torch.randn(size)
    expected = model(x)
    for candidate in (model, fuse(copy.deepcopy(model))):
        folded = fold(candidate)
        assert folded is not candidate
        torch.testing.assert_close(folded(x), expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(candidate(x), expected, rtol=1e-3, atol=1e-3)


def test_folding_leaves_no_norm_behind_a_convolution():
    model = trained(conv_norm_relu(), 4, 3, 9, 8).eval()
    for candidate in (model, fuse(copy.deepcopy(model)), fx.symbolic_trace(model)):
        folded = fold(candidate)
        assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
        assert folded.get_parameter(next(n for n, _ in folded.named_parameters())) is not None
    traced = fold(fuse(fx.symbolic_trace(Functional().eval())))
    assert len([m for m in traced.modules() if isinstance(m, nn.BatchNorm2d)]) == 1  # relu before


def test_folding_in_float64_is_exact_to_rounding():
    model = trained(conv_norm_relu(), 4, 3, 9, 8).double().eval()
    x = torch.randn(4, 3, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(fold(model)(x), model(x), rtol=1e-12, atol=1e-12)


def test_folding_keeps_the_algorithm_and_the_layout():
    block = ConvBlock2d(3, 4, 3, order="conv-norm-relu", algorithm="im2col").eval()
    folded = fold(block.to(memory_format=torch.channels_last))
    assert isinstance(folded.conv, convext.Conv2d)
    assert folded.conv.algorithm == "im2col"
    assert folded.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_folding_asks_for_evaluation_mode():
    with pytest.raises(RuntimeError, match=r"the model is in training mode.*eval\(\)"):
        fold(conv_norm_relu())
    model = conv_norm_relu().eval()
    model[0][1].train()
    with pytest.raises(RuntimeError, match=r"0\.1 is in training mode"):
        fold(model)


def test_a_norm_without_statistics_is_not_folded():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert isinstance(fold(model)[1], nn.BatchNorm2d)
