"""Rules of CONTRIBUTING.md that a program can check, read from the syntax trees.

One test per rule. It lists every violation as `file:line: what is wrong`.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

from cloc_mllm.ablation.config import AblationConfig
from cloc_mllm.command_line import parse_job
from cloc_mllm.config import Stage1Config, Stage2Config, TinyLlmConfig
from cloc_mllm.evaluation.config import EvalConfig

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cloc_mllm"
MODULES = sorted(PACKAGE.rglob("*.py"))
BENCH = ROOT / "eval" / "bench"  # not thin: what is measured stands beside how
SCRIPTS = sorted(p for top in ("training", "eval", "demo") for p in (ROOT / top).rglob("*.py"))

# A part may import its own layer and the layers before it.
LAYERS = [
    {
        "__init__",
        "box",
        "card",
        "command_line",
        "config",
        "devices",
        "disk",
        "distributed",
        "earlier",
        "extras",
        "garbage",
        "geometry",
        "hub",
        "pages",
        "shipped",
        "stopping",
    },
    {"models", "losses", "data"},
    {"mllm", "vesl"},
    {"inference"},
    {"evaluation"},
    {"train"},
    {"about", "ablation", "demo", "quickstart", "serve"},
    {"cli"},
    {"face"},
]
LAYER_OF = {part: depth for depth, parts in enumerate(LAYERS) for part in parts}

# Signs of a file or function that does too much, not laws: one that has a reason to be longer goes
# into ALLOWED_LENGTHS with that reason, rather than being cut in two.
MAX_MODULE_LINES = 600
MAX_SCRIPT_LINES = 60
MAX_FUNCTION_LINES = 60
MAX_NESTING = 3
ALLOWED_LENGTHS = {
    "cloc_mllm/data/sources.py": 700,  # one table: the options and the reader of each format
    "cloc_mllm/losses/contrastive.py:contrastive_loss": 70,  # both equations in its docstring
    "cloc_mllm/train/loop.py:_train": 100,  # one loop for all stages, read from top to bottom
}

Violation = tuple[int, str]  # line, what is wrong
Check = Callable[[ast.Module], Iterable[Violation]]


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def part_of(path: Path) -> str:
    """`cloc_mllm/data/readers/coco.py` -> `data`; `cloc_mllm/config.py` -> `config`.

    `cloc_mllm/__init__.py` is the `face`: it may name everything, and the package takes nothing
    but its `__version__` from it.
    """
    if path == PACKAGE / "__init__.py":
        return "face"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def violations(check: Check, paths: Iterable[Path]) -> list[str]:
    """Lists what `check` finds in all files, as `file:line: what`."""
    return [
        f"{label(path)}:{line}: {what}" for path in paths for line, what in check(tree_of(path))
    ]


def report(found: list[str]) -> str:
    return f"{len(found)} violations:\n" + "\n".join(found)


# --- imports


def imported_names(nodes: Iterable[ast.AST]) -> Iterator[tuple[int, str]]:
    """`(line, dotted name)` of each import; `from a import b` is `a.b`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def relative_imports(tree: ast.Module) -> Iterator[Violation]:
    for line, name in imported_names(ast.walk(tree)):
        if name.startswith("."):
            yield line, "relative import; write the full name"


def upward_imports(part: str, tree: ast.Module) -> Iterator[Violation]:
    """Imports of a later layer, also those inside functions."""
    for line, name in imported_names(ast.walk(tree)):
        pieces = name.split(".")
        if pieces[0] != "cloc_mllm" or len(pieces) < 2:
            continue
        target = "__init__" if pieces[1].startswith("__") else pieces[1]
        if target not in LAYER_OF:
            yield line, f"{target} has no layer; give it one in this test"
        elif LAYER_OF[target] > LAYER_OF[part]:
            yield line, f"{part} imports {target}, which is above it"


def run_at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes outside of functions and of `if TYPE_CHECKING`."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and dotted(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)


def import_cycles(trees: dict[str, ast.Module]) -> list[list[str]]:
    """Modules that import each other in a ring when they are loaded, each ring once.

    Args:
        trees: by dotted name of the module; a package goes by its own name.
    """
    imports: dict[str, list[str]] = {}
    for module, tree in trees.items():
        names = [name for _, name in imported_names(run_at_import(tree))]
        known = (n if n in trees else n.rpartition(".")[0] for n in names)
        imports[module] = [name for name in known if name in trees]
    finished: set[str] = set()
    rings: list[list[str]] = []

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            rings.append([*path[path.index(module) :], module])
        elif module not in finished:
            for other in imports[module]:
                visit(other, [*path, module])
            finished.add(module)

    for module in imports:
        visit(module, [])
    return rings


# --- calls


def dotted(node: ast.expr) -> str:
    """`torch.load` for the expression torch.load, `.load` after anything that is not a name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


BANNED_CALLS = {
    "pickle.load": "unpickling runs code",
    "pickle.loads": "unpickling runs code",
    "yaml.load": "use yaml.safe_load",
    "yaml.unsafe_load": "use yaml.safe_load",
    "eval": "runs code",
    "exec": "runs code",
    "os.system": "use subprocess with a list",
    "os.popen": "use subprocess with a list",
}
AUTO_LOADER = re.compile(r"Auto\w+\.from_pretrained$")
BANNED_KEYWORDS = ("trust_remote_code", "shell", "allow_pickle")


def banned_calls(tree: ast.Module) -> Iterator[Violation]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if name in BANNED_CALLS:
            yield node.lineno, f"{name}: {BANNED_CALLS[name]}"
        if name.endswith(".extractall"):
            yield node.lineno, "extractall writes where the archive says"
        if name == "torch.load" and not is_constant(keywords.get("weights_only"), True):
            yield node.lineno, "torch.load without weights_only=True"
        if AUTO_LOADER.match(name) and "trust_remote_code" not in keywords:
            yield node.lineno, "without trust_remote_code=False a directory's code can be run"
        for keyword in BANNED_KEYWORDS:
            if keyword in keywords and not is_constant(keywords[keyword], False):
                yield node.lineno, f"{keyword} must not be switched on"


def swallowed_exceptions(tree: ast.Module) -> Iterator[Violation]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        broad = node.type is None or dotted(node.type) in ("Exception", "BaseException")
        if broad and not any(hands_on(child, node.name) for child in ast.walk(node)):
            yield node.lineno, "broad except that does not raise again"


def hands_on(node: ast.AST, error: str | None) -> bool:
    """Whether a statement raises, gives the error to a future, or keeps it to be raised."""
    if isinstance(node, ast.Assign):
        names = [x for x in ast.walk(node.value) if isinstance(x, ast.Name) and x.id == error]
        return bool(names) and any(isinstance(x, ast.Attribute) for x in ast.walk(node.targets[0]))
    gives = isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "set_exception"
    return isinstance(node, ast.Raise) or gives


def distributed_uses(tree: ast.Module) -> Iterator[Violation]:
    for line, name in imported_names(ast.walk(tree)):
        if name == "torch.distributed" or name.startswith("torch.distributed."):
            yield line, "import of torch.distributed; use cloc_mllm.distributed"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node).startswith("torch.distributed."):
            yield node.lineno, "torch.distributed; use cloc_mllm.distributed"


IMAGE_OPENERS = {"Image.open", "PIL.Image.open", "cv2.imread"}
IMAGE_OPENING_IMPORTS = (
    "PIL.Image.open",
    "transformers.image_utils.load_image",
    "transformers.image_utils.load_images",
    "torchvision.io.",
)


def image_openings(tree: ast.Module) -> Iterator[Violation]:
    for line, name in imported_names(ast.walk(tree)):
        if name.startswith(IMAGE_OPENING_IMPORTS):
            yield line, f"import of {name}; use cloc_mllm.data.images.open_image"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and dotted(node.func) in IMAGE_OPENERS:
            yield node.lineno, f"{dotted(node.func)}; use open_image"


# --- sizes


def long_modules(paths: Iterable[Path], limit: int) -> Iterator[str]:
    for path in paths:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > ALLOWED_LENGTHS.get(label(path), limit):
            yield f"{label(path)}:{lines}: {lines} lines, at most {limit}"


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def long_functions(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        for function in functions(tree_of(path)):
            assert function.end_lineno is not None
            lines = function.end_lineno - function.lineno + 1
            limit = ALLOWED_LENGTHS.get(f"{label(path)}:{function.name}", MAX_FUNCTION_LINES)
            if lines > limit:
                place = f"{label(path)}:{function.lineno}"
                yield f"{place}: {function.name} has {lines} lines, at most {limit}"


def nesting(node: ast.AST, depth: int = 0) -> int:
    """Deepest chain of if, for, while and try below `node`; `elif` is as deep as its `if`."""
    deepest = depth
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        blocks = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.Try)
        deeper = depth + 1 if isinstance(child, blocks) and not is_elif else depth
        deepest = max(deepest, nesting(child, deeper))
    return deepest


def deep_functions(tree: ast.Module) -> Iterator[Violation]:
    for function in functions(tree):
        if (depth := nesting(function)) > MAX_NESTING:
            yield function.lineno, f"{function.name} nests {depth} deep, at most {MAX_NESTING}"


# --- the rules


def test_every_part_has_a_layer() -> None:
    # `__init__` stands for the version, `face` for everything else that the file names
    assert {part_of(path) for path in MODULES} == LAYER_OF.keys() - {"__init__"}


def test_imports_go_one_way() -> None:
    found = [
        f"{label(path)}:{line}: {what}"
        for path in MODULES
        for line, what in upward_imports(part_of(path), tree_of(path))
    ]
    assert not found, report(found)


# the second measures bare decoding, beside which the loaders stand
MAY_OPEN_IMAGES = ("cloc_mllm/data/images.py", "eval/bench/loader.py")


def test_images_come_in_one_way() -> None:
    others = [path for path in [*MODULES, *SCRIPTS] if label(path) not in MAY_OPEN_IMAGES]
    found = violations(image_openings, others)
    assert not found, report(found)


def test_no_modules_import_each_other() -> None:
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES}
    trees = {name.removesuffix(".__init__"): tree_of(path) for path, name in names.items()}
    found = [" -> ".join(ring) for ring in import_cycles(trees)]
    assert not found, report(found)


@pytest.mark.parametrize(
    "check",
    [relative_imports, banned_calls, swallowed_exceptions],
    ids=lambda check: check.__name__,
)
def test_what_is_banned_everywhere(check: Check) -> None:
    found = violations(check, [*MODULES, *SCRIPTS])
    assert not found, report(found)


def test_only_one_module_talks_to_torch_distributed() -> None:
    others = [path for path in [*MODULES, *SCRIPTS] if path != PACKAGE / "distributed.py"]
    found = violations(distributed_uses, others)
    assert not found, report(found)


def test_modules_stay_short() -> None:
    found = [
        *long_modules(MODULES, MAX_MODULE_LINES),
        *long_modules([path for path in SCRIPTS if path.parent != BENCH], MAX_SCRIPT_LINES),
        *long_modules(BENCH.glob("*.py"), MAX_MODULE_LINES),
    ]
    assert not found, report(found)


def test_functions_stay_short_and_flat() -> None:
    paths = [*MODULES, *SCRIPTS]
    found = [*long_functions(paths), *violations(deep_functions, paths)]
    assert not found, report(found)


# --- the checks themselves


@pytest.mark.parametrize(
    ("check", "source"),
    [
        (banned_calls, "import pickle\npickle.load(f)"),
        (banned_calls, "torch.load(p)"),
        (banned_calls, "torch.load(p, weights_only=False)"),
        (banned_calls, "yaml.load(f)"),
        (banned_calls, "tar.extractall('x')"),
        (banned_calls, "open_tar(p).extractall()"),
        (banned_calls, "eval('1')"),
        (banned_calls, "AutoModel.from_pretrained(n, trust_remote_code=flag)"),
        (banned_calls, "AutoTokenizer.from_pretrained(n)"),
        (banned_calls, "subprocess.run(c, shell=True)"),
        (swallowed_exceptions, "try:\n    f()\nexcept Exception:\n    pass"),
        (swallowed_exceptions, "try:\n    f()\nexcept:\n    x = 1"),
        (distributed_uses, "import torch.distributed as dist"),
        (distributed_uses, "from torch import distributed"),
        (distributed_uses, "torch.distributed.barrier()"),
        (image_openings, "import PIL.Image\nPIL.Image.open(f)"),
        (image_openings, "from PIL import Image\nwith Image.open(f) as image: pass"),
        (image_openings, "from transformers.image_utils import load_image"),
        (image_openings, "def f():\n    from torchvision.io import decode_image"),
        (deep_functions, "def f():\n if a:\n  for b in c:\n   if d:\n    if e:\n     pass"),
        (relative_imports, "from . import x"),
        (lambda tree: upward_imports("losses", tree), "from cloc_mllm import train"),
        (lambda tree: upward_imports("data", tree), "def f():\n    import cloc_mllm.mllm.x"),
        (lambda tree: upward_imports("cli", tree), "import cloc_mllm.unheard_of"),
        (lambda tree: upward_imports("cli", tree), "from cloc_mllm import ClocPredictor"),
        (lambda tree: upward_imports("inference", tree), "from cloc_mllm.evaluation import run"),
        (lambda tree: upward_imports("evaluation", tree), "from cloc_mllm.train.loop import Job"),
        (lambda tree: upward_imports("train", tree), "from cloc_mllm.serve import main"),
    ],
)
def test_the_checks_find_what_they_look_for(check: Check, source: str) -> None:
    assert len(list(check(ast.parse(source)))) == 1


@pytest.mark.parametrize(
    ("check", "source"),
    [
        (banned_calls, "torch.load(p, weights_only=True)"),
        (banned_calls, "model.eval()\nyaml.safe_load(f)\nrun(c, shell=False)"),
        (swallowed_exceptions, "try:\n    f()\nexcept BaseException:\n    g()\n    raise"),
        (swallowed_exceptions, "try:\n    f()\nexcept ValueError:\n    pass"),
        (image_openings, "image = record.load_image()\nimage = open_image(path)"),
        (deep_functions, "def f():\n if a: pass\n elif b: pass\n elif c: pass\n elif d: pass"),
        (lambda tree: upward_imports("train", tree), "from cloc_mllm.data import records"),
        (lambda tree: upward_imports("losses", tree), "from cloc_mllm import __version__"),
        (lambda tree: upward_imports("train", tree), "from cloc_mllm.evaluation import quick"),
    ],
)
def test_the_checks_let_good_code_pass(check: Check, source: str) -> None:
    assert list(check(ast.parse(source))) == []


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ({"a": "import b", "b": "from c import x", "c": "import a"}, [["a", "b", "c", "a"]]),
        ({"p": "", "p.a": "from p import b", "p.b": "from p.a import x"}, [["p.a", "p.b", "p.a"]]),
        ({"a": "try:\n import b\nexcept E: pass", "b": "import a"}, [["a", "b", "a"]]),
        ({"a": "import b", "b": "def f():\n import a"}, []),
        ({"a": "import b", "b": "if TYPE_CHECKING:\n import a"}, []),
        ({"a": "import b\nimport c", "b": "import c", "c": "import torch"}, []),
    ],
    ids=["ring", "in a package", "in a block", "in a function", "for types", "no ring"],
)
def test_import_cycles_are_found(sources: dict[str, str], expected: list[list[str]]) -> None:
    trees = {name: ast.parse(source) for name, source in sources.items()}
    assert import_cycles(trees) == expected


def test_layout() -> None:
    for name in ("cloc_mllm", "training", "eval", "demo", "tests", "docs"):
        assert (ROOT / name).is_dir(), f"{name}/ is missing"
    for name in ("pyproject.toml", "constraints.txt", "LICENSE", "README.md", "CHANGELOG.md"):
        assert (ROOT / name).is_file(), f"{name} is missing"


def test_importing_the_command_is_light() -> None:
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "import cloc_mllm.cli\n"
        "seconds = time.perf_counter() - start\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'gradio', 'numpy', 'PIL'}\n"
        "print(sorted(heavy & set(sys.modules)), seconds < 1.0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[] True"


# for data that do not ship, named by what they are for
STAGE1_RECIPES = ("coco-hours", "b16-day", "l14-day", "paper")
STAGE2_RECIPES = ("ferret-like", "llava15-like", "small")
CONFIG_CLASSES = {
    "training/configs/stage1_*.yaml": Stage1Config,
    **{f"training/configs/{name}.yaml": Stage1Config for name in STAGE1_RECIPES},
    "training/configs/stage2_*.yaml": Stage2Config,
    **{f"training/configs/{name}.yaml": Stage2Config for name in STAGE2_RECIPES},
    "training/configs/tiny_llm_*.yaml": TinyLlmConfig,
    "eval/configs/ablation*.yaml": AblationConfig,
    "eval/configs/[!a]*.yaml": EvalConfig,
}
CONFIGS = [(path, job) for glob, job in CONFIG_CLASSES.items() for path in sorted(ROOT.glob(glob))]


@pytest.mark.parametrize(("path", "job"), CONFIGS, ids=[label(path) for path, _ in CONFIGS])
def test_shipped_config_is_valid(path: Path, job: type) -> None:
    config, _ = parse_job(job, ["--config", str(path)], prog="test", description="")
    assert isinstance(config, job)


def test_config_headers_name_their_commands() -> None:
    headers = {label(p): p.read_text(encoding="utf-8").partition("\n\n")[0] for p, _ in CONFIGS}
    found = [
        f"{name}:1: must start with a comment that shows the command that runs it"
        for name, header in headers.items()
        if not header.startswith("#") or name not in header
    ]
    assert not found, report(found)


def test_every_config_belongs_to_a_job() -> None:
    all_configs = {*ROOT.glob("training/configs/*"), *ROOT.glob("eval/configs/*")}
    assert all_configs == {path for path, _ in CONFIGS}
