"""Evaluation for reranking: exact measures, run files, a BM25 baseline, the paper's benchmarks.

Needs numpy and tqdm only. For GroupRank (arXiv 2511.11653v3) and for any other ranking.

    python evaluate.py --qrels qrels.tsv --run a.run b.run             # table, ties, paired tests
    python evaluate.py --qrels qrels.tsv --run a.run --metrics ndcg@10 recall@100 map mrr@10 p@5
    python evaluate.py --prepare bright/biology --out data/biology     # a benchmark as BEIR folder
    python evaluate.py --qrels data/biology/qrels/test.tsv --run a.run --paper bright
    python evaluate.py --plot runs/demo/metrics.jsonl --out curves.png

Sections: errors and outputs - measures and ties - files - BM25 - evaluating and comparing runs -
the paper's benchmarks - pictures - command line.

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
import array
import codecs
import collections.abc
import contextlib
import dataclasses
import gzip
import hashlib
import itertools
import json
import math
import operator
import os
import re
import sys
import tempfile
import weakref
import zlib
from pathlib import Path

import numpy as np

# --- Errors and outputs ---------------------------------------------------------------------------


def run_cli(main):
    """Run `main()`; a user's mistake becomes one line `error: ...` and exit status 2, no traceback.

    Mistakes are ValueError, OSError and the ImportError of an optional package.
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
        message = str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:
            message = f"{error.filename}: {error.strerror}"
        elif isinstance(error, ModuleNotFoundError) and error.name:
            message = f"{error}: pip install {error.name.partition('.')[0]}"
        print("error: " + " ".join(message.split()), file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def name_in_errors(path):
    """Let errors of a write say where: a full disk's have no file name of their own."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def open_atomic(path, mode="w"):
    """Open a file (text: UTF-8) that appears under its name when it is complete, or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with name_in_errors(path), open(temporary, mode, **text) as file:
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


# --- Measures and ties ----------------------------------------------------------------------------
# One formula each; every function works when pasted alone (import numpy as np, math).
# ranked_grades: grades in the order of the ranking, unjudged documents 0; lists, arrays or tensors.
# judged_grades: all judged grades of the query, in any order. k=None: the whole list.


def ndcg(ranked_grades, judged_grades, k=10, *, exponential=False):
    """Normalised discounted cumulative gain, in [0, 1]; 0.0 if no document is relevant.

    NDCG@k = DCG@k / ideal DCG@k,  DCG@k = sum_{i=1..k} gain_i / log2(i + 1)

    gain = max(grade, 0), or 2^max(grade, 0) - 1 if `exponential`; ideal: `judged_grades`, sorted.
    """

    def dcg(grades):
        gains = [max(grade, 0.0) for grade in grades[:k]]
        gains = [2.0**gain - 1.0 for gain in gains] if exponential else gains
        return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))

    ideal = dcg(sorted((float(grade) for grade in judged_grades), reverse=True))
    return dcg([float(grade) for grade in ranked_grades[:k]]) / ideal if ideal > 0 else 0.0


def recall(ranked_grades, judged_grades, k=None, *, level=1):
    """recall@k = relevant among the first k / all relevant (grade >= level); none relevant: 0.0."""
    found = len([grade for grade in ranked_grades[:k] if grade >= level])
    return found / max(len([grade for grade in judged_grades if grade >= level]), 1)


def precision(ranked_grades, k=None, *, level=1):
    """P@k = relevant (grade >= level) among the first k / k, however few are retrieved."""
    found = len([grade for grade in ranked_grades[:k] if grade >= level])
    return found / (k or max(len(ranked_grades), 1))


def average_precision(ranked_grades, judged_grades, k=None, *, level=1):
    """AP@k = sum of P@i over the relevant ranks i <= k / all relevant; none relevant: 0.0."""
    relevant = len([grade for grade in judged_grades if grade >= level])
    hits = [rank for rank, grade in enumerate(ranked_grades[:k], start=1) if grade >= level]
    return sum(n / rank for n, rank in enumerate(hits, start=1)) / max(relevant, 1)


def reciprocal_rank(ranked_grades, k=None, *, level=1):
    """RR@k = 1 / rank of the first document with grade >= level; none in the first k: 0.0."""
    hits = (rank for rank, grade in enumerate(ranked_grades[:k], 1) if grade >= level)
    return 1.0 / next(hits, math.inf)


def rank_biased_overlap(ranking_a, ranking_b, p=0.9):
    """Rank-biased overlap of two finite rankings, extrapolated: RBO_ext (Webber et al., Eq. 32).

    (1-p)/p (sum_{d<=l} X_d/d p^d + sum_{s<d<=l} X_s (d-s)/(s d) p^d) + ((X_l - X_s)/l + X_s/s) p^l

    X_d: documents that both have in their first d; s <= l: the two lengths. In [0, 1]: 1 for equal
    lists (also two empty ones), 0 for disjoint ones; never 0 for two orders of the same documents.
    """
    rank_a = {document: rank for rank, document in enumerate(ranking_a, start=1)}
    rank_b = {document: rank for rank, document in enumerate(ranking_b, start=1)}
    if not 0.0 < p < 1.0 or len(rank_a) < len(ranking_a) or len(rank_b) < len(ranking_b):
        raise ValueError(f"rank-biased overlap needs 0 < p < 1 (got {p}) and no repeated document")
    s, l = sorted((len(rank_a), len(rank_b)))  # noqa: E741  (Webber's letters)
    if s == 0:
        return float(l == 0)
    both_from = [max(rank_a[doc], rank_b[doc]) for doc in rank_a.keys() & rank_b.keys()]
    x = np.cumsum(np.bincount(np.array(both_from, dtype=int), minlength=l + 1))  # (l + 1,): X_d
    d = np.arange(1, l + 1)
    agreement = (x[1:] / d + x[s] * np.maximum(d - s, 0) / (s * d)) @ p**d
    value = (1 - p) / p * agreement + ((x[l] - x[s]) / l + x[s] / s) * p**l
    return min(1.0, float(value))


def tie_averaged(scores, values):
    """`values` in descending order of `scores`, each run of equal scores replaced by its mean.

    DCG, recall and precision are linear in the values (gains; relevance 0 or 1), so the measure of
    averaged values is exactly the expectation over all orders of the ties, for example

        expected NDCG@k = ndcg(tie_averaged(scores, gains), gains, k)
    """
    pairs = sorted((-float(score), float(v)) for score, v in zip(scores, values, strict=True))
    averaged = []
    while len(averaged) < len(pairs):
        tied = [value for score, value in pairs if score == pairs[len(averaged)][0]]
        averaged += [math.fsum(tied) / len(tied)] * len(tied)
    return averaged


def as_float32(scores):
    """The scores of {id: score} as float32, (N,); beyond its range they become infinite and tie."""
    values = np.fromiter(scores.values(), dtype=np.float64, count=len(scores))
    if not np.isfinite(values).all():
        bad = next(doc for doc, score in scores.items() if not math.isfinite(score))
        raise ValueError(f"document {bad}: score {scores[bad]} is not a finite number")
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def sort_run(scores, ties="trec_eval"):
    """Document ids of {id: score}, best first: float32 score descending, then id descending.

    Ids compare as bytes (of UTF-8: the order of code points, Python's own). With
    ties="first-stage", equal scores keep the order of the dict. ValueError on nan and inf.
    """
    values, ids = as_float32(scores), list(scores)
    if (values[1:] < values[:-1]).all():  # as most runs are written
        return ids
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


# --- Files: runs, qrels, BEIR folders -------------------------------------------------------------

RUN_LINE = [  # a line of more than six words: the id takes as many of them as it can, or as few
    re.compile(rf"(\S+)\s+(\S+)\s+(\S.*{lazy})\s+([-+]?\d+)\s+([-+.\deE]+)\s+(\S.*)", re.ASCII)
    for lazy in ("", "?")
]


def is_utf8(line):
    """Whether bytes are text in UTF-8."""
    try:
        line.decode("utf-8")
        return True
    except UnicodeDecodeError:
        return False


def is_gzip(path):
    """Whether a file starts as gzip does."""
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


@contextlib.contextmanager
def numbered_lines(path):
    """Yield the lines of a UTF-8 text file, plain or gzip; ValueErrors name it and the line."""
    counter = itertools.count()  # counts the lines at the speed of C
    opener = gzip.open if is_gzip(path) else open
    with opener(path, "rt", encoding="utf-8-sig", newline="\n") as file:
        try:
            yield map(operator.itemgetter(0), zip(file, counter, strict=False))
        except (ValueError, EOFError, zlib.error) as error:
            number = next(counter)
            if isinstance(error, UnicodeDecodeError):  # files are decoded some lines ahead
                with opener(path, "rb") as raw:
                    number = next(n for n, line in enumerate(raw, 1) if not is_utf8(line))
            raise ValueError(f"{path}, line {number}: {error}") from None


def split_fields(line):
    """The stripped fields of a line: between tabs, or between spaces if it has no tab."""
    if "\t" in line:
        return [field.strip() for field in line.strip(" \r\n").split("\t")]
    return line.split() if line.isascii() else re.split(r"[ \r\n]+", line.strip(" \r\n"))


def _json_as_lines(lines, form):
    """`lines`; or if they are JSON {qid: {docid: number}}, a line of `form` for each number."""
    first, entries = next(filter(str.strip, lines), ""), []
    if not first.lstrip().startswith("{"):
        return itertools.chain([first], lines)
    for qid, row in json.loads(first + "".join(lines), object_pairs_hook=tuple):  # repeated ids too
        for doc, value in row if isinstance(row, tuple) else [("?", row)]:
            if type(value) not in (int, float):
                raise ValueError(f"query {qid}, document {doc}: {value!r} is not a number")
            entries.append(form.format(qid, doc, value))
    return entries


def _split_run_line(line, last_tag):
    """The six fields of a line with more words; the tag of the last line settles two readings."""
    if len(fields := split_fields(line)) == 6:
        return fields
    missing = len(fields) == 5 and "\t" in line  # words must not fill a missing column's place
    forms = () if missing else RUN_LINE
    readings = {match.groups() for form in forms if (match := form.fullmatch(line.strip()))}
    if len(readings) > 1:
        readings = {reading for reading in readings if reading[5] == last_tag}
    if len(readings) != 1:
        raise ValueError(f"not six columns `qid Q0 docid rank score tag`: {line.strip()!r:.200}")
    return readings.pop()


def _read_plain_run(path):
    """The run of a file with nothing unusual in any line; or None. 64 KiB at a time stay in cache.

    Six fields a line, the second one Q0, no document twice: then every sixth field is a column.
    """
    run = {}
    with open(path, "rb") as file:
        while lines := file.readlines(1 << 16):
            block = b"".join(lines)
            if block.count(b"\t") not in (0, 5 * len(lines)):
                return None
            try:
                fields = block.decode().split()
                values = list(map(float, fields[4::6]))
            except ValueError:
                return None
            qids, docs, start = fields[0::6], fields[2::6], 0
            if len(fields) != 6 * len(lines) or fields[1::6].count("Q0") != len(lines):
                return None
            if not "".join(fields[3::6]).isdecimal():  # a shifted column, or an odd file
                return None
            if not math.isfinite(sum(values)) or qids[0][0] == "\ufeff":
                return None
            for qid, same in itertools.groupby(qids):
                stop = start + len(list(same))
                scores = run.setdefault(qid, {})
                n_before = len(scores)
                scores.update(zip(docs[start:stop], values[start:stop], strict=True))
                if len(scores) != n_before + stop - start:
                    return None
                start = stop
    return run


def read_run(path):
    """Read a run {query id: {document id: score}}, in the order of the file.

    TREC lines `qid Q0 docid rank score tag`, by tabs or spaces, plain or gzip; or the dict as JSON.
    Ids and tags may hold spaces where the line stays decidable. ValueErrors name file, line and id.
    """
    run, last, tag = _read_plain_run(path), None, None
    if run:
        return run
    run = {}
    with numbered_lines(path) as lines:
        for line in _json_as_lines(lines, "{}\tQ0\t{}\t0\t{}\tjson"):
            fields = line.split()
            if len(fields) != 6 or "\t" in line:
                if not fields:
                    continue
                fields = _split_run_line(line, tag)
            qid, _, doc, rank, score, tag = fields
            if not rank.lstrip("-").isdecimal():
                raise ValueError(f"rank {rank!r} of query {qid} is not a whole number: are these"
                                 " the six columns `qid Q0 docid rank score tag`?")
            if qid != last:
                last, scores = qid, run.setdefault(qid, {})
            if doc in scores:
                raise ValueError(f"query {qid} lists document {doc} a second time")
            scores[doc] = value = float(score)
            if not math.isfinite(value):
                raise ValueError(f"query {qid}, document {doc}: {score} is not a finite number")
    if not run:
        raise ValueError(f"{path}: the run is empty")
    return run


def strictly_decreasing(scores):
    """Strictly decreasing float32 numbers near `scores`: s_i = min(score_i, next below s_{i-1})."""
    result, limit = [], np.float32(np.inf)
    for score in scores:
        with np.errstate(over="ignore"):
            value = min(np.float32(score), limit)
        if not (np.isfinite(value) and math.isfinite(score)):
            raise ValueError(f"score {score} does not fit into float32")
        result.append(float(value))
        limit = np.nextafter(value, np.float32(-np.inf))
    return result


def write_run(path, rankings, tag="grouprank"):
    """Write {query id: [(document id, score), ...]}, best first, as a TREC run in this order.

    Scores are made `strictly_decreasing`. Spaces separate the columns, tabs if an id holds a space.
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
    gzip; or that dict as JSON. ValueErrors name file and line.
    """
    qrels, n_columns = {}, None
    with numbered_lines(path) as lines:
        for fields in filter(any, map(split_fields, _json_as_lines(lines, "{}\t0\t{}\t{}"))):
            n_columns = n_columns or min(len(fields), 4)  # the first line tells three from four
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


@dataclasses.dataclass
class Collection:
    """What a BEIR folder holds. A document's text starts with its title, where it has one."""

    corpus: collections.abc.Mapping  # {document id: text}
    queries: dict  # {query id: text}
    qrels: dict  # {query id: {document id: grade}}; empty without judgements
    excluded: dict  # {query id: {document id, ...}}: never to be retrieved for that query (BRIGHT)


def read_jsonl(path):
    """Yield the dicts of a file of JSON lines, plain or gzip; ValueError names the bad line."""
    with numbered_lines(path) as lines:
        for line in filter(str.strip, lines):
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
            yield row


def read_text(line, known):
    """(id, text) of a line of corpus.jsonl or queries.jsonl, the title in front of the text.

    ValueError if the line is wrong, has no text, or has an id that is `known` already.
    """
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    doc, title = row.get("_id"), row.get("title") or ""
    if not all(isinstance(value, str) for value in (doc, title, row.get("text"))):
        raise ValueError("needs the keys _id and text, both strings")
    if not doc.strip() or re.search("[\t\r\n\ud800-\udfff]", doc):  # no run could name it
        raise ValueError(f"the id {doc!r} is empty, or holds a tab, a newline or half a surrogate"
                         " pair")
    text = "\n".join(part for part in (title.strip(), row["text"]) if part)
    if not text.strip():
        raise ValueError(f"{doc!r} has no text; fill it in or remove the line")
    if doc in known:
        raise ValueError(f"id {doc!r} appears twice; remove one")
    return doc, text


def read_texts(path):
    """{_id: text} of corpus.jsonl or queries.jsonl, the title in front of the text."""
    texts = {}
    with numbered_lines(path) as lines:
        for line in filter(str.strip, lines):
            doc, text = read_text(line, texts)
            texts[doc] = text
    if not texts:
        raise ValueError(f"{path} is empty")
    return texts


class Corpus(collections.abc.Mapping):
    """{_id: text} of a corpus.jsonl, in its order, for collections larger than memory.

    Every line is checked once, as `read_texts` does; then only the ids and the places of the lines
    are held, and a text is read when it is asked for, from any thread. The file stays open: it may
    be deleted or replaced meanwhile. ValueError if it was changed in place. gzip, where one cannot
    jump to a place, is unpacked into a temporary file (in TMPDIR).
    """

    def __init__(self, path):
        packed, digest, self.path, self.numbers = is_gzip(path), hashlib.blake2b(), path, {}
        self.file = tempfile.TemporaryFile() if packed else open(path, "rb")
        weakref.finalize(self, self.file.close)
        begins = os.pread(self.file.fileno(), len(codecs.BOM_UTF8), 0)
        end = len(begins) if begins == codecs.BOM_UTF8 else 0
        self.ends = array.array("q", [end])
        with numbered_lines(path) as lines:
            for line in lines:
                end += len(data := line.encode())
                digest.update(data)
                if packed:
                    self.file.write(data)
                if line.strip():
                    doc, _ = read_text(line, self.numbers)
                    self.numbers[doc] = len(self.numbers)
                    self.ends.append(end)  # blank lines in between belong to the document after
        if not self.numbers:
            raise ValueError(f"{path} is empty")
        self.file.flush()
        self.digest = digest.hexdigest()[:16]

    def __getitem__(self, doc):
        start, end = self.ends[(number := self.numbers[doc]) : number + 2]
        line = os.pread(self.file.fileno(), end - start, start)  # moves nothing that threads share
        try:
            found, text = read_text(line.decode().strip(), ())
        except ValueError:
            found = None
        if found != doc:
            raise ValueError(f"{self.path} was changed while it was in use")
        return text

    def __contains__(self, doc):
        return doc in self.numbers

    def __iter__(self):
        return iter(self.numbers)

    def __len__(self):
        return len(self.numbers)


class Texts(collections.abc.Sequence):
    """The texts of some documents of a Corpus, each read whenever it is asked for."""

    def __init__(self, corpus, ids):
        self.corpus, self.ids = corpus, ids

    def __getitem__(self, i):
        return self.corpus[self.ids[i]]

    def __len__(self):
        return len(self.ids)

    def __repr__(self):  # differs where a text does, and reads none
        return f"Texts({self.corpus.digest}, {self.ids})"


def read_excluded(path):
    """Read excluded.tsv, `query-id TAB corpus-id` with or without header: {qid: {docid, ...}}."""
    excluded = {}
    with numbered_lines(path) as lines:
        for qid, doc in map(split_fields, filter(str.strip, lines)):
            excluded.setdefault(qid, set()).add(doc)
    excluded.pop("query-id", None)
    return excluded


def read_collection(folder, queries=None, split="test"):
    """Read a BEIR folder: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv, excluded.tsv (if there).

    `queries`: the NAME of rewritten ones in queries.NAME.jsonl. A folder without qrels has none.
    ValueError, naming file, line or id, on missing files or keys, repeated ids and empty texts.
    """
    folder = Path(folder)
    corpus, excluded, judged = (folder / name for name in ("corpus.jsonl", "excluded.tsv", "qrels"))
    texts = folder / (f"queries.{queries}.jsonl" if queries else "queries.jsonl")
    for needed in (corpus, texts):
        if not needed.is_file():
            files = ", ".join(sorted(file.name for file in folder.glob("*.json*")))
            raise ValueError(f"{needed} is missing; {folder} has {files or 'none'}")
    qrels = read_qrels(judged / f"{split}.tsv") if judged.is_dir() else {}
    exclusions = read_excluded(excluded) if excluded.exists() else {}
    return Collection(Corpus(corpus), read_texts(texts), qrels, exclusions)


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

    corpus: {id: text or (title, text)}; queries: {id: text}; qrels: {qid: {docid: grade}};
    excluded: {qid: docids}.
    """
    titled = ((doc, ("", t) if isinstance(t, str) else t) for doc, t in corpus.items())
    documents = ({"_id": doc, "title": title, "text": text} for doc, (title, text) in titled)
    grades = ((qid, doc, grade) for qid, docs in qrels.items() for doc, grade in docs.items())
    write_lines(f"{folder}/corpus.jsonl", documents)
    write_lines(f"{folder}/queries.jsonl", ({"_id": q, "text": t} for q, t in queries.items()))
    write_lines(f"{folder}/qrels/{split}.tsv", [("query-id", "corpus-id", "score"), *grades])
    Path(folder, "excluded.tsv").unlink(missing_ok=True)  # an old one would be applied
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

    k1 0.9 and b 0.4 are Anserini's. A word that the query repeats counts each time. Weights of all
    (word, document) pairs are computed when indexing; a query only adds slices of them up.
    """

    def __init__(self, texts, k1=0.9, b=0.4):
        self.vocabulary = collections.defaultdict()
        self.vocabulary.default_factory = self.vocabulary.__len__  # a new word gets the next number
        n_stop = len([self.vocabulary[word] for word in STOP_WORDS.split()])
        words, counts = array.array("i"), []  # four bytes a word, not a pointer
        for text in texts:
            found = WORD.findall(text.lower())
            words.extend(map(self.vocabulary.__getitem__, found))
            counts.append(len(found))
        if not counts:
            raise ValueError("BM25 needs at least one document")
        self.vocabulary.default_factory, self.n_docs = None, len(counts)
        words = np.frombuffer(words, dtype=np.int32).astype(np.int64)  # (T,)
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
        """The best min(k, N) documents: (numbers, scores), best first, equal scores by number."""
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        scores, k = self.scores(query), min(k, self.n_docs)
        threshold = np.partition(scores, self.n_docs - k)[self.n_docs - k]
        best = np.flatnonzero(scores >= threshold)
        best = best[np.argsort(-scores[best], kind="stable")[:k]]
        return best, scores[best]


# --- Evaluating and comparing runs ----------------------------------------------------------------

MEASURES = {  # name -> f(ranked grades, judged grades, k, level, exponential)
    "ndcg": lambda g, j, k, level, exponential: ndcg(g, j, k, exponential=exponential),
    "recall": lambda g, j, k, level, _: recall(g, j, k, level=level),
    "p": lambda g, j, k, level, _: precision(g, k, level=level),
    "map": lambda g, j, k, level, _: average_precision(g, j, k, level=level),
    "mrr": lambda g, j, k, level, _: reciprocal_rank(g, k, level=level),
    "success": lambda g, j, k, level, _: float(reciprocal_rank(g, k, level=level) > 0),
}
METRIC = re.compile(r"(ndcg|recall|p|map|mrr|success|judged)(?:@0*([1-9]\d*))?|rbo(?:@(0?\.\d+))?")


def parse_metric(text):
    """("ndcg", 10) of "ndcg@10"; (name, None) without cut-off; ("rbo", p) of "rbo@0.9"."""
    if not (match := METRIC.fullmatch(text.lower())):
        raise ValueError(f"unknown metric {text!r}; there are {', '.join(MEASURES)}, judged (@k) "
                         f"and rbo (@p)")  # fmt: skip
    name, k, p = match.groups()
    return (name, int(k) if k else None) if name else ("rbo", float(p or 0.9))


def evaluate_run(qrels, run, metrics=("ndcg@10",), *, relevance_level=1, complete=False,
                 ties="trec_eval", gain="linear", reference=None):  # fmt: skip
    """Each metric of each query: {metric: {query id: value in [0, 1]}}, queries as in the qrels.

    Queries that both have, or with `complete` all of the qrels, missing ones 0. ties: "trec_eval"
    or "first-stage"; gain: "linear" or "exponential"; reference: the run that rbo compares with.
    """
    if ties not in ("trec_eval", "first-stage") or gain not in ("linear", "exponential"):
        raise ValueError(f"unknown ties {ties!r} or gain {gain!r}")
    if relevance_level < 1:
        raise ValueError(f"the relevance level must be at least 1, got {relevance_level}")
    parsed = {metric: parse_metric(metric) for metric in metrics}
    results = {metric: {} for metric in metrics}
    for qid in (qid for qid in qrels if complete or run.get(qid)):
        judgements, ranking = qrels[qid], sort_run(run.get(qid, {}), ties)
        grades = [judgements.get(doc, 0) for doc in ranking]
        for metric, (name, k) in parsed.items():
            if not ranking:
                value = 0.0
            elif name == "rbo":
                other = sort_run((reference or {}).get(qid, {}), ties)
                value = rank_biased_overlap(ranking, other, k)
            elif name == "judged":
                value = precision([doc in judgements for doc in ranking[:k]])
            else:
                rules = (k, relevance_level, gain == "exponential")
                value = MEASURES[name](grades, judgements.values(), *rules)
            results[metric][qid] = value
    return results


def remove_documents(run, excluded=None, identical_ids=False):
    """(run without excluded documents and, if `identical_ids`, those named like their query; n)."""
    kept = {}
    for qid, scores in run.items():
        unwanted = {*(excluded or {}).get(qid, ()), *([qid] if identical_ids else [])}
        kept[qid] = scores
        if unwanted:
            kept[qid] = {doc: s for doc, s in scores.items() if doc not in unwanted}
    kept = {qid: scores for qid, scores in kept.items() if scores}  # the others count as missing
    return kept, sum(map(len, run.values())) - sum(map(len, kept.values()))


def tie_report(qrels, run, k=10, *, gain="linear", complete=False):
    """What ties decide in NDCG@k: {"k", "slots", "decided", "worst", "expected", "best"}.

    slots: the first k ranks of every query that both have; decided: those whose document shares its
    score with another; NDCG@k for the worst and the best order of all ties, and its expectation.
    """
    queries = [qid for qid in qrels if run.get(qid)]
    n_queries = len(qrels) if complete else len(queries)
    report = {"k": k, "slots": 0, "decided": 0, "worst": 0.0, "expected": 0.0, "best": 0.0}
    for qid in queries:
        gains = {doc: float(max(grade, 0)) for doc, grade in qrels[qid].items()}
        if gain == "exponential":
            gains = {doc: 2.0**value - 1.0 for doc, value in gains.items()}
        values, ids = as_float32(run[qid]), list(run[qid])
        last = np.sort(values)[-k:][0]  # the score at rank k: lower ones stay out
        top = [(float(values[i]), gains.get(ids[i], 0.0)) for i in np.flatnonzero(values >= last)]
        scores, own = zip(*sorted(top, reverse=True), strict=True)
        shared = collections.Counter(scores)
        report["slots"] += len(scores[:k])
        report["decided"] += sum(shared[score] > 1 for score in scores[:k])
        worst = expected = best = ndcg(own, gains.values(), k)
        if len(shared) < len(scores):
            upwards = [value for _, value in sorted(top, key=lambda pair: (-pair[0], pair[1]))]
            worst = ndcg(upwards, gains.values(), k)
            expected = ndcg(tie_averaged(scores, own), gains.values(), k)
        for order, value in (("worst", worst), ("expected", expected), ("best", best)):
            report[order] += value / n_queries
    return report


def mean(values):
    """The mean of a dict's values; 0.0 for an empty one."""
    return math.fsum(values.values()) / max(len(values), 1)


def t_test_p(t, dof):
    """Two-sided p-value of Student's t, dof >= 1 (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    theta, odd = math.atan(abs(t) / math.sqrt(dof)), dof % 2
    term, total = math.cos(theta) if odd else 1.0, 0.0
    for i in range(odd + 2, dof + 1, 2):
        total += term
        term *= math.cos(theta) ** 2 * (i - 1) / i
    area = math.sin(theta) * total
    return max(0.0, 1.0 - (2 / math.pi * (theta + area) if odd else area))


def compare_runs(values_a, values_b, *, seed=0):
    """Paired comparison b - a of {query id: value}, over the queries that both have.

    Two-sided tests of a mean difference of 0 (10,000 random signs; Student's t; 1 if all are equal)
    and the bootstrap's interval of 95 % (10,000 samples).
    """
    d = np.array([values_b[qid] - values_a[qid] for qid in values_a if qid in values_b])  # (n,)
    if (n := len(d)) == 0:
        raise ValueError("the runs have no query in common")
    rng, at_least, means = np.random.default_rng(seed), 1, []  # the observed signs count as one
    for _ in range(10):  # in blocks, for memory
        flipped = rng.choice([-1.0, 1.0], (1000, n)) @ d / n
        at_least += int((np.abs(flipped) >= abs(d.mean()) - 1e-12).sum())
        means.append(d[rng.integers(0, n, (1000, n))].mean(axis=1))
    error = d.std(ddof=1) / math.sqrt(n) if n > 1 else 0.0
    t = d.mean() / error if error > 0 else math.inf * d.mean() if n > 1 and d.any() else 0.0
    low, high = np.percentile(means, [2.5, 97.5])
    wins, losses = int((d > 1e-12).sum()), int((d < -1e-12).sum())
    return {"queries": n, "difference": float(d.mean()), "wins": wins, "ties": n - wins - losses,
            "losses": losses, "p_randomisation": at_least / 10_001,
            "p_t": t_test_p(t, max(n - 1, 1)), "interval": [float(low), float(high)]}  # fmt: skip


# --- The paper's benchmarks -----------------------------------------------------------------------
# Row counts of the data sets' cards, and NDCG@10 that the paper (v3) publishes for reranking the
# top 100 of its retriever (DIVER-Retriever-4B), tasks in the same order. BM25 has GPT-4's rewritten
# queries on BRIGHT (Table 14), original ones on R2MED. For BEIR only means over the five are given.

SIZES = {  # benchmark: {task: (queries, documents, long documents)}
    "bright": {
        "biology": (103, 57359, 524), "earth_science": (116, 121249, 601),
        "economics": (103, 50220, 516), "psychology": (101, 52835, 512),
        "robotics": (101, 61961, 508), "stackoverflow": (117, 107081, 1858),
        "sustainable_living": (108, 60792, 554), "leetcode": (142, 413932, None),
        "pony": (112, 7894, 577), "aops": (111, 188002, None),
        "theoremqa_questions": (194, 188002, None), "theoremqa_theorems": (76, 23839, None),
    },
    "r2med": {
        "Biology": (103, 57359, None), "Bioinformatics": (77, 47473, None),
        "Medical-Sciences": (88, 34810, None), "MedXpertQA-Exam": (97, 61379, None),
        "MedQA-Diag": (118, 56250, None), "PMC-Treatment": (150, 28954, None),
        "PMC-Clinical": (114, 60406, None), "IIYi-Clinical": (129, 10449, None),
    },
    "beir": {
        "arguana": (1406, 8674, None), "dbpedia-entity": (400, 4635922, None),
        "nfcorpus": (323, 3633, None), "nq": (3452, 2681468, None), "scidocs": (1000, 25657, None),
    },
}  # fmt: skip
PUBLISHED = {
    "bright": {
        "BM25": [53.6, 54.1, 24.3, 38.7, 18.9, 27.7, 26.3, 19.3, 17.6, 3.9, 19.2, 20.8],
        "retriever": [52.5, 53.6, 33.8, 45.2, 28.4, 30.4, 35.0, 13.0, 14.7, 9.8, 42.5, 36.3],
        "ERank-32B": [55.9, 55.1, 35.2, 44.6, 34.1, 34.5, 41.2, 14.1, 24.4, 12.2, 36.7, 45.9],
        "ReasonRank-32B": [53.9, 47.6, 36.3, 52.6, 36.5, 34.2, 44.5, 15.2, 14.8, 5.5, 40.6, 45.3],
        "GroupRank-7B": [52.7, 51.0, 33.8, 44.5, 32.1, 33.9, 38.1, 16.3, 17.3, 8.7, 40.7, 42.4],
        "GroupRank-32B": [59.0, 57.5, 39.2, 50.0, 39.1, 39.0, 42.7, 14.3, 14.9, 12.6, 39.0, 48.8],
    },
    "r2med": {
        "BM25": [19.19, 21.55, 19.68, 0.66, 2.55, 23.69, 21.66, 12.02],
        "retriever": [49.3, 60.4, 57.9, 18.6, 22.6, 58.7, 44.1, 31.8],
        "GroupRank-7B": [56.7, 65.4, 64.2, 27.3, 30.5, 64.6, 43.2, 30.9],
        "GroupRank-32B": [59.5, 69.7, 66.3, 28.8, 41.5, 67.6, 52.2, 32.7],
    },
    "beir": {"retriever": 52.9, "GroupRank-7B": 46.5, "GroupRank-32B": 55.1},
}


def published(benchmark, tasks):
    """The paper's NDCG@10, 0-1: {system: {"mean": x, task: x}}; None where it prints none."""
    if unknown := [task for task in tasks if task not in SIZES[benchmark]]:
        raise ValueError(f"--paper {benchmark} has no task {unknown[0]!r}; name the BEIR folder or "
                         f"the qrels file after one of: {', '.join(SIZES[benchmark])}")
    rows = {}
    if benchmark == "beir" and set(tasks) != set(SIZES["beir"]):
        raise ValueError(f"the paper prints only the mean over {', '.join(SIZES['beir'])}:"
                         " --paper beir needs all of them")
    for system, figures in PUBLISHED[benchmark].items():
        if benchmark == "beir":
            rows[system] = {"mean": figures / 100, **dict.fromkeys(tasks)}
        else:
            known = dict(zip(SIZES[benchmark], figures, strict=True))
            row = {task: known[task] / 100 for task in tasks}
            rows[system] = {"mean": sum(row.values()) / len(row), **row}
    return rows


def _fetch(repo, patterns, source):
    """The folder with a data set's files: `source`, or what huggingface_hub downloads."""
    if source is not None:
        if not Path(source).is_dir():
            raise ValueError(f"--source {source} is not a folder")
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, repo_type="dataset", allow_patterns=patterns))
    except OSError as error:
        raise ValueError(f"cannot download {repo}; without network, clone https://huggingface.co/"
                         f"datasets/{repo} elsewhere and pass --source FOLDER. ({error})") from None


def read_rows(folder, stem):
    """Yield the rows (dicts) of a table STEM: JSON lines or parquet, one or many files."""
    names = [f"{stem}.jsonl*", f"{stem}*.parquet", f"{stem}/*.jsonl*", f"{stem}/*.parquet"]
    files = next(filter(None, (sorted(folder.glob(name)) for name in names)), None)
    if not files:
        raise ValueError(f"{folder} has none of {', '.join(names)}")
    for file in files:
        if file.suffix == ".parquet":
            from pyarrow.parquet import ParquetFile

            for batch in ParquetFile(file).iter_batches():
                yield from batch.to_pylist()
        else:
            yield from read_jsonl(file)


def _load_bright(task, source, long):
    """xlangai/BRIGHT: every gold id has grade 1; *_reason hold the rewritten queries."""
    kind, gold = ("long_documents", "gold_ids_long") if long else ("documents", "gold_ids")
    parts = [f"{part}/{task}-*" for part in (kind, "examples", "*_reason")]
    folder = _fetch("xlangai/BRIGHT", parts, source)
    examples = list(read_rows(folder, f"examples/{task}"))
    qrels = {row["id"]: {doc: 1 for doc in row[gold] if doc != "N/A"} for row in examples}
    excluded = {row["id"]: {*(row["excluded_ids"] or ())} - {"N/A"} for row in examples}
    reasons = sorted(part.name for part in folder.glob("*_reason"))
    texts = {part: {row["id"]: row["query"] for row in read_rows(folder, f"{part}/{task}")}
             for part in ("examples", *reasons)}  # fmt: skip
    documents = ((row["id"], "", row["content"]) for row in read_rows(folder, f"{kind}/{task}"))
    return documents, texts.pop("examples"), qrels, excluded, texts


def _load_r2med(task, source, long):
    """R2MED/TASK: corpus and query {id, text}, qrels {q_id, p_id, score} (older: qrels.txt)."""
    folder, qrels = _fetch(f"R2MED/{task}", None, source), {}
    if (folder / "qrels.txt").exists():
        qrels = read_qrels(folder / "qrels.txt")
    else:
        for row in read_rows(folder, "qrels"):
            qrels.setdefault(row["q_id"], {})[row["p_id"]] = int(row["score"])
    queries = {row["id"]: row["text"] for row in read_rows(folder, "query")}
    return ((r["id"], "", r["text"]) for r in read_rows(folder, "corpus")), queries, qrels, {}, {}


def _load_beir(task, source, long):
    """BeIR/NAME with BeIR/NAME-qrels, or a BEIR folder; only the judged queries are kept."""
    folder = _fetch(f"BeIR/{task}", None, source)
    judged_in = _fetch(f"BeIR/{task}-qrels", ["test.tsv"], source)
    apart = judged_in / "test.tsv"
    qrels = read_qrels(apart if apart.exists() else judged_in / "qrels" / "test.tsv")
    rows = read_rows(folder, "queries")
    queries = {row["_id"]: row["text"] for row in rows if row["_id"] in qrels}
    rows = read_rows(folder, "corpus")
    return ((r["_id"], r.get("title") or "", r["text"]) for r in rows), queries, qrels, {}, {}


def prepare(name, out, *, source=None, long_documents=False, check=True):
    """Make the BEIR folder `out` of a benchmark: bright/TASK, r2med/TASK or beir/NAME.

    From the Hugging Face hub or a local clone, `source`; returns a line that says what was written.
    Empty and repeated documents are left out. ValueError, unless `check` is off, if more than 1 %
    of the judged documents are missing or row counts differ from SIZES.
    """
    from tqdm import tqdm  # its import takes longer than --help: only here is it needed

    benchmark, _, task = name.partition("/")
    known = SIZES.get(benchmark, {})
    if not task or not known or (benchmark != "beir" and task not in known):
        raise ValueError(f"unknown benchmark {name!r}: bright/TASK, r2med/TASK or beir/NAME; "
                         f"{benchmark} has the tasks: {', '.join(known) or 'none'}")  # fmt: skip
    load = {"bright": _load_bright, "r2med": _load_r2med, "beir": _load_beir}[benchmark]
    corpus, n = {}, collections.Counter()
    try:
        rows, queries, qrels, excluded, rewritten = load(task, source, long_documents)
        for doc, title, text in tqdm(rows, desc=name, unit=" documents", disable=None):
            full = f"{title}{text or ''}".strip()
            kind = "repeated" if doc in corpus else "kept" if full else "empty"
            n[kind] += 1
            if kind == "kept":
                corpus[doc] = (title, text)
    except KeyError as error:
        raise ValueError(f"{name}: a row of the data set lacks the field {error}") from None
    except TypeError as error:
        raise ValueError(f"{name}: a row of the data set holds an odd value ({error})") from None
    judged = {doc for docs in qrels.values() for doc in docs}
    absent = judged - corpus.keys()
    n_queries, *n_documents = known.get(task, (None, None, None))
    faults = []
    if n_queries not in (None, len(queries)):
        faults.append(f"{len(queries)} queries, not {n_queries}")
    if (right := n_documents[long_documents]) not in (None, n.total()):
        faults.append(f"{n.total()} documents, not {right}")
    if len(absent) > 0.01 * len(judged):  # BEIR's arguana lacks 5 of its 1,406
        faults.append(f"{len(absent)} judged documents are missing: {min(absent)}")
    if faults and check:
        raise ValueError(f"{name}: {'; '.join(faults)} (another version? see --skip-checks)")
    write_collection(out, corpus, queries, qrels, excluded)
    for old in Path(out).glob("queries.*.jsonl"):
        old.unlink()
    for kind, texts in rewritten.items():
        lines = ({"_id": qid, "text": text} for qid, text in texts.items())
        write_lines(f"{out}/queries.{kind}.jsonl", lines)
    return (f"{out}: {n['kept']} documents ({n['empty']} empty and {n['repeated']} repeated ones "
            f"left out; {len(absent)} judged ones absent), {len(queries)} queries, "
            f"{sum(map(len, qrels.values()))} judgements, {sum(map(len, excluded.values()))} "
            f"exclusions, rewritten queries: {', '.join(rewritten) or 'none'}")  # fmt: skip


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
    """A panel per entry of CURVES: all values, thin, and their running mean over 5 % of them."""
    logged, stages = set().union(*rows), {row.get("stage") for row in rows}
    panels = {title: [key for key in keys if key in logged]
              for title, keys in CURVES.items() if logged.intersection(keys)}  # fmt: skip
    if not panels:
        raise KeyError("reward")
    n_sft = max((row["step"] for row in rows if row["stage"] == "sft"), default=0)
    n_rows = math.ceil(len(panels) / 2)
    figure.set_size_inches(6.4, 1.9 * n_rows)
    for number, (title, keys) in enumerate(panels.items(), start=1):
        axis = figure.add_subplot(n_rows, 2, number)
        for i, (key, stage) in enumerate(itertools.product(keys, sorted(stages, reverse=True))):
            start = n_sft if stage == "grpo" else 0  # GRPO's steps are drawn after SFT's
            points = [(start + row["step"], row[key]) for row in rows
                      if row["stage"] == stage and key in row]  # fmt: skip
            if points:
                x, y = np.array(points, dtype=float).T
                width, color = max(1, len(y) // 20), f"C{i // len(stages)}"
                smooth = np.convolve(y, np.ones(width) / width, mode="valid")
                axis.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
                axis.plot(x[width // 2 :][: len(smooth)], smooth, color=color, label=key,
                          marker="." if len(y) < 30 else "")  # fmt: skip
        if len(stages) > 1:
            axis.axvline(n_sft, color="gray", linestyle=":", linewidth=1)
        axis.set(title=title, xlabel="step (SFT, then GRPO)" if len(stages) > 1 else "step")
        if len(keys) > 1:
            axis.legend(ncols=2, loc="lower right", fontsize=6)


# What a sweep may vary; rows that differ in nothing of it (seeds, runs) are averaged.
SWEPT = ("method", "grouping", "docs_per_group", "docs_stride", "rounds", "window", "step", "top_k",
         "fusion_weight", "temperature", "top_p", "retries")  # fmt: skip


def _plot_sweep(figure, rows):
    """NDCG@10 by group size c (the paper's Fig. 3) and by rounds t (its Fig. 5).

    A line for each setting; dashed across where a method has no groups.
    """
    own = {"groupwise": {"grouping", "docs_per_group", "docs_stride"}, "pointwise": set(),
           "listwise": {"window", "step"}}  # fmt: skip
    letters = {"docs_per_group": "c", "rounds": "t"}
    varied = [name for name in SWEPT if len({row.get(name) for row in rows}) > 1]
    figure.set_size_inches(7.2, 4.8)
    for axis, x in zip(figure.subplots(1, 2), letters, strict=True):
        lines = {}
        for row in rows:
            method = row.get("method", "groupwise")
            unused = set().union(*(own[other] for other in own if other != method))
            label = ", ".join(
                str(row.get(name)) if name in ("method", "grouping")
                else f"{letters.get(name, name.replace('_', ' '))} = {row.get(name)}"
                for name in varied if name != x and name not in unused)  # fmt: skip
            line = lines.setdefault((label, x in unused), {})
            line.setdefault(row[x], []).append(100 * row["ndcg@10"])
        for number, ((label, flat), points) in enumerate(lines.items()):
            means = [np.mean(points[value]) for value in sorted(points)]
            if flat:
                axis.axhline(means[0], color=f"C{number}", linestyle="--", label=label)
            else:
                axis.plot(sorted(points), means, f"C{number}o-", markersize=3, label=label)
        axis.set(xlabel=("documents per group, c" if x == "docs_per_group" else "rounds, t"),
                 ylabel="NDCG@10 (0-100)", xticks=sorted({row[x] for row in rows}))  # fmt: skip
        if varied != [x]:  # below the axes: curves may lie anywhere inside
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)


def _plot_pair(figure, rows):
    """Per-query differences of the first two runs in a --per-query file, for its first measure."""
    metric, values = rows[1][1], {}
    for run, name, qid, value in rows[1:]:
        if name == metric:
            values.setdefault(run, {})[qid] = float(value)
    if len(values) < 2:
        raise ValueError("differences need a --per-query file of two runs")
    (a, first), (b, second) = list(values.items())[:2]
    differences = sorted((100 * (second[q] - first[q]) for q in first if q in second), reverse=True)
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    figure.set_size_inches(6.4, 2.8)
    axis = figure.add_subplot()
    axis.bar(range(1, len(differences) + 1), differences, width=1.0)
    axis.axhline(np.mean(differences), color="black", linestyle=":", label="mean difference")
    axis.set(xlabel="queries, sorted", ylabel=f"{metric}, difference in points")
    axis.set_title(f"{b} - {a}: {wins} better, {losses} worse, {len(differences)} queries")
    axis.legend()


def plot(path, out):
    """Draw metrics.jsonl, sweep.jsonl or a --per-query file (.tsv); the suffix of `out` counts."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if Path(path).suffix == ".tsv":
        with numbered_lines(path) as lines:
            draw, rows = _plot_pair, list(map(split_fields, lines))
    else:
        rows = list(read_jsonl(path))
        draw = _plot_sweep if "docs_per_group" in (rows or [{}])[0] else _plot_training
    style = {"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 7, "axes.grid": True,
             "grid.alpha": 0.3}  # fmt: skip
    with rc_context(style), open_atomic(out, "wb") as file:
        figure = Figure(layout="constrained")
        try:
            draw(figure, rows)
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{path} has nothing to draw or lacks a field ({error})") from None
        figure.savefig(file, format=Path(out).suffix[1:] or "png", dpi=150)


# --- Command line ---------------------------------------------------------------------------------


def table(title, rows, markdown=False):
    """{row name: {column: value}} as aligned text or Markdown; fractions, but not p, times 100."""

    def text(column, x):
        if isinstance(x, list):
            return " to ".join(text(column, part) for part in x)
        if isinstance(x, float):
            return f"{x:.4f}" if column.startswith("p_") else f"{100 * x:.2f}"
        return "-" if x is None else str(x)

    lines = [[title, *next(iter(rows.values()))]]
    lines += [[name, *itertools.starmap(text, row.items())] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in lines]
    if not markdown:
        return "\n".join("  ".join(line) for line in lines)
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def evaluate_files(args, qrels_path, runs):
    """All numbers for one qrels file and its runs {name: path}, as --json prints them."""
    qrels, folder = read_qrels(qrels_path), qrels_path.absolute().parent.parent
    path = Path(args.excluded or folder / "excluded.tsv")
    found = qrels_path.absolute().parent.name == "qrels" and path.exists()
    excluded = read_excluded(path) if args.excluded or found else {}
    ties = "document id, descending" if args.ties == "trec_eval" else "first-stage order"
    over = "all judged queries (--complete)" if args.complete else "queries in both"
    alike = "; documents named like their query ignored" if args.ignore_identical_ids else ""
    report = {"runs": {}, "queries": {}, "ties": {}, "comparisons": {}, "per_query": {}}
    report["rules"] = (f"{qrels_path}: ties by {ties}; {args.gain} gain; relevant from grade "
                       f"{args.relevance_level}; mean over {over}{alike}")  # fmt: skip
    reference = None
    for name, path in runs.items():
        run, n_removed = remove_documents(read_run(path), excluded, args.ignore_identical_ids)
        if not run.keys() & qrels.keys():
            raise ValueError(f"{path} and {qrels_path} share no query: the run has "
                             f"{min(run, default=None)!r}, the qrels {min(qrels)!r}")  # fmt: skip
        reference = reference or run
        values = evaluate_run(
            qrels, run, args.metrics, relevance_level=args.relevance_level, gain=args.gain,
            complete=args.complete, ties=args.ties, reference=reference)  # fmt: skip
        report["per_query"][name] = values
        report["runs"][name] = {metric: mean(of) for metric, of in values.items()}
        scored = len(run.keys() & qrels.keys())
        report["queries"][name] = {
            "scored": scored, "missing in the run": len(qrels) - scored,
            "without judgements": len(run) - scored, "documents excluded": n_removed}  # fmt: skip
        report["ties"][name] = tie_report(qrels, run, gain=args.gain, complete=args.complete)
    a, *others = runs
    for b, metric in itertools.product(others, args.metrics):
        if parse_metric(metric)[0] not in ("rbo", "judged"):
            pair = (report["per_query"][run][metric] for run in (a, b))
            report["comparisons"][f"{b} - {a}, {metric}"] = compare_runs(*pair, seed=args.seed)
    return report


def print_reports(args, reports):
    """Print the reports {task: report} and the means over their tasks, in the form asked for."""
    first, names = args.metrics[0], next(iter(reports.values()))["runs"]
    if args.paper and first != "ndcg@10":
        raise ValueError("the paper's figures are NDCG@10: name ndcg@10 first in --metrics")
    paper = published(args.paper, list(reports)) if args.paper else {}
    by_task = {name: {metric: {task: r["runs"][name][metric] for task, r in reports.items()}
                      for metric in args.metrics} for name in names}  # fmt: skip
    runs = {name: {metric: mean(of) for metric, of in by_task[name].items()} for name in names}
    if args.json:
        print(json.dumps({"runs": runs, "tasks": reports, "published": paper}, indent=1))
        return
    print(table("run", runs, args.markdown))
    if len(reports) > 1 or paper:
        rows = {name: {"mean": runs[name][first], **by_task[name][first]} for name in names}
        for system, row in paper.items():
            rows[f"{system} (published)"] = row
        print("\n" + table(first, rows, args.markdown))
    for report in reports.values():
        print("\n" + report["rules"])
        titles = {"queries": "queries", "ties": "ndcg@k, all tie-breaks", "comparisons": "paired"}
        for part in filter(report.get, titles):
            print("\n" + table(titles[part], report[part], args.markdown))


def build_parser():
    """The options, grouped as --help shows them."""
    about, commands = __doc__.split("\n\n")[0], __doc__.split("\n\n")[2]
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, epilog=commands, formatter_class=form)
    flag = {"action": "store_true"}
    add = parser.add_argument_group("evaluate runs").add_argument
    add("--qrels", nargs="+", help="judgements: TREC, BEIR, JSON; several if --run holds {task}")
    add("--run", nargs="+", action="extend", help="TREC or JSON; compared with the first one")
    add("--metrics", nargs="+", default=["ndcg@10", "recall@100", "map", "mrr@10"],
        help="ndcg recall p map mrr success judged (@k); rbo (@p) with the first run")
    add("--complete", **flag, help="mean over all judged queries, missing ones 0")
    add("--ties", choices=["trec_eval", "first-stage"], default="trec_eval",
        help="equal scores by document id, or in the order of the run's lines")
    add("--gain", choices=["linear", "exponential"], default="linear", help="of NDCG")
    add("--relevance-level", type=int, default=1, help="relevant from this grade on")
    add("--ignore-identical-ids", **flag, help="drop documents named like their query")
    add("--excluded", help="documents to drop (default: excluded.tsv beside the qrels folder)")
    add = parser.add_argument_group("output").add_argument
    add("--json", **flag, help="print everything as JSON, fractions 0-1")
    add("--markdown", **flag, help="print Markdown tables")
    add("--paper", choices=list(SIZES), help="add the paper's NDCG@10")
    add("--per-query", help="also write a .tsv of run, metric, query, value")
    add("--out", help="of --prepare (a folder) or --plot (a picture)")
    add("--overwrite", **flag, help="replace outputs that exist")
    add("--seed", type=int, default=0, help="of the randomisation test and the bootstrap")
    add = parser.add_argument_group("prepare a benchmark as a BEIR folder").add_argument
    add("--prepare", help="bright/TASK, r2med/TASK (TASK may be all) or beir/NAME")
    add("--source", help="folder of a local clone, instead of the Hugging Face hub")
    add("--long-documents", **flag, help="BRIGHT's long documents")
    add("--skip-checks", **flag, help="accept other row counts and missing judged documents")
    add = parser.add_argument_group("draw a picture").add_argument
    add("--plot", help="metrics.jsonl, sweep.jsonl or a --per-query file")
    return parser


def main():
    """Parse the command line and run one of the three commands."""
    parser = build_parser()
    args = parser.parse_args()
    if args.prepare:
        benchmark, _, wanted = args.prepare.partition("/")
        every = list(SIZES.get(benchmark, ())) if wanted == "all" else []
        for task in every or [wanted]:
            out = Path(args.out or f"data/{benchmark}", task if every or not args.out else "")
            source = args.source
            if every and source and benchmark != "bright":  # one repository a task
                source = Path(source, task)
            refuse_overwrite(out, args.overwrite)
            print(f"{benchmark}/{task}: {source or 'the Hugging Face hub'} -> {out}", flush=True)
            choices = {"long_documents": args.long_documents, "check": not args.skip_checks}
            print(prepare(f"{benchmark}/{task}", out, source=source, **choices))
    elif args.plot:
        out = args.out or Path(args.plot).with_suffix(".png")
        refuse_overwrite(out, args.overwrite)
        plot(args.plot, out)
        print(f"drew {out}")
    elif args.qrels and args.run:
        if args.per_query:
            refuse_overwrite(args.per_query, args.overwrite)
        args.metrics = [metric for text in args.metrics for metric in text.split(",")]
        names = [Path(path.removesuffix(".gz")).stem for path in args.run]
        names, reports = names if len(set(names)) == len(names) else args.run, {}
        for qrels in map(Path, args.qrels):  # biology of biology/qrels/test.tsv, of biology.qrels
            in_folder = qrels.parent.name == "qrels"
            task = qrels.absolute().parts[-3] if in_folder else qrels.name.partition(".")[0]
            paths = (path.replace("{task}", task) for path in args.run)
            if task in reports:
                raise ValueError(f"two of the qrels files are of the task {task!r}: {qrels}")
            reports[task] = evaluate_files(args, qrels, dict(zip(names, paths, strict=True)))
        many = len(reports) > 1  # query ids repeat from task to task
        rows = [(run, metric, f"{task}/{qid}" if many else qid, value)
                for task, report in reports.items()
                for run, metrics in report.pop("per_query").items()
                for metric, values in metrics.items() for qid, value in values.items()]  # fmt: skip
        if args.per_query:
            write_lines(args.per_query, [("run", "metric", "query-id", "value"), *rows])
        print_reports(args, reports)
    else:
        parser.error("nothing to do: give --qrels and --run, --prepare or --plot")


if __name__ == "__main__":
    run_cli(main)
