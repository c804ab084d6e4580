"""Which builds of convext may be loaded beside which torch."""

import pytest
import torch

from convext import _build_check, _built_with


@pytest.mark.parametrize(
    ("built", "imported"),
    [
        (("2.13.0+cpu", None), ("2.13.0+cpu", None)),
        (("2.13.0+cpu", None), ("2.13.1+cu130", "13.0")),  # CPU kernels: any variant
        (("2.13.0+cu130", "13.0"), ("2.13.1+cu132", "13.2")),
    ],
)
def test_builds_that_go_together(built, imported):
    assert _build_check.mismatch(*built, *imported) is None


@pytest.mark.parametrize(
    ("built", "imported", "reason"),
    [
        (("2.13.0", None), ("2.14.1", None), "against torch 2.13.0 but this is torch 2.14.1"),
        (("2.1.0", None), ("2.13.0", None), "against torch 2.1.0 but this is torch 2.13.0"),
        (
            ("2.13.0", "13.0"),
            ("2.13.0+cpu", None),
            "CUDA 13.0 but torch 2.13.0+cpu has no CUDA",
        ),
        (("2.13.0", "13.0"), ("2.13.0", "12.8"), "for CUDA 13.0 but torch 2.13.0 has CUDA 12.8"),
    ],
)
def test_builds_that_do_not(built, imported, reason):
    assert reason in _build_check.mismatch(*built, *imported)


def test_mismatch_is_one_sentence_that_tells_how_to_rebuild(monkeypatch):
    monkeypatch.setattr(_built_with, "TORCH", "1.13.1")
    with pytest.raises(ImportError) as caught:
        _build_check.check_build()
    message = str(caught.value)
    assert message == (
        f"convext was built against torch 1.13.1 but this is torch {torch.__version__}: rebuild it "
        "with `pip install --no-build-isolation --no-deps --force-reinstall .` in convext's source "
        "folder"
    )


def test_the_build_in_use_passes():
    _build_check.check_build()
