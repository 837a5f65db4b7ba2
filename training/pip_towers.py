"""Write the pip-installed towers where `stage1_flickr8k.yaml` looks for them.

python training/pip_towers.py --out runs/towers
"""

import argparse
from pathlib import Path

from cloc_mllm.models.pip_towers import write_efficientnet_lite0, write_minilm

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/towers"), help="directory to write")
    out = parser.parse_args().out
    write_efficientnet_lite0(out / "efficientnet_lite0.safetensors")
    write_minilm(out / "minilm")
    print(f"wrote {out}/efficientnet_lite0.safetensors and {out}/minilm")
