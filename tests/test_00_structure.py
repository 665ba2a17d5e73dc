"""The shape of the project: a reader can open any file and knows what it may lean on.

After this chapter you know which file may import which, what every script looks like, and which habits are forbidden
here.

Everything here is read off the syntax trees and symbol tables; nothing is imported or run.
"""

import ast
import builtins
import functools
import re
import symtable
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = sorted((ROOT / "minillm").glob("*.py"))
STAGES = sorted(ROOT.glob("train_*.py"))
SCRIPTS = STAGES + sorted(ROOT.glob("eval.py"))
CHAPTERS = sorted((ROOT / "tests").glob("test_*.py"))

# What a module of minillm may import from minillm; errors may be imported by all. A cycle cannot be written down here:
# every module stands after those that it imports.
IMPORTS = {
    "errors": "", "unicode_ranges": "", "chat": "",
    "job": "", "logprobs": "", "machine": "", "safetensors": "", "latex": "",
    "runtime": "job logprobs machine",
    "attention": "runtime", "interrupt": "runtime",
    "verify": "latex",
    "forms": "verify",
    "records": "chat forms runtime safetensors",
    "config": "interrupt job machine runtime",
    "losses": "logprobs",
    "token_view": "logprobs runtime safetensors",
    "optim": "runtime",
    "shard": "runtime",
    "curves": "safetensors",
    "metrics": "curves safetensors",
    "model": "attention runtime",
    "cuda_graph": "model runtime",
    "generate": "cuda_graph model runtime",
    "tokenizer_config": "safetensors",
    "tokenizer": "chat config records runtime safetensors tokenizer_config unicode_ranges",
    "token_cache": "machine records runtime safetensors tokenizer",
    "data": "attention chat records runtime token_cache tokenizer",
    "hf_config": "model",
    "origin": "safetensors",
    "checkpoint": "config hf_config model origin records runtime safetensors tokenizer",
    "lora": "",
    "heads": "checkpoint hf_config lora model safetensors",
    "training_state": "checkpoint optim runtime safetensors shard",
    "adapter": "", "prefix": "model",
    "gguf": "checkpoint config model runtime safetensors tokenizer unicode_ranges",
    "out_folder": "runtime safetensors",
    "peft": "adapter checkpoint config lora out_folder prefix records runtime safetensors tokenizer",
    "run": "checkpoint config heads interrupt machine metrics out_folder peft records runtime safetensors shard "
           "training_state",
    "rewards": "chat checkpoint generate heads runtime tokenizer verify",
    "evaluate": "chat data generate logprobs metrics records runtime verify",
    "preferences": "chat data evaluate logprobs records runtime token_cache tokenizer",
    "rollouts": "data evaluate generate logprobs losses records rewards runtime",
}
RUNTIME_PACKAGES = {"torch", "numpy", "tqdm"}
OPTIONAL_PACKAGES = {"matplotlib", "transformers", "peft", "trl", "tokenizers", "tensorboard"}  # inside a function only


@functools.cache
def tree_of(path):
    # The oldest Python that minillm promises to run on must be able to read it.
    return ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 10))


def imported(nodes):
    """Dotted names of what the import statements among the nodes import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "minillm":
                yield from (f"minillm.{alias.name}" for alias in node.names)
            else:
                yield node.module


def named(paths):
    return pytest.mark.parametrize("path", paths, ids=[path.name for path in paths])


def test_the_order_of_the_modules_has_no_cycle():
    seen = set()
    for module, names in IMPORTS.items():
        assert set(names.split()) <= seen, module
        seen.add(module)


@named(LIBRARY)
def test_imports_of_the_library_go_one_way(path):
    within = {name.split(".")[1] for name in imported(ast.walk(tree_of(path))) if name.startswith("minillm.")}
    if path.stem == "__init__":
        assert not within
    else:
        assert within <= {*IMPORTS[path.stem].split(), "errors"}


@named(LIBRARY + SCRIPTS)
def test_only_torch_numpy_and_tqdm_are_needed(path):
    tree = tree_of(path)
    inside = {node for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))
              for node in ast.walk(f)}
    at_top = [node for node in ast.walk(tree) if node not in inside]
    packages = lambda nodes: {name.split(".")[0]
                              for name in imported(nodes)} - set(sys.stdlib_module_names) - {"minillm"}
    assert packages(at_top) <= RUNTIME_PACKAGES
    assert packages(inside) <= RUNTIME_PACKAGES | OPTIONAL_PACKAGES


@named(LIBRARY + SCRIPTS)
def test_nobody_imports_a_script(path):
    scripts = {script.stem for script in SCRIPTS}
    assert not scripts & {name.split(".")[0] for name in imported(ast.walk(tree_of(path)))}


@named(LIBRARY)
def test_what_is_public_is_explained(path):
    """Modules, functions and classes; the main of a module that is also a command needs no more than its --help."""
    tree = tree_of(path)
    assert ast.get_docstring(tree)
    silent = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
              and not ast.get_docstring(node)]
    assert [name for name in silent if not name.startswith("_") and name != "main"] == []


def keyword(call, name):
    return next((k.value for k in call.keywords if k.arg == name), None)


@named(LIBRARY + SCRIPTS)
def test_files_are_opened_the_same_way_on_every_system(path):
    """Text without encoding= is read in another one on Windows; and no pickle is loaded that could run code."""
    for call in (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)):
        name = call.func.id if isinstance(call.func, ast.Name) else call.func.attr if isinstance(call.func,
                                                                                                 ast.Attribute) else ""
        owner = call.func.value.id if isinstance(call.func, ast.Attribute) and isinstance(call.func.value,
                                                                                          ast.Name) else ""
        if name in ("read_text", "write_text"):
            assert keyword(call, "encoding"), f"line {call.lineno}"
        if name == "open" and owner != "os":
            mode = keyword(call, "mode") or (call.args[1] if len(call.args) > 1 else None)
            binary = isinstance(mode, ast.Constant) and "b" in mode.value
            assert binary or keyword(call, "encoding"), f"line {call.lineno}"
        if name == "load" and owner == "torch":
            assert getattr(keyword(call, "weights_only"), "value", None) is True, f"line {call.lineno}"
        assert owner != "os" or name != "fork", "Windows has no fork"
        if name == "get_context":
            assert call.args[0].value == "spawn"


# RunConfig
INHERITED = ("out resume max_steps max_grad_norm log_every eval_every save_every keep_last device seed compile "
             "save_dtype").split()
SHARED = "model data eval_data out max_seq_len batch_size grad_accum epochs lr warmup_steps".split()  # each stage's own


def fields_of(tree, name):
    """{field: its flag(default, "one line of help", ...)} of a config class."""
    config = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    fields = {node.target.id: node.value for node in config.body if isinstance(node, ast.AnnAssign)}
    for field, value in fields.items():
        assert value.func.id == "flag" and isinstance(value.args[1], (ast.Constant, ast.JoinedStr)), field
    return config, fields


def test_the_flags_of_every_stage_stand_in_one_place():
    assert list(fields_of(tree_of(ROOT / "minillm" / "run.py"), "RunConfig")[1]) == INHERITED


@named(STAGES)
def test_every_stage_has_the_same_skeleton(path):
    source, tree = path.read_text(encoding="utf-8"), tree_of(path)
    docstring = ast.get_docstring(tree)
    assert all(word in docstring for word in (f"python {path.name}", "arXiv", "Deviations", "chapters"))
    config, fields = fields_of(tree, "Config")
    assert [base.id for base in config.bases] == ["RunConfig"]
    assert [name for name in SHARED if name not in fields] == []
    banners = re.findall(r"^    # (\d)\. (\w+)", source, re.MULTILINE)
    assert banners == [("1", "Setup"), ("2", "Data"), ("3", "Models"), ("4", "Optimizer"), ("5", "Train"),
                       ("6", "Result")]
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert [argument.arg for argument in main.args.args] == ["cfg"] and main.returns.id == "dict"
    assert source.rstrip().endswith('if __name__ == "__main__":\n    main(parse_config(Config, __doc__))')


@named(LIBRARY)
def test_a_file_of_the_library_holds_one_idea(path):
    """Four hundred lines are room enough for one; the tokenizer is training, encoding and conversations."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= (540 if path.stem == "tokenizer" else 400)


@named([path for pattern in ("*.py", "*/*.py", "*.md", "*/*.md") for path in sorted(ROOT.glob(pattern))])
def test_lines_have_at_most_120_columns(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) > 120 and not line.startswith(("|", "!"))] == []


@named(CHAPTERS)
def test_a_chapter_says_what_it_teaches_and_ends_with_two_questions(path):
    """What a question wants changed is there, once, in the test or the constant that it names."""
    source = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(source), source.splitlines()
    assert "After this chapter you" in " ".join(ast.get_docstring(tree).split())
    parts = {}
    for node in tree.body:
        for name in [node.name] if hasattr(node, "name") else [t.id for t in getattr(node, "targets", [])
                                                               if isinstance(t, ast.Name)]:
            first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
            parts[name] = "\n".join(lines[first - 1:node.end_lineno])
    ending = lines[lines.index("# " + "-" * 64 + " two questions"):]
    assert all(line.startswith("#") for line in ending), "the questions are the end of the file"
    text = " ".join(line.removeprefix("#").strip() for line in ending)
    questions = re.findall(r"(\d)\. (\w+): `(.+?)` -> `(.+?)`\. .+?\?", text)
    assert [number for number, *_ in questions] == ["1", "2"]
    for _, name, old, new in questions:
        assert parts[name].count(old) == 1 and old != new, (name, old)


# Where the names of metrics stand: in run.add(...) and evaluate() of the scripts, and in what these functions return.
MEASURED = {"evaluate": ["held_out_loss", "score", "sample_answers"], "preferences": ["rank_pairs"],
            "rollouts": ["sampled_scores"], "losses": ["_clipped_surrogate", "_implicit_rewards"]}


def metric_names():
    def keys(node):
        for part in ast.walk(node):
            for key in getattr(part, "keys", []) or [getattr(part, "key", None)]:  # of a dict; of a comprehension
                if isinstance(key, ast.Constant):
                    yield key.value
                elif isinstance(key, ast.JoinedStr):
                    yield key.values[0].value + "NAME"  # f"reward_{name}"

    found = {"lr", "tokens_per_s"}
    for node in (node for path in STAGES for node in ast.walk(tree_of(path))):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add":
            found.update(keys(node))
        if isinstance(node, ast.FunctionDef) and node.name == "evaluate":
            found.update(keys(node))
    for module, functions in MEASURED.items():
        for function in tree_of(ROOT / "minillm" / f"{module}.py").body:
            if getattr(function, "name", "") in functions:
                for node in ast.walk(function):
                    assigned = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else ""
                    if isinstance(node, ast.Return) or assigned in ("stats", "metrics", "levels"):
                        found.update(keys(node))
    return found


@pytest.mark.parametrize("name, heading", [("README.md", "Metrics"), ("README_zh.md", "指标")])
def test_the_glossary_has_every_metric(name, heading):
    text = (ROOT / "tests" / name).read_text(encoding="utf-8")
    section = re.search(rf"^## {heading}\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)[1]
    first_column = " ".join(line.split("|")[1] for line in section.splitlines() if line.startswith("|"))
    explained = set(re.findall(r"`(\w+)`", first_column))
    names = metric_names()
    assert {"loss", "kl", "no_signal", "clip_fraction", "val_loss", "calibration_error", "reward_NAME"} <= names
    assert names - {"sampled_NAME"} - explained == set()


@named(LIBRARY + SCRIPTS)
def test_nothing_is_cleverer_than_it_need_be(path):
    """A lambda with a name is a def; text times a condition and a list in sum() are puzzles."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Assign):
            assert not isinstance(node.value, ast.Lambda), f"line {node.lineno}: a lambda bound to a name"
        if isinstance(node, (ast.For, ast.comprehension)):
            assert not any(isinstance(part, ast.Attribute)
                           for part in ast.walk(node.target)), "an attribute as a for target"
        if isinstance(node, ast.Expr):
            assert not isinstance(node.value, ast.IfExp), f"line {node.lineno}: a conditional expression as a statement"


def test_every_name_that_is_used_exists():
    """A function that runs only on a GPU, or only in a benchmark, may lack an import for a long time."""
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]):
        tables = [symtable.symtable(path.read_text(encoding="utf-8"), str(path), "exec")]
        made = {symbol.get_name() for symbol in tables[0].get_symbols() if symbol.is_assigned() or symbol.is_imported()
                or symbol.is_namespace()}
        for table in tables:  # grows: the functions of the file, and those inside them
            tables += table.get_children()
        used = {symbol.get_name() for table in tables for symbol in table.get_symbols()
                if symbol.is_global() and symbol.is_referenced()}
        assert used - made - set(dir(builtins)) <= {"__file__"}, path


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. IMPORTS: `"losses": "logprobs"` -> `"losses": ""`. Which test fails, and which import does it name?
# 2. test_a_file_of_the_library_holds_one_idea: `else 400` -> `else 390`. Which files are close to their limit?
