"""What tests/test_distributed.py lets two processes do together.

Each check is a function that both processes run, in a process group of its own. It returns
nothing, and raises where something is wrong. Checks compare with a single process by computing
there, too, what one process would with the joined batch.
"""

import copy
import faulthandler
import functools
import os
import signal
import time
import traceback
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import convext
from convext.mnist.model import lesson_cnn

PROCESSES = 2
SECONDS = 30  # for one collective, instead of half an hour
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def run(rank: int, folder: str) -> None:
    """Runs every check; writes what went wrong into folder / f"{rank}.pt", by the check's name."""
    faulthandler.dump_traceback_later(2 * SECONDS, exit=True)
    torch.set_num_threads(1)
    failures = {}
    for name, function in CHECKS.items():
        store = dist.FileStore(str(Path(folder) / name), PROCESSES)
        dist.init_process_group(
            "gloo",
            store=store,
            rank=rank,
            world_size=PROCESSES,
            timeout=timedelta(seconds=SECONDS),
        )
        torch.manual_seed(0)  # the same numbers in both processes
        try:
            function(rank)
        except BaseException:
            failures[name] = traceback.format_exc()
        dist.destroy_process_group()
    torch.save(failures, Path(folder) / f"{rank}.pt")


def assert_near(actual, expected, tolerance=None):
    tolerance = TOLERANCE[expected.dtype] if tolerance is None else tolerance
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_same_bits_everywhere(tensor):
    rows = [torch.empty_like(tensor) for _ in range(PROCESSES)]
    dist.all_gather(rows, tensor.contiguous())
    assert torch.equal(rows[0], rows[1])


def total(tensor):
    """The sum over both processes."""
    tensor = tensor.to(torch.float64, copy=True)
    dist.all_reduce(tensor)
    return tensor


# ---- the layer ----

# Images of (rank 0, rank 1), on maps of 3x5 pixels but for the last one's 1x1.
SPLITS = {
    "even": (3, 3, (3, 5)),
    "uneven": (1, 4, (3, 5)),
    "empty": (0, 3, (3, 5)),
    "single values": (1, 1, (1, 1)),
}
SETTINGS = {
    "plain": {},
    "not affine": {"affine": False},
    "no statistics": {"track_running_stats": False},
    "cumulative average": {"momentum": None},
    "other constants": {"momentum": 0.3, "eps": 1e-2},
}


def compare_with_joined_batch(rank, split, dtype, layout=torch.contiguous_format, **settings):
    """Two steps of a synchronised layer, beside those of BatchNorm2d on both batches at once."""
    *sizes, pixels = SPLITS[split]
    single = convext.BatchNorm2d(4, dtype=dtype, **settings)
    for parameter in single.parameters():
        nn.init.normal_(parameter)
    layer = convext.SyncBatchNorm2d.convert_sync_batchnorm(copy.deepcopy(single))
    assert type(layer) is convext.SyncBatchNorm2d
    for _ in range(2):
        batch = 3 * torch.randn(sum(sizes), 4, *pixels) + torch.arange(4).view(4, 1, 1)
        batch = batch.to(dtype).contiguous(memory_format=layout)
        grad = torch.randn(batch.shape).to(dtype).contiguous(memory_format=layout)
        joined = batch.clone().requires_grad_()
        expected = single(joined)
        expected.backward(grad)

        mine = batch.split(sizes)[rank].clone(memory_format=layout).requires_grad_()
        output = layer(mine)
        output.backward(grad.split(sizes)[rank])
        assert output.is_contiguous(memory_format=layout)
        assert_near(output, expected.split(sizes)[rank])
        assert_near(mine.grad, joined.grad.split(sizes)[rank])
        for ours, theirs in zip(layer.parameters(), single.parameters(), strict=True):
            assert ours.grad.dtype == dtype
            bound = TOLERANCE[dtype] * grad.numel() ** 0.5
            assert_near(total(ours.grad), theirs.grad.double(), bound)
    assert list(layer.state_dict()) == list(single.state_dict())
    for ours, theirs in zip(layer.buffers(), single.buffers(), strict=True):
        assert_near(ours, theirs) if ours.is_floating_point() else None
        assert torch.equal(ours, theirs) or ours.is_floating_point()
        assert_same_bits_everywhere(ours)
    layer.eval(), single.eval()
    if single.track_running_stats:  # the other takes each its own statistics, as in PyTorch
        assert_near(layer(batch), single(batch))


for split_ in SPLITS:
    for settings_ in SETTINGS:
        name_ = f"layer, {split_} batches, {settings_}"
        CHECKS[name_] = functools.partial(
            compare_with_joined_batch,
            split=split_,
            dtype=torch.float64,
            **SETTINGS[settings_],
        )
for dtype_ in (torch.float32, torch.bfloat16, torch.float16):
    CHECKS[f"layer, {dtype_}".replace("torch.", "")] = functools.partial(
        compare_with_joined_batch, split="uneven", dtype=dtype_
    )
CHECKS["layer, channels_last"] = functools.partial(
    compare_with_joined_batch, split="uneven", dtype=torch.float64, layout=torch.channels_last
)


@check
def layer_of_all_empty_batches_learns_nothing(rank):
    layer = convext.SyncBatchNorm2d(4)
    before = copy.deepcopy(layer.state_dict())
    output = layer(torch.zeros(0, 4, 3, 5, requires_grad=True))
    output.sum().backward()
    assert output.shape == (0, 4, 3, 5)
    for name in ("running_mean", "running_var"):
        assert torch.equal(layer.state_dict()[name], before[name])
    assert torch.equal(layer.weight.grad, torch.zeros(4))


@check
def layer_refuses_a_single_value_in_all_batches_together(rank):
    layer = convext.SyncBatchNorm2d(4)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.zeros(1 - rank, 4, 1, 1))
    with pytest.raises(ValueError, match="expected 4D input"):
        layer(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="channels"):
        convext.SyncBatchNorm2d(0)(torch.zeros(2, 0, 3, 3))


@check
def layer_shares_within_its_group_only(rank):
    alone = [dist.new_group([r]) for r in range(PROCESSES)]
    input = torch.randn(3, 4, 3, 5) + rank
    expected = convext.BatchNorm2d(4)(input)
    for group in (alone[rank], alone[1 - rank]):  # that of this process, and one it is not in
        assert torch.equal(convext.SyncBatchNorm2d(4, process_group=group)(input), expected)
    both = dist.new_group([0, 1])
    synchronised = convext.SyncBatchNorm2d(4, process_group=both)(input)
    assert torch.equal(synchronised, convext.SyncBatchNorm2d(4)(input))
    assert not torch.allclose(synchronised, expected)


@check
def layer_says_which_derivatives_it_lacks(rank):
    layer = convext.SyncBatchNorm2d(4, track_running_stats=False)
    input = torch.randn(3, 4, 3, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(input).square().sum(), input, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: layer(x).sum())(input)
    with pytest.raises(RuntimeError, match="jvp"), forward_ad.dual_level():
        layer(forward_ad.make_dual(input, input))


@check
def layer_takes_autocasts_input(rank):
    conv, norm = convext.Conv2d(3, 4, 3), convext.SyncBatchNorm2d(4)
    with torch.autocast("cpu", torch.bfloat16):
        output = norm(conv(torch.randn(2, 3, 6, 7)))
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert {p.grad.dtype for p in (*conv.parameters(), *norm.parameters())} == {torch.float32}
    assert norm.running_mean.dtype == torch.float32
    assert_same_bits_everywhere(norm.running_var)


@check
def layer_with_frozen_parameters_still_passes_a_gradient_on(rank):
    layer, single = (kind(4).double() for kind in (convext.SyncBatchNorm2d, convext.BatchNorm2d))
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    batch, grad = torch.randn(2, 4, 4, 3, 5, dtype=torch.float64)
    joined = batch.clone().requires_grad_()
    single(joined).backward(grad)
    mine = batch.chunk(2)[rank].clone().requires_grad_()
    layer(mine).backward(grad.chunk(2)[rank])
    assert_near(mine.grad, joined.grad.chunk(2)[rank])
    for parameter in layer.parameters():
        assert parameter.grad is None
        parameter.requires_grad_()
    layer(mine.detach()).backward(grad.chunk(2)[rank])  # nor needs input to require one
    assert_near(total(layer.weight.grad), single.weight.grad)


@check
def layer_compiles_without_a_graph_break(rank):
    eager = nn.Sequential(convext.Conv2d(3, 4, 3), convext.SyncBatchNorm2d(4))
    compiled = copy.deepcopy(eager)
    input = torch.randn(2, 3, 6, 7) + rank
    outputs = eager(input), torch.compile(compiled, backend="aot_eager", fullgraph=True)(input)
    for output in outputs:
        output.square().sum().backward()
    assert_near(outputs[1], outputs[0])
    assert_same_model(compiled, eager)
    assert_near(compiled[0].weight.grad, eager[0].weight.grad)


@check
def fused_blocks_are_synchronised_by_their_parts(rank):
    separate = lesson_cnn().double()
    fused = convext.fuse(copy.deepcopy(separate))
    assert any(isinstance(layer, convext.ConvBlock2d) for layer in fused)
    for model in (separate, fused):
        convext.SyncBatchNorm2d.convert_sync_batchnorm(model)
    images = torch.randn(4, 1, 28, 28, dtype=torch.float64)[2 * rank :][:2]
    for model in (separate, fused):
        model(images).square().sum().backward()
    assert torch.equal(fused(images), separate(images))
    assert_near(fused.conv1.conv.weight.grad, separate.conv1.weight.grad)
    assert_same_bits_everywhere(fused.conv1.norm.running_var)


@check
def torchs_conversion_makes_our_layers_its_own(rank):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(lesson_cnn())
    kinds = [type(layer) for layer in model if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    assert kinds == [nn.SyncBatchNorm] * 4
    images = torch.randn(2, 1, 28, 28)
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
        model(images)
    stock = lesson_cnn("torch")
    stock.load_state_dict(model.state_dict())
    assert_near(model.eval()(images), stock.eval()(images))


# ---- DistributedDataParallel and FSDP2 ----


def lesson_batches(steps, dtype, images=8):
    for _ in range(steps):
        labels = torch.randint(10, (images,))
        yield torch.randn(images, 1, 28, 28, dtype=dtype), labels


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def trained(model, batches, accumulate=1, share=slice(None)):
    """Trains in place on a share of every batch; `accumulate` batches make a step."""
    optimizer = sgd(model)
    for number, (images, labels) in enumerate(batches, start=1):
        steps = number % accumulate == 0
        pause = model.no_sync() if not steps and hasattr(model, "no_sync") else nullcontext()
        with pause:
            (F.cross_entropy(model(images[share]), labels[share]) / accumulate).backward()
        if steps:
            optimizer.step()
            optimizer.zero_grad()
    return model


def half(rank, images=8):
    return slice(rank * images // 2, (rank + 1) * images // 2)


def assert_same_model(model, expected, tolerance=None):
    found, wanted = model.state_dict(), expected.state_dict()
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        if value.is_floating_point():
            assert_near(found[name], value, tolerance)
        else:
            assert torch.equal(found[name], value), name


def ddp_with_synchronised_batch_norm(rank, dtype, accumulate=1, **options):
    """Three steps of two processes are three of one process on the joined batches."""
    single = lesson_cnn().to(dtype)
    model = convext.SyncBatchNorm2d.convert_sync_batchnorm(copy.deepcopy(single))
    batches = list(lesson_batches(3 * accumulate, dtype))
    trained(single, batches, accumulate)
    ddp = trained(DistributedDataParallel(model, **options), batches, accumulate, half(rank))
    # float32: rounding grows from step to step.
    assert_same_model(ddp.module, single, 1e-11 if dtype == torch.float64 else 2e-4)
    for value in ddp.module.state_dict().values():
        assert_same_bits_everywhere(value)


for title, settings_ in {
    "float64": {},
    "float32": {"dtype": torch.float32},
    "gradients accumulated without sync": {"accumulate": 2},
    "static_graph": {"static_graph": True},
    "find_unused_parameters": {"find_unused_parameters": True},
    "gradients as views of buckets": {"gradient_as_bucket_view": True},
}.items():
    CHECKS[f"DDP, synchronised, {title}"] = functools.partial(
        ddp_with_synchronised_batch_norm, **{"dtype": torch.float64, **settings_}
    )


@check
def ddp_without_synchronisation_equals_stock_layers(rank):
    stock = lesson_cnn("torch").double()
    ours = convext.replace_layers(copy.deepcopy(stock))
    batches = list(lesson_batches(3, torch.float64))
    stock, ours = (
        trained(DistributedDataParallel(model), batches, share=half(rank))
        for model in (stock, ours)
    )
    assert_same_model(ours.module, stock.module, 1e-11)


@check
def ddp_broadcasts_the_buffers_of_the_first_process(rank):
    model = convext.BatchNorm2d(4)
    model.running_mean.fill_(5 + rank)
    model.num_batches_tracked.fill_(5 + rank)
    ddp = DistributedDataParallel(model)
    ddp(torch.randn(2, 4, 3, 5) + rank)  # each learns of its own batch
    ddp.eval()
    ddp(torch.randn(2, 4, 3, 5))  # and takes the first one's over before the next
    assert model.num_batches_tracked == 6
    assert_same_bits_everywhere(model.running_mean)


def fsdp(rank, synchronised, reshard):
    """FSDP2 shards the parameters, and hands our ops plain tensors while it computes."""
    single = lesson_cnn().double()
    model = copy.deepcopy(single)
    batches = list(lesson_batches(3, torch.float64))
    if synchronised:
        convext.SyncBatchNorm2d.convert_sync_batchnorm(model)
        trained(single, batches)
    else:  # the same under DDP is the measure
        single = trained(DistributedDataParallel(single), batches, share=half(rank)).module
    mesh = init_device_mesh("cpu", (PROCESSES,))
    blocks = [layer for layer in model if isinstance(layer, nn.Conv2d)]
    seen = set()
    for block in blocks:
        # The first hook: before FSDP2's own takes the whole parameters away again.
        block.register_forward_hook(lambda layer, *_: seen.add(type(layer.weight.data)))
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    assert all(type(p.data).__name__ == "DTensor" for p in model.parameters())
    assert {type(block.weight).__name__ for block in blocks} == {"DTensor"}
    trained(model, batches, share=half(rank))
    assert seen == {torch.Tensor}
    for name, parameter in model.named_parameters():
        assert_near(parameter.full_tensor(), single.get_parameter(name).detach(), 1e-11)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and synchronised:
            assert_near(buffer, single.get_buffer(name), 1e-11)


for synchronised_ in (True, False):
    for reshard_ in (True, False):
        words = f"{'' if synchronised_ else 'not '}synchronised"
        words += f", {'' if reshard_ else 'not '}resharded after forward"
        CHECKS[f"FSDP2, {words}"] = functools.partial(
            fsdp, synchronised=synchronised_, reshard=reshard_
        )


# ---- what convext.mnist.processes lets the started processes do ----


def take_part(world):
    word = world.share()
    gathered = [None] * world.size
    dist.all_gather_object(gathered, (word, world, torch.get_num_threads()))


def fail(world):
    world.share()
    if world.rank == 1:
        raise ValueError("the disk is on fire")
    dist.barrier()  # the others learn of it here, but say nothing


def die(world):
    world.share()
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_ever(world):
    world.share()
    time.sleep(3600)


class EndsWhenRead:
    """A task that ends the process to which it is sent, before it takes part."""

    def __reduce__(self):
        return os._exit, (3,)
