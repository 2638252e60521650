"""Tests check what a chapter cannot show about itself; what it can, it checks in its own cells (test_chapters runs them)."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parents[1]
os.environ.setdefault("NEUROCODEC_QUIET", "1")
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
settings.load_profile("patient")


def pytest_collection_modifyitems(items):
    """The two longest files come first, one for each process; what is short fills the end."""
    longest = ["test_chapters", "test_engine"]
    items.sort(key=lambda i: longest.index(i.path.stem) if i.path.stem in longest else len(longest))


@pytest.fixture(scope="session", autouse=True)
def scratch_place(tmp_path_factory):
    """Try-outs of all test processes share one temporary place, and none is left behind in the repository."""
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "scratch"  # never that of an earlier run
    os.environ["NEUROCODEC_SCRATCH"] = str(place)
    return place


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty results folder for one test."""
    monkeypatch.setenv("NEUROCODEC_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


def model_and_text(kind, lengths, T=16):
    """A tiny model of an architecture, and random documents of these lengths packed into contexts of T tokens."""
    import pandas as pd
    import torch
    from neurocodec.core.lm import tiny
    from neurocodec.core.text import Packed, pack
    lm = tiny(kind)
    lm.tokenizer = SimpleNamespace(bos_token_id=1, eos_token_id=2)
    ids = [torch.randint(3, 90, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    return lm, Packed(*pack(ids, T, 1), pd.DataFrame(index=range(len(ids))))


CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER) and not os.environ.get("CI"), reason="needs chromium and chromedriver: apt-get install chromium chromium-driver")
HOSTILE = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"


def browser(phone=False, dark=False, scripts=True, at_once=False):
    """A headless Chromium; `at_once` does not wait for a page to be whole."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for a in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,900"): options.add_argument(a)
    if phone: options.add_experimental_option("mobileEmulation", {"deviceMetrics": {"width": 390, "height": 844, "pixelRatio": 2, "touch": True}})
    if at_once: options.page_load_strategy = "none"
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]})
    if not scripts: driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    return driver


def until(driver, script, seconds=20):
    """Wait until a JavaScript expression is truthy; returns its value, or the last falsy one."""
    end = time.time() + seconds
    while not (value := driver.execute_script(f"return {script}")) and time.time() < end: time.sleep(.05)
    return value


@contextmanager
def open_app(name, run, folder):
    """(driver, wait, foreign) of an app as `neurocodec app` serves it: a browser on its page, a way to wait for what it shows, and the addresses elsewhere that it reached."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log, said = open(folder / "voila.log", "w"), folder / "voila.log"
    server = subprocess.Popen([sys.executable, "-c", "import sys; from neurocodec.book.cli import main; sys.exit(main(sys.argv[1:]))", "app", name, "--run", run, "--port", str(port), "--no-browser"],
                              cwd=ROOT, stdout=log, stderr=log, start_new_session=True, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    driver = None

    def wait(f, what, seconds=150):
        end = time.time() + seconds
        while time.time() < end:
            try:
                if value := f(): return value
            except Exception: pass  # the page is not there yet, or was redrawn under our hands
            time.sleep(.2)
        raise AssertionError(f"{what}; the server said: {said.read_text()[-1500:]}")

    def listens():
        with socket.create_connection(("127.0.0.1", port), 1): return True

    def foreign():
        events = [json.loads(e["message"])["message"] for e in driver.get_log("performance")]
        sent = {e["params"]["requestId"]: e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
        blocked = {e["params"]["requestId"] for e in events if e["method"] == "Network.loadingFailed" and e["params"].get("blockedReason") == "csp"}
        return [u for i, u in sent.items() if u.startswith("http") and not u.startswith(f"http://127.0.0.1:{port}/") and i not in blocked]

    try:
        wait(listens, "nothing listens")
        driver = browser(at_once=True)  # the page is there when the notebook has run
        driver.get(f"http://127.0.0.1:{port}/")
        yield driver, wait, foreign
    finally:
        if driver: driver.quit()
        os.killpg(server.pid, 15)  # the server and the kernels it started
        server.wait(150)
        log.close()
