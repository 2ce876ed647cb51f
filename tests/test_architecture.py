"""The house keeps its floors: who imports whom, what is pure, how long a file and a function may be."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "transferjax"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

FLOORS = {
    "_types": 0, "_errors": 0, "_report": 0, "_context": 0,
    "tree": 1, "numerics": 1, "program": 1,
    "tuning": 2, "surgery": 2, "optim": 2, "objectives": 2, "features": 2, "scores": 2, "interop": 2, "report": 2,
    "merging": 2,
    "finetune": 3, "io": 3, "data": 3,
    "models": 4, "advise": 4, "testing": 4,
    "__init__": 5,  # the public names; what stands above uses them as anyone does
    "cli": 6, "__main__": 7,
}  # fmt: skip
PURE = {name for name, floor in FLOORS.items() if floor <= 2}
STANDARD = sys.stdlib_module_names
CORE = {"jax", "numpy", "optax", "ml_dtypes"}
ALLOWED = {
    **{name: CORE for name, floor in FLOORS.items() if floor <= 2 or name == "finetune"},
    "features": CORE | {"ott"},
    "scores": CORE | {"ott"},
    "merging": CORE | {"scipy"},
    "interop": CORE | {"flax"},
    "report": CORE | {"matplotlib"},
    "models": CORE | {"flax"},
    "io": CORE | {"orbax", "tensorstore", "matplotlib", "huggingface_hub", "etils", "array_record"},
    "data": CORE
    | {
        "tensorflow_datasets",
        "grain",
        "array_record",
        "PIL",
        "absl",
        "etils",
        "importlib_resources",
        "tokenizers",
    },
    "testing": CORE,
    "advise": CORE,
    "cli": CORE | {"rich", "matplotlib"},
}
WORLD = {"time", "datetime", "logging", "io", "shutil", "tempfile", "subprocess", "socket", "warnings", "random"}
NO_LOOK_AT_THE_WORLD = {"print", "open", "input"}


def name_of(path):
    """The package (or module of the ground floor) that a file belongs to."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def module_of(path):
    parts = ["transferjax", *path.relative_to(PACKAGE).with_suffix("").parts]
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(path):
    """Every imported module of a file as ``(line, dotted name)``, those inside functions too."""
    found = []
    types_only = [n for n in ast.walk(TREES[path]) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    skipped = {id(node) for block in types_only for node in ast.walk(block) if path.name == "__init__.py"}
    for node in ast.walk(TREES[path]):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module_of(path)
                keep = len(parts) - node.level + (path.name == "__init__.py")
                base = ".".join([*parts[:keep], *([node.module] if node.module else [])])
            if base == "transferjax":
                found += [(node.lineno, f"transferjax.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, base))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_its_own_package_or_lower_floors(path):
    own = name_of(path)
    assert own in FLOORS, f"'{own}' has no floor: give it one in FLOORS, and in the list of the house."
    wrong = []
    for line, module in imports(path):
        parts = module.split(".")
        if parts[0] != "transferjax":
            continue
        other = parts[1] if len(parts) > 1 else "__init__"
        if other not in FLOORS:
            other = "__init__"  # a public name: only the top floor has those
        if other != own and FLOORS[other] >= FLOORS[own] and (FLOORS[other] or FLOORS[own]):
            wrong.append(f"line {line}: {module} (floor {FLOORS[other]}) from '{own}' (floor {FLOORS[own]})")
    assert wrong == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_package_imports_only_the_libraries_it_may(path):
    own = name_of(path)
    if own not in ALLOWED:
        pytest.skip("the top floor has no libraries of its own")
    roots = {(line, module.split(".")[0]) for line, module in imports(path)}
    strange = sorted(f"line {n}: {root}" for n, root in roots if root not in STANDARD | ALLOWED[own] | {"transferjax"})
    assert strange == []


@pytest.mark.parametrize(
    "path", [p for p in FILES if name_of(p) in PURE], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_the_lower_floors_touch_no_file_clock_log_or_terminal(path):
    found = [f"line {line}: import {module}" for line, module in imports(path) if module.split(".")[0] in WORLD]
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NO_LOOK_AT_THE_WORLD:
            found.append(f"line {node.lineno}: {node.func.id}()")
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "read_text", "write_text", "savefig"):
            found.append(f"line {node.lineno}: .{node.attr}")
    assert found == []


@pytest.mark.parametrize(
    "path", [p for p in FILES if name_of(p) != "cli"], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_only_the_command_line_prints(path):
    if any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in TREES[path].body):
        pytest.skip("a script")
    calls = [node for node in ast.walk(TREES[path]) if isinstance(node, ast.Call)]
    assert [node.lineno for node in calls if ast.unparse(node.func) == "print"] == []


def test_a_file_holds_one_idea():
    """At most 400 lines; a longer file holds two ideas."""
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_a_function_holds_one_idea():
    """At most 60 lines, its docstring aside."""
    long = {}
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                length = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                if length > 60:
                    long[f"{path.relative_to(ROOT)}:{node.name}"] = length
    assert long == {}


def test_every_test_file_stands_where_its_code_stands():
    """tests/io/test_torch.py is for transferjax/io/_torch.py; tests of a whole package are named after it."""
    free = {"laws", "golden", "e2e", "fixtures"}
    packages = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    places = {path.parent.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").glob("*/**/test_*.py")}
    assert places - free - packages == set()


def _modules_after(statement):
    code = f"import sys; {statement}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_importing_the_library_loads_jax_and_optax_only():
    extra = _modules_after("import transferjax") - _modules_after("import jax, optax") - STANDARD
    assert extra == {"transferjax"}


def test_the_public_names_of_the_lower_floors_load_nothing_more():
    statement = "import transferjax as tj; tj.tree, tj.tuning, tj.optim, tj.objectives, tj.finetune, tj.surgery"
    statement += ", tj.program, tj.numerics, tj.interop"
    assert _modules_after(statement) - _modules_after("import jax, optax") - STANDARD == {"transferjax"}


def _words(node):
    """The literal parts of a message, or ``None`` when it is not written where it is raised."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return [part.value for part in node.values if isinstance(part, ast.Constant)]
    if isinstance(node, ast.BinOp):
        return (_words(node.left) or []) + (_words(node.right) or [])
    return None


def raised(path):
    """``(line, literal parts of the message)`` of every ``raise`` of a file."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            words = _words(node.exc.args[0])
            if words:
                yield node.lineno, words


def _plain(text):
    """Text without the marks that Python strings and regular expressions add, so that tests and code compare."""
    return re.sub(r"[^a-z0-9]+", " ", re.sub(r"\\[nt]|\.\*|\.\+", " ", text.lower())).strip()


READ_OTHERWISE = {
    "braces were balanced by _split_outside_braces": "an assertion about our own code",
    "no reference for operation '": "an assertion about our own code",
    " differ. Expected equal leaves: copy one onto the other first.": "interop/test_extend.py",
    " is malformed: ": "surgery/test_rules.py",
}
GAP = r"(?: \S+){0,8}? "


def _read_by(words, tests):
    """Whether some test reads this message: three of its words in a row, with what is filled in between them."""
    tokens = []
    for part in words:
        tokens += [*_plain(part).split(), GAP]
    tokens = tokens[:-1]
    literal = [n for n, token in enumerate(tokens) if token != GAP]
    for first, _, last in zip(literal, literal[1:], literal[2:]):
        window = tokens[first : last + 1]
        if re.search(r"\b" + " ".join(window).replace(f" {GAP} ", GAP) + r"\b", tests):
            return True
    return len(literal) < 3 and any(_plain(part) in tests for part in words if _plain(part))


def test_every_raise_has_a_test_that_reads_its_message():
    def literals(path):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        return [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]

    tests = " | ".join(_plain(text) for path in (ROOT / "tests").rglob("test_*.py") for text in literals(path))
    unread = [
        f"{path.relative_to(ROOT)}:{line}: {' ... '.join(words)[:100]}"
        for path in FILES
        for line, words in raised(path)
        if not READ_OTHERWISE.keys() & set(words) and not _read_by(words, tests)
    ]
    assert unread == []
