"""Every chapter runs top to bottom with its own small defaults, from another working directory, without a run made before."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from neurocodec.core.engine import what_failed

CHAPTERS = sorted(p.stem for p in (ROOT / "nbs").glob("[0-9]*.ipynb"))


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter(chapter, tmp_path):
    out = tmp_path / f"{chapter}.ipynb"
    command = [sys.executable, "-m", "papermill", "-k", "python3", "--no-progress-bar", ROOT / "nbs" / f"{chapter}.ipynb", out]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=900)
    assert done.returncode == 0, what_failed(out) if out.exists() else done.stderr[-2000:]
    ran = json.loads(out.read_text())["metadata"]["papermill"]
    assert ran["end_time"] and not ran["exception"]
    assert not list(Path(tmp_path).glob("**/.*.part")), "a chapter writes to its node only"
