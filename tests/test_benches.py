"""Each benchmark runs at a size of seconds and prints its table, so that none of them rots."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BENCHES = {  # script: arguments for a size of seconds, what its table names
    "bench_demo.py": ("--small --seeds 0", ["| seed | sft |", "without ranking", "\n| 0 | "]),
    "bench_evaluate.py": ("--small", ["wall s", "evaluate.py", "pytrec_eval", "ranx"]),
    "bench_growing.py": ("--small", ["| 32B | ", "| 20 | 4 | 20 M | ", "| check on cpu | ", "| LoRA, fp32, "]),
    "bench_grpo.py": ("--small", ["| rollout | packed | ", "| rollout | rows | ", "| rollout | trl | "]),
    # SIGKILL to real processes at the worst moments, and one at a random one.
    "bench_kill.py": ("--small", ["the final model is half there", "8 of 8 kills survived"]),
    "bench_real.py": ("--small", ["| supervised, then GRPO | ", "| no-echo | ", "| cranfield, trained, seed 0 | "]),
    "bench_rerank.py": ("--small", ["| pointwise | ", "| listwise, w = 5", "| c | t = 1 |", "sweep.png",
                                    "| cpu | groupwise, 2 new tokens | ", "| cpu | groupwise, direct | "]),
    "bench_retrieval.py": ("--small", ["documents in common 100.0 of 100"]),
    "bench_synth.py": ("--small", ["trained on these labels"]),
    "bench_trust.py": ("--small", ["10 faults of a server | 10 of 10", "| 68 of 68 |"]),
}
# The libraries are imported once: each benchmark is a fork of one process.
RUN_ALL = """
import gc, os, runpy, sys
import grouprank, synth, matplotlib.pyplot
gc.freeze()  # no collection goes through the libraries' objects again, and no fork copies them
for number, command in enumerate(sys.argv[2:]):
    if not (child := os.fork()):
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{sys.argv[1]}/{number}.{name}", os.O_WRONLY | os.O_CREAT), stream)
        sys.argv = command.split()
        sys.path.insert(0, os.path.dirname(sys.argv[0]))
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    open(f"{sys.argv[1]}/{number}.status", "w").write(str(status))
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """(exit status, what was printed, errors) of each benchmark."""
    folder = tmp_path_factory.mktemp("benches")
    commands = [f"{HERE / script} {arguments}" for script, (arguments, _) in BENCHES.items()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([sys.executable, "-c", RUN_ALL, folder, *commands], cwd=HERE.parent, check=True,
                   env=environment)  # fmt: skip
    return {script: [(folder / f"{i}.{kind}").read_text() for kind in ("status", "out", "err")]
            for i, script in enumerate(BENCHES)}


def test_every_benchmark_is_listed_here():
    assert BENCHES.keys() == {path.name for path in HERE.glob("bench_*.py")}


@pytest.mark.parametrize("script", BENCHES)
def test_a_benchmark_prints_its_table(outputs, script):
    status, printed, errors = outputs[script]
    assert status == "0", errors[-2000:]
    assert all(name in printed for name in BENCHES[script][1]), printed
    assert "failed:" not in printed, printed  # a peer that is absent is named "not installed"
