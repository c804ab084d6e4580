"""The IDX reader, where the data comes from, the download, and the batches."""

import functools
import gzip
import hashlib
import http.server
import math
import struct
import threading

import numpy as np
import pytest
import torch

from convext.mnist import data, download
from convext.mnist.augment import Augmentation
from convext.mnist.data import DataError, load_data, read_idx
from convext.mnist.loader import BatchLoader, first


def idx(shape, content=None, magic=b"\0\0\x08", dims=None):
    """The bytes of an IDX file."""
    count = 1
    for size in shape:
        count *= size
    content = bytes(i % 251 for i in range(count)) if content is None else content
    header = magic + bytes([len(shape) if dims is None else dims])
    return header + struct.pack(f">{len(shape)}I", *shape) + content


# ---- IDX ----


@pytest.mark.parametrize("compress", [gzip.compress, bytes], ids=["gz", "plain"])
@pytest.mark.parametrize("shape", [(5,), (3, 4, 2), (0, 28, 28)])
def test_read_idx(tmp_path, shape, compress):
    path = tmp_path / "file"
    path.write_bytes(compress(idx(shape)))
    tensor = read_idx(path, sha256=hashlib.sha256(idx(shape)).hexdigest())
    assert tensor.dtype == torch.uint8
    assert tensor.shape == shape
    assert tensor.flatten().tolist() == [i % 251 for i in range(tensor.numel())]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "truncated"),
        (b"\0\0\x08", "truncated"),
        (idx((3, 4))[:9], "truncated"),
        (idx((3, 4))[:-1], "truncated: 11 of 12 bytes of 3 x 4 data"),
        (idx((3, 4)) + b"x", "1 bytes too many after 3 x 4 data"),
        (idx((3, 4), magic=b"\1\0\x08"), "not an IDX file: its magic number is 0x01000802"),
        (idx((), content=b"", dims=0), "not an IDX file"),
        (idx((3, 4), magic=b"\0\0\x0d"), "IDX type 0x0d"),
        (idx((2**32 - 1,) * 3, content=b""), "truncated"),
        (b"<html>not found</html>", "not an IDX file"),
        (gzip.compress(idx((300, 40)), mtime=0)[:-20], "truncated: the gzip stream ends early"),
        (gzip.compress(idx((3, 4)), mtime=0)[:-8] + bytes(8), "broken gzip stream"),
        (b"\x1f\x8b" + bytes(30), "broken gzip stream"),
    ],
)
def test_broken_idx_names_file_and_reason(tmp_path, content, reason):
    path = tmp_path / "broken-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_idx(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_idx_checksum_and_missing_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(idx((3,)))
    with pytest.raises(DataError, match="checksum mismatch"):
        read_idx(path, sha256="0" * 64)
    with pytest.raises(DataError, match="absent: No such file"):
        read_idx(tmp_path / "absent")


# ---- where MNIST is looked for ----

CONTENT = {
    "train-images-idx3-ubyte": idx((6, 28, 28)),
    "train-labels-idx1-ubyte": idx((6,)),
    "t10k-images-idx3-ubyte": idx((4, 28, 28)),
    "t10k-labels-idx1-ubyte": idx((4,)),
}
ARCHIVES = {name: gzip.compress(content, mtime=0) for name, content in CONTENT.items()}


@pytest.fixture(autouse=True)
def no_data_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.delenv("CONVEXT_DATA", raising=False)
    monkeypatch.setattr(download, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(download, "MIRRORS", ())


@pytest.fixture
def small_mnist(monkeypatch):
    """Lets ten made-up images pass for the published ones."""
    files = {
        name: (hashlib.sha256(content).hexdigest(), hashlib.md5(ARCHIVES[name]).hexdigest())
        for name, content in CONTENT.items()
    }
    monkeypatch.setattr(data, "_FILES", files)


def fill(folder, ending=".gz"):
    folder.mkdir(parents=True)
    for name, content in CONTENT.items():
        (folder / f"{name}{ending}").write_bytes(ARCHIVES[name] if ending else content)
    return folder


@pytest.mark.parametrize("ending", [".gz", ""], ids=["gz", "plain"])
@pytest.mark.parametrize("name", ["mnist", "auto"])
@pytest.mark.usefixtures("small_mnist")
def test_mnist_from_a_folder(tmp_path, name, ending):
    dataset = load_data(name, fill(tmp_path / "data", ending))
    assert (dataset.name, dataset.note) == ("mnist", None)
    assert dataset.train.images.shape == (6, 1, 28, 28)
    assert dataset.train.images.dtype == torch.float32
    assert dataset.train.images.flatten()[:3].tolist() == pytest.approx([0, 1 / 255, 2 / 255])
    assert dataset.train.images.max() <= 1
    assert dataset.train.labels.dtype == torch.int64
    assert len(dataset.valid) == 4


@pytest.mark.usefixtures("small_mnist")
def test_the_option_goes_before_the_variable_and_that_before_the_cache(tmp_path, monkeypatch):
    option, variable = fill(tmp_path / "option"), fill(tmp_path / "variable")
    cache = fill(tmp_path / "cache" / "mnist")
    assert load_data("mnist").source == str(cache)
    monkeypatch.setenv("CONVEXT_DATA", str(variable))
    assert load_data("mnist").source == str(variable)
    assert load_data("mnist", option).source == str(option)


@pytest.mark.parametrize("name", ["mnist", "auto"])
@pytest.mark.usefixtures("small_mnist")
def test_a_named_folder_must_be_right_even_for_auto(tmp_path, monkeypatch, name):
    with pytest.raises(DataError, match=r"--data-dir: .*absent: no such folder"):
        load_data(name, tmp_path / "absent")
    folder = fill(tmp_path / "data")
    with pytest.raises(DataError, match=r"--data-dir: .*: not a folder"):
        load_data(name, folder / "t10k-labels-idx1-ubyte.gz")
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx((5,))))
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte\.gz: checksum mismatch"):
        load_data(name, folder)
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    monkeypatch.setenv("CONVEXT_DATA", str(folder))
    with pytest.raises(DataError, match=r"CONVEXT_DATA: .* holds neither t10k-labels"):
        load_data(name)


def test_auto_falls_back_to_digits_and_says_why():
    dataset = load_data("auto")
    assert dataset.name == "digits"
    assert dataset.note.startswith("Falling back to digits, for MNIST can't be had: no network")
    assert "\n" not in dataset.note
    with pytest.raises(DataError, match="no network"):
        load_data("mnist")


def test_unknown_name():
    with pytest.raises(DataError, match="'cifar'"):
        load_data("cifar")


def test_digits_are_the_same_every_time():
    first, second = load_data("digits"), load_data("digits")
    assert first.note is None
    assert (len(first.train), len(first.valid)) == (1438, 359)
    for split, again in ((first.train, second.train), (first.valid, second.valid)):
        assert split.images.shape[1:] == (1, 28, 28)
        assert split.images.dtype == torch.float32
        assert 0 <= split.images.min() <= split.images.max() <= 1
        assert split.labels.unique().tolist() == list(range(10))
        assert torch.equal(split.images, again.images)
        assert torch.equal(split.labels, again.labels)


# ---- download ----


@pytest.fixture
def mirror(tmp_path):
    """Serves folders of files on this machine; a call gives the address of a new one."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    servers = []

    def serve(files):
        folder = tmp_path / f"mirror{len(servers)}"
        folder.mkdir()
        for name, content in files.items():
            (folder / f"{name}.gz").write_bytes(content)
        handler = functools.partial(Quiet, directory=folder)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def checksums():
    return {f"{n}.gz": f"md5:{hashlib.md5(a).hexdigest()}" for n, a in ARCHIVES.items()}


def test_download_passes_over_bad_mirrors(tmp_path, mirror, checksums):
    wrong = mirror(dict.fromkeys(ARCHIVES, b"not it"))
    half = mirror(dict(list(ARCHIVES.items())[:2]))
    good = mirror(ARCHIVES)
    folder = tmp_path / "got"
    download.download(checksums, folder, [wrong, "http://127.0.0.1:9/", half, good])
    for name, archive in ARCHIVES.items():
        assert (folder / f"{name}.gz").read_bytes() == archive
    assert {p.name for p in folder.iterdir()} - {".lock"} == set(checksums)  # nothing half-done
    download.download(checksums, folder, [])  # complete: nobody is asked


def test_download_replaces_a_damaged_file(tmp_path, mirror, checksums):
    folder = tmp_path / "got"
    folder.mkdir()
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(b"damaged")
    download.download(checksums, folder, [mirror(ARCHIVES)])
    name = "t10k-labels-idx1-ubyte"
    assert (folder / f"{name}.gz").read_bytes() == ARCHIVES[name]


def test_download_without_a_good_mirror(tmp_path, mirror, checksums):
    with pytest.raises(DataError, match="wrong checksum"):
        download.download(checksums, tmp_path / "a", [mirror(dict.fromkeys(ARCHIVES, b"no"))])
    assert not list((tmp_path / "a").glob("*.gz"))
    with pytest.raises(DataError, match=r"no MNIST mirror answers \(1 tried\)"):
        download.download(checksums, tmp_path / "b", [mirror({})])


def test_download_into_a_place_that_is_not_a_folder(tmp_path, checksums):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file"):
        download.download(checksums, tmp_path / "file", [])


@pytest.mark.usefixtures("small_mnist")
def test_mnist_is_downloaded_into_the_cache(monkeypatch, mirror, tmp_path):
    monkeypatch.setattr(download, "MIRRORS", (mirror(ARCHIVES),))
    assert load_data("auto").source == str(tmp_path / "cache" / "mnist")


# ---- batches ----


def make_loader(count=10, batch_size=4, **options):
    labels = torch.arange(count)
    return BatchLoader(labels.view(-1, 1, 1, 1).float(), labels, batch_size, **options)


def numbers(loader):
    return [labels.tolist() for _, labels in loader]


def test_batches_in_order_keep_the_last():
    loader = make_loader()
    assert len(loader) == 3
    assert numbers(loader) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    for images, labels in loader:
        assert torch.equal(images.flatten().long(), labels)


def test_training_drops_a_short_last_batch_but_never_everything():
    assert [len(b) for b in numbers(make_loader(drop_last=True))] == [4, 4]
    assert numbers(make_loader(count=3, drop_last=True)) == [[0, 1, 2]]


def test_order_depends_on_seed_and_epoch_alone():
    loader = make_loader(count=100, seed=5)
    first = numbers(loader)
    assert sorted(n for batch in first for n in batch) == list(range(100))
    torch.manual_seed(1)  # the global generator plays no part ...
    assert numbers(loader) == first
    before = torch.get_rng_state()
    numbers(loader)
    assert torch.equal(torch.get_rng_state(), before)  # ... and is left alone
    loader.epoch = 1
    assert numbers(loader) != first
    other = make_loader(count=100, seed=6)
    assert numbers(other) != first


def test_state_goes_on_in_the_middle_of_an_epoch():
    loader = make_loader(count=20, seed=3)
    loader.epoch = 2
    whole = numbers(loader)
    batches = iter(loader)
    next(batches), next(batches)
    state = loader.state_dict()
    fresh = make_loader(count=20, seed=3)
    fresh.load_state_dict(state)
    assert numbers(fresh) == whole[2:]
    assert numbers(fresh) == whole  # the one after is whole again


def test_state_at_the_end_of_an_epoch_is_the_start_of_the_next():
    loader = make_loader(count=20, seed=3)
    numbers(loader)
    assert loader.state_dict() == {"epoch": 1, "batch": 0}


def test_loader_refuses_nonsense():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        make_loader(batch_size=0)
    with pytest.raises(ValueError, match="2 images but 3 labels"):
        BatchLoader(torch.zeros(2, 1, 1, 1), torch.zeros(3), 1)
    with pytest.raises(ValueError, match="at least one image"):
        make_loader(count=0)
    with pytest.raises(ValueError, match="part must be from 0 to parts - 1, got 2 of 2"):
        make_loader(part=2, parts=2)
    with pytest.raises(ValueError, match="batches of 4 out of 10 images don't make 3 equal parts"):
        make_loader(part=0, parts=3, drop_last=True)


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("training", [True, False])
def test_parts_join_to_the_batches_of_one(parts, training):
    options = {"seed": 3, "drop_last": True} if training else {}
    count, batch_size = 32, 6  # the last batch, of 2, makes no 3 parts that hold an image each
    whole = make_loader(count, batch_size, **options)
    shares = [
        make_loader(count, batch_size, part=part, parts=parts, **options) for part in range(parts)
    ]
    for epoch in range(2):
        for loader in (whole, *shares):
            loader.epoch = epoch
            assert len(loader) == (5 if training else 6)
        for batch, *pieces in zip(numbers(whole), *map(numbers, shares), strict=True):
            assert [number for piece in pieces for number in piece] == batch
            assert max(map(len, pieces)) - min(map(len, pieces)) <= (0 if training else 1)


def test_a_data_set_smaller_than_a_batch_is_cut_to_equal_parts():
    shares = [numbers(make_loader(5, 8, drop_last=True, part=part, parts=2)) for part in range(2)]
    assert shares == [[[0, 1]], [[2, 3]]]


def test_first_is_the_first_batch_and_leaves_the_loader_where_it_stands():
    loader = make_loader(count=20, seed=3, drop_last=True)
    loader.load_state_dict({"epoch": 1, "batch": 2})
    rest = numbers(make_and_load(loader.state_dict()))
    images, labels = first(loader)
    assert labels.tolist() == rest[0]
    assert torch.equal(images.flatten().long(), labels)
    assert loader.state_dict() == {"epoch": 1, "batch": 2}
    assert numbers(loader) == rest
    assert first([(1, 2), (3, 4)]) == (1, 2)


def make_and_load(state):
    loader = make_loader(count=20, seed=3, drop_last=True)
    loader.load_state_dict(state)
    return loader


# ---- augmentation ----


def make_augmented(count=20, batch_size=6, *, seed=3, augment=None, **options):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 2, 9, 12, generator=generator)
    augment = augment or Augmentation()
    loader = BatchLoader(
        images, torch.arange(count), batch_size, seed=seed, augment=augment, **options
    )
    return images, loader


def test_moves_depend_on_seed_epoch_and_batch_alone():
    _, loader = make_augmented()
    whole = list(loader)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again = list(loader)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole, again, strict=True))

    _, fresh = make_augmented()
    fresh.load_state_dict({"epoch": 0, "batch": 2})
    assert torch.equal(next(iter(fresh))[0], whole[2][0])

    same = torch.zeros(20, 1, 9, 12)
    same[:, :, 2, 3] = 1  # each image alike, so that only moves tell batches apart
    moved = {}
    for seed, epoch in ((3, 0), (3, 1), (4, 0)):
        loader = BatchLoader(same, torch.arange(20), 6, seed=seed, augment=Augmentation())
        loader.epoch = epoch
        for number, (images, _) in enumerate(loader):
            moved[seed, epoch, number] = images[0]
    keys = list(moved)
    assert all(
        not torch.equal(moved[one], moved[other])
        for place, one in enumerate(keys)
        for other in keys[:place]
    )


def test_moves_change_neither_labels_nor_order():
    images, loader = make_augmented()
    plain = BatchLoader(images, torch.arange(20), 6, seed=3)
    assert numbers(loader) == numbers(plain)
    _, still = make_augmented(augment=Augmentation(degrees=0, pixels=0))
    for (moved, _), (found, labels) in zip(loader, still, strict=True):
        assert torch.allclose(found, images[labels], atol=1e-6)
        assert moved.shape == found.shape
        assert not torch.allclose(moved, found, atol=0.1)


def test_parts_of_moved_batches_join_to_those_of_one():
    _, whole = make_augmented(drop_last=True)
    shares = [make_augmented(drop_last=True, part=part, parts=3)[1] for part in range(3)]
    for (images, _), *pieces in zip(whole, *shares, strict=True):
        assert torch.allclose(torch.cat([piece for piece, _ in pieces]), images, atol=1e-6)


def test_a_move_is_a_turn_about_the_centre_and_then_a_shift():
    ndimage = pytest.importorskip("scipy.ndimage", reason="SciPy is not installed")
    images = torch.rand(3, 2, 9, 14, dtype=torch.float64)
    moves = torch.tensor([[0.3, 0.0, 0.0], [0.0, 1.5, -2.25], [-0.7, -1.0, 0.5]])
    found = Augmentation.move(images, moves)
    centre = np.array([4.0, 6.5])
    for image, move, moved in zip(images, moves.double().tolist(), found, strict=True):
        angle, right, down = move
        # SciPy's rows and columns, from a place in the result to the one that it shows.
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        offset = centre - turn @ (centre + np.array([down, right]))
        for channel, expected in zip(image, moved, strict=True):
            theirs = ndimage.affine_transform(
                channel.numpy(), turn, offset, order=1, mode="nearest"
            )
            assert np.allclose(theirs, expected.numpy(), atol=1e-9)


def test_positive_moves_are_clockwise_right_and_down():
    image = torch.zeros(1, 1, 7, 7)
    image[0, 0, 1, 3] = 1  # above the middle
    quarter = Augmentation.move(image, torch.tensor([[math.pi / 2, 0.0, 0.0]]))
    assert quarter[0, 0].round().nonzero().tolist() == [[3, 5]]
    shifted = Augmentation.move(image, torch.tensor([[0.0, 2.0, 1.0]]))
    assert shifted[0, 0].round().nonzero().tolist() == [[2, 5]]


def test_draws_stay_within_what_was_asked():
    moves = Augmentation(degrees=30, pixels=4).draw(2000, torch.Generator().manual_seed(0))
    most = torch.tensor([math.pi / 6, 4, 4])
    assert (moves.abs() <= most).all()
    assert (moves.abs().amax(0) > 0.99 * most).all()
    assert (moves.mean(0).abs() < 0.05 * most).all()


def test_moves_need_a_seed():
    with pytest.raises(ValueError, match="augment needs a seed"):
        make_augmented(seed=None)
