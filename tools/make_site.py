#!/usr/bin/env python3
"""Make the course as a site: build/site/html, which works from any folder, also without a network.

    python tools/make_site.py            # build it
    python tools/make_site.py --open     # build it and look at it
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
import webbrowser
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "build/site"
MATHJAX = "mathjax@3.2.2"
sys.path.insert(0, str(ROOT / "site"))


def fetch_mathjax(folder):
    "Formulas: one file of MathJax and its licence, from npm, kept for the next time."
    if (folder / "tex-svg.js").exists():
        return
    if not shutil.which("npm"):
        sys.exit("MathJax draws the site's formulas and comes from npm: install Node.js")
    folder.mkdir(parents=True, exist_ok=True)
    packed = subprocess.run(
        [shutil.which("npm"), "pack", "--silent", MATHJAX, "--pack-destination", str(folder)],
        check=True, capture_output=True, text=True,
    )
    archive = folder / packed.stdout.strip().splitlines()[-1]
    with tarfile.open(archive) as tar:
        for name in ("es5/tex-svg.js", "LICENSE"):
            (folder / Path(name).name).write_bytes(tar.extractfile(f"package/{name}").read())
    archive.unlink()


def live_page(path):
    "The page with the packaged model in it."
    from qwen_nb.page import make_page

    path.parent.mkdir(parents=True, exist_ok=True)
    make_page(path)


def build():
    "Gather, then Sphinx: it reads what has changed, writes all pages, and a warning is an error."
    from gather import gather

    if not find_spec("sphinx"):
        sys.exit("Sphinx makes the site, on Python 3.11 or newer: pip install -e '.[site]'")
    gather(BUILT / "source")
    extra = BUILT / "extra"
    fetch_mathjax(BUILT / "mathjax")
    shutil.copytree(BUILT / "mathjax", extra / "_static/mathjax", dirs_exist_ok=True)
    live_page(extra / "live.html")
    command = [sys.executable, *"-m sphinx -b html -a -q -W --keep-going -j auto".split()]
    command += ["-c", ROOT / "site", "-d", BUILT / "doctrees", BUILT / "source", BUILT / "html"]
    if subprocess.run(command).returncode:
        sys.exit("the site was not built: see the warnings above")
    print(BUILT / "html/index.html")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--open", action="store_true", help="look at it in a browser")
    args = parser.parse_args()
    build()
    if args.open:
        webbrowser.open((BUILT / "html/index.html").as_uri())


if __name__ == "__main__":
    main()
