"""The README and the code say the same: names, defaults, commands."""

import ast
import dataclasses
import inspect
import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import grouprank
import synth

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {"grouprank": grouprank, "evaluate": evaluate, "synth": synth}
SOURCE = {name: Path(m.__file__).read_text(encoding="utf-8") for name, m in SCRIPTS.items()}


def in_code(pattern):
    """All matches inside `inline code` of the README, tables included."""
    codes = re.findall(r"`([^`\n]+)`", README)
    return {match for code in codes for match in re.findall(pattern, code)}


def of_script(name):
    """A function's script and own name: `synth.retrieve` is synth's, a bare name grouprank's."""
    script, _, own = name.rpartition(".")
    return SCRIPTS[script or "grouprank"], own


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 220 and len(README.encode()) <= 24 * 1024
    assert max(map(len, lines)) <= 700


def test_ones_own_documents_come_within_sixty_lines():
    start = "\n".join(README.splitlines()[:60])
    own = start[start.index("## Rerank your own documents") :]
    for command in ("synth.py --retrieve", "--rerank --model", "--rerank --endpoint",
                    "evaluate.py --qrels", "GroupRanker.from_pretrained"):  # fmt: skip
        assert command in own


def test_every_function_that_the_readme_names_exists():
    names = in_code(r"^([\w.]+)\(\)$") - {"generate"}  # the library's
    names |= in_code(r"^([A-Z][a-z]+[A-Z][a-z]\w+)$") - {"AutoModelForCausalLM"}
    assert len(names) > 20 and {"PromptEncoder", "grpo_step", "synth.fuse_ranks"} <= names
    for name in names:
        module, own = of_script(name)
        assert callable(getattr(module, own)), name


def test_every_test_that_the_readme_names_exists():
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    names = in_code(r"^(test_\w+)$")
    assert len(names) > 15
    assert not [name for name in names if f"def {name}(" not in sources]


def test_every_file_that_the_readme_names_exists():
    files = in_code(r"[\w/]+\.py\b")
    assert {"tests/bench_grpo.py", "grouprank.py"} <= files
    for file in files:
        assert (ROOT / file).exists() or (ROOT / "tests" / file).exists(), file


def test_every_option_that_the_readme_names_exists():
    actions = [a for script in SCRIPTS.values() for a in script.build_parser()._actions]
    known = {option for action in actions for option in action.option_strings}
    for path in (ROOT / "tests").glob("bench_*.py"):
        known |= set(re.findall(r'"(--[a-z0-9-]+)"', path.read_text()))
    ours = re.sub(r"torchrun .*?grouprank\.py|vllm serve .*|`--(?:nnodes|shutdown-timeout|generation-config vllm)`", "", README)
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", ours))
    assert len(flags) > 15 and not flags - known


def test_every_default_in_the_hyperparameter_table_is_the_codes():
    table = README[README.index("### Hyperparameters") : README.index("## What was not measured")]
    cells = re.findall(r"\| `([\w.]+)` \| (\S+) \|", table)
    assert len(cells) > 20
    for name, value in cells:
        module, own = of_script(name)
        assert str(getattr(module.Config(), own)) == value, name


def test_every_command_in_the_readme_parses():
    blocks = re.findall(r"^```\w*\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    commands = [c for block in blocks for line in block.splitlines() for c in line.split("&&")]
    commands = [shlex.split(c, comments=True) for c in commands]
    commands = [c[c.index(script) :] for c in commands for script in c if script.endswith(".py")]
    assert len(commands) >= 20
    for script, *arguments in commands:
        SCRIPTS[script.removesuffix(".py")].build_parser().parse_args(arguments)


def test_the_collection_in_the_readme_is_read(tmp_path):
    corpus, queries, *qrels = README.partition("A line of each:\n\n```\n")[2].splitlines()[:4]
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_text(corpus, encoding="utf-8")
    (tmp_path / "queries.jsonl").write_text(queries, encoding="utf-8")
    (tmp_path / "qrels" / "test.tsv").write_text("\n".join(qrels), encoding="utf-8")
    read = evaluate.read_collection(tmp_path)
    assert read.corpus.keys() == {"d1"} and read.qrels == {"q1": {"d1": 2}}


def test_the_row_in_the_readme_is_a_training_row():
    line = next(line for line in README.splitlines() if line.startswith('{"id"'))
    row = grouprank.check_row(json.loads(line))
    answer = grouprank.parse_answer(row.response, len(row.texts))
    assert (answer.status, tuple(answer.scores)) == ("ok", row.scores)


def test_every_config_field_is_read_and_says_where_its_default_comes_from():
    tree = ast.parse(SOURCE["grouprank"])
    read = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}  # cfg.name
    read |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}  # getattr(cfg, "name")
    for f in dataclasses.fields(grouprank.Config):
        assert f.name in read, f"{f.name} is read nowhere"
        assert re.match(r"paper|ours|released", f.metadata["source"]), f.name
        assert f.metadata["help"] and f.metadata["group"], f.name


@pytest.mark.parametrize(("call", "expected"), [
    ("interpolate({'a': 1.0}, {'a': 0.5, 'b': 1.0}, 0.25)", {"a": 0.625, "b": 0.75}),
    ("mean_ranks([5, 9, 5])", [2.5, 1.0, 2.5]),
    ("fuse_ranks([1, 4], [1, 1], 0.5)", [0.0, pytest.approx(-math.log(2))]),
    ("deal_scores([-0.3, -0.1, -0.9], [7, 3, 0])", [3.0, 7.0, 0.0]),
])  # fmt: skip
def test_each_equation_of_synth_runs_when_pasted_alone(call, expected):
    """Those of evaluate.py and grouprank.py: tests/test_evaluate.py, tests/test_method.py."""
    notebook = {"math": math, "np": np, "torch": torch}
    function = getattr(synth, call.partition("(")[0])
    exec("from __future__ import annotations\n" + inspect.getsource(function), notebook)
    assert eval(call, notebook) == expected


def test_no_public_function_lacks_a_docstring():
    for module in (grouprank, evaluate, synth):
        for name, thing in vars(module).items():
            if inspect.isfunction(thing) and thing.__module__ == module.__name__ and name[0] != "_":
                assert thing.__doc__, f"{module.__name__}.{name}"


def test_importing_the_scripts_does_no_work_and_needs_no_optional_package():
    for source in SOURCE.values():
        for node in ast.parse(source).body:
            calls = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
            assert not calls or "register" in ast.unparse(node)
    top = {n.split(".")[0] for node in ast.parse(SOURCE["evaluate"]).body
           for n in ([a.name for a in node.names] if isinstance(node, ast.Import) else [])}  # fmt: skip
    assert not top & {"torch", "transformers", "pyarrow", "matplotlib"}
