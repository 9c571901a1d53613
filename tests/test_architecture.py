"""The package keeps its shape: imports flow one way, files stay short, public names are documented.

Every check is a function of a directory, so that each is also shown to fail on a small bad package.
"""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "weingarten"

# Each layer imports only from itself and from layers above it in this list.
LAYERS = [
    "atomic",
    "tree",
    "matfun",
    "losses",
    "objective",
    "fisher",
    "groups",
    "symmetry",
    "operators",
    "storage",
    "layers",
    "estimators",
    "solvers",
    "optim",
    "bilevel",
    "applications",
    "cli",
]
ALLOWED = {layer: set(LAYERS[: i + 1]) for i, layer in enumerate(LAYERS)}
# The oracles stand aside: they see the problem, not the methods they judge. Checks built on them may use them.
ALLOWED["reference"] = {"reference", "tree", "losses", "objective", "operators"}
ALLOWED["reference_orbit"] = {"reference_orbit", "tree", "groups", "symmetry"}
for consumer in ("bilevel", "applications", "cli"):
    ALLOWED[consumer].add("reference")
ALLOWED["cli"].add("weingarten")  # the command line is a user of the package as a whole

# What the package may import inside a function, since it works without.
OPTIONAL = {
    "cleanlab",
    "jinja2",
    "matplotlib",
    "mlxtend",
    "pandas",
    "pyarrow",
    "rich",
    "safetensors",
    "sklearn",
    "tqdm",
    "transformers",
    "typer",
}

LONGEST_FILE = 330
SHAPELESS_NAMES = {"utils", "util", "misc", "helpers", "helper", "common"}
HOME = re.compile(r"/root/|/home/\w+|/Users/\w+|[A-Z]:\\+Users\\|file:/" + r"/")
REGISTRY = re.compile(
    r"\bpypi\.|pythonhosted\.|download\.pytorch\.|\bregistry\.npm|--(?:extra-)?index-url[= ]\w+://"
)


def sources(package: Path) -> dict[str, Path]:
    """Dotted module name -> file, for every module under ``package`` except its own ``__init__``."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name != package.name:
            found[name] = path
    return found


def imports(node: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str, str | None]]:
    """(line, imported module, imported name or None) for every import below ``node``, relative ones resolved."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from ((child.lineno, alias.name, None) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:
                parts = module.split(".") if is_package else module.split(".")[:-1]
                parts = parts[: len(parts) - child.level + 1]
                base = ".".join([*parts, base] if base else parts)
            yield from ((child.lineno, base, alias.name) for alias in child.names)


def own_imports(package: Path) -> Iterator[tuple[str, int, str]]:
    """(importing module, line, imported module) for imports of the package itself, down to submodules."""
    modules = sources(package)
    for module, path in modules.items():
        for line, base, name in imports(ast.parse(path.read_text()), module, path.name == "__init__.py"):
            target = f"{base}.{name}" if name and f"{base}.{name}" in modules else base
            if target.split(".")[0] == package.name:
                yield module, line, target


def layer_of(module: str) -> str:
    """The layer a dotted module belongs to; the root package is its own."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def upward_imports(package: Path) -> list[str]:
    found = [f"{module}: not in LAYERS" for module in sources(package) if layer_of(module) not in ALLOWED]
    for module, line, target in own_imports(package):
        if layer_of(target) not in ALLOWED.get(layer_of(module), set()):
            found.append(f"{module}:{line} imports {target}")
    return found


def import_cycle(package: Path) -> list[str]:
    """The modules of one cycle, or nothing."""
    graph: dict[str, set[str]] = {}
    for module, _, target in own_imports(package):
        graph.setdefault(module, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def hidden_imports(package: Path) -> list[str]:
    """Imports inside functions of anything that is not optional."""
    found = set()
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                for line, base, name in imports(node, f"{package.name}.{path.stem}", False):
                    if base.split(".")[0] not in OPTIONAL:
                        found.add(f"{path.relative_to(package)}:{line} imports {base or name}")
    return sorted(found)


def long_files(package: Path, limit: int = LONGEST_FILE) -> list[str]:
    lengths = {path: len(path.read_text().splitlines()) for path in sorted(package.rglob("*.py"))}
    return [
        f"{path.relative_to(package)}: {length} lines" for path, length in lengths.items() if length > limit
    ]


def shapeless_files(package: Path) -> list[str]:
    """Files and folders named after nothing in particular."""
    return [
        str(p.relative_to(package))
        for p in sorted(package.rglob("*"))
        if p.stem.lower().strip("_") in SHAPELESS_NAMES
    ]


def bare(owner: type, member: str) -> bool:
    """Whether a method or property has no docstring in its class nor in a base."""
    kept = [vars(base)[member] for base in owner.__mro__ if member in vars(base)]
    return (inspect.isroutine(kept[0]) or isinstance(kept[0], property)) and not any(
        value.__doc__ for value in kept
    )


def undocumented(namespace: object) -> list[str]:
    """Public names without a docstring; for classes also public methods, whose own or inherited docstring counts."""
    found = []
    for name in namespace.__all__:
        value = getattr(namespace, name)
        if not (inspect.isclass(value) or inspect.isroutine(value)):
            continue  # a type alias or a constant cannot carry one
        own = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
        if not own or own.startswith(f"{name}("):  # a dataclass without docstring gets its signature
            found.append(name)
        if inspect.isclass(value):
            found += [
                f"{name}.{member}"
                for member in vars(value)
                if not member.startswith("_") and bare(value, member)
            ]
    return found


def private_places(root: Path, files: list[Path]) -> list[str]:
    """Lines that name a home directory, this checkout's own place, or the host of a package registry."""
    here = str(root) if len(root.parts) > 2 else "\0"
    found = []
    for path in files:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:  # not text
            continue
        for number, line in enumerate(lines, 1):
            if here in line or HOME.search(line) or REGISTRY.search(line):
                found.append(f"{path.relative_to(root)}:{number}: {line.strip()[:100]}")
    return found


def tracked_files() -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and path != Path(__file__).resolve()]


# --- the package ------------------------------------------------------------------------------------------------------


def test_the_package_is_where_the_checks_look():
    assert {"tree", "losses", "operators"} <= {layer_of(module) for module in sources(PACKAGE)}
    assert len(list(own_imports(PACKAGE))) > 10


def test_imports_flow_one_way():
    assert upward_imports(PACKAGE) == []


def test_imports_have_no_cycle():
    assert import_cycle(PACKAGE) == []


def test_imports_inside_functions_are_optional_dependencies():
    assert hidden_imports(PACKAGE) == []


def test_package_imports_without_optional_dependencies():
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in sorted(OPTIONAL))
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"import sys; {blocked}; import weingarten"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_files_are_short():
    assert long_files(PACKAGE) == []


def test_files_are_named_after_something():
    assert shapeless_files(PACKAGE) == []


def test_public_names_are_documented():
    import weingarten

    assert len(weingarten.__all__) == len(set(weingarten.__all__)) > 0
    assert undocumented(weingarten) == []


def test_no_private_places():
    files = tracked_files()
    assert ROOT / "pyproject.toml" in files
    assert private_places(ROOT, files) == []


# --- each check can fail ----------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path):
    """Writes a small package ``weingarten`` from a dict of relative path -> text and returns its folder."""

    def write(files: dict[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / "weingarten" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / "weingarten"

    return write


@pytest.mark.parametrize(
    "text",
    [
        "from weingarten.solvers import CG",
        "from weingarten.solvers.cg import CG",
        "from weingarten import solvers",
        "import weingarten.solvers.cg",
        "import weingarten as wg",
        "from ..solvers import CG",
        "from .. import solvers",
        "from weingarten.reference import dense",
        "def f():\n    from weingarten.solvers import CG",
        "if TYPE_CHECKING:\n    from weingarten.solvers import CG",
    ],
)
def test_upward_import_is_found(package, text):
    folder = package(
        {
            "operators/ggn.py": text,
            "solvers/__init__.py": "",
            "solvers/cg.py": "",
            "reference.py": "",
            "__init__.py": "",
        }
    )
    (found,) = upward_imports(folder)
    assert found.startswith("weingarten.operators.ggn:")


def test_downward_imports_and_the_root_package_are_allowed(package):
    folder = package(
        {
            "__init__.py": "from weingarten.solvers import CG",
            "solvers/cg.py": "from weingarten import tree\nfrom weingarten.operators import Operator\nfrom . import solver",
            "solvers/solver.py": "",
            "tree.py": "",
            "reference.py": "from weingarten.operators import Operator",
            "cli.py": "import weingarten as wg",
        }
    )
    assert upward_imports(folder) == []
    assert import_cycle(folder) == []


@pytest.mark.parametrize("layer", ["fisher", "solvers", "estimators"])
def test_oracle_that_knows_a_method_is_found(package, layer):
    assert upward_imports(package({"reference.py": f"from weingarten.{layer} import x"})) == [
        f"weingarten.reference:1 imports weingarten.{layer}"
    ]


def test_unknown_layer_is_found(package):
    assert upward_imports(package({"tree.py": "", "extras.py": ""})) == ["weingarten.extras: not in LAYERS"]


def test_cycle_within_a_layer_is_found(package):
    folder = package(
        {
            "solvers/a.py": "from weingarten.solvers.b import x",
            "solvers/b.py": "from weingarten.solvers.a import y",
        }
    )
    assert set(import_cycle(folder)) == {"weingarten.solvers.a", "weingarten.solvers.b"}
    through_init = package(
        {"solvers/__init__.py": "from weingarten.solvers.a import x", "solvers/a.py": "", "solvers/b.py": ""}
    )
    assert import_cycle(through_init) == []
    package({"solvers/a.py": "from weingarten.solvers import CG"})
    assert set(import_cycle(through_init)) == {"weingarten.solvers", "weingarten.solvers.a"}


@pytest.mark.parametrize(
    "text",
    [
        "def f():\n    import torch",
        "class A:\n    def f(self):\n        from weingarten import tree",
        "def f():\n    def g():\n        import torch",
        "async def f():\n    import torch",
        "def f():\n    from . import solver",
    ],
)
def test_hidden_import_is_found(package, text):
    assert len(hidden_imports(package({"tree.py": text}))) == 1


def test_optional_import_inside_a_function_is_allowed(package):
    assert (
        hidden_imports(
            package({"tree.py": "import torch\ndef f():\n    from sklearn.datasets import load_digits"})
        )
        == []
    )


def test_long_file_is_found(package):
    folder = package({"tree.py": "\n" * LONGEST_FILE, "matfun.py": "\n" * (LONGEST_FILE + 1)})
    assert long_files(folder) == [f"matfun.py: {LONGEST_FILE + 1} lines"]


@pytest.mark.parametrize("name", ["utils.py", "losses/helpers.py", "_common.py", "misc/tree.py"])
def test_shapeless_name_is_found(package, name):
    assert len(shapeless_files(package({name: "", "tree.py": ""}))) == 1


def test_missing_docstring_is_found():
    class Base:
        """Documented."""

        def method(self):
            """Documented."""

    class Good(Base):
        """Documented."""

        def method(self):
            pass

        def _private(self):
            pass

    class Undocumented(Base):
        def extra(self):
            pass

        @property
        def size(self):
            return 0

    def function():
        pass

    class Namespace:
        __all__ = ("Good", "Undocumented", "alias", "function")

    Namespace.Good, Namespace.Undocumented, Namespace.function, Namespace.alias = (
        Good,
        Undocumented,
        function,
        dict[str, int],
    )
    assert undocumented(Namespace) == ["Undocumented", "Undocumented.extra", "Undocumented.size", "function"]


@pytest.mark.parametrize(
    "line",
    [
        "see /ho" + "me/someone/data.csv",
        "cd /ro" + "ot/project",
        "open('/Use" + "rs/someone/x')",
        r"C:\Us" + r"ers\someone",
        "pip install --index-url htt" + "ps://example.org/simple",
        "https://py" + "pi.org/simple",
        "https://files.python" + "hosted.org/x.whl",
        "https://download.py" + "torch.org/whl/cpu",
    ],
)
def test_private_place_is_found(tmp_path, line):
    bad, good, binary = tmp_path / "a.md", tmp_path / "b.md", tmp_path / "c.bin"
    bad.write_text(f"first\n{line}\n")
    good.write_text(
        "torch.org and ~/data and https://arxiv.org/abs/1503.05671 and grid/home and src/weingarten\n"
    )
    binary.write_bytes(b"\xff\xfe\x00")
    (found,) = private_places(tmp_path, [bad, good, binary])
    assert found.startswith("a.md:2:")


def test_this_checkouts_own_path_is_found(tmp_path):
    note = tmp_path / "note.txt"
    note.write_text(f"results in {tmp_path}/runs")
    assert len(private_places(tmp_path, [note])) == 1
