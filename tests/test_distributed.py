"""Several processes that train together: batch norm over all of them, DDP, FSDP2, `--devices`.

What two processes do is in distributed_worker.py; they are started once for all its checks.
"""

import copy
import multiprocessing
import pickle
import time

import distributed_worker
import pytest
import torch
from torch import nn

import convext

DEADLINE = 2 * distributed_worker.SECONDS + 20


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """For each process, what went wrong in which check."""
    folder = tmp_path_factory.mktemp("checks")
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=distributed_worker.run, args=(rank, str(folder)), daemon=True)
        for rank in range(distributed_worker.PROCESSES)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + DEADLINE
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    assert codes == [0] * len(processes), "a process died, or hung where stderr says"
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(processes))]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(distributed_worker.CHECKS))
def test_two_processes(failures, name):
    for rank, failed in enumerate(failures):
        assert name not in failed, f"process {rank}:\n{failed[name]}"


# ---- the layer in one process ----


def test_outside_a_process_group_the_layer_is_batch_norm():
    layer, single = convext.SyncBatchNorm2d(4), convext.BatchNorm2d(4)
    single.load_state_dict(layer.state_dict())
    input = torch.randn(2, 4, 3, 5)
    for _ in range(2):
        assert torch.equal(layer(input), single(input))
        layer.eval(), single.eval()
    for name, value in single.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value)


def test_conversion_keeps_everything_but_the_class():
    model = nn.Sequential(
        convext.Conv2d(1, 2, 3), convext.BatchNorm2d(2), nn.Sequential(nn.BatchNorm2d(3)).eval()
    )
    before = dict(model.named_modules()), {**model.state_dict(keep_vars=True)}
    assert convext.SyncBatchNorm2d.convert_sync_batchnorm(model) is model
    kinds = [type(model[0]), type(model[1]), type(model[2][0])]
    assert kinds == [convext.Conv2d, convext.SyncBatchNorm2d, convext.SyncBatchNorm2d]
    assert model[1].training
    assert not model[2][0].training
    for name, module in model.named_modules():
        assert module is before[0][name]
    for name, value in model.state_dict(keep_vars=True).items():
        assert value is before[1][name]
    convext.restore_layers(model)
    assert type(model[1]) is type(model[2][0]) is nn.SyncBatchNorm
    input = torch.randn(2, 1, 5, 6)
    assert model[:2](input).shape == (2, 2, 3, 4)


def test_conversion_warns_of_what_it_leaves():
    class Other(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(Other(3)), nn.SyncBatchNorm(4))
    with pytest.warns(UserWarning, match=r"not synchronised: 0 \(BatchNorm1d\), 1\.0 \(Other\)$"):
        convext.SyncBatchNorm2d.convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm1d


def test_layer_is_copied_and_pickled():
    layer = convext.SyncBatchNorm2d(4, momentum=None)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is convext.SyncBatchNorm2d
        assert twin.process_group is None
        assert str(twin) == str(layer)
