"""torch.fx on models with our layers, and torch's tools that fold batch norm into convolutions."""

import copy
import pickle

import pytest
import torch
from networks import DOUBLE, assert_alike, images, network, networks
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

import convext


def nodes(traced):
    return [(node.op, str(node.target), str(node.args)) for node in traced.graph.nodes]


def test_layers_are_leaves_of_fx_graphs():
    ours, stock = networks()
    traced = fx.symbolic_trace(ours)
    assert nodes(traced) == nodes(fx.symbolic_trace(stock))
    assert traced.conv1 is ours.conv1
    assert_alike(traced, stock)
    for copied in (copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        assert type(copied.conv1) is convext.Conv2d
        assert_alike(copied, copy.deepcopy(stock), steps=1)
    x = images()
    ShapeProp(traced.eval()).propagate(x)
    shapes = {node.name: tuple(node.meta["tensor_meta"].shape) for node in traced.graph.nodes}
    assert shapes["conv1"] == (3, 6, 4, 5)
    assert torch.equal(fx.Interpreter(traced).run(x), traced(x))


class Wrapped(nn.Module):
    """A layer that is called twice, from a module in between."""

    def __init__(self):
        super().__init__()
        self.inner = network(convext)
        self.same = convext.Conv2d(4, 4, (1, 3), padding="same", padding_mode="circular")

    def forward(self, x):
        return self.same(self.same(self.inner(x)).relu())


def test_fx_traces_nested_layers():
    model = Wrapped().to(DOUBLE)
    traced = fx.symbolic_trace(model)
    targets = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert targets[0] == "inner.conv1"
    assert targets[-2:] == ["same", "same"]
    assert_alike(traced, copy.deepcopy(model))
    retraced = fx.symbolic_trace(traced)
    assert nodes(retraced) == nodes(traced)


def test_blocks_are_leaves_of_fx_graphs():
    """Tracing finds the rows that can be fused, and goes through what is fused already."""
    model, stock = networks()
    traced = convext.fuse(fx.symbolic_trace(copy.deepcopy(model)))
    fused = fx.symbolic_trace(convext.fuse(model))
    assert fused.conv1 is model.conv1
    for graph in (traced, fused):
        assert type(graph.conv1) is convext.ConvBlock2d
        assert graph.conv1.is_fused()
        assert graph.conv1.norm.num_batches_tracked == 0
        state = convext.to_fused(stock.state_dict(), graph)
        graph.load_state_dict(state)
        x = images()
        torch.testing.assert_close(graph(x), copy.deepcopy(stock)(x))
    convext.unfuse(traced)
    assert [node[:2] for node in nodes(traced)] == [
        node[:2] for node in nodes(fx.symbolic_trace(stock))
    ]


def test_fx_traces_a_layer_by_itself():
    layer = convext.Conv2d(2, 3, (3, 2), padding=1, padding_mode="reflect", algorithm="direct")
    traced = fx.symbolic_trace(layer)
    assert convext.functional.conv2d in [node.target for node in traced.graph.nodes]
    x = torch.randn(1, 2, 5, 4)
    assert torch.equal(traced(x), layer(x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_fx_traces_the_functions(training):
    def f(x, weight, mean, var):
        y = convext.functional.conv2d(x, weight, stride=(2, 1), algorithm="direct")
        return convext.functional.batch_norm(y, mean, var, training=training, momentum=0.3)

    traced = fx.symbolic_trace(f)
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert targets == [convext.functional.conv2d, convext.functional.batch_norm]
    operands = torch.randn(2, 3, 7, 5), torch.randn(4, 3, 3, 2), torch.zeros(4), torch.ones(4)
    results = []
    for function in (traced, f):
        given = [t.clone() for t in operands]
        results.append((function(*given), given))
    torch.testing.assert_close(*results, rtol=0, atol=0)


class Recorder:
    """No tensor, but something that speaks torch's protocol for functions."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return func, args, kwargs


def test_the_functions_speak_torch_function():
    x = torch.ones(1, 1, 2, 2)
    func, args, kwargs = convext.functional.conv2d(Recorder(), x, groups=2, padding="same")
    assert func is convext.functional.conv2d
    assert args[1] is x
    assert (args[2:], kwargs) == ((None, 1, "same", 1, 2), {"algorithm": "auto"})
    assert convext.functional.conv2d(x, Recorder())[0] is convext.functional.conv2d
    func, args, _ = convext.functional.batch_norm(Recorder(), None, None, training=True)
    assert func is convext.functional.batch_norm
    assert args[1:] == (None, None, None, None, True, 0.1, 1e-5)
    func, args, kwargs = convext.functional.conv_block(Recorder(), x, norm_bias=x, dilation=3)
    assert func is convext.functional.conv_block
    assert args[6] is x
    assert args[7:] == (1, 0, 3, 1)
    assert (kwargs["training"], kwargs["order"]) == (False, "conv-relu-norm")
    for function, rest in (
        (convext.functional.conv2d, (x,)),
        (convext.functional.batch_norm, (None, None)),
    ):
        with pytest.raises(TypeError, match="input must be a Tensor, got list"):
            function([1.0], *rest)


# --------------------------------------------------------------------------------------------------
# Folding batch norm into the convolution with torch's own tools


def trained(model):
    """With running statistics that matter, in eval mode."""
    for _ in range(3):
        model(images() * 2 + 1)
    return model.eval()


def test_fuse_conv_bn_eval():
    model, _ = networks()
    trained(model)
    model.conv2.algorithm = "im2col"
    folded = nn.utils.fusion.fuse_conv_bn_eval(model.conv2, model.norm2)
    assert type(folded) is convext.Conv2d
    assert folded.algorithm == "im2col"
    x = torch.randn(3, 6, 4, 5, dtype=DOUBLE)
    torch.testing.assert_close(folded(x), model.norm2(model.conv2(x)))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_fuse_modules():
    """It looks for exact types: ours need naming, or restore_layers around it; never silence."""
    from torch.ao.quantization import fuse_modules
    from torch.ao.quantization.fuser_method_mappings import fuse_conv_bn

    model = trained(networks()[0])
    x, pair = images(), ["conv2", "norm2"]
    expected = model(x)
    with pytest.raises(AssertionError, match=r"did not find fuser method.*convext"):
        fuse_modules(model, pair)

    mapping = {(convext.Conv2d, convext.BatchNorm2d): fuse_conv_bn}
    settings = {"additional_fuser_method_mapping": mapping}
    folded = fuse_modules(model, pair, fuse_custom_config_dict=settings)
    assert type(folded.conv2) is convext.Conv2d

    again = fuse_modules(convext.restore_layers(copy.deepcopy(model)), pair)
    assert type(convext.replace_layers(again).conv2) is convext.Conv2d
    for result in (folded, again):
        assert isinstance(result.norm2, nn.Identity)
        torch.testing.assert_close(result(x), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_fx_optimization_fuse():
    """It looks for exact types too, and leaves all others as they are."""
    from torch.fx.experimental import optimization

    model = trained(networks()[0])
    x = images()
    expected = model(x)
    assert torch.equal(optimization.fuse(model)(x), expected)
    folded = optimization.fuse(convext.restore_layers(model))
    assert [name for name, _ in folded.named_children()] == ["conv1", "relu", "norm1", "conv2"]
    torch.testing.assert_close(convext.replace_layers(folded)(x), expected)
    assert type(folded.conv2) is convext.Conv2d
