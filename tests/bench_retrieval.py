"""First-stage retrieval beside bm25s, in one run: speed and agreement; and dense search.

    python tests/bench_retrieval.py                   # 100,000 documents, 1,000 queries; 2 minutes
    python tests/bench_retrieval.py --docs 10000      # a quick look

Documents of 40 to 160 words drawn from a Zipf distribution over 200,000 words, queries of 8 words,
top 100, one thread. Each tool runs in a process of its own, texts in memory, tokenising included;
best of --repeats, the tools taking turns. The peer is bm25s with its numpy backend. Dense: exact
search with random unit vectors beside one matrix product and argpartition in numpy (1.5 s for
100,000 vectors of width 384 and 1,000 queries).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def draw_texts(n_docs, n_queries, seed=0):
    """(documents, queries) of Zipf-distributed words."""
    rng, chance = np.random.default_rng(seed), 1 / np.arange(1, 200_001)
    words = np.array([f"w{i}" for i in range(len(chance))])
    lengths = rng.integers(40, 161, n_docs)
    flat = words[rng.choice(len(chance), lengths.sum(), p=chance / chance.sum())]
    stops = np.cumsum(lengths)
    docs = [" ".join(flat[stop - n : stop]) for n, stop in zip(lengths, stops, strict=True)]
    drawn = words[rng.choice(len(chance), (n_queries, 8), p=chance / chance.sum())]
    return docs, [" ".join(row) for row in drawn]


def run_ours(docs, queries):
    """(seconds to index, seconds to search, top-100 scores)."""
    import evaluate

    start = time.perf_counter()
    index = evaluate.BM25(docs)
    middle = time.perf_counter()
    found = [index.search(query, 100)[1] for query in queries]
    return middle - start, time.perf_counter() - middle, found


def run_bm25s(docs, queries):
    """The same with bm25s."""
    import bm25s

    quiet = {"show_progress": False}
    start = time.perf_counter()
    peer = bm25s.BM25(method="lucene", k1=0.9, b=0.4, backend="numpy")
    peer.index(bm25s.tokenize(docs, stopwords=[], **quiet), **quiet)
    middle = time.perf_counter()
    tokens = bm25s.tokenize(queries, stopwords=[], return_ids=False, **quiet)
    _, scores = peer.retrieve(tokens, k=100, **quiet)
    return middle - start, time.perf_counter() - middle, scores


def child(args):
    """What a process of its own does: measure one tool, print JSON."""
    docs, queries = draw_texts(args.docs, args.queries)
    index, search, scores = {"ours": run_ours, "bm25s": run_bm25s}[args.child](docs, queries)
    print(json.dumps({"index": index, "search": search,
                      "scores": [[round(float(s), 7) for s in row] for row in scores]}))  # fmt: skip


def bench_bm25(args):
    """The table of both tools and the ratio of their times."""
    best, scores = {}, {}
    for tool in ["ours", "bm25s"] * args.repeats:
        argv = [sys.executable, __file__, "--child", tool, "--docs", str(args.docs), "--queries", str(args.queries)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            print(f"{tool}: {done.stderr.strip().splitlines()[-1]}")
            continue
        result = json.loads(done.stdout)
        scores[tool] = result.pop("scores")
        before = best.get(tool, result)
        best[tool] = {key: min(value, before[key]) for key, value in result.items()}
    print(f"BM25, {args.docs} documents, {args.queries} queries, top 100, best of {args.repeats}")
    print(f"{'':24}{'index s':>10}{'search s':>10}")
    for tool, row in best.items():
        print(f"{tool:24}{row['index']:10.2f}{row['search']:10.2f}")
    if len(best) == 2:
        ours, peer = (best[tool]["index"] + best[tool]["search"] for tool in ("ours", "bm25s"))
        print(f"index + search, bm25s / ours: {peer / ours:.2f}")
        print(f"largest difference of a top-100 score: {np.abs(np.subtract(*scores.values())).max():.1e}")


def bench_dense(n_docs, n_queries, width=384):
    """Exact dense search, blocks against one product."""
    import torch

    import synth

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    docs, queries = (torch.nn.functional.normalize(torch.randn(n, width, generator=generator), dim=1)
                     for n in (n_docs, n_queries))  # fmt: skip
    start = time.perf_counter()
    numbers = synth.dense_search(queries, docs, 100)
    ours = time.perf_counter() - start
    start = time.perf_counter()
    products = queries.numpy() @ docs.numpy().T
    best = np.argpartition(-products, 100, axis=1)[:, :100]
    plain = time.perf_counter() - start
    same = np.mean([len(set(a) & set(b)) for a, b in zip(numbers.tolist(), best.tolist(), strict=True)])
    print(f"\ndense, width {width}: {ours:.2f} s; one numpy product and argpartition {plain:.2f} s;"
          f" documents in common {same:.1f} of 100")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--docs", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="seconds: does everything still run?")
    parser.add_argument("--child", choices=["ours", "bm25s"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.small:
        args.docs, args.queries, args.repeats = 500, 20, 1
    if args.child:
        child(args)
    else:
        bench_bm25(args)
        bench_dense(args.docs, args.queries)


if __name__ == "__main__":
    main()
