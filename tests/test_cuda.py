"""What only a GPU can show: streams, graphs, devices, memory, precision flags. All skip without."""

import itertools

import pytest
import torch
from problems import named
from reference import PASSES, convext_pass, expected, operands
from torch import nn
from torch.nn import functional as F

import convext
from convext import functional
from convext.bench.layers import conv


def on_gpu(problem, dtype=torch.float32):
    data = operands(problem, dtype)
    return type(data)(*(tensor.cuda() for tensor in data))


def network() -> nn.Module:
    """Every layer there is."""
    block = convext.ConvBlock2d(8, 12, 3, stride=2, padding=1)
    layers = [convext.Conv2d(3, 8, 3, padding=1), nn.ReLU(), convext.BatchNorm2d(8), block]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12 * 4 * 4, 10)).cuda()


def step(model, images):
    model.zero_grad()
    loss = model(images).square().mean()
    loss.backward()
    return loss


def state(model):
    return [*model.state_dict().values(), *(p.grad for p in model.parameters())]


def test_algorithms(gpu):
    names = convext.algorithms(gpu)
    assert names[:1] == ("direct",)
    assert convext.algorithms(torch.device("cuda", 0)) == names
    for name in names:
        convext.Conv2d(1, 1, 1, algorithm=name)


def test_auto_says_what_it_took_and_why(gpu):
    problem = named("plain")
    for number, conv_pass in enumerate(PASSES):
        convext_pass(problem, conv_pass, on_gpu(problem))
        assert convext.last_algorithm()[number] in convext.algorithms("cuda")
        assert convext.last_reason()[number] in {why for _, why in convext._C.cuda_auto_rows()}


def test_no_call_waits_for_the_device(gpu):
    model, images = network(), torch.randn(4, 3, 8, 8, device="cuda")
    step(model, images)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, images)
        with torch.no_grad():
            model.eval()(images)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_graph_captures_and_replays(gpu, channels_last):
    torch.manual_seed(1)
    model, plain = network(), network()
    images = torch.randn(4, 3, 8, 8, device="cuda")
    if channels_last:
        model, plain = (m.to(memory_format=torch.channels_last) for m in (model, plain))
        images = images.contiguous(memory_format=torch.channels_last)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(model, images)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    model.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        captured = model(images).square().mean()
        captured.backward()
    plain.load_state_dict(model.state_dict())
    for seed in range(3):
        torch.manual_seed(seed)
        images.copy_(torch.randn(4, 3, 8, 8))
        graph.replay()
        loss = step(plain, images)
        assert torch.equal(captured, loss)
        for one, other in zip(state(model), state(plain), strict=True):
            assert torch.equal(one, other)


def test_follows_the_current_stream(gpu):
    # What another stream computes is taken before it is done, unless ours go on that stream.
    problem = named("plain")
    data = on_gpu(problem)
    exact = expected(problem, "forward", torch.float32)
    stream = torch.cuda.Stream()
    late = torch.zeros_like(data.input)
    convext_pass(problem, "forward", data)  # a first call also loads the kernel
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(data.input)
        result = convext_pass(problem, "forward", data._replace(input=late))
        assert not stream.query()
    stream.synchronize()
    exact.check(result)


def test_many_streams_at_once(gpu):
    problem = named("plain")
    data = on_gpu(problem)
    torch.cuda.synchronize()
    results = []
    for stream in [torch.cuda.Stream() for _ in range(4)] * 8:
        with torch.cuda.stream(stream):
            results += [(name, convext_pass(problem, name, data)) for name in PASSES]
    torch.cuda.synchronize()
    for name, result in results:
        expected(problem, name, torch.float32).check(result)


def test_another_device_than_the_current_one(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("only one GPU is here")
    problem = named("plain")
    data = operands(problem, torch.float32)
    data = type(data)(*(tensor.to("cuda:1") for tensor in data))
    for name in PASSES:
        result = convext_pass(problem, name, data)
        assert result.device == torch.device("cuda", 1)
        expected(problem, name, torch.float32).check(result)
    assert torch.cuda.current_device() == 0
    with pytest.raises(RuntimeError, match="expected weight on the device of input, cuda:1"):
        functional.conv2d(data.input, data.weight.to("cuda:0"))


def test_devices_must_not_be_mixed(gpu):
    x, w, b = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 3, 3), torch.randn(3)
    for where in itertools.product(("cpu", "cuda"), repeat=3):
        if len(set(where)) == 1:
            continue
        arguments = [tensor.to(device) for tensor, device in zip((x, w, b), where, strict=True)]
        with pytest.raises(RuntimeError, match="on the device of"):
            functional.conv2d(*arguments)
    for weight, running in (("cpu", "cuda"), ("cuda", "cpu")):
        statistics = torch.zeros(2, device=running), torch.ones(2, device=running)
        with pytest.raises(RuntimeError, match="device"):
            functional.batch_norm(x.cuda(), *statistics, torch.ones(2, device=weight))


@pytest.mark.parametrize("kind", ["sparse", "csr", "nested"])
def test_other_kinds_of_tensors_are_named(gpu, kind):
    x, w = torch.randn(1, 2, 4, 4, device="cuda"), torch.randn(3, 2, 3, 3, device="cuda")
    other = {
        "sparse": lambda: x.to_sparse(),
        "csr": lambda: torch.eye(4, device="cuda").to_sparse_csr(),
        "nested": lambda: torch.nested.nested_tensor([x[0]]),
    }[kind]()
    with pytest.raises(RuntimeError, match=r"input must be a dense|Expected|4D"):
        torch.ops.convext.conv2d(other, w, None, [1, 1], [0, 0], [1, 1], 1)


def test_out_of_memory_is_torchs_error(gpu):
    w = torch.randn(64, 1, 1, 1, device="cuda", dtype=torch.float16)
    x = torch.zeros(1, 1, 1, 1, device="cuda", dtype=torch.float16)
    free, _ = torch.cuda.mem_get_info()
    x = x.expand(free // 64, 1, 1, 1)  # whose result alone would take twice what is free
    with pytest.raises(torch.cuda.OutOfMemoryError):
        functional.conv2d(x, w)
    assert functional.conv2d(x[:2], w).shape == (2, 64, 1, 1)


@pytest.mark.parametrize("conv_pass", PASSES)
def test_tf32_rounds_only_where_it_is_allowed(gpu, conv_pass):
    problem = conv(4, 32, 14, 64, 3)
    exact = expected(problem, conv_pass, torch.float32)
    data = on_gpu(problem)
    exact.check(convext_pass(problem, conv_pass, data))  # conftest.py forbids it
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # and puts it back
    rounded = convext_pass(problem, conv_pass, data).cpu().double()
    # Factors are rounded to 11 bits, to the nearest.
    scale = exact.result.square().mean().sqrt()
    error = (rounded - exact.result).square().mean().sqrt() / scale
    assert error < 2**-10


def test_running_statistics_are_torchs(gpu):
    ours, stock = convext.BatchNorm2d(5).cuda(), nn.BatchNorm2d(5).cuda()
    for _ in range(3):
        x = torch.randn(4, 5, 6, 7, device="cuda")
        torch.testing.assert_close(ours(x), stock(x))
    for one, other in zip(ours.buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_autotune_is_refused(gpu):
    problem = named("plain")
    with (
        convext.autotune(),
        pytest.raises(RuntimeError, match=r"convext\.autotune\(\) measures on the CPU only"),
    ):
        convext_pass(problem, "forward", on_gpu(problem))


def test_compiles_as_one_graph(gpu):
    model, images = network(), torch.randn(4, 3, 8, 8, device="cuda")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    other = network()
    other.load_state_dict(model.state_dict())
    results = [(step(m, images), *state(n)) for m, n in ((compiled, model), (other, other))]
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_trains(gpu, dtype):
    torch.manual_seed(1)
    ours = network()
    stock = convext.restore_layers(convext.unfuse(network()))
    stock.load_state_dict(convext.to_unfused(ours.state_dict(), ours))
    images = torch.randn(4, 3, 8, 8, device="cuda")
    losses = []
    for model in (ours, stock):
        with torch.autocast("cuda", dtype=dtype):
            output = model(images)
        assert output.dtype == dtype
        loss = output.float().square().mean()
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(*losses, rtol=0.05, atol=0.01)
    for parameter in ours.parameters():
        assert parameter.grad.dtype == torch.float32


def test_synchronised_batch_norm_of_one_process(gpu):
    x = torch.randn(4, 5, 6, 7, device="cuda")
    layer = convext.SyncBatchNorm2d(5).cuda()
    torch.testing.assert_close(layer(x), F.batch_norm(x, None, None, training=True))


def test_trains_on_the_gpu_by_itself(gpu, tmp_path):
    pytest.importorskip("lightning.pytorch", reason="training needs the extra convext[train]")
    pytest.importorskip("sklearn", reason="the digits need the extra convext[digits]")
    from convext.mnist.train import Options, train

    metrics = train(Options(data="digits", epochs=10, out=tmp_path / "run"))
    assert metrics["device"] == "cuda"
    assert metrics["accuracy"] > 0.9
