"""Lightning, without what it says of itself."""

from __future__ import annotations

import logging
import warnings


class QuietLightning(warnings.catch_warnings):
    """Within the block, Lightning's tips, adverts and warnings are not shown; errors are."""

    def __enter__(self):
        entered = super().__enter__()
        warnings.filterwarnings("ignore", module=r"lightning\.")
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        return entered
