"""Each benchmark runs at a size of seconds and prints its table, so that none of them rots."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BENCHES = [  # script, arguments for a size of seconds, what its table names
    ("bench_demo.py", ["--small", "--seeds", "0"], ["| seed | sft |", "without ranking", "\n| 0 | "]),
    ("bench_evaluate.py", ["--small"], ["wall s", "evaluate.py", "pytrec_eval", "ranx"]),
    ("bench_growing.py", ["--small"], ["| 32B | ", "| 20 | 4 | 20 M | ", "| check on cpu | ", "| LoRA, fp32, "]),
    ("bench_grpo.py", ["--small"], ["| rollout | packed | ", "| rollout | rows | ", "| rollout | trl | "]),
    ("bench_kill.py", ["--small"], ["the final model is half there", "7 of 7 kills survived"]),
    ("bench_rerank.py", ["--small"], ["| pointwise | ", "| listwise, w = 5", "| c | t = 1 |", "sweep.png",
                                      "| cpu | groupwise, 2 new tokens | "]),
    ("bench_retrieval.py", ["--small"], ["documents in common 100.0 of 100"]),
    ("bench_synth.py", ["--small"], ["trained on these labels"]),
    ("bench_trust.py", ["--small"], ["10 faults of a server | 10 of 10", "| 68 of 68 |"]),
]


def test_every_benchmark_is_listed_here():
    assert {script for script, *_ in BENCHES} == {path.name for path in HERE.glob("bench_*.py")}


@pytest.mark.parametrize("script, arguments, names", BENCHES, ids=[bench[0] for bench in BENCHES])
def test_a_benchmark_prints_its_table(script, arguments, names):
    done = subprocess.run([sys.executable, str(HERE / script), *arguments], capture_output=True,
                          text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(name in done.stdout for name in names), done.stdout
    assert "failed:" not in done.stdout, done.stdout  # a peer that is absent is named "not installed"
