"""Evaluate a CLOC model and an MLLM: `python eval/run.py --config eval/configs/quick.yaml`."""

import sys

from cloc_mllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
