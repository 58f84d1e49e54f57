"""The modules of `ldm` and the imports among them, read from the source without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ldm"
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    """Return the dotted name of a file, e.g. "ldm.diffusion.grid"; a package has the name of its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def floor(module: str) -> str:
    """Return the folder below `ldm` that a module is in, or "ldm" for a module directly in the package."""
    parts = module.split(".")
    is_folder = len(parts) > 1 and (PACKAGE / parts[1]).is_dir()
    return parts[1] if is_folder else "ldm"


@cache
def imports(path: Path) -> frozenset[str]:
    """Return the modules of `ldm` that a file imports.

    Every import counts: at module level, inside a function, below `if TYPE_CHECKING`. In a file that calls
    `import_module`, every string that is the name of a module counts too.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    dynamic = False
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the full name"
            base = node.module or ""
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                found.add(submodule if submodule in MODULES else base)
        elif isinstance(node, ast.Name | ast.Attribute):
            dynamic |= (node.id if isinstance(node, ast.Name) else node.attr) in (
                "import_module",
                "__import__",
            )
    if dynamic:
        strings = {
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        found |= strings | {f"ldm.{string}" for string in strings}
    return frozenset(found & MODULES.keys())


def circles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Return the strongly connected components with more than one node (Tarjan 1972), and self-loops."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in graph:
                continue
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1 or node in graph[node]:
                found.append(sorted(component))

    for node in graph:
        if node not in index:
            visit(node)
    return found
