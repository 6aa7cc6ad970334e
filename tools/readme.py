#!/usr/bin/env python3
"""Write README.md from nbs/index.ipynb: its prose, its code and what the code printed and drew.

Pictures go to nbs/images. `--check` only says what is out of date.
"""

import base64
import json
import posixpath
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMAGES = "nbs/images"


def from_root(text):
    "Links in the notebook start from nbs/, those in the README from the top."

    def here(m):
        is_elsewhere = re.match(r"\w+:|[#/]", m[2])
        return m[0] if is_elsewhere else m[1] + posixpath.normpath("nbs/" + m[2]) + m[3]

    return re.sub(r"(\]\(|(?:src|href)=\")([^)\s\"]+)([)\"])", here, text)


def picture(data, name, pictures):
    "Keep a picture for the folder of images; its path from the top."
    path = f"{IMAGES}/{name}"
    pictures[path] = base64.b64decode("".join(data))
    return path


def prose(cell, pictures):
    "A markdown cell, its attached pictures as files."
    text = from_root("".join(cell["source"])).strip()
    for name, data in cell.get("attachments", {}).items():
        path = picture(data["image/png"], f"index-{name}", pictures)
        text = text.replace(f"attachment:{name}", path)
    return text


def shown(cell, number, pictures):
    "What a code cell printed and drew."
    for i, out in enumerate(cell["outputs"]):
        data = out.get("data", {})
        if "text/markdown" in data:
            yield from_root("".join(data["text/markdown"])).strip()
        elif "image/png" in data:
            if "#| opens" in "".join(cell["source"]):
                continue  # it stands at the top
            alt = out.get("metadata", {}).get("image/png", {}).get("alt", "")
            path = picture(data["image/png"], f"index-{number}-{i}.png", pictures)
            yield f"![{alt}]({path})"
        else:
            text = "".join(out.get("text") or data.get("text/plain", "")).rstrip()
            if text:
                yield f"```text\n{text}\n```"


def markdown(nb):
    "The README's text, and its pictures by path."
    parts, pictures = [], {}
    for number, cell in enumerate(nb["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(prose(cell, pictures))
        is_hidden = re.search(r"^#\|\s*(hide|default_exp)|google\.colab", source, re.M)
        if cell["cell_type"] != "code" or is_hidden:
            continue
        code = re.sub(r"^#(\||@title).*\n?", "", source, flags=re.M).strip()
        is_folded = cell["metadata"].get("jupyter", {}).get("source_hidden")
        if code and not is_folded:
            parts.append(f"```python\n{code}\n```")
        parts += shown(cell, number, pictures)
    return "\n\n".join(parts) + "\n", pictures


def main():
    nb = json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))
    text, pictures = markdown(nb)
    files = {"README.md": text.encode("utf-8")} | pictures
    stale = []
    for name, content in files.items():
        path = ROOT / name
        if not path.exists() or path.read_bytes() != content:
            stale.append(name)
    unused = [p for p in (ROOT / IMAGES).glob("index-*") if f"{IMAGES}/{p.name}" not in pictures]

    if "--check" in sys.argv[1:]:
        if stale or unused:
            names = ", ".join(stale + [p.name for p in unused])
            sys.exit(f"{names}: not as in nbs/index.ipynb, run python tools/readme.py")
        return
    (ROOT / IMAGES).mkdir(exist_ok=True)
    for name in stale:
        (ROOT / name).write_bytes(files[name])
    for path in unused:
        path.unlink()


if __name__ == "__main__":
    main()
