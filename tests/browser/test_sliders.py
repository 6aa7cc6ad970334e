"""JupyterLab in a real browser: run a notebook, move its sliders until the picture changes, type at
the chat."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest

pytestmark = pytest.mark.browser
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
        page = browser.new_page(viewport=dict(width=1280, height=1000))
        page.set_default_timeout(120_000)
        page.add_locator_handler(
            page.locator(".jp-Dialog"), lambda dialog: dialog.locator(".jp-mod-accept").click()
        )  # which kernel? this one
        yield page
        page.screenshot(path=SHOTS / "last.png")  # if a test failed, this shows why
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


def wait(page, true, seconds, what):
    "Until it is true."
    end = time.time() + seconds
    while not true():
        assert time.time() < end, f"{what} after {seconds} s"
        page.wait_for_timeout(200)


def run_all(page, url, name):
    "Open the notebook and run all of its cells."
    page.goto(f"{url}/lab/tree/{name}?reset")
    idle = page.locator("#jp-main-statusbar", has_text="| Idle")
    error = page.locator('[data-mime-type="application/vnd.jupyter.error"]')
    prompts = lambda: "".join(page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts())
    for _ in range(5):  # a kernel that is still connecting drops what it was asked to run
        idle.wait_for()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.locator('.lm-Menu-item[data-command="runmenu:run-all"]').click()
        page.wait_for_timeout(2000)
        wait(page, lambda: "*" not in prompts() or error.count(), 300, "cells still running")
        if re.search(r"\d", prompts()):
            break
    assert error.count() == 0, "a cell raised an error"
    assert "[ ]" not in prompts(), "not all cells have run"


@pytest.mark.parametrize("name", ["05_rope", "06_attention"])
def test_moving_a_slider_changes_the_picture(page, lab, name):
    run_all(page, lab, f"{name}.ipynb")
    knobs = page.locator(".widget-interact", has=page.locator("img")).locator(".noUi-handle")
    assert knobs.count(), f"{name} has no slider"
    for i in range(knobs.count()):
        knob = knobs.nth(i)
        box = knob.locator("xpath=ancestor::*[contains(@class, 'widget-interact')]")
        picture = lambda box=box: [
            img.get_attribute("src") for img in box.locator(".widget-output img").all()
        ]
        knob.scroll_into_view_if_needed()
        page.screenshot(path=SHOTS / f"{name}-{i}-before.png")
        before, value = picture(), knob.get_attribute("aria-valuenow")
        assert len(before) == 1
        knob.press(
            "ArrowRight"
            if float(value) < float(knob.get_attribute("aria-valuemax"))
            else "ArrowLeft"
        )
        assert knob.get_attribute("aria-valuenow") != value, "the slider did not move"
        wait(
            page,
            lambda: picture() not in ([], before),
            60,
            f"slider {i} moved, and its picture is the same",
        )
        page.screenshot(path=SHOTS / f"{name}-{i}-after.png")


def test_the_chat_widget_answers(page, lab):
    run_all(page, lab, "10_chat.ipynb")
    line = page.locator('input[placeholder="say something, then Enter"]')
    chat = page.locator(".widget-vbox", has=line)
    for question, answer in (
        ("Hello!", "Tell me who is where"),
        ("Max is in the attic. Anna is in the garden. Where is Max?", "In the attic."),
    ):
        line.scroll_into_view_if_needed()
        line.fill(question)
        line.press("Enter")
        wait(
            page,
            lambda answer=answer: answer in chat.inner_text(),
            60,
            f"{answer!r} is not in {chat.inner_text()!r}",
        )
        assert question in chat.inner_text()
        wait(page, lambda: line.input_value() == "", 10, "the line is not empty again")
    page.screenshot(path=SHOTS / "chat.png")
