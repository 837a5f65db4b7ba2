"""Puts trained models into the package, in half precision:

python training/ship.py --name photos --cloc runs/stage1_photos/model --phrases DATA
python training/ship.py --name photos --adapter runs/stage2_photos
python training/ship.py --name scenes --cloc runs/STAGE1/model --mllm runs/STAGE2/model
"""

import sys

from cloc_mllm.cli import run
from cloc_mllm.train.ship import main

if __name__ == "__main__":
    sys.exit(run(main))
