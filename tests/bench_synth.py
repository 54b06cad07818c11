"""What synthetic data are worth, in worlds whose truth is known. Runs synth.py --demo for each seed.

    python tests/bench_synth.py --seeds 0 1 2               # labels and retrievers, half a minute a seed
    python tests/bench_synth.py --seeds 0 1 2 --rerankers   # and rerankers, about ten minutes a seed
    python tests/bench_synth.py --libraries                 # the files in other libraries
    python tests/bench_synth.py --small                     # seconds: does everything still run?

The teacher is **simulated**: a function that reads the real prompts as text and answers from the world's truth, with
seeded errors (overlooked concepts, scores off by one, blurred orders, one answer in 25 cut off). 1,300 queries are asked
for, 860 are left when those of the same words are out; 60,000 calls a world. NDCG@10 of the pools against the truth, and
of retrieval over 3,000 documents for 100 held-out queries:

| seed | pointwise | listwise | fused (S) | labels 0-10 | BM25 | untrained encoder | trained on these labels |
|---|---|---|---|---|---|---|---|
| 0 | 94.67 | 92.32 | **96.36** | 95.08 | 16.97 | 16.89 | **95.98** |
| 1 | 94.92 | 92.21 | **96.42** | 95.06 | 16.51 | 16.18 | **93.63** |
| 2 | 94.83 | 92.11 | **96.35** | 94.96 | 19.09 | 15.82 | **94.58** |

BM25 finds nothing there, since no query word stands in a document; its column is the order of the corpus. The labels rank
a little worse than S because integer scores tie. --rerankers trains grouprank.py's demo model (SFT then GRPO) twice: on
the rows that synth.py wrote, and on the same groups with true scores and true responses. NDCG@10 on 100 held-out queries
with 24 candidates each:

| seed | synthetic labels | true labels | difference |
|---|---|---|---|
| 0 | 90.53 | 92.74 | -2.21 |
| 1 | 90.00 | 92.19 | -2.19 |
| 2 | 87.92 | 91.77 | -3.85 |

A point or two of it is chance: with a response kept from a quarter of the way to its labels on (MIN_ACCORD 0.25; 11,722
responses instead of 10,848), or from an NDCG@10 of 0.8 on (11,631), seed 2 came to 91.83 and 88.69.

--libraries opens the retriever in sentence-transformers (6.2: vectors equal for mean, first and last token) and the
exports in datasets (5.2: equal after loading); both are in requirements-bench.txt. ms-swift and TRL were not run.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import evaluate  # noqa: E402
import grouprank  # noqa: E402
import synth  # noqa: E402

SMALL = {"DEMO": synth.DEMO | {"generate_queries": 110, "groups_per_query": 1, "epochs": 6.0},
         "DEMO_DOCS": 300, "DEMO_TEST_QUERIES": 40}  # fmt: skip


def label_quality(work, world):
    """Mean NDCG@10 of the pools ranked by each kind of label, against the world's truth."""
    sums = Counter()
    concept_of = {word: c for c, row in enumerate(world.concepts) for word in row}
    for topic in work.topics:
        query = [concept_of[word] for word in topic.text.split()]
        truth = [world.score(query, c.text.split()) for c in topic.pool]
        for kind, score in (("pointwise", lambda c: c.points), ("listwise", lambda c: -c.place),
                            ("fused", lambda c: c.fused), ("labels 0-10", lambda c: c.label)):  # fmt: skip
            scores = [score(c) for c in topic.pool]
            sums[kind] += evaluate.ndcg(evaluate.tie_averaged(scores, truth), truth) / len(work.topics)
    return dict(sums)


def retrieval_quality(folder, trained):
    """NDCG@10 on the held-out queries over the whole corpus: BM25, then each encoder alone."""
    data, quality = evaluate.read_collection(folder), {}
    untrained = synth.Encoder(str(folder / "encoder"), synth.Config(chunk=64))
    for name, encoder in {"BM25": None, "untrained encoder": untrained, "trained on these labels": trained}.items():
        run = synth.retrieve(data.corpus, data.queries, {}, 10, encoder, alpha=0.0)
        # BM25 finds nothing here: the first documents of the corpus stand for a random order.
        scores = {qid: {doc: -place for place, doc in enumerate(dict(ranking) or data.corpus)}
                  for qid, ranking in run.items()}  # fmt: skip
        quality[name] = grouprank.mean_ndcg(data.qrels, scores)
    return quality


def write_truth(rows, target, world):
    """The same groups with the world's scores; rows with a response get the true one."""
    concept_of = {word: c for c, row in enumerate(world.concepts) for word in row}

    def truth(row):
        query = [concept_of[word] for word in row["query"].split()]
        docs = [doc["text"].split() for doc in row["docs"]]
        row["scores"] = [world.score(query, words) for words in docs]
        if "response" in row:
            row["response"] = world.respond(query, docs, None)
        return row

    evaluate.write_lines(target, map(truth, evaluate.read_jsonl(rows)))


def reranker_quality(folder, seed):
    """Held-out NDCG@10 of the demo's model after the command that synth.py --demo prints, on both kinds of rows."""
    rows, scores = {"synthetic labels": folder / synth.OUTPUTS[0], "true labels": folder / "truth.jsonl"}, {}
    write_truth(rows["synthetic labels"], rows["true labels"], grouprank.DemoWorld(seed))
    for name, path in rows.items():
        out = folder / f"reranker on {name}".replace(" ", "-")
        epochs = grouprank.DEMO_ROWS["grpo"] / sum(1 for _ in evaluate.read_jsonl(path))
        arguments = f"--train --data {path} --seed {seed} --grpo-epochs {epochs:.3f} --out {out}".split()
        grouprank.main([*arguments, "--eval-every", "0", "--save-every", "0"])  # neither changes the model
        scores[name] = json.loads((out / "results.json").read_text())["ndcg@10"]["sft+grpo"]
    return scores | {"difference": scores["synthetic labels"] - scores["true labels"]}


def check_libraries(folder):
    """What the readers of our files make of them."""
    import datasets
    import sentence_transformers

    texts = list(evaluate.read_texts(folder / "corpus.jsonl").values())[:200]
    ours = synth.Encoder(str(folder / "retriever"), synth.Config()).encode(texts, "document").numpy()
    theirs = sentence_transformers.SentenceTransformer(str(folder / "retriever"), device="cpu")
    worst = abs(theirs.encode(texts, prompt_name="document") - ours).max()
    print(f"sentence-transformers {sentence_transformers.__version__}: largest difference of a vector {worst:.1e}")
    rows = list(evaluate.read_jsonl(folder / synth.OUTPUTS[0]))[:500]
    files = {"retriever.jsonl": list(evaluate.read_jsonl(folder / "retriever.jsonl"))}
    for form, parts in synth.EXPORTS.items():
        for part, columns in parts.items():
            files[f"{form} {part}"] = [synth.export_row(row, columns) for row in rows
                                       if "response" in row or part != "sft"]  # fmt: skip
    for name, made in files.items():
        evaluate.write_lines(folder / "export.jsonl", made)
        table = datasets.Dataset.from_json(str(folder / "export.jsonl"), cache_dir=str(folder / "cache"))
        assert table.to_list() == made, name
        print(f"datasets {datasets.__version__}: {name}: {len(table)} rows, {table.column_names}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", metavar="FOLDER", help="keep what is written here (default: a temporary folder)")
    parser.add_argument("--rerankers", action="store_true", help="also train two rerankers in each world")
    parser.add_argument("--libraries", action="store_true", help="also open the files in other libraries")
    parser.add_argument("--small", action="store_true", help="a tenth of the documents and queries")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a tiny encoder: more threads would wait for each other
    for name, value in SMALL.items() if args.small else ():
        setattr(synth, name, value)
    labels, retrieval, rerankers = {}, {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        for seed in args.seeds:
            out = Path(args.out or temporary)
            work, encoder = synth.run_demo({"out": str(out), "seed": seed})
            folder, name = out / f"seed-{seed}", f"seed {seed}"
            labels[name] = label_quality(work, grouprank.DemoWorld(seed))
            retrieval[name] = retrieval_quality(folder, encoder)
            if args.rerankers:
                rerankers[name] = reranker_quality(folder, seed)
            if args.libraries:
                check_libraries(folder)
    print("\nNDCG@10 of the labels against the truth (the teacher is simulated)\n" + evaluate.table("pools", labels))
    print(f"\nNDCG@10 on {synth.DEMO_TEST_QUERIES} held-out queries, {synth.DEMO_DOCS} documents\n"
          + evaluate.table("retrieval", retrieval))  # fmt: skip
    if rerankers:
        print("\nheld-out NDCG@10 of the demo's reranker\n" + evaluate.table("trained on", rerankers))


if __name__ == "__main__":
    main()
