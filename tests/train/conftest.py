from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from train_cohort import write_cohort


@pytest.fixture(scope="session")
def tiny_cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny tiled cohort with reports."""
    root = tmp_path_factory.mktemp("cohort")
    write_cohort(root)
    return root
