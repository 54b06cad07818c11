"""Is a reranker trained on synthetic labels as good as one trained on the truth? About 8 minutes a seed.

    python synth.py --demo --out runs/synth-demo
    python tests/bench_synth.py --demo runs/synth-demo --seeds 0 1 2

--libraries instead opens the demo's retriever in sentence-transformers and its exports in datasets
(both optional: requirements-bench.txt), and compares vectors and rows.

Otherwise trains the embedded demo's model (grouprank.py, SFT then GRPO) twice for each of the demo's worlds:
on the rows that synth.py wrote, and on the same groups with true scores and true responses. Both are
evaluated as the demo is, on 100 held-out queries with 24 candidates each.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import evaluate  # noqa: E402
import grouprank  # noqa: E402
import synth  # noqa: E402


def write_truth(rows, target, world):
    """The same groups with the world's scores; rows with a response get the true one."""
    concept_of = {word: c for c, row in enumerate(world.concepts) for word in row}

    def truth(row):
        query = [concept_of[word] for word in row["query"].split()]
        docs = [doc["text"].split() for doc in row["docs"]]
        row["scores"] = [synth.true_score(world, query, words) for words in docs]
        if "response" in row:
            row["response"] = world.respond(query, docs, None)
        return row

    evaluate.write_lines(target, map(truth, evaluate.read_jsonl(rows)))


def train_and_score(rows, out, seed):
    """Held-out NDCG@10 of the demo's model after the command that synth.py --demo prints."""
    arguments = synth.reranker_command(rows, out, seed).split()[2:]
    grouprank.main([*arguments, "--eval-every", "0", "--save-every", "0"])  # neither changes the model
    return json.loads((out / "results.json").read_text())["ndcg@10"]["sft+grpo"]


def check_libraries(folder):
    """What the readers of our files make of them."""
    import datasets
    import sentence_transformers

    texts = list(evaluate.read_texts(folder / "corpus.jsonl").values())[:200]
    ours = synth.Encoder(str(folder / "retriever"), synth.Config()).encode(texts, "document").numpy()
    theirs = sentence_transformers.SentenceTransformer(str(folder / "retriever"), device="cpu")
    worst = abs(theirs.encode(texts, prompt_name="document") - ours).max()
    print(f"sentence-transformers {sentence_transformers.__version__}: largest difference of a vector {worst:.1e}")
    rows = list(evaluate.read_jsonl(folder / "reranker.train.jsonl"))[:500]
    cfg = synth.Config(positive_level=4, negative_level=1)
    for form, parts in synth.EXPORTS.items():
        for part in parts:
            made = [row for row in (synth.export_row(form, part, row, cfg) for row in rows) if row]
            evaluate.write_lines(folder / "export.jsonl", made)
            table = datasets.Dataset.from_json(str(folder / "export.jsonl"), cache_dir=str(folder / "cache"))
            assert table.to_list() == made, form
            print(f"datasets {datasets.__version__}: {form} {part}: {len(table)} rows, {table.column_names}")
    evaluate.write_lines(folder / "export.jsonl", evaluate.read_jsonl(folder / "retriever.jsonl"))
    table = datasets.Dataset.from_json(str(folder / "export.jsonl"), cache_dir=str(folder / "cache"))
    print(f"datasets: retriever.jsonl: {len(table)} rows, {table.column_names}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--demo", required=True, metavar="FOLDER", help="what synth.py --demo wrote")
    parser.add_argument("--libraries", action="store_true", help="check the files, train nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.libraries:
        check_libraries(Path(args.demo) / f"seed-{args.seeds[0]}")
        return
    table = {}
    for seed in args.seeds:
        folder, world = Path(args.demo) / f"seed-{seed}", grouprank.DemoWorld(seed)
        bench, rows = folder / "bench", folder / "reranker.train.jsonl"
        bench.mkdir()
        write_truth(rows, bench / "truth.jsonl", world)
        scores = {"synthetic labels": train_and_score(rows, bench / "synthetic", seed),
                  "true labels": train_and_score(bench / "truth.jsonl", bench / "true", seed)}
        table[f"seed {seed}"] = scores | {"difference": scores["synthetic labels"] - scores["true labels"]}
        print(json.dumps({f"seed {seed}": table[f"seed {seed}"]}), flush=True)
    print("\nheld-out NDCG@10 of the demo's reranker\n" + evaluate.table("trained on", table))


if __name__ == "__main__":
    main()
