"""The experiments: their numbers against numbers worked out here, and that each of them runs.

Runs are on a hundred digits, where a variant takes a tenth of a second.
"""

import dataclasses
import io
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("lightning.pytorch", reason="training needs the extra convext[train]")
pytest.importorskip("sklearn", reason="digits need the extra convext[digits]")

import convext
from convext.__main__ import main
from convext.lab.activation_stats import LayerStats
from convext.lab.experiment import Experiment, Results, run_experiment
from convext.lab.experiment_table import markdown
from convext.lab.experiments import EXPERIMENTS
from convext.lab.gradient_noise import GradientNoise, gradient_noise
from convext.lab.networks import NORMS, Network
from convext.lab.trial import Run, Variant, _ScheduledLearner, refusal, run_variant
from convext.mnist.data import Split, load_digits
from convext.mnist.model import lesson_cnn

NAMES = [
    *("norms", "order", "batch-size", "learning-rate", "first-kernel", "width"),
    *("algorithms", "layers"),
]


@pytest.fixture(scope="module")
def tiny():
    digits = load_digits()
    return dataclasses.replace(
        digits,
        train=Split(digits.train.images[:96], digits.train.labels[:96]),
        valid=Split(digits.valid.images[:40], digits.valid.labels[:40]),
    )


def made(figures, **settings):
    """Results of runs with these figures: {label: [figures of seed 0, of seed 1, ...]}."""
    runs = [
        Run(label, seed, each, history=(), losses=(2.0, 1.0))
        for label, seeds in figures.items()
        for seed, each in enumerate(seeds)
    ]
    defaults = {"data": "digits", "train_images": 96, "valid_images": 40, "epochs": 1, "seeds": 2}
    sizes = dict.fromkeys(figures, 64)
    settings = {**defaults, "threads": 1, "batch_sizes": sizes, **settings}
    return Results(EXPERIMENTS["order"], settings, tuple(figures), tuple(runs), refused={})


def accuracies(**values):
    return made({label: [{"accuracy": a} for a in each] for label, each in values.items()})


def without_times(run):
    figures = {k: v for k, v in run.figures.items() if not k.endswith("_seconds")}
    return run.variant, run.seed, figures, run.losses


# ---- the figures ----


def test_mean_and_spread_are_those_of_the_seeds():
    results = accuracies(a=[0.5, 0.7, 0.9], b=[0.25, 0.25, 0.25])
    assert results.mean("a", "accuracy") == pytest.approx(0.7)
    assert results.spread("a", "accuracy") == pytest.approx(0.2)  # sqrt((0.04 + 0 + 0.04) / 2)
    assert results.spread("b", "accuracy") == 0
    assert results.cell("a", "accuracy") == "70.00 ± 20.00 %"
    assert results.cell("b", "accuracy") == "25.00 %"


def test_one_seed_has_no_spread():
    results = accuracies(a=[0.5], b=[0.75])
    assert math.isnan(results.spread("a", "accuracy"))
    assert results.cell("a", "accuracy") == "50.00 %"
    assert not results.compare("a", "b").clear
    assert "one seed says little" in results.sentence("a", "b")


def test_a_difference_is_clear_beyond_three_standard_errors():
    # Spreads 0.01 and 0.02, three seeds: the error is sqrt(0.0001 / 3 + 0.0004 / 3) = 0.01291.
    near = accuracies(a=[0.50, 0.51, 0.52], b=[0.52, 0.54, 0.56])
    found = near.compare("a", "b")
    assert found.difference == pytest.approx(0.03)
    assert found.error == pytest.approx(0.0129099, rel=1e-4)
    assert not found.clear
    assert near.sentence("a", "b") == (
        "b against a: +3.00 ± 1.29 points of accuracy, which 3 seeds cannot tell from chance."
    )
    far = accuracies(a=[0.50, 0.51, 0.52], b=[0.53, 0.55, 0.57])
    assert far.compare("a", "b").clear
    assert far.sentence("b", "a") == "a against b: -4.00 ± 1.29 points of accuracy."


def test_time_ratio_is_seed_by_seed():
    results = made(
        {
            "a": [{"cpu_seconds": 2.0}, {"cpu_seconds": 8.0}],
            "b": [{"cpu_seconds": s} for s in (3, 4)],
        }
    )
    assert results.values("a", "time_ratio").tolist() == [1, 1]
    assert results.values("b", "time_ratio").tolist() == [1.5, 0.5]


def test_rich_shows_the_same_table():
    rich = pytest.importorskip("rich.console", reason="tables in colour need rich")
    results = made({"a": [{"accuracy": 0.5, "valid_loss": 0.25, "cpu_seconds": 1.0}]})
    console = rich.Console(width=200, record=True, file=io.StringIO())
    console.print(results)
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["variant", "accuracy", "valid", "loss", "CPU", "time", "ratio"] in lines
    assert ["a", "50.00", "%", "0.2500", "1.00"] in lines


def test_what_is_not_finite_is_said():
    results = made({"a": [{"valid_loss": math.nan, "noise_scale": math.nan}]})
    assert results.cell("a", "valid_loss") == "not finite"
    assert results.cell("a", "noise_scale") == "hidden by noise"


def test_an_unknown_label_is_named():
    with pytest.raises(ValueError, match="label must be one of a, b, got 'c'"):
        accuracies(a=[0.5], b=[0.5]).of("c")


def test_json_gives_back_what_was_written(tmp_path):
    stats = LayerStats(
        batches=np.array([0, 2]),
        mean=np.array([0.5, math.nan]),
        std=np.array([1.0, 2.0]),
        near_zero=np.array([0.25, 0.75]),
        histograms=np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
        edges=np.array([0.0, 1.0, 2.0, 3.0]),
        sampled=np.array([8.0, 15.0]),
    )
    results = accuracies(a=[0.5, 0.75], b=[0.25, 1.0])
    first = dataclasses.replace(
        results.runs[0],
        activations=stats,
        losses=(2.5, math.inf),
        history=({"epoch": 1, "accuracy": 0.5},),
    )
    results = dataclasses.replace(
        results, runs=(first, *results.runs[1:]), refused={"c": "cannot"}, labels=("a", "b", "c")
    )
    results.save(tmp_path / "order.json")
    plain = json.loads((tmp_path / "order.json").read_text())
    assert plain["summary"]["a"]["accuracy"] == {"mean": 0.625, "spread": pytest.approx(0.1767767)}
    assert plain["runs"][0]["losses"] == [2.5, None]

    loaded = Results.load(tmp_path / "order.json")
    assert plain["claim"] == results.experiment.claim
    for name in ("experiment", "settings", "labels", "refused"):
        assert getattr(loaded, name) == getattr(results, name)
    assert loaded.runs[1:] == results.runs[1:]
    assert loaded.runs[0].history == first.history
    assert loaded.runs[0].losses[0] == 2.5
    assert math.isnan(loaded.runs[0].losses[1])
    for name, value in vars(stats).items():
        np.testing.assert_array_equal(getattr(loaded.runs[0].activations, name), value)
    assert loaded.trained == ("a", "b")
    assert loaded.seeds == (0, 1)


# ---- the networks ----


@pytest.mark.parametrize("layers", ["convext", "torch"])
def test_as_it_stands_the_plan_is_the_lessons_network(layers):
    torch.manual_seed(5)
    lesson = lesson_cnn(layers)
    torch.manual_seed(5)
    planned = Network(layers=layers).build()
    assert [(n, type(m)) for n, m in planned.named_children()] == [
        (n, type(m)) for n, m in lesson.named_children()
    ]
    assert list(planned.state_dict()) == list(lesson.state_dict())
    for name, value in lesson.state_dict().items():
        assert torch.equal(planned.state_dict()[name], value), name
    images = torch.rand(3, 1, 28, 28)
    assert torch.equal(planned(images), lesson(images))


def test_a_plan_is_carried_out():
    network = Network(
        algorithm="direct",
        first_kernel=3,
        widths=(4, 12),
        norm="group",
        after=("norm", "relu"),
        last=("relu",),
        classes=3,
    )
    model = network.build()
    assert [name for name, _ in model.named_children()] == [
        *("conv1", "norm1", "relu1", "conv2", "norm2", "relu2", "conv3", "relu3", "flatten"),
    ]
    shapes = [tuple(m.weight.shape) for m in model if isinstance(m, convext.Conv2d)]
    assert shapes == [(4, 1, 3, 3), (12, 4, 3, 3), (3, 12, 3, 3)]
    assert {m.algorithm for m in model if isinstance(m, convext.Conv2d)} == {"direct"}
    assert model.norm2.num_groups == 4
    assert Network(norm="layer").build().norm3.num_groups == 1
    assert isinstance(Network(norm="instance").build().norm1, nn.InstanceNorm2d)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "jax"}, "'jax'"),
        ({"algorithm": "fft"}, "'fft'"),
        ({"layers": "torch", "algorithm": "direct"}, "needs layers='convext'"),
        ({"first_kernel": 4}, "first_kernel must be odd and above 0, got 4"),
        ({"norm": "spectral"}, "norm must be one of batch, .*, got 'spectral'"),
        ({"after": ("gelu",)}, r"after must be of 'relu' and 'norm', got \('gelu',\)"),
        ({"last": ("gelu",)}, "last must be of"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Network(**options)


def test_channel_norm_is_instance_norm_and_a_constant_of_1x1():
    maps = torch.randn(5, 6, 4, 3) * 3 + 1
    channel, instance = NORMS["channel"](6), NORMS["instance"](6)
    torch.testing.assert_close(channel(maps), instance(maps))
    ones = torch.randn(5, 6, 1, 1)
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        instance(ones)
    with torch.no_grad():
        channel.bias.copy_(torch.arange(6.0))
        expected = channel.bias.reshape(1, 6, 1, 1).expand(5, 6, 1, 1)
        torch.testing.assert_close(channel(ones), expected, atol=1e-3, rtol=0)


# ---- schedules ----


def schedule_of(schedule, steps=40):
    variant = Variant(Network(layers="torch"), 64, 0.02, schedule=schedule)
    configured = _ScheduledLearner(variant, total_steps=steps).configure_optimizers()
    optimizer = configured["optimizer"]
    rates, momenta = [], []
    for step in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[1]["betas"][0])
        optimizer.step()
        if "lr_scheduler" in configured and step < steps - 1:
            configured["lr_scheduler"]["scheduler"].step()
    return rates, momenta


def test_schedules():
    rates, momenta = schedule_of("1cycle")
    assert max(rates) == pytest.approx(0.02, rel=1e-2)
    assert min(momenta) == pytest.approx(0.85, abs=1e-3)
    fixed_rates, fixed_momenta = schedule_of("1cycle, constant momentum")
    assert fixed_rates == rates
    assert set(fixed_momenta) == {0.9}
    constant_rates, constant_momenta = schedule_of("constant")
    assert set(constant_rates) == {0.02}
    assert set(constant_momenta) == {0.9}
    with pytest.raises(ValueError, match=r"schedule must be one of .*, got 'step'"):
        Variant(Network(), 64, 0.02, schedule="step")


# ---- gradient noise ----


def test_gradient_noise_is_that_of_each_images_gradient():
    """With batches of one image tr(Sigma) is the trace of torch's covariance of gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    images, labels = torch.randn(20, 1, 4, 3).double(), torch.randint(3, (20,))
    parameters = dict(model.named_parameters())

    def loss(parameters, image, label):
        scores = torch.func.functional_call(model, parameters, image[None])
        return nn.functional.cross_entropy(scores, label[None])

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, images, labels)
    flat = torch.cat([gradient.flatten(1) for gradient in each.values()], dim=1)
    trace = float(torch.cov(flat.T).trace().detach())
    squared = float(flat.detach().mean(0).square().sum()) - trace / 20

    found = gradient_noise(model, images, labels, small=1)
    assert found.trace == pytest.approx(trace, rel=1e-9)
    assert found.squared == pytest.approx(squared, rel=1e-9)
    assert found.scale == pytest.approx(trace / squared, rel=1e-9)


def test_gradient_noise_leaves_the_model_alone():
    torch.manual_seed(0)
    model = lesson_cnn().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradient_noise(model, torch.rand(32, 1, 28, 28), torch.randint(10, (32,)), small=8)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_gradient_noise_needs_two_batches():
    with pytest.raises(ValueError, match="two batches of 8 or more, got 15"):
        gradient_noise(lesson_cnn(), torch.rand(15, 1, 28, 28), torch.zeros(15).long(), small=8)


def test_a_gradient_that_noise_hides_has_no_scale():
    assert math.isnan(GradientNoise(squared=-0.1, trace=1.0).scale)
    assert GradientNoise(squared=0.5, trace=10.0).scale == 20


# ---- runs ----


def two_variants(batch_size, lr):
    return {
        "bad": Variant(Network(algorithm="depthwise"), batch_size, lr, may_refuse=True),
        "one": Variant(Network(), batch_size, lr),
        "two": Variant(Network(layers="torch"), batch_size // 2, lr),
    }


TWO = Experiment("two", "?", "!", two_variants, measured=lambda results: "")


def test_variants_are_trained_in_turn_and_refusals_are_results(tiny):
    told = []
    threads, generator = torch.get_num_threads(), torch.get_rng_state()
    results = run_experiment(TWO, tiny, seeds=2, epochs=2, train_images=70, told=told.append)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), generator)
    assert [(run.seed, run.variant) for run in told] == [
        *((0, "one"), (0, "two"), (1, "one"), (1, "two")),
    ]
    assert list(results.runs) == told
    assert list(results.refused) == ["bad"]
    assert '"depthwise" cannot do this problem' in results.refused["bad"]
    assert results.trained == ("one", "two")
    assert results.settings["train_images"] == 70
    # 70 images make one batch of 64, or two of 32, in each of two epochs.
    assert results.values("one", "updates").tolist() == [2, 2]
    assert results.values("two", "updates").tolist() == [4, 4]
    for run in told:
        assert run.figures["accuracy"] == run.history[-1]["accuracy"]
        assert len(run.history) == 2
        assert len(run.losses) == run.figures["updates"]
        assert run.figures["parameters"] == 30_522
        assert run.figures["cpu_seconds"] > 0


def test_same_seed_same_bits(tiny):
    first, second = (run_experiment(TWO, tiny, seeds=2, epochs=1).runs for _ in range(2))
    assert [without_times(run) for run in first] == [without_times(run) for run in second]
    assert first[0].losses != first[2].losses  # of the other seed


def test_near_zero_is_of_the_deepest_activation_at_the_end(tiny):
    variant = Variant(Network(after=("relu",)), 8, 0.01)
    run = run_variant("plain", variant, tiny, epochs=2, seed=0, histograms=True)
    assert run.figures["updates"] == 24
    stats = run.activations
    assert len(stats.batches) == 24
    assert run.figures["near_zero"] == pytest.approx(stats.near_zero[-2:].mean())
    # relu4 puts out 64 maps of 2x2 for each of 8 images.
    assert stats.histograms.sum(1).max() <= 8 * 64 * 4


def test_histograms_are_kept_of_the_worst_run(tiny):
    experiment = dataclasses.replace(TWO, metrics=("near_zero",), panels=("color_dim",))
    results = run_experiment(experiment, tiny, seeds=3, epochs=1)
    for label in results.trained:
        kept = [run.seed for run in results.of(label) if run.activations is not None]
        assert kept == [int(results.values(label, "accuracy").argmin())]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"threads": -1}, "threads must be at least 1, got -1"),
        ({"train_images": 97}, "train_images must be from 2 to 96, got 97"),
    ],
)
def test_numbers_out_of_range(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        run_experiment(TWO, tiny, **options)


# ---- the experiments ----


def test_all_experiments_are_there():
    assert list(EXPERIMENTS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_experiment_runs(tiny, name):
    pytest.importorskip("matplotlib", reason="plots need the extra convext[plot]")
    experiment = EXPERIMENTS[name]
    results = run_experiment(experiment, tiny, seeds=1, epochs=1)
    variants = experiment.variants(64, 0.06)
    assert results.labels == tuple(variants)
    assert len({json.dumps(dataclasses.asdict(v)) for v in variants.values()}) == len(variants)
    assert all(variants[label].may_refuse for label in results.refused)
    assert len(results.trained) >= 2
    shown, page = str(results), markdown(results, "picture.png")
    for text in (shown, page):
        assert experiment.claim.split()[0] in text
        assert "Measured: " in text
        assert all(label in text for label in results.labels)
    figure = results.plot()
    drawn = [axes for axes in figure.axes if axes.has_data()]
    if experiment.panels == ("color_dim",):
        assert len(drawn) >= len(results.trained)
    else:
        assert len(drawn) == len(experiment.panels)


def test_instance_norm_of_1x1_is_refused_and_blind(tiny):
    variants = EXPERIMENTS["norms"].variants(64, 0.06)
    message = refusal(variants["instance + last layer"], tiny)
    assert "more than 1 spatial element" in message
    assert refusal(variants["instance + last layer unchecked"], tiny) is None
    images = tiny.train.images[:8]
    with torch.no_grad():
        blind = variants["instance + last layer unchecked"].network.build()(images)
        seeing = variants["instance"].network.build()(images)
    assert (blind - blind[0]).abs().max() < 1e-3  # the same scores for every image
    assert (seeing - seeing[0]).abs().max() > 1e-2


def test_algorithms_have_equal_accuracy():
    digits = load_digits()
    results = run_experiment(EXPERIMENTS["algorithms"], digits, seeds=1, epochs=2)
    assert {"auto", "direct", "im2col"} <= set(results.trained)
    assert set(results.labels) == {"auto", *convext.algorithms()}
    for label in results.trained:
        ours, auto = results.of(label), results.of("auto")
        for one, other in zip(ours, auto, strict=True):
            assert one.losses[0] == pytest.approx(other.losses[0], rel=1e-5)
            # Rounding sets the runs apart by a few of 359 images.
            assert one.figures["accuracy"] == pytest.approx(other.figures["accuracy"], abs=0.02)


# ---- the command ----


def test_list(capsys):
    assert main(["lab", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES


def test_the_command_writes_and_prints(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="plots need the extra convext[plot]")
    folder = tmp_path / "lab"
    options = ["--data", "digits", "--seeds", "2", "--epochs", "1", "--train-images", "64"]
    assert main(["lab", "layers", *options, "--out", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == {"layers.json", "layers.png", "layers.md"}
    said = capsys.readouterr()
    results = Results.load(folder / "layers.json")
    assert results.seeds == (0, 1)
    assert results.settings["train_images"] == 64
    assert results.cell("torch", "accuracy") in said.out
    assert "The lesson says: " in said.out
    assert "Measured: torch" not in said.out  # it is about convext against torch
    assert str(folder / "layers.png") in said.out
    assert len(said.err.splitlines()) == 4  # a line for each run
    page = (folder / "layers.md").read_text()
    assert "    convext lab layers --data digits --seeds 2 --epochs 1 --train-images 64" in page
    assert page.startswith("## layers: ")
    assert "](layers.png)" in page
    assert (folder / "layers.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "NAME must be one of norms, order, "),
        (["fly"], "got fly"),
        (["layers", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["layers", "--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["layers", "--threads", "0"], "--threads must be at least 1, got 0"),
        (
            ["layers", "--data", "digits", "--train-images", "1"],
            "--train-images must be from 2 to 1438, got 1",
        ),
        (["layers", "--data-dir", "/nowhere"], "/nowhere: no such folder"),
        (["layers", "--out", "/dev/null/lab"], "--out: /dev/null/lab: "),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    assert main(["lab", *args]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("convext lab: ")
    assert message in line
