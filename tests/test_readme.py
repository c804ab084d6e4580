"""The README names tests and files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(test_\w+\.py::test_\w+)`", README))))
def test_named_tests_exist(name):
    file, function = name.split("::")
    assert f"\ndef {function}(" in (ROOT / "tests" / file).read_text()


def test_named_sources_exist():
    named = set(re.findall(r"\b(?:csrc|convext|benchmarks|tests)/[\w/]+\.(?:cpp|h|py)\b", README))
    assert named
    assert not [path for path in named if "NAME" not in path and not (ROOT / path).exists()]
