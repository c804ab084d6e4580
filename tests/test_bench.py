"""The benchmark suite: that it measures what it says, and computes right from what it measured.

Nothing here asserts a time.
"""

import json
import math
import subprocess
import sys
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import SMALL
from reference import products

import convext
from convext import _C
from convext.__main__ import main
from convext.bench import epoch, goals, layers, report, suite
from convext.bench import gpu as gpu_bench
from convext.bench.cases import AUTO, CONV_PASSES, STOCK, WINOGRAD, Case
from convext.bench.goals import GOALS, Goal, auto_regret, judge
from convext.bench.machine import COPY_BYTES, Peaks, describe, measure_peaks
from convext.bench.results import ON_GPU, Row, geometric_mean, regret
from convext.bench.suite import DTYPES, FORMATS, GROUPS, Run, Selection
from convext.bench.timing import Effort, sample_in_turn, seconds, speedup, spread
from convext.errors import UserError

ROOT = Path(__file__).resolve().parents[1]

# --------------------------------------------------------------------------------------------------
# What is measured


@pytest.mark.parametrize(
    ("network", "convolutions", "different", "multiplications"),
    [
        # Of the published totals per image, without the classifiers that follow.
        (layers.resnet50, 53, 23, 4_089_184_256 - 2048 * 1000),
        (layers.vgg16, 13, 9, 15_470_264_320 - (25088 + 4096) * 4096 - 4096 * 1000),
        (layers.mobilenet_v2, 52, 30, 300_774_272 - 1280 * 1000),
    ],
)
def test_networks_are_the_published_ones(network, convolutions, different, multiplications):
    problems = network(1)
    assert len(problems) == convolutions
    assert sum(problem.multiplications for problem in problems) == multiplications
    listed = layers.distinct(problems)
    assert len(listed) == different
    assert sum(layer.count for layer in listed) == convolutions


def test_the_lessons_layers_fit_each_other():
    problems = layers.lesson(3)
    for problem, following in pairwise(problems):
        assert following.input_size == problem.output_size
    assert problems[0].input_size == (3, 1, 28, 28)
    assert problems[-1].output_size == (3, 10, 1, 1)


@pytest.mark.parametrize("problem", SMALL, ids=str)
def test_needed_multiplications_are_those_of_the_plain_loop(problem):
    assert problem.needed_multiplications == sum(1 for _ in products(problem))


SMALL_CASES = [
    case
    for group in ("mnist", "mobilenet", "batchnorm", "block", "overhead")
    for case in GROUPS[group](2, True)
    if case.elements <= 2**19 and case.quick
]


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda c: f"{c.group}, {c.layer}, {c.what}")
def test_all_calls_of_a_case_compute_the_same(case, layout):
    calls = case.make(torch.float32, FORMATS[layout])
    assert {STOCK, *case.ours} <= set(calls)
    expected = first(calls.pop(STOCK)(), case.what)
    for name, call in calls.items():
        try:
            result = first(call(), case.what)
        except ValueError:
            assert name in (WINOGRAD, *convext.algorithms())  # which may decline
            continue
        assert result.is_contiguous(memory_format=FORMATS[layout])
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)


def first(result, what):
    """The tensor that a pass is about; of PyTorch's convolution_backward the one that is there."""
    if isinstance(result, torch.Tensor):
        return result.detach()
    return next(tensor for tensor in result if tensor is not None)


@pytest.mark.parametrize("what", ["train", "eval"])
def test_steps_of_ours_and_of_pytorch_have_the_same_loss(what):
    (case,) = (c for c in GROUPS["step"](4, True) if c.what == what)
    calls = case.make(torch.float32, torch.contiguous_format)
    assert set(calls) == {STOCK, "ConvBlock2d", "layers"}
    results = [call() for call in calls.values()]
    if what == "eval":
        torch.testing.assert_close(results[1], results[0])
        torch.testing.assert_close(results[2], results[0])


# --------------------------------------------------------------------------------------------------
# Timing


@pytest.mark.parametrize("sample", [0.0, 1e-4], ids=["once", "repeated"])
def test_calls_are_sampled_in_turn_in_changing_order(sample):
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = sample_in_turn(calls, Effort(rounds=12, sample=sample, seconds=60.0))
    assert {name: len(samples) for name, samples in times.items()} == dict.fromkeys("abc", 12)
    turns = [name for name, _ in groupby(order)][-30:]  # without the warm-up
    assert len(set(pairwise(turns))) == 6  # each came after each


def test_no_round_begins_after_the_time_but_there_are_three():
    times = sample_in_turn({"a": lambda: None}, Effort(rounds=1000, sample=0.0, seconds=0.0))
    assert len(times["a"]) == 3


def test_spread_and_speedup():
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((4 - 2) / 2 / 3)
    assert spread([1.0]) == 0.0
    # A machine that was slow in the second round was so for both.
    assert speedup([2.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == 2.0


# --------------------------------------------------------------------------------------------------
# Figures from samples


def row(torch_times, ours, *, group="mnist", part="batch 64", what="forward", **more):
    """A row of one sample each."""
    return Row(
        group=group,
        part=part,
        layer=more.pop("layer", "a layer"),
        what=what,
        dtype=more.pop("dtype", "float32"),
        threads=more.pop("threads", 1),
        torch={layout: [time] for layout, time in torch_times.items()},
        ours={
            name: {layout: [time] for layout, time in times.items()} for name, times in ours.items()
        },
        **more,
    )


BOTH = {"NCHW": 6.0, "channels_last": 4.0}


def test_ratios_are_against_the_same_layout_the_better_or_a_named_one():
    r = row(BOTH, {AUTO: {"NCHW": 2.0, "channels_last": 1.0}})
    assert r.torch_layout() == "channels_last"
    assert r.layout(AUTO) == "channels_last"
    assert r.ratio(AUTO, "NCHW") == 2.0
    assert r.ratio(AUTO, "NCHW", "same") == 3.0
    assert r.ratio(AUTO, "channels_last", "same") == 4.0
    assert r.ratio(AUTO, "channels_last", "NCHW") == 6.0


def test_rate_and_share_are_of_ours_in_its_better_layout():
    r = row(BOTH, {AUTO: {"NCHW": 2.0, "channels_last": 1.0}}, flops=10, bytes=8, bound=0.25)
    assert r.rate() == (10.0, "FLOP/s")
    assert r.share() == 0.25
    r = row(BOTH, {AUTO: {"NCHW": 2.0}}, bytes=8)
    assert r.rate() == (4.0, "B/s")
    assert r.share() is None
    assert row(BOTH, {AUTO: {"NCHW": 2.0}}).rate() is None


def test_geometric_mean():
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert math.isnan(geometric_mean([]))


def test_regret_is_autos_time_over_the_best():
    ours = {AUTO: {"NCHW": 3.0}, "direct": {"NCHW": 3.3}, "im2col": {"NCHW": 2.0}}
    r = row(BOTH, ours)
    assert regret(r, "NCHW", ["direct", "im2col"]) == 1.5
    assert regret(r, "NCHW", ["direct"]) is None  # no choice
    assert regret(r, "channels_last", ["direct", "im2col"]) is None
    faster_by_noise = row(BOTH, {**ours, AUTO: {"NCHW": 1.9}})
    assert regret(faster_by_noise, "NCHW", ["direct", "im2col"]) == 1.0


def test_regret_leaves_winograd_out_unless_it_is_allowed():
    r = row(
        BOTH,
        {
            AUTO: {"NCHW": 3.0},
            WINOGRAD: {"NCHW": 1.1},
            "direct": {"NCHW": 3.0},
            "im2col": {"NCHW": 4.0},
            "winograd": {"NCHW": 1.0},
        },
    )
    assert auto_regret([r]) == pytest.approx(1.0)
    assert auto_regret([r], allowing_winograd=True) == pytest.approx(1.1)
    assert math.isnan(auto_regret([row(BOTH, {AUTO: {"NCHW": 3.0}})]))


# --------------------------------------------------------------------------------------------------
# Goals


def test_a_goal_is_met_missed_or_not_measured():
    goal = Goal("a goal", "forward", 2.0, ("mnist",), ("batch 64",))
    one = row({"NCHW": 4.0, "channels_last": 8.0}, {AUTO: {"NCHW": 1.0, "channels_last": 2.5}})
    two = row({"NCHW": 4.0, "channels_last": 8.0}, {AUTO: {"NCHW": 4.0, "channels_last": 2.5}})
    others = [
        row(BOTH, one.ours and {AUTO: {"NCHW": 1e9}}, **other)
        for other in ({"part": "batch 1"}, {"what": "grad_input"}, {"dtype": "float64"})
    ]
    (verdict,) = judge([one, two, *others], [goal])
    assert verdict.cases == 2
    assert verdict.figures == pytest.approx({"NCHW": 2.0, "channels_last": 1.6})
    assert verdict.worst == pytest.approx({"NCHW": 1.0, "channels_last": 1.6})
    assert verdict.verdict == "met in NCHW only"
    (verdict,) = judge([one], [Goal("", "forward", 1.6, ("mnist",))])
    assert verdict.verdict == "met"
    (verdict,) = judge([one], [Goal("", "forward", 4.5, ("mnist",))])
    assert verdict.verdict == "missed"
    (verdict,) = judge(others, [goal])
    assert verdict.verdict == "not measured"


def test_a_goal_may_ask_something_of_every_case():
    rows = [row({"NCHW": 4.0}, {AUTO: {"NCHW": 1.0}}), row({"NCHW": 0.9}, {AUTO: {"NCHW": 1.0}})]
    (verdict,) = judge(rows, [Goal("", "forward", 1.05, ("mnist",), each=0.9)])
    assert verdict.verdict == "met"
    (verdict,) = judge(rows, [Goal("", "forward", 1.05, ("mnist",), each=0.95)])
    assert verdict.verdict == "missed"


def test_a_goal_against_one_layout_judges_ours_of_that_layout():
    rows = [row(BOTH, {AUTO: {"NCHW": 1.0, "channels_last": 4.0}})]
    (verdict,) = judge(rows, [Goal("", "forward", 6.0, ("mnist",), against="NCHW")])
    assert verdict.figures == {"NCHW": 6.0}
    assert verdict.verdict == "met"


def test_winograd_counts_where_it_may_and_auto_where_it_cannot():
    goal = Goal("", "forward", 2.0, ("mnist",), name=WINOGRAD)
    rows = [
        row({"NCHW": 8.0}, {AUTO: {"NCHW": 4.0}, WINOGRAD: {"NCHW": 1.0}}),
        row({"NCHW": 8.0}, {AUTO: {"NCHW": 4.0}}),
    ]
    (verdict,) = judge(rows, [goal])
    assert verdict.figures == pytest.approx({"NCHW": 4.0})


def test_more_threads_are_held_to_the_figure_of_one():
    goal = Goal("", "forward", 2.0, ("mnist",))
    one = row({"NCHW": 8.0}, {AUTO: {"NCHW": 2.0}})
    same = row({"NCHW": 3.9}, {AUTO: {"NCHW": 1.0}}, threads=2)
    worse = row({"NCHW": 3.0}, {AUTO: {"NCHW": 1.0}}, threads=2)
    assert [v.verdict for v in judge([one, same], [goal])] == ["met", "met"]
    assert [v.verdict for v in judge([one, worse], [goal])] == ["met", "missed"]
    assert [v.verdict for v in judge([worse], [goal])] == ["met"]  # nothing to compare with
    assert "| as 1 thread | 2 | 1 | NCHW 3.00 (1 thread: 4.00) | missed |" in report.goals(
        judge([one, worse], [goal])
    )


def test_every_goal_has_cases_and_ours_of_its_name():
    everything = [case for group in GROUPS.values() for case in group(None, False)]
    for goal in GOALS:
        if goal.groups == ("epoch",):
            continue
        covered = [
            case
            for case in everything
            if case.group in goal.groups
            and case.what == goal.what
            and (not goal.parts or case.part in goal.parts)
        ]
        assert covered, goal
        for case in covered:
            assert goal.name in case.ours or AUTO in case.ours


@pytest.mark.parametrize("conv_pass", CONV_PASSES)
def test_every_convolution_of_resnet50_and_vgg16_has_one_goal(conv_pass):
    for group in ("resnet50", "vgg16"):
        for case in GROUPS[group](None, False):
            found = [
                goal
                for goal in GOALS
                if group in goal.groups and case.part in goal.parts and goal.what == case.what
            ]
            assert len(found) == 1, case


# --------------------------------------------------------------------------------------------------
# Peaks


def test_bound_is_the_later_of_arithmetic_and_copy():
    peaks = Peaks(flops=100.0, copies={10: 50.0, 1000: 20.0})
    assert peaks.bandwidth(3) == peaks.bandwidth(10) == 50.0
    assert peaks.bandwidth(11) == peaks.bandwidth(10**6) == 20.0
    assert peaks.bound(1000, 10) == 10.0
    assert peaks.bound(10, 1000) == 50.0


@pytest.mark.parametrize("double_precision", [False, True])
def test_fma_loop_counts_what_it_does(isa, double_precision):
    one = _C.fma_loop(double_precision, 1, 1)
    lanes = one // 2 // 12  # 12 chains, two operations each
    assert lanes * 24 == one
    assert _C.fma_loop(double_precision, 5, 3) == 15 * one
    assert lanes == {"scalar": 4, "avx2": 8, "avx512": 16}[isa] // (
        2 if double_precision and isa != "scalar" else 1
    )


@pytest.mark.parametrize("tasks", [1, 3, 1000])
def test_copy_loop_copies_every_byte(tasks):
    source = np.arange(997, dtype=np.uint16)
    target = np.zeros_like(source)
    _C.copy_loop(source, target, 2, tasks)
    np.testing.assert_array_equal(target, source)


def test_copy_loop_refuses_what_it_cannot_copy():
    whole, part = np.zeros(8, np.uint8), np.zeros(4, np.uint8)
    read_only = np.zeros(8, np.uint8)
    read_only.flags.writeable = False
    for source, target, tasks in ((whole, part, 1), (whole[::2], part, 1), (whole, whole, 0)):
        with pytest.raises(ValueError, match="copy_loop: expected"):
            _C.copy_loop(source, target, 1, tasks)
    with pytest.raises((ValueError, BufferError)):
        _C.copy_loop(whole, read_only, 1, 1)


def test_measured_peaks_have_every_size(restore_threads):
    torch.set_num_threads(1)
    peaks = measure_peaks(torch.float32, 2)
    assert tuple(peaks.copies) == COPY_BYTES
    assert min(peaks.flops, *peaks.copies.values()) > 0
    assert torch.get_num_threads() == 1


def test_the_machine_is_described():
    machine = describe()
    assert machine["cpu"]
    assert machine["isa"] == _C.cpu_isa()
    assert machine["torch"] == torch.__version__
    assert machine["usable_cores"] >= 1


# --------------------------------------------------------------------------------------------------
# The command


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["bench", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for option in (
        *("--groups", "--passes", "--layouts", "--dtypes", "--threads", "--algorithms", "--match"),
        *("--batch", "--rounds", "--quick", "--regret", "--report"),
    ):
        assert f"  {option} " in out
    for group in suite.GROUPS:
        assert group in out


TINY = ("bench", "--groups", "mnist", "--match", "64 to 10", "--batch", "1", "--rounds", "3")


def test_report_has_what_it_promises(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "new" / "report"
    assert main([*TINY, "--regret", "--threads", "1", "2", "--report", str(folder)]) == 0
    out = capsys.readouterr().out
    assert out.count("| 3x3 s2, 64 to 10 at 2x2 | grad_weight | ") == 2
    assert "### mnist, batch 1, float32, 2 threads" in out

    content = json.loads((folder / "report.json").read_text())
    assert {"command", "created", "machine", "peaks", "goals", "regret", "left_out", "rows"} <= set(
        content
    )
    assert content["command"].startswith("convext bench --groups mnist --match '64 to 10'")
    assert [(p["dtype"], p["threads"]) for p in content["peaks"]] == [
        ("float32", 1),
        ("float32", 2),
    ]
    assert content["regret"]["auto"] >= 1.0
    found = {(r["what"], r["threads"]) for r in content["rows"]}
    assert found == {(what, threads) for what in CONV_PASSES for threads in (1, 2)}
    for entry in content["rows"]:
        assert set(entry["ours"]) == {AUTO, *convext.algorithms()} - set(entry["declined"])
        for layout in FORMATS:
            assert len(entry["torch"][layout]["samples"]) == 3
            ours = entry["ours"][AUTO][layout]
            assert set(ours) == {
                *("median", "spread", "samples", "ratio_same_layout", "ratio_better_layout")
            }
            assert entry["chosen"][layout] in convext.algorithms()
        assert entry["flops"] == 2 * 64 * 10 * 4  # of 3x3 taps at 2x2, padded, four meet the input
        assert entry["bytes"] == 4 * (64 * 4 + 64 * 10 * 9 + 10)
        assert entry["share_of_peak"] > 0

    text = (folder / "report.md").read_text()
    assert out.splitlines()[-1].startswith(f"{folder}: report.md, report.json")
    for title in ("## Goals", "## Means", "## Times", "## Auto's choices"):
        assert f"\n{title}\n" in text
    for goal in {goal.title for goal in GOALS}:
        assert f"| {goal}" in text
    assert "not measured" in text
    images = {path.name for path in folder.glob("*.png")}
    assert images == {
        *("roofline-float32-1.png", "roofline-float32-2.png"),
        *("ratios-mnist-batch1-float32-1thread.png", "ratios-mnist-batch1-float32-2threads.png"),
    }


def test_regret_leaves_alone_what_has_no_algorithms(capsys):
    args = ["--groups", "overhead", "batchnorm", "step", "--match", "x 2 x 2", "--quick"]
    assert main(["bench", *args, "--rounds", "3", "--regret"]) == 0
    assert main(["bench", "--groups", "overhead", "--rounds", "3", "--regret"]) == 0
    assert capsys.readouterr().out.count("Regret of auto: not measured") == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_runs(capsys, dtype):
    assert main([*TINY, "--dtypes", dtype, "--layouts", "NCHW", "--passes", "forward"]) == 0
    assert f"### mnist, batch 1, {dtype}, 1 thread" in capsys.readouterr().out


def test_threads_are_as_before(restore_threads):
    torch.set_num_threads(1)
    assert main([*TINY, "--threads", "2", "--passes", "forward"]) == 0
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--groups", "imagenet"], "--groups: no 'imagenet'; expected all, or some of mnist, "),
        (["--passes", "sideways"], "--passes: no 'sideways'; expected all, or some of forward, "),
        (["--layouts", "nchw"], "--layouts: no 'nchw'; expected all, or some of NCHW, "),
        (["--dtypes", "int8"], "--dtypes: no 'int8'; expected all, or some of float32, "),
        (["--algorithms", "magic"], "--algorithms: no 'magic'; expected all, or some of "),
        (["--threads", "0"], "--threads must be from 1 to "),
        (["--threads", "two"], "--threads: invalid int value: 'two'"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--match", "9x9"], "nothing to measure"),
        (["--groups", "step", "--passes", "grad_input"], "nothing to measure"),
        (["--report", "/dev/null/report"], "--report: /dev/null/report: "),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, args, message):
    try:
        status = main(["bench", *args])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert message in err
    assert err.startswith("convext bench: ")
    assert err.count("\n") == 1


def test_a_report_without_matplotlib_is_refused_before_anything_is_measured(tmp_path):
    code = (
        "import sys; sys.modules['matplotlib'] = None  # as if it were not installed\n"
        "from convext.__main__ import main\n"
        f"sys.exit(main(['bench', '--report', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "convext bench: needs matplotlib: pip install 'convext[plot]'\n"


def test_ctrl_c_keeps_what_was_measured(capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    measure, rows = Run._row, []

    def interrupted(self, *arguments):
        if rows:
            raise KeyboardInterrupt
        rows.append(measure(self, *arguments))
        return rows[0]

    monkeypatch.setattr(Run, "_row", interrupted)
    assert main([*TINY, "--report", str(tmp_path)]) == 130
    assert "Interrupted after 1 rows" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "report.json").read_text())["rows"]) == 1


def test_quick_has_every_group_and_part():
    usual, quick = (Selection(quick=quick).checked().cases() for quick in (False, True))
    assert {case.group for case in quick} == set(GROUPS)
    assert {(case.group, case.part) for case in quick if case.group != "block"} == {
        (case.group, case.part) for case in usual if case.group != "block"
    }
    assert len(quick) < 0.6 * len(usual)


def test_quick_leaves_out_what_it_has_no_time_for(capsys, monkeypatch):
    monkeypatch.setattr(suite, "QUICK_SECONDS", 0.0)
    assert main([*TINY, "--quick"]) == 0
    assert "3 cases were left out, for --quick was out of time." in capsys.readouterr().out


def test_names_keep_the_order_of_the_known_and_all_is_all():
    assert Selection(layouts=["channels_last", "NCHW"]).checked().layouts == (
        "NCHW",
        "channels_last",
    )
    assert Selection(algorithms=["all"]).checked().algorithms == convext.algorithms()
    assert Selection(groups=["all"]).checked().groups == (*GROUPS, "epoch")
    assert Selection().checked().groups == tuple(GROUPS)
    with pytest.raises(UserError, match="no 'fast'"):
        Selection(algorithms=["fast"]).checked()


def test_an_algorithm_that_declines_is_shown_as_such():
    r = row(BOTH, {AUTO: {"NCHW": 2.0, "channels_last": 1.0}}, declined={"winograd": "stride"})
    table = report.Table([AUTO, "winograd"], ["NCHW", "channels_last"])
    cells = table.line(r).split(" | ")
    assert cells[4:8] == [
        "2,000,000 ±0% (2.00, 3.00)",
        "1,000,000 ±0% (4.00)",
        "can't",
        "can't",
    ]
    assert len(table.header().split("\n")[0].split(" | ")) == len(cells)


def test_an_algorithm_that_declines_is_left_out_of_the_timing():
    def decline():
        raise ValueError("no such stride")

    def fail():
        raise RuntimeError("a mistake")

    def case(**calls):
        made = dict.fromkeys((STOCK, AUTO, WINOGRAD, *convext.algorithms()), list) | calls
        return Case("", "", "a layer", "forward", lambda dtype, layout: made, chooses=True)

    run = Run(Selection(algorithms=["all"], effort=Effort(rounds=3, sample=0.0)).checked())
    run.peaks["float32", 1] = Peaks(flops=1.0, copies={1: 1.0})
    measured = run._row(case(im2col=decline), "float32", 1)
    assert measured.declined == {"im2col": "no such stride"}
    assert {AUTO, "direct"} <= set(measured.ours)
    assert "im2col" not in measured.ours
    with pytest.raises(RuntimeError, match="a mistake"):
        run._row(case(direct=fail), "float32", 1)
    with pytest.raises(ValueError, match="no such stride"):  # for auto has no right to decline
        run._row(case(auto=decline), "float32", 1)


def test_noise_is_told():
    quiet = row(BOTH, {AUTO: {"NCHW": 2.0}})
    noisy = row(BOTH, {AUTO: {"NCHW": 2.0}})
    noisy.ours[AUTO]["NCHW"] = [1.0, 2.0, 3.0]
    assert report.noise_text([quiet, quiet]) == ""
    assert report.noise_text([quiet, noisy]).startswith("In 1 of 2 lines some times spread by")
    assert report.noise_text([quiet] * 9 + [noisy]) == ""


def test_whole_networks_count_every_layer_as_often_as_they_have_it():
    one = row({"NCHW": 3.0}, {AUTO: {"NCHW": 1.0}}, group="vgg16", flops=1, count=3)
    two = row({"NCHW": 1.0}, {AUTO: {"NCHW": 2.0}, WINOGRAD: {"NCHW": 0.5}}, group="vgg16", flops=1)
    lines = report.networks([one, two]).splitlines()
    assert lines[2] == "| vgg16 | forward | float32 | 1 | 1e+04 | 5e+03 | 2.00 |"
    assert lines[3].startswith("| vgg16, Winograd allowed | forward | float32 | 1 | ")
    assert lines[3].endswith(" 2.86 |")


def test_goals_are_those_of_the_table():
    """Thresholds stand in one place; here is that they are read as meant."""
    found = {(g.title, g.what, g.against): (g.at_least, g.each) for g in goals.GOALS}
    assert found["resnet50/vgg16 otherwise", "forward", "better"] == (1.05, 0.95)
    assert found["batch norm", "backward", "channels_last"] == (1.5, 0.0)


# --------------------------------------------------------------------------------------------------
# On a GPU


def test_a_gpus_rows(monkeypatch):
    """Measured on the CPU as they would be on a GPU, but for the clock and the peaks."""
    monkeypatch.setattr(gpu_bench, "Clock", lambda: seconds)
    monkeypatch.setattr(gpu_bench, "set_precision", lambda dtype: None)
    monkeypatch.setattr(gpu_bench, "measure_peaks", lambda dtype: Peaks(1e12, {1: 1e12}))
    seen = []
    stock = gpu_bench.deterministic(lambda: seen.append(torch.backends.cudnn.deterministic))
    stock()
    assert seen == [True]
    assert not torch.backends.cudnn.deterministic
    chosen = Selection(groups=["mnist"], passes=["forward"], match="64 to 10", batch=2, quick=True)
    chosen = replace(
        chosen.checked(), threads=(ON_GPU,), dtypes=("tf32",), effort=Effort(rounds=3, sample=0.0)
    )
    run = Run(chosen)
    (measured,) = run
    assert (measured.dtype, measured.threads) == ("tf32", ON_GPU)
    assert list(measured.ours) == [AUTO, suite.DETERMINISTIC]
    assert measured.bytes == 4 * sum(
        torch.Size(size).numel() for size in ((2, 64, 2, 2), (10, 64, 3, 3), (2, 10, 1, 1))
    )
    machine = describe() | {"gpu": "a GPU", "multiprocessors": 132, "l2_bytes": 2**25}
    machine |= {"driver": "1.2", "cuda": "13.0", "cudnn": 91900}
    text = report.markdown("bench", machine, run.peaks, [measured])
    assert "- a GPU, 132 multiprocessors, L2 32 MiB, driver 1.2, CUDA 13.0, cuDNN 91900" in text
    assert "### mnist, batch 2, tf32, GPU" in text
    assert "| torch, deterministic NCHW |" in text
    assert "## Goals" not in text
    assert json.dumps(report.as_json("bench", "now", machine, run.peaks, [measured]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_there_is_no_such_device(capsys):
    assert main(["bench", "--device", "cuda"]) == 2
    assert "--device cuda: torch finds no GPU" in capsys.readouterr().err


def test_measures_on_a_gpu(gpu, capsys):
    arguments = ["--groups", "mnist", "batchnorm", "step", "--batch", "2", "--rounds", "3"]
    assert main(["bench", "--device", gpu, "--dtypes", "tf32", "bfloat16", *arguments]) == 0
    assert "torch, deterministic" in capsys.readouterr().out


def test_an_epoch_is_timed_without_what_watches_it(monkeypatch):
    asked = []

    def run(command, **_):
        asked.append(command)
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir()
        (folder / "metrics.json").write_text('{"train_seconds": 2.5}')
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(epoch.subprocess, "run", run)
    row = epoch.measure_epoch(threads=1, rounds=2)
    assert [times for layout in row.torch.values() for times in layout] == [2.5, 2.5]
    assert len(asked) == 4
    for command in asked:
        assert "--no-report" in command
        assert command[command.index("--stats") + 1] == "off"
