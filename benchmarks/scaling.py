#!/usr/bin/env python3
"""Loss against compute: four widths, each trained for several numbers of steps, one schedule each.

    # some 20 to 60 minutes on one core; goes on where it was stopped
    python benchmarks/scaling.py
    python benchmarks/scaling.py --out FILE

The code that runs a point is `qwen_nb.scaling.run_point`, explained in nbs/21h_scaling.ipynb, which
draws the result. Writes a JSON file with the machine, the date and one record a point; the file is
written anew after each of them.
"""

import argparse
import datetime
import json
import platform
from pathlib import Path

import torch

from qwen_nb.scaling import run_point
from qwen_nb.shards import write_file

STEPS = {
    16: 1280,
    32: 1280,
    64: 640,
    96: 640,
}  # of the longest run of each width; each of the others is half as long as the next, down to 40


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    out = parser.parse_args().out
    machine = (
        f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    )
    found = (
        json.loads(out.read_text())
        if out.is_file()
        else dict(machine=machine, date=str(datetime.date.today()), points=[])
    )
    if found["machine"] != machine:
        raise SystemExit(
            f"{out} was measured on {found['machine']}, this is {machine}: name another --out"
        )
    done = {(p["hidden"], p["steps"]) for p in found["points"]}
    for steps in (40, 80, 160, 320, 640, 1280):
        for hidden in STEPS:
            if steps > STEPS[hidden] or (hidden, steps) in done:
                continue
            found["points"].append(point := run_point(hidden, steps))
            print(
                f"width {hidden:3}, {steps:4} steps: {point['flops']:.2e} operations, loss "
                f"{point['loss']:.4f}, floor {point['floor']:.4f}",
                flush=True,
            )
            write_file(out, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
