"""Classic kernels: as others make them, and applied as scipy, OpenCV and PyTorch apply them."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import convext
from convext.__main__ import main
from convext.inspection.example import conv_example
from convext.inspection.filter_plot import plot_filters
from convext.inspection.filters import (
    FILTERS,
    LUMINANCE,
    apply_at,
    apply_by_loops,
    apply_filter,
    as_weight,
    box,
    gaussian,
)
from convext.inspection.pictures import read_picture

UNEVEN = torch.arange(8.0).reshape(2, 4) - 3  # even, and no symmetry to hide behind


def whole_pixels(*shape, dtype=torch.float64):
    """As an image file's: sums of products of these and of whole weights are exact."""
    return torch.randint(256, shape).to(dtype)


# --- The kernels ---------------------------------------------------------------------------------


def test_sobel_is_opencvs():
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    image = whole_pixels(9, 7)
    for name, order in (("sobel-x", (1, 0)), ("sobel-y", (0, 1))):
        expected = cv2.Sobel(image.numpy(), cv2.CV_64F, *order, ksize=3)[1:-1, 1:-1]
        assert np.array_equal(apply_filter(image, name).numpy(), expected)


def test_laplacian_is_opencvs_and_scipys():
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    ndimage = pytest.importorskip("scipy.ndimage", reason="scipy is not installed")
    image = whole_pixels(9, 7)
    found = apply_filter(image, "laplacian").numpy()
    assert np.array_equal(found, cv2.Laplacian(image.numpy(), cv2.CV_64F, ksize=1)[1:-1, 1:-1])
    assert np.array_equal(found, ndimage.laplace(image.numpy())[1:-1, 1:-1])


def test_left_and_top_edges_are_scipys_prewitt():
    ndimage = pytest.importorskip("scipy.ndimage", reason="scipy is not installed")
    image = whole_pixels(9, 7)
    for axis, name in enumerate(("top-edge", "left-edge")):
        expected = ndimage.prewitt(image.numpy(), axis)[1:-1, 1:-1]
        assert np.array_equal(apply_filter(image, name).numpy(), expected)


@pytest.mark.parametrize(("size", "sigma"), [((5, 5), 1.0), ((3, 7), 0.7), ((9, 7), 2.5)])
def test_gaussian_is_opencvs(size, sigma):
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    down, across = (cv2.getGaussianKernel(n, sigma, cv2.CV_64F) for n in size)
    found = np.array(gaussian(size, sigma).rows)
    np.testing.assert_allclose(found, down * across.T, rtol=1e-12)
    assert found.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("size", "sigma"), [((4, 8), 0.7), ((5, 6), 2.0)])
def test_gaussian_is_scipys_window(size, sigma):
    windows = pytest.importorskip("scipy.signal.windows", reason="scipy is not installed")
    down, across = (windows.gaussian(n, sigma) for n in size)
    expected = down[:, None] * across / (down.sum() * across.sum())
    np.testing.assert_allclose(np.array(gaussian(size, sigma).rows), expected, rtol=1e-12)


def test_box_is_a_mean_pool():
    image = torch.rand(1, 2, 7, 9, dtype=torch.float64)
    found = apply_filter(image, box((3, 2)), "each")
    torch.testing.assert_close(found, F.avg_pool2d(image, (3, 2), stride=1))


def test_the_kernels_of_one_family_agree():
    of = {name: found.kernel for name, found in FILTERS.items()}
    assert torch.equal(of["bottom-edge"], -of["top-edge"])
    assert torch.equal(of["left-edge"], of["top-edge"].T)
    assert torch.equal(of["right-edge"], -of["left-edge"])
    assert torch.equal(of["sobel-y"], of["sobel-x"].T)
    assert torch.equal(of["sharpen"], of["identity"] - of["laplacian"])


def test_an_edge_is_positive_at_its_side_of_something_bright():
    image = torch.zeros(9, 11)
    image[3:6, 4:8] = 1
    beside = {"top": (2, 6), "bottom": (6, 6), "left": (4, 3), "right": (4, 8)}
    for side, (row, col) in beside.items():
        for other, (r, c) in beside.items():
            total = float(apply_at(image, r, c, f"{side}-edge").total)
            assert (total > 0) == (side == other)
        assert float(apply_at(image, row, col, f"{side}-edge").total) == 3


def test_even_areas_stay_or_vanish():
    even = torch.full((6, 7), 3.0, dtype=torch.float64)
    for name, found in FILTERS.items():
        gain = round(sum(map(sum, found.rows)), 12)
        assert gain in (0, 1), name
        torch.testing.assert_close(
            apply_filter(even, name), torch.full_like(apply_filter(even, name), 3.0 * gain)
        )


def test_a_kernel_belongs_to_its_caller():
    FILTERS["top-edge"].kernel.zero_()
    assert FILTERS["top-edge"].kernel.abs().sum() == 6


def test_the_lessons_example_has_these_edges():
    weight = conv_example().conv1.weight
    assert torch.equal(weight[0, 0], FILTERS["top-edge"].kernel)
    assert torch.equal(weight[1, 0], FILTERS["left-edge"].kernel)


# --- As a weight ---------------------------------------------------------------------------------


def test_shapes_of_weights():
    names = ["top-edge", "sobel-x"]
    assert as_weight("top-edge").shape == (1, 1, 3, 3)
    assert as_weight(names, 3).shape == (2, 3, 3, 3)
    assert as_weight(names, 3, "each").shape == (6, 1, 3, 3)
    assert as_weight(UNEVEN, 3, "grey", torch.float64).shape == (1, 3, 2, 4)


def test_sum_is_the_sum_of_each():
    image = whole_pixels(2, 3, 8, 9)
    names = ["sobel-x", "laplacian"]
    each = apply_filter(image, names, "each").unflatten(1, (3, 2))
    for channel in range(3):
        assert torch.equal(each[:, channel], apply_filter(image[:, channel : channel + 1], names))
    assert torch.equal(apply_filter(image, names, "sum"), each.sum(1))


def test_grey_is_opencvs_grey_picture_filtered():
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    image = torch.rand(3, 8, 9)
    grey = cv2.cvtColor(image.permute(1, 2, 0).numpy(), cv2.COLOR_RGB2GRAY)
    for name in ("sobel-x", "gaussian"):
        expected = cv2.filter2D(grey, cv2.CV_32F, FILTERS[name].kernel.numpy())
        edge = len(FILTERS[name].rows) // 2
        np.testing.assert_allclose(
            apply_filter(image, name, "grey")[0].numpy(),
            expected[edge:-edge, edge:-edge],
            atol=1e-5,
        )


def test_luminance_is_a_mean():
    assert sum(LUMINANCE) == pytest.approx(1, abs=1e-12)


# --- Applied -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("padding", "scipys"),
    [("zeros", "constant"), ("reflect", "mirror"), ("replicate", "nearest"), ("circular", "wrap")],
)
@pytest.mark.parametrize("name", ["sobel-x", "gaussian", "uneven"])
def test_padding_is_as_scipy_names_it(padding, scipys, name):
    ndimage = pytest.importorskip("scipy.ndimage", reason="scipy is not installed")
    kernel = UNEVEN if name == "uneven" else FILTERS[name].kernel
    image = whole_pixels(7, 11)
    # scipy's middle of an even kernel is the cell after it, ours the one before, as PyTorch's.
    origin = [(k - 1) // 2 - k // 2 for k in kernel.shape]
    expected = ndimage.correlate(image.numpy(), kernel.double().numpy(), mode=scipys, origin=origin)
    found = apply_filter(image, kernel, padding=padding)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-10)


@pytest.mark.parametrize("shape", [(9, 7), (1, 9, 7), (3, 9, 7), (2, 3, 9, 7)])
@pytest.mark.parametrize("how", ["sum", "each"])
def test_no_padding_is_pytorchs_conv2d(shape, how):
    image = torch.randn(shape, dtype=torch.float64)
    pixels = image.reshape((1,) * (4 - len(shape)) + shape)
    channels = pixels.shape[1]
    groups = channels if how == "each" else 1
    weight = UNEVEN.double().expand(groups, channels // groups, 2, 4)
    expected = F.conv2d(pixels, weight, groups=groups)
    found = apply_filter(image, UNEVEN, how)
    assert found.dim() == len(shape)
    torch.testing.assert_close(found.reshape(expected.shape), expected)


def test_it_is_our_kernel_that_filters():
    image = torch.randn(1, 1, 9, 7)
    weight = as_weight(["sharpen", "emboss"])
    assert torch.equal(
        apply_filter(image, ["sharpen", "emboss"]), convext.functional.conv2d(image, weight)
    )


def test_kernels_are_not_turned():
    ndimage = pytest.importorskip("scipy.ndimage", reason="scipy is not installed")
    image = whole_pixels(7, 8)
    kernel = FILTERS["emboss"].kernel.double()
    turned = ndimage.convolve(image.numpy(), kernel.flip(0, 1).numpy())[1:-1, 1:-1]
    found = apply_filter(image, "emboss").numpy()
    assert np.array_equal(found, turned)
    assert not np.array_equal(found, ndimage.convolve(image.numpy(), kernel.numpy())[1:-1, 1:-1])


# --- One pixel, and the lesson's loops -----------------------------------------------------------


@pytest.mark.parametrize("name", ["top-edge", "diag1-edge", "emboss", "uneven"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8], ids=str)
def test_loops_give_the_kernels_bits_where_nothing_is_rounded(name, dtype):
    kernel = UNEVEN if name == "uneven" else name
    image = whole_pixels(8, 10, dtype=dtype)
    loops = apply_by_loops(image, kernel)
    assert torch.equal(loops, apply_filter(image, kernel))
    weight = as_weight(kernel, dtype=loops.dtype)
    assert torch.equal(loops, F.conv2d(image.to(loops.dtype)[None, None], weight)[0, 0])


@pytest.mark.parametrize("how", ["sum", "grey"])
def test_loops_are_the_kernel_of_any_numbers(how):
    image = torch.randn(3, 8, 10, dtype=torch.float64)
    kernel = torch.randn(3, 2, dtype=torch.float64)
    torch.testing.assert_close(
        apply_by_loops(image, kernel, how), apply_filter(image, kernel, how)[0], atol=1e-13, rtol=0
    )


def test_one_pixel_is_the_lessons_expression():
    image = whole_pixels(28, 28, dtype=torch.uint8)
    top_edge = torch.tensor([[-1, -1, -1], [0, 0, 0], [1, 1, 1]]).float()
    at = apply_at(image, 5, 7, "top-edge")
    assert torch.equal(at.values, image[4:7, 6:9])
    assert torch.equal(at.weights, top_edge)
    assert torch.equal(at.products, image[4:7, 6:9] * top_edge)
    assert at.total == (image[4:7, 6:9] * top_edge).sum()
    assert str(at).startswith(f"(image[4:7, 6:9] * kernel).sum() = {int(at.total)}\n")


def test_one_pixel_written_out():
    image = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 10]])
    assert str(apply_at(image, 1, 1, "sobel-x")) == (
        "(image[0:3, 0:3] * kernel).sum() = 9\n"
        "\n"
        "   1  2  3     -1  0  1     -1  0  3\n"
        "   4  5  6  *  -2  0  2  =  -8  0 12\n"
        "   7  8 10     -1  0  1     -7  0 10"
    )


def test_a_colour_pixel_is_written_out_by_channel():
    image = torch.ones(3, 3, 3)
    lines = str(apply_at(image, 1, 1, "box", "grey")).splitlines()
    assert lines[0] == "(image[:, 0:3, 0:3] * kernel).sum() = 1"
    assert [line for line in lines if ": 0." in line] == [
        "red: 0.299",
        "green: 0.587",
        "blue: 0.114",
    ]


@pytest.mark.parametrize("corner", [(0, 0), (0, -1), (-1, 0), (-1, -1)])
def test_every_cell_without_padding_has_its_pixel(corner):
    image = whole_pixels(6, 9)
    output = apply_filter(image, UNEVEN)
    row, col = (c % n for c, n in zip(corner, output.shape, strict=True))
    assert apply_at(image, row + 0, col + 1, UNEVEN).total == output[corner]


# --- Pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["sum", "each", "grey"])
def test_a_row_for_each_kernel_is_drawn(how):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    image = torch.rand(3, 20, 30)
    figure = plot_filters(image, ["sobel-x", gaussian(9, 2.0)], how, at=(5, 6))
    rows = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    titles = [axes.get_title() for axes in rows]
    assert titles[1::3] == ["sobel-x, 3 x 3", "gaussian, 9 x 9"]
    assert titles[0] == titles[3] == "image, 3 x 20 x 30"
    drawn = rows[2].images[0].get_array()
    output = apply_filter(image, "sobel-x", how)
    if how == "each":
        assert drawn.shape == (18, 28, 3)
        middle = np.asarray(drawn)[output.abs().permute(1, 2, 0).numpy() < 1e-3]
        np.testing.assert_allclose(middle, 0.5, atol=1e-3)
    else:
        np.testing.assert_allclose(drawn, output[0].numpy())


# --- Mistakes ------------------------------------------------------------------------------------

IMAGE = torch.zeros(5, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: as_weight("fly"), "kernel must be one of identity, .*, got 'fly'"),
        (lambda: as_weight([]), "kernel must be kernels of one size, got none"),
        (lambda: as_weight(["box", "gaussian"]), r"one size, got \[\(3, 3\), \(5, 5\)\]"),
        (lambda: as_weight(torch.zeros(3)), r"kernel must be \(kH, kW\), got \(3,\)"),
        (lambda: as_weight("box", 0), "in_channels must be at least 1, got 0"),
        (lambda: as_weight("box", 3, "mean"), "how must be one of sum, each, grey, got 'mean'"),
        (lambda: as_weight("box", 1, "grey"), "how='grey' needs 3 in_channels.* got 1"),
        (lambda: box(0), "size must be at least 1, got 0"),
        (lambda: gaussian(3, 0.0), r"sigma must be above 0 and finite, got 0\.0"),
        (lambda: gaussian(4, 1e-3), r"sigma is too small for a kernel of 4 x 4, got 0\.001"),
        (lambda: apply_filter(IMAGE[0], "box"), r"image must be \(H, W\), .* got \(6,\)"),
        (lambda: apply_filter(IMAGE[:2], "box"), r"as the kernel, \(3, 3\), got \(2, 6\)"),
        (lambda: apply_filter(IMAGE, "box", padding="same"), "padding must be one of valid, "),
        (
            lambda: apply_filter(IMAGE[:2], gaussian(5), padding="reflect"),
            r"padding='reflect' .* must be at least \(3, 3\), got \(2, 6\)",
        ),
        (lambda: apply_at(IMAGE, 0, 1, "box"), "row must be from 1 to 3 and col from 1 to 4"),
        (lambda: apply_at(IMAGE, 3, 5, "box"), "got 3, 5"),
        (lambda: apply_at(IMAGE, 1, 1, "box", "each"), "how must be 'sum' or 'grey'"),
        (lambda: apply_at(IMAGE[None, None], 1, 1, "box"), r"image must be \(H, W\) or \(C, H, W"),
        (lambda: apply_by_loops(IMAGE[:2], "box"), r"as the kernel, \(3, 3\), got \(2, 6\)"),
        (lambda: plot_filters(torch.zeros(2, 5, 6), "box"), r"\(3, H, W\), got \(2, 5, 6\)"),
    ],
    ids=range(20),
)
def test_mistakes_name_argument_and_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_kernel_of_another_type_is_named():
    with pytest.raises(TypeError, match="kernel must be a name, a Filter or a tensor, got int"):
        as_weight([3])


# --- The command ---------------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path):
    image_module = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    image_module.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_list_shows_every_kernel(capsys):
    assert main(["filter", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in FILTERS)
    assert str(FILTERS).count("\n\n") == len(FILTERS) - 1
    assert max(map(len, str(FILTERS).splitlines())) <= 100


def test_what_came_of_a_picture_is_said_and_drawn(capsys, picture, tmp_path):
    out = tmp_path / "new" / "drawn.png"
    args = ["filter", str(picture), "--kernel", "sobel-y", "gaussian", "--colour", "grey"]
    assert main([*args, "--size", "5", "--at", "4,6", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    image = read_picture(picture)
    output = apply_filter(image, "sobel-y", "grey")
    assert f"sobel-y: 1 x 10 x 14, from {output.min():.3f} to {output.max():.3f}" in said
    assert "gaussian: 1 x 8 x 12, " in said
    assert str(apply_at(image, 4, 6, "sobel-y", "grey")) in said
    assert said.splitlines()[-1] == str(out)
    assert out.read_bytes().startswith(b"\x89PNG")


def test_each_channel_is_written_out_by_itself(capsys, picture):
    assert main(["filter", str(picture), "--colour", "each", "--at", "4,6"]) == 0
    said = capsys.readouterr().out
    for name, channel in zip(("red", "green", "blue"), read_picture(picture), strict=True):
        assert f"top-edge at 4, 6, {name}:\n{apply_at(channel, 4, 6, 'top-edge')}" in said


def test_a_sample_and_a_digit(capsys):
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    assert main(["filter", "camera"]) == 0
    assert capsys.readouterr().out.startswith("camera: 1 x 512 x 512, from 0.000 to 1.000")
    assert main(["filter", "--padding", "zeros", "--digit", "3"]) == 0
    assert "top-edge: 1 x 28 x 28" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nosuch.png"], "IMAGE nosuch.png: No such file or directory; samples are astronaut, "),
        ([__file__], "not a picture that Pillow can read"),
        (["--kernel", "fly"], "--kernel must be of identity, "),
        (["--sigma", "2"], "--sigma is of the kernel gaussian"),
        (["--size", "3"], "--size is of the kernels box and gaussian"),
        (["--kernel", "box", "--size", "0"], "--size must be at least 1, got 0"),
        (["--kernel", "gaussian", "--sigma", "-1"], "--sigma must be above 0 and finite, got -1.0"),
        (
            ["camera", "--kernel", "box", "--size", "513"],
            "image must be at least as large as the kernel",
        ),
        (
            ["camera", "--colour", "grey"],
            "--colour grey is of a colour picture, and camera has one ",
        ),
        (["--at", "3"], "--at must be ROW,COL, got 3"),
        (["camera", "--at", "0,0"], "row must be from 1 to 510 and col from 1 to 510"),
        (["--digit", "-1"], "--digit must be from 0 to "),
        (["camera", "--out", "picture.nosuch"], "--out: picture.nosuch: "),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, args, message):
    if "camera" in args:
        pytest.importorskip("skimage", reason="scikit-image is not installed")
    assert main(["filter", *args]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("convext filter: ")
    assert err.count("\n") == 1
