"""Writes the pip-installed towers where `stage1_flickr8k.yaml` looks for them.

python training/pip_towers.py --output_dir runs/towers
"""

import sys

from cloc_mllm.cli import run
from cloc_mllm.models.pip_towers import main

if __name__ == "__main__":
    sys.exit(run(main))
