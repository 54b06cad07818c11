"""Speed and memory of evaluate.py beside its peers, in one run.

    python tests/bench_evaluate.py                    # 1,000,000 lines; about a minute
    python tests/bench_evaluate.py --small            # 2,000 lines, once: seconds

File to table, four measures (ndcg@10, recall@100, map, mrr), each tool in a process of its own:
pytrec_eval parses in Python and evaluates in C, ranx compiles with numba (each process anew, unless
numba finds a cache). Times are of the whole process, imports included: wall clock, and CPU seconds,
which tell more on a machine that is busy. Memory is its peak resident set. Peers that are not
installed are named. All inputs are drawn with a fixed seed.

Measured with --repeats 5 on one core of an AMD EPYC, Python 3.11, numpy 2.4 (best of five; the
machine's speed varies by 10 % from run to run):

    1,000 queries x 1,000 documents    wall s   CPU s   peak MiB
    evaluate.py (with tie report)        1.08    1.17        171
    pytrec_eval                          1.28    1.38        212
    ranx (compiles in each process)     10.68   10.84        793
    evaluate.py --help                   0.12    0.17         34
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent

OURS = """
import runpy, sys
sys.argv = ["evaluate.py", "--qrels", QRELS, "--run", RUN,
            "--metrics", "ndcg@10", "recall@100", "map", "mrr"]
runpy.run_path(EVALUATE, run_name="__main__")
"""
PYTREC_EVAL = """
import pytrec_eval
with open(QRELS) as file:
    qrels = pytrec_eval.parse_qrel(file)
with open(RUN) as file:
    run = pytrec_eval.parse_run(file)
measures = {"ndcg_cut_10", "recall_100", "map", "recip_rank"}
results = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run)
for name in sorted(measures):
    print(name, sum(row[name] for row in results.values()) / len(results))
"""
RANX = """
from ranx import Qrels, Run, evaluate
qrels = Qrels.from_file(QRELS, kind="trec")
run = Run.from_file(RUN, kind="trec")
print(evaluate(qrels, run, ["ndcg@10", "recall@100", "map", "mrr"]))
"""
HELP = "import runpy, sys; sys.argv = ['evaluate.py', '--help']; runpy.run_path(EVALUATE, run_name='__main__')"


def write_inputs(folder, n_queries, n_docs, n_judged, seed=0):
    """A run of n_queries x n_docs lines over a corpus of 100 times n_docs, and its qrels."""
    rng = np.random.default_rng(seed)
    with open(folder / "run.txt", "w") as run, open(folder / "qrels.txt", "w") as qrels:
        for query in range(n_queries):
            docs = rng.choice(100 * n_docs, n_docs, replace=False)
            scores = np.sort(rng.normal(20, 5, n_docs))[::-1]
            for rank, (doc, score) in enumerate(zip(docs, scores, strict=True), start=1):
                run.write(f"q{query} Q0 document-{doc:07d} {rank} {score:.6f} bench\n")
            for doc in rng.choice(docs, n_judged, replace=False):
                qrels.write(f"q{query} 0 document-{doc:07d} {rng.integers(0, 3)}\n")


def measure(code, names, repeats):
    """Best wall seconds, best CPU seconds and peak MiB of `code` in fresh processes, or why not."""
    report = "import atexit, resource\natexit.register(lambda: print('peak', " \
        "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))\n"  # fmt: skip
    code = "".join(f"{name} = {str(value)!r}\n" for name, value in names.items()) + report + code
    wall, cpu, peak = [], [], 0
    for _ in range(repeats):
        start, before = time.perf_counter(), os.times()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        wall.append(time.perf_counter() - start)
        after = os.times()
        cpu.append(after.children_user + after.children_system - before.children_user - before.children_system)
        if done.returncode:
            error = done.stderr.strip().splitlines()[-1]
            return "not installed" if "ModuleNotFoundError" in error else f"failed: {error}"
        peak = max(peak, int(done.stdout.rsplit("peak ", 1)[1]))
    return min(wall), min(cpu), peak / 1024


def bench_files(args):
    """The table of file-to-table times."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_inputs(folder, args.queries, args.docs, args.judged)
        names = {"QRELS": folder / "qrels.txt", "RUN": folder / "run.txt", "EVALUATE": ROOT / "evaluate.py"}
        size = os.path.getsize(folder / "run.txt") / 2**20
        print(f"{args.queries} queries x {args.docs} documents, {args.judged} judged each "
              f"({size:.0f} MiB), best of {args.repeats}")  # fmt: skip
        print(f"{'':24}{'wall s':>10}{'CPU s':>10}{'peak MiB':>10}")
        for label, code in (("evaluate.py", OURS), ("pytrec_eval", PYTREC_EVAL), ("ranx", RANX),
                            ("evaluate.py --help", HELP)):  # fmt: skip
            result = measure(code, names, args.repeats)
            if isinstance(result, str):
                print(f"{label:24}{result:>20}")
            else:
                wall, cpu, peak = result
                print(f"{label:24}{wall:10.2f}{cpu:10.2f}{peak:10.0f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--docs", type=int, default=1000, help="a query")
    parser.add_argument("--judged", type=int, default=50, help="a query")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="20 queries of 100 documents, once")
    args = parser.parse_args()
    if args.small:
        args.queries, args.docs, args.repeats = 20, 100, 1
    bench_files(args)


if __name__ == "__main__":
    main()
