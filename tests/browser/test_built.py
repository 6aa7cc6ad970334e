"""The built site, as a visitor sees it: from a file, without a network, on phones and wide screens.

Needs Sphinx and `make site`."""

import shutil
from pathlib import Path

import pytest
from conftest import SHOTS

pytestmark = pytest.mark.browser
BUILT = Path(__file__).resolve().parents[2] / "build/site/html"
PAGES = "index nbs/04_rmsnorm nbs/06_attention nbs/glossary building/04_rmsnorm api/norm".split()
SIZES = [(390, 844), (1280, 800), (1920, 1080)]


@pytest.fixture(autouse=True)
def no_kernel_stays():
    "No JupyterLab is needed here."


@pytest.fixture(scope="module")
def stick(tmp_path_factory):
    "The built folder, copied elsewhere. Gives its address."
    if not (BUILT / "index.html").exists():
        pytest.skip("the site is not built: make site")
    copy = tmp_path_factory.mktemp("stick") / "a course"
    shutil.copytree(BUILT, copy)
    return copy.as_uri()


@pytest.fixture
def visitor(page):
    "A page that remembers what went wrong, and what was asked of the network."
    wrong = []

    def failed(request):
        if request.failure != "net::ERR_ABORTED":  # else the visitor had gone on
            wrong.append(f"{request.url}: {request.failure}")

    seen = dict(
        pageerror=lambda error: wrong.append(str(error)),
        request=lambda r: wrong.append(r.url) if r.url.startswith("http") else None,
        requestfailed=failed,
    )
    for event, note in seen.items():
        page.on(event, note)
    page.wrong = wrong
    yield page
    for event, note in seen.items():
        page.remove_listener(event, note)
    page.emulate_media(color_scheme="light")
    page.set_viewport_size(dict(width=1280, height=800))


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("width, height", SIZES)
def test_pages_fit_and_fetch_nothing(visitor, stick, width, height, mode):
    visitor.set_viewport_size(dict(width=width, height=height))
    visitor.emulate_media(color_scheme=mode)
    for name in PAGES:
        visitor.goto(f"{stick}/{name}.html")
        shown = visitor.evaluate("document.documentElement.dataset.theme")
        assert shown == mode, f"{name} is {shown}"
        wide = visitor.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{name} is {wide} pixels wide"
        broken = "[...document.images].filter((i) => i.complete && !i.naturalWidth).length"
        assert visitor.evaluate(broken) == 0, f"{name} lacks a picture"
        visitor.screenshot(path=SHOTS / f"site-{name.replace('/', '-')}-{width}-{mode}.png")
    assert visitor.wrong == []


def test_every_picture_says_what_it_shows(visitor, stick):
    visitor.goto(f"{stick}/nbs/06_attention.html")
    without = "[...document.querySelectorAll('article img')].filter((i) => !i.alt).length"
    assert visitor.evaluate(without) == 0


def test_formulas_are_drawn(visitor, stick):
    visitor.goto(f"{stick}/nbs/04_rmsnorm.html")
    visitor.wait_for_selector("mjx-container svg", timeout=20_000)
    assert visitor.wrong == []


def test_search_works_from_a_file(visitor, stick):
    visitor.goto(f"{stick}/search.html?q=RMSNorm")
    visitor.wait_for_selector("#search-results li a")
    first = visitor.locator("#search-results li a").first
    assert "norm" in first.get_attribute("href").lower()


def test_a_term_is_explained_to_the_mouse_and_to_the_keyboard(visitor, stick):
    visitor.goto(f"{stick}/nbs/04_rmsnorm.html")
    term, card = visitor.locator("a.term", has_text="token").first, visitor.locator("#said")
    assert card.is_hidden()
    term.hover()
    assert card.is_visible() and "text" in card.inner_text()
    visitor.keyboard.press("Escape")
    assert card.is_hidden()
    visitor.mouse.move(0, 0)
    term.focus()
    assert card.is_visible() and term.get_attribute("aria-describedby") == "said"
    visitor.keyboard.press("Enter")
    visitor.wait_for_url("**/glossary.html#term-token")


def test_a_finger_taps_twice(visitor, stick):
    size = dict(width=390, height=844)
    phone = visitor.context.browser.new_context(viewport=size, has_touch=True)
    page = phone.new_page()
    page.goto(f"{stick}/nbs/04_rmsnorm.html")
    term = page.locator("a.term", has_text="dtype").first
    term.tap()
    box = page.locator("#said").bounding_box()
    assert 0 <= box["x"] and box["x"] + box["width"] <= 390
    assert page.url.endswith("04_rmsnorm.html")
    term.tap()
    page.wait_for_url("**/glossary.html#term-dtype")
    phone.close()


def test_next_follows_the_course(visitor, stick):
    visitor.goto(f"{stick}/nbs/05a_yarn.html")
    visitor.click("a.right-next")
    assert visitor.url.endswith("/05b_mistakes.html")
    visitor.click("a.right-next")
    visitor.click("a.right-next")
    visitor.click("a.left-prev")
    assert visitor.url.endswith("/05c_mistakes.html")


def test_from_a_lesson_to_the_reference_and_back(visitor, stick):
    visitor.goto(f"{stick}/nbs/04_rmsnorm.html")
    visitor.click('.exported a[href$="#qwen_nb.norm.RMSNorm"]')
    assert visitor.url.endswith("api/norm.html#qwen_nb.norm.RMSNorm")
    visitor.click(".built a")
    assert "nbs/04_rmsnorm.html#build-qwen" in visitor.url


def test_the_model_answers_on_its_page(visitor, stick):
    visitor.goto(f"{stick}/index.html")
    visitor.click("text=See it live")
    assert visitor.url.endswith("/live.html")
    visitor.wait_for_selector("#next .bar", state="attached")
    assert visitor.wrong == []
