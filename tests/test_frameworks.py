"""Training frameworks on top of our layers: every figure that they give with stock layers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import convext
from convext.mnist.model import lesson_cnn

pytestmark = [  # theirs, of which convext's users see none
    pytest.mark.filterwarnings("ignore::Warning:fastai"),
    pytest.mark.filterwarnings("ignore::Warning:lightning"),
]
LAYERS = ("convext", "torch")
DOUBLE = torch.float64


class Digits(TensorDataset):
    """Images and labels."""

    def new_empty(self):
        """What fastai puts into a Learner that it exports."""
        return Digits(*(tensor[:0] for tensor in self.tensors))


def digits(count, dtype=DOUBLE):
    """Noise with labels, as good as any data for comparing."""
    generator = torch.Generator().manual_seed(5)
    return Digits(
        torch.rand(count, 1, 28, 28, generator=generator, dtype=dtype),
        torch.randint(10, (count,), generator=generator),
    )


def lesson(layers, dtype=DOUBLE):
    torch.manual_seed(3)
    return lesson_cnn(layers).to(dtype)


# --------------------------------------------------------------------------------------------------
# fastai


@pytest.fixture(scope="module")
def fastai():
    """fastai's names, imported on demand: it takes seconds."""
    reason = "fastai is not installed (tests/requirements-no-deps.txt says how)"
    pytest.importorskip("fastai.learner", reason=reason, exc_type=ImportError)
    from fastai import basics
    from fastai.callback import hook, schedule  # noqa: F401  (both patch methods into Learner)

    return basics


def cross_entropy(scores, labels):
    """fastai averages losses in float32 only."""
    return F.cross_entropy(scores, labels).float()


@pytest.fixture
def learner(fastai, tmp_path):
    """Makes a Learner of the lesson's network, fed with the same batches every time."""
    from fastai.callback.progress import ProgressCallback

    def make(layers, **options):
        fastai.set_seed(7)
        data = fastai.DataLoaders.from_dsets(
            digits(80), digits(24), bs=16, device="cpu", num_workers=0
        )
        learner = fastai.Learner(
            data,
            lesson(layers),
            loss_func=cross_entropy,
            metrics=fastai.accuracy,
            path=tmp_path,
            **options,
        )
        learner.remove_cb(ProgressCallback)
        learner.logger = lambda *_: None
        return learner

    return make


def test_fastai_trains_and_looks_at_activations(fastai, learner):
    from fastai.callback.hook import ActivationStats

    runs = []
    for layers in LAYERS:
        run = learner(layers, cbs=ActivationStats(with_hist=True))
        run.fit_one_cycle(2, 0.02)
        stats = [dict(layer) for batch in run.activation_stats.stats for layer in batch]
        losses = [list(values) for values in run.recorder.values]
        state = {key: value.clone() for key, value in run.model.state_dict().items()}
        runs.append((torch.stack(run.recorder.losses), losses, stats, state))
    assert len(runs[0][0]) == 10
    assert len(runs[0][2]) == 10 * 9  # batches, layers with parameters
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-5, atol=1e-6)


def test_fastai_summary(learner):
    ours, stock = (str(learner(layers).summary()) for layers in LAYERS)
    replaced = learner("torch")
    convext.replace_layers(replaced.model)
    assert ours == stock == str(replaced.summary())
    assert "Total params: 30,522" in ours


def test_fastai_finds_a_learning_rate(learner):
    found = [
        learner(layers).lr_find(start_lr=1e-4, num_it=20, show_plot=False) for layers in LAYERS
    ]
    assert found[0].valley == pytest.approx(found[1].valley)


def test_fastai_exports_and_loads(fastai, learner, tmp_path):
    one = learner("convext")
    one.fit(1)
    expected, _ = one.get_preds()
    one.export("learner.pkl")
    with pytest.warns(UserWarning, match="insecure pickle"):
        other = fastai.load_learner(tmp_path / "learner.pkl")
    assert type(other.model.conv1) is convext.Conv2d
    batches = other.dls.test_dl(digits(24))
    assert torch.equal(other.get_preds(dl=batches)[0], expected)

    one.save("weights", with_opt=True)
    stock = learner("torch").load("weights")
    torch.testing.assert_close(stock.get_preds()[0], expected)


def test_fastai_keeps_its_kind_of_tensor(fastai):
    results = []
    for layers in LAYERS:
        image = torch.linspace(0, 1, 4 * 784, dtype=DOUBLE).reshape(4, 1, 28, 28)
        image = image.as_subclass(fastai.TensorImage).requires_grad_()
        scores = lesson(layers)(image)
        scores.square().sum().backward()
        results.append((type(scores), type(image.grad)))
        results[-1] += (torch.Tensor(scores), torch.Tensor(image.grad))
    assert results[0][:2] == results[1][:2]
    assert results[0][0] is fastai.TensorImage
    torch.testing.assert_close(results[0][2:], results[1][2:])


# --------------------------------------------------------------------------------------------------
# Lightning


@pytest.fixture
def fit(tmp_path):
    """Trains a LightningModule around the lesson's network; returns it and the trainer."""
    pl = pytest.importorskip("lightning.pytorch", reason="lightning is in the extra convext[train]")

    class Task(pl.LightningModule):
        def __init__(self, layers="convext", lr=0.1):
            super().__init__()
            self.save_hyperparameters()
            self.model = lesson(layers)
            self.losses, self.scores = [], []

        def training_step(self, batch, _):
            images, labels = batch
            scores = self.model(images)
            loss = F.cross_entropy(scores, labels)
            self.scores.append(scores.detach())
            self.losses.append(loss.detach())
            return loss

        def validation_step(self, batch, _):
            scores = self.model(batch[0])
            assert not scores.requires_grad
            self.scores.append(scores)
            self.log("valid_loss", F.cross_entropy(scores, batch[1]))

        def predict_step(self, batch):
            return self.model(batch[0]).softmax(1)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), self.hparams.lr, momentum=0.9)

    def fit(layers, dtype=DOUBLE, task=None, ckpt_path=None, **options):
        torch.manual_seed(7)  # for the order of the batches
        trainer = pl.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            **options,
        )
        task = task or Task(layers)
        trainer.fit(
            task,
            DataLoader(digits(80, dtype), batch_size=16, shuffle=True),
            DataLoader(digits(24, dtype), batch_size=16),
            ckpt_path=ckpt_path,
        )
        return task, trainer

    fit.task = Task
    return fit


def figures(task, trainer):
    """All that a run has come to."""
    return task.losses, task.scores, trainer.callback_metrics, task.state_dict()


@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 2},
        {"max_epochs": 2, "accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    ],
    ids=["plain", "accumulating and clipping"],
)
def test_lightning_trains_and_validates(fit, options):
    ours, stock = (figures(*fit(layers, **options)) for layers in LAYERS)
    assert len(ours[0]) == 10
    torch.testing.assert_close(ours, stock)


def test_lightning_mixed_precision(fit):
    runs = []
    for layers in LAYERS:
        task = fit.task(layers, lr=0.01).float()  # with larger steps the roundings tell
        dtypes = []
        for layer in (task.model.conv1, task.model.norm1, task.model.conv2):
            layer.register_forward_hook(lambda m, _, out, d=dtypes: d.append(out.dtype))
        fit(layers, torch.float32, task, precision="bf16-mixed", max_epochs=1, limit_val_batches=0)
        assert {p.dtype for p in task.parameters()} == {torch.float32}
        runs.append((torch.stack(task.losses), dtypes))
    assert runs[0][1] == runs[1][1]
    assert set(runs[0][1]) == {torch.bfloat16}
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=0.02, atol=0.02)


def test_lightning_checkpoints(fit, tmp_path):
    straight = fit("convext", max_epochs=2)
    task, trainer = fit("convext", max_epochs=1)
    path = tmp_path / "first.ckpt"
    trainer.save_checkpoint(path)
    loaded = fit.task.load_from_checkpoint(path)
    assert type(loaded.model.conv1) is convext.Conv2d
    torch.testing.assert_close(loaded.state_dict(), task.state_dict(), rtol=0, atol=0)
    stock = fit.task.load_from_checkpoint(path, layers="torch")
    assert type(stock.model.conv1) is nn.Conv2d
    torch.testing.assert_close(stock.state_dict(), task.state_dict(), rtol=0, atol=0)

    resumed = {layers: fit(layers, max_epochs=2, ckpt_path=path) for layers in LAYERS}
    assert [run[1].global_step for run in resumed.values()] == [10, 10]
    torch.testing.assert_close(resumed["convext"][0].state_dict(), resumed["torch"][0].state_dict())
    assert straight[1].global_step == 10


def averaging(name):
    callbacks = pytest.importorskip(
        "lightning.pytorch.callbacks", reason="lightning is in the extra convext[train]"
    )
    if name == "SWA":
        return callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    if not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("this version of lightning has no EMAWeightAveraging")
    return callbacks.EMAWeightAveraging(decay=0.8)


@pytest.mark.parametrize("name", ["SWA", "EMA"])
def test_lightning_averages_weights(fit, name):
    """SWA runs the data once more for the statistics of batch norm."""
    ours, stock = (
        figures(*fit(layers, max_epochs=3, callbacks=[averaging(name)])) for layers in LAYERS
    )
    torch.testing.assert_close(ours, stock)
    plain = fit("convext", max_epochs=3)[0].state_dict()
    for key in ("model.conv2.weight", "model.norm2.running_var"):
        assert not torch.allclose(ours[3][key], plain[key])
