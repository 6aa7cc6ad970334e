"""Run each notebook that has sliders, move each slider until the picture changes, and print how
long that took. Type at the chat."""

import json
import time

import pytest
from conftest import ROOT, SHOTS
from lab import run_all, wait

pytestmark = pytest.mark.browser


def has_knob(path):
    "Does a code cell of the notebook call `interact`?"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return any(line.startswith("interact(") for s in sources for line in s.splitlines())


NAMES = sorted(path.stem for path in (ROOT / "nbs").glob("*.ipynb") if has_knob(path))


def turn(knob):
    "One step of a slider, or the next entry of a list."
    if knob.evaluate("knob => knob.tagName") == "SELECT":
        chosen, count = knob.evaluate("knob => [knob.selectedIndex, knob.options.length]")
        knob.select_option(index=(chosen + 1) % count)
        return
    value = knob.get_attribute("aria-valuenow")
    at_the_end = float(value) >= float(knob.get_attribute("aria-valuemax"))
    knob.press("ArrowLeft" if at_the_end else "ArrowRight")
    assert knob.get_attribute("aria-valuenow") != value, "the slider did not move"


def shown(box):
    "The pictures and the lines of text below the sliders."
    found = box.locator(".widget-output img, .widget-output pre")
    return found.evaluate_all("all => all.map(one => one.src || one.innerText)")


@pytest.mark.parametrize("name", NAMES)
def test_moving_a_slider_changes_the_picture(page, lab, name, capsys):
    run_all(page, lab, f"{name}.ipynb")
    knobs = page.locator(".widget-interact").locator(".noUi-handle, select")
    assert knobs.count(), f"{name} has no slider"
    for i in range(knobs.count()):
        knob = knobs.nth(i)
        box = knob.locator("xpath=ancestor::*[contains(@class, 'widget-interact')]")
        row = knob.locator("xpath=ancestor::*[contains(@class, 'widget-inline-hbox')]")
        label = row.locator(".widget-label").inner_text()
        knob.scroll_into_view_if_needed()
        page.screenshot(path=SHOTS / f"{name}-{i}-before.png")
        before = shown(box)
        new = lambda box=box, before=before: shown(box) not in ([], before)
        began = time.perf_counter()
        turn(knob)
        same = f"{label} moved, and what it shows is the same"
        wait(page, new, 60, same, every=10)
        took = (time.perf_counter() - began) * 1000
        with capsys.disabled():
            print(f"\n{name}, {label}: another picture after {took:.0f} ms", end=" ")
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
