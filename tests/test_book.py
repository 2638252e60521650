"The built book as a reader's browser sees it: complete, safe, offline, on a phone and in the dark."
import json, os, re, shutil
from html.parser import HTMLParser

import nbformat
import pytest
from conftest import browser, needs_browser, until
from hypothesis import given, settings, strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from neurocodec.book import log, press
from neurocodec.core.run import UserError, root

EVIL = '</td></table><script>alert(1)</script><img src="https://evil.org/x.png" onerror="alert(2)"> $$\\href{javascript:alert(3)}{x}$$'
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
FINISHED = {"end_time": "2026-11-21T10:00:00", "exception": None}
PLOT = {"data": [{"y": [1, 3, 2], "text": ["</script>" + EVIL] * 3, "type": "scatter"}], "layout": {"title": {"text": "drawn"}}}


def executed(title, papermill=FINISHED):
    "An executed chapter whose corpus and model were hostile, with every kind of output."
    outputs = [
        new_output("stream", name="stdout", text=EVIL),
        new_output("stream", name="stderr", text="progress 10 %"),
        new_output("display_data", {"text/html": f"<table><tr><td>{EVIL}</td></tr></table>"}),
        new_output("display_data", {"text/markdown": f"**{EVIL}**"}),
        new_output("display_data", {"image/png": PIXEL}),
        new_output("display_data", {"image/svg+xml": '<svg xmlns="http://www.w3.org/2000/svg"><script>alert(4)</script></svg>'}),
        new_output("display_data", {"application/javascript": "alert(5)"}),
        new_output("display_data", {press.WIDGET: {"model_id": "x"}, "text/plain": "Widget()"}),
        new_output("display_data", {press.PLOTLY: PLOT}),
    ]
    cells = [
        new_code_cell("#| default_exp toy.x"),
        new_markdown_cell(f"# {title}\n> A claim about zebrafinch features."),
        new_code_cell("k = 1  # features", metadata={"tags": ["parameters"]}),
        new_code_cell("k = 2", metadata={"tags": ["injected-parameters"]}),
        new_markdown_cell("## Idea\nDefined in the chapter."),
        new_code_cell("#| export\ndef secret_library_code(): ..."),
        new_markdown_cell("## Experiment\nWith $a^2 + b^2$:"),
        new_code_cell("#| fig-cap: A caption.\ndraw()", outputs=outputs),
        new_markdown_cell("## What it means\nThe end."),
    ]
    return new_notebook(cells=cells, metadata={"papermill": papermill, "widgets": {"x": 1}})


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    "Two runs beside each other on the repository's own chapters, one node of them unfinished and one failed."
    top = tmp_path_factory.mktemp("book")
    for run, day in (("nano", 22), ("nano-full", 21)):
        for e in log.read_run(log.toy_run(top / "results" / run, day)):
            nbformat.write(executed("Quality" if e.layer else "Text"), e.folder / f"{e.chapter}.ipynb")
    manifest = json.loads((top / "results/nano/L3/14_quality/manifest.json").read_text())
    manifest["params"]["corpus"] = EVIL
    (top / "results/nano/L3/14_quality/manifest.json").write_text(json.dumps(manifest))
    half = top / "results/nano-full/L3/14_quality/14_quality.ipynb"
    nbformat.write(executed("Quality", {"end_time": None, "exception": None}), half)
    failed = executed("Training", {"end_time": "t", "exception": True})
    failed.cells[7].outputs = [new_output("error", ename="UserError", evalue="layer 9 of 6 <b>is</b> out of range", traceback=[])]
    nbformat.write(failed, top / "results/nano/L2/13_train.failed.ipynb")
    shutil.copytree(root() / "nbs", top / "nbs")
    start = sum(os.times()[:4])
    index = press.build(press.stage(top / "results", top / "nbs", root() / "book", top / "out"))
    seconds = sum(os.times()[:4]) - start
    return top, press.compose(top / "results", top / "nbs", root() / "book"), index, seconds


def docs(pages):
    return {p.path.rsplit(".", 1)[0] for p in pages}


def test_every_page_of_the_contents_is_there(book):
    top, pages, index, _ = book
    assert [d for d in docs(pages) if not (index.parent / f"{d}.html").is_file()] == []
    chapters = {p.stem for p in (top / "nbs").glob("[0-9][0-9]_*.ipynb")}
    assert {d.split("/")[1] for d in docs(pages) if d.startswith("chapters/")} == chapters
    assert {"runs/nano/index", "runs/nano/L2/14_quality", "runs/nano-full/L2/14_quality", "log", "criteria", "departures", "intro"} <= docs(pages)


def test_sphinx_has_nothing_to_complain_about(book):
    text = (book[0] / "out/_build/build.log").read_text()
    assert [line for line in text.splitlines() if re.search(r"WARNING|ERROR", line)] == []


def test_it_is_built_in_a_minute(book):
    "Of processor time, the build's own process included: it runs on one core, and others may be busy."
    assert book[3] < 60


def test_only_finished_runs_have_pages(book):
    top, pages, index, _ = book
    assert not {"runs/nano-full/L3/14_quality", "runs/nano/L2/13_train"} & docs(pages)
    summary = (index.parent / "runs/nano/index.html").read_text()
    assert "layer 9 of 6 &lt;b&gt;is&lt;/b&gt; out of range" in summary


def test_titles_tell_runs_and_layers_apart(book):
    _, pages, index, _ = book
    titles = [re.search(r"<title>(.*?)</title>", (index.parent / f"{d}.html").read_text(), re.S)[1] for d in docs(pages)]
    assert len(set(titles)) == len(titles)
    assert any("nano-full · layer 2 · Quality" in t for t in titles)


def test_library_code_is_folded_in_chapters_and_absent_from_runs(book):
    _, pages, index, _ = book
    chapter = (index.parent / "chapters/51_log.html").read_text()
    assert "Show code: toy_run" in chapter and "#| export" not in chapter and "default_exp" not in chapter
    page = (index.parent / "runs/nano/L2/14_quality.html").read_text()
    assert "secret_library_code" not in page and "k = 2" not in page and "progress 10 %" not in page and "The end." in page


class Elements(HTMLParser):
    "Start tags of a page, and the text inside its script elements that a browser would execute."
    def __init__(self, text):
        super().__init__()
        self.tags, self.code, self.running = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.running = tag == "script" and dict(attrs).get("type", "text/javascript") != "application/json"

    def handle_endtag(self, tag):
        self.running = False

    def handle_data(self, data):
        if self.running: self.code += data


def acting(tags):
    "Whatever in these elements could act or load by itself."
    return [(t, k, v) for t, a in tags for k, v in a.items()
            if k.startswith("on") or re.match(r"\s*(javascript|vbscript|data:text)", v or "", re.I) or (k == "src" and "evil" in (v or ""))]


def test_text_from_corpus_and_model_stays_text(book):
    _, pages, index, _ = book
    for d in docs(pages):
        page = Elements((index.parent / f"{d}.html").read_text())
        assert "alert(" not in page.code, d
        assert acting(page.tags) == [], d
    page = (index.parent / "runs/nano/L3/14_quality.html").read_text()
    assert page.count("&lt;script&gt;alert(1)") >= 3


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["<", ">", "</", "/>", "script", "svg", "style", "img", " src=", " onload=", " href=", "'", '"', "javascript:", "java\tscript:",
                                 "//evil.org", "/", "\\", "evil.org", "x", " ", "\n", "\t", "&#47;", "&bsol;", "&#106;", "<!--", "-->", "<![CDATA[", "math", "title", "table", "td", "url(", "=", ";", "`"]), max_size=30).map("".join))
def test_no_html_gets_past_the_filter(html):
    page = Elements(press.safe_html(html))
    assert {t for t, _ in page.tags} <= press.TAGS
    as_read = lambda v: re.sub(r"[\x00-\x20]", "", v or "").replace("\\", "/")  # what a browser makes of an address
    assert acting(page.tags) == [] and not any(re.match(r"(https?:)?//", as_read(v)) for _, a in page.tags for v in a.values())


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(["/", "\\", ".", "evil.org", "https:", "javascript:", " ", "\t", "\n", "&#47;", "&sol;", "&bsol;", "&Tab;", "&#58;", "x"]), max_size=8).map("".join))
def test_no_link_leaves_the_book(address):
    for _, a in Elements(press.safe_html(f'<a href="{address}">x</a>')).tags:
        as_read = re.sub(r"[\x00-\x20]", "", a.get("href") or "").replace("\\", "/")  # what a browser makes of an address
        assert not re.match(r"[\w+.-]+:|//", as_read), address


def test_nothing_is_loaded_from_outside(book):
    html = book[2].parent
    assert press.outside(html) == []
    assert [p.name for p in html.rglob("*.html") if "unpkg" in p.read_text() or "jsdelivr" in p.read_text()] == []


def test_a_second_press_sets_only_what_changed(book):
    top, pages, index, _ = book
    times = lambda: {p: p.stat().st_mtime_ns for d in docs(pages) for p in [index.parent / f"{d}.html"]}
    before = times()
    again = lambda: press.build(press.stage(top / "results", top / "nbs", root() / "book", top / "out"))
    again()
    assert times() == before
    nb = executed("Quality")
    nb.cells[-1].source += " Or not."
    nbformat.write(nb, top / "results/nano/L2/14_quality/14_quality.ipynb")
    again()
    touched = {p.relative_to(index.parent).as_posix() for p, t in times().items() if t != before[p]}
    assert {"runs/nano/L2/14_quality.html"} <= touched <= {"runs/nano/L2/14_quality.html", "runs/nano/L2/index.html", "intro.html"}  # it, and what lists it


def test_a_missing_page_is_one_clear_line(book, tmp_path):
    shutil.copytree(book[0] / "out", tmp_path / "out", ignore=shutil.ignore_patterns("chapters", "runs", "_build"))
    (tmp_path / "out/_toc.yml").write_text("format: jb-book\nroot: intro\nparts:\n- caption: P\n  chapters:\n  - file: criteria\n  - file: ghost\n")
    with pytest.raises(UserError) as e: press.build(tmp_path / "out")
    assert "ghost" in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(UserError, match="_config.yml: no such file"): press.stage(tmp_path, root() / "nbs", tmp_path, tmp_path / "x")


def test_a_repository_without_results_has_a_book(tmp_path):
    out = press.stage(tmp_path / "none", root() / "nbs", root() / "book", tmp_path / "out")
    text = (out / "intro.md").read_text()
    assert "make book" in text and "<!--" not in text and not (out / "runs").exists()


def test_criteria_keep_their_names():
    "Other programs read criteria.json by these ids."
    assert {"sae.ev", "sae.l0", "sae.mse", "sae.dead", "sae.duplicates", "sae.ce_recovered", "decoder.kl", "decoder.accuracy_loss",
            "labels.share", "gates.precision", "recovery.collapsed_baselines"} <= {c.id for c in log.CRITERIA}
    rows = log.criteria([])
    assert {"id", "claim", "definition", "target", "value", "low", "high", "n", "control", "verdict", "chapter"} <= set(rows[0])
    assert {r["verdict"] for r in rows} == {"not yet measured"}


# --- in a browser -------------------------------------------------------------------------------------------------

# where nobody looks at the result, a missing browser must not pass for a good page: there the test runs and fails
@needs_browser
@pytest.mark.parametrize("phone, dark", [(False, False), (True, True)])
def test_in_a_browser(book, phone, dark):
    _, pages, index, _ = book
    driver = browser(phone, dark)
    try:
        for page in ("intro", "criteria", "log", "runs/nano/index", "chapters/51_log"):
            driver.get(f"file://{index.parent}/{page}.html")
            assert until(driver, "document.readyState == 'complete'")
            if phone: assert driver.execute_script("return document.documentElement.scrollWidth") <= 391, page
        driver.get(f"file://{index.parent}/intro.html")
        seen = until(driver, "[...document.querySelectorAll('.nc-picture svg')].filter(s => s.getBoundingClientRect().height > 0).length")
        size = driver.execute_script("""const s = [...document.querySelectorAll('.nc-picture svg')].find(s => s.getBoundingClientRect().height > 0);
            return Math.min(...[...s.querySelectorAll('text')].map(t => t.getBoundingClientRect().height))""")
        assert seen == 1 and size >= 11
        ink, ground = driver.execute_script("const lum = c => c.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0);"
                                            "return [lum(getComputedStyle(document.querySelector('.nc-picture svg')).color), lum(getComputedStyle(document.body).backgroundColor)]")
        assert (ink > ground + 300) if dark else (ground > ink + 300)
        driver.get(f"file://{index.parent}/runs/nano/L2/14_quality.html")
        assert until(driver, "document.querySelectorAll('.nc-plotly svg.main-svg').length"), "plotly did not draw"
        assert until(driver, "document.querySelectorAll('mjx-container svg').length"), "MathJax did not draw"
        assert driver.execute_script("return [...document.querySelectorAll('.cell_output mjx-container')].length") == 0
        driver.get(f"file://{index.parent}/search.html?q=zebrafinch")
        assert until(driver, "document.querySelectorAll('#search-results li').length >= 3"), "the search found nothing"
        requests = {json.loads(e["message"])["message"]["params"]["request"]["url"] for e in driver.get_log("performance") if 'Network.requestWillBeSent"' in e["message"]}
        assert requests and [u for u in requests if not u.startswith(("file:", "data:", "blob:"))] == []
        assert [e["message"] for e in driver.get_log("browser") if e["level"] == "SEVERE"] == []
    finally:
        driver.quit()
