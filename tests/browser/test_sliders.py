"""Run a notebook, move its sliders until the picture changes, type at the chat."""

import time

import pytest
from conftest import SHOTS
from lab import run_all, wait

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("name", ["05_rope"])
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
        at_the_end = float(value) >= float(knob.get_attribute("aria-valuemax"))
        began = time.perf_counter()
        knob.press("ArrowLeft" if at_the_end else "ArrowRight")
        assert knob.get_attribute("aria-valuenow") != value, "the slider did not move"
        same = f"slider {i} moved, and its picture is the same"
        wait(page, lambda: picture() not in ([], before), 60, same, every=10)
        took = (time.perf_counter() - began) * 1000
        print(f"{name}, slider {i}: a new picture after {took:.0f} ms")
        page.screenshot(path=SHOTS / f"{name}-{i}-after.png")


def test_the_chat_widget_answers(page, lab):
    run_all(page, lab, "10d_talk.ipynb")
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
