"""Whether a dotted name of the package exists, read from its files without imports."""

import ast
import functools
import pathlib

ROOT = pathlib.Path(__file__).parent.parent.parent


def exists(dotted: str) -> bool:
    """Whether ``dp_ilg.a.b`` is a module, or something that a module defines."""
    module, rest = _module(dotted.split("."))
    return not rest or _defined(module, rest)


def _file(module: str) -> pathlib.Path | None:
    stem = ROOT.joinpath(*module.split("."))
    for path in (stem / "__init__.py", stem.with_suffix(".py")):
        if path.exists():
            return path
    return None


def _module(parts: list[str]) -> tuple[str, list[str]]:
    """The longest module that the parts begin with, and what is left."""
    count = 1
    while count < len(parts) and _file(".".join(parts[: count + 1])):
        count += 1
    return ".".join(parts[:count]), parts[count:]


@functools.cache
def _names(module: str) -> dict[str, ast.AST | str]:
    """Top-level names: what defines them, or where they are imported from."""
    path = _file(module)
    assert path is not None, module
    found: dict[str, ast.AST | str] = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.setdefault(node.name, node)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.setdefault(node.id, node)
    return found


def _defined(module: str, rest: list[str]) -> bool:
    source = _names(module).get(rest[0])
    if isinstance(source, str):  # imported: ask where it comes from
        return source.startswith("dp_ilg") and exists(".".join([source, *rest[1:]]))
    if isinstance(source, ast.ClassDef) and len(rest) == 2:
        return rest[1] in _members(source)
    return source is not None and len(rest) == 1


def _members(node: ast.ClassDef) -> set[str]:
    found = {n.name for n in ast.walk(node) if isinstance(n, ast.FunctionDef)}
    fields = [n.target for n in node.body if isinstance(n, ast.AnnAssign)]
    return found | {t.id for t in fields if isinstance(t, ast.Name)}
