"""Makes the small language model of the built-in data, from text alone:

python training/tiny_llm.py --config training/configs/tiny_llm_openmoji.yaml
"""

import sys

from cloc_mllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["tiny-llm", *sys.argv[1:]]))
