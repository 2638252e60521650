"""Every chapter runs top to bottom with its own small defaults, from another working directory, without a run made before."""
import papermill
import pytest
from conftest import ROOT

from neurocodec.core.engine import what_failed

CHAPTERS = sorted(p.stem for p in (ROOT / "nbs").glob("[0-9]*.ipynb"))


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter(chapter, tmp_path, monkeypatch):
    out = tmp_path / f"{chapter}.ipynb"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    try: ran = papermill.execute_notebook(ROOT / "nbs" / out.name, out, kernel_name="python3", cwd=tmp_path, progress_bar=False, start_timeout=180)
    except papermill.PapermillExecutionError: pytest.fail(what_failed(out))
    assert ran.metadata.papermill["end_time"] and not ran.metadata.papermill["exception"]
    assert not list(tmp_path.glob("**/.*.part")), "a chapter writes to its node only"
