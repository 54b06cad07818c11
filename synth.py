"""The data side of GroupRank (arXiv 2511.11653v3, Sec. 3.2). So far: first-stage retrieval.

    python synth.py --retrieve --data BEIR_DIR --out first.run
    python synth.py --retrieve --data BEIR_DIR --queries gpt4_reason --out first.run

Retrieval is BM25, Lucene variant (evaluate.BM25: k1 0.9, b 0.4, its tokenizer and stop words).
Documents that excluded.tsv names for a query are never returned for it. A dense encoder, its fusion
with BM25, the teachers and the sampling of groups are not built yet.
"""

import argparse
import sys

from tqdm import tqdm

import evaluate


def retrieve(corpus, queries, excluded, top_k):
    """BM25 candidates of every query: {qid: [(docid, score), ...]}, best first, top_k each.

    corpus and queries map ids to texts; excluded maps a query to the documents it must not get.
    A document that shares no word with a query scores 0 and can still fill the end of its list.
    """
    ids = list(corpus)
    index = evaluate.BM25(corpus.values())
    run = {}
    for qid, query in tqdm(queries.items(), desc="search", disable=not sys.stderr.isatty()):
        banned = excluded.get(qid, ())
        found, scores = index.search(query, top_k + len(banned))
        ranked = [(ids[i], float(s)) for i, s in zip(found, scores, strict=True)]
        run[qid] = [pair for pair in ranked if pair[0] not in banned][:top_k]
    return run


def run_retrieve(args):
    """`--retrieve`: write the first-stage run of a BEIR folder."""
    evaluate.refuse_overwrite(args.out, args.overwrite)
    collection = evaluate.read_collection(args.data, queries=args.queries)
    print(
        f"retrieve: BM25 (Lucene variant, k1 0.9, b 0.4), {len(collection.corpus)} documents,"
        f" {len(collection.queries)} queries, top {args.top_k}",
        flush=True,
    )
    run = retrieve(collection.corpus, collection.queries, collection.excluded, args.top_k)
    evaluate.write_run(args.out, run, tag="bm25")
    print(f"wrote {args.out}")


def build_parser():
    """The command line."""
    parser = argparse.ArgumentParser(prog="synth.py", description="First-stage retrieval.")
    parser.add_argument("--retrieve", action="store_true", required=True, help="write a run")
    parser.add_argument("--data", required=True, metavar="FOLDER", help="BEIR folder")
    parser.add_argument("--queries", metavar="NAME", help="use queries.NAME.jsonl (rewritten)")
    parser.add_argument("--out", required=True, metavar="FILE", help="run file to write")
    parser.add_argument("--top-k", type=int, default=100, metavar="N", help="per query (100)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="unused: no chance here")
    return parser


def main():
    """Parse the command line and run the command."""
    run_retrieve(build_parser().parse_args())


if __name__ == "__main__":
    evaluate.run_cli(main)
