"""Serves the demo: `python demo/app.py [--cloc DIR] [--mllm DIR] [--port 7860]`."""

from cloc_mllm.demo import main

if __name__ == "__main__":
    main()
