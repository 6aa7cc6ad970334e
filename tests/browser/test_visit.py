"A page with a model in it, opened from a file as a visitor would."

import os

import pytest
from conftest import SHOTS

from qwen_nb.ablation import LIVE_HEIGHTS, live_frame
from qwen_nb.inspect import packaged_model
from qwen_nb.page import make_page

pytestmark = pytest.mark.browser
SHARE = "document.querySelector('#next .bar span').textContent"
STOPPED = "document.getElementById('state').textContent.startsWith('It has')"
SLIDERS = "temperature topK topP minP distance shift base grown".split()
SLIDE = """(name) => {
    const slider = document.getElementById(name);
    const [from, to] = [Number(slider.min), Number(slider.max)];
    const begin = performance.now();
    for (let n = 0; n < 20; n++) {
        slider.value = from + ((to - from) * n) / 19;
        slider.dispatchEvent(new Event("input"));
    }
    return (performance.now() - begin) / 20;
}"""
LOOK_FROM = """async () => {
    const begin = performance.now();
    for (let n = 0; n < 20; n++) {
        document.getElementById("at").value = n;
        await lookFrom();
    }
    return (performance.now() - begin) / 20;
}"""
WATCH = """new MutationObserver(() => {
    const isDrawn = document.querySelector("#next .bar");
    if (isDrawn) window.firstPicture ??= performance.now();
}).observe(document, { subtree: true, childList: true })"""
PLACES = "ask inside off hands memories break".split()
DRAWN = {  # what is there once a picture is drawn
    "ask": "#log .verdict", "inside": "#next .bar", "off": "#asked button",
    "hands": "#dials figure", "memories": "#growth polyline", "break": "#depth polyline",
}  # fmt: skip
FOUND = "document.getElementById('found').textContent.startsWith('The whole')"


@pytest.fixture
def no_kernel_stays():
    "No JupyterLab is needed here."


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


def show(page, place):
    "Scrolls to a picture, and waits until it is drawn."
    page.evaluate(f"document.getElementById('{place}').scrollIntoView()")
    page.wait_for_selector(DRAWN[place], state="attached")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280, 1920])
def test_it_fits(visit, width, scheme):
    page = visit(width=width)
    page.emulate_media(color_scheme=scheme)
    page.reload()
    page.wait_for_selector("#next .bar")
    assert first(page) == "␣library"
    for place in PLACES:
        show(page, place)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, place
        page.locator(f"#{place}").screenshot(path=SHOTS / f"{place}_{width}_{scheme}.png")
    page.emulate_media(color_scheme="light")


def test_the_first_picture_is_there_within_a_second(visit):
    page = visit()
    page.add_init_script(WATCH)
    took = []
    for _ in range(3):
        page.reload()
        page.wait_for_selector("#next .bar")
        took.append(page.evaluate("window.firstPicture"))
    print(f"the first picture took {min(took):.0f} ms")
    assert min(took) < 1000


def test_what_is_typed_is_read(visit):
    page = visit()
    page.fill("#text", "Max has the ball.\nWho has the ball?")
    page.wait_for_function("document.querySelector('#next .bar code').textContent === '␣Max'")
    assert page.inner_text("#tokens").startswith("Max has the ball.")
    page.fill("#text-break", "")
    page.wait_for_function("document.getElementById('state').textContent.includes('Write some')")
    for place in PLACES:
        page.evaluate(f"document.getElementById('{place}').scrollIntoView()")
        page.wait_for_timeout(200)
    assert page.input_value("#text-hands") == ""


def test_a_talk_is_judged(visit):
    page = visit()
    show(page, "ask")
    assert (
        page.inner_text("#log .thought") == "It thinks: Anna has the ball. Anna is in the library."
    )
    assert page.locator("#log .verdict.good").count() == 2
    assert "the ball\twith Anna, in the library" in page.inner_text("#truth")
    page.fill("#words", "Max went to the library. Anna gave the ball to Max. Who has the ball?")
    page.keyboard.press("Enter")
    page.wait_for_function("document.getElementById('score').textContent.includes('of 2')")
    assert page.inner_text("#log > :nth-child(2) .said") == "Max."
    page.uncheck("#thinks")
    page.click('#questions >> text="Where is Anna?"')
    page.wait_for_function("document.getElementById('score').textContent.includes('3 of 3')")
    assert page.inner_text("#log > :nth-child(3) .thought") == ""
    assert page.evaluate("verdict('Max.', 'Anna.', 'the answer').className") == "verdict bad"
    page.fill("#words", "What is love?")
    page.click("text=Send")
    page.wait_for_function("document.querySelectorAll('#log > *')[3]?.querySelector('.verdict')")
    assert "not of this world" in page.inner_text("#log > :nth-child(4)")
    page.click("#tale")
    page.wait_for_function("document.getElementById('score').textContent.includes('of 1')")
    assert page.locator("#log > *").count() == 1
    page.evaluate("document.querySelectorAll('#questions button').forEach((b) => b.click())")
    asked = page.locator("#questions button").count() + 1
    page.wait_for_function(f"document.getElementById('score').textContent.includes('of {asked}')")
    roles = page.evaluate("messages.map(({ role }) => role)")
    assert roles == ["user", "assistant"] * asked


def test_a_head_shows_where_it_looks_and_can_be_switched_off(visit):
    page = visit()
    before = page.evaluate(SHARE)
    for layer in range(4):
        for head in range(8):
            page.click(f'[aria-label="switch off layer {layer}, head {head}"]')
    page.wait_for_function(f"{SHARE} !== '{before}'")
    assert page.locator('#heads [aria-pressed="true"]').count() == 32
    page.click("#all")
    page.wait_for_function(f"{SHARE} === '{before}'")
    page.focus('[aria-label="switch off layer 2, head 2"]')
    assert page.locator("#tokens span[title]").count() > 0


def test_another_token_looks_and_guesses(visit):
    page = visit()
    page.locator("#tokens span").nth(7).click()  # Anna is
    page.wait_for_function("document.querySelector('#next .bar code').textContent === '␣in'")
    assert page.inner_text("#tokens .at") == " is"
    assert page.locator("#tokens .after").count() == 22
    page.fill("#at", "29")
    page.wait_for_function("document.querySelector('#next .bar code').textContent === '␣library'")


def test_each_one_off_as_in_the_lesson(visit):
    "00c_heads finds head 4 of layer 0 and head 2 of layer 1."
    page = visit()
    show(page, "off")
    page.click("#each")
    page.wait_for_function(FOUND)
    said = page.inner_text("#found")
    assert "layer 0, head 4: ␣garden" in said and "layer 1, head 2: ␣garden" in said
    page.click('#asked >> text="Where is Anna?"')
    page.wait_for_function("document.getElementById('found').textContent === ''")
    page.click("#each")
    page.wait_for_function(FOUND)
    assert "no head and no MLP alone" in page.inner_text("#found")


def test_it_writes_and_sliders_cut(visit):
    page = visit()
    page.evaluate("document.getElementById('temperature').value = 0")
    page.click("#write")
    page.wait_for_function(STOPPED)
    assert page.inner_text("#said").startswith(" library.")
    for name, value in (("temperature", "1"), ("topP", "1"), ("topK", "1")):
        page.fill(f"#{name}", value)
    assert page.locator("#next .cut").count() == 9
    assert page.inner_text("#next .cut >> nth=0").endswith("by top-k")
    assert page.inner_text("#left") == "It draws from 1 of 512 tokens."
    page.fill("#topK", "5")
    page.fill("#minP", "0.5")
    found = page.locator("#next .cut").all_inner_texts()
    assert found[0].endswith("by min-p") and found[-1].endswith("by top-k")


def test_sliders_redraw_at_once(visit):
    page = visit()
    for place in PLACES:
        show(page, place)
    took = {name: page.evaluate(SLIDE, name) for name in SLIDERS}
    took["at"] = page.evaluate(LOOK_FROM)
    print("a slider's redraw takes", {name: f"{ms:.1f} ms" for name, ms in took.items()})
    assert max(took.values()) < 50


WEIGHTS = """() => {
    const [layer, number] = document.getElementById("hand-head").value.split(".").map(Number);
    const at = turning.tokens.length - 1;
    const turned = (n) => angles(at - n, sizes.turned, sizes.theta);
    const q = turning.q[at];
    const scores = turning.k.map((k, n) =>
        sumOf(pairScores(handsOf(q), handsOf(k), turned(n))) + restScore(q, k));
    const looked = seen.attention.find((found) => found.layer === layer).weights[number];
    return softmax(scores).map((weight, n) => Math.abs(weight - looked[n]));
}"""


@pytest.mark.parametrize("name", ["", "qwen2", "qwen3_5"])
def test_the_hands_give_the_heads_weights(visit, name):
    "From the angles alone, the softmax of the scores is what the head does in the engine."
    page = visit(name)
    show(page, "hands")
    apart = page.evaluate(WEIGHTS)
    assert max(apart) < 1e-5, name
    score = page.inner_text("#score-now")
    page.fill("#shift", "100")  # both tokens elsewhere, equally far from each other
    assert page.inner_text("#score-now") == score
    page.fill("#base", "6")
    assert page.inner_text("#score-now") != score


def test_one_memory_grows_and_one_does_not(visit):
    page = visit()
    show(page, "memories")
    assert "30 tokens × 256 numbers" in page.inner_text("#cache-size")
    size = page.evaluate("[cache, states].map((c) => [c.width, c.height])")
    assert size == [[30, 256], [32, 128]]
    page.fill("#grown", "10")
    size = page.evaluate("[cache, states].map((c) => [c.width, c.height])")
    assert size == [[10, 256], [32, 128]]
    assert "keeps 10,240 numbers, the hybrid (blue) 17,024" in page.inner_text("#growth-says")
    for says in ("#cache-says", "#state-says"):
        assert page.inner_text(says).startswith("␣library"), says
    page.select_option("#state-layer", "2")
    page.wait_for_function("document.getElementById('grown').value === '30'")


def test_each_mistake_shows(visit):
    page = visit()
    show(page, "break")
    mistakes = page.evaluate("BUGS.map(({ name }) => name)")
    assert len(mistakes) == len(set(mistakes)) > 10
    errors = {}
    for name in mistakes:
        page.evaluate("document.getElementById('wrong').textContent = ''")
        page.select_option("#bug", name)
        page.wait_for_function("document.getElementById('wrong').textContent")
        said = page.get_attribute("#depth", "aria-label")
        errors[name] = [float(part.split(": ")[1]) for part in said.split(". ", 1)[1].split("; ")]
    print(errors)
    assert max(errors["all positions off by one"]) < 1e-5
    assert 1e-6 < max(errors["eps outside the root"]) < 1e-3
    assert max(errors["no last norm"][:-1]) == 0 < errors["no last norm"][-1]
    shouting = [max(found) > 0.05 for found in errors.values()]
    assert shouting.count(False) == 2


def test_it_stands_in_another_page(visit, tmp_path):
    page = visit()
    frame = '<iframe src="page.html?only=hands" width="390" height="700" title="live"></iframe>'
    (tmp_path / "lesson.html").write_text(f"<!doctype html><h1>A lesson</h1>{frame}")
    page.goto((tmp_path / "lesson.html").as_uri())
    inner = page.frame_locator("iframe")
    inner.locator("#dials figure").first.wait_for()
    assert inner.locator("#memories").is_hidden() and inner.locator("header").is_hidden()
    width = page.frames[1].evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1] == 390
    before = inner.locator("#score-now").inner_text()
    inner.locator("#distance").fill("20")
    assert inner.locator("#score-now").inner_text() != before
    page.locator("iframe").screenshot(path=SHOTS / "embedded.png")


@pytest.mark.parametrize("place", PLACES)
def test_it_lives_in_a_cell(page, tmp_path, place):
    "The frame of a notebook, as wide as a cell of JupyterLab: it is drawn, and need not scroll."
    cell = f"<!doctype html><h1>A cell</h1><div style='width: 840px'>{live_frame(place)}</div>"
    (tmp_path / "cell.html").write_text(cell, encoding="utf-8")
    page.goto((tmp_path / "cell.html").as_uri())
    page.locator("iframe").scroll_into_view_if_needed()
    inner = page.frame_locator("iframe")
    inner.locator(DRAWN[place]).first.wait_for(state="attached")
    page.wait_for_timeout(500)
    sizes = "body => [body.scrollWidth, body.offsetHeight]"
    width, height = inner.locator("body").evaluate(sizes)
    page.locator("iframe").screenshot(path=SHOTS / f"cell_{place}.png")
    room = LIVE_HEIGHTS[place] - height
    assert width <= 840 and 0 <= room < 200, f"{width} x {height}, {room} pixels left"
    assert inner.locator("base").get_attribute("target") == "_blank", "links would fill the frame"
    if place == "break":
        inner.locator("#bug").select_option("eps outside the root")
        inner.locator("#wrong", has_text="(the same text)").wait_for()


def test_nothing_serious_for_those_who_do_not_see_it(visit):
    "With axe-core: npm install axe-core, and AXE=node_modules/axe-core/axe.min.js"
    if "AXE" not in os.environ:
        pytest.skip("no axe-core here: AXE names no axe.min.js")
    page = visit()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for place in PLACES:
            show(page, place)
        page.add_script_tag(path=os.environ["AXE"])
        found = page.evaluate("axe.run().then(({ violations }) => violations)")
        told = [(v["id"], v["impact"], [n["html"][:90] for n in v["nodes"]]) for v in found]
        assert not told, told
    page.emulate_media(color_scheme="light")


def test_without_a_mouse(visit):
    "Everything by keyboard: a question, a head off and on, a slider, a mistake."
    page = visit()
    show(page, "ask")
    page.focus("#questions button")
    page.keyboard.press("Enter")
    page.wait_for_function("document.getElementById('score').textContent.includes('of 2')")
    assert page.evaluate("document.activeElement.textContent") == "Who has the ball?"
    show(page, "off")
    page.focus('[aria-label="switch off layer 1, head 2"]')
    page.keyboard.press("Space")
    page.wait_for_function("document.getElementById('says').textContent.startsWith('␣garden')")
    page.keyboard.press("Space")
    page.wait_for_function("document.getElementById('says').textContent.startsWith('␣library')")
    page.focus("#distance")
    show(page, "hands")
    before = page.inner_text("#score-now")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#score-now") != before
    show(page, "break")
    page.focus("#bug")
    page.keyboard.press("ArrowDown")
    page.wait_for_function("document.getElementById('diff').textContent.includes('2 * j')")


def test_texts_of_ones_own(visit):
    "A page with texts of its own has no talk about the world, and one model."
    page = visit(texts=["Max has the map.\nWho has the map?", "Nora is"])
    assert page.locator("#ask").is_hidden() and first(page) == "␣Max"
    for place in PLACES[1:]:
        page.evaluate(f"document.getElementById('{place}').scrollIntoView()")
        page.wait_for_timeout(300)
    page.wait_for_selector("#growth polyline", state="attached")
    assert page.locator("#state-side").is_hidden()
    page.click("#another")
    page.wait_for_function("document.getElementById('text').value === 'Nora is'")


@pytest.mark.parametrize("name", ["qwen1", "qwen2", "qwen3_moe", "qwen3_5", "qwen3_5_moe"])
def test_siblings(visit, name):
    page = visit(name)
    assert first(page).startswith("␣")
    for place in PLACES:
        show(page, place)
