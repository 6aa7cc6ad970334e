#!/usr/bin/env python3
"""Write README.md from nbs/index.ipynb: its prose, its code and what the code printed. `--check`
only says if it is out of date."""

import json
import posixpath
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def from_root(text):
    "Links in the notebook start from nbs/, those in the README from the top."
    here = lambda m: (
        m[0] if re.match(r"\w+:|[#/]", m[2]) else m[1] + posixpath.normpath("nbs/" + m[2]) + m[3]
    )
    return re.sub(r"(\]\(|(?:src|href)=\")([^)\s\"]+)([)\"])", here, text)


def outputs(cell):
    for out in cell["outputs"]:
        data = out.get("data", {})
        if "text/markdown" in data:
            yield from_root("".join(data["text/markdown"])).strip()
        else:
            text = "".join(out.get("text") or data.get("text/plain", "")).rstrip()
            if text and "image/png" not in data:
                yield f"```text\n{text}\n```"


def markdown(nb):
    parts = []
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(from_root(source).strip())
        if cell["cell_type"] != "code" or re.search(
            r"^#\|\s*(hide|default_exp)|google\.colab", source, re.M
        ):
            continue
        code = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip()
        if code and not re.search(r"^#\|\s*echo:\s*false", source, re.M):
            parts.append(f"```python\n{code}\n```")
        parts += outputs(cell)
    return "\n\n".join(parts) + "\n"


def main():
    text = markdown(json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8")))
    readme = ROOT / "README.md"
    if "--check" not in sys.argv[1:]:
        readme.write_text(text, encoding="utf-8", newline="\n")
    elif readme.read_text(encoding="utf-8") != text:
        sys.exit("README.md differs from nbs/index.ipynb: run python tools/readme.py")


if __name__ == "__main__":
    main()
