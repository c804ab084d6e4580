"""The way of batch norm and the fused block past torch.ops, and the update of their statistics."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import convext
from convext import _C, functional

UPDATE = torch.ops.convext.update_running_statistics.default
MODULES = {
    "norm": lambda **options: convext.BatchNorm2d(6, **options),
    "block": lambda **options: convext.ConvBlock2d(6, 6, 3, padding=1, **options),
}


@pytest.fixture(params=MODULES)
def layer(request):
    """Makes the layer, the same whenever it is called."""

    def make(**options):
        torch.manual_seed(0)
        module = MODULES[request.param](**options)
        for name, tensor in module.state_dict().items():
            if "norm" in name or request.param == "norm":
                tensor.copy_(torch.rand(tensor.shape) + 0.5)  # num_batches_tracked: 0 or 1
        return module

    return make


@pytest.fixture
def the_long_way(monkeypatch):
    """Makes the calls that follow go by torch.ops, as where something isn't plain."""
    return lambda: monkeypatch.setattr(functional, "_is_eager", lambda: False)


def image(dtype=torch.float32, memory_format=torch.contiguous_format, batch=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 6, 5, 4, generator=generator, dtype=torch.float64)
    return x.to(dtype).to(memory_format=memory_format).requires_grad_()


def norm_of(module):
    return getattr(module, "norm", module)


def versions(module):
    return [buffer._version for buffer in module.buffers()]


def outcome(module, x):
    """All that a training or evaluation step changes."""
    before = versions(module)
    output = module(x)
    gradients = ()
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    if output.requires_grad and output.numel():
        output.square().sum().backward()
        gradients = [tensor.grad for tensor in wanted if tensor.requires_grad]
    bumped = [now > then for now, then in zip(versions(module), before, strict=True)]
    return output, [output.stride(), *gradients, *module.buffers(), bumped]


def assert_same(one, other):
    assert torch.equal(one[0], other[0])
    assert type(one[0].grad_fn) is type(other[0].grad_fn)
    for a, b in zip(one[1], other[1], strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    ("options", "x"),
    [
        ({}, {}),
        ({}, {"memory_format": torch.channels_last}),
        ({}, {"batch": 0}),
        ({"affine": False}, {}),
        ({"momentum": None}, {}),
        ({"momentum": 1}, {}),
        ({"track_running_stats": False}, {}),
        ({"dtype": torch.float64}, {"dtype": torch.float64}),
        ({"dtype": torch.bfloat16}, {"dtype": torch.bfloat16}),
        ({"dtype": torch.float16}, {"dtype": torch.float16}),
    ],
    ids=str,
)
def test_ways_agree_bit_for_bit(layer, the_long_way, options, x, training):
    short = outcome(layer(**options).train(training), image(**x))
    the_long_way()
    assert_same(short, outcome(layer(**options).train(training), image(**x)))


def test_ways_agree_where_parameters_are_frozen(layer, the_long_way):
    def frozen():
        module = layer()
        norm_of(module).requires_grad_(False)
        return module

    short = outcome(frozen(), image())
    the_long_way()
    assert_same(short, outcome(frozen(), image()))


def test_plain_calls_take_the_short_way(layer, monkeypatch):
    taken = []
    for name in ("batch_norm", "conv_block", "count_batch"):
        call = getattr(_C, name)

        def noting(*arguments, name=name, call=call):
            result = call(*arguments)
            taken.append((name, result is not NotImplemented))
            return result

        monkeypatch.setattr(_C, name, noting)
    module = layer()
    module(image())
    name = "batch_norm" if norm_of(module) is module else "conv_block"
    assert taken == [("count_batch", True), (name, True)]
    module.eval()(image())
    assert taken[2:] == [(name, True)]


def refused(module, x):
    before = versions(module)
    with pytest.raises((RuntimeError, ValueError)) as error:
        module(x)
    return error.type, str(error.value), versions(module) == before


def with_running_mean(module, running_mean):
    norm_of(module).running_mean = running_mean
    return module


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    "running_mean",
    [
        lambda: torch.zeros(6, requires_grad=True),
        lambda: torch.zeros(5),
        lambda: torch.zeros(6, 1),
        lambda: None,
    ],
    ids=["requires grad", "too few", "two axes", "none"],
)
def test_ways_refuse_alike(layer, the_long_way, running_mean, training):
    def broken():
        module = with_running_mean(layer().train(training), running_mean())
        norm_of(module).num_batches_tracked = None
        return module

    if running_mean() is None and training:
        assert torch.isfinite(broken()(image())).all()  # running_var alone is kept
        return
    errors = [refused(broken(), image())]
    the_long_way()
    errors.append(refused(broken(), image()))
    assert errors[0] == errors[1]
    assert errors[0][2]  # nothing was written


def test_ways_refuse_a_single_value_alike(layer, the_long_way):
    x = torch.randn(1, 6, 1, 1)
    errors = []
    for _ in range(2):
        with pytest.raises(ValueError, match="more than 1 value per channel") as error:
            layer()(x)
        errors.append(str(error.value))
        the_long_way()
    assert errors[0] == errors[1]


def test_running_statistics_that_require_grad_are_updated_without_grad_mode(layer):
    one, other = layer(), with_running_mean(layer(), None)
    norm_of(other).running_mean = norm_of(one).running_mean.clone().requires_grad_()
    with torch.no_grad():
        one(image())
        other(image())
    assert torch.equal(norm_of(one).running_mean, norm_of(other).running_mean)


def test_autograd_notices_that_statistics_changed(layer):
    module = layer().eval()
    output = module(image())  # whose backward pass needs the running statistics
    module.train()(image())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 7, 16, 45])
def test_updates_as_torch_does(dtype, channels):
    torch.manual_seed(0)
    mean, var, batch_mean, batch_var = torch.rand(4, channels, dtype=dtype)
    expected = [
        r.mul(0.9).add(b, alpha=m) for r, b, m in ((mean, batch_mean, 0.1), (var, batch_var, 0.125))
    ]
    kept = [tensor.clone() for tensor in (mean, var)]
    UPDATE(*kept, batch_mean, batch_var, 0.1, 0.125)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(kept, expected, rtol=eps, atol=0)
    assert [tensor._version for tensor in kept] == [1, 1]
    # What isn't plain is torch's to update: here, every other value of a tensor.
    strided = [torch.stack([tensor, tensor], 1)[:, 0] for tensor in (mean, var)]
    UPDATE(*strided, batch_mean, batch_var, 0.1, 0.125)
    torch.testing.assert_close(strided, kept, rtol=eps, atol=0)


def test_update_alone():
    running, batch = torch.ones(3), torch.zeros(3)
    UPDATE(None, running, batch, batch, 0.5, 0.25)
    assert running.tolist() == [0.5] * 3
    UPDATE(running, None, batch, batch, 0.5, 0.25)
    assert running.tolist() == [0.25] * 3
    UPDATE(None, None, batch, batch, 0.5, 0.25)


def test_updates_of_shared_memory_are_seen_by_views():
    base = torch.ones(2, 3)
    UPDATE(base[0], None, torch.zeros(3), torch.zeros(3), 0.5, 0.5)
    assert base.tolist() == [[0.5] * 3, [1.0] * 3]
    assert base._version == 1


def test_refuses_storage_that_was_shrunk():
    running, batch = torch.ones(3), torch.zeros(3)
    running.untyped_storage().resize_(4)
    with pytest.raises(RuntimeError, match=r"running_mean of size .* its storage holds 4"):
        UPDATE(running, None, batch, batch, 0.5, 0.5)


def test_statistics_that_are_differentiated_are_torchs_to_update():
    batch = torch.zeros(3, requires_grad=True)
    running = torch.ones(3)
    UPDATE(running, None, batch, batch, 0.5, 0.5)
    running.sum().backward()
    assert batch.grad.tolist() == [0.5] * 3


def test_count_batch():
    batches = torch.tensor([3, 4])[1]
    _C.count_batch(batches)
    assert batches == 5
    assert batches._version == 1
    for other in (None, 1, torch.zeros(()), torch.zeros(1, dtype=torch.int64)):
        assert _C.count_batch(other) is NotImplemented
    with torch.inference_mode():
        inference = torch.tensor(0)
    assert _C.count_batch(inference) is NotImplemented


def test_counts_in_inference_mode(layer):
    module = layer()
    before = norm_of(module).num_batches_tracked.clone()
    with torch.inference_mode():
        assert module(image()).is_inference()
    assert norm_of(module).num_batches_tracked == before + 1


def test_modes_see_all_that_happens(layer):
    seen = []

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Function(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(getattr(func, "__name__", "") or str(func))
            return func(*args, **(kwargs or {}))

    module = layer()
    plain = layer()
    plain(image())
    op = "batch_norm_train" if norm_of(module) is module else "conv_block_train"
    for mode in (Dispatch(), Function()):
        seen.clear()
        with mode:
            module(image())
        text = " ".join(seen)
        assert op in text
        assert "add_" in text
        assert norm_of(module).num_batches_tracked == norm_of(plain).num_batches_tracked
        torch.testing.assert_close(norm_of(module).running_var, norm_of(plain).running_var)
        module = layer()


@pytest.mark.parametrize("call", ["batch_norm", "conv_block"])
def test_leaves_what_is_not_plain(call):
    x, w, c = torch.randn(2, 6, 5, 4), torch.randn(6, 6, 3, 3), torch.ones(6)
    norm = [x, c, c, c, c, True, 0.1, 1e-5]
    block = [x, w, c, c, c, c, c, 1, 1, 1, 1, True, 0.1, 1e-5, "conv-relu-norm", "auto"]
    arguments = {"batch_norm": norm, "conv_block": block}[call]
    function = getattr(_C, call)
    assert isinstance(function(*arguments), torch.Tensor)
    assert function(*arguments[:-1]) is NotImplemented
    for place, value in enumerate(arguments):
        others = [object()]
        if isinstance(value, float):
            others += [1, torch.tensor(0.5)]
        if value is True:
            others += [1, None]
        for other in others:
            changed = [*arguments[:place], other, *arguments[place + 1 :]]
            assert function(*changed) is NotImplemented
