"The page with a model in it, in Firefox, over WebDriver BiDi. Skipped where there is no Firefox."

import json
import os
import re
import shutil
import subprocess
import time
from base64 import b64decode

import pytest
from conftest import SHOTS

from qwen_nb.page import make_page

pytestmark = pytest.mark.browser
NAMES = "firefox-esr", "firefox"
PLACES = "ask inside off hands memories break".split()
DRAWN = """
({ ask: "#log .verdict", inside: "#next .bar", off: "#asked button", hands: "#dials figure",
   memories: "#growth polyline", break: "#depth polyline" })
"""
UNTIL = """
(async () => {
    for (let n = 0; n < 300; n++) {
        if (CONDITION) return true;
        await new Promise((resume) => setTimeout(resume, 50));
    }
    return false;
})()
"""


@pytest.fixture
def no_kernel_stays():
    "No JupyterLab is needed here."


class Firefox:
    "A Firefox without a window, and what a script says in it."

    def __init__(self, program, profile):
        websocket = pytest.importorskip("websocket", reason="no websocket-client here")
        command = [program, "--headless", "--remote-debugging-port=0", "--no-remote"]
        log = profile / "log"
        with open(log, "w") as told:
            command += ["--profile", profile]
            self.process = subprocess.Popen(command, stdout=told, stderr=told)
        found, begin = None, time.monotonic()
        while not found and time.monotonic() < begin + 60:
            time.sleep(0.1)
            found = re.search(r"BiDi listening on (ws://\S+)", log.read_text())
        if not found:
            self.process.kill()
            pytest.fail(f"Firefox says nothing of WebDriver BiDi: {log.read_text()}")
        self.socket = websocket.create_connection(
            f"{found[1]}/session", timeout=60, suppress_origin=True
        )
        self.number = 0
        self.tell("session.new", capabilities={})
        self.context = self.tell("browsingContext.getTree")["contexts"][0]["context"]

    def tell(self, method, **params):
        self.number += 1
        self.socket.send(json.dumps(dict(id=self.number, method=method, params=params)))
        while (answer := json.loads(self.socket.recv())).get("id") != self.number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def visit(self, address):
        self.tell("browsingContext.navigate", context=self.context, url=address, wait="complete")

    def size(self, width, height=800):
        viewport = dict(width=width, height=height)
        self.tell("browsingContext.setViewport", context=self.context, viewport=viewport)

    def evaluate(self, script):
        script = f"(async () => JSON.stringify((await ({script})) ?? null))()"
        target = dict(context=self.context)
        found = self.tell("script.evaluate", expression=script, target=target, awaitPromise=True)
        assert found["type"] == "success", found["exceptionDetails"]["text"]
        return json.loads(found["result"]["value"])

    def wait_for(self, condition):
        assert self.evaluate(UNTIL.replace("CONDITION", condition)), condition

    def shot(self, name):
        found = self.tell("browsingContext.captureScreenshot", context=self.context)
        SHOTS.mkdir(exist_ok=True)
        (SHOTS / name).write_bytes(b64decode(found["data"]))

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture
def firefox(tmp_path):
    names = [os.environ["FIREFOX"]] if "FIREFOX" in os.environ else NAMES
    program = next(filter(None, map(shutil.which, names)), None)
    if not program:
        pytest.skip("no Firefox here: install firefox-esr, or name one with FIREFOX=/path/to/it")
    (tmp_path / "profile").mkdir()
    firefox = Firefox(program, tmp_path / "profile")
    yield firefox
    firefox.close()


SLIDE = """
(() => {
    const took = {};
    for (const name of ["topP", "distance", "base", "grown"]) {
        const slider = $(name);
        const begin = performance.now();
        for (let n = 0; n < 20; n++) {
            slider.value = Number(slider.min) + ((slider.max - slider.min) * n) / 19;
            slider.dispatchEvent(new Event("input"));
        }
        took[name] = (performance.now() - begin) / 20;
    }
    return took;
})()
"""


def test_all_pictures(firefox, tmp_path):
    page = make_page(tmp_path / "page.html")
    for width in (390, 1280):
        firefox.size(width)
        firefox.visit(page.as_uri())
        for place in PLACES:
            firefox.evaluate(f"document.getElementById('{place}').scrollIntoView()")
            firefox.wait_for(f"document.querySelector({DRAWN}['{place}'])")
            firefox.shot(f"firefox_{place}_{width}.png")
        fits = firefox.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert fits[0] <= fits[1] == width
    assert firefox.evaluate("document.querySelector('#next code').textContent") == "␣library"
    assert firefox.evaluate("document.querySelectorAll('#log .verdict.good').length") == 2
    assert firefox.evaluate("[states.width, states.height, cache.width]") == [32, 128, 30]
    took = firefox.evaluate(SLIDE)
    print("a slider's redraw takes", {name: f"{ms:.1f} ms" for name, ms in took.items()})
    assert max(took.values()) < 50
    firefox.evaluate("void (BUGS.length, $('bug').value = 'no last norm', $('bug').onchange())")
    firefox.wait_for("$('depth').getAttribute('aria-label').includes('layer 3: 0.0; logits: 4')")
    firefox.evaluate("void (setText('Max has the map.\\nWho has the map?'), textChanged())")
    firefox.wait_for("document.querySelector('#next code').textContent === '␣Max'")
