"""One self-contained modelling file out of the modules that a model is made of.

The layers of an exported model are the project's own: their modules, and those they import, are joined in the order of
their imports, and what they import from each other is left out. So there is no second copy of a layer to keep up, and
a layer of one's own is exported like any other.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path

from model.layer import Layer

FLOORS = frozenset({"kernels", "model", "parallel", "trainer", "launch"})

_HEADER = '''"""A model of Headway, with all that it needs beside torch and transformers.

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Joined from the modules named below; licensed under the Apache License 2.0, as they are.
"""

from __future__ import annotations

'''


@dataclass
class Part:
    """One module: its own lines, and what it asks of others.

    Attributes:
        needs: modules that are joined too, in the order of their import.
        imports: names that come from outside, and the statements that bring them.
        names: what it defines at its top level.
    """

    module: str
    text: str
    needs: list[str] = field(default_factory=list)
    imports: dict[str, str] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)


def bundle(roots: list[str], layers: dict[str, type[Layer]]) -> str:
    """The text of a Python file that holds the modules `roots`, the layers, and whatever of ours they import.

    Args:
        layers: class by its section and the `kind` under which `config.json` names it (`mixers.softmax`).

    Raises:
        ValueError: a layer whose source cannot be joined with the others, with the reason.
    """
    local = FLOORS | {cls.__module__.partition(".")[0] for cls in layers.values()}
    parts: dict[str, Part] = {}
    for module in [*roots, *(cls.__module__ for cls in layers.values())]:
        _collect(module, local, parts, ())
    _refuse_clashes(parts)
    table = "".join(f'    "{kind}": {cls.__name__},\n' for kind, cls in sorted(layers.items()))
    texts = [f"# {part.module}\n\n\n{part.text}" for part in parts.values() if part.text]
    return _HEADER + _import_lines(parts) + "\n\n\n" + "\n\n\n".join(texts) + f"\n\n\nLAYERS |= {{\n{table}}}\n"


def _collect(module: str, local: frozenset[str], parts: dict[str, Part], above: tuple[str, ...]) -> None:
    """Read a module and, before it, all that it needs."""
    assert module not in above, f"modules import each other: {' -> '.join((*above, module))}"
    if module in parts:
        return
    part = _read(module, local)
    for needed in part.needs:
        _collect(needed, local, parts, (*above, module))
    parts[module] = part


def _read(module: str, local: frozenset[str]) -> Part:
    """One module, without its docstring and its imports."""
    path = _source_file(module)
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    tree = ast.parse(source)
    part = Part(module, "")
    removed: set[int] = set()
    if ast.get_docstring(tree) is not None:
        removed |= _lines_of(tree.body[0])
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import) and _take_import(node, module, local, part, node in tree.body):
            removed |= _lines_of(node)
    if path.name == "__init__.py":
        # A package's own file says what it offers, and that is all we need of it.
        return part
    for node in tree.body:
        part.names += _defined(node)
    part.text = "\n".join(line for number, line in enumerate(lines, 1) if number not in removed).strip()
    return part


def _take_import(
    node: ast.Import | ast.ImportFrom, module: str, local: frozenset[str], part: Part, at_top: bool
) -> bool:
    """Note what an import asks for; whether its lines are to go."""
    inside = isinstance(node, ast.ImportFrom) and (node.level > 0 or (node.module or "").partition(".")[0] in local)
    if isinstance(node, ast.Import):
        inside = any(alias.name.partition(".")[0] in local for alias in node.names)
    if not inside:
        if at_top:
            prefix = f"from {node.module} import " if isinstance(node, ast.ImportFrom) else "import "
            part.imports |= {alias.asname or alias.name: prefix + ast.unparse(alias) for alias in node.names}
        return at_top
    if isinstance(node, ast.Import) or node.level > 0 or not at_top or any(alias.asname for alias in node.names):
        raise ValueError(
            f"{module}, line {node.lineno}: `{ast.unparse(node)}` cannot be joined into one file; write "
            "`from package.module import Name`, at the top of the module."
        )
    assert node.module is not None
    for alias in node.names:
        submodule = f"{node.module}.{alias.name}"
        if importlib.util.find_spec(node.module).submodule_search_locations and _is_module(submodule):  # type: ignore[union-attr]
            raise ValueError(
                f"{module}, line {node.lineno}: `{ast.unparse(node)}` imports a module; import names from it instead."
            )
    part.needs.append(node.module)
    return True


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _source_file(module: str) -> Path:
    if module == "__main__":
        raise ValueError("a layer defined in the program itself has no module to export: put it into a file.")
    spec = sys.modules[module].__spec__ if module in sys.modules else importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ValueError(f"{module} has no Python source file, so it cannot go with an export.")
    return Path(spec.origin)


def _lines_of(node: ast.stmt) -> set[int]:
    assert node.end_lineno is not None
    return set(range(node.lineno, node.end_lineno + 1))


def _defined(node: ast.stmt) -> list[str]:
    """Names that a top-level statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return []


def _refuse_clashes(parts: dict[str, Part]) -> None:
    """In one file a name can mean one thing only."""
    meanings: dict[str, dict[str, str]] = {}
    for part in parts.values():
        own = dict.fromkeys(part.names, part.module)
        for name, meaning in (part.imports | own).items():
            meanings.setdefault(name, {})[meaning] = part.module
    for name, found in meanings.items():
        if len(found) > 1:
            raise ValueError(
                f"{name} means different things in {', '.join(found.values())}, which go into one file: rename it in "
                "one of them."
            )


def _import_lines(parts: dict[str, Part]) -> str:
    """What comes from outside, a line for each module, the standard library first."""
    lines: dict[str, set[str]] = {}
    for statement in {line for part in parts.values() for line in part.imports.values()}:
        head, _, name = statement.rpartition(" import ") if statement.startswith("from ") else (statement, "", "")
        if head != "from __future__":
            lines.setdefault(head, set()).add(name)
    ordered = sorted(lines, key=lambda head: (head.split()[1].partition(".")[0] not in sys.stdlib_module_names, head))
    return "\n".join(
        f"{head} import {', '.join(sorted(lines[head]))}" if lines[head] != {""} else head for head in ordered
    )
