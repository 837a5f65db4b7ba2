"""Serves a grounding MLLM as an OpenAI-compatible endpoint.

`pip install '.[serve]'` in a clone, then `cloc-mllm serve`. FastAPI is imported only when the
server starts.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from jsonargparse import ArgumentParser

from cloc_mllm.command_line import parse_settings
from cloc_mllm.config import ModelDtype
from cloc_mllm.garbage import keep_what_is_loaded
from cloc_mllm.serve.limits import Limits
from cloc_mllm.shipped import DEFAULT_MODELS, say_what_it_knows


def main(argv: Sequence[str] | None = None) -> int:
    """`cloc-mllm serve`: loads the model and answers until it is interrupted.

    At SIGTERM, SIGHUP or Ctrl-C nothing new is taken and running answers end; at a second one it
    ends at once.

    Returns:
        128 + the number of the signal that ended it.

    Raises:
        ValueError: it cannot listen on the address.
    """
    parser = _parser()
    arguments = parse_settings(parser, argv)
    limits = parser.instantiate_classes(arguments).limits

    # before the weights are loaded, so that a taken port is reported at once
    with listen(arguments.host, arguments.port) as listening:
        import uvicorn
        from transformers.utils.logging import disable_progress_bar

        from cloc_mllm.inference.grounding_predictor import GroundingPredictor
        from cloc_mllm.serve.app import build_app
        from cloc_mllm.serve.connections import (
            MAX_CONNECTS_AT_ONCE,
            BoundedProtocol,
            QueueingServer,
        )
        from cloc_mllm.stopping import StopRequest, take_hangup_for_sigterm

        disable_progress_bar()
        _log_requests()
        say_what_it_knows(arguments.mllm or DEFAULT_MODELS["mllm"], "--mllm")
        predictor = GroundingPredictor.from_pretrained(
            arguments.mllm or None, dtype=arguments.dtype
        )
        name = arguments.name or model_name(arguments.mllm)
        server = QueueingServer(
            uvicorn.Config(
                build_app(predictor, name, limits),
                http=cast(Any, partial(BoundedProtocol, limits=limits, waiting={})),
                backlog=MAX_CONNECTS_AT_ONCE,
                log_level="warning",
                timeout_graceful_shutdown=limits.stop_seconds,
            )
        )
        keep_what_is_loaded()
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"model {name!r} on http://{shown}:{port}/v1, Ctrl-C ends it", flush=True)
        # the server handles signals itself and raises them again after it has closed
        with StopRequest() as stop:
            take_hangup_for_sigterm()
            server.run(sockets=[listening])
    return 128 + stop.signal_number if stop.requested else 0


def _log_requests() -> None:
    """Writes a line per chat to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("cloc_mllm.serve")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def listen(host: str, port: int) -> socket.socket:
    """Opens a listening TCP socket, port 0 takes a free port, whose connections send at once.

    asyncio sets TCP_NODELAY only where it opens the socket itself; without it the body of an
    answer waits 40 ms for the client to acknowledge the head.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"cannot listen on {host} port {port} ({error}); choose another --host or --port"
        ) from error


def model_name(directory: str) -> str:
    """Names a model by its directory: `runs/stage2/model` is `stage2`, "" is `cloc-mllm`."""
    if not directory:
        return "cloc-mllm"
    path = Path(directory).resolve()
    return path.parent.name if path.name == "model" else path.name


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="cloc-mllm serve",
        description="An OpenAI-compatible endpoint (/v1/chat/completions) on this machine. It has "
        "no passwords: before others can reach it, put a proxy in front of it that has.",
        exit_on_error=False,
    )
    parser.add_argument(
        "--mllm", default="", metavar="DIR", help="stage-2 model; the shipped one by default"
    )
    parser.add_argument(
        "--dtype",
        type=ModelDtype,
        default="float32",
        help="what the model is held in; auto: what its files hold",
    )
    parser.add_argument("--name", default="", help="model name; by default that of its directory")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on, 0: any")
    parser.add_class_arguments(Limits, "limits")
    return parser
