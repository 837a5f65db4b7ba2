"""MLLM tuning. One process, two on a machine, or a hostfile:

python training/stage2.py --config training/configs/stage2_openmoji.yaml --optim.lr 5e-4
torchrun --nproc_per_node 2 training/stage2.py --config training/configs/stage2_openmoji.yaml
deepspeed --num_gpus 2 training/stage2.py --config training/configs/stage2_openmoji.yaml
"""

import sys

from cloc_mllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["stage2", *sys.argv[1:]]))
