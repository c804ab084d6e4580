"""What "auto" chooses: the table of reasons, permission for Winograd, and measured times."""

import json
import subprocess
import sys
import threading
import time

import pytest
import torch
from problems import FORMS, LESSON_LAYERS, PROBLEMS, Conv2dProblem, named
from reference import PASSES, Operands, convext_pass
from reference import operands as make_operands
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils._python_dispatch import TorchDispatchMode

import convext
from convext import _C, functional
from convext.tuning_cache import TuningCache, this_machine

P = Conv2dProblem
ROWS = _C.auto_rows()
WINOGRADS = [name for name in convext.algorithms() if name.startswith("winograd")]


def run(p, conv_pass="forward", algorithm="auto", dtype=torch.float32, layout="contiguous"):
    data = Operands(*map(FORMS[layout], make_operands(p, dtype)))
    return convext_pass(p, conv_pass, data, algorithm)


def last(conv_pass):
    """(algorithm, reason) of the last call of a pass."""
    return tuple(getattr(f(), conv_pass) for f in (convext.last_algorithm, convext.last_reason))


def in_thread(function):
    """What it returns in a thread of its own."""
    returned = []
    thread = threading.Thread(target=lambda: returned.append(function()))
    thread.start()
    thread.join()
    return returned[0]


# --------------------------------------------------------------------------------------------------
# The table


@pytest.mark.parametrize(
    ("p", "conv_pass", "permission", "names"),
    [
        (P("", 1, 16, 7, 8, 16, (3, 3), (1, 1), (1, 1)), "forward", "+winograd", WINOGRADS),
        (P("", 1, 16, 12, 13, 16, (3, 3), (1, 1), (1, 1)), "forward", "", []),
        (P("", 1, 16, 6, 8, 16, (3, 3), (1, 1), (1, 1)), "forward", "+winograd", []),
        (P("", 1, 15, 12, 13, 16, (3, 3), (1, 1), (1, 1)), "forward", "+winograd", []),
        (P("", 1, 16, 12, 13, 15, (3, 3), (1, 1), (1, 1)), "forward", "+winograd", []),
        (P("", 1, 16, 24, 26, 16, (3, 3), (2, 1), (1, 1)), "forward", "+winograd", []),
        (P("", 1, 16, 24, 26, 16, (3, 2), (1, 1), (1, 1)), "forward", "+winograd", []),
        (P("", 1, 5, 9, 8, 5, (3, 3), groups=5), "forward", "", ["depthwise"]),
        (P("", 1, 3, 9, 8, 8, (3, 3)), "grad_input", "", ["im2col"]),
        (P("", 1, 4, 9, 8, 8, (3, 3)), "grad_input", "", []),
        (P("", 1, 3, 9, 8, 7, (3, 3)), "grad_input", "", []),
        (P("", 1, 3, 9, 8, 8, (3, 3)), "forward", "", []),
        (P("", 1, 3, 9, 8, 8, (3, 3)), "grad_weight", "", []),
        (P("", 1, 4, 9, 8, 4, (3, 3), groups=2), "forward", "", []),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_decides(p, conv_pass, permission, names, form, dtype):
    run(p, conv_pass, "auto" + permission, dtype, form)
    expected = next((name for name in names if name in convext.algorithms()), "direct")
    if expected == "im2col" and (form == "contiguous" or dtype == torch.float32):
        expected = "direct"  # whose lanes may be pixels there
    assert last(conv_pass) == (expected, dict(ROWS)[expected])


@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_every_problem_has_a_reason(p):
    for conv_pass in PASSES:
        run(p, conv_pass)
        assert last(conv_pass) in ROWS


def test_the_last_row_takes_what_is_left():
    assert ROWS[-1][0] == "direct"
    assert {name for name, _ in ROWS} >= set(convext.algorithms())


@pytest.mark.parametrize("name", [LESSON_LAYERS[0].name, "depthwise", "stem of 3 channels"])
def test_same_answer_and_bits_for_any_threads_and_isa(name, restore_threads, restore_isa):
    p = named(name)
    for conv_pass in PASSES:
        answers = set()
        for isa in _C.cpu_isas():
            _C.set_cpu_isa(isa)
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(run(p, conv_pass))
                answers.add(last(conv_pass))
            assert all(torch.equal(results[0], result) for result in results)
        assert len(answers) == 1


def test_reason_of_a_name():
    run(named("plain"), algorithm="im2col")
    assert last("forward") == ("im2col", "asked for by name")


# --------------------------------------------------------------------------------------------------
# allow_winograd: what the ops are told


class Told(TorchDispatchMode):
    """Collects the algorithm that each of our ops is called with."""

    def __init__(self):
        super().__init__()
        self.algorithms = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        names = [argument.name for argument in op._schema.arguments]
        if op.namespace == "convext" and "algorithm" in names:
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            self.algorithms[op._schema.name.split("::")[1]] = given.get("algorithm", "auto")
        return op(*args, **(kwargs or {}))


def told(function):
    with Told() as mode:
        function()
    return mode.algorithms


def operands():
    return torch.randn(2, 3, 6, 5, requires_grad=True), torch.randn(4, 3, 3, 2, requires_grad=True)


def forward():
    return functional.conv2d(*operands())


PERMITTED, PLAIN = {"conv2d": "auto+winograd"}, {"conv2d": "auto"}


@pytest.fixture(autouse=True)
def _as_a_new_process():
    """Tests of functions that last."""
    yield
    convext.allow_winograd(False)
    convext.autotune(False)


def test_permission_is_for_the_block():
    assert told(forward) == PLAIN
    with convext.allow_winograd():
        assert told(forward) == PERMITTED
        with convext.allow_winograd(False):
            assert told(forward) == PLAIN
            with convext.allow_winograd():
                assert told(forward) == PERMITTED
            assert told(forward) == PLAIN
        assert told(forward) == PERMITTED
    assert told(forward) == PLAIN


def test_permission_as_a_function():
    convext.allow_winograd()
    assert told(forward) == PERMITTED
    with convext.allow_winograd(False):
        assert told(forward) == PLAIN
    assert told(forward) == PERMITTED
    convext.allow_winograd(False)
    assert told(forward) == PLAIN


def test_permission_ends_with_an_exception():
    with pytest.raises(RuntimeError, match="size"), convext.allow_winograd():
        functional.conv2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 3, 3))
    assert told(forward) == PLAIN


def test_permission_is_for_the_thread():
    with convext.allow_winograd():
        assert in_thread(lambda: told(forward)) == PLAIN
    in_thread(convext.allow_winograd)
    assert told(forward) == PLAIN


def test_names_need_no_permission():
    with convext.allow_winograd():
        assert told(lambda: functional.conv2d(*operands(), algorithm="im2col")) == {
            "conv2d": "im2col"
        }
    assert told(lambda: convext.Conv2d(3, 4, 3, algorithm="auto+winograd")(operands()[0])) == (
        PERMITTED
    )


@pytest.mark.parametrize("allowed", [True, False])
def test_gradients_go_by_the_rule_of_the_forward_pass(allowed):
    with convext.allow_winograd(allowed):
        tensors = operands()
        output = functional.conv2d(*tensors)
    with convext.allow_winograd(not allowed), Told() as mode:
        grads = torch.autograd.grad(output.square().sum(), tensors, create_graph=True)
        sum(grad.square().sum() for grad in grads).backward()
    expected = "auto+winograd" if allowed else "auto"
    assert set(mode.algorithms) == {"conv2d", "conv2d_backward_input", "conv2d_backward_weight"}
    assert set(mode.algorithms.values()) == {expected}


@pytest.mark.parametrize("training", [True, False])
def test_fused_block_takes_the_permission(training):
    block = convext.ConvBlock2d(3, 4, 3).train(training)
    with Told() as mode:
        with convext.allow_winograd():
            output = block(operands()[0])
        output.sum().backward()
    assert len(mode.algorithms) == 3
    assert set(mode.algorithms.values()) == {"auto+winograd"}


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
        lambda f, x: torch.func.vmap(f)(x[None]),
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.func.hessian(lambda x: f(x).square().sum())(x),
    ],
    ids=["grad", "vmap", "jvp", "hessian"],
)
def test_transforms_take_the_permission(transform):
    x, weight = (tensor.detach() for tensor in operands())
    with convext.allow_winograd():
        found = told(lambda: transform(lambda x: functional.conv2d(x, weight), x))
    assert set(found.values()) == {"auto+winograd"}


def compiled(function):
    """`function`, compiled without graph breaks; and the algorithms in its graphs, in order."""
    found = []

    def record(graph, inputs):
        for node in graph.graph.nodes:
            if str(node.target).startswith("convext.conv2d"):
                found.append(next((a for a in node.args if isinstance(a, str)), "auto"))
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    return torch.compile(function, backend=backend, fullgraph=True), found


def test_compiled_code_follows_the_permission():
    function, found = compiled(lambda x, weight: functional.conv2d(x, weight).sum())
    for allowed in (False, True):
        found.clear()
        tensors = operands()
        with convext.allow_winograd(allowed):
            loss = function(*tensors)
        loss.backward()
        assert found == ["auto+winograd" if allowed else "auto"] * 3
    found.clear()
    function(*operands()).backward()
    assert not found  # what was compiled first serves again


def test_permission_inside_compiled_code():
    def two(x, weight):
        with convext.allow_winograd():
            y = functional.conv2d(x, weight)
        return y + functional.conv2d(x, weight)

    function, found = compiled(two)
    function(*(tensor.detach() for tensor in operands()))
    assert found == ["auto+winograd", "auto"]
    assert told(forward) == PLAIN


def test_exported_program_keeps_the_permission():
    layer = convext.Conv2d(3, 4, 3)
    with convext.allow_winograd():
        program = torch.export.export(layer, (torch.randn(2, 3, 6, 5),))
    assert told(lambda: program.module()(torch.randn(2, 3, 6, 5))) == PERMITTED


def test_permission_changes_nothing_where_winograd_declines():
    p = LESSON_LAYERS[1]
    for conv_pass in PASSES:
        plain = run(p, conv_pass)
        before = last(conv_pass)
        assert torch.equal(run(p, conv_pass, "auto+winograd"), plain)
        assert last(conv_pass) == before


# --------------------------------------------------------------------------------------------------
# autotune


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "times.json"


def tuned(path, p, conv_pass="forward", **options):
    """(algorithm, results) of a call that is tuned with this file."""
    with convext.autotune(cache=path) as tuner:
        run(p, conv_pass, **options)
        assert last(conv_pass)[1] == "the fastest by the times of convext.autotune()"
    return last(conv_pass)[0], tuner.results


def write(path, table, **others):
    path.parent.mkdir(exist_ok=True)
    machines = {this_machine(): table, **others}
    path.write_text(json.dumps({"convext.autotune": 1, "machines": machines}))


def read(path):
    return json.loads(path.read_text())["machines"]


@pytest.fixture
def problem_text(tmp_path):
    """Gives how the file names a call."""

    def text(p, conv_pass="forward", **options):
        _, results = tuned(tmp_path / f"{p.name} {conv_pass}.json", p, conv_pass, **options)
        return next(iter(results))

    return text


@pytest.mark.parametrize(
    "name",
    ["plain", "all settings differ", "groups with dilation", "depthwise", "one multiplication"],
)
@pytest.mark.parametrize("conv_pass", PASSES)
def test_tuned_is_a_named_algorithm(name, conv_pass, isa, path):
    p = named(name)
    with convext.autotune(cache=path) as tuner:
        result = run(p, conv_pass)
    algorithm, _ = last(conv_pass)
    (seconds,) = tuner.results.values()
    assert seconds[algorithm] == min(seconds.values())
    assert torch.equal(result, run(p, conv_pass, algorithm))


@pytest.mark.parametrize(
    ("name", "measured"), [("batch of none", "grad_weight"), ("no input channels", "forward")]
)
def test_empty_results_are_not_measured(name, measured, path):
    p = named(name)
    with convext.autotune(cache=path) as tuner:
        for conv_pass in PASSES:
            result, choice = run(p, conv_pass), last(conv_pass)
            assert torch.equal(result, run(p, conv_pass, choice[0]))
            assert (choice in ROWS) == (result.numel() == 0)
    assert all(problem.startswith(measured) for problem in tuner.results)


def test_measures_once(path):
    p = named("plain")
    first = tuned(path, p)
    assert tuned(path, p) == first
    assert len(first[1]) == 1


def test_every_kind_of_call_is_measured(path, restore_threads, restore_isa):
    p = named("plain")
    with convext.autotune(cache=path) as tuner:
        for conv_pass in PASSES:
            run(p, conv_pass)
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            run(p, dtype=dtype)
        run(p, layout="channels_last")
        torch.set_num_threads(2)
        run(p)
        torch.set_num_threads(1)
        _C.set_cpu_isa("scalar")
        run(p)
        for name in ("groups", "dilation", "pointwise strided", "pointwise padded"):
            run(named(name))
    assert len(tuner.results) == 13 - (_C.cpu_isas() == ("scalar",))
    assert all(set(seconds) >= {"direct", "im2col"} for seconds in tuner.results.values())
    assert all(time > 0 for seconds in tuner.results.values() for time in seconds.values())


@pytest.mark.parametrize("conv_pass", PASSES)
@pytest.mark.parametrize("fastest", ["direct", "im2col"])
def test_goes_by_the_times_in_the_file(fastest, conv_pass, path, problem_text):
    p = named("plain")
    times = {name: 1.0 + (name != fastest) for name in convext.algorithms()}
    write(path, {problem_text(p, conv_pass): times})
    before = path.read_bytes()
    assert tuned(path, p, conv_pass)[0] == fastest
    assert path.read_bytes() == before


def test_fused_block_is_tuned(path, problem_text):
    p = named("plain")
    block = convext.ConvBlock2d(p.C, p.O, p.kernel, bias=False)
    x = torch.randn(p.input_size)
    write(path, {problem_text(p): {"direct": 2.0, "im2col": 1.0}})
    with convext.autotune(cache=path):
        result = block(x)
        assert convext.last_algorithm().forward == "im2col"
    block.conv.algorithm = "im2col"
    assert torch.equal(result, block(x))


def test_writes_what_it_measured(path):
    _, results = tuned(path, named("plain"))
    assert read(path) == {this_machine(): results}
    tuned(path, named("groups"))
    assert len(read(path)[this_machine()]) == 2
    assert TuningCache(path).times.table() == read(path)[this_machine()]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_function_writes_at_the_end_of_the_process(path):
    script = (
        "import sys, torch, convext\n"
        "convext.autotune(cache=sys.argv[1])\n"
        "convext.functional.conv2d(torch.ones(1, 1, 5, 4), torch.ones(2, 1, 3, 3))\n"
    )
    subprocess.run([sys.executable, "-c", script, path], check=True)
    (problem,) = read(path)[this_machine()]
    assert "1x1x5x4 by 2x1x3x3" in problem


def test_other_machines_times_count_for_nothing(path, problem_text):
    p = named("plain")
    text = problem_text(p)
    other = {text: {"direct": 0.0, "im2col": 0.0}}
    write(path, {}, other=other)
    _, results = tuned(path, p)
    assert all(time > 0 for time in results[text].values())
    assert read(path) == {this_machine(): results, "other": other}


@pytest.mark.parametrize("times", [{"direct": 1e9}, {"direct": 1e9, "fft": 0.0}, {}])
def test_algorithms_without_a_time_are_measured(times, path, problem_text):
    text = problem_text(named("plain"))
    write(path, {text: times})
    _, results = tuned(path, named("plain"))
    assert set(results[text]) >= set(convext.algorithms()) - {"depthwise", *WINOGRADS}
    assert results[text]["direct"] < 1e9


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"name": "a package"}',
        b'{"convext.autotune": 2, "machines": {}}',
        b'{"convext.autotune": 1}',
        b'{"convext.autotune": 1, "machines": []}',
        b'{"convext.autotune": 1, "machines": {"a": {"b": {"direct": "1"}}}}',
        b'{"convext.autotune": 1, "machines": {"a": {"b": {"direct": NaN}}}}',
    ],
)
def test_foreign_files_are_left_alone(content, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="file is left alone"):
        tuned(path, named("plain"))
    assert path.read_bytes() == content


def test_empty_file_is_filled(tmp_path):
    path = tmp_path / "file"
    path.touch()
    _, results = tuned(path, named("plain"))
    assert read(path) == {this_machine(): results}


def test_files_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "below"):
        with pytest.warns(UserWarning, match="left alone|cannot be written"):
            tuned(path, named("plain"))


def test_writers_keep_each_others_times(path):
    caches = [TuningCache(path) for _ in range(2)]
    for i, cache in enumerate(caches):
        cache.times.add({f"problem {i}": {"direct": 1.0}})
        cache.write()
    assert len(read(path)[this_machine()]) == 2


def test_readers_never_see_half_a_file(path):
    done = threading.Event()

    def writer(number):
        cache = TuningCache(path)
        while not done.is_set():
            cache.times.add({f"problem {number}-{len(cache.times.table())}": {"direct": 1.0}})
            cache.write()

    threads = [threading.Thread(target=writer, args=[i]) for i in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(200):
            assert TuningCache(path)._read() is not None
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_tuning_is_for_the_block_and_the_thread(path, problem_text):
    p = named("plain")
    write(path, {problem_text(p): {"direct": 2.0, "im2col": 1.0}})

    def chosen():
        run(p)
        return last("forward")[0]

    with convext.autotune(cache=path) as tuner:
        assert chosen() == "im2col"
        with convext.autotune(False):
            assert chosen() == "direct"
        assert chosen() == "im2col"
        assert in_thread(chosen) == "direct"
        with pytest.raises(RuntimeError), convext.autotune(cache=path.with_name("other")):
            functional.conv2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 3, 3))
        assert chosen() == "im2col"
    assert chosen() == "direct"
    convext.autotune(cache=path)
    assert chosen() == "im2col"
    assert tuner.results == convext.autotune(cache=path).results
    convext.autotune(False)
    assert chosen() == "direct"


def test_in_memory_is_remembered_by_the_process():
    p = P("", 1, 2, 7, 8, 3, (3, 3), (1, 2))  # no other test's
    with convext.autotune() as tuner:
        run(p)
    results = tuner.results
    with convext.autotune() as again:
        run(p)
    assert again.results == results
    assert in_thread(lambda: convext.autotune().results) == results


def test_threads_measure_each_problem_once(path, monkeypatch):
    p, found = named("plain"), []
    read = TuningCache._read

    def read_slowly(cache):
        time.sleep(0.05)  # while others ask for the same file
        return read(cache)

    monkeypatch.setattr(TuningCache, "_read", read_slowly)

    def work():
        with convext.autotune(cache=path) as tuner:
            run(p)
            found.append((last("forward"), tuner.results))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(result == found[0] for result in found)


def test_winograd_takes_part_where_allowed(path):
    p = P("", 1, 16, 12, 13, 16, (3, 3), (1, 1), (1, 1))
    for allowed in (False, True):
        with convext.allow_winograd(allowed):
            x, weight = torch.randn(p.input_size), torch.randn(p.weight_size)
            with convext.autotune(cache=path) as tuner:
                functional.conv2d(x, weight, padding=1)
        (seconds,) = tuner.results.values()
        assert [name for name in WINOGRADS if name in seconds] == (WINOGRADS if allowed else [])


def test_compiled_code_is_tuned(path, problem_text):
    p = named("plain")
    write(path, {problem_text(p): {"direct": 2.0, "im2col": 1.0}})
    function, _ = compiled(lambda x, weight: functional.conv2d(x, weight))
    data = make_operands(p, torch.float32)
    function(data.input, data.weight)
    assert convext.last_algorithm().forward == "direct"
    with convext.autotune(cache=path):
        function(data.input, data.weight)
        assert convext.last_algorithm().forward == "im2col"


def test_results_print_as_a_table(path, problem_text):
    text = problem_text(named("all settings differ"))
    write(path, {text: {"direct": 2.5e-6, "im2col": 1e-6}})
    assert str(convext.autotune(cache=path).results) == f"{text}  im2col 1.0 us, direct 2.5 us"
    assert text.startswith(
        "forward, 2x2x9x11 by 3x2x3x2, stride 2x3, padding 2x1, dilation 1x2, float32 NCHW, "
        "1 thread, "
    )
