"""JupyterLab in a real browser, over a copy of the notebooks."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
from lab import leave

ROOT = Path(__file__).resolve().parents[2]
SHOTS = Path(__file__).parent / "shots"  # what the pages looked like; not in git
NAMES = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
FLAGS = (
    "--no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run "
    "--disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="module")
def page():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no Playwright here: pip install -e '.[browser]'"
    )
    SHOTS.mkdir(exist_ok=True)
    found = [
        shutil.which(n)
        for n in ([os.environ["CHROMIUM"]] if "CHROMIUM" in os.environ else [*NAMES, MAC])
    ]
    program = next(filter(None, found), None)
    if not program:
        pytest.skip("no browser here: install chromium, or name one with CHROMIUM=/path/to/it")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=program, args=FLAGS)
        page = browser.new_page(viewport=dict(width=1280, height=800))
        page.set_default_timeout(120_000)
        page.add_locator_handler(
            page.locator(".jp-Dialog"), lambda dialog: dialog.locator(".jp-mod-accept").click()
        )  # which kernel? this one
        yield page
        browser.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab over a copy of the notebooks, with settings of its own. Gives its address."
    home = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "nbs", home / "nbs")
    announcements = {"@jupyterlab/apputils-extension:announcements": True}
    tracker = "lab/user-settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    settings = {
        "labconfig/page_config.json": {"disabledExtensions": announcements},
        tracker: {"windowingMode": "none"},
    }
    for name, content in settings.items():
        text = json.dumps(content)
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {
        f"JUPYTER_{k}_DIR": str(home / d)
        for k, d in dict(CONFIG="", DATA="data", RUNTIME="run").items()
    }
    command = [
        sys.executable,
        "-m",
        "jupyter",
        "lab",
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=",
        f"--ServerApp.root_dir={home / 'nbs'}",
    ]
    with open(home / "log", "w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    for _ in range(240):
        if server.poll() is not None:
            pytest.fail((home / "log").read_text())
        try:
            urlopen(f"{url}/api").close()
            break
        except OSError:
            time.sleep(0.5)
    yield url
    server.terminate()
    server.wait(60)


@pytest.fixture(autouse=True)
def no_kernel_stays(page, lab):
    "After each test the notebook's kernel is shut down."
    yield
    page.screenshot(path=SHOTS / "last.png")  # if the test failed, this shows why
    leave(page, lab)
