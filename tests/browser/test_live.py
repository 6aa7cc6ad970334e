"A live picture in a notebook: the page with the model in a frame below a cell of JupyterLab."

import pytest
from conftest import SHOTS
from lab import run_all, wait

pytestmark = pytest.mark.browser


def test_the_hands_turn_below_a_cell(page, lab):
    assert page.viewport_size == dict(width=1280, height=800)
    run_all(page, lab, "05_rope.ipynb")
    frame = page.locator(".jp-OutputArea iframe[srcdoc]")
    frame.scroll_into_view_if_needed()
    inner = page.frame_locator(".jp-OutputArea iframe[srcdoc]")
    inner.locator("#dials figure").first.wait_for()
    assert inner.locator("#inside").is_hidden() and inner.locator("header").is_hidden()
    score, base = inner.locator("#score-now"), inner.locator("#base")
    base.scroll_into_view_if_needed()
    before = score.inner_text()
    assert before.startswith("At distance")
    page.screenshot(path=SHOTS / "live-before.png")
    for _ in range(5):
        base.press("ArrowLeft")
    wait(page, lambda: score.inner_text() != before, 5, "base moved, and the score is the same")
    page.screenshot(path=SHOTS / "live-after.png")
