"""Serves the demo: `python demo/app.py [--cloc DIR] [--mllm DIR] [--port 7860]`."""

import sys

from cloc_mllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
