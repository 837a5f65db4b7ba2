"""Averages the weights of CLOCs that were trained from the same start:

python training/average.py runs/stage1_photos/model runs/stage1_photos_towers/model \
  --output_dir runs/photos_mean
"""

import sys

from cloc_mllm.cli import run
from cloc_mllm.train.average import main

if __name__ == "__main__":
    sys.exit(run(main))
