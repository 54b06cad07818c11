"""Pointwise, listwise and groupwise reranking side by side: NDCG@10, calls, tokens, seconds.

    python tests/bench_rerank.py --out runs/bench_rerank               # the demo world, 3 seeds
    python tests/bench_rerank.py --realistic [--devices cpu cuda]      # random weights, real lengths
    python tests/bench_rerank.py --small                               # both in seconds

The first bench trains small models on the demo's world. A base learns the reasoning about groups of
1, then 2, 5, 10 and 20 documents, without any answer. From it one model for each method is trained
by SFT on the same 60,000 documents with their true marks, as many a step, in as many steps: one
pointwise, one listwise, and one groupwise for each group size, because a model of this size learns
where in a prompt a document stands rather than to look it up by its number. The listwise reasoning
sorts as well, level by level, and the answer copies that order: a model of this size does not sort
without, and windows of 10 are what it manages. The first stage is simulated: the true score plus
noise. Rows go to OUT/sweep.jsonl, and a seed that is there is not run again; OUT/sweep.png shows
NDCG@10 by group size c and by rounds t, as the paper's Fig. 3 and 5 do.

Seconds are those of one core (CPU time of this process), so that other work on the machine does
not count. "alone" is a query that is reranked by itself, "batched" its share of all together.

Measured at commit c0a8f3e or before on one core of an AMD EPYC with torch 2.13; 50 held-out queries
with 100 candidates each, first stage 69.24; seeds 0, 1 and 2, mean and deviation; calls, tokens and
seconds a query:

| method | NDCG@10 | calls | prompt tokens | answer tokens | batched, s | alone, s |
|---|---|---|---|---|---|---|
| pointwise | 100.00 ± 0.00 | 100 | 1800 | 1400 | 0.144 | 0.136 |
| listwise, w = 10, 1 pass(es) | 76.67 ± 5.02 | 19 | 1710 | 2736 | 0.490 | 6.094 |
| listwise, w = 10, 2 pass(es) | 80.44 ± 7.69 | 38 | 3424 | 5478 | 0.883 |  |
| groupwise, c = 1, random | 100.00 ± 0.00 | 100 | 1800 | 1600 | 0.154 | 0.171 |
| groupwise, c = 5, random | 97.86 ± 0.58 | 20 | 1000 | 1120 | 0.093 | 0.182 |
| groupwise, c = 5, rank | 96.60 ± 0.93 | 20 | 1000 | 1120 | 0.096 | 0.220 |
| groupwise, c = 10, random | 97.55 ± 0.78 | 10 | 900 | 1060 | 0.128 | 0.400 |
| groupwise, c = 10, rank | 96.10 ± 1.30 | 10 | 900 | 1060 | 0.118 | 0.385 |
| groupwise, c = 20, random | 96.67 ± 0.42 | 5 | 850 | 1030 | 0.192 | 0.729 |
| groupwise, c = 20, rank | 95.22 ± 0.66 | 5 | 850 | 1030 | 0.160 | 0.603 |

| c | t = 1 | t = 2 | t = 3 | t = 4 | t = 5 |
|---|---|---|---|---|---|
| 1 | 100.00 ± 0.00 | 100.00 ± 0.00 | 100.00 ± 0.00 | 100.00 ± 0.00 | 100.00 ± 0.00 |
| 5 | 97.86 ± 0.58 | 98.83 ± 0.34 | 99.16 ± 0.22 | 99.57 ± 0.11 | 99.62 ± 0.10 |
| 10 | 97.55 ± 0.78 | 98.39 ± 0.61 | 98.87 ± 0.53 | 99.35 ± 0.27 | 99.42 ± 0.28 |
| 20 | 96.67 ± 0.42 | 97.86 ± 0.31 | 98.50 ± 0.29 | 99.03 ± 0.14 | 99.12 ± 0.08 |

- As in the paper: gains from t flatten near 4, random groups beat ranked ones (by 1.3 to 1.5 on
  average, in eight of nine pairs of seed and c), and groupwise beats listwise.
- Not as in the paper: pointwise is perfect and larger groups lose a little. A mark in this world
  belongs to a document alone, so comparing documents can teach nothing, while a model of 200,000
  parameters finds its place in a prompt of twenty documents less surely than in one of five.
- Listwise sorts in part. Of its 8,557 answers 3,739 were whole permutations; 4,616 repeated a
  number and were repaired. What helped were reasoning that ends each document with its sum and walks
  down the levels before it answers, windows of 10, and training in which every second query has good
  documents only, as windows near the top have. That was the second training mix tried.

Random weights at realistic lengths (--realistic; a later version than the tables above): a Qwen2 of
17 million parameters, one query, 100 candidates of 300 tokens, every answer exactly as long as the
row says; seconds of one core:

| | calls | prompt tokens | answer tokens | s |
|---|---|---|---|---|
| groupwise, c = 20, 500 tokens an answer | 5 | 30,175 | 2,500 | 57.5 |
| groupwise, c = 20, 1 token (prefill alone) | 5 | 30,175 | 5 | 29.9 |
| groupwise, c = 20, direct | 5 | 60,375 | 0 | 84.3 |
| sliding listwise, 500 tokens | 9 | 54,315 | 4,500 | 140.3 |
| pointwise, 500 tokens (it reasons as long as a group) | 100 | 31,600 | 50,000 | 83.8 |
| pointwise, 25 tokens (a document's share of a group's) | 100 | 31,600 | 2,500 | 21.0 |

Direct scoring costs 2.8 times the prefill: twice its tokens, and the second half attends to all of
the prompt (3.1 times its attention), which in a model this narrow is most of the work. One core
decodes 500 tokens in less time than that, as five answers share every step's weights. On a GPU
decoding waits for memory, and the same tokens turn the comparison round: the same query and the
layers of Qwen2.5-7B (random weights, bf16) on an H200 with torch 2.11 (--devices cuda):

| | calls | prompt tokens | answer tokens | s |
|---|---|---|---|---|
| groupwise, c = 20, 500 tokens an answer | 5 | 30,175 | 2,500 | 13.25 |
| groupwise, c = 20, 1 token (prefill alone) | 5 | 30,175 | 5 | 0.90 |
| groupwise, c = 20, direct | 5 | 60,375 | 0 | 2.05 |
| pointwise, 25 tokens (a document's share of a group's) | 100 | 31,600 | 2,500 | 1.65 |

Direct scoring is 6.5 times as fast as 500 tokens of reasoning there, at 2.3 times the prefill.

The paper has groupwise 3.3 times as fast as pointwise (3.4 s against 11.1 s on four H800) and up to
6.4 times as fast as listwise. On one core groups of 20 are 2.5 (demo) and 2.4 times (realistic
lengths) as fast as listwise when queries come together, about the ratio of their tokens, because
nothing runs in parallel there; in the demo 8.4 times for a query alone, where nineteen windows wait
for one another. Against pointwise they are 1.5 times as fast when both reason at length, 0.75 times
in the demo, and 2.7 times slower when a pointwise answer is short: a token of a 6,000-token prompt
costs more attention than one of a 300-token prompt, which shows in a model this narrow.
"""

import argparse
import copy
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
SWEPT = ("method", "grouping", "docs_per_group", "rounds", "window", "step")


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
    good = copy.copy(world)
    good.match_share = 0.7
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
    grouprank.train(cfg, grouprank.DEMO_PROMPT, out / "model", log_every=100)
    return out / "model", time.process_time() - started


def train_base(folder, world):
    """The model from which every method starts.

    The demo's, with heads of 48 and slower rotary frequencies: those of the demo turn too far over
    a whole answer for a document to be looked up by its sum, which is what sorting takes.
    """
    tokenizer, model = grouprank.demo_tokenizer(world, more=[">"]), folder / "untrained"
    grouprank.demo_model(tokenizer, world.seed, head_dim=48, rope_theta=1e5).save_pretrained(model)
    tokenizer.save_pretrained(model)
    for size, n_docs in BASE_DOCS.items():
        lr = 3e-3 if size == 1 else 1e-3  # more makes it forget what it has learned, at a new size
        model, _ = train_model(folder, model, world, "base", size, n_docs, lr)
    return model


def rank(backend, queries, cfg, counts):
    """As rank_queries(), but a model that writes nothing readable is measured like any other."""
    method = grouprank.Method(grouprank.DEMO_PROMPT, grouprank.METHODS[cfg.method].parse)
    ask = grouprank.slide_windows if cfg.method == "listwise" else grouprank.score_groups
    rankings = ask(backend, method, queries, cfg, counts)
    for key in [key for key in counts if key.startswith("unread: ")]:
        del counts[key]
    counts["unscored documents"] += sum(ranking.means.count(None) for ranking in rankings)
    return rankings


def measure(backend, queries, qrels, cfg, n_alone=0):
    """Rerank all queries; the rows of sweep.jsonl for 1, 2, ... cfg.rounds rounds.

    Round r of a query is the same prompts and draws whatever the number of rounds, so the votes of
    the first r rounds are those of `--rounds r`.
    """
    counts, started = Counter(), time.process_time()
    rankings = rank(backend, queries, cfg, counts)
    seconds = time.process_time() - started
    alone = []
    for query in queries[:n_alone]:
        started = time.process_time()
        rank(backend, [query], cfg, Counter())
        alone.append(time.process_time() - started)
    for rounds in [cfg.rounds] if cfg.method == "listwise" else range(1, cfg.rounds + 1):
        orders = [ranking.order for ranking in rankings]
        if rounds < cfg.rounds:
            votes = [[votes[:rounds] for votes in ranking.votes] for ranking in rankings]
            orders = [grouprank.order_candidates([sum(v) / len(v) if v else None for v in of_query])
                      for of_query in votes]  # fmt: skip
        run = {query.qid: {query.ids[i]: -float(place) for place, i in enumerate(order)}
               for query, order in zip(queries, orders, strict=True)}
        row = {name: getattr(cfg, name) for name in SWEPT} | {"rounds": rounds}
        row |= {"ndcg@10": grouprank.mean_ndcg(qrels, run), "queries": len(queries)}
        if rounds == cfg.rounds:
            row |= {"seconds": seconds, "seconds_alone": statistics.mean(alone or [0]), **counts}
        yield row


def run_seed(seed, args, out):
    """Train and measure everything for one seed."""
    world = grouprank.DemoWorld(seed)
    world.doc_words = 7
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
            queries, qrels, _ = grouprank.read_candidates(cfg)
            backend = grouprank.load_backend(cfg)
            for changes in variants:
                changed = dataclasses.replace(cfg, **changes)
                alone = args.alone if changed.rounds == 1 else 0
                found = measure(backend, queries, qrels, changed, alone)
                for row in found:
                    if row["rounds"] > 1 or changed.rounds == 1:  # the round alone was timed alone
                        rows.append({"seed": seed, "train_seconds": train_s, **row})
                        print(json.dumps(rows[-1]), flush=True)
        first = grouprank.mean_ndcg(qrels, evaluate.read_run(cfg.run))
    with open(out / "sweep.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row | {"first_stage": first}) + "\n" for row in rows)


def average(rows, name):
    """Mean over rows that have the field, per query where it is a count."""
    per = 1 if name in ("ndcg@10", "seconds_alone") else rows[0]["queries"]
    values = [row[name] / per for row in rows if name in row]
    return statistics.mean(values) if values else float("nan")


def spread(rows):
    """NDCG@10 (0-100): mean and deviation over the seeds."""
    values = [100 * row["ndcg@10"] for row in rows]
    deviation = f" ± {statistics.stdev(values):.2f}" if values[1:] else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def print_tables(rows):
    """Markdown: the methods, then group sizes and rounds."""
    cells = defaultdict(list)
    for row in rows:
        cells[row["method"], row["grouping"], row["docs_per_group"], row["rounds"]].append(row)
    first = statistics.mean({row["seed"]: row["first_stage"] for row in rows}.values())
    print(f"\nfirst stage (simulated): NDCG@10 {100 * first:.2f}; {rows[0]['queries']} queries,"
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
    names = (*grouprank.STATUSES, "calls", "errors", "truncated", "failed groups", "unscored documents")
    for method in grouprank.METHODS:
        counts = {n: sum(row.get(n, 0) for row in rows if row["method"] == method) for n in names}
        print(f"\n{method}: {grouprank.describe_counts(Counter(counts))}")


def draw(rows, path):
    """NDCG@10 by group size c (the paper's Fig. 3) and by rounds t (its Fig. 5), means of seeds.

    What has no groups is a dashed line across.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: pip install matplotlib")
        return
    means = defaultdict(list)
    for row in rows:
        means[row["method"], row["grouping"], row["docs_per_group"], row["rounds"]].append(row["ndcg@10"])
    means = {key: 100 * statistics.mean(values) for key, values in means.items()}
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    by_size, by_rounds = figure.subplots(1, 2)
    for grouping in ("random", "rank"):
        sizes = [c for c in SIZES if ("groupwise", grouping, c, 1) in means]
        values = [means["groupwise", grouping, c, 1] for c in sizes]
        by_size.plot(sizes, values, "o-", markersize=3, label=f"groupwise, {grouping}")
    for (method, _, _, rounds), value in means.items():
        if method != "groupwise" and rounds == 1:
            color = "C2" if method == "pointwise" else "C3"
            by_size.axhline(value, color=color, linestyle="--", label=method)
    for size in SIZES:
        values = [means["groupwise", "random", size, t] for t in range(1, ROUNDS + 1)]
        by_rounds.plot(range(1, ROUNDS + 1), values, "o-", markersize=3, label=f"c = {size}")
    for axis, x in (by_size, "documents per group, c"), (by_rounds, "rounds, t"):
        axis.set(xlabel=x, ylabel="NDCG@10 (0-100)")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=150)
    print(f"\nwrote {path}")


# --- Table 2: random weights at realistic lengths -------------------------------------------------


WORDS = ["".join(letters) for letters in itertools.product("bcdfghklmn", repeat=4)][:8000]


def realistic_backend(device, doc_tokens, new_tokens, answer="reason"):
    """A Qwen2 of random weights, 17 million on the CPU, on CUDA the layers of Qwen2.5-7B in bf16;
    documents are cut to doc_tokens."""
    tokenizer = grouprank.demo_tokenizer(grouprank.DemoWorld(), 20, WORDS)
    torch.manual_seed(0)
    cuda = device == "cuda"
    shape = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
             "num_attention_heads": 28, "num_key_value_heads": 4} if cuda else {
             "hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 8,
             "num_attention_heads": 6, "num_key_value_heads": 2}  # fmt: skip
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), max_position_embeddings=16384,
        tie_word_embeddings=True, eos_token_id=None, pad_token_id=0, bos_token_id=None, **shape)
    cfg = grouprank.Config(model="random", answer=answer, max_doc_tokens=doc_tokens, max_new_tokens=new_tokens,
                           max_prompt_tokens=16384 - new_tokens, retries=0, temperature=0.0)
    machine = grouprank.pick_machine(device)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16 if cuda else torch.float32)  # fmt: skip
    backend = grouprank.LocalModel(model, tokenizer, machine, cfg)
    backend.end_ids = [config.vocab_size]  # no token ends an answer: all are equally long
    return backend, cfg


def run_realistic(args):
    """Seconds of one query with 100 candidates: 300 tokens each, 500 new tokens an answer."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=args.doc_tokens)) for _ in range(CANDIDATES)]
    ids = [str(i) for i in range(CANDIDATES)]
    query = grouprank.Candidates("q", " ".join(WORDS[:8]), ids, texts, [-float(i) for i in range(CANDIDATES)])
    short = max(args.new_tokens // 20, 1)  # a document's share of a group's answer
    plans = [("groupwise", args.new_tokens), ("groupwise", 1), ("groupwise", 0),  # 0: direct
             ("listwise", args.new_tokens), ("pointwise", args.new_tokens), ("pointwise", short)]  # fmt: skip
    print("| device | method | calls | one after another | prompt tokens | answer tokens | s a query |"
          "\n|---|---|---|---|---|---|---|")
    for device in args.devices:
        # 50,000 tokens, or 4,500 one after another, are minutes there
        for method, new_tokens in [plans[i] for i in (0, 1, 2, 5)] if device == "cuda" else plans:
            answer = "reason" if new_tokens else "direct"
            backend, cfg = realistic_backend(device, args.doc_tokens, max(new_tokens, 1), answer)
            cfg = dataclasses.replace(cfg, method=method)
            if device == "cuda":  # the first call compiles and allocates
                rank(backend, [query], cfg, Counter())
            counts, clock = Counter(), time.perf_counter if device == "cuda" else time.process_time
            started = clock()
            rank(backend, [query], cfg, counts)
            seconds = clock() - started
            in_turn = counts["calls"] if method == "listwise" else 1
            words = f"{new_tokens} new tokens" if new_tokens else "direct"
            print(f"| {device} | {method}, {words} | {counts['calls']} | {in_turn} |"
                  f" {counts['prompt tokens']} | {counts['completion tokens']} | {seconds:.2f} |",
                  flush=True)


def shrink(args):
    """Sizes for --small; nothing can be learned from as few documents."""
    global SIZES, BASE_DOCS, SETTINGS, CANDIDATES, ROUNDS
    SIZES, BASE_DOCS, CANDIDATES, ROUNDS = (1, 5), {1: 100, 5: 100}, 10, 2
    SETTINGS = SETTINGS | {"retries": 0, "max_new_tokens": 110}
    args.docs, args.queries, args.window, args.alone, args.seeds = 100, 2, 5, 1, args.seeds[:1]
    args.doc_tokens, args.new_tokens = 5, 2


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="runs/bench_rerank", help="folder of sweep.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--docs", type=int, default=60_000, help="training documents of a method")
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--window", type=int, default=10, help="listwise; it moves by half of it")
    parser.add_argument("--alone", type=int, default=5, help="queries timed one by one")
    parser.add_argument("--noise", type=float, default=3.0, help="deviation of the first stage")
    parser.add_argument("--small", action="store_true", help="few documents, in a temporary folder")
    parser.add_argument("--realistic", action="store_true", help="random weights, real lengths")
    parser.add_argument("--devices", nargs="+", default=["cpu"], help="cpu, cuda: of --realistic")
    parser.add_argument("--doc-tokens", type=int, default=300)
    parser.add_argument("--new-tokens", type=int, default=500)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    if args.realistic:
        return run_realistic(args)
    with tempfile.TemporaryDirectory() as temporary:
        if args.small:
            shrink(args)
        out = Path(temporary if args.small else args.out)
        out.mkdir(parents=True, exist_ok=True)
        path = out / "sweep.jsonl"
        done = {row["seed"] for row in evaluate.read_jsonl(path)} if path.exists() else set()
        for seed in args.seeds:
            if seed not in done:
                run_seed(seed, args, out)
        rows = list(evaluate.read_jsonl(path))
        print_tables(rows)
        draw(rows, out / "sweep.png")
    if args.small:
        run_realistic(args)


if __name__ == "__main__":
    main()
