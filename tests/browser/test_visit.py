"A page with a model in it, opened from a file as a visitor would."

import pytest

from qwen_nb.inspect import packaged_model
from qwen_nb.page import make_page

pytestmark = pytest.mark.browser
SHARE = "document.querySelector('#next .bar span').textContent"
STOPPED = "document.getElementById('state').textContent.startsWith('It has')"
SLIDE = """() => {
    const slider = document.getElementById("topP");
    const begin = performance.now();
    for (let n = 0; n < 20; n++) {
        slider.value = 0.05 + 0.045 * n;
        slider.dispatchEvent(new Event("input"));
    }
    return (performance.now() - begin) / 20;
}"""


@pytest.fixture
def visit(page, tmp_path):
    errors = []
    note = lambda error: errors.append(error)  # noqa: E731, a builtin cannot listen
    page.on("pageerror", note)

    def open_page(name="", width=1280, **settings):
        page.set_viewport_size(dict(width=width, height=800))
        page.goto(make_page(tmp_path / "page.html", packaged_model(name), **settings).as_uri())
        page.wait_for_selector("#next .bar")
        return page

    yield open_page
    page.remove_listener("pageerror", note)
    assert not errors, errors
    page.set_viewport_size(dict(width=1280, height=800))


def first(page):
    return page.inner_text("#next .bar code")


@pytest.mark.parametrize("width", [390, 1280, 1920])
def test_it_fits(visit, width):
    page = visit(width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert first(page) == "␣library"


def test_what_is_typed_is_read(visit):
    page = visit()
    page.fill("#text", "Max has the ball.\nWho has the ball?")
    page.wait_for_function("document.querySelector('#next .bar code').textContent === '␣Max'")
    assert page.inner_text("#tokens").startswith("Max has the ball.")
    page.fill("#text", "")
    page.wait_for_function("document.getElementById('state').textContent.includes('Write some')")


def test_a_head_shows_where_it_looks_and_can_be_switched_off(visit):
    page = visit()
    before = page.evaluate(SHARE)
    for layer in range(4):
        for head in range(8):
            page.click(f'[aria-label="switch off layer {layer + 1}, head {head + 1}"]')
    page.wait_for_function(f"{SHARE} !== '{before}'")
    assert page.locator('#heads [aria-pressed="true"]').count() == 32
    page.click("#all")
    page.wait_for_function(f"{SHARE} === '{before}'")
    page.focus('[aria-label="switch off layer 3, head 3"]')
    assert page.locator("#tokens span[title]").count() > 0


def test_it_writes_and_sliders_cut(visit):
    page = visit()
    page.evaluate("document.getElementById('temperature').value = 0")
    page.click("#write")
    page.wait_for_function(STOPPED)
    assert page.inner_text("#said").startswith(" library.")
    took = page.evaluate(SLIDE)
    print(f"a slider's redraw takes {took:.1f} ms")
    for name, value in (("temperature", "1"), ("topP", "1"), ("topK", "1")):
        page.fill(f"#{name}", value)
    assert page.locator("#next .cut").count() == 9


@pytest.mark.parametrize("name", ["qwen1", "qwen2", "qwen3_moe", "qwen3_5", "qwen3_5_moe"])
def test_siblings(visit, name):
    assert first(visit(name)).startswith("␣")
