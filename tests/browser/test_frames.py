"""At 1280 x 800, with the file browser open, no line of code is cut off."""

from pathlib import Path

import pytest
from conftest import SHOTS

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "nbs").glob("*.ipynb"))
NAMES.remove("glossary")  # has no code

# Scroll to every editor, so that it is laid out, and compare its text with its frame.
TOO_WIDE = """
async () => {
    const found = [];
    let seen = 0;
    for (const cell of document.querySelectorAll(".jp-CodeCell")) {
        const frame = cell.querySelector(".jp-InputArea-editor .cm-scroller");
        if (!frame) continue;                          // folded
        cell.scrollIntoView();
        await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
        seen += 1;
        if (frame.scrollWidth > frame.clientWidth + 1)
            found.push(frame.innerText.slice(0, 200));
    }
    return [seen, found];
}
"""


@pytest.mark.parametrize("name", NAMES)
def test_no_code_is_cut_off(page, lab, name):
    assert page.viewport_size == dict(width=1280, height=800)
    page.goto(f"{lab}/lab/tree/{name}.ipynb?reset")
    page.locator(".jp-CodeCell").first.wait_for()
    assert page.locator("#filebrowser").is_visible(), "the file browser is closed"
    page.wait_for_timeout(1000)
    page.screenshot(path=SHOTS / f"{name}-first-screen.png")
    seen, found = page.evaluate(TOO_WIDE)
    assert seen, "no code cell was laid out"
    assert not found, f"{len(found)} of {seen} cells are cut off:\n" + "\n---\n".join(found)
