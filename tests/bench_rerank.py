"""Pointwise, listwise and groupwise reranking side by side: NDCG@10, calls, tokens, seconds.

    python tests/bench_rerank.py --out runs/bench_rerank                # the demo world, 3 seeds
    python tests/bench_rerank.py --realistic                           # random weights, real lengths

The first bench trains small models on the demo's world. A base learns the reasoning about groups of
1, then 2, 5, 10 and 20 documents, without any answer. From it one model for each method is trained
by SFT on the same documents with their true marks, as many a step, in as many steps: one pointwise,
one listwise, and one groupwise for each group size, because a model of this size learns where in a
prompt a document stands rather than to look it up by its number. The listwise reasoning sorts as
well, level by level, and the answer copies that order: a model of this size does not sort without,
and windows of 10 are what it manages. The first stage is simulated: the true score plus noise.
Rows go to OUT/sweep.jsonl, which `evaluate.py --plot` draws; a seed that is there is not run again.

Seconds are those of one core (CPU time of this process), so that other work on the machine does
not count. "alone" is a query that is reranked by itself, "batched" its share of all together.
"""

import argparse
import dataclasses
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import transformers

import evaluate
import grouprank

SIZES, ROUNDS, CANDIDATES, DOCS_PER_STEP = (1, 5, 10, 20), 5, 100, 100
BASE_DOCS = {1: 30_000, 2: 10_000, 5: 20_000, 10: 30_000, 20: 50_000}  # by size, in turn
SETTINGS = grouprank.DEMO_SETTINGS | {
    "stage": "sft", "max_prompt_tokens": 400, "max_new_tokens": 300, "eval_every": 0,
    "save_every": 0, "device": "cpu"}  # fmt: skip


# --- Table 1: the demo's world --------------------------------------------------------------------


def write_collection(folder, world, n_queries, noise):
    """A held-out collection and its simulated first-stage run."""
    corpus, queries, qrels = world.collection(n_queries, CANDIDATES)
    evaluate.write_collection(folder, corpus, queries, qrels)
    rng = random.Random(f"first stage {world.seed}")
    run = {}
    for qid, judged in qrels.items():
        scores = {doc: mark + rng.gauss(0, noise) for doc, mark in judged.items()}
        run[qid] = sorted(scores.items(), key=lambda pair: -pair[1])
    evaluate.write_run(folder / "first.run", run, tag="simulated")


def respond(world, query, docs, method):
    """The reasoning: query words with their marks and the sum, document by document; the answer.

    Listwise goes on with a walk down the levels: at each, the documents of that sum, then a stop.
    """
    names, lines = [world.concepts[c][0] for c in query], []
    marks = [world.marks(query, words) for words in docs]
    scores = [sum(grouprank.POINTS[m] for m in of_doc) for of_doc in marks]
    for i, (of_doc, score) in enumerate(zip(marks, scores, strict=True), 1):
        marked = " ".join(f"{n} {grouprank.MARKS[m]}" for n, m in zip(names, of_doc, strict=True))
        lines.append(f"[{i}] {marked} {score}")
    answer = "{" + ",".join(f'"[{i}]":{score}' for i, score in enumerate(scores, 1)) + "}"
    if method == "pointwise":
        answer = str(scores[0])
    if method == "listwise":
        levels = {level: [f"[{i}]" for i, score in enumerate(scores, 1) if score == level]
                  for level in range(9, -1, -1)}  # fmt: skip
        lines += [f"{level} {found}" for level, of_level in levels.items() for found in [*of_level, "."]]
        answer = " > ".join(itertools.chain(*levels.values()))
    return f"<reason> {' '.join(lines)} </reason> <answer> {answer} </answer>"


def write_rows(path, world, method, docs_per_group, n_docs):
    """Training rows: the same documents for every method and group size, with their true marks.

    Those of the base are others, and end where the reasoning does. Every second query has good
    documents, as windows at the top of a list and groups of its first ranks have.
    """
    good = dataclasses.replace(world, match_share=0.7)
    stream = f"base {docs_per_group}" if method == "base" else "bench"
    rng = random.Random(f"{stream} {world.seed}")
    with open(path, "w", encoding="utf-8") as file:
        for number in range(n_docs // 20):
            query = world.draw_query(rng, held_out=False)
            docs = [(good if number % 2 else world).draw_document(rng, query) for _ in range(20)]
            for start in range(0, 20, docs_per_group):
                group = docs[start : start + docs_per_group]
                response = respond(world, query, group, method)
                if method == "base":
                    response = response.partition(" <answer>")[0]
                row = {"id": f"{number}-{start}", "query": " ".join(world.concepts[c][0] for c in query),
                       "docs": [{"id": str(i), "text": " ".join(words)} for i, words in enumerate(group)],
                       "response": response}  # fmt: skip
                file.write(json.dumps(row) + "\n")


def train_model(folder, start, world, method, docs_per_group, n_docs, lr):
    """One model, trained from another; returns its folder and the CPU seconds of its training."""
    out = folder / f"{method}-{docs_per_group}"
    out.mkdir()
    write_rows(out / "rows.jsonl", world, method, docs_per_group, n_docs)
    cfg = grouprank.Config(**SETTINGS | {
        "model": str(start), "data": str(out / "rows.jsonl"), "seed": world.seed, "sft_lr": lr,
        "docs_per_group": docs_per_group, "sft_batch": DOCS_PER_STEP // docs_per_group})  # fmt: skip
    started = time.process_time()
    grouprank.train(cfg, grouprank.DEMO_PROMPT, out / "model")
    return out / "model", time.process_time() - started


def train_base(folder, world):
    """The model from which every method starts.

    The demo's, with heads of 48 and slower rotary frequencies: those of the demo turn too far over
    a whole answer for a document to be looked up by its sum, which is what sorting takes.
    """
    tokenizer, model = grouprank.demo_tokenizer(world, more=[">"]), folder / "untrained"
    config = grouprank.demo_model(tokenizer, world.seed).config
    config.head_dim, config.rope_parameters["rope_theta"] = 48, 1e5
    torch.manual_seed(world.seed)
    transformers.Qwen3ForCausalLM(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    for size, n_docs in BASE_DOCS.items():
        lr = 3e-3 if size == 1 else 1e-3  # more makes it forget what it has learned, at a new size
        model, _ = train_model(folder, model, world, "base", size, n_docs, lr)
    return model


def measure(backend, queries, qrels, cfg, n_alone=0):
    """Rerank all queries; the rows of sweep.jsonl for 1, 2, ... cfg.rounds rounds.

    Round r of a query is the same prompts and draws whatever the number of rounds, so the votes of
    the first r rounds are those of `--rounds r`.
    """
    counts, started = Counter(), time.process_time()
    rankings = grouprank.rank_queries(backend, grouprank.DEMO_PROMPT, queries, cfg, counts)
    seconds = time.process_time() - started
    alone = []
    for query in queries[:n_alone]:
        started = time.process_time()
        grouprank.rank_queries(backend, grouprank.DEMO_PROMPT, [query], cfg, Counter())
        alone.append(time.process_time() - started)
    for rounds in [cfg.rounds] if cfg.method == "listwise" else range(1, cfg.rounds + 1):
        orders = [ranking.order for ranking in rankings]
        if rounds < cfg.rounds:
            votes = [[votes[:rounds] for votes in ranking.votes] for ranking in rankings]
            orders = [grouprank.order_candidates([sum(v) / len(v) if v else None for v in of_query])
                      for of_query in votes]  # fmt: skip
        run = grouprank.ranked_run(queries, orders)
        row = {name: getattr(cfg, name) for name in evaluate.SWEPT} | {"rounds": rounds}
        row |= {"ndcg@10": grouprank.mean_ndcg(qrels, run), "queries": len(queries)}
        if rounds == cfg.rounds:
            row |= {"seconds": seconds, "seconds_alone": statistics.mean(alone or [0]), **counts}
        yield row


def run_seed(seed, args, out):
    """Train and measure everything for one seed."""
    world = grouprank.DemoWorld(seed, doc_words=7)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_collection(folder, world, args.queries, args.noise)
        base = train_base(folder, world)
        plans = [("pointwise", 1, [{"rounds": 1}]),
                 ("listwise", args.window, [{"rounds": 1}, {"rounds": 2}])]  # fmt: skip
        for size in SIZES:
            rank = [{"rounds": 1, "grouping": "rank"}] if size > 1 else []
            plans.append(("groupwise", size, [{"rounds": 1}, {"rounds": ROUNDS}, *rank]))
        rows = []
        for method, size, variants in plans:
            model, train_s = train_model(folder, base, world, method, size, args.docs, 2e-3)
            cfg = grouprank.Config(**SETTINGS | {
                "model": str(model), "data": str(folder), "run": str(folder / "first.run"),
                "method": method, "docs_per_group": size, "seed": seed,
                "window": args.window, "step": args.window // 2})  # fmt: skip
            queries, collection, _ = grouprank.read_candidates(cfg)
            backend = grouprank.load_backend(cfg)
            for changes in variants:
                changed = dataclasses.replace(cfg, **changes)
                alone = args.alone if changed.rounds == 1 else 0
                found = measure(backend, queries, collection.qrels, changed, alone)
                for row in found:
                    if row["rounds"] > 1 or changed.rounds == 1:  # the round alone was timed alone
                        rows.append({"seed": seed, "train_seconds": train_s, **row})
                        print(json.dumps(rows[-1]), flush=True)
        first = grouprank.mean_ndcg(collection.qrels, evaluate.read_run(cfg.run))
    for row in rows:
        grouprank.append_line(out / "sweep.jsonl", row | {"first_stage": first})


def average(rows, name):
    """Mean over rows that have the field, per query where it is a count."""
    per = 1 if name in ("ndcg@10", "seconds_alone") else rows[0]["queries"]
    values = [row[name] / per for row in rows if name in row]
    return statistics.mean(values) if values else float("nan")


def spread(rows):
    """NDCG@10: mean and deviation over the seeds."""
    values = [row["ndcg@10"] for row in rows]
    deviation = f" ± {statistics.stdev(values):.4f}" if values[1:] else ""
    return f"{statistics.mean(values):.4f}{deviation}"


def print_tables(rows):
    """Markdown: the methods, then group sizes and rounds."""
    cells = defaultdict(list)
    for row in rows:
        cells[row["method"], row["grouping"], row["docs_per_group"], row["rounds"]].append(row)
    first = statistics.mean({row["seed"]: row["first_stage"] for row in rows}.values())
    print(f"\nfirst stage (simulated): NDCG@10 {first:.4f}; {rows[0]['queries']} queries,"
          f" seeds {sorted({row['seed'] for row in rows})}\n\n| method | NDCG@10 | calls |"
          " prompt tokens | answer tokens | batched, s | alone, s |\n|---|---|---|---|---|---|---|")
    for key, found in cells.items():
        method, grouping, size, rounds = key
        if rounds > 1 and method != "listwise":
            continue
        label = {"groupwise": f"groupwise, c = {size}, {grouping}", "pointwise": "pointwise",
                 "listwise": f"listwise, w = {size}, {rounds} pass(es)"}[method]  # fmt: skip
        numbers = [average(found, n) for n in ("calls", "prompt tokens", "completion tokens")]
        seconds = [average(found, n) for n in ("seconds", "seconds_alone")]
        print(f"| {label} | {spread(found)} | "
              + " | ".join(f"{x:.0f}" for x in numbers) + " | "
              + " | ".join(f"{x:.3f}" if x else "" for x in seconds) + " |")
    print("\n| c | " + " | ".join(f"t = {t}" for t in range(1, ROUNDS + 1)) + " |\n"
          + "|---" * (ROUNDS + 1) + "|")
    for size in SIZES:
        values = [spread(cells["groupwise", "random", size, t]) for t in range(1, ROUNDS + 1)]
        print(f"| {size} | " + " | ".join(values) + " |")
    names = (*grouprank.STATUSES, "calls", "truncated", "failed groups", "unscored documents")
    for method in grouprank.METHODS:
        counts = {n: sum(row.get(n, 0) for row in rows if row["method"] == method) for n in names}
        print(f"\n{method}: {grouprank.describe_counts(Counter(counts))}")


# --- Table 2: random weights at realistic lengths -------------------------------------------------


WORDS = ["".join(letters) for letters in itertools.product("bcdfghklmn", repeat=4)][:8000]


def realistic_backend(device, doc_tokens, new_tokens):
    """A Qwen2 of 17 million random weights; documents are cut to doc_tokens."""
    tokenizer = grouprank.demo_tokenizer(grouprank.DemoWorld(), 20, WORDS)
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=384, intermediate_size=1152, num_hidden_layers=8,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=16384,
        tie_word_embeddings=True, eos_token_id=None, pad_token_id=0, bos_token_id=None)
    cfg = grouprank.Config(model="random", max_doc_tokens=doc_tokens, max_new_tokens=new_tokens,
                           max_prompt_tokens=16384 - new_tokens, retries=0, temperature=0.0)
    machine = grouprank.pick_machine(device)
    model = transformers.Qwen2ForCausalLM(config).to(machine.device)
    return grouprank.LocalModel(model, tokenizer, machine, cfg), cfg


def run_realistic(args):
    """Seconds of one query with 100 candidates: 300 tokens each, 500 new tokens an answer."""
    grouprank.end_token_ids = lambda *_: [-1]  # no token ends an answer: all are equally long
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=args.doc_tokens)) for _ in range(CANDIDATES)]
    ids = [str(i) for i in range(CANDIDATES)]
    query = grouprank.Candidates("q", " ".join(WORDS[:8]), ids, texts, [-float(i) for i in range(CANDIDATES)])
    short = max(args.new_tokens // 20, 1)  # a document's share of a group's answer
    plans = [("groupwise", args.new_tokens), ("listwise", args.new_tokens),
             ("pointwise", args.new_tokens), ("pointwise", short)]  # fmt: skip
    print("| device | method | calls | one after another | prompt tokens | answer tokens | s a query |"
          "\n|---|---|---|---|---|---|---|")
    for device in ("cpu", "cuda"):
        if device == "cuda" and not torch.cuda.is_available():
            print("| cuda | not run: no device here | | | | | |")
            continue
        for method, new_tokens in plans:
            backend, cfg = realistic_backend(device, args.doc_tokens, new_tokens)
            cfg = dataclasses.replace(cfg, method=method)
            if device == "cuda":  # the first call compiles and allocates
                grouprank.rank_queries(backend, grouprank.DEMO_PROMPT, [query], cfg, Counter())
            counts, clock = Counter(), time.perf_counter if device == "cuda" else time.process_time
            started = clock()
            grouprank.rank_queries(backend, grouprank.DEMO_PROMPT, [query], cfg, counts)
            seconds = clock() - started
            in_turn = counts["calls"] if method == "listwise" else 1
            print(f"| {device} | {method}, {new_tokens} new tokens | {counts['calls']} | {in_turn} |"
                  f" {counts['prompt tokens']} | {counts['completion tokens']} | {seconds:.1f} |",
                  flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="runs/bench_rerank", help="folder of sweep.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--docs", type=int, default=60_000, help="training documents of a method")
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--window", type=int, default=10, help="listwise; it moves by half of it")
    parser.add_argument("--alone", type=int, default=5, help="queries timed one by one")
    parser.add_argument("--noise", type=float, default=3.0, help="deviation of the first stage")
    parser.add_argument("--realistic", action="store_true", help="random weights, real lengths")
    parser.add_argument("--doc-tokens", type=int, default=300)
    parser.add_argument("--new-tokens", type=int, default=500)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    if args.realistic:
        return run_realistic(args)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    path = Path(args.out) / "sweep.jsonl"
    done = {row["seed"] for row in evaluate.read_jsonl(path)} if path.exists() else set()
    for seed in args.seeds:
        if seed not in done:
            run_seed(seed, args, Path(args.out))
    print_tables(list(evaluate.read_jsonl(path)))


if __name__ == "__main__":
    main()
