"""What kernels keep from call to call: the same bits from any thread, whatever happens to the
weights between two calls, in bounded memory.
"""

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import LESSON_LAYERS, Conv2dProblem, named
from reference import PASSES, convext_pass, operands

from convext import _C
from convext.functional import batch_norm, conv2d

MOST_PLANS, MOST_PLAN_BYTES = 256, 32 << 20
MOST_PACKED, MOST_PACKED_BYTES = 512, 64 << 20


def repeated(call, times: int = 4) -> torch.Tensor:
    """The result of a call that is made several times: planned, marked, copied, found again."""
    results = [call() for _ in range(times)]
    assert all(torch.equal(result, results[0]) for result in results)
    return results[0]


@pytest.mark.parametrize("problem", [*LESSON_LAYERS, named("all settings differ")], ids=str)
@pytest.mark.parametrize("conv_pass", PASSES)
def test_repeated_calls_give_the_same_bits(problem, conv_pass, isa, algorithm):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        data = operands(problem, dtype)
        repeated(lambda data=data: convext_pass(problem, conv_pass, data, algorithm))


@pytest.mark.parametrize("conv_pass", PASSES[:2])
def test_new_operands_meet_no_old_results(conv_pass, algorithm):
    """Tensors come and go, and addresses are used again."""
    problem = LESSON_LAYERS[3]
    for seed in range(8):
        torch.manual_seed(seed)
        data = type(operands(problem, torch.float32))(
            *(torch.randn_like(tensor) for tensor in operands(problem, torch.float32))
        )
        result = repeated(lambda data=data: convext_pass(problem, conv_pass, data, algorithm), 3)
        copies = type(data)(*(tensor.clone() for tensor in data))
        assert torch.equal(convext_pass(problem, conv_pass, copies, algorithm), result)


def write_by_data(weight: torch.Tensor) -> None:
    weight.data[3, 2, 1, 0] += 1


def write_by_numpy(weight: torch.Tensor) -> None:
    weight.detach().numpy()[5, 1, 2, 2] -= 1


def write_by_dlpack(weight: torch.Tensor) -> None:
    torch.from_dlpack(weight.detach()).select(0, -1).neg_()


def write_in_inference_mode(weight: torch.Tensor) -> None:
    with torch.inference_mode():
        weight.detach().mul_(2)


def write_a_sign(weight: torch.Tensor) -> None:
    """The least change that a value can have."""
    weight.data.view(torch.int32)[0, 0, 0, 1] ^= 1


@pytest.mark.parametrize(
    "write",
    [write_by_data, write_by_numpy, write_by_dlpack, write_in_inference_mode, write_a_sign],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_weights_that_change_in_secret(write, layout, algorithm):
    input = torch.randn(1, 32, 4, 4).to(memory_format=layout)
    weight = torch.randn(64, 32, 3, 3).to(memory_format=layout).requires_grad_()
    with torch.no_grad():
        for _ in range(3):
            repeated(lambda: conv2d(input, weight, stride=2, padding=1, algorithm=algorithm))
            before = conv2d(input, weight, stride=2, padding=1, algorithm=algorithm)
            write(weight)
            after = conv2d(input, weight, stride=2, padding=1, algorithm=algorithm)
            fresh = weight.detach().clone(memory_format=layout)
            expected = conv2d(input, fresh, stride=2, padding=1, algorithm=algorithm)
            assert torch.equal(after, expected)
            if write is not write_a_sign:
                assert not torch.equal(after, before)


def test_inference_tensors_as_weights(algorithm):
    with torch.inference_mode():
        input, weight = torch.randn(1, 8, 6, 5), torch.randn(16, 8, 3, 3)
        for _ in range(4):
            result = repeated(lambda: conv2d(input, weight, algorithm=algorithm))
            assert torch.equal(result, conv2d(input, weight.clone(), algorithm=algorithm))
            weight[0, 0, 0, 0] += 1


@pytest.fixture(scope="module")
def fresh_process():
    """One whose stores are not yet full, so that what is kept only adds to them."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        yield executor


def packed_weights_call_by_call(problem, conv_pass, algorithm) -> list[tuple[int, int]]:
    """(values, bytes) kept before the first call and after each of four."""
    data = operands(problem, torch.float32)
    kept = [_C.cpu_memory()["packed weights"]]
    for _ in range(4):
        convext_pass(problem, conv_pass, data, algorithm)
        kept.append(_C.cpu_memory()["packed weights"])
    return kept


@pytest.mark.parametrize("conv_pass", PASSES[:2])
def test_unchanged_weights_stay_packed(conv_pass, algorithm, fresh_process):
    """The third call adds nothing to what the second has kept."""
    problem = Conv2dProblem("unlike others", 1, 17, 5, 4, 19, (2, 3))
    task = (packed_weights_call_by_call, problem, conv_pass, algorithm)
    kept = fresh_process.submit(*task).result()
    if algorithm in ("direct", "im2col"):
        sizes = [size for _, size in kept]
        assert sizes[2] == sizes[0]
        assert sizes[3] - sizes[2] >= 2 * operands(problem, torch.float32).weight.nbytes
    assert kept[3] == kept[4]


def in_threads(count: int, work) -> None:
    """Runs work(i) in threads, which all begin at once."""
    errors, barrier = [], threading.Barrier(count)

    def run(i):
        try:
            barrier.wait()
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("torch_threads", [1, 2])
def test_many_threads_at_once(torch_threads):
    cases = [(problem, conv_pass) for problem in LESSON_LAYERS for conv_pass in PASSES]
    data = {problem: operands(problem, torch.float32) for problem in LESSON_LAYERS}
    expected = [convext_pass(p, conv_pass, data[p], "auto") for p, conv_pass in cases]

    def work(i):
        torch.set_num_threads(torch_threads)
        for step in range(60):
            case = (i * 7 + step) % len(cases)
            problem, conv_pass = cases[case]
            result = convext_pass(problem, conv_pass, data[problem], "auto")
            assert torch.equal(result, expected[case])

    before = torch.get_num_threads()
    try:
        in_threads(8, work)
    finally:
        torch.set_num_threads(before)


def test_threads_that_share_weights_which_change():
    """A thread sees the weights of one moment, never packed ones of another."""
    weights = [torch.randn(64, 32, 3, 3) for _ in range(2)]
    input = torch.randn(1, 32, 4, 4)
    expected = [conv2d(input, weight) for weight in weights]
    shared = [weights[0].clone() for _ in range(4)]
    locks = [threading.Lock() for _ in shared]

    def work(i):
        generator = np.random.default_rng(i)
        for _ in range(200):
            j, now = generator.integers(len(shared)), generator.integers(2)
            with locks[j]:
                if generator.random() < 0.3:
                    shared[j].data.copy_(weights[now])
                held = [torch.equal(shared[j], weight) for weight in weights]
                result = conv2d(input, shared[j])
            assert torch.equal(result, expected[held.index(True)])

    in_threads(6, work)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork_while_another_thread_computes():
    input, weight = torch.randn(1, 8, 14, 14), torch.randn(16, 8, 3, 3)
    expected, stop = conv2d(input, weight), threading.Event()

    def compute():
        while not stop.is_set():
            conv2d(input, weight)

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                os._exit(0 if torch.equal(conv2d(input, weight), expected) else 1)
            deadline = time.monotonic() + 30
            while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
                assert time.monotonic() < deadline, "the child hangs"
                time.sleep(0.001)
            assert os.waitstatus_to_exitcode(ended[1]) == 0
    finally:
        stop.set()
        thread.join()


def assert_bounded() -> None:
    for name, (count, size) in _C.cpu_memory().items():
        packed = name == "packed weights"
        assert count <= (MOST_PACKED if packed else MOST_PLANS), name
        assert size <= (MOST_PACKED_BYTES if packed else MOST_PLAN_BYTES), name


def test_many_shapes_leave_bounded_memory():
    for i in range(2 * MOST_PLANS):
        size = (1, 1 + i % 7, 5 + i // 7, 4)
        input, weight = torch.randn(size), torch.randn(3, size[1], 3, 2)
        repeated(lambda input=input, weight=weight: conv2d(input, weight))
        batch_norm(input, None, None, training=True)
        assert_bounded()
    counts = {name: count for name, (count, _) in _C.cpu_memory().items()}
    assert counts["conv2d plans"] == counts["batch norm plans"] == MOST_PLANS


def test_large_weights_leave_bounded_memory():
    problem = Conv2dProblem("large", 1, 512, 3, 4, 512, (3, 3), padding=(1, 1))
    for seed in range(10):
        torch.manual_seed(seed)
        input, weight = torch.randn(problem.input_size), torch.randn(problem.weight_size)
        expected = repeated(lambda i=input, w=weight: conv2d(i, w, padding=1))
        assert torch.equal(conv2d(input, weight.clone(), padding=1), expected)
        assert_bounded()


def test_nothing_past_an_operand_is_read():
    script = Path(__file__).with_name("guarded_operands.py")
    run = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 1000
