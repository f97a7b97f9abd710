"""The house rules, held by reading the source: floors, shape, words of explanation, and what is never imported."""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
FLOORS = {"configs": -1, "kernels": 0, "engine": 1, "adapters": 2}
"""An import goes to the same floor or a lower one."""
PURE = ("engine", "kernels")
OUTSIDE_WORLD = {"socket", "http", "zmq", "ismrmrd", "h5py", "prometheus_client", "typer", "rich"}
UNSAFE = {"pickle", "marshal", "shelve"}
LONGEST_FUNCTION, MEDIAN_FUNCTION, LONGEST_FILE = 60, 8, 500

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


class Source:
    """One Python file of the package."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text, self.tree = path, text, ast.parse(text)
        self.parts = path.with_suffix("").parts
        self.floor = self.parts[0]
        self.nodes = list(ast.walk(self.tree))

    def at(self, node: ast.AST, what: str) -> str:
        """A finding: file, line, what."""
        return f"{self.path}:{getattr(node, 'lineno', 1)} {what}"

    def functions(self) -> Iterator[Function]:
        """All functions, nested ones too."""
        return (node for node in self.nodes if isinstance(node, Function))

    def imports(self) -> Iterator[tuple[ast.AST, str]]:
        """Full dotted names of everything imported, wherever the statement stands; relative ones resolved."""
        for node in self.nodes:
            if isinstance(node, ast.Import):
                yield from ((node, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = self._base(node)
                yield from ((node, f"{base}.{alias.name}") for alias in node.names)
            elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__") and literal(node):
                yield node, literal(node)

    def _base(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = ("scanside", *self.parts)[: len(self.parts) + 1 - node.level]
        return ".".join((*package, *filter(None, [node.module])))


def called(node: ast.Call) -> str:
    """Last part of the name of what is called."""
    function = node.func
    return (
        function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""
    )


def literal(node: ast.Call) -> str:
    """The first argument where it is a text, else nothing."""
    first = node.args[0] if node.args else None
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else ""


def public(name: str) -> bool:
    return not name.startswith("_")


def sources() -> list[Source]:
    paths = sorted(path for floor in FLOORS for path in (REPOSITORY / floor).rglob("*.py"))
    return [Source(path.relative_to(REPOSITORY), path.read_text("utf-8")) for path in paths]


@pytest.fixture(scope="module")
def house() -> list[Source]:
    return sources()


def report(findings: Iterator[str] | list[str]) -> None:
    """Fail with one finding a line."""
    lines = list(findings)
    if lines:
        pytest.fail("\n".join(lines), pytrace=False)


# --- the rules, each a function from a file to its findings ------------------------------------------------------------------


def upward_imports(source: Source) -> Iterator[str]:
    for node, name in source.imports():
        top, _, rest = name.partition(".")
        floor = rest.partition(".")[0] if top == "scanside" else top
        if top in FLOORS:
            yield source.at(node, f"imports {name} without the name space; write scanside.{name}")
        elif top == "scanside" and floor not in FLOORS:
            yield source.at(node, f"imports {name}, which is on no floor")
        elif top == "scanside" and FLOORS[floor] > FLOORS[source.floor]:
            yield source.at(node, f"{source.floor} imports {name}, which lies above it")


def outside_imports(source: Source) -> Iterator[str]:
    for node, name in source.imports():
        if source.floor in PURE and name.partition(".")[0] in OUTSIDE_WORLD:
            yield source.at(
                node, f"{source.floor} imports {name}; what touches the outside world belongs into adapters"
            )


def unsafe_imports(source: Source) -> Iterator[str]:
    for node, name in source.imports():
        if name.partition(".")[0] in UNSAFE:
            yield source.at(node, f"imports {name}, which runs what it reads")
    for node in source.nodes:
        if isinstance(node, ast.Call) and called(node) in ("import_module", "__import__") and not literal(node):
            yield source.at(node, "imports by a name that is not written here")


def length(function: Function) -> int:
    """Lines of the body without the docstring."""
    body = function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def long_functions(source: Source) -> Iterator[str]:
    for function in source.functions():
        if length(function) > LONGEST_FUNCTION:
            yield source.at(function, f"{function.name} has {length(function)} lines, {LONGEST_FUNCTION} are allowed")


def long_files(source: Source) -> Iterator[str]:
    lines = len(source.text.splitlines())
    if lines > LONGEST_FILE:
        yield f"{source.path}:1 has {lines} lines, {LONGEST_FILE} are allowed"


def definitions(source: Source) -> Iterator[tuple[str, Definition]]:
    """Public classes, functions and methods by their names; also those under a top-level `if` or `try`."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, Definition]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Definition):
                if public(child.name):
                    yield prefix + child.name, child
                    if isinstance(child, ast.ClassDef):
                        yield from walk(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.If | ast.Try):
                yield from walk(child, prefix)

    return walk(source.tree, "")


def decorators(node: Definition) -> set[str]:
    names = (ast.unparse(decorator).partition("(")[0] for decorator in node.decorator_list)
    return {name.rpartition(".")[2] for name in names}


def undocumented(source: Source) -> Iterator[str]:
    if not ast.get_docstring(source.tree):
        yield f"{source.path}:1 module has no docstring"
    for name, node in definitions(source):
        if not ast.get_docstring(node) and not decorators(node) & {"overload", "setter"}:
            yield source.at(node, f"{name} has no docstring")


def signatures(source: Source) -> Iterator[tuple[str, Function]]:
    """Public functions and methods, and special methods of public classes."""
    for name, node in definitions(source):
        if isinstance(node, Function):
            yield name, node
        else:
            special = (n for n in node.body if isinstance(n, Function) and n.name.startswith("__"))
            yield from ((f"{name}.{method.name}", method) for method in special)


def untyped(source: Source) -> Iterator[str]:
    for name, function in signatures(source):
        arguments = function.args
        named = [*arguments.posonlyargs, *arguments.args]
        if "." in name and "staticmethod" not in decorators(function):
            named = named[1:]
        rest = [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
        for argument in (*named, *arguments.kwonlyargs, *rest):
            if argument.annotation is None:
                yield source.at(argument, f"{name}: argument {argument.arg} has no type")
        if function.returns is None:
            yield source.at(function, f"{name} has no return type")


def assigned(node: ast.stmt) -> Iterator[str]:
    """Names of the constants and type aliases that an assignment defines: those not all in lower case."""
    value = getattr(node, "value", None)
    if isinstance(value, ast.Call) and called(value) in ("TypeVar", "ParamSpec"):
        return
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    for target in targets:
        yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name) and not n.id.islower())


def unlisted(source: Source) -> Iterator[str]:
    """What `__all__` lacks, has too much, or has in the wrong order."""
    statement = next(
        (n for n in source.tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"), None
    )
    if statement is None:
        if source.path.name != "__init__.py" or len(source.tree.body) > 1:
            yield f"{source.path}:1 has no __all__"
        return
    listed = ast.literal_eval(statement.value)
    own = {name for name, _ in definitions(source) if "." not in name}
    lines = [node for node in source.tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    brought = {alias.asname or alias.name for node in lines for alias in node.names}
    constants = {name for node in source.tree.body for name in assigned(node)}
    yield from (source.at(statement, f"__all__ lacks {name}, defined here") for name in sorted(own - set(listed)))
    yield from (
        source.at(statement, f"__all__ lists {name}, which is not there")
        for name in listed
        if name not in own | brought | constants
    )
    yield from (
        source.at(statement, f"__all__ lists {a!r} before {b!r}") for a, b in pairwise(listed) if order(a) >= order(b)
    )


def order(name: str) -> tuple[int, list[str | int]]:
    """Constants, then classes, then functions, each by the alphabet with numbers as numbers: as ruff sorts `__all__`."""
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2
    return kind, [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


RULES = {
    "imports run downwards": upward_imports,
    "the lower floors do not touch the outside world": outside_imports,
    "nothing that runs what it reads": unsafe_imports,
    "no long function": long_functions,
    "no long file": long_files,
    "everything public is explained": undocumented,
    "everything public is typed": untyped,
    "__all__ tells the truth": unlisted,
}


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule: str, house: list[Source]) -> None:
    report([finding for source in house for finding in RULES[rule](source)])


def test_functions_are_short(house: list[Source]) -> None:
    lengths = {f"{source.path} {f.name}": length(f) for source in house for f in source.functions()}
    assert statistics.median(lengths.values()) <= MEDIAN_FUNCTION


# --- the rules themselves find what they are for -----------------------------------------------------------------------------

BAD = {
    "imports run downwards": (
        ("kernels/a.py", "from scanside.engine.x import y"),
        ("kernels/a.py", "def f():\n    import scanside.adapters"),
        ("engine/a.py", "from ..adapters.bus import y"),
        ("engine/sub/a.py", "from ... import adapters"),
        ("engine/sub/__init__.py", "from ...adapters import y"),
        ("engine/a.py", "if TYPE_CHECKING:\n    from scanside.adapters import bus"),
        ("engine/a.py", "importlib.import_module('scanside.adapters.bus')"),
        ("engine/a.py", "from kernels.fft import y"),
        ("adapters/a.py", "from scanside import tests"),
    ),
    "the lower floors do not touch the outside world": (
        ("engine/a.py", "import http.client"),
        ("kernels/a.py", "from zmq import asyncio"),
        ("engine/a.py", "def f():\n    import h5py as h"),
    ),
    "nothing that runs what it reads": (
        ("adapters/a.py", "import pickle"),
        ("adapters/a.py", "from marshal import loads"),
        ("engine/a.py", "__import__(name)"),
        ("engine/a.py", "import_module(f'x.{y}')"),
        ("engine/a.py", "importlib.import_module(name='x')"),
    ),
    "no long function": (("engine/a.py", "def f():\n    'What.'\n" + "    x = 1\n" * 61),),
    "no long file": (("engine/a.py", "x = 1\n" * 501),),
    "everything public is explained": (
        ("engine/a.py", "x = 1"),
        ("engine/a.py", "'What.'\ndef f(): ..."),
        ("engine/a.py", "'What.'\nclass A:\n    'What.'\n    async def f(self): ..."),
        ("engine/a.py", "'What.'\nif x:\n    class A: ..."),
    ),
    "everything public is typed": (
        ("engine/a.py", "def f(x) -> int: ..."),
        ("engine/a.py", "def f(x: int): ..."),
        ("engine/a.py", "def f(*x) -> int: ..."),
        ("engine/a.py", "class A:\n    def __init__(self, x) -> None: ..."),
        ("engine/a.py", "class A:\n    @staticmethod\n    def f(x) -> None: ..."),
    ),
    "__all__ tells the truth": (
        ("engine/a.py", "x = 1"),
        ("engine/a.py", "__all__ = []\ndef f(): ..."),
        ("engine/a.py", "__all__ = ['f']"),
        ("engine/a.py", "__all__ = ['f', 'A']\nclass A: ...\ndef f(): ..."),
        ("engine/a.py", "__all__ = ['f', 'f']\ndef f(): ..."),
    ),
}
GOOD = (
    ("engine/a.py", "'What.'\nfrom ..kernels.fft import y\nfrom scanside.configs import z\n__all__ = ['y']"),
    (
        "engine/sub/__init__.py",
        "'What.'\nfrom .a import A, f, f2, f10\n__all__ = ['LIMIT', 'A', 'f', 'f2', 'f10']\nLIMIT = 1\nT = TypeVar('T')",
    ),
    ("engine/__init__.py", "'What.'"),
    (
        "adapters/a.py",
        "'What.'\nimport socket\nimport_module('http')\n__all__ = []\n_LIMIT = 1\nlog = 2\ndef _f(x): ...",
    ),
    ("kernels/a.py", "'What.'\n__all__ = ['f']\ndef f(x: int) -> int:\n    'What.'\n" + "    x = 1\n" * 60),
)


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_finds_what_it_is_for(rule: str) -> None:
    for path, text in BAD[rule]:
        assert list(RULES[rule](Source(Path(path), text))), text


@pytest.mark.parametrize(("path", "text"), GOOD)
def test_no_rule_finds_fault_with_what_is_right(path: str, text: str) -> None:
    source = Source(Path(path), text)
    assert [finding for rule in RULES.values() for finding in rule(source)] == []


# --- tests -------------------------------------------------------------------------------------------------------------------


def asserts(function: Function, helpers: dict[str, Function], seen: frozenset[str] = frozenset()) -> bool:
    """Whether a function can fail: asserts, expects an error, or calls something of its file that does."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = called(node)
            if (
                name.startswith("assert_")
                or name in ("raises", "warns", "fail", "opcheck", "gradcheck")
                or checked(node)
            ):
                return True
            if name in helpers and name not in seen and asserts(helpers[name], helpers, seen | {name}):
                return True
    return False


def checked(node: ast.Call) -> bool:
    """Whether a call runs a program that has to succeed: `subprocess.run(..., check=True)`."""
    return any(k.arg == "check" and isinstance(k.value, ast.Constant) and k.value.value is True for k in node.keywords)


def toothless(source: Source) -> Iterator[str]:
    """Tests that cannot fail."""
    helpers = {function.name: function for function in source.functions()}
    for function in helpers.values():
        if function.name.startswith("test_") and not asserts(function, helpers):
            yield source.at(function, f"{function.name} asserts nothing")


def test_every_test_can_fail() -> None:
    paths = sorted((REPOSITORY / "tests").rglob("*.py"))
    found = [Source(path.relative_to(REPOSITORY), path.read_text("utf-8")) for path in paths]
    report([finding for source in found for finding in toothless(source)])


@pytest.mark.parametrize(
    ("text", "can_fail"),
    [
        ("def test_a(): f()", False),
        ("def test_a(): assert f()", True),
        ("def test_a():\n    with pytest.raises(E): f()", True),
        ("def test_a(): subprocess.run(x, check=True)", True),
        ("def test_a(): subprocess.run(x, check=False)", False),
        ("def test_a(): np.testing.assert_allclose(1, 2)", True),
        ("def check(): assert f()\ndef test_a(): check()", True),
        ("def check(): check()\ndef test_a(): check()", False),
    ],
)
def test_a_test_that_cannot_fail_is_found(text: str, can_fail: bool) -> None:
    assert (not list(toothless(Source(Path("tests/test_a.py"), text)))) == can_fail
