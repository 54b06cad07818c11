"""The README and the code say the same: names, defaults, commands; equations run when pasted alone."""

import ast
import dataclasses
import inspect
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import grouprank
import synth

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE = {m.__name__: Path(m.__file__).read_text(encoding="utf-8") for m in (grouprank, evaluate, synth)}
FIELDS = {f.name: f for f in dataclasses.fields(grouprank.Config)}


def in_code(pattern):
    """All matches inside `inline code` of the README, tables included."""
    return {match for code in re.findall(r"`([^`\n]+)`", README) for match in re.findall(pattern, code)}


def parser_of(script):
    """The argument parser of a script."""
    return {"grouprank.py": grouprank, "evaluate.py": evaluate, "synth.py": synth}[script].build_parser()


def test_every_function_that_the_readme_names_exists():
    names = in_code(r"^([\w.]+)\(\)$") | in_code(r"^([A-Z][a-z]+[A-Z]\w+)$") - {"CrossEncoder"}
    assert len(names) > 20 and {"PromptEncoder", "DecodingCache"} <= names
    for name in names:
        script, _, function = name.rpartition(".")
        assert callable(getattr({"evaluate": evaluate, "synth": synth, "": grouprank}[script], function))


def test_every_test_that_the_readme_names_exists():
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    names = in_code(r"^(test_\w+)$")
    assert len(names) > 15
    assert all(f"def {name}(" in sources for name in names)


def test_every_flag_that_the_readme_names_exists():
    known = {o for s in ("grouprank.py", "evaluate.py", "synth.py")
             for a in parser_of(s)._actions for o in a.option_strings}  # fmt: skip
    for path in (ROOT / "tests").glob("bench_*.py"):
        known |= set(re.findall(r'add_argument\("(--[a-z0-9-]+)', path.read_text()))
    ours = re.sub(r"torchrun .*?grouprank\.py|vllm serve .*", "", README)  # without their options
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", ours))
    assert len(flags) > 15 and not flags - known


def test_every_default_in_the_hyperparameter_table_is_the_codes():
    table = README[README.index("## Hyperparameters") : README.index("## Departures")]
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \|", table, flags=re.MULTILINE)
    assert len(rows) > 20
    for name, value in rows:
        assert str(FIELDS[name].default) == value, name


def test_every_command_in_the_readme_parses():
    blocks = re.findall(r"^```\w*\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    commands = [c for block in blocks for line in block.splitlines() for c in line.split("&&")]
    commands = [shlex.split(c, comments=True) for c in commands if re.match(r" *python \S+\.py", c)]
    assert len(commands) >= 10
    for _, script, *arguments in commands:
        if script.startswith("tests/"):
            assert (ROOT / script).exists()
        else:
            parser_of(script).parse_args(arguments)


def test_the_row_in_the_readme_is_a_training_row():
    line = next(line for line in README.splitlines() if line.startswith('{"id"'))
    row = grouprank.check_row(json.loads(line), "README")
    answer = grouprank.parse_answer(row.response, len(row.texts))
    assert (answer.status, tuple(answer.scores)) == ("ok", row.scores)


def test_every_config_field_is_read_and_says_where_its_default_comes_from():
    tree = ast.parse(SOURCE["grouprank"])
    configs = {"cfg", "self"}  # self: Config's own checks and, in Endpoint, self.cfg
    read = Counter(n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)
                   and ast.unparse(n.value).split(".")[-1] in configs)  # fmt: skip
    for name, f in FIELDS.items():
        assert read[name] > 0, f"{name} is read nowhere"
        assert re.match(r"paper|ours|released", f.metadata["source"]), name
        assert f.metadata["help"] and f.metadata["group"], name


EQUATIONS = {  # name -> a call and what it must give
    "score_distribution": ("score_distribution([3, 1])", [0.75, 0.25]),
    "js_divergence": ("js_divergence([1, 0], [0, 1])", 1.0),
    "group_reward": ("group_reward(1.0, 0.5, 0.2)", 1.0 + 0.1 + 0.08),
    "format_reward": ("[format_reward(*f, 1.0) for f in ((1, 1), (1, 0), (0, 0))]", [1.0, -0.1, -0.5]),
    "relative_advantages": ("relative_advantages([[1, 2, 3]], eps=0.0).tolist()", [[-1, 0, 1]]),
    "k3_divergence": ("k3_divergence(torch.zeros(1), torch.zeros(1)).item()", 0.0),
    "clipped_surrogate": (
        "clipped_surrogate(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([2.0]), 0.2).item()",
        pytest.approx(2.4),
    ),
    "even_limit": ("even_limit([10, 100, 100], 90)", 40),
    "order_candidates": ("order_candidates([0.1, None, 0.9, 0.1])", [2, 1, 0, 3]),
    "plan_groups": ("[len(g) for g in plan_groups(21, 20, 1, 0, np.random.default_rng(0))[0]]", [11, 10]),
    "learning_rate": ("learning_rate(0, 10, 1.0, 0.2, 'cosine')", 0.5),
    "sample_tokens": ("sample_tokens(torch.tensor([[0.0, 1.0]]), None, 0, 1.0).tolist()", [1]),
    "interpolate": ("interpolate({'a': 1.0}, {'a': 0.5, 'b': 1.0}, 0.25)", {"a": 0.625, "b": 0.75}),
    "reciprocal_rank_fusion": ("reciprocal_rank_fusion([['a', 'b'], ['b']])", {"a": 1 / 61, "b": 1 / 62 + 1 / 61}),
    "mean_ranks": ("mean_ranks([5, 9, 5])", [2.5, 1.0, 2.5]),
    "fuse_ranks": ("fuse_ranks([1, 4], [1, 1], 0.5)", [0.0, pytest.approx(-math.log(2))]),
    "deal_scores": ("deal_scores([-0.3, -0.1, -0.9], [7, 3, 0])", [3.0, 7.0, 0.0]),
    "ndcg": ("ndcg([0, 1], [0, 1], 10)", pytest.approx(1 / math.log2(3))),
    "recall": ("recall([1, 0], [1, 0, 1], 2)", 0.5),
    "tie_averaged": ("[float(x) for x in tie_averaged([1, 1, 2], [0, 4, 7])]", [7, 2, 2]),
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_each_equation_function_runs_when_pasted_alone(name):
    source = next(text for text in SOURCE.values() if f"\ndef {name}(" in text)
    lines = source.splitlines()
    node = next(n for n in ast.parse(source).body if getattr(n, "name", None) == name)
    notebook = {"np": np, "math": math, "torch": torch, "Tensor": torch.Tensor, "Sequence": Sequence,
                "dataclass": dataclass, "SCORE_MAX": 10}  # fmt: skip
    exec("from __future__ import annotations\n" + "\n".join(lines[node.lineno - 1 : node.end_lineno]), notebook)
    call, expected = EQUATIONS[name]
    result = eval(call, notebook)
    assert result == (pytest.approx(expected) if isinstance(expected, float) else expected)


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
