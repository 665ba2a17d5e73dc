"""Exercises from the real files: a function without its body, and the chapter that says when yours is right.

    python -m tests.exercise                              # the path: what to write, in which order, and its chapter
    python -m tests.exercise dpo_loss gae > mine.py       # signatures and docstrings; the bodies are yours
    pytest --mine mine.py tests/test_15_* tests/test_19_* # red at first, green when it is right
    python -m tests.exercise --broken 3 > broken.py       # a script with one mistake in its loop: which metric tells?
    python broken.py --max_steps 2 --log_every 1          # broken.py begins with the command that shows it

--mine puts your functions and classes in the place of those with the same names, everywhere: in minillm, in the
scripts and in the chapters. Any public function or class of minillm can be an exercise.
"""

import ast
import functools
import importlib
import pkgutil
import re
import symtable
import sys
import textwrap
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATH = ["token_logprobs", "sft_loss", "LoRALinear", "reward_loss", "dpo_loss", "group_advantages", "kl_k3", "grpo_loss",
        "gae", "ppo_policy_loss", "ppo_value_loss", "RMSNorm", "RotaryEmbedding", "attention_mask_2d", "sample"]
HEADER = '''"""Write the bodies. Then:

    {command}

The imports are what the real bodies use. You need none of them (what begins with _ holds a part of the answer), and may
import what else you like.
"""

'''
BROKEN = [str(number) for number in range(1, 8)]
COLUMNS = 120


# From the real files to an exercise.

@functools.cache
def parsed(path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def definitions() -> dict:
    """{name: (file, node)} of every public function and class of minillm."""
    found = {}
    for path in sorted((ROOT / "minillm").glob("*.py")):
        for node in parsed(path).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                found.setdefault(node.name, (path, node))
    return found


@functools.cache
def chapters() -> dict:
    """{name: the first chapter that imports it from minillm}."""
    found = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minillm."):
                for alias in node.names:
                    found.setdefault(alias.name, f"tests/{path.name}")
    return found


def chapter_of(name: str) -> str:
    """The first chapter that imports this name from minillm; "" if none does."""
    return chapters().get(name, "")


def without_body(node, lines: list) -> str:
    """The source of a function up to the end of its docstring; of a class, of each of its methods but __init__."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    has_docstring = ast.get_docstring(node) is not None
    end = node.body[0].end_lineno if has_docstring else node.body[0].lineno - 1
    text = "\n".join(lines[first - 1:end])
    if isinstance(node, ast.FunctionDef):
        return f'{text}\n{" " * (node.col_offset + 4)}raise NotImplementedError("{node.name} is yours to write")'
    for part in node.body[has_docstring:]:
        keep = not isinstance(part, ast.FunctionDef) or part.name == "__init__"
        whole = "\n".join(lines[part.lineno - 1:part.end_lineno])
        text += "\n\n" + (whole if keep else without_body(part, lines))
    return text


@functools.cache
def origins(path) -> dict:
    """{name: (module, name there)} of what stands at the top of a file: what it imports, and what it defines itself.

    The name there is None for a module as a whole: `import torch` is ("torch", None).
    """
    found = {}
    for node in parsed(path).body:
        if isinstance(node, ast.Import):
            found.update({alias.asname or alias.name: (alias.name, None) for alias in node.names})
        elif isinstance(node, ast.ImportFrom):
            found.update({alias.asname or alias.name: (node.module, alias.name) for alias in node.names})
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = (f"minillm.{path.stem}", node.name)
        elif isinstance(node, ast.Assign):
            names = {part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)}
            found.update({name: (f"minillm.{path.stem}", name) for name in names})
    return found


def names_used(source: str) -> set:
    """The names that a definition takes from outside: no arguments and no variables of its own."""
    def names(table):
        found = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global() and symbol.is_referenced()}
        return found.union(*map(names, table.get_children()))

    return names(symtable.symtable(source, "an exercise", "exec"))


def import_lines(wanted: dict) -> list:
    """Import statements for {name: (module, name there)}: Python's own, packages, minillm; sorted and wrapped."""
    groups = [[], [], []]
    for module in sorted({module for module, _ in wanted.values()}):
        group = groups[2 if module.split(".")[0] == "minillm" else module.split(".")[0] not in sys.stdlib_module_names]
        parts = []
        for name, (source, there) in sorted(wanted.items()):
            if source == module and there is None:
                group.append((0, f"import {module}" + (f" as {name}" if name != module else "")))
            elif source == module:
                parts.append(there if name == there else f"{there} as {name}")
        if parts:
            start, line = f"from {module} import ", f"from {module} import {', '.join(parts)}"
            if len(line) > COLUMNS:
                line = textwrap.fill(f"{start}({', '.join(parts)})", COLUMNS, subsequent_indent=" " * (len(start) + 1))
            group.append((1, line))
    return "\n\n".join("\n".join(line for _, line in sorted(group)) for group in groups if group)


def exercise(names: list) -> str:
    """A Python file with these functions and classes, their bodies taken out, and imports of what the bodies used."""
    known = definitions()
    wanted, parts, files = {}, [], set()
    for name in names:
        path, node = known[name]
        lines = path.read_text(encoding="utf-8").splitlines()
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        used = names_used("\n".join(lines[first - 1:node.end_lineno])) - set(names)
        wanted.update({name: origin for name, origin in origins(path).items() if name in used})
        if path not in files:  # the rules of the file are a part of the exercise
            files.add(path)
            rules = [f"minillm/{path.name}", ""]
            for line in ast.get_docstring(parsed(path)).splitlines():
                rules += textwrap.wrap(line, COLUMNS - 2) or [""]
            parts.append("\n".join(["\n", *(f"# {line}".rstrip() for line in rules)]) + "\n")
        parts.append(f"\n\n{without_body(node, lines)}\n")
        for other in re.findall(r"as in (\w+)", ast.get_docstring(node) or ""):  # what is explained there
            if other in known and other not in names:
                explained = [f"{other}:", "", *ast.get_docstring(known[other][1]).splitlines()]
                parts.append("\n".join(["", *(f"# {line}".rstrip() for line in explained)]) + "\n")
    where = " ".join(dict.fromkeys(filter(None, map(chapter_of, names))))
    command = textwrap.wrap(f"pytest --mine mine.py {where}", COLUMNS - 6, subsequent_indent="    ")
    return HEADER.format(command=" \\\n    ".join(command)) + import_lines(wanted) + "\n" + "".join(parts)


# Your file in the place of the real one.

def use(path) -> list:
    """Put the functions and classes of a file in the place of minillm's. Returns what `restore` needs to undo it."""
    for module in pkgutil.iter_modules([str(ROOT / "minillm")]):
        importlib.import_module(f"minillm.{module.name}")
    mine = types.ModuleType("mine")
    mine.__file__ = str(path)
    sys.modules["mine"] = mine
    exec(compile(Path(path).read_text(encoding="utf-8"), str(path), "exec"), mine.__dict__)
    undo = []
    for name, value in list(vars(mine).items()):
        if getattr(value, "__module__", None) != "mine" or name not in definitions():
            continue
        real = getattr(importlib.import_module(f"minillm.{definitions()[name][0].stem}"), name)
        # Whoever imported it by name holds the object itself, perhaps under another name.
        for module in list(sys.modules.values()):
            if getattr(module, "__file__", None) and str(ROOT) in str(module.__file__) and module is not mine:
                for key, held in list(vars(module).items()):
                    if held is real:
                        undo.append((module, key, real))
                        setattr(module, key, value)
        if isinstance(real, type):
            for child in real.__subclasses__():
                if child.__module__.startswith("minillm."):
                    undo.append((child, "__bases__", child.__bases__))
                    child.__bases__ = tuple(value if base is real else base for base in child.__bases__)
    return undo


def restore(undo: list):
    """Undo `use`."""
    for owner, name, value in reversed(undo):
        setattr(owner, name, value)


# Scripts with a mistake in them.

def broken(number: int) -> tuple:
    """(name of the script, its source with mistake `number` made): tests/exercises/NUMBER.patch, a unified diff.

    The line above the diff is the command with which the mistake shows; the source begins with it. The lines of the
    diff are looked for wherever they are now, so that it goes on applying while the script around them changes.
    Raises ValueError when they are not found, or found twice.
    """
    patch = (ROOT / "tests" / "exercises" / f"{number}.patch").read_text(encoding="utf-8").splitlines()
    command, script = patch[0], patch[2].removeprefix("+++ b/")
    source = (ROOT / script).read_text(encoding="utf-8")
    hunks = "\n".join(patch[3:]).split("\n@@")
    for hunk in hunks:
        lines = hunk.splitlines()[1:]
        before = "".join(line[1:] + "\n" for line in lines if line[0] in " -")
        after = "".join(line[1:] + "\n" for line in lines if line[0] in " +")
        if source.count(before) != 1:
            raise ValueError(f"tests/exercises/{number}.patch does not apply: in {script} there are "
                             f"{source.count(before)} places with\n{before}")
        source = source.replace(before, after)
    return script, f"# {command}\n{source}"


def main(arguments: list) -> str:
    """What the command prints."""
    if not arguments:
        rows = [f"{i:>3}  {name:<18} {chapter_of(name)}" for i, name in enumerate(PATH, 1)]
        return "\n".join(["The path. python -m tests.exercise NAME ... > mine.py", *rows])
    if arguments[0] in ("-h", "--help"):
        return __doc__
    if arguments[0] == "--broken":
        if len(arguments) != 2 or arguments[1] not in BROKEN:
            sys.exit(f"--broken takes one number: {' '.join(BROKEN)}")
        return broken(int(arguments[1]))[1]
    unknown = [name for name in arguments if name not in definitions()]
    if unknown:
        sys.exit(f"minillm has no public {', '.join(unknown)}; the path is {' '.join(PATH)}")
    return exercise(arguments)


if __name__ == "__main__":
    print(main(sys.argv[1:]).rstrip("\n"))
