"""Evaluation for reranking: exact measures, run files, a BM25 baseline, the paper's benchmarks.

Needs numpy and tqdm only. For GroupRank (arXiv 2511.11653v3) and for any other ranking.

    python evaluate.py --qrels qrels.tsv --run a.run b.run             # table, ties, paired tests
    python evaluate.py --qrels qrels.tsv --run a.run --metrics ndcg@10 recall@100 map mrr@10 p@5
    python evaluate.py --prepare bright/biology --out data/biology     # a benchmark as BEIR folder
    python evaluate.py --qrels data/biology/qrels/test.tsv --run a.run --paper bright
    python evaluate.py --plot runs/demo/metrics.jsonl --out curves.png

Sections: errors and outputs - measures - ties - run and qrels files - collections - BM25 -
evaluating runs - comparing runs - the paper's benchmarks - pictures - tables - command line.

Choices; each is trec_eval's convention unless it says otherwise:
 1. Order: score descending, then document id descending, as bytes. Scores are compared as float32,
    as trec_eval keeps them; the rank column is ignored. With `--ties first-stage`, equal scores
    keep the order of the run's lines: a reranker lists its candidates in first-stage order.
 2. NDCG: linear gain, discount log2(rank + 1) (the paper's Eq. 9); `--gain exponential` is
    2^grade - 1. No judgement or a negative grade: gain 0. No relevant document: the query scores 0.
 3. Means run over the queries that both files have; `--complete` (trec_eval -c) over all judged
    queries, missing ones 0. What is missing is always printed.
 4. Recall, precision, AP, RR and success take grade >= 1 as relevant (`--relevance-level`).
    Precision@k divides by k; judged@k (not in trec_eval) by the number retrieved, at most k.
 5. RBO is RBO_ext of Webber, Moffat and Zobel (2010, Eq. 32), over the whole lists.
"""

import argparse
import collections
import contextlib
import dataclasses
import gzip
import importlib
import itertools
import json
import math
import operator
import os
import re
import sys
from array import array
from pathlib import Path

import numpy as np
from tqdm import tqdm

# --- Errors and outputs ---------------------------------------------------------------------------


def run_cli(main):
    """Run `main()`; a user's mistake becomes one line `error: ...` and exit status 2, no traceback.

    Mistakes are ValueError, OSError and the ImportError of an optional package. Anything else is
    our fault and keeps its traceback; GROUPRANK_TRACEBACK=1 shows all of them.
    """
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `... | head` has seen enough; keep the interpreter's last flush quiet
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("GROUPRANK_TRACEBACK"):
            raise
        from_system = isinstance(error, OSError) and error.filename and error.strerror
        message = f"{error.filename}: {error.strerror}" if from_system else str(error)
        print("error: " + " ".join(message.split()), file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def open_atomic(path, mode="w"):
    """Open a file for writing that appears under its name when it is complete, or not at all.

    Written beside `path` under a temporary name, flushed to disk, renamed. Text: UTF-8, "\\n".
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def refuse_overwrite(path, overwrite=False):
    """Raise ValueError if `path` exists (a folder: if it holds anything) and `overwrite` is off."""
    path = Path(path)
    if not overwrite and (any(path.iterdir()) if path.is_dir() else path.exists()):
        raise ValueError(f"{path} exists; choose another name or add --overwrite")


# --- Measures -------------------------------------------------------------------------------------
# One formula each; every function works when pasted alone (import numpy as np, math).
# ranked_grades: grades in the order of the ranking, unjudged documents 0; lists, arrays or tensors.
# judged_grades: all judged grades of the query, in any order. k=None: the whole list.


def ndcg(ranked_grades, judged_grades, k=10, *, exponential=False):
    """Normalised discounted cumulative gain, in [0, 1]; 0.0 if no document is relevant.

    NDCG@k = DCG@k / ideal DCG@k,  DCG@k = sum_{i=1..k} gain_i / log2(i + 1)

    gain = max(grade, 0), or 2^max(grade, 0) - 1 if `exponential`. The ideal ranks all
    `judged_grades`, retrieved or not. Linear in the gains of the ranking: see `tie_averaged`.
    """

    def dcg(grades):
        gains = [max(grade, 0.0) for grade in grades[:k]]
        gains = [2.0**gain - 1.0 for gain in gains] if exponential else gains
        return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))

    ideal = dcg(sorted((float(grade) for grade in judged_grades), reverse=True))
    return dcg([float(grade) for grade in ranked_grades[:k]]) / ideal if ideal > 0 else 0.0


def recall(ranked_grades, judged_grades, k=None, *, level=1):
    """recall@k = relevant among the first k / all relevant (grade >= level); none relevant: 0.0."""
    relevant = len([grade for grade in judged_grades if grade >= level])
    found = len([grade for grade in ranked_grades[:k] if grade >= level])
    return found / relevant if relevant else 0.0


def precision(ranked_grades, k=None, *, level=1):
    """P@k = relevant (grade >= level) among the first k / k, however few are retrieved."""
    found = len([grade for grade in ranked_grades[:k] if grade >= level])
    return found / (k or max(len(ranked_grades), 1))


def average_precision(ranked_grades, judged_grades, k=None, *, level=1):
    """AP@k = sum of P@i over the relevant ranks i <= k / all relevant; none relevant: 0.0."""
    relevant = len([grade for grade in judged_grades if grade >= level])
    hits = [rank for rank, grade in enumerate(ranked_grades[:k], start=1) if grade >= level]
    return sum(n / rank for n, rank in enumerate(hits, start=1)) / relevant if relevant else 0.0


def reciprocal_rank(ranked_grades, k=None, *, level=1):
    """RR@k = 1 / rank of the first document with grade >= level; none in the first k: 0.0."""
    hits = (rank for rank, grade in enumerate(ranked_grades[:k], 1) if grade >= level)
    return 1.0 / next(hits, math.inf)


def success(ranked_grades, k=None, *, level=1):
    """success@k = 1.0 if one of the first k has grade >= level, else 0.0."""
    return float(any(grade >= level for grade in ranked_grades[:k]))


def judged(ranked_flags, k=None):
    """judged@k = share of the first k retrieved that are judged (flag true); nothing: 0.0."""
    flags = [bool(flag) for flag in ranked_flags[:k]]
    return sum(flags) / max(len(flags), 1)


def rank_biased_overlap(ranking_a, ranking_b, p=0.9):
    """Rank-biased overlap of two finite rankings, extrapolated: RBO_ext (Webber et al., Eq. 32).

    (1-p)/p (sum_{d<=l} X_d/d p^d + sum_{s<d<=l} X_s (d-s)/(s d) p^d) + ((X_l - X_s)/l + X_s/s) p^l

    X_d: documents that both have in their first d; s <= l: the two lengths. In [0, 1]: 1 for equal
    lists (also two empty ones), 0 for disjoint ones. On two orders of the same documents it never
    reaches 0. The first 10 ranks hold 86 % of the weight at p 0.9. ValueError if one repeats.
    """
    a, b = list(ranking_a), list(ranking_b)
    if not 0.0 < p < 1.0 or len(set(a)) < len(a) or len(set(b)) < len(b):
        raise ValueError(f"rank-biased overlap needs 0 < p < 1 (got {p}) and no repeated document")
    s, l = sorted((len(a), len(b)))  # noqa: E741  (Webber's letters)
    if s == 0:
        return float(l == 0)
    seen_a, seen_b, x = set(), set(), [0]  # x[d] is X_d
    for d in range(l):
        x.append(x[-1] + sum(document in seen_b for document in a[d : d + 1]))
        seen_a.update(a[d : d + 1])
        x[-1] += sum(document in seen_a for document in b[d : d + 1])
        seen_b.update(b[d : d + 1])
    agreement = sum(x[d] / d * p**d for d in range(1, l + 1))
    agreement += sum(x[s] * (d - s) / (s * d) * p**d for d in range(s + 1, l + 1))
    return min(1.0, (1 - p) / p * agreement + ((x[l] - x[s]) / l + x[s] / s) * p**l)


# --- Ties -----------------------------------------------------------------------------------------


def tie_averaged(scores, values):
    """`values` in descending order of `scores`, each run of equal scores replaced by its mean.

    DCG, recall and precision are linear in the values (gains; relevance 0 or 1), so the measure of
    averaged values is exactly the expectation over all orders of the ties:

        expected NDCG@k   = ndcg(tie_averaged(scores, gains), gains, k)
        expected recall@k = sum(tie_averaged(scores, relevant)[:k]) / sum(relevant)

    N scores and N values in, a list of N floats out; the order of the documents does not matter.
    """
    pairs = sorted((-float(score), float(v)) for score, v in zip(scores, values, strict=True))
    averaged = []
    while len(averaged) < len(pairs):
        tied = [value for score, value in pairs if score == pairs[len(averaged)][0]]
        averaged += [math.fsum(tied) / len(tied)] * len(tied)
    return averaged


def as_float32(scores):
    """The scores of {id: score} as float32, (N,), in the dict's order; ValueError on nan and inf.

    Finite scores beyond float32 become infinite and tie, as they do in trec_eval.
    """
    values = np.fromiter(scores.values(), dtype=np.float64, count=len(scores))
    if not np.isfinite(values).all():
        bad = next(doc for doc, score in scores.items() if not math.isfinite(score))
        raise ValueError(f"document {bad}: score {scores[bad]} is not a finite number")
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def sort_run(scores, ties="trec_eval"):
    """Document ids of {id: score}, best first: float32 score descending, then id descending.

    Ids are compared as UTF-8 bytes, which is the order of code points, Python's own. With
    ties="first-stage", equal scores keep the order of the dict.
    """
    values, ids = as_float32(scores), list(scores)
    if ties == "first-stage":
        return [ids[i] for i in np.argsort(-values, kind="stable")]
    return [doc for _, doc in sorted(zip(values.tolist(), ids, strict=True), reverse=True)]


def minmax(values):
    """Scale numbers to [0, 1]: (v - min) / (max - min); a constant list becomes zeros."""
    numbers = [float(value) for value in values]
    if not all(map(math.isfinite, numbers)):
        raise ValueError("min-max scaling needs finite numbers")
    low, high = min(numbers, default=0.0), max(numbers, default=0.0)
    return [(number - low) / (high - low) if high > low else 0.0 for number in numbers]


# --- Run and qrels files --------------------------------------------------------------------------

RUN_LINE = [  # a line of more than six words: the id takes as many of them as it can, or as few
    re.compile(rf"(\S+)\s+(\S+)\s+(\S.*{lazy})\s+([-+]?\d+)\s+([-+.\deE]+)\s+(\S.*)", re.ASCII)
    for lazy in ("", "?")
]


@contextlib.contextmanager
def numbered_lines(path):
    """Yield the lines of a UTF-8 text file, plain or gzip; ValueErrors name it and the line."""
    counter = itertools.count()  # counts the lines at the speed of C
    with open(path, "rb") as file:
        opener = gzip.open if file.read(2) == b"\x1f\x8b" else open
    with opener(path, "rt", encoding="utf-8-sig", newline="\n") as file:
        try:
            yield map(operator.itemgetter(0), zip(file, counter, strict=False))
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path}, line {next(counter)}: {error}") from None


def split_fields(line):
    """The stripped fields of a line: between tabs, or between spaces if it has no tab."""
    if "\t" in line:
        return [field.strip() for field in line.strip(" \r\n").split("\t")]
    return line.split() if line.isascii() else re.split(r"[ \r\n]+", line.strip(" \r\n"))


def read_json_table(path):
    """{query id: {document id: number}} of a JSON file; None if the file is not a JSON object."""

    def unique(pairs):  # a plain load would hide repeated ids
        if len(mapping := dict(pairs)) < len(pairs):
            repeated = collections.Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"id {repeated} appears twice")
        return mapping

    with numbered_lines(path) as lines:
        first = next((line for line in lines if line.strip()), "")
        if not first.lstrip().startswith("{"):
            return None
        table = json.loads(first + "".join(lines), object_pairs_hook=unique)
        for qid, row in table.items():
            for doc, value in row.items() if isinstance(row, dict) else [("?", row)]:
                if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
                    raise ValueError(f"query {qid}, document {doc}: {value!r} is no finite number")
    return table


def _split_run_line(line, last_tag):
    """The six fields of a line with more words; the tag of the last line settles two readings."""
    fields = [field.strip() for field in line.strip(" \r\n").split("\t", 5)]
    fields = fields if len(fields) == 6 else re.split(r"\s+", line.strip(), flags=re.ASCII)
    if len(fields) == 6:
        return fields
    readings = {match.groups() for form in RUN_LINE if (match := form.fullmatch(line.strip()))}
    if len(readings) > 1:
        readings = {reading for reading in readings if reading[5] == last_tag}
    if len(readings) != 1:
        raise ValueError(f"not six columns `qid Q0 docid rank score tag`: {line.strip()!r:.200}")
    return readings.pop()


def read_run(path):
    """Read a run {query id: {document id: score}}, in the order of the file.

    TREC lines `qid Q0 docid rank score tag`, by tabs or spaces, plain or gzip; or the dict as JSON.
    Ids and tags may hold spaces where the line stays decidable. ValueError, naming file, line and
    ids, on malformed lines, scores that are not finite, and documents listed twice.
    """
    table = read_json_table(path)
    run = {qid: {doc: float(s) for doc, s in row.items()} for qid, row in (table or {}).items()}
    last, tag = None, None
    with numbered_lines(path) as lines:
        for line in lines if table is None else ():
            fields = line.split()
            if len(fields) != 6:
                if not fields:
                    continue
                fields = _split_run_line(line, tag)
            qid, _, doc, _, score, tag = fields
            if qid != last:
                last, scores = qid, run.setdefault(qid, {})
            if doc in scores:
                raise ValueError(f"query {qid} lists document {doc} a second time")
            scores[doc] = value = float(score)
            if value - value != 0.0:  # nan, as inf - inf is (this loop runs a million times)
                raise ValueError(f"score {score} is not a finite number")
    if not run:
        raise ValueError(f"{path}: the run is empty")
    return run


def strictly_decreasing(scores):
    """float32 numbers near `scores` that decrease strictly: s_i = min(score_i, next below s_{i-1}).

    A list that decreases already is only rounded. ValueError on numbers that float32 cannot hold.
    """
    result = []
    for score in scores:
        with np.errstate(over="ignore"):
            value = np.float32(score)
        if result:
            value = min(value, np.nextafter(np.float32(result[-1]), np.float32(-np.inf)))
        if not (np.isfinite(value) and math.isfinite(score)):
            raise ValueError(f"score {score} does not fit into float32")
        result.append(float(value))
    return result


def write_run(path, rankings, tag="grouprank"):
    """Write {query id: [(document id, score), ...]}, best first, as a TREC run in this order.

    Scores are made `strictly_decreasing` and written with all digits, so that every evaluator sees
    this order. Spaces separate the columns, or tabs if an id holds a space.
    """
    names = [tag, *rankings, *(doc for ranking in rankings.values() for doc, _ in ranking)]
    if bad := [name for name in names if not name.strip() or re.search(r"[\t\r\n]", name)]:
        raise ValueError(f"{path}: {bad[0]!r} cannot be written: empty, or with a tab or newline")
    separator = "\t" if any(re.search(r"\s", name) for name in names) else " "
    with open_atomic(path) as file:
        for qid, ranking in rankings.items():
            if len(dict(ranking)) < len(ranking):
                raise ValueError(f"{path}: query {qid} ranks a document twice")
            values = strictly_decreasing(score for _, score in ranking)
            for rank, ((doc, _), value) in enumerate(zip(ranking, values, strict=True), start=1):
                file.write(separator.join((qid, "Q0", doc, str(rank), repr(value), tag)) + "\n")


def read_qrels(path):
    """Read judgements {query id: {document id: grade}}, grades as integers.

    TREC lines `qid 0 docid grade`, or BEIR's three columns with header, by tabs or spaces, plain or
    gzip; or that dict as JSON. Raises ValueError, naming the line, on anything else and on two
    different grades for one document.
    """
    table, qrels, n_columns = read_json_table(path), {}, None
    with numbered_lines(path) as lines:
        rows = ([q, doc, str(n)] for q, row in (table or {}).items() for doc, n in row.items())
        for fields in rows if table is not None else map(split_fields, lines):
            if not any(fields):
                continue
            if n_columns is None:  # the first line tells three columns from four
                n_columns = min(len(fields), 4)
                if fields[0] in ("query-id", "query_id", "q_id", "qid"):
                    continue
            doc, grade = " ".join(fields[n_columns - 2 : -1]), fields[-1]
            if n_columns < 3 or len(fields) < n_columns or not grade.lstrip("+-").isdecimal():
                raise ValueError(f"not `qid 0 docid grade` or `qid docid grade`: {fields}")
            if qrels.setdefault(fields[0], {}).setdefault(doc, int(grade)) != int(grade):
                raise ValueError(f"document {doc} of query {fields[0]} has two different grades")
    if not qrels:
        raise ValueError(f"{path}: no judgement in the file")
    return qrels


# --- Collections: BEIR folders --------------------------------------------------------------------


@dataclasses.dataclass
class Collection:
    """What a BEIR folder holds. A document's text starts with its title, where it has one."""

    corpus: dict  # {document id: text}
    queries: dict  # {query id: text}
    qrels: dict  # {query id: {document id: grade}}; empty without judgements
    excluded: dict  # {query id: {document id, ...}}: never to be retrieved for that query (BRIGHT)


def read_jsonl(path):
    """Yield the dicts of a file of JSON lines, plain or gzip; ValueError names the bad line."""
    with numbered_lines(path) as lines:
        for line in lines:
            row = json.loads(line) if line.strip() else {}
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
            if row:
                yield row


def _read_texts(path):
    """{_id: text} of corpus.jsonl or queries.jsonl, the title in front of the text."""
    texts = {}
    for number, row in enumerate(read_jsonl(path), start=1):
        where, doc, title = f"{path}, document {number}", row.get("_id"), row.get("title") or ""
        if not all(isinstance(value, str) for value in (doc, title, row.get("text"))):
            raise ValueError(f"{where}: needs the keys _id and text, both strings")
        text = "\n".join(part for part in (title.strip(), row["text"]) if part)
        if not text.strip():
            raise ValueError(f"{where}: {doc!r} has no text; fill it in or remove the line")
        if doc in texts:
            raise ValueError(f"{where}: id {doc!r} appears twice; remove one")
        texts[doc] = text
    if not texts:
        raise ValueError(f"{path} is empty")
    return texts


def read_excluded(path):
    """Read excluded.tsv (query-id, tab, corpus-id; a header is skipped): {qid: {docid, ...}}."""
    excluded = {}
    with numbered_lines(path) as lines:
        for fields in filter(any, map(split_fields, lines)):
            if len(fields) != 2:
                raise ValueError(f"not `query-id TAB corpus-id`: {fields}")
            if fields[0] != "query-id":
                excluded.setdefault(fields[0], set()).add(fields[1])
    return excluded


def read_collection(folder, queries=None, split="test"):
    """Read a BEIR folder: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv, excluded.tsv (if there).

    `queries`: the NAME of rewritten ones in queries.NAME.jsonl. A folder without qrels has none.
    ValueError, naming file, line or id, on missing files or keys, repeated ids and empty texts.
    """
    folder = Path(folder)
    corpus, excluded = folder / "corpus.jsonl", folder / "excluded.tsv"
    texts = folder / (f"queries.{queries}.jsonl" if queries else "queries.jsonl")
    judged = [folder / "qrels" / f"{split}.tsv"] if (folder / "qrels").is_dir() else []
    for needed in (corpus, texts, *judged):
        if not needed.is_file():
            files = sorted(str(file.relative_to(folder)) for file in folder.glob("**/*.[jt]s*"))
            raise ValueError(f"{needed} is missing; {folder} has {', '.join(files[:9]) or 'none'}")
    qrels = read_qrels(*judged) if judged else {}
    exclusions = read_excluded(excluded) if excluded.exists() else {}
    return Collection(_read_texts(corpus), _read_texts(texts), qrels, exclusions)


def write_lines(path, rows):
    """Write rows atomically: a dict as a line of JSON, a tuple as tab-separated values."""
    with open_atomic(path) as file:
        for row in rows:
            if isinstance(row, dict):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            elif re.search(r"[\t\r\n]", "".join(values := [str(value) for value in row])):
                raise ValueError(f"{path}: a value holds a tab or newline: {values}")
            else:
                file.write("\t".join(values) + "\n")


def write_collection(folder, corpus, queries, qrels, excluded=None, split="test"):
    """Write a BEIR folder that `read_collection` reads back; files that are there are replaced.

    corpus: {id: text} or {id: (title, text)}, or an iterator of such pairs (any size);
    queries: {id: text}; qrels: {qid: {docid: grade}}; excluded: {qid: docids}.
    """
    pairs = corpus.items() if isinstance(corpus, dict) else corpus
    titled = ((doc, ("", text) if isinstance(text, str) else text) for doc, text in pairs)
    documents = ({"_id": doc, "title": title, "text": text} for doc, (title, text) in titled)
    grades = ((qid, doc, grade) for qid, docs in qrels.items() for doc, grade in docs.items())
    write_lines(f"{folder}/corpus.jsonl", documents)
    write_lines(f"{folder}/queries.jsonl", ({"_id": q, "text": t} for q, t in queries.items()))
    write_lines(f"{folder}/qrels/{split}.tsv", [("query-id", "corpus-id", "score"), *grades])
    if excluded:
        pairs = ((qid, doc) for qid, docs in excluded.items() for doc in sorted(docs))
        write_lines(f"{folder}/excluded.tsv", [("query-id", "corpus-id"), *pairs])


# --- BM25 -----------------------------------------------------------------------------------------

WORD = re.compile(r"\w+")  # lower-cased runs of letters, digits and _, of any script; no stemming
STOP_WORDS = (  # the 33 of Lucene's EnglishAnalyzer
    "a an and are as at be but by for if in into is it no not of on or such that the their then "
    "there these they this to was will with"
)


class BM25:
    """BM25 as Lucene scores it, with exact document lengths, over texts numbered from 0.

    score(q, d) = sum over words t of q: idf(t) tf / (tf + k1 (1 - b + b |d| / mean |d|))
    idf(t) = ln(1 + (N - df + 0.5) / (df + 0.5))

    k1 0.9 and b 0.4 are Anserini's, and BRIGHT's baseline has them too (with stemming: figures
    differ a little). A word that the query repeats counts each time. The weight of a (word,
    document) pair is computed when indexing, so that a query only adds slices of it up.
    """

    def __init__(self, texts, k1=0.9, b=0.4):
        self.vocabulary = collections.defaultdict()
        self.vocabulary.default_factory = self.vocabulary.__len__  # a new word gets the next number
        n_stop = len([self.vocabulary[word] for word in STOP_WORDS.split()])
        words, counts = array("i"), []
        for text in texts:
            found = WORD.findall(text.lower())
            words.extend(map(self.vocabulary.__getitem__, found))
            counts.append(len(found))
        if not counts:
            raise ValueError("BM25 needs at least one document")
        self.vocabulary.default_factory, self.n_docs = None, len(counts)

        words = np.array(words, dtype=np.int64)  # (T,)
        docs = np.repeat(np.arange(self.n_docs), counts)[words >= n_stop]
        lengths = np.bincount(docs, minlength=self.n_docs)
        pairs = np.sort(words[words >= n_stop] * self.n_docs + docs)  # equal ones side by side
        first = np.flatnonzero(np.diff(pairs, prepend=-1))  # (P,): one posting a word and document
        tf = np.diff(first, append=len(pairs))
        words, self.docs = np.divmod(pairs[first], self.n_docs)
        df = np.bincount(words, minlength=len(self.vocabulary))
        idf = np.log1p((self.n_docs - df + 0.5) / (df + 0.5))
        norm = k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-9))
        self.weights = (idf[words] * tf / (tf + norm[self.docs])).astype(np.float32)  # (P,)
        self.starts = np.concatenate([[0], np.cumsum(df)])  # postings of word w: starts[w:w+2]

    def scores(self, query):
        """The score of every document for a query text: float32, (N,); 0 if they share no word."""
        scores = np.zeros(self.n_docs, dtype=np.float32)
        for word, count in collections.Counter(WORD.findall(query.lower())).items():
            number = self.vocabulary.get(word, 0)  # 0 is a stop word: no postings
            postings = slice(self.starts[number], self.starts[number + 1])
            scores[self.docs[postings]] += self.weights[postings] * np.float32(count)
        return scores

    def search(self, query, k):
        """The best min(k, N) documents: (numbers, scores), best first, equal scores by number.

        Documents without a shared word have score 0 and come last; k < 1 is a ValueError.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        scores, k = self.scores(query), min(k, self.n_docs)
        threshold = np.partition(scores, self.n_docs - k)[self.n_docs - k]
        best = np.flatnonzero(scores >= threshold)
        best = best[np.argsort(-scores[best], kind="stable")[:k]]
        return best, scores[best]


# --- Evaluating runs ------------------------------------------------------------------------------

MEASURES = {  # name -> f(ranked grades, ranked flags, judged grades, k, level, exponential)
    "ndcg": lambda g, f, j, k, level, exponential: ndcg(g, j, k, exponential=exponential),
    "recall": lambda g, f, j, k, level, exponential: recall(g, j, k, level=level),
    "p": lambda g, f, j, k, level, exponential: precision(g, k, level=level),
    "map": lambda g, f, j, k, level, exponential: average_precision(g, j, k, level=level),
    "mrr": lambda g, f, j, k, level, exponential: reciprocal_rank(g, k, level=level),
    "success": lambda g, f, j, k, level, exponential: success(g, k, level=level),
    "judged": lambda g, f, j, k, level, exponential: judged(f, k),
}


def parse_metric(text):
    """("ndcg", 10) of "ndcg@10"; (name, None) without cut-off; ("rbo", p) of "rbo@0.9"."""
    name, _, cut = text.lower().partition("@")
    try:
        if name == "rbo" and 0 < float(cut or 0.9) < 1:
            return name, float(cut or 0.9)
        if name in MEASURES and (not cut or int(cut) > 0):
            return name, int(cut) if cut else None
    except ValueError:
        pass
    raise ValueError(f"unknown metric {text!r}; there are {', '.join(MEASURES)} (@k) and rbo (@p)")


def rank_judged(scores, judgements, ties="trec_eval"):
    """Grades (N,) of a ranking by score, 0 if unjudged, and flags (N,), 1 if judged; two lists.

    A judged document's rank is the number of documents above it, plus its place within its tie:
    counting beats sorting, because document ids matter inside a tie only.
    """
    values, ids = as_float32(scores), None
    ascending = np.sort(values)
    grades, flags = [0] * len(values), [0] * len(values)
    found = {doc: scores[doc] for doc in judgements if doc in scores}
    own = as_float32(found)
    above = (len(values) - ascending.searchsorted(own, side="right")).tolist()
    below = ascending.searchsorted(own, side="left").tolist()
    for doc, value, rank, n_below in zip(found, own, above, below, strict=True):
        if len(values) - rank - n_below > 1:  # a tie
            ids = ids or list(scores)
            tied = [ids[i] for i in np.flatnonzero(values == value)]
            rank += (sorted(tied, reverse=True) if ties == "trec_eval" else tied).index(doc)
        grades[rank], flags[rank] = judgements[doc], 1
    return grades, flags


def evaluate_run(qrels, run, metrics=("ndcg@10",), *, relevance_level=1, complete=False,
                 ties="trec_eval", gain="linear", reference=None):  # fmt: skip
    """Each metric of each query: {metric: {query id: value in [0, 1]}}, queries as in the qrels.

    Queries that both have, or with `complete` all of the qrels, missing ones 0. ties: "trec_eval"
    or "first-stage" (order of the run's dict); gain: "linear" or "exponential"; reference: the run
    that rbo compares with. ValueError on unknown names, a level < 1, scores that are not finite.
    """
    if ties not in ("trec_eval", "first-stage") or gain not in ("linear", "exponential"):
        raise ValueError(f"unknown ties {ties!r} or gain {gain!r}")
    if relevance_level < 1:
        raise ValueError(f"the relevance level must be at least 1, got {relevance_level}")
    parsed = [(metric, *parse_metric(metric)) for metric in metrics]
    results = {metric: {} for metric in metrics}
    for qid, judgements in qrels.items():
        scores = run.get(qid)
        if not scores and not complete:
            continue
        ranked = rank_judged(scores, judgements, ties) if scores else None
        for metric, name, k in parsed:
            if not scores:
                value = 0.0
            elif name == "rbo":
                other = (reference or {}).get(qid, {})
                value = rank_biased_overlap(sort_run(scores, ties), sort_run(other, ties), k)
            else:
                rules = (k, relevance_level, gain == "exponential")
                value = MEASURES[name](*ranked, judgements.values(), *rules)
            results[metric][qid] = value
    return results


def remove_documents(run, excluded=None, identical_ids=False):
    """(run without excluded documents, their number); the given run is not changed.

    excluded: {qid: {docid, ...}} (BRIGHT); identical_ids: also those named like their query (BEIR).
    """
    kept, n_removed = {}, 0
    for qid, scores in run.items():
        unwanted = {*(excluded or {}).get(qid, ()), *([qid] if identical_ids else [])}
        kept[qid] = scores
        if unwanted:
            kept[qid] = {doc: s for doc, s in scores.items() if doc not in unwanted}
        n_removed += len(scores) - len(kept[qid])
    return kept, n_removed


def tie_report(qrels, run, k=10, *, gain="linear", complete=False):
    """What ties decide in NDCG@k: {"k", "slots", "decided", "worst", "expected", "best"}.

    slots: the first k ranks of every query that both have; decided: those whose document shares its
    score with another. NDCG@k is the mean for the worst and the best order of all ties, and the
    exact expectation over random orders (`tie_averaged`); `complete` as in `evaluate_run`.
    """
    queries = [qid for qid in qrels if run.get(qid)]
    n_queries = len(qrels) if complete else len(queries)
    report = {"k": k, "slots": 0, "decided": 0, "worst": 0.0, "expected": 0.0, "best": 0.0}
    for qid in queries:
        gains = {doc: float(max(grade, 0)) for doc, grade in qrels[qid].items()}
        if gain == "exponential":
            gains = {doc: 2.0**value - 1.0 for doc, value in gains.items()}
        values, ids = as_float32(run[qid]), list(run[qid])
        last = np.partition(values, -min(k, len(ids)))[-min(k, len(ids))]  # lower ones stay out
        top = [(float(values[i]), gains.get(ids[i], 0.0)) for i in np.flatnonzero(values >= last)]
        scores, own = zip(*sorted(top, reverse=True), strict=True)
        shared = collections.Counter(scores)
        report["slots"] += len(scores[:k])
        report["decided"] += sum(shared[score] > 1 for score in scores[:k])
        best = worst = expected = ndcg(own, gains.values(), k)
        if len(shared) < len(scores):
            upwards = sorted(top, key=lambda pair: (-pair[0], pair[1]))
            worst = ndcg([g for _, g in upwards], gains.values(), k)
            expected = ndcg(tie_averaged(scores, own), gains.values(), k)
        for order, value in (("worst", worst), ("expected", expected), ("best", best)):
            report[order] += value / n_queries
    return report


# --- Comparing runs -------------------------------------------------------------------------------


def mean(values):
    """The mean of a dict's values; 0.0 for an empty one."""
    return math.fsum(values.values()) / max(len(values), 1)


def t_test_p(t, dof):
    """Two-sided p-value of Student's t with dof >= 1 degrees of freedom, to about 1e-15.

    1 - A(t|dof), with the finite sums of Abramowitz and Stegun, 26.7.3 (odd) and 26.7.4 (even).
    """
    theta, odd = math.atan(abs(t) / math.sqrt(dof)), dof % 2
    term, total = math.cos(theta) if odd else 1.0, 0.0
    for i in range(odd + 2, dof + 1, 2):
        total += term
        term *= math.cos(theta) ** 2 * (i - 1) / i
    area = math.sin(theta) * total
    return max(0.0, 1.0 - (2 / math.pi * (theta + area) if odd else area))


def compare_runs(values_a, values_b, *, seed=0, samples=10_000):
    """Paired comparison b - a of {query id: value}, over the queries that both have.

    {"queries", "difference", "wins", "ties", "losses", "p_randomisation", "p_t", "interval"}: the
    two-sided tests of a mean difference of 0 (random signs; Student's t), and the bootstrap
    percentile interval of 95 % over queries. All equal: both p are 1. One query: p_t is 1.
    """
    d = np.array([values_b[qid] - values_a[qid] for qid in values_a if qid in values_b])  # (n,)
    if (n := len(d)) == 0:
        raise ValueError("the runs have no query in common")
    rng, at_least, means = np.random.default_rng(seed), 1, []  # the observed signs count as one
    for _ in range(samples // 1000):  # in blocks, for memory
        flipped = rng.choice([-1.0, 1.0], (1000, n)) @ d / n
        at_least += int((np.abs(flipped) >= abs(d.mean()) - 1e-12).sum())
        means.append(d[rng.integers(0, n, (1000, n))].mean(axis=1))
    error = d.std(ddof=1) / math.sqrt(n) if n > 1 else 0.0
    t = d.mean() / error if error > 0 else math.inf * d.mean() if n > 1 and d.any() else 0.0
    low, high = np.percentile(means, [2.5, 97.5])
    wins, losses = int((d > 1e-12).sum()), int((d < -1e-12).sum())
    return {"queries": n, "difference": float(d.mean()), "wins": wins, "ties": n - wins - losses,
            "losses": losses, "p_randomisation": at_least / (samples // 1000 * 1000 + 1),
            "p_t": t_test_p(t, max(n - 1, 1)), "interval": [float(low), float(high)]}  # fmt: skip


# --- The paper's benchmarks -----------------------------------------------------------------------
# Rows as the data sets' cards and loaders count them, and the NDCG@10 that the paper (v3) publishes
# for reranking the top 100 of the retriever (DIVER-Retriever-4B). BM25: with GPT-4's rewritten
# queries on BRIGHT (Table 14), with the original ones on R2MED. For BEIR only means are published.

BENCHMARKS = """
set task queries documents long BM25 retriever ERank-32B ReasonRank-32B GroupRank-7B GroupRank-32B
bright biology 103 57359 524 53.6 52.5 55.9 53.9 52.7 59.0
bright earth_science 116 121249 601 54.1 53.6 55.1 47.6 51.0 57.5
bright economics 103 50220 516 24.3 33.8 35.2 36.3 33.8 39.2
bright psychology 101 52835 512 38.7 45.2 44.6 52.6 44.5 50.0
bright robotics 101 61961 508 18.9 28.4 34.1 36.5 32.1 39.1
bright stackoverflow 117 107081 1858 27.7 30.4 34.5 34.2 33.9 39.0
bright sustainable_living 108 60792 554 26.3 35.0 41.2 44.5 38.1 42.7
bright leetcode 142 413932 - 19.3 13.0 14.1 15.2 16.3 14.3
bright pony 112 7894 577 17.6 14.7 24.4 14.8 17.3 14.9
bright aops 111 188002 - 3.9 9.8 12.2 5.5 8.7 12.6
bright theoremqa_questions 194 188002 - 19.2 42.5 36.7 40.6 40.7 39.0
bright theoremqa_theorems 76 23839 - 20.8 36.3 45.9 45.3 42.4 48.8
r2med Biology 103 57359 - 19.19 49.3 - - 56.7 59.5
r2med Bioinformatics 77 47473 - 21.55 60.4 - - 65.4 69.7
r2med Medical-Sciences 88 34810 - 19.68 57.9 - - 64.2 66.3
r2med MedXpertQA-Exam 97 61379 - 0.66 18.6 - - 27.3 28.8
r2med MedQA-Diag 118 56250 - 2.55 22.6 - - 30.5 41.5
r2med PMC-Treatment 150 28954 - 23.69 58.7 - - 64.6 67.6
r2med PMC-Clinical 114 60406 - 21.66 44.1 - - 43.2 52.2
r2med IIYi-Clinical 129 10449 - 12.02 31.8 - - 30.9 32.7
beir arguana 1406 8674 - - - - - - -
beir dbpedia-entity 400 4635922 - - - - - - -
beir nfcorpus 323 3633 - - - - - - -
beir nq 3452 2681468 - - - - - - -
beir scidocs 1000 25657 - - - - - - -
beir mean - - - - 52.9 - - 46.5 55.1
"""


def benchmark_table(benchmark):
    """{task: {column: number or None}} of one benchmark in BENCHMARKS."""
    header, *lines = (line.split() for line in BENCHMARKS.strip().splitlines())
    rows = {line[1]: line[2:] for line in lines if line[0] == benchmark}
    number = {"-": None}
    return {task: {c: number.get(v, v) and float(v) for c, v in zip(header[2:], row, strict=True)}
            for task, row in rows.items()}  # fmt: skip


@contextlib.contextmanager
def fields_named(name):
    """Turn the KeyError of a row without an expected field into a ValueError that says so."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{name}: a row of the data set lacks the field {error}") from None


def optional(module):
    """Import a package that only this command needs; without it, an error names the pip command."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise ImportError(f"this needs the package {package}: pip install {package}") from None


def _fetch(repo, patterns, source):
    """The folder with a data set's files: `source`, or what huggingface_hub downloads."""
    if source is not None:
        if not Path(source).is_dir():
            raise ValueError(f"--source {source} is not a folder")
        return Path(source)
    hub = optional("huggingface_hub")
    try:
        return Path(hub.snapshot_download(repo, repo_type="dataset", allow_patterns=patterns))
    except OSError as error:
        raise ValueError(f"cannot download {repo}; without network, clone https://huggingface.co/"
                         f"datasets/{repo} elsewhere and pass --source FOLDER. ({error})") from None


def read_rows(folder, stem):
    """Yield the rows (dicts) of a table STEM: JSON lines or parquet, one or many files."""
    forms = ("{}.jsonl", "{}.jsonl.gz", "{}.parquet", "{}-*.parquet", "{}/*.jsonl*", "{}/*.parquet")
    names = [form.format(stem) for form in forms]
    files = next(filter(None, (sorted(folder.glob(name)) for name in names)), None)
    if not files:
        raise ValueError(f"{folder} has none of {', '.join(names)}")
    for file in files:
        if file.suffix == ".parquet":
            for batch in optional("pyarrow.parquet").ParquetFile(file).iter_batches():
                yield from batch.to_pylist()
        else:
            yield from read_jsonl(file)


def _load_bright(task, source, long_documents, split):
    """xlangai/BRIGHT: every gold id has grade 1; *_reason hold the rewritten queries."""
    kind = "long_documents" if long_documents else "documents"
    gold = "gold_ids_long" if long_documents else "gold_ids"
    parts = [f"{part}/{task}-*" for part in (kind, "examples", "*_reason")]
    folder = _fetch("xlangai/BRIGHT", parts, source)
    examples = list(read_rows(folder, f"examples/{task}"))
    queries = {row["id"]: row["query"] for row in examples}
    qrels = {row["id"]: {doc: 1 for doc in row[gold] if doc != "N/A"} for row in examples}
    excluded = {row["id"]: {*row["excluded_ids"]} - {"N/A"} for row in examples}
    rewritten = {
        part.name: {row["id"]: row["query"] for row in read_rows(folder, f"{part.name}/{task}")}
        for part in sorted(folder.glob("*_reason"))
    }
    documents = ((row["id"], "", row["content"]) for row in read_rows(folder, f"{kind}/{task}"))
    return documents, queries, qrels, excluded, rewritten


def _load_r2med(task, source, long_documents, split):
    """R2MED/TASK: corpus and query {id, text}, qrels {q_id, p_id, score} (older: qrels.txt)."""
    folder, qrels = _fetch(f"R2MED/{task}", None, source), {}
    queries = {row["id"]: row["text"] for row in read_rows(folder, "query")}
    if (folder / "qrels.txt").exists():
        qrels = read_qrels(folder / "qrels.txt")
    else:
        for row in read_rows(folder, "qrels"):
            qrels.setdefault(row["q_id"], {})[row["p_id"]] = int(row["score"])
    return ((r["id"], "", r["text"]) for r in read_rows(folder, "corpus")), queries, qrels, {}, {}


def _load_beir(task, source, long_documents, split):
    """BeIR/NAME with BeIR/NAME-qrels, or a BEIR folder; only the judged queries are kept."""
    folder = _fetch(f"BeIR/{task}", None, source)
    judged_in = folder if source else _fetch(f"BeIR/{task}-qrels", [f"{split}.tsv"], None)
    apart = judged_in / f"{split}.tsv"
    qrels = read_qrels(apart if apart.exists() else judged_in / "qrels" / f"{split}.tsv")
    rows = read_rows(folder, "queries")
    queries = {row["_id"]: row["text"] for row in rows if row["_id"] in qrels}
    rows = read_rows(folder, "corpus")
    return ((r["_id"], r.get("title") or "", r["text"]) for r in rows), queries, qrels, {}, {}


def prepare(name, out, *, source=None, long_documents=False, split="test", check=True):
    """Make the BEIR folder `out` of a benchmark: bright/TASK, r2med/TASK or beir/NAME.

    From the Hugging Face hub, or from `source`, a local clone of the data set. Empty and repeated
    documents are left out and counted. ValueError if judged documents are missing or row counts
    differ from BENCHMARKS (unless `check` is off). Returns a line that says what was written.
    """
    benchmark, _, task = name.partition("/")
    known = benchmark_table(benchmark)
    if not task or not known or (benchmark != "beir" and task not in known):
        raise ValueError(f"unknown benchmark {name!r}: bright/TASK, r2med/TASK or beir/NAME; "
                         f"{benchmark} has the tasks: {', '.join(known) or 'none'}")  # fmt: skip
    load = {"bright": _load_bright, "r2med": _load_r2med, "beir": _load_beir}[benchmark]
    with fields_named(name):
        rows, queries, qrels, excluded, rewritten = load(task, source, long_documents, split)
    expected = known.get(task, {}) if check and split == "test" else {}
    n_documents = expected.get("long" if long_documents else "documents")
    sizes = [("queries", len(queries), expected.get("queries"))]
    seen, counts = set(), collections.Counter()

    def documents():
        for doc, title, text in tqdm(rows, desc=name, unit=" documents", disable=None):
            kind = "repeated" if doc in seen else "kept" if f"{title}{text}".strip() else "empty"
            counts[kind] += 1
            seen.add(doc)
            if kind == "kept":
                yield doc, (title, text)
        n_seen, judged = sum(counts.values()), {d for docs in qrels.values() for d in docs}
        faults, missing = [], judged - seen
        counts["missing"] = len(missing)
        if len(missing) > 0.01 * len(judged):  # BEIR's arguana lacks 5 of its 1,406
            faults = [f"{len(missing)} judged documents are missing: {min(missing)}"]
        for what, n, known_n in (*sizes, ("documents", n_seen, n_documents)):
            faults += [f"{n} {what}, not {known_n:.0f}"] if known_n not in (None, n) else []
        if faults and check:
            raise ValueError(f"{name}: {'; '.join(faults)} (another version? see --skip-checks)")

    with fields_named(name):
        write_collection(out, documents(), queries, qrels, excluded, split)
    for kind, texts in rewritten.items():
        lines = ({"_id": qid, "text": text} for qid, text in texts.items())
        write_lines(f"{out}/queries.{kind}.jsonl", lines)
    return (f"{out}: {counts['kept']} documents ({counts['empty']} empty and {counts['repeated']} "
            f"repeated ones left out; {counts['missing']} judged ones absent), {len(queries)} "
            f"queries, {sum(map(len, qrels.values()))} judgements, "
            f"{sum(map(len, excluded.values()))} exclusions, rewritten queries: "
            f"{', '.join(rewritten) or 'none'}")  # fmt: skip


# --- Pictures -------------------------------------------------------------------------------------

CURVES = {  # panel -> keys of metrics.jsonl; what is not there is not drawn
    "reward": ("reward", "reward/ndcg", "reward/recall", "reward/alignment"),
    "held-out NDCG@10": ("eval/ndcg@10",),
    "share of answers or prompts": ("format_ok", "truncated", "zero_spread"),
    "KL to the reference (nats/token)": ("kl",),
    "entropy (nats/token)": ("entropy",),
    "answer length (tokens)": ("completion_tokens",),
    "loss": ("loss",),
    "gradient norm": ("grad_norm",),
}


def _plot_training(figure, rows):
    """A panel per entry of CURVES: all values, thin, and their running mean over 5 % of a stage."""
    stages = [[r for r in rows if (r.get("stage") == "grpo") == grpo] for grpo in (False, True)]
    n_sft = max((row["step"] for row in stages[0]), default=0)
    panels = {t: [k for k in keys if any(k in row for row in rows)] for t, keys in CURVES.items()}
    panels = {title: keys for title, keys in panels.items() if keys}
    if not panels:
        raise KeyError(", ".join(key for keys in CURVES.values() for key in keys))
    n_rows = math.ceil(len(panels) / 2)
    figure.set_size_inches(6.4, 1.9 * n_rows)
    axes = figure.subplots(n_rows, 2, squeeze=False).ravel()
    for axis, (title, keys) in zip(axes, panels.items(), strict=False):
        curves = itertools.product(enumerate(keys), zip((0, n_sft), stages, strict=True))
        for (number, key), (start, stage) in curves:
            if points := [(start + row["step"], row[key]) for row in stage if key in row]:
                x, y = np.array(points, dtype=float).T
                width = max(1, len(y) // 20)
                smooth = np.convolve(y, np.ones(width) / width, mode="valid")
                axis.plot(x, y, color=f"C{number}", alpha=0.25, linewidth=0.8)
                dots = {"marker": "."} if len(y) < 30 else {}
                centred = x[width // 2 :][: len(smooth)]
                axis.plot(centred, smooth, color=f"C{number}", label=key, **dots)
        if all(stages):
            axis.axvline(n_sft, color="gray", linestyle=":", linewidth=1)
        axis.set(title=title, xlabel="step (SFT, then GRPO)" if all(stages) else "step")
        if len(keys) > 1:
            axis.legend(ncols=2, loc="lower right", fontsize=6)
    for axis in axes[len(panels) :]:
        axis.remove()


def _plot_sweep(figure, rows):
    """NDCG@10 by group size (the paper's Fig. 3) and by rounds (its Fig. 5)."""
    figure.set_size_inches(6.4, 2.8)
    names = {"docs_per_group": "documents per group", "rounds": "rounds"}
    for axis, x, other in zip(figure.subplots(1, 2), names, reversed(names), strict=True):
        for value in sorted({row[other] for row in rows}):
            line = sorted((row[x], 100 * row["ndcg@10"]) for row in rows if row[other] == value)
            axis.plot(*zip(*line, strict=True), marker="o", markersize=3, label=value)
        axis.set(xlabel=names[x], ylabel="NDCG@10 (0-100)", xticks=sorted({row[x] for row in rows}))
        axis.legend(title=names[other], title_fontsize=7, ncols=2)


def _plot_pair(figure, rows):
    """Per-query differences of the first two runs in a --per-query file, for its first measure."""
    metric, values = rows[1][1], {}
    for run, name, qid, value in rows[1:]:
        if name == metric:
            values.setdefault(run, {})[qid] = float(value)
    (a, first), (b, second) = list(values.items())[:2]
    differences = sorted((100 * (second[q] - first[q]) for q in first if q in second), reverse=True)
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    figure.set_size_inches(6.4, 2.8)
    axis = figure.subplots()
    axis.bar(range(1, len(differences) + 1), differences, width=1.0)
    axis.axhline(np.mean(differences), color="black", linestyle=":", label="mean difference")
    axis.set(xlabel="queries, sorted", ylabel=f"{metric}, difference in points")
    axis.set_title(f"{b} - {a}: {wins} better, {losses} worse, {len(differences)} queries")
    axis.legend()


def plot(path, out):
    """Draw metrics.jsonl (training), sweep.jsonl or a --per-query file (.tsv) into a picture file.

    The suffix of `out` is its format. ValueError if there is nothing to draw.
    """
    optional("matplotlib")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if Path(path).suffix == ".tsv":
        with numbered_lines(path) as lines:
            draw, rows = _plot_pair, list(map(split_fields, lines))
    else:
        rows = list(read_jsonl(path))
        draw = _plot_sweep if "docs_per_group" in (rows or [{}])[0] else _plot_training
    style = {"font.size": 9, "axes.titlesize": 9, "axes.grid": True, "grid.alpha": 0.3}
    style |= {"legend.fontsize": 7, "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style), open_atomic(out, "wb") as file:
        figure = Figure(layout="constrained")
        try:
            draw(figure, rows)
        except (KeyError, IndexError) as error:
            raise ValueError(f"{path} has nothing to draw or lacks a field ({error})") from None
        figure.savefig(file, format=Path(out).suffix[1:] or "png", dpi=150)


# --- Tables ---------------------------------------------------------------------------------------


def table(rows, markdown=False):
    """Rows of strings (the first is the header) as aligned text or as a Markdown table."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    if markdown:
        return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])
    return "\n".join("  ".join(line) for line in lines)


def published(benchmark, tasks):
    """The paper's rows {system: {task: NDCG@10}}, with their "mean" if it has all the tasks."""
    known = benchmark_table(benchmark)
    if unknown := [task for task in tasks if task not in known]:
        raise ValueError(f"--paper {benchmark} has no task {unknown[0]!r}; name the BEIR folder or "
                         f"the qrels file after one of: {', '.join(known)}")  # fmt: skip
    rows = {}
    for system in list(next(iter(known.values())))[3:]:
        row = {task: known[task][system] for task in tasks}
        whole = None not in row.values()
        rows[system] = {"mean": sum(row.values()) / len(row) if whole else None, **row}
        if set(tasks) == known.keys() - {"mean"} and not whole:
            rows[system]["mean"] = known.get("mean", {}).get(system)
    return {system: row for system, row in rows.items() if any(row.values())}


def task_name(qrels_path):
    """biology of bright/biology/qrels/test.tsv, and of biology.qrels."""
    path = Path(qrels_path)
    return path.parent.parent.name if path.parent.name == "qrels" else path.name.partition(".")[0]


def run_names(paths):
    """Short names of run files: the file name without suffixes, or whole paths where equal."""
    suffixes = r"(\.run|\.trec|\.txt|\.tsv|\.json|\.gz)+$"
    short = [re.sub(suffixes, "", Path(path).name) for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


def evaluate_files(args, qrels_path, run_paths, names):
    """All numbers for one qrels file and its runs, as a dict that is the --json output."""
    qrels = read_qrels(qrels_path)
    excluded = Path(args.excluded or Path(qrels_path).absolute().parent.parent / "excluded.tsv")
    excluded = read_excluded(excluded) if args.excluded or excluded.exists() else {}
    rules = {"ties": args.ties, "gain": args.gain, "complete": args.complete,
             "relevance_level": args.relevance_level}  # fmt: skip
    cut_offs = [k for name, k in map(parse_metric, args.metrics) if name == "ndcg" and k]
    report = {"qrels": str(qrels_path), "queries": len(qrels),
              "judgements": sum(map(len, qrels.values())),
              "rules": {**rules, "ignore_identical_ids": args.ignore_identical_ids}, "runs": {},
              "coverage": {}, "ties": {}, "comparisons": [], "per_query": {}}  # fmt: skip
    reference = None
    for name, path in zip(names, run_paths, strict=True):
        run, n_removed = remove_documents(read_run(path), excluded, args.ignore_identical_ids)
        if not run.keys() & qrels.keys():
            raise ValueError(f"{path} and {qrels_path} share no query: the run has {min(run)!r}, "
                             f"the qrels {min(qrels)!r}")  # fmt: skip
        reference = reference or run
        values = evaluate_run(qrels, run, args.metrics, reference=reference, **rules)
        report["per_query"][name] = values
        report["runs"][name] = {metric: mean(of) for metric, of in values.items()}
        report["coverage"][name] = {
            "scored": len(run.keys() & qrels.keys()),
            "missing": len(qrels.keys() - run.keys()),
            "unjudged": len(run.keys() - qrels.keys()),
            "removed_documents": n_removed,
        }
        report["ties"][name] = tie_report(qrels, run, (cut_offs or [10])[0],
                                            gain=args.gain, complete=args.complete)  # fmt: skip
    for name, metric in itertools.product(names[1:], args.metrics):
        if parse_metric(metric)[0] not in ("rbo", "judged"):
            a, b = (report["per_query"][run][metric] for run in (names[0], name))
            tests = compare_runs(a, b, seed=args.seed)
            report["comparisons"].append({"a": names[0], "b": name, "metric": metric, **tests})
    return report


def describe(report):
    """The lines below a table: what was compared how, what is missing, ties, paired tests."""
    rules = report["rules"]
    ties = "document id, descending" if rules["ties"] == "trec_eval" else "first-stage order"
    over = "all judged queries (--complete)" if rules["complete"] else "queries in both"
    alike = "; documents named like their query ignored" if rules["ignore_identical_ids"] else ""
    yield (f"qrels    {report['qrels']}: {report['queries']} queries, "
           f"{report['judgements']} judgements")  # fmt: skip
    yield (f"rules    ties by {ties}; {rules['gain']} gain; relevant from grade "
           f"{rules['relevance_level']}; mean over {over}{alike}")  # fmt: skip
    for name, n in report["coverage"].items():
        dropped = n["removed_documents"]
        yield (f"queries  {name}: {n['scored']} scored, {n['missing']} judged ones missing in the "
               f"run, {n['unjudged']} of the run without judgements"
               + (f"; {dropped} excluded documents removed" if dropped else ""))  # fmt: skip
    for name, n in report["ties"].items():
        worst, expected, best = (100 * n[order] for order in ("worst", "expected", "best"))
        yield (f"ties     {name}: {n['decided']} of {n['slots']} top-{n['k']} slots decided by a "
               f"tie-break; over all tie-breaks ndcg@{n['k']} is {worst:.2f} to {best:.2f}, "
               f"expected {expected:.2f}")  # fmt: skip
    for c in report["comparisons"]:
        low, high = (100 * limit for limit in c["interval"])
        yield (f"paired   {c['b']} - {c['a']}, {c['metric']}: {100 * c['difference']:+.2f} "
               f"[{low:+.2f}, {high:+.2f}]; {c['wins']} wins, {c['ties']} ties, {c['losses']} "
               f"losses; p = {c['p_randomisation']:.4f} (randomisation), "
               f"{c['p_t']:.4f} (t-test)")  # fmt: skip


def print_reports(args, reports, names):
    """Print one report, or several and their means over tasks, in the form that was asked for."""
    if args.paper and args.metrics[0] != "ndcg@10":
        raise ValueError("the paper's figures are NDCG@10: name ndcg@10 first in --metrics")
    paper = published(args.paper, list(reports)) if args.paper else {}
    values = {name: [r["runs"][name] for r in reports.values()] for name in names}
    runs = {n: {m: sum(v[m] for v in of) / len(of) for m in of[0]} for n, of in values.items()}
    if args.json:
        output = {"runs": runs, "tasks": reports}
        output = output if len(reports) > 1 else next(iter(reports.values()))
        print(json.dumps({**output, "published": paper} if paper else output, indent=1))
        return
    number = lambda x, unit=1: "-" if x is None else f"{unit * x:.2f}"  # noqa: E731
    rows = [[n, *(number(x, 100) for x in runs[n].values())] for n in names]
    print(table([["run", *args.metrics], *rows], args.markdown))
    if first := args.metrics[0] * (len(reports) > 1 or bool(paper)):
        rows = [[n, *(number(of[first], 100) for of in (runs[n], *values[n]))] for n in names]
        rows += [[f"{n} (published)", *map(number, row.values())] for n, row in paper.items()]
        print("\n" + table([[first, "mean", *reports], *rows], args.markdown))
    for report in reports.values():
        print("", *describe(report), sep="\n- " if args.markdown else "\n")


# --- Command line ---------------------------------------------------------------------------------


OPTIONS = {  # group -> option, its help, and what else argparse needs to know
    "evaluate runs": [
        ("--qrels", "judgements: TREC, BEIR, JSON; of several tasks if --run holds {task}",
         {"nargs": "+"}),
        ("--run", "runs: TREC or JSON; the others are compared with the first",
         {"nargs": "+", "action": "extend"}),
        ("--metrics", "ndcg recall p map mrr success judged (@k); rbo (@p) with the first run",
         {"nargs": "+", "default": ["ndcg@10", "recall@100", "map", "mrr@10"]}),
        ("--complete", "mean over all judged queries, missing ones 0", {}),
        ("--ties", "equal scores by document id, or in the order of the run's lines",
         {"choices": ["trec_eval", "first-stage"], "default": "trec_eval"}),
        ("--gain", "of NDCG", {"choices": ["linear", "exponential"], "default": "linear"}),
        ("--relevance-level", "relevant from this grade on", {"type": int, "default": 1}),
        ("--ignore-identical-ids", "drop documents named like their query, as BEIR does", {}),
        ("--excluded", "documents to drop (default: excluded.tsv beside the qrels folder)",
         {"nargs": None}),
    ],
    "output": [
        ("--json", "print everything as JSON, fractions 0-1", {}),
        ("--markdown", "print a Markdown table", {}),
        ("--paper", "add the paper's NDCG@10", {"choices": ["bright", "r2med", "beir"]}),
        ("--per-query", "also write a .tsv of run, metric, query, value", {"nargs": None}),
        ("--out", "of --prepare (a folder) or --plot (a picture)", {"nargs": None}),
        ("--overwrite", "replace outputs that exist", {}),
        ("--seed", "of the randomisation test and the bootstrap", {"type": int, "default": 0}),
    ],
    "prepare a benchmark as a BEIR folder": [
        ("--prepare", "bright/TASK, r2med/TASK (TASK may be all) or beir/NAME", {"nargs": None}),
        ("--source", "folder of a local clone, instead of the Hugging Face hub", {"nargs": None}),
        ("--long-documents", "BRIGHT's long documents", {}),
        ("--split", "of BEIR's judgements", {"default": "test"}),
        ("--skip-checks", "accept other row counts and missing judged documents", {}),
    ],
    "draw a picture": [
        ("--plot", "metrics.jsonl, sweep.jsonl or a --per-query file", {"nargs": None}),
    ],
}  # fmt: skip


def build_parser():
    """The parser of OPTIONS; an option without further words is a flag."""
    usage = "\n".join(line for line in __doc__.splitlines() if "python evaluate.py" in line)
    words = {"description": __doc__.splitlines()[0], "epilog": usage}
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(**words, formatter_class=form)
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, text, words in options:
            group.add_argument(name, help=text, **words or {"action": "store_true"})
    return parser


def main():
    """Parse the command line and run one of the three commands."""
    parser = build_parser()
    args = parser.parse_args()
    if args.prepare:
        benchmark, _, wanted = args.prepare.partition("/")
        every = [known for known in benchmark_table(benchmark) if known != "mean"]
        for task in every if (several := wanted == "all") else [wanted]:
            out = Path(args.out or f"data/{benchmark}") / (task if several or not args.out else "")
            source = args.source
            if several and source and benchmark != "bright":  # one repository a task
                source = Path(source) / task
            refuse_overwrite(out, args.overwrite)
            print(f"{benchmark}/{task}: {source or 'the Hugging Face hub'} -> {out}", flush=True)
            choices = {"long_documents": args.long_documents, "check": not args.skip_checks}
            print(prepare(f"{benchmark}/{task}", out, source=source, split=args.split, **choices))
    elif args.plot:
        out = args.out or str(Path(args.plot).with_suffix(".png"))
        refuse_overwrite(out, args.overwrite)
        plot(args.plot, out)
        print(f"drew {out}")
    elif args.qrels and args.run:
        names, reports = run_names(args.run), {}
        if args.per_query:
            refuse_overwrite(args.per_query, args.overwrite)
        for qrels in args.qrels:
            task = task_name(qrels)
            paths = [path.replace("{task}", task) for path in args.run]
            reports[task] = evaluate_files(args, qrels, paths, names)
        values = [report.pop("per_query") for report in reports.values()]
        if args.per_query:
            rows = ((run, metric, qid, repr(x)) for report in values for run, of in report.items()
                    for metric, by_query in of.items() for qid, x in by_query.items())  # fmt: skip
            write_lines(args.per_query, [("run", "metric", "query-id", "value"), *rows])
        print_reports(args, reports, names)
    else:
        parser.error("nothing to do: give --qrels and --run, --prepare or --plot")


if __name__ == "__main__":
    run_cli(main)
