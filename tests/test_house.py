"""The repository's own rules: the library is what the chapters export, chapters are clean, parameter files are valid."""
import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from neurocodec.core.engine import ALL_LAYERS, FOLLOWS, jobs, model_shape
from neurocodec.core.run import knobs, read_params, source

CHAPTERS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
PARTS = ["core", "sae", "decoder", "codec", "resonance", "book"]


def cells(path):
    return json.loads(path.read_text(encoding="utf8"))["cells"]


def test_library_is_what_the_chapters_export(tmp_path):
    for name in ("nbs", "settings.ini", "pyproject.toml"):
        src = ROOT / name
        shutil.copytree(src, tmp_path / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints")) if src.is_dir() else shutil.copy(src, tmp_path)
    (tmp_path / "neurocodec").mkdir()
    (tmp_path / "neurocodec" / "__init__.py").write_text((ROOT / "neurocodec" / "__init__.py").read_text())
    subprocess.run([Path(sys.executable).parent / "nbdev_export"], cwd=tmp_path, check=True, capture_output=True)
    fresh = {p.relative_to(tmp_path): p.read_text() for p in (tmp_path / "neurocodec").rglob("*.py")}
    ours = {p.relative_to(ROOT): p.read_text() for p in (ROOT / "neurocodec").rglob("*.py")}
    assert fresh.keys() == ours.keys()
    assert [str(k) for k in fresh if fresh[k] != ours[k]] == [], "run nbdev_export"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_chapter_anatomy(path):
    all_cells = cells(path)
    assert not any(c.get("outputs") or c.get("execution_count") for c in all_cells if c["cell_type"] == "code"), "run nbdev_clean"
    tagged = [c for c in all_cells if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    assert all(k.help for k in knobs(path.stem).values()), "every knob has a comment with unit and reason"
    prose = [source(c) for c in all_cells if c["cell_type"] == "markdown"]
    assert prose[0].startswith("# ") and "\n> " in prose[0]
    assert any(p.startswith("## What it means") for p in prose)
    code = [source(c) for c in all_cells if c["cell_type"] == "code"]
    if not path.stem.startswith("6"):
        assert code[0].startswith("#| default_exp ")
        assert any(f'open_node("{path.stem}", globals())' in c for c in code) and any("node.finish()" in c for c in code)


def test_parts_import_downwards_only():
    for path in (ROOT / "neurocodec").rglob("*.py"):
        part = path.relative_to(ROOT / "neurocodec").parts[0]
        if part not in PARTS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("neurocodec."):
                other = node.module.split(".")[1]
                assert PARTS.index(other) <= PARTS.index(part), f"{path} imports {node.module}"


@pytest.mark.parametrize("path", sorted((ROOT / "params").glob("*.yaml")), ids=lambda p: p.stem)
def test_parameter_files_make_a_graph_that_can_finish(path):
    "No chapter is left without one that it reads, at its layer; 42 has a block above the one it clamps."
    todo = jobs(p := read_params(path))
    names = [j.name for j in todo]
    assert len(names) == len(set(names)) and all(n in names[: names.index(j.name)] for j in todo for n in j.needs)
    for j in todo:
        if j.chapter == "51_log": continue  # says what there is
        reads = FOLLOWS[j.chapter]
        if j.chapter == "44_recovery": reads = [c for c in reads if c == "02_text" or j.params["codec"] and (c == "13_train" or j.params["themes"])]
        for c in reads:
            layers = [None] if "layer" not in knobs(c) else p.layers if j.layer is None or j.chapter in ALL_LAYERS else [j.layer]
            assert [n for i in layers if (n := c if i is None else f"L{i}/{c}") not in names] == [], f"{j.name} reads a chapter that is skipped"
    if "42_schemas" in names: assert min(p.layers) < model_shape(p.model).layers - 1


def test_every_chapter_of_the_graph_exists():
    stems = {p.stem for p in CHAPTERS}
    assert set(FOLLOWS) <= stems
    order = list(FOLLOWS)
    assert all(order.index(n) < order.index(c) for c, needs in FOLLOWS.items() for n in needs)


def test_constraints_pin_every_requirement():
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    from configparser import ConfigParser
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    import re
    wanted = config["DEFAULT"]["requirements"].split() + config["DEFAULT"]["dev_requirements"].split()
    names = {re.split(r"[<>=!]", r)[0].lower().replace("_", "-") for r in wanted}
    assert names <= pinned, names - pinned


def test_readme_shows_the_criteria_of_the_committed_long_run():
    from neurocodec.book.log import criteria_markdown
    rows = json.loads((ROOT / "results/nano-full/criteria.json").read_text(encoding="utf8"))
    assert criteria_markdown(rows) in (ROOT / "README.md").read_text(encoding="utf8"), "put neurocodec.book.log.criteria_markdown of that file between README.md's result marks"
