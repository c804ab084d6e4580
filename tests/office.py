"""LibreOffice without a window, which computes workbooks anew."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

SOFFICE = shutil.which("soffice") or shutil.which("libreoffice")


def recalculated(workbooks: Sequence[Path], folder: Path) -> list[Path]:
    """Has LibreOffice open, compute and save workbooks; in one run, for it takes long to start.

    Args:
        workbooks: *.xlsx, with names of their own.
        folder: for the results and for a user's profile, so that no other instance is met.

    Returns:
        Workbooks of the same names, which hold results beside formulas.
    """
    results = folder / "computed"
    profile = (folder / "profile").resolve().as_uri()
    command = [SOFFICE, f"-env:UserInstallation={profile}", "--headless", "--convert-to", "xlsx"]
    run = subprocess.run(
        [*command, "--outdir", str(results), *map(str, workbooks)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    paths = [results / workbook.name for workbook in workbooks]
    assert all(path.exists() for path in paths), f"{SOFFICE}: {run.stdout}{run.stderr}"
    return paths
