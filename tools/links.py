#!/usr/bin/env python3
"""Keep site/links.txt: each link that leads out of the course, with a file that has it.

    python tools/links.py            # write the list
    python tools/links.py --check    # say whether it is out of date; asks nobody
    python tools/links.py --try      # ask each address whether it is still there
"""

import json
import re
import sys
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "site/links.txt"
# This repository's own, Colab's for it, and what runs on the reader's machine
OWN = r"qwen-nb/qwen_nb|qwen-nb\.github\.io|colab\.research\.google\.com|localhost|127\.0\.0\.1"


def texts():
    "(path, prose) of every file whose links are kept: markdown cells and markdown files."
    for path in sorted([*ROOT.glob("nbs/*.ipynb"), *ROOT.glob("building/*.ipynb")]):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        prose = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
        yield path, "\n\n".join(prose)
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("site/*.md")]):
        yield path, path.read_text(encoding="utf-8")


def links():
    "{address: the first file that links to it}."
    found = {}
    for path, text in texts():
        for address in re.findall(r"(?:\]\(|href=\"|<)(https?://[^\s)\">]+)", text):
            if not re.search(OWN, address):
                found.setdefault(address, path.relative_to(ROOT).as_posix())
    return found


def listed():
    "The list as it should be."
    return "".join(f"{address} {path}\n" for address, path in sorted(links().items()))


def trouble(address):
    "What is wrong with an address, in a few words; nothing if it answers."
    request = Request(address, headers={"User-Agent": "Mozilla/5.0 (link check)"})
    try:
        urlopen(request, timeout=20).close()
    except HTTPError as error:
        return f"status {error.code}"
    except (URLError, OSError) as error:
        return str(getattr(error, "reason", error))
    return ""


def main():
    if "--try" in sys.argv[1:]:
        dead = [f"{address} in {path}: {trouble(address)}" for address, path in links().items()
                if trouble(address)]
        sys.exit("\n".join(dead) or 0)
    if "--check" in sys.argv[1:]:
        if not LIST.exists() or LIST.read_text(encoding="utf-8") != listed():
            sys.exit("site/links.txt is out of date: run python tools/links.py")
        return
    LIST.write_text(listed(), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
