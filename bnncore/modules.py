"""Which files a module is made of: its imports, followed without running anything."""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path


def find(name: str) -> Path | None:
    """The file of a module, by its dotted name; None where there is none."""
    path: list[str] | None = None
    spec: ModuleSpec | None = None
    parts = name.split(".")
    for i in range(len(parts)):  # one by one: importlib's own function would run the packages
        part = ".".join(parts[: i + 1])
        specs = (finder.find_spec(part, path) for finder in sys.meta_path)
        try:
            spec = next((found for found in specs if found), None)
        except (ImportError, KeyError, ValueError, AttributeError):  # a text that is no module
            return None
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or [])
    return Path(spec.origin) if spec and spec.has_location and spec.origin else None


def imported(file: Path, name: str) -> set[str]:
    """Names of modules that the module `name` in `file` may import, in functions too.

    What stands under ``if TYPE_CHECKING:`` is left out. Texts that read like a dotted name count,
    as tables of modules that are imported by name hold them. For ``from a import b`` both a and a.b
    are named, for a.b.c also the packages a and a.b: not every name is a module. A file that is not
    Python imports nothing.
    """
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # compiled, or broken: whoever imports it says so
        return set()
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in _run(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) + 1 - node.level]
                base = ".".join([*above, *filter(None, [node.module])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words = node.value.partition(":")[0].split(".")
            if len(words) > 1 and all(word.isidentifier() for word in words):
                found.add(".".join(words))
    parents = {".".join(n.split(".")[:i]) for n in found for i in range(1, n.count(".") + 1)}
    return found | parents


def _run(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker sees."""
    yield node
    children: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        children = node.orelse
    for child in children:
        yield from _run(child)


def files(names: Iterable[str], own: Callable[[Path], bool]) -> dict[str, Path]:
    """Module -> file of `names` and of everything that these import, as long as `own` of the file.

    Names without a file are left out; those given are in, whether `own` or not.
    """
    found = {name: path for name in names if (path := find(name))}
    todo = [name for name, path in found.items() if own(path)]
    seen = set(found)
    while todo:
        name = todo.pop()
        others = imported(found[name], name) - seen
        seen |= others
        for other in others:
            path = find(other)
            if path is not None and own(path):
                found[other] = path
                todo.append(other)
    return found


_OTHERS = tuple(
    Path(folder).resolve()
    for folder in {sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib")}
)
_BNNCORE = Path(__file__).resolve().parent


def users_code(names: Iterable[str]) -> list[str]:
    """The text of `users_files`."""
    return [path.read_text() for _, path in sorted(users_files(names).items())]


def users_files(names: Iterable[str]) -> dict[str, Path]:
    """Module -> file of the modules that parameters name (``module:function``), and of what these
    import of the user's own: neither installed, nor Python's, nor of this package."""

    def own(path: Path) -> bool:
        path = path.resolve()
        return not any(path.is_relative_to(folder) for folder in (*_OTHERS, _BNNCORE))

    return files((name.partition(":")[0] for name in names if ":" in name), own)
