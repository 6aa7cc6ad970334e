#!/usr/bin/env python3
"""From a model's folder to a GGUF file for llama.cpp and Ollama:

    python tools/to_gguf.py my_model my_model.gguf --type Q8_0

What to type there is said in nbs/08g_to_gguf.ipynb.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from qwen_nb.to_gguf import FILE_TYPES, save_gguf  # noqa: E402


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="a folder, a .gguf file or a hub id")
    parser.add_argument("file", type=Path, help="the .gguf file to write")
    parser.add_argument("--type", default="BF16", choices=list(FILE_TYPES), help="of the matrices")
    args = parser.parse_args(words)
    try:
        save_gguf(args.model, args.file, args.type)
    except (ValueError, OSError) as error:
        return f"{args.model}: {error}"
    print(f"{args.file}: {args.file.stat().st_size:,} bytes, matrices in {args.type}")


if __name__ == "__main__":
    sys.exit(main())
