#!/usr/bin/env python3
"""Run the notebooks and store what they print and draw.

    python tools/notebooks.py            # all of them
    python tools/notebooks.py nbs/05_rope.ipynb

Each notebook runs top to bottom in a process of its own, on the packaged model. Its Colab badge and
its install cell are made from settings.ini, pictures are reduced to 64 colours, progress bars and
times are left out, so that a second run changes nothing. `--badges` only rewrites badges, install
cells and links to this repository after settings.ini has changed; `--check` says which notebooks
need that.
"""

import argparse
import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
CLEAN = shutil.which(
    "nbdev-clean", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
)
QUIET = dict(
    IN_TEST="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    TQDM_DISABLE="1",
    MPLBACKEND="agg",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TRANSFORMERS_VERBOSITY="error",
    PYTHONWARNINGS="ignore",
    PYTHONHASHSEED="0",
)


def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def badge(name):
    s = settings()
    link = f"https://colab.research.google.com/github/{s['user']}/{s['repo']}/blob/{s['branch']}/nbs/{name}"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link})"


def install_cell():
    package = f"qwen_nb @ git+{settings()['git_url']}"
    return (
        '#@title Install, in Colab only {display-mode: "form"}\n'
        "import sys\n\n"
        'if "google.colab" in sys.modules:\n'
        f'    %pip install -qq "{package}" "transformers>=5"'
    )


def linked(text):
    "The same text with links to this repository as settings.ini has them."
    s = settings()
    text = re.sub(
        rf"(github(?:\.com)?/)[\w.-]+/{s['repo']}\b", rf"\g<1>{s['user']}/{s['repo']}", text
    )
    return re.sub(rf"[\w-]+\.github\.io/{s['repo']}\b", f"{s['user']}.github.io/{s['repo']}", text)


def dress(nb, name):
    "The badge below the title, the install cell second and folded, and the links."
    cells = nb["cells"]
    for cell in cells:
        if cell["cell_type"] == "markdown":
            cell["source"] = [linked(line) for line in cell["source"]]
    first = "".join(cells[0]["source"])
    first = re.sub(r"\n*\[!\[Open in Colab\][^\n]*", "", first).strip()
    title, _, rest = first.partition("\n")
    first = f"{title}\n\n{badge(name)}\n\n{rest.strip()}".strip()
    cells[0]["source"] = first.splitlines(True)

    has_install = len(cells) > 1 and "google.colab" in "".join(cells[1]["source"])
    if not has_install:
        install = dict(cell_type="code", id="colab", execution_count=None, outputs=[])
        cells.insert(1, install)
    cells[1]["source"] = install_cell().splitlines(True)
    cells[1]["metadata"] = {"jupyter": {"source_hidden": True}}
    return nb


def alt_text(source):
    """What a picture shows, in words, from the lines at the top of its cell:

    #| fig-alt: Weights of one head. The row of the question mark
    #|   has its bright spot at the name.
    """
    found = re.search(r"^#\| fig-alt:(.*(?:\n#\|   .*)*)", source, re.M)
    if not found:
        return ""
    return " ".join(found[1].replace("\n#|", " ").split())


def set_alt(outputs, alt):
    "Put the alt text beside each picture."
    for out in outputs:
        if "image/png" in out.get("data", {}) and alt:
            out["metadata"] = {"image/png": {"alt": alt}}


def set_opening(nb):
    "The picture of the cell that has a line `#| opens` is shown in the first cell too."
    first = nb["cells"][0]
    first.pop("attachments", None)
    for cell in nb["cells"]:
        if cell["cell_type"] != "code" or "#| opens" not in "".join(cell["source"]):
            continue
        for out in cell["outputs"]:
            if "image/png" in out.get("data", {}):
                picture = "".join(out["data"]["image/png"]).strip()
                first["attachments"] = {"opening.png": {"image/png": picture}}
                return


def small_png(data, colours=64):
    from PIL import Image

    picture = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
    out = io.BytesIO()
    picture.quantize(colours, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        out, "PNG", optimize=True
    )
    return base64.b64encode(out.getvalue()).decode() + "\n"


def tidy(outputs):
    "What is worth keeping of a cell's outputs."
    kept = []
    for out in json.loads(json.dumps(outputs)):
        if out["output_type"] == "stream" and out["name"] == "stderr":
            continue
        if out["output_type"] == "stream":
            is_clearing = not "".join(out["text"]).replace("\x1b[2K", "").strip()
            if is_clearing:  # a widget's
                continue
        data = out.get("data", {})
        if "application/vnd.jupyter.widget-view+json" in data:
            continue
        if "image/png" in data:
            data["image/png"] = small_png("".join(data["image/png"]))
            data.pop("text/plain", None)
        if "execution_count" in out:
            out["execution_count"] = None
        kept.append(out)
    return kept


def run_here(path):
    "Run one notebook in this process and store its outputs."
    from execnb.shell import CaptureShell

    os.chdir(path.parent)
    nb = dress(json.loads(path.read_text(encoding="utf-8")), path.name)
    shell = CaptureShell(path, mpl_format="png")
    skip = re.compile(r"^#\|\s*(eval:\s*false|slow|real_weights)\s*$", re.M)
    for i, cell in enumerate(nb["cells"]):
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        cell["outputs"], cell["execution_count"] = [], None
        if skip.search(source) or not source.strip():
            continue
        outputs = shell.run(source)
        if shell.exc:
            sys.exit(
                f"{path.name}, cell {i}: {shell.prettytb(path.name)}\n--- the cell ---\n{source}"
            )
        cell["outputs"] = tidy(outputs)
        set_alt(cell["outputs"], alt_text(source))
    set_opening(nb)
    write(nb, path)


def write(nb, path):
    path.write_text(
        json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n",
        encoding="utf-8",
        newline="\n",
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="*", type=Path, help="which ones (default: all)")
    parser.add_argument(
        "--badges", action="store_true", help="only rewrite badges and install cells"
    )
    parser.add_argument("--check", action="store_true", help="only check badges and install cells")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    paths = [p.resolve() for p in args.notebooks] or sorted(NBS.glob("*.ipynb"))
    if args.here:
        return run_here(paths[0])
    stale = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        if args.badges or args.check:
            nb = json.loads(text)
            if dress(json.loads(text), path.name) != nb:
                stale.append(path.name)
                if args.badges:
                    write(dress(nb, path.name), path)
            continue
        print(path.name, flush=True)
        env = {k: v for k, v in os.environ.items() if k != "QWEN_NB_MODEL"} | QUIET
        subprocess.run([sys.executable, __file__, "--here", str(path)], env=env, check=True)
        subprocess.run([CLEAN, "--fname", str(path)], check=True)
    if args.check and stale:
        sys.exit(
            f"badge, install cell or link out of date in {', '.join(stale)}: run python "
            "tools/notebooks.py --badges"
        )


if __name__ == "__main__":
    main()
