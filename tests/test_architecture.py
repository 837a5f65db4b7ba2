"""Rules of CONTRIBUTING.md that a program can check, read from the syntax trees."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from cloc_mllm.ablation.config import AblationConfig
from cloc_mllm.config import Stage1Config, Stage2Config, TinyLlmConfig
from cloc_mllm.evaluation.config import EvalConfig
from cloc_mllm.train.entry import parse_job

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cloc_mllm"
SCRIPTS = [path for top in ("training", "eval", "demo") for path in (ROOT / top).rglob("*.py")]
MODULES = sorted(PACKAGE.rglob("*.py"))

# A part may import its own layer and the layers before it.
LAYERS = [
    {"__init__", "geometry", "distributed", "config", "shipped"},
    {"models", "losses", "data"},
    {"mllm", "vesl"},
    {"train", "evaluation", "inference"},
    {"ablation", "bench", "demo", "quickstart", "serve"},
    {"cli"},
    {"face"},
]
LAYER_OF = {part: depth for depth, parts in enumerate(LAYERS) for part in parts}

MAX_MODULE_LINES = 400
MAX_SCRIPT_LINES = 60
MAX_FUNCTION_LINES = 60
MAX_TRAINING_LOOP_LINES = 100
MAX_NESTING = 3


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


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """`(line, dotted name)` of each import, inside functions too; `from a import b` is `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the full name"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def dotted(node: ast.expr) -> str:
    """`torch.load` for the expression torch.load, `.load` after anything that is not a name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def upward_imports(part: str, tree: ast.AST) -> Iterator[str]:
    for line, name in imported_modules(tree):
        pieces = name.split(".")
        if pieces[0] != "cloc_mllm" or len(pieces) < 2:
            continue
        target = "__init__" if pieces[1].startswith("__") else pieces[1]
        if target not in LAYER_OF:
            yield f"line {line}: {target} has no layer; give it one in this test"
        elif LAYER_OF[target] > LAYER_OF[part]:
            yield f"line {line}: {part} imports {target}, which is above it"


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
BANNED_KEYWORDS = ("trust_remote_code", "shell", "allow_pickle")


def banned_calls(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if name in BANNED_CALLS:
            yield f"line {node.lineno}: {name}: {BANNED_CALLS[name]}"
        if name.endswith(".extractall"):
            yield f"line {node.lineno}: extractall writes where the archive says"
        if name == "torch.load" and not is_constant(keywords.get("weights_only"), True):
            yield f"line {node.lineno}: torch.load without weights_only=True"
        for keyword in BANNED_KEYWORDS:
            if keyword in keywords and not is_constant(keywords[keyword], False):
                yield f"line {node.lineno}: {keyword} must not be switched on"


def swallowed_exceptions(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        broad = node.type is None or dotted(node.type) in ("Exception", "BaseException")
        if broad and not any(isinstance(child, ast.Raise) for child in ast.walk(node)):
            yield f"line {node.lineno}: broad except that does not raise again"


def distributed_uses(tree: ast.AST) -> Iterator[str]:
    for line, name in imported_modules(tree):
        if name == "torch.distributed" or name.startswith("torch.distributed."):
            yield f"line {line}: import of torch.distributed; use cloc_mllm.distributed"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node).startswith("torch.distributed."):
            yield f"line {node.lineno}: torch.distributed; use cloc_mllm.distributed"


IMAGE_OPENERS = {"Image.open", "PIL.Image.open", "cv2.imread"}
IMAGE_OPENING_IMPORTS = (
    "PIL.Image.open",
    "transformers.image_utils.load_image",
    "transformers.image_utils.load_images",
    "torchvision.io.",
)


def image_openings(tree: ast.AST) -> Iterator[str]:
    for line, name in imported_modules(tree):
        if name.startswith(IMAGE_OPENING_IMPORTS):
            yield f"line {line}: import of {name}; use cloc_mllm.data.images.open_image"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and dotted(node.func) in IMAGE_OPENERS:
            yield f"line {node.lineno}: {dotted(node.func)}; use open_image"


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def long_functions(tree: ast.AST, path: Path) -> Iterator[str]:
    for function in functions(tree):
        assert function.end_lineno is not None
        lines = function.end_lineno - function.lineno + 1
        is_loop = function.name == "train" and label(path) == "cloc_mllm/train/loop.py"
        limit = MAX_TRAINING_LOOP_LINES if is_loop else MAX_FUNCTION_LINES
        if lines > limit:
            yield f"line {function.lineno}: {function.name} has {lines} lines, at most {limit}"


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


def deep_functions(tree: ast.AST) -> Iterator[str]:
    for function in functions(tree):
        if (depth := nesting(function)) > MAX_NESTING:
            yield f"line {function.lineno}: {function.name} nests {depth} deep"


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_imports_go_one_way(path: Path) -> None:
    assert part_of(path) in LAYER_OF, f"give {part_of(path)} a layer in this test"
    assert list(upward_imports(part_of(path), tree_of(path))) == []


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=label)
def test_nothing_dangerous_is_called(path: Path) -> None:
    assert list(banned_calls(tree_of(path))) == []
    assert list(swallowed_exceptions(tree_of(path))) == []


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=label)
def test_only_one_module_talks_to_torch_distributed(path: Path) -> None:
    if path != PACKAGE / "distributed.py":
        assert list(distributed_uses(tree_of(path))) == []


# the second measures bare decoding, beside which the loaders stand
MAY_OPEN_IMAGES = ("cloc_mllm/data/images.py", "cloc_mllm/bench/loader.py")


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=label)
def test_images_come_in_one_way(path: Path) -> None:
    if label(path) not in MAY_OPEN_IMAGES:
        assert list(image_openings(tree_of(path))) == []


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=label)
def test_modules_and_functions_stay_short(path: Path) -> None:
    limit = MAX_SCRIPT_LINES if path in SCRIPTS else MAX_MODULE_LINES
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= limit, f"{label(path)} has {lines} lines, at most {limit}"
    assert list(long_functions(tree_of(path), path)) == []
    assert list(deep_functions(tree_of(path))) == []


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
        (lambda tree: upward_imports("losses", tree), "from cloc_mllm import train"),
        (lambda tree: upward_imports("data", tree), "def f():\n    import cloc_mllm.mllm.x"),
        (lambda tree: upward_imports("cli", tree), "import cloc_mllm.unheard_of"),
        (lambda tree: upward_imports("cli", tree), "from cloc_mllm import ClocPredictor"),
    ],
)
def test_the_checks_find_what_they_look_for(check, source: str) -> None:
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
    ],
)
def test_the_checks_let_good_code_pass(check, source: str) -> None:
    assert list(check(ast.parse(source))) == []


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


CONFIG_CLASSES = {
    "training/configs/stage1_*.yaml": Stage1Config,
    "training/configs/stage2_*.yaml": Stage2Config,
    "training/configs/tiny_llm_*.yaml": TinyLlmConfig,
    "eval/configs/ablation*.yaml": AblationConfig,
    "eval/configs/[!a]*.yaml": EvalConfig,
}
CONFIGS = [(path, job) for glob, job in CONFIG_CLASSES.items() for path in sorted(ROOT.glob(glob))]


@pytest.mark.parametrize(("path", "job"), CONFIGS, ids=[label(path) for path, _ in CONFIGS])
def test_shipped_config_is_valid(path: Path, job: type) -> None:
    config, _ = parse_job(job, ["--config", str(path)], prog="test", description="")
    assert isinstance(config, job)


@pytest.mark.parametrize("path", [path for path, _ in CONFIGS], ids=label)
def test_config_header_names_its_command(path: Path) -> None:
    header = path.read_text(encoding="utf-8").partition("\n\n")[0]
    assert header.startswith("#"), f"{label(path)} must start with a comment: command and score"
    assert label(path) in header, f"the header of {label(path)} must show the command that runs it"


def test_every_config_belongs_to_a_job() -> None:
    all_configs = {*ROOT.glob("training/configs/*"), *ROOT.glob("eval/configs/*")}
    assert all_configs == {path for path, _ in CONFIGS}
