"""Exercises from the real files: a function without its body, and the chapter that says when yours is right.

    python -m tests.exercise                              # the path: what to write, in which order, and its chapter
    python -m tests.exercise dpo_loss gae > mine.py       # signatures and docstrings; the bodies are yours
    pytest --mine mine.py tests/test_15_* tests/test_19_* # red at first, green when it is right
    python -m tests.exercise --broken 3 > broken.py       # a script with one mistake in its loop: which metric tells?

--mine puts your functions and classes in the place of those with the same names, everywhere: in minillm, in the
scripts and in the chapters. Any public function or class of minillm can be an exercise.
"""

import ast
import functools
import importlib
import pkgutil
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATH = ["token_logprobs", "sft_loss", "LoRALinear", "reward_loss", "dpo_loss", "group_advantages", "kl_k3", "grpo_loss",
        "gae", "ppo_policy_loss", "ppo_value_loss", "RMSNorm", "RotaryEmbedding", "attention_mask_2d", "sample"]
HEADER = '''"""Write the bodies. Then:

    pytest --mine mine.py {chapters}

The imports are what the real file has at hand; use of them what you like.
"""
'''


# From the real files to an exercise.

@functools.cache
def definitions() -> dict:
    """{name: (file, node)} of every public function and class of minillm."""
    found = {}
    for path in sorted((ROOT / "minillm").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
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


def exercise(names: list) -> str:
    """A Python file with these functions and classes, their bodies taken out, and the imports of their files."""
    known = definitions()
    imports, parts, files = {}, [], set()
    for name in names:
        path, node = known[name]
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        for statement in tree.body:
            if isinstance(statement, (ast.Import, ast.ImportFrom)):
                imports[ast.get_source_segment(source, statement)] = None
        text = without_body(node, source.splitlines())
        own = {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))} | {
            target.id for n in tree.body if isinstance(n, ast.Assign) for target in n.targets
            if isinstance(target, ast.Name)}
        mentioned = {n.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name)} & own
        functions = {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")}
        used = sorted((mentioned | functions) - set(names))  # the file's other functions are there to be called
        if used:
            imports[f"from minillm.{path.stem} import {', '.join(used)}"] = None
        if path not in files:  # the rules of the file are a part of the exercise
            files.add(path)
            rules = [f"# {line}".rstrip() for line in ast.get_docstring(tree).splitlines()]
            parts.append("\n".join(["\n", f"# minillm/{path.name}", "#", *rules]) + "\n")
        parts.append(f"\n\n{text}\n")
    where = " ".join(dict.fromkeys(filter(None, map(chapter_of, names))))
    return HEADER.format(chapters=where) + "\n".join(imports) + "\n" + "".join(parts)


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

    Its lines are looked for wherever they are now, so that it goes on applying while the script around them changes.
    Raises ValueError when they are not found, or found twice.
    """
    patch = (ROOT / "tests" / "exercises" / f"{number}.patch").read_text(encoding="utf-8").splitlines()
    script = patch[1].removeprefix("+++ b/")
    source = (ROOT / script).read_text(encoding="utf-8")
    hunks = "\n".join(patch[2:]).split("\n@@")
    for hunk in hunks:
        lines = hunk.splitlines()[1:]
        before = "".join(line[1:] + "\n" for line in lines if line[0] in " -")
        after = "".join(line[1:] + "\n" for line in lines if line[0] in " +")
        if source.count(before) != 1:
            raise ValueError(f"tests/exercises/{number}.patch does not apply: in {script} there are "
                             f"{source.count(before)} places with\n{before}")
        source = source.replace(before, after)
    return script, source


def main(arguments: list) -> str:
    """What the command prints."""
    if not arguments:
        rows = [f"{i:>3}  {name:<18} {chapter_of(name)}" for i, name in enumerate(PATH, 1)]
        return "\n".join(["The path. python -m tests.exercise NAME ... > mine.py", *rows])
    if arguments[0] == "--broken":
        return broken(int(arguments[1]))[1]
    unknown = [name for name in arguments if name not in definitions()]
    if unknown:
        sys.exit(f"minillm has no public {', '.join(unknown)}; the path is {' '.join(PATH)}")
    return exercise(arguments)


if __name__ == "__main__":
    print(main(sys.argv[1:]).rstrip("\n"))
