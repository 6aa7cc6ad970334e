"""The site: every page in its place once, links that lead somewhere, a reference of all names.

Only the last test needs Sphinx (`pytest -m slow`, after `make site`)."""

import ast
import json
import posixpath
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "site"), str(ROOT / "tools")]

import front  # noqa: E402
import gather  # noqa: E402
import links  # noqa: E402
import nav  # noqa: E402
import reference  # noqa: E402
import terms  # noqa: E402

PATHS = [*ROOT.glob("nbs/*.ipynb"), *ROOT.glob("building/*.ipynb")]
NOTEBOOKS = [path.relative_to(ROOT).as_posix() for path in PATHS]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    "What Sphinx is given: {page: its markdown}."
    out = tmp_path_factory.mktemp("site")
    gather.gather(out)
    found = {}
    for path in [*out.rglob("*.md"), *out.rglob("*.ipynb")]:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            cells = json.loads(text)["cells"]
            text = "\n\n".join(c["source"] for c in cells if c["cell_type"] == "markdown")
        found[path.relative_to(out).with_suffix("").as_posix()] = text
    found[""] = out
    return found


def texts(pages):
    return {page: text for page, text in pages.items() if page}


# navigation


def below(pages):
    "All entries of all tables of contents, as pages."
    found = []
    for page, text in texts(pages).items():
        for tree in re.findall(r"^```\{toctree\}(.*?)^```", text, re.M | re.S):
            for target in re.findall(r"<([^<>]+)>$", tree, re.M):
                found.append(posixpath.normpath(posixpath.join("/" + page, "..", target))[1:])
    return found


def test_every_page_is_in_the_navigation_once(pages):
    found = below(pages)
    assert sorted(found) == sorted(page for page in texts(pages) if page != "index")
    notebooks = {name.removesuffix(".ipynb") for name in NOTEBOOKS}
    assert notebooks <= set(found), "these notebooks are on no page"


def test_the_navigation_is_in_chapters():
    parts, below = nav.tree()
    chapters = [name for part in parts.values() for name in part]
    assert [name[:2] for name in chapters] == sorted({name[:2] for name in nav.chain()})
    assert below["05_rope"] == ["05_turned", "05a_yarn", "05b_mistakes", "05c_mistakes"]
    assert below["05a_yarn"] == ["05d_mistakes"]
    for name, pages in below.items():
        for page in pages:
            assert page[:2] == name[:2], f"{page} stands below {name}"
            assert nav.is_mistakes(page) or name in chapters


def test_the_map_and_the_ways(pages):
    page = pages["index"]
    boxes = re.findall(r'<a class="\w+" style="[^"]*" href="nbs/(\w+)\.html"', page)
    assert boxes == nav.chain()
    assert "{{" not in page and "make -C qwen_nb lab" in page and 'href="live.html"' in page
    for way, hours in front.hours().items():
        assert hours in page, way


# links


def test_links_between_pages_lead_somewhere(pages):
    known = set(texts(pages)) | {"live"}
    for page, text in texts(pages).items():
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
        linked = re.findall(r"\]\((?!https?:)([^)\s#]+\.(?:ipynb|md))(?:#[^)]*)?\)", prose)
        linked += re.findall(r'href="(?!https?:)([^"#]+)', prose)
        for target in linked:
            path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
            assert posixpath.splitext(path)[0] in known, f"{page} links to {target}"
        for picture in re.findall(r"\]\((pictures/[^)]+)\)", text):
            assert (pages[""] / posixpath.dirname(page) / picture).exists(), f"{page}: {picture}"
        assert "attachment:" not in prose, page
        astray = re.findall(r"\]\(https://github\.com/[^)]*/(?:nbs|building)/[^)]*\)", prose)
        assert not astray, f"{page} sends its readers away, to {astray}"


def test_each_lesson_says_read_build_colab_and_jupyterlab(pages):
    for name in NOTEBOOKS:
        page = name.removesuffix(".ipynb")
        (bar,) = re.findall(r'<div class="ways">.*?</details></div>', pages[page], re.S)
        assert f"/blob/main/{name}" in bar and f".venv/bin/jupyter lab {name}" in bar
        lesson = page.partition("/")[2]
        both = (ROOT / f"building/{lesson}.ipynb").exists()
        assert both == (f"../building/{lesson}.html" in bar) == (f"../nbs/{lesson}.html" in bar)
        assert "colab-badge" not in pages[page]
    assert set(nav.LIVE) <= set(nav.chain())


def test_pictures_of_the_live_page_are_there(pages):
    live = (ROOT / "qwen_nb/browser/page.html").read_text(encoding="utf-8")
    places = set(re.findall(r'live\.html#(\w+)"', "".join(texts(pages).values())))
    assert places == {"ask", "inside", "off", "hands", "memories", "break"}
    assert [place for place in places if f'id="{place}"' not in live] == []


def test_a_live_picture_stands_in_its_lesson(pages):
    found = []
    for path in sorted(pages[""].glob("nbs/*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["source"].startswith("show_live("):
                (out,) = cell["outputs"]
                html = out["data"]["text/html"]
                (place,) = re.findall(r'<iframe src="../live.html\?only=(\w+)"', html)
                assert f'"{place}"' in cell["source"], path.stem
                found.append((path.stem, place))
    assert ("05_rope", "hands") in found and len(found) == len({place for _, place in found}) == 6


def test_links_that_lead_out_are_listed():
    listed = (ROOT / "site/links.txt").read_text(encoding="utf-8")
    assert listed == links.listed(), "site/links.txt is out of date: run python tools/links.py"


def test_a_dead_link_is_found():
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/here" else 404)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answers)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    assert links.trouble(f"{address}/here") == ""
    assert links.trouble(f"{address}/gone") == "status 404"
    server.shutdown()
    server.server_close()
    assert links.trouble(f"{address}/here")


# cells


def test_what_only_nbdev_or_colab_needs_is_not_shown(pages):
    for path in pages[""].rglob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                source = cell["source"]
                assert not re.search(r"^#(\||@title)|google\.colab", source, re.M), path.name
                assert source.strip(), f"{path.name} has an empty cell"


def test_folds_and_alt_text():
    folded, picture = {"jupyter": {"source_hidden": True}}, {"image/png": {"alt": "A line"}}
    source = '#@title Solution {display-mode: "form"}\nx = 1'
    cell = dict(source=source, metadata=folded, outputs=[dict(metadata=picture)])
    gather.code_cell(cell)
    assert cell["source"] == "x = 1" and cell["metadata"]["tags"] == ["hide-input"]
    assert cell["metadata"]["mystnb"]["code_prompt_show"] == "Solution"
    assert cell["metadata"]["mystnb"]["image"] == dict(alt="A line")


def test_every_picture_has_alt_text(pages):
    for path in pages[""].rglob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            kinds = {kind for out in cell.get("outputs", []) for kind in out.get("data", {})}
            if kinds & {"image/png", "image/svg+xml"}:
                assert cell["metadata"]["mystnb"]["image"]["alt"], path.name


# the reference and the glossary


def test_every_exported_name_is_in_the_reference_once(pages):
    for path in (ROOT / "qwen_nb").glob("[!_]*.py"):
        names = reference.exported(ast.parse(path.read_text(encoding="utf-8")))
        page = pages[f"api/{path.stem}"]
        for name in names:
            shown = re.findall(rf"^:{{7}}\{{py:\w+\}} {re.escape(name)}(?![\w.])", page, re.M)
            assert len(shown) == 1, f"{path.stem}.{name} is there {len(shown)} times"


def test_the_reference_and_the_lessons_link_to_each_other(pages):
    whole = "\n\n".join(texts(pages).values())
    made = re.findall(r"^\((build-.+)\)=$", whole, re.M)
    used = re.findall(r"<(build-[^>]+)>", whole)
    assert sorted(made) == sorted(used) and len(set(made)) == len(made) > 1000
    assert "{py:obj}`RMSNorm <qwen_nb.norm.RMSNorm>`" in pages["nbs/04_rmsnorm"]


def test_comments_beside_parameters_are_shown(pages):
    page = pages["api/norm"]
    assert ":param size: number of channels: the length of the last axis" in page
    assert "{py:class} RMSNorm(size: int, eps: float=1e-06)" in page
    assert "`(..., size)` in, the same shape and dtype out" in page


def test_a_docstring_is_text():
    assert reference.prose("a*b_c `x*y` <d> [e](f)") == r"a\*b\_c `x*y` \<d\> \[e\](f)"
    assert reference.prose("One.\n\n    code * here") == "One.\n\n```text\n    code * here\n```"


def test_terms_have_places_of_their_own(pages):
    found = terms.terms()
    assert len({terms.slug(term) for term in found}) == len(found) > 90
    for term, sentence in found.items():
        assert f"[**{term}**]{{#{terms.slug(term)}}}" in pages["nbs/glossary"], term
        assert not re.search(r"[`*]|\]\(", sentence), sentence


# built

TAGS = "img|script|iframe|source|video|audio|embed"
FETCHED = rf'(?:<(?:{TAGS})\b[^>]*\bsrc|<link\b[^>]*\bhref|<object\b[^>]*\bdata)="(?:https?:|//)'


def ids_in(text):
    return set(re.findall(r'\b(?:id|name)="([^"]+)"', text))


@pytest.mark.slow
def test_the_built_site_is_whole_and_fetches_nothing():
    pytest.importorskip("sphinx", reason="no Sphinx here: pip install -e '.[site]'")
    subprocess.run([sys.executable, ROOT / "tools/make_site.py"], check=True)
    html = ROOT / "build/site/html"
    texts = {path: path.read_text(encoding="utf-8") for path in html.rglob("*.html")}
    ids = {path: ids_in(text) for path, text in texts.items()}
    for path, text in texts.items():
        fetched = [m[0] for m in re.finditer(FETCHED, text) if 'rel="canonical"' not in m[0]]
        assert not fetched, f"{path.name} fetches {fetched}"
        if path.name == "live.html":
            continue
        for target in set(re.findall(r'<a\b[^>]*\bhref="(?!\w+:)([^"]*)"', text)):
            name, _, place = target.partition("#")
            there = (path.parent / name).resolve() if name else path
            assert there.exists(), f"{path.name} links to {target}"
            if there.name == "live.html":
                continue  # its places: test_pictures_of_the_live_page_are_there
            assert not place or place in ids.get(there, {place}), f"{path.name} links to {target}"
    for path in html.rglob("*.css"):
        outward = re.findall(r"(?:url\(|@import)\s*[\"']?https?:", path.read_text(encoding="utf-8"))
        assert not outward, path.name
    assert (html / "_static/mathjax/LICENSE").exists()
