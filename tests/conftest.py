"""Tests check what a chapter cannot show about itself; what it can, it checks in its own cells (test_chapters runs them)."""
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
os.environ.setdefault("NEUROCODEC_QUIET", "1")


@pytest.fixture(scope="session", autouse=True)
def scratch_place(tmp_path_factory):
    """Try-outs of all test processes share one temporary place, and none is left behind in the repository."""
    place = tmp_path_factory.getbasetemp().parent / "scratch"
    os.environ["NEUROCODEC_SCRATCH"] = str(place)
    return place


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty results folder for one test."""
    monkeypatch.setenv("NEUROCODEC_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"
