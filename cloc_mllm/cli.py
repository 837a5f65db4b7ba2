"""The `cloc-mllm` command: a table of subcommands, each loaded only when it is called."""

from __future__ import annotations

import atexit
import difflib
import gc
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cloc_mllm import __version__
from cloc_mllm.disk import disk_problem
from cloc_mllm.extras import EXTRA_OF_PACKAGE, install_command
from cloc_mllm.stopping import stop_with_launcher


class Subcommand(NamedTuple):
    """`module:function` takes the remaining arguments; it returns the exit status, None is 0."""

    module: str
    function: str
    help: str


SUBCOMMANDS: dict[str, Subcommand] = {
    "ground": Subcommand(
        "cloc_mllm.inference.commands", "main_ground", "PICTURE PHRASE...: draw the box of a phrase"
    ),
    "refer": Subcommand(
        "cloc_mllm.inference.commands",
        "main_refer",
        "PICTURE X1 Y1 X2 Y2: say what is in a region",
    ),
    "ask": Subcommand(
        "cloc_mllm.inference.commands", "main_ask", "PICTURE QUESTION: a language model answers"
    ),
    "demo": Subcommand("cloc_mllm.demo", "main", "all of them in the browser"),
    "serve": Subcommand("cloc_mllm.serve", "main", "an OpenAI-compatible endpoint"),
    "data": Subcommand(
        "cloc_mllm.data.commands", "main", "build, look at, check, split, merge and export records"
    ),
    "label": Subcommand(
        "cloc_mllm.vesl.commands", "main", "images and captions -> records, by VESL"
    ),
    "stage1": Subcommand("cloc_mllm.train.stage1", "main", "train CLOC (image and region towers)"),
    "stage2": Subcommand(
        "cloc_mllm.train.stage2", "main", "plug a CLOC encoder into a language model"
    ),
    "tiny-llm": Subcommand(
        "cloc_mllm.train.tiny_llm", "main", "make the small language model of the built-in data"
    ),
    "eval": Subcommand(
        "cloc_mllm.evaluation.commands",
        "main",
        "predict, score and report; eval score: rows to numbers",
    ),
    "ablate": Subcommand(
        "cloc_mllm.ablation", "main", "the paper's ablations: train and score arms over seeds"
    ),
    "phrases": Subcommand(
        "cloc_mllm.inference.name_list", "main", "give a CLOC the phrases that it names regions by"
    ),
    "export": Subcommand(
        "cloc_mllm.train.export", "main", "weights for open_clip, Transformers, peft and others"
    ),
    "models": Subcommand(
        "cloc_mllm.about", "main_models", "shipped and local models: what they know, scores"
    ),
    "doctor": Subcommand(
        "cloc_mllm.about", "main_doctor", "is this machine ready? what is missing; is a model whole"
    ),
    "quickstart": Subcommand(
        "cloc_mllm.quickstart", "main", "all of it on built-in data, in minutes on a CPU"
    ),
}

# They answer once and end: nothing to collect, and the system frees memory faster than Python
ONE_SHOT = ("ground", "refer", "ask", "models", "doctor")

USER_ERRORS = (
    ValueError,
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)


def entry() -> int:
    """The `cloc-mllm` of a shell: `main`, faster for commands that answer once.

    They collect no garbage, of which importing makes little, and take no module apart at the end.
    What was registered with `atexit` still runs, such as the removal of temporary folders: the exit
    below was registered first, so it comes last.
    """
    if sys.argv[1:2] and sys.argv[1] in ONE_SHOT:
        gc.disable()
        atexit.register(_end_at_once, status := [])
        status.append(main())
        return status[0]
    return main()


def _end_at_once(status: list[int]) -> None:
    """Ends the process if the command has returned its status; an error takes the usual way."""
    if status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status, see `run`."""
    return run(_dispatch, argv)


def _dispatch(args: list[str]) -> int | None:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if args[0] in ("-V", "--version"):
        print(f"cloc-mllm {__version__}")
        return 0
    if args[0] not in SUBCOMMANDS:
        print(_unknown(args[0]), file=sys.stderr)
        return 2
    if "RANK" in os.environ:
        stop_with_launcher()
    subcommand = SUBCOMMANDS[args[0]]
    module = importlib.import_module(subcommand.module)
    status: int | None = getattr(module, subcommand.function)(args[1:])
    return status


def run(command: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Runs a command or a script, and tells users' errors in one line.

    Args:
        command: takes the arguments; returns the exit status, None is 0.
        argv: the arguments; None takes those of the process.

    Returns:
        the exit status of the command; 2 for wrong input, which prints one line and no traceback
        (set CLOC_DEBUG=1 to see where it was raised); 130 after Ctrl-C; 141 where the reader of
        the output, such as `head`, has gone.
    """
    _keep_libraries_quiet()
    try:
        try:
            return command(list(sys.argv[1:] if argv is None else argv)) or 0
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # what is left in the buffer would raise again when the process ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("cloc-mllm: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        message = _message(error)
        if message is None or os.environ.get("CLOC_DEBUG") == "1":
            raise
        _close_bars()
        print(f"cloc-mllm: error: {message}", file=sys.stderr)
        return 2


def _keep_libraries_quiet() -> None:
    """Keeps from users what libraries have to say to who writes code with them."""
    # Transformers' new name for it is younger than the oldest version that this package takes; peft
    # says the old one, too
    warnings.filterwarnings(
        "ignore", r"`\w*gradient_checkpointing\w*` is deprecated", FutureWarning
    )
    # bitsandbytes, of a faster kernel for 4 bits on CPUs
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _close_bars() -> None:
    """Ends the lines of progress bars, which an error's traceback keeps open."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    for bar in [*getattr(tqdm, "_instances", ())]:
        bar.close()


def _message(error: Exception) -> str | None:
    """One line for the user, or None for an error that is ours."""
    if not isinstance(error, ValueError) and (problem := disk_problem(error)):
        return f"{problem}, then the same command goes on"
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        extra = EXTRA_OF_PACKAGE.get(package)
        if extra is None:
            return None
        return f"{package} is not installed; run: {install_command(extra)}"
    if isinstance(error, OSError) and error.errno is None and str(error):
        return " ".join(str(error).split())  # Transformers': no such model, no network
    if not isinstance(error, USER_ERRORS):
        return None
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return str(error)


def _usage() -> str:
    width = max(map(len, SUBCOMMANDS))
    rows = [f"  {name:<{width}}  {sub.help}" for name, sub in SUBCOMMANDS.items()]
    return "\n".join(
        [
            "usage: cloc-mllm [--help] [--version] COMMAND ...",
            "",
            "Grounding in multimodal LLMs, built on CLOC.",
            "",
            "commands:",
            *rows,
            "",
            "`cloc-mllm COMMAND --help` describes one command.",
            "CLOC_DEBUG=1 in the environment shows where an error was raised.",
        ]
    )


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, SUBCOMMANDS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    known = ", ".join(SUBCOMMANDS)
    return f"cloc-mllm: error: unknown command {name!r}{hint}\ncommands: {known}"


if __name__ == "__main__":
    sys.exit(entry())
