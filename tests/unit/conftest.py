"""Checkpoints of the scorers, shared by their tests."""

import shutil

import pytest

from tests.scorer_checkpoints import CHECKPOINTS


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("scorers")
    for name, write in CHECKPOINTS.items():
        (root / name).mkdir()
        write(root / name)
    return root


@pytest.fixture
def copy_of(checkpoints, tmp_path):
    """A scorer's checkpoint that a test may spoil."""

    def copy(name):
        return shutil.copytree(checkpoints / name, tmp_path / name)

    return copy
