"""The demo: type what to look for and see its boxes, draw on the picture and read what is there.

`pip install '.[demo]'` in a clone, then `cloc-mllm demo`. Gradio is imported only when the page is
built.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser

from cloc_mllm.command_line import parse_settings
from cloc_mllm.config import ModelDtype
from cloc_mllm.garbage import keep_what_is_loaded
from cloc_mllm.shipped import DEFAULT_MODELS, SHIPPED_MODELS, say_what_it_knows

if TYPE_CHECKING:
    import gradio as gr

    from cloc_mllm.demo.engine import DemoEngine
    from cloc_mllm.inference.cloc_predictor import ClocPredictor
    from cloc_mllm.inference.grounding_predictor import GroundingPredictor


def build_app(cloc: ClocPredictor, grounding: GroundingPredictor | None = None) -> gr.Blocks:
    """Builds the page. Without `grounding` only CLOC answers, and the page says so."""
    from cloc_mllm.demo.engine import DemoEngine
    from cloc_mllm.demo.page import build_page

    return build_page(DemoEngine(cloc, grounding))


def main(argv: Sequence[str] | None = None) -> None:
    """`cloc-mllm demo`: loads the models and serves the page until it is interrupted."""
    arguments = parse_settings(_parser(), argv)
    if arguments.model and (arguments.cloc or arguments.mllm):
        raise ValueError("--model names a shipped model; leave it out beside --cloc and --mllm")
    # set before Gradio is imported, which reads them once; uploads get a folder of their own
    uploads = tempfile.TemporaryDirectory(prefix="cloc-mllm-demo-")
    os.environ["GRADIO_TEMP_DIR"] = uploads.name
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    _reach_localhost_directly()

    from transformers.utils.logging import disable_progress_bar

    from cloc_mllm.demo.data_set import DataSet
    from cloc_mllm.demo.engine import DemoEngine
    from cloc_mllm.demo.page import build_page, serve

    # Ctrl-C is the normal end, even while it is still starting
    disable_progress_bar()
    with uploads, contextlib.suppress(KeyboardInterrupt):
        mllm = arguments.mllm or ("scenes" if arguments.model == "scenes" else "")
        cloc = arguments.cloc or arguments.model
        names = (cloc or DEFAULT_MODELS["cloc"], mllm)
        for name in dict.fromkeys(names):
            say_what_it_knows(name)
        engine = DemoEngine(
            *load_predictors(cloc, mllm, arguments.dtype),
            # what both know
            knows=SHIPPED_MODELS.get(names[0], "") if mllm in ("", names[0]) else "",
            names=names,
        )
        rival = load_rival(engine, arguments.compare) if arguments.compare else None
        data_set = DataSet(arguments.data) if arguments.data else None
        app = build_page(engine, rival, data_set)
        keep_what_is_loaded()
        serve(app, host=arguments.host, port=arguments.port, share=arguments.share)


def load_predictors(
    cloc: str, mllm: str, dtype: ModelDtype = "float32"
) -> tuple[ClocPredictor, GroundingPredictor | None]:
    """Loads the predictors of the given directories or shipped models.

    Args:
        cloc: "" is `photos`.
        mllm: "" is none.
    """
    from cloc_mllm.inference.cloc_predictor import ClocPredictor
    from cloc_mllm.inference.grounding_predictor import GroundingPredictor

    grounding = GroundingPredictor.from_pretrained(mllm, dtype=dtype) if mllm else None
    return ClocPredictor.from_pretrained(cloc), grounding


def load_rival(engine: DemoEngine, directory: str) -> DemoEngine:
    """Loads another checkpoint, of stage 1 or 2, to compare with those of `engine`.

    Args:
        directory: or the name of a shipped model; like is compared with like, so that is a language
            model if `engine` has one.
    """
    from cloc_mllm.demo.engine import DemoEngine
    from cloc_mllm.inference.cloc_predictor import ClocPredictor
    from cloc_mllm.inference.grounding_predictor import GroundingPredictor

    of_stage_2 = (Path(directory) / "processor_config.json").is_file()
    if of_stage_2 or (directory in SHIPPED_MODELS and engine.grounding is not None):
        grounding = GroundingPredictor.from_pretrained(directory)
        return DemoEngine(engine.cloc, grounding, names=(engine.names[0], directory))
    return DemoEngine(ClocPredictor.from_pretrained(directory), names=(directory, ""))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="cloc-mllm demo",
        description="A web page on this machine: phrase to box, and box to phrase.",
        exit_on_error=False,
    )
    parser.add_argument(
        "--model",
        choices=["", *SHIPPED_MODELS],
        default="",
        help=f"shipped model; {DEFAULT_MODELS['cloc']} by default, a CLOC alone",
    )
    parser.add_argument(
        "--cloc", default="", metavar="DIR", help="stage-1 model in place of the shipped one"
    )
    parser.add_argument(
        "--mllm",
        default="",
        metavar="DIR",
        help="stage-2 model, which answers in words, too; none by default",
    )
    parser.add_argument(
        "--dtype",
        type=ModelDtype,
        default="float32",
        help="what the MLLM is held in; auto: what its files hold",
    )
    parser.add_argument(
        "--data", default="", metavar="DIR", help="records or chats to browse, made by data build"
    )
    parser.add_argument(
        "--compare",
        default="",
        metavar="DIR",
        help="another checkpoint, or a shipped model, to see side by side",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on")
    parser.add_argument(
        "--share", type=bool, default=False, help="open a public tunnel through gradio.live"
    )
    return parser


def _reach_localhost_directly() -> None:
    """Excludes this machine from any proxy: Gradio asks its own address over HTTP at start."""
    for name in ("no_proxy", "NO_PROXY"):
        hosts = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join(dict.fromkeys([*hosts, "127.0.0.1", "localhost"]))
