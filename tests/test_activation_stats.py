"""ActivationStats: the numbers against NumPy, torch.histc and fastai; what is kept, and shown."""

import copy
import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

import convext
from convext.lab import activation_row
from convext.lab.activation_stats import ActivationStats
from convext.mnist.model import lesson_cnn

LAYERS = ("convext", "torch")


class Said(nn.Module):
    """Puts out what it is told to, and calls its layers in batches of its choosing."""

    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *calls):
        for name, input in calls:
            getattr(self, name)(input)


def same(count):
    """A model of identities, which let a test say what a layer puts out."""
    return Said(**{f"same{number}": nn.Identity() for number in range(count)})


def stats_of(output, **options):
    """The statistics of one output."""
    model = same(1)
    with ActivationStats(model, ["same0"], **{"sample": None, **options}) as stats:
        model(("same0", output))
    return stats.layer("same0")


def outputs_of(model, names, run):
    """What the layers put out in training while `run` runs, by hooks of the test's own."""
    kept = {name: [] for name in names}

    def keep(name, output):
        if model.training:
            kept[name].append(output.detach().clone())

    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, _, output, name=name: keep(name, output)
        )
        for name in names
    ]
    run()
    for handle in handles:
        handle.remove()
    return kept


# ---- the numbers ----


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
def test_every_batchs_numbers_are_numpys(layers, layout):
    model = lesson_cnn(layers).to(memory_format=getattr(torch, layout))
    names = ("relu1", "conv2", "norm4", "conv5")
    stats = ActivationStats(model, names, sample=None, near_zero=0.1, range=(-1, 2), bins=9)

    def run():
        for _ in range(3):
            images = torch.rand(7, 1, 28, 28).to(memory_format=getattr(torch, layout))
            model(images).sum().backward()

    with stats:
        outputs = outputs_of(model, names, run)
    for name in names:
        found = stats.layer(name)
        np.testing.assert_array_equal(found.batches, [0, 1, 2])
        for batch, output in enumerate(outputs[name]):
            exact = output.double().numpy()
            assert found.mean[batch] == pytest.approx(exact.mean(), rel=1e-5, abs=1e-6)
            assert found.std[batch] == pytest.approx(exact.std(ddof=1), rel=1e-5)
            assert found.near_zero[batch] == (output.abs() <= 0.1).double().mean().item()
            np.testing.assert_array_equal(found.histograms[batch], output.histc(9, -1, 2))
            assert found.sampled[batch] == output.numel()
    np.testing.assert_allclose(found.edges, np.linspace(-1, 2, 10))


HARD = {
    "far from zero": 1e4 + 0.01 * torch.randn(501, dtype=torch.float64),
    "far from zero, float32": 1e3 + torch.randn(501),
    "constant": torch.full((40,), 3.0),
    "all zero": torch.zeros(40),
    "squares overflow": 1e25 * torch.randn(64),
    "bfloat16": torch.randn(64, dtype=torch.bfloat16),
    "float16": torch.randn(64, dtype=torch.float16),
    "integers": torch.arange(-6, 9),
    "one number": torch.tensor([2.0]),
    "no axes": torch.tensor(2.0),
    "none": torch.empty(0, 3),
    "a NaN": torch.tensor([0.0, 1.0, math.nan]),
    "an infinity": torch.tensor([0.0, 1.0, math.inf]),
    "a transposed view": torch.randn(4, 6, 5, 3).permute(2, 0, 3, 1)[:, 1:],
}


@pytest.mark.parametrize(
    ("way", "name"),
    [
        *(("cpu", name) for name in HARD),
        # torch.var_mean, which is for GPUs, overflows sooner.
        *(("device", name) for name in HARD if name != "squares overflow"),
    ],
)
def test_hard_outputs(monkeypatch, name, way):
    if way == "device":  # what a GPU's tensors take, here on the CPU's
        plain = activation_row.taken
        monkeypatch.setattr(
            activation_row, "taken", lambda *args: torch.from_numpy(plain(*args).copy())
        )
    output = HARD[name]
    found = stats_of(output, near_zero=0.5)
    exact = output.double().numpy().ravel()
    count = len(exact)
    with np.errstate(invalid="ignore"):
        mean = exact.mean() if count else math.nan
        std = exact.std(ddof=1) if count > 1 else math.nan
        near = np.mean(np.abs(exact) <= 0.5) if count else math.nan
    assert found.mean[0] == pytest.approx(mean, rel=1e-6, nan_ok=True)
    assert found.std[0] == pytest.approx(std, rel=1e-4, abs=1e-9, nan_ok=True)
    assert found.near_zero[0] == pytest.approx(near, nan_ok=True)
    wide = output if output.dtype == torch.float64 else output.float()
    finite = wide[wide.isfinite()] if wide.dim() else wide
    np.testing.assert_array_equal(found.histograms[0], finite.histc(40, 0, 10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("bins", "low", "high"), [(40, 0.0, 10.0), (7, -2.0, 3.0), (1, -1, 1)])
def test_histograms_are_torch_histcs_at_the_edges_too(dtype, bins, low, high):
    edges = torch.linspace(low, high, bins + 1, dtype=dtype)
    beyond = torch.tensor([low - 0.01, high + 0.01, -math.inf, math.inf], dtype=dtype)
    output = torch.cat([edges, edges, beyond, 4 * torch.randn(500, dtype=dtype)])
    found = stats_of(output, bins=bins, range=(low, high))
    np.testing.assert_array_equal(found.histograms[0], output.histc(bins, low, high))
    assert found.histograms[0].sum() < found.sampled[0] == len(output)


def test_near_zero_is_of_both_sides():
    output = torch.tensor([-3.0, -0.06, -0.05, -0.01, 0.0, 0.04, 0.05, 0.06, 9.0])
    assert stats_of(output).near_zero[0] == 5 / 9
    assert stats_of(output, near_zero=0.0).near_zero[0] == 1 / 9


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.Sigmoid(), nn.Softplus()])
def test_modules_said_never_negative_never_are(activation):
    assert isinstance(activation, activation_row.NEVER_NEGATIVE)
    input = torch.linspace(-30, 30, 601)
    with ActivationStats(nn.Sequential(activation), sample=None) as stats:
        stats._model(input)
    exact = (activation(input).abs() <= 0.05).double().mean().item()
    assert stats.layer(0).near_zero[0] == exact


def test_a_layer_called_twice_has_the_numbers_of_both_calls():
    model = same(1)
    parts = [torch.randn(3, 5), 7 + torch.randn(40, 2), torch.empty(0, 2)]
    with ActivationStats(model, ["same0"], sample=None) as stats:
        model(*(("same0", part) for part in parts))
        model(("same0", parts[2]), ("same0", parts[0]))
    together = stats_of(torch.cat([part.ravel() for part in parts]))
    found = stats.layer(0)
    for one, other in zip(vars(found).values(), vars(together).values(), strict=True):
        np.testing.assert_allclose(one[:1] if len(one) == 2 else one, other, rtol=1e-6)
    assert found.mean[1] == pytest.approx(parts[0].mean().item(), rel=1e-6)
    assert found.std[1] == pytest.approx(parts[0].std().item(), rel=1e-6)


# ---- samples ----


def test_a_sample_is_of_every_so_manyth_image():
    output = torch.randn(64, 4, 8, 8)
    found = stats_of(output, sample=4096)
    some = output[::4]
    assert found.mean[0] == pytest.approx(some.mean().item(), rel=1e-5)
    assert found.std[0] == pytest.approx(some.std().item(), rel=1e-5)
    assert found.near_zero[0] == (some.abs() <= 0.05).double().mean().item()
    assert found.sampled[0] == pytest.approx(1024, rel=0.3)
    for sample in (output.numel(), None):
        assert stats_of(output, sample=sample).mean[0] == pytest.approx(output.mean().item())
    one_image = stats_of(output[:1], sample=1)
    assert one_image.mean[0] == pytest.approx(output[0].mean().item())


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
def test_a_sampled_histogram_meets_all_channels_and_places_alike(layout):
    channels = torch.arange(8.0).view(8, 1, 1).expand(16, 8, 4, 4)
    places = torch.arange(16.0).view(4, 4).expand(16, 8, 4, 4)
    for output, kinds in ((channels, 8), (places, 16)):
        output = output.contiguous(memory_format=getattr(torch, layout))
        found = stats_of(output, bins=kinds, range=(-0.5, kinds - 0.5), sample=2048)
        counts = found.histograms[0]
        assert counts.sum() == found.sampled[0] < output.numel() / 3
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("sample", [None, 64])
def test_what_a_later_layer_writes_in_place_is_not_seen(sample):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True))
    with ActivationStats(model, ["0", "1"], sample=sample) as stats, torch.no_grad():
        model(torch.randn(2, 1, 5, 6))
    assert stats.layer(0).mean[0] < stats.layer(1).mean[0]
    assert stats.layer(1).near_zero[0] > stats.layer(0).near_zero[0]


# ---- which batches ----


@pytest.mark.parametrize("capacity", [2, 3, 4, 7])
def test_memory_is_bounded_and_rows_stay_with_their_batches(capacity):
    model = same(3)
    stats = ActivationStats(model, ["same0", "same1", "same2"], capacity=capacity)
    with stats:
        for number in range(53):
            value = torch.full((4,), float(number))
            calls = [("same0", value)]
            calls += [("same1", value)] * (number % 3 == 0) + [("same2", value)] * (number < 9)
            model(*calls)
            found = stats.layer("same0").batches
            assert 0 < len(found) <= capacity
            assert found[0] == 0
            assert set(np.diff(found)) <= {stats.stride}
            assert len(found) >= min(number + 1, capacity // 2)
    assert stats.batches == 53
    np.testing.assert_array_equal(stats.layer("same0").mean, found)
    called = np.where(found % 3 == 0, found, np.nan)
    np.testing.assert_array_equal(stats.layer("same1").mean, called)
    np.testing.assert_array_equal(stats.layer("same2").mean, np.where(found < 9, found, np.nan))
    np.testing.assert_array_equal(np.isnan(stats.layer("same1").histograms[:, 0]), found % 3 > 0)


def test_every():
    model = same(1)
    with ActivationStats(model, ["same0"], every=3, capacity=4) as stats:
        for number in range(14):
            model(("same0", torch.full((2,), float(number))))
    np.testing.assert_array_equal(stats.layer(0).mean, [0, 6, 12])
    np.testing.assert_array_equal(stats.layer(0).batches, [0, 6, 12])


@pytest.mark.parametrize("layers", LAYERS)
def test_only_training_counts_and_only_while_attached_and_nothing_changes(layers):
    model = lesson_cnn(layers)
    plain = copy.deepcopy(model)
    images = torch.rand(4, 1, 28, 28)
    stats = ActivationStats(model)
    with stats:
        stats.attach()  # twice is once
        assert torch.equal(model(images), plain(images))
        model.eval()
        model(images)
        model.train()
        assert torch.equal(model(images), plain(images))
    model(images)
    assert stats.batches == 2
    assert len(stats.layer("relu1").mean) == 2
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_forward_pass_that_fails_harms_no_other():
    model = nn.Sequential(nn.ReLU(), nn.Linear(3, 2))
    with ActivationStats(model) as stats:
        model(torch.ones(1, 3))
        with pytest.raises(RuntimeError):
            model(torch.ones(1, 4))
        model(torch.full((1, 3), 2.0))
    np.testing.assert_array_equal(stats.layer(0).mean, [1, np.nan, 2])


def test_a_model_with_hooks_can_be_copied():
    model = lesson_cnn("torch")
    with ActivationStats(model) as stats:
        copy.deepcopy(model)(torch.rand(2, 1, 28, 28))
    assert stats.batches == 0


# ---- which layers ----


def test_activation_functions_are_the_default():
    for layers in LAYERS:
        stats = ActivationStats(lesson_cnn(layers))
        assert stats.layers == ("relu1", "relu2", "relu3", "relu4")
    deep = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.GELU(), nn.Linear(3, 3)), nn.Tanh())
    assert ActivationStats(deep).layers == ("1.0", "2")


def test_without_activation_functions_it_is_the_layers_with_parameters():
    model = nn.Sequential(OrderedDict(a=nn.Linear(2, 3), b=nn.Flatten(), c=nn.BatchNorm1d(3)))
    assert ActivationStats(model).layers == ("a", "c")
    with pytest.raises(ValueError, match="model has neither"):
        ActivationStats(nn.Flatten())


def test_layers_by_name_and_as_modules():
    model = lesson_cnn("torch")
    assert ActivationStats(model, [model.conv2, "norm1", "conv2"]).layers == ("conv2", "norm1")
    relu = nn.ReLU()
    shared = nn.Sequential(relu, relu)
    assert ActivationStats(shared).layers == ("0",)
    with ActivationStats(shared, ["1", relu]) as stats:
        shared(torch.ones(2))
    assert stats.layers == ("1", "0")
    assert [stats.layer(-1).sampled[0], stats.layer("1").sampled[0]] == [4, 4]


@pytest.mark.parametrize("order", ["conv-relu-norm", "conv-norm-relu"])
def test_a_conv_block_stays_one_operation_and_shows_what_it_puts_out(order):
    block = convext.ConvBlock2d(1, 3, (3, 2), order=order)
    model = nn.Sequential(OrderedDict(block=block, last=nn.Conv2d(3, 2, 1)))
    images = torch.rand(4, 1, 6, 7)
    with ActivationStats(model, sample=None) as stats:
        assert block.is_fused()
        model(images)
    assert stats.layers == ("block",)
    output = block.layers()(images)
    found = stats.layer("block")
    assert found.std[0] == pytest.approx(output.std().item(), rel=1e-4)
    assert found.near_zero[0] == pytest.approx((output.abs() <= 0.05).float().mean().item())
    unfused = convext.unfuse(model)
    assert any(
        isinstance(unfused.get_submodule(n), nn.ReLU) for n in ActivationStats(unfused).layers
    )


# ---- fastai ----


@pytest.mark.filterwarnings("ignore::Warning:fastai")
@pytest.mark.parametrize("layers", LAYERS)
def test_the_numbers_are_fastais(layers, tmp_path):
    reason = "fastai is not installed (tests/requirements-no-deps.txt says how)"
    pytest.importorskip("fastai.learner", reason=reason, exc_type=ImportError)
    from fastai import basics
    from fastai.callback import schedule  # noqa: F401  (patches fit_one_cycle into Learner)
    from fastai.callback.hook import ActivationStats as Theirs
    from fastai.callback.progress import ProgressCallback

    model = lesson_cnn(layers)
    names = ("relu1", "conv2", "relu3", "norm4", "relu4")
    data = torch.utils.data.TensorDataset(torch.rand(80, 1, 28, 28), torch.randint(10, (80,)))
    loaders = basics.DataLoaders.from_dsets(data, data, bs=16, device="cpu", num_workers=0)
    theirs = Theirs(with_hist=True, modules=[model.get_submodule(name) for name in names])
    loss = nn.CrossEntropyLoss()
    learner = basics.Learner(loaders, model, loss_func=loss, path=tmp_path, cbs=theirs)
    learner.remove_cb(ProgressCallback)
    learner.logger = lambda *_: None
    with ActivationStats(model, names, sample=None) as ours:
        seen = outputs_of(model, names, lambda: learner.fit_one_cycle(2, 0.02))
    for place, name in enumerate(names):
        found = ours.layer(name)
        mean, std, near_zero = (np.array(column) for column in theirs.layer_stats(place))
        assert len(found.mean) == len(mean) == 10
        np.testing.assert_allclose(found.mean, mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.std, std, rtol=1e-5)
        histograms = torch.stack([batch[place]["hist"] for batch in theirs.stats])
        np.testing.assert_array_equal(found.histograms, histograms)
        # fastai takes all that is negative to be near zero; after a ReLU it is the same.
        below = [(output < -0.05).double().mean().item() for output in seen[name]]
        assert (max(below) > 0) == (not name.startswith("relu"))
        np.testing.assert_allclose(found.near_zero, near_zero - below, atol=1e-12)


# ---- keeping it ----


def test_going_on_from_a_state_is_as_if_nothing_had_happened():
    torch.manual_seed(1)
    model = lesson_cnn("torch")
    batches = [torch.rand(3, 1, 28, 28) for _ in range(11)]

    def collect(stats, some):
        with stats:
            for batch in some:
                model(batch)
        return stats

    straight = collect(ActivationStats(model, capacity=4), batches)
    for stop in (0, 1, 4, 7):
        state = collect(ActivationStats(model, capacity=4), batches[:stop]).state_dict()
        resumed = ActivationStats(model, capacity=4)
        resumed.load_state_dict(state)
        collect(resumed, batches[stop:])
        assert resumed.batches == 11
        for name in straight.layers:
            for one, other in zip(
                vars(resumed.layer(name)).values(), vars(straight.layer(name)).values(), strict=True
            ):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("histograms", [True, False])
def test_saved_and_loaded(tmp_path, histograms):
    model = same(2)
    names = ["same0", "same1"]
    stats = ActivationStats(model, names, histograms=histograms, near_zero=0.2, range=(-1, 1))
    stats.save(tmp_path / "empty.npz")
    with stats:
        model(("same0", torch.randn(3, 4)))
        model(("same0", torch.randn(3, 4)), ("same1", torch.randn(2)))
    stats.save(tmp_path / "some.npz")
    torch.save(stats.state_dict(), tmp_path / "state")
    torch.load(tmp_path / "state", weights_only=True)
    loaded = ActivationStats.load(tmp_path / "some.npz")
    assert (loaded.layers, loaded.near_zero, loaded.range) == (stats.layers, 0.2, (-1, 1))
    for name in names:
        for one, other in zip(
            vars(loaded.layer(name)).values(), vars(stats.layer(name)).values(), strict=True
        ):
            np.testing.assert_array_equal(one, other)
    empty = ActivationStats.load(tmp_path / "empty.npz")
    assert len(empty.layer("same0").mean) == empty.batches == 0
    with pytest.raises(ValueError, match="no model to attach to"):
        loaded.attach()


def test_a_file_that_is_something_else(tmp_path):
    with pytest.raises(FileNotFoundError):
        ActivationStats.load(tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "nothing.npz").write_bytes(b"")
    np.savez(tmp_path / "other.npz", layers=np.zeros(3))
    ActivationStats(same(1), ["same0"]).save(tmp_path / "cut.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:-30])
    for name in ("text", "nothing", "other", "cut"):
        with pytest.raises(ValueError, match=f"{name}.npz: not written by ActivationStats.save"):
            ActivationStats.load(tmp_path / f"{name}.npz")


# ---- mistakes ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ["relu9"]}, "layers must be modules of the model or their names, got 'relu9'"),
        ({"layers": [nn.Flatten()]}, r"layers must be modules .* got Flatten"),
        ({"near_zero": -0.1}, "near_zero must be at least 0, got -0.1"),
        ({"near_zero": math.nan}, "near_zero must be at least 0, got nan"),
        ({"bins": 0}, "bins must be at least 1, got 0"),
        ({"range": (3, 3)}, r"range must be two finite numbers that rise, got \(3, 3\)"),
        ({"range": (0, math.inf)}, "range must be two finite numbers that rise"),
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"sample": 0}, "sample must be at least 1 or None, got 0"),
        ({"capacity": 1}, "capacity must be at least 2, got 1"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        ActivationStats(lesson_cnn("torch"), **options)


def test_asking_for_what_is_not_there():
    model = lesson_cnn("torch")
    stats = ActivationStats(model, histograms=False)
    for layer in ("conv1", 4, -5):
        with pytest.raises(ValueError, match=f"layer must be one of relu1, .*, got {layer!r}"):
            stats.layer(layer)
        with pytest.raises(ValueError, match="layer must be one of relu1"):
            stats.plot_layer_stats(layer)
    with pytest.raises(ValueError, match="relu1: color_dim needs histograms"):
        stats.color_dim("relu1")
    with pytest.raises(ValueError, match=r"state must be of the layers relu1, .* got conv1"):
        stats.load_state_dict(ActivationStats(model, ["conv1"]).state_dict())
    with pytest.raises(ValueError, match="state must have 0 bins, got 40"):
        stats.load_state_dict(ActivationStats(model).state_dict())


# ---- charts ----


@pytest.fixture
def watched():
    """Statistics of a layer whose output grows, and whose batches are thinned out to even ones."""
    pytest.importorskip("matplotlib", reason="charts need the extra convext[plot]")
    model = same(1)
    with ActivationStats(model, ["same0"], capacity=6, bins=5, sample=None) as stats:
        for number in range(10):
            model(("same0", number * torch.linspace(0, 2, 101)))
    return stats


def test_plot_layer_stats(watched):
    figure = watched.plot_layer_stats(0)
    found = watched.layer(0)
    assert [axes.get_title() for axes in figure.axes] == [
        "mean",
        "standard deviation",
        "share with |x| ≤ 0.05",
    ]
    for axes, values in zip(figure.axes, (found.mean, found.std, found.near_zero), strict=True):
        assert axes.get_xlabel() == "batch"
        np.testing.assert_array_equal(axes.lines[0].get_xdata(), [0, 2, 4, 6, 8])
        np.testing.assert_array_equal(axes.lines[0].get_ydata(), values)


def test_color_dim(watched):
    figure = watched.color_dim("same0")
    axes, bar = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("batch", "activation")
    assert bar.get_ylabel() == "share of the batch"
    (image,) = axes.images
    assert image.get_extent() == [0, 10, 0, 10]
    assert image.origin == "lower"
    cells = image.get_array()
    assert cells.shape == (5, 5)
    # All of the first batch is in the lowest bin; of the last 5/8 lie within 0 to 10.
    np.testing.assert_allclose(cells[:, 0], [0, -5, -5, -5, -5])
    np.testing.assert_allclose((10.0 ** cells[:, -1]).sum(), 63 / 101, atol=1e-3)


def test_charts_of_no_batch_and_of_gaps():
    pytest.importorskip("matplotlib", reason="charts need the extra convext[plot]")
    model = same(2)
    stats = ActivationStats(model, ["same0", "same1"])
    for _ in range(2):
        stats.plot_layer_stats("same1").draw_without_rendering()
        stats.color_dim("same1").draw_without_rendering()
        with stats:
            model(("same0", torch.ones(2)))
            model(("same1", torch.full((2,), math.nan)))
