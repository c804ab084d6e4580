"""Pictures as tensors: samples without a network, files as Pillow shows them."""

import socket

import numpy as np
import pytest
import torch

from convext.inspection.pictures import SAMPLES, read_picture, sample


def test_samples_need_no_network(monkeypatch):
    pytest.importorskip("skimage", reason="scikit-image is not installed")

    def refuse(*_):
        raise AssertionError("a sample is fetched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in SAMPLES:
        image = sample(name)
        assert image.shape[0] in (1, 3)
        assert 0 <= image.min() < image.max() <= 1
    assert sample("camera").shape == (1, 512, 512)
    assert sample("coffee").shape == (3, 400, 600)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "LA", "CMYK"])
def test_a_file_is_read_as_pillow_shows_it(tmp_path, mode):
    image_module = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 3), dtype=np.uint8)
    picture = image_module.fromarray(pixels).convert(mode)
    path = tmp_path / f"picture.{'tif' if mode == 'CMYK' else 'png'}"
    picture.save(path)
    found = read_picture(path)
    shown = np.asarray(picture.convert("L" if mode in ("L", "LA", "1") else "RGB"))
    expected = shown[..., None] if shown.ndim == 2 else shown
    assert found.dtype == torch.float32
    assert np.array_equal((found * 255).round().permute(1, 2, 0).numpy(), expected)


def test_a_picture_lying_on_its_side_is_set_up(tmp_path):
    image_module = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    picture = image_module.new("L", (8, 5))
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    picture.save(tmp_path / "picture.jpg", exif=exif)
    assert read_picture(tmp_path / "picture.jpg").shape == (1, 8, 5)


def test_sixteen_bits_are_refused_by_name(tmp_path):
    image_module = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    image_module.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png: 8 bits a channel are read, not mode I;16"):
        read_picture(tmp_path / "deep.png")


def test_a_sample_that_there_is_not():
    with pytest.raises(ValueError, match=r"name must be one of astronaut, .*, got 'lena'"):
        sample("lena")
