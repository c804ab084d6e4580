"""Installing from source, as a user does: pip's isolation on, into a venv that has a torch.

One source distribution is unpacked and built once; every test works on what came of that.
"""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow

USE_OUTSIDE_THE_SOURCES = """
import convext, torch
x = torch.randn(2, 3, 8, 6, dtype=torch.float64, requires_grad=True)
ours, stock = convext.Conv2d(3, 4, 3, dtype=x.dtype), torch.nn.Conv2d(3, 4, 3, dtype=x.dtype)
stock.load_state_dict(ours.state_dict())
for layer in (ours, stock):
    layer(x).square().sum().backward()
torch.testing.assert_close(ours(x), stock(x))
torch.testing.assert_close(ours.weight.grad, stock.weight.grad)
print(convext.__file__)
"""


def run(*command, cwd, check=True, **env):
    """Run a command without the environment's Python settings; its output on failure."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    kept["CFLAGS"] = "-O0"  # how well the library is optimized plays no part here, how soon does
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if check and done.returncode != 0:
        pytest.fail(f"{command} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """A source distribution, made where torch cannot be imported: it must not need one."""
    folder = tmp_path_factory.mktemp("sdist")
    build = (
        "import sys; sys.modules['torch'] = None;"
        f"import convext_build; convext_build.build_sdist({str(folder)!r})"
    )
    run(sys.executable, "-c", build, cwd=ROOT, PYTHONPATH=str(ROOT / "build_backend"))
    (archive,) = folder.iterdir()
    return archive


@pytest.fixture(scope="module")
def source(sdist, tmp_path_factory):
    """The source tree as the distribution holds it."""
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    return tree


@pytest.fixture(scope="module")
def user_venv(tmp_path_factory):
    """A fresh venv that has this environment's torch (and what that needs), but no convext."""
    folder = tmp_path_factory.mktemp("user") / "venv"
    venv.create(folder, with_pip=True)
    # A path in a .pth file is searched, but .pth files in it are not followed: an editable
    # convext of this environment stays out.
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    site_packages(folder).joinpath("torch_of_the_tests.pth").write_text("\n".join(sorted(paths)))
    return folder


def site_packages(venv_folder):
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return venv_folder / "lib" / version / "site-packages"


@pytest.fixture(scope="module")
def pip_output(source, user_venv):
    """`pip install .`, whose result the tests look at; what pip said."""
    return run(user_venv / "bin/python", "-m", "pip", "install", "-v", ".", cwd=source)


def test_sdist_holds_what_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    needed = {
        "pyproject.toml",
        "setup.py",
        "LICENSE",
        "README.md",
        "build_backend/convext_build.py",
    }
    for folder in ("csrc", "convext", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".cpp", ".h", ".cu", ".py") and path.name != "_built_with.py":
                needed.add(path.relative_to(ROOT).as_posix())
    assert needed <= held
    assert not [name for name in held if name.endswith(("_built_with.py", ".so", ".o", ".pyc"))]


def test_pip_builds_against_the_torch_that_is_there(pip_output, user_venv, tmp_path):
    assert f"building against the environment's torch {torch.__version__}" in pip_output
    assert "Collecting torch" not in pip_output
    assert not (site_packages(user_venv) / "torch").exists()
    show = "from convext._built_with import TORCH; import torch; print(TORCH, torch.__file__)"
    printed = run(user_venv / "bin/python", "-c", show, cwd=tmp_path)
    assert printed.split() == [torch.__version__, torch.__file__]


def test_installed_package_works_outside_the_sources(pip_output, user_venv, tmp_path):
    printed = run(user_venv / "bin/python", "-c", USE_OUTSIDE_THE_SOURCES, cwd=tmp_path)
    assert Path(printed.strip()).is_relative_to(user_venv)
    assert "usage: " in run(user_venv / "bin/python", "-m", "convext", "--help", cwd=tmp_path)
    assert "usage: " in run(user_venv / "bin/convext", "--help", cwd=tmp_path)


def test_library_needs_no_runtime_of_its_own(pip_output, user_venv, tmp_path):
    """Threads are those of torch's OpenMP runtime: a second one must not come along."""
    count = (
        "import os, re, convext;"
        "maps = open('/proc/self/maps').read();"
        "print(len(set(re.findall(r'/\\S*(?:gomp|iomp|libomp)\\S*', maps))))"
    )
    if not Path("/proc/self/maps").exists():
        pytest.skip("this system has no /proc/self/maps to list the loaded libraries")
    assert run(user_venv / "bin/python", "-c", count, cwd=tmp_path).strip() == "1"


def test_another_torch_is_named_before_the_library_loads(pip_output, user_venv, tmp_path):
    """With the record of another torch, import ends in one sentence; the library stays unloaded."""
    package = site_packages(user_venv) / "convext"
    record = package / "_built_with.py"
    (library,) = package.glob("_C.*")
    original, hidden = record.read_text(), library.with_name("hidden")
    record.write_text(original.replace(torch.__version__, "1.13.1+cpu"))
    library.rename(hidden)  # would raise an error of its own if it were looked for first
    try:
        printed = run(user_venv / "bin/python", "-c", "import convext", cwd=tmp_path, check=False)
    finally:
        hidden.rename(library)
        record.write_text(original)
    last = printed.strip().splitlines()[-1]
    versions = f"built against torch 1.13.1+cpu but this is torch {torch.__version__}"
    assert last.startswith(f"ImportError: convext was {versions}: ")
    assert "pip install" in last


def test_editable_install_runs_the_sources(pip_output, source, user_venv, tmp_path):
    """Without isolation here, with it above: the objects of that build serve again."""
    python = user_venv / "bin/python"
    ninja_first = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    install = ("-m", "pip", "install", "-v", "--no-build-isolation", "-e", ".")
    assert "ninja: no work to do" in run(python, *install, cwd=source, PATH=ninja_first)
    printed = run(python, "-c", USE_OUTSIDE_THE_SOURCES, cwd=tmp_path)
    assert Path(printed.strip()) == source / "convext" / "__init__.py"
    assert f'TORCH = "{torch.__version__}"' in (source / "convext/_built_with.py").read_text()
