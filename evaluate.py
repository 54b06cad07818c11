"""Evaluation for reranking: exact measures, run files, a BM25 baseline, the paper's benchmarks.

Needs numpy and tqdm only. For GroupRank (arXiv 2511.11653v3) and for any other ranking.

    python evaluate.py --qrels qrels.tsv --run a.run b.run             # table, ties, paired tests
    python evaluate.py --prepare bright/biology --out data/biology     # a benchmark as BEIR folder
    python evaluate.py --qrels data/biology/qrels/test.tsv --run a.run --paper bright
    python evaluate.py --plot runs/demo/metrics.jsonl --out curves.png

Choices, all of them trec_eval's:
 1. Order: score as float32, descending, then document id, descending; the rank column is ignored.
 2. NDCG: linear gain, discount log2(rank + 1) (the paper's Eq. 9). No judgement or a negative
    grade: gain 0. No relevant document: the query scores 0.
 3. Means run over the queries that both files have; `--complete` (trec_eval -c) over all judged
    queries, missing ones 0. What is missing, and what ties decide, is always printed.
 4. Recall, precision, AP and RR take grade >= 1 as relevant (`--relevance-level`).
"""

import argparse
import array
import collections
import contextlib
import dataclasses
import gzip
import itertools
import json
import math
import operator
import os
import re
import sys
import zlib
from pathlib import Path

import numpy as np

# --- Errors and outputs ---------------------------------------------------------------------------


def run_cli(main):
    """Run `main()`; a user's mistake becomes one line `error: ...` and exit status 2."""
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stdout.flush()
        os._exit(130)  # sys.exit would wait for the requests that are in flight
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
    """Open a file that appears under its name when it is complete, or not at all.

    Text is UTF-8; a name that ends in .gz makes it gzip.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with name_in_errors(path), opened(temporary, mode + "t" * bool(text), **text) as file:
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


def ndcg(ranked_grades, judged_grades, k=10):
    """NDCG@k = DCG@k / DCG@k of `judged_grades` in descending order; none relevant: 0.0.

    DCG@k = sum_{i=1..k} max(grade_i, 0) / log2(i + 1). Ranked grades may be (G,), of G rankings.
    """
    def dcg(grades):
        gains = [grade * (grade > 0) for grade in grades[:k]]
        return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))

    ideal = dcg(sorted(map(float, judged_grades), reverse=True))
    return dcg(ranked_grades) / ideal if ideal > 0 else 0.0


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


def tie_averaged(scores, values):
    """`values` in descending order of `scores`, each run of equal scores replaced by its mean.

    DCG, recall and precision are linear in the values, so the measure of averaged values is exactly
    the expectation over all orders: expected NDCG = ndcg(tie_averaged(scores, gains), gains, k).
    scores (N,), or (G, N) of G rankings of the same N documents; values (N,). Returns an array.
    """
    scores = np.asarray(scores, dtype=np.float64)
    values = np.broadcast_to(np.asarray(values, dtype=np.float64), scores.shape)
    order = np.lexsort((values, -scores))
    scores, values = (np.take_along_axis(rows, order, -1) for rows in (scores, values))
    starts = np.ones(scores.shape, dtype=bool)
    starts[..., 1:] = scores[..., 1:] != scores[..., :-1]
    tie = starts.ravel().cumsum() - 1  # the number of each value's run
    return (np.bincount(tie, values.ravel()) / np.bincount(tie))[tie].reshape(scores.shape)


def as_float32(scores):
    """The scores of {id: score} as float32, (N,); beyond its range they become infinite and tie."""
    values = np.fromiter(scores.values(), dtype=np.float64, count=len(scores))
    if not np.isfinite(values).all():
        bad = next(doc for doc, score in scores.items() if not math.isfinite(score))
        raise ValueError(f"document {bad}: score {scores[bad]} is not a finite number")
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def sort_run(scores):
    """Document ids of {id: score}, best first: float32 score descending, then id descending."""
    values, ids = as_float32(scores), list(scores)
    if (values[1:] < values[:-1]).all():  # as most runs are written
        return ids
    # Ids compare as bytes of UTF-8 do: that is the order of code points, Python's own.
    return [doc for _, doc in sorted(zip(values.tolist(), ids, strict=True), reverse=True)]


def minmax(values):
    """Scale numbers to [0, 1]: (v - min) / (max - min); a constant list becomes zeros."""
    numbers = [float(value) for value in values]
    if not all(map(math.isfinite, numbers)):
        raise ValueError("min-max scaling needs finite numbers")
    low, high = min(numbers, default=0.0), max(numbers, default=0.0)
    return [(number - low) / (high - low) if high > low else 0.0 for number in numbers]


# --- Files: runs, qrels, BEIR folders -------------------------------------------------------------


@contextlib.contextmanager
def numbered_lines(path):
    """Yield the lines of a UTF-8 text file, plain or gzip; ValueErrors name it and the line."""
    with open(path, "rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    n_read = itertools.count()  # counts the lines at the speed of C
    with (gzip.open if is_gzip else open)(path, "rb") as file:
        if file.read(3) != b"\xef\xbb\xbf":  # a byte order mark
            file.seek(0)
        try:
            numbered = zip(map(bytes.decode, file), n_read, strict=False)
            yield map(operator.itemgetter(0), numbered)
        except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            number = next(n_read) + isinstance(error, UnicodeDecodeError)  # a line not yet counted
            raise ValueError(f"{path}, line {number}: {error}") from None


def read_text(path):
    """A whole text file, read as `numbered_lines` does."""
    with numbered_lines(path) as lines:
        return "".join(lines)


def split_columns(line, left=-1, right=0):
    """The columns of a line, stripped: between tabs, or between spaces if it has no tab.

    With `left` (and `right`) columns at its start (and end), one column in between takes the rest:
    a document id, which may hold spaces.
    """
    separator = "\t" if "\t" in line else None
    *first, rest = line.strip(" \r\n").split(separator, left)
    return [column.strip() for column in (*first, *rest.rsplit(separator, right))]


def _without_json(lines, form):
    """The lines that are not blank; of JSON {qid: {docid: number}} one of `form` per number."""
    first = next(filter(str.strip, lines), "")
    if not first.lstrip().startswith("{"):
        return filter(str.strip, itertools.chain([first], lines))
    written = []
    for qid, row in json.loads(first + "".join(lines)).items():
        if not isinstance(row, dict):
            raise ValueError(f"query {qid} should hold {{document id: number}}")
        written += [form.format(qid, doc, number) for doc, number in row.items()]
    return written


def _read_plain_run(path):
    """The run of a file without any unusual line, else ValueError.

    Fast, as every sixth word is a column's: no line is looked at alone. 64 KiB stay in the cache.
    """
    run, n_lines = {}, 0
    with open(path, "rb") as file:
        while lines := file.readlines(1 << 16):
            block, n = b"".join(lines), len(lines)
            words = block.decode("utf-8-sig").split()
            plain = len(words) == 6 * n and words[1::6].count("Q0") == n
            plain = plain and "".join(words[3::6]).isdecimal()  # the ranks
            if not plain or block.count(b"\t") not in (0, 5 * n):
                raise ValueError("other columns")
            entries = zip(words[2::6], map(float, words[4::6]), strict=True)
            for qid, same in itertools.groupby(words[0::6]):
                run.setdefault(qid, {}).update(itertools.islice(entries, len(list(same))))
            n_lines += n
    total = sum(sum(scores.values()) for scores in run.values())
    if not run or sum(map(len, run.values())) < n_lines or not math.isfinite(total):
        raise ValueError("empty, a document twice, or a score that is not finite")
    return run


def read_run(path):
    """Read a run {query id: {document id: score}}, in the order of the file.

    TREC lines `qid Q0 docid rank score tag`, by tabs or spaces, plain or gzip; or the dict as JSON.
    Document ids may hold spaces, tags only between tabs. ValueErrors name file, line and id.
    """
    with contextlib.suppress(ValueError):
        return _read_plain_run(path)
    run = {}
    with numbered_lines(path) as lines:
        for line in _without_json(lines, "{}\tQ0\t{}\t0\t{}\tjson"):
            columns = split_columns(line, 2, 3)
            if len(columns) != 6 or not columns[3].lstrip("-").isdecimal():
                raise ValueError(f"not `qid Q0 docid rank score tag`: {line.strip()!r:.200}")
            qid, _, doc, _, score, _ = columns
            scores = run.setdefault(qid, {})
            if doc in scores:
                raise ValueError(f"query {qid} lists document {doc} a second time")
            scores[doc] = float(score)
            if not math.isfinite(scores[doc]):
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

    Scores become `strictly_decreasing`. Spaces separate the columns, tabs where an id holds one.
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

    TREC lines `qid 0 docid grade`, BEIR's three columns with header, or JSON, as `read_run` does.
    """
    qrels, n_columns = {}, None
    with numbered_lines(path) as lines:
        for line in _without_json(lines, "{}\t0\t{}\t{}"):
            n_columns = n_columns or len(split_columns(line))  # the first line tells 3 from 4
            columns = split_columns(line, 1 if n_columns == 3 else 2, 1)
            qid, doc, grade = columns[0], columns[-2:][0], columns[-1]
            if qid in ("query-id", "query_id", "q_id", "qid"):
                continue
            if len(columns) != min(n_columns, 4) or not grade.lstrip("+-").isdecimal():
                raise ValueError(f"not `qid 0 docid grade` or `qid docid grade`: {line.strip()!r}")
            if qrels.setdefault(qid, {}).setdefault(doc, int(grade)) != int(grade):
                raise ValueError(f"document {doc} of query {qid} has two different grades")
    if not qrels:
        raise ValueError(f"{path}: no judgement in the file")
    return qrels


@dataclasses.dataclass
class Collection:
    """What a BEIR folder holds. A document's text starts with its title, where it has one."""
    corpus: dict  # {document id: text}
    queries: dict  # {query id: text}
    qrels: dict  # {query id: {document id: grade}}; empty without judgements
    excluded: dict  # {query id: {document id, ...}}: never to be retrieved for that query (BRIGHT)


def read_jsonl(path, check=lambda row: row):
    """Yield what `check` makes of each dict in a file of JSON lines; ValueErrors name the line."""
    with numbered_lines(path) as lines:
        for row in map(json.loads, filter(str.strip, lines)):
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
            yield check(row)


def check_text(row):
    """(id, text) of a row of corpus.jsonl or queries.jsonl, the title in front; half an emoji: ?"""
    doc, title, body = row.get("_id"), row.get("title") or "", row.get("text") or ""
    if not all(isinstance(v, str) for v in (doc, title, body)) or not {"text", "title"} & set(row):
        raise ValueError("needs the keys _id and text (or title), all strings")
    if not doc.strip() or re.search(r"[\t\r\n]", doc):  # no run could name it
        raise ValueError(f"the id {doc!r} is empty, or holds a tab or a newline")
    return doc, "\n".join(filter(None, (title.strip(), body))).encode("utf-8", "replace").decode()


def find_packed(path):
    """The path, or that with .gz where only that exists."""
    return next(filter(Path.exists, (Path(path), Path(f"{path}.gz"))), Path(path))


def read_texts(path, keep=None):
    """{_id: text} of corpus.jsonl or queries.jsonl, or that with .gz, without empty texts (a note
    says so). All lines are checked, and of the texts those of `keep` held."""
    texts, seen, n_empty = {}, set(), 0
    for doc, text in read_jsonl(find_packed(path), check_text):
        if doc in seen:
            raise ValueError(f"{path}: id {doc!r} appears twice; remove one")
        seen.add(doc)
        n_empty += not text.strip()
        if text.strip() and (keep is None or doc in keep):
            texts[doc] = text
    if not seen:
        raise ValueError(f"{path} is empty")
    if n_empty:
        print(f"note: {path}: {n_empty} texts are empty and left out", file=sys.stderr)
    return texts


def read_excluded(path):
    """Read excluded.tsv, `query-id TAB corpus-id` with or without header: {qid: {docid, ...}}."""
    excluded = {}
    with numbered_lines(path) as lines:
        for line in filter(str.strip, lines):
            qid, doc = split_columns(line, 1)
            excluded.setdefault(qid, set()).add(doc)
    excluded.pop("query-id", None)
    return excluded


def read_collection(folder, queries=None, split="test", keep=None):
    """Read a BEIR folder: corpus.jsonl, queries.jsonl, and qrels/SPLIT.tsv and excluded.tsv if any.

    queries: the NAME of rewritten ones in queries.NAME.jsonl; keep: a set of document ids, whose
    texts alone are held. Every line of every file is checked.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder with corpus.jsonl and queries.jsonl")
    judged, excluded = (find_packed(folder / f) for f in (f"qrels/{split}.tsv", "excluded.tsv"))
    return Collection(
        corpus=read_texts(folder / "corpus.jsonl", keep),
        queries=read_texts(folder / (f"queries.{queries}.jsonl" if queries else "queries.jsonl")),
        qrels=read_qrels(judged) if judged.exists() else {},
        excluded=read_excluded(excluded) if excluded.exists() else {},
    )


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
    """Write a BEIR folder for `read_collection`; a document is its text or (title, text)."""
    titled = ((doc, ("", t) if isinstance(t, str) else t) for doc, t in corpus.items())
    documents = ({"_id": doc, "title": title, "text": text} for doc, (title, text) in titled)
    grades = [(qid, doc, grade) for qid, docs in qrels.items() for doc, grade in docs.items()]
    write_lines(f"{folder}/corpus.jsonl", documents)
    write_lines(f"{folder}/queries.jsonl", ({"_id": q, "text": t} for q, t in queries.items()))
    for name in (f"qrels/{split}.tsv", f"qrels/{split}.tsv.gz", "excluded.tsv", "excluded.tsv.gz"):
        Path(folder, name).unlink(missing_ok=True)  # an old one would be applied
    if grades:
        write_lines(f"{folder}/qrels/{split}.tsv", [("query-id", "corpus-id", "score"), *grades])
    if excluded:
        pairs = [(qid, doc) for qid, docs in excluded.items() for doc in sorted(docs)]
        write_lines(f"{folder}/excluded.tsv", [("query-id", "corpus-id"), *pairs])


# --- BM25 -----------------------------------------------------------------------------------------

WORD = re.compile(r"\w+")  # runs of letters, digits and _, where spaces part words; no stemming
STOP_WORDS = (  # the 33 of Lucene's EnglishAnalyzer
    "a an and are as at be but by for if in into is it no not of on or such that the their then "
    "there these they this to was will with"
)


class BM25:
    """BM25 as Lucene scores it, with exact document lengths, over texts numbered from 0.

    score(q, d) = sum over words t of q: idf(t) tf / (tf + k1 (1 - b + b |d| / mean |d|))
    idf(t) = ln(1 + (N - df + 0.5) / (df + 0.5))

    k1 0.9 and b 0.4 are Anserini's. A word that the query repeats counts each time. The weights of
    all (word, document) pairs are computed when indexing; a query only adds slices of them up.
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
        pairs = words[words >= n_stop] * self.n_docs + docs
        postings, tf = np.unique(pairs, return_counts=True)  # (P,): one a word and document
        words, self.docs = np.divmod(postings, self.n_docs)
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
        scores, k = self.scores(query), min(k, self.n_docs)
        threshold = np.partition(scores, self.n_docs - k)[self.n_docs - k]
        best = np.flatnonzero(scores >= threshold)
        best = best[np.argsort(-scores[best], kind="stable")[:k]]
        return best, scores[best]


# --- Evaluating and comparing runs ----------------------------------------------------------------

MEASURES = {  # name -> f(ranked grades, judged grades, k, relevance level)
    "ndcg": lambda ranked, judged, k, level: ndcg(ranked, judged, k),
    "recall": lambda ranked, judged, k, level: recall(ranked, judged, k, level=level),
    "p": lambda ranked, judged, k, level: precision(ranked, k, level=level),
    "map": lambda ranked, judged, k, level: average_precision(ranked, judged, k, level=level),
    "mrr": lambda ranked, judged, k, level: reciprocal_rank(ranked, k, level=level),
}


def evaluate_run(qrels, run, metrics=("ndcg@10",), *, relevance_level=1, complete=False):
    """Each metric of each query: {metric: {query id: value in [0, 1]}}, queries as in the qrels.

    Queries that both have, or with `complete` all of the qrels, missing ones 0.
    """
    parsed, results = [], {metric: {} for metric in metrics}
    for metric in metrics:
        match = re.fullmatch(r"(\w+)(?:@0*([1-9]\d*))?", metric.lower())
        if not match or match[1] not in MEASURES:
            raise ValueError(f"unknown metric {metric!r}: not one of {', '.join(MEASURES)}")
        parsed.append((results[metric], MEASURES[match[1]], int(match[2]) if match[2] else None))
    for qid, judged in qrels.items():
        if complete or run.get(qid):
            ranked = [judged.get(doc, 0) for doc in sort_run(run.get(qid, {}))]
            for values, measure, k in parsed:
                values[qid] = measure(ranked, judged.values(), k, relevance_level)
    return results


def remove_documents(run, excluded, identical_ids=False):
    """(run without excluded documents and, if `identical_ids`, those named like their query; n)."""
    kept, n_removed = {}, 0
    for qid, scores in run.items():
        unwanted = excluded.get(qid, set()) | ({qid} if identical_ids else set())
        rest = {doc: score for doc, score in scores.items() if doc not in unwanted}
        n_removed += len(scores) - len(rest)
        if rest:  # a query that lost all of them counts as missing
            kept[qid] = rest
    return kept, n_removed


def tie_report(qrels, run, k=10, *, complete=False):
    """What ties decide in NDCG@k: its mean for the worst and the best order, and its expectation.

    slots: the first k ranks of every query that both have; decided: those that share their score.
    """
    queries = [qid for qid in qrels if run.get(qid)]
    n_queries = len(qrels) if complete else len(queries)
    report = {"k": k, "slots": 0, "decided": 0, "worst": 0.0, "expected": 0.0, "best": 0.0}
    for qid in queries:
        values, ids, judged = as_float32(run[qid]), list(run[qid]), qrels[qid]
        last = np.sort(values)[-k:][0]  # the score at rank k: lower ones stay out
        places = np.flatnonzero(values >= last)
        top = [(float(values[i]), max(judged.get(ids[i], 0), 0)) for i in places]
        scores, best = zip(*sorted(top, reverse=True), strict=True)
        worst = [gain for _, gain in sorted(top, key=lambda pair: (-pair[0], pair[1]))]
        orders = {"worst": worst, "expected": tie_averaged(scores, best), "best": best}
        for name, order in orders.items():
            report[name] += ndcg(order, judged.values(), k) / n_queries
        shared = collections.Counter(scores)
        report["slots"] += len(scores[:k])
        report["decided"] += sum(shared[score] > 1 for score in scores[:k])
    return report


def compare_runs(values_a, values_b, *, seed=0):
    """Paired comparison b - a of {query id: value}, over the queries that both have.

    The two-sided randomisation test of a mean difference of 0 (10,000 random signs) and the
    bootstrap's interval of 95 % (10,000 samples).
    """
    d = np.array([values_b[qid] - values_a[qid] for qid in values_a if qid in values_b])  # (n,)
    if (n := len(d)) == 0:
        raise ValueError("the runs have no query in common")
    rng, at_least, means = np.random.default_rng(seed), 1, []  # the observed signs count as one
    for _ in range(10):  # in blocks, for memory
        flipped = rng.choice([-1.0, 1.0], (1000, n)) @ d / n
        at_least += int((np.abs(flipped) >= abs(d.mean()) - 1e-12).sum())
        means.append(d[rng.integers(0, n, (1000, n))].mean(axis=1))
    low, high = np.percentile(means, [2.5, 97.5])
    wins, losses = int((d > 1e-12).sum()), int((d < -1e-12).sum())
    return {"queries": n, "difference": float(d.mean()), "wins": wins, "ties": n - wins - losses,
            "losses": losses, "p_randomisation": at_least / 10_001,
            "interval": [float(low), float(high)]}  # fmt: skip


# --- The paper's benchmarks -----------------------------------------------------------------------
# NDCG@10 that the paper (v3) publishes for reranking the top 100 of DIVER-Retriever-4B (retriever).
# BM25 has GPT-4's rewritten queries on BRIGHT (Table 14), original ones on R2MED.

TASKS = {
    "bright": "biology earth_science economics psychology robotics stackoverflow "
              "sustainable_living leetcode pony aops theoremqa_questions theoremqa_theorems",
    "r2med": "Biology Bioinformatics Medical-Sciences MedXpertQA-Exam MedQA-Diag PMC-Treatment "
             "PMC-Clinical IIYi-Clinical",
}  # fmt: skip
PUBLISHED = {  # tasks in the order of TASKS
    "bright": {
        "BM25": [53.6, 54.1, 24.3, 38.7, 18.9, 27.7, 26.3, 19.3, 17.6, 3.9, 19.2, 20.8],
        "retriever": [52.5, 53.6, 33.8, 45.2, 28.4, 30.4, 35.0, 13.0, 14.7, 9.8, 42.5, 36.3],
        "GroupRank-7B": [52.7, 51.0, 33.8, 44.5, 32.1, 33.9, 38.1, 16.3, 17.3, 8.7, 40.7, 42.4],
        "GroupRank-32B": [59.0, 57.5, 39.2, 50.0, 39.1, 39.0, 42.7, 14.3, 14.9, 12.6, 39.0, 48.8],
    },
    "r2med": {
        "BM25": [19.19, 21.55, 19.68, 0.66, 2.55, 23.69, 21.66, 12.02],
        "retriever": [49.3, 60.4, 57.9, 18.6, 22.6, 58.7, 44.1, 31.8],
        "GroupRank-7B": [56.7, 65.4, 64.2, 27.3, 30.5, 64.6, 43.2, 30.9],
        "GroupRank-32B": [59.5, 69.7, 66.3, 28.8, 41.5, 67.6, 52.2, 32.7],
    },
}


def _fetch(repo, patterns, source):
    """The folder with a data set's files: `source`, or what huggingface_hub downloads."""
    if source is not None:
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo, repo_type="dataset", allow_patterns=patterns))


def read_rows(folder, stem):
    """Yield the rows (dicts) of a table STEM: JSON lines or parquet, one or many files."""
    names = [f"{stem}.jsonl*", f"{stem}*.parquet", f"{stem}/*.jsonl*", f"{stem}/*.parquet"]
    files = next(filter(None, (sorted(folder.glob(name)) for name in names)), [])
    if not files:
        raise ValueError(f"{folder} has none of {', '.join(names)}")
    for file in files:
        if file.suffix != ".parquet":
            yield from read_jsonl(file)
            continue
        from pyarrow.parquet import ParquetFile

        for batch in ParquetFile(file).iter_batches():
            yield from batch.to_pylist()


def _load_bright(task, source):
    """xlangai/BRIGHT: every gold id has grade 1; *_reason hold the rewritten queries."""
    parts = [f"{part}/{task}-*" for part in ("documents", "examples", "*_reason")]
    folder = _fetch("xlangai/BRIGHT", parts, source)
    queries, qrels, excluded, rewritten = {}, {}, {}, {}
    for row in read_rows(folder, f"examples/{task}"):
        queries[row["id"]] = row["query"]
        qrels[row["id"]] = dict.fromkeys(row["gold_ids"], 1)
        excluded[row["id"]] = {*(row["excluded_ids"] or ())} - {"N/A"}
    for part in sorted(part.name for part in folder.glob("*_reason")):
        rewritten[part] = {row["id"]: row["query"] for row in read_rows(folder, f"{part}/{task}")}
    documents = ((row["id"], "", row["content"]) for row in read_rows(folder, f"documents/{task}"))
    return documents, queries, qrels, excluded, rewritten


def _load_r2med(task, source):
    """R2MED/TASK: corpus and query {id, text}, qrels {q_id, p_id, score} (older: qrels.txt)."""
    folder, qrels = _fetch(f"R2MED/{task}", None, source), {}
    if (folder / "qrels.txt").exists():
        qrels = read_qrels(folder / "qrels.txt")
    else:
        for row in read_rows(folder, "qrels"):
            qrels.setdefault(row["q_id"], {})[row["p_id"]] = row["score"]
    queries = {row["id"]: row["text"] for row in read_rows(folder, "query")}
    documents = ((row["id"], "", row["text"]) for row in read_rows(folder, "corpus"))
    return documents, queries, qrels, {}, {}


def _load_beir(task, source):
    """BeIR/NAME with BeIR/NAME-qrels, or a BEIR folder."""
    folder = _fetch(f"BeIR/{task}", None, source)
    apart = _fetch(f"BeIR/{task}-qrels", ["test.tsv"], source) / "test.tsv"
    qrels = read_qrels(apart if apart.exists() else folder / "qrels" / "test.tsv")
    queries = {row["_id"]: row["text"] for row in read_rows(folder, "queries")}
    documents = ((row["_id"], row.get("title"), row["text"]) for row in read_rows(folder, "corpus"))
    alike = task in ("arguana", "quora")  # queries are documents, and must not find themselves
    return documents, queries, qrels, {q: {q} for q in queries if alike and str(q) in qrels}, {}


def prepare(name, out, *, source=None):
    """Make the BEIR folder `out` of bright/TASK, r2med/TASK or beir/NAME, from the hub or `source`.

    Empty and repeated documents and queries without judgements are left out. Returns a line on it.
    """
    from tqdm import tqdm  # its import takes longer than --help: only here is it needed

    benchmark, _, task = name.partition("/")
    loaders = {"bright": _load_bright, "r2med": _load_r2med, "beir": _load_beir}
    tasks = TASKS.get(benchmark, task).split()
    if benchmark not in loaders or task not in tasks:
        raise ValueError(f"unknown benchmark {name!r}: bright/TASK, r2med/TASK or beir/NAME; "
                         f"{benchmark} has the tasks: {', '.join(tasks)}")  # fmt: skip
    corpus, n_left_out = {}, 0
    try:
        rows, queries, qrels, excluded, rewritten = loaders[benchmark](task, source)
        for doc, title, text in tqdm(rows, desc=name, unit=" documents", disable=None):
            if str(doc) in corpus or not f"{title or ''}{text or ''}".strip():
                n_left_out += 1
            else:
                corpus[str(doc)] = (title or "", text or "")
        if odd := [g for docs in qrels.values() for g in docs.values() if float(g) % 1]:
            raise ValueError(f"{name}: the grade {odd[0]} is no whole number; scale them before")
        qrels = {str(qid): {str(doc): int(float(grade)) for doc, grade in docs.items()}
                 for qid, docs in qrels.items()}  # fmt: skip
        queries = {str(qid): text for qid, text in queries.items() if str(qid) in qrels}
        excluded = {str(qid): set(map(str, docs)) for qid, docs in excluded.items()}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{name}: a row lacks a field or holds an odd value ({error})") from None
    judged = {doc for docs in qrels.values() for doc in docs}
    absent = judged - corpus.keys()
    if len(absent) > 0.01 * len(judged) or not queries:  # BEIR's arguana lacks 5 of its 1,406
        raise ValueError(f"{name}: {len(absent)} of {len(judged)} judged documents are missing")
    write_collection(out, corpus, queries, qrels, excluded)
    for kind, texts in rewritten.items():
        lines = ({"_id": str(qid), "text": text} for qid, text in texts.items())
        write_lines(f"{out}/queries.{kind}.jsonl", lines)
    return (f"{out}: {len(corpus)} documents ({n_left_out} left out, {len(absent)} judged ones "
            f"absent), {len(queries)} queries, rewritten as {', '.join(rewritten) or 'none'}")


# --- Pictures -------------------------------------------------------------------------------------

CURVES = (  # of metrics.jsonl; what was not logged is not drawn
    "reward", "reward/ndcg", "reward/recall", "reward/alignment", "eval/ndcg@10", "format_ok",
    "truncated", "zero_spread", "kl", "entropy", "completion_tokens", "loss", "grad_norm",
)  # fmt: skip


def _plot_training(figure, rows):
    """A panel for each of CURVES: all values, thin, and their running mean over 5 % of them."""
    n_sft = max((row["step"] for row in rows if row["stage"] == "sft"), default=0)
    logged = [key for key in CURVES if any(key in row for row in rows)]
    n_rows = math.ceil(len(logged) / 3)
    figure.set_size_inches(8, 1.7 * n_rows)
    for number, key in enumerate(logged, start=1):
        points = [(row["step"] + n_sft * (row["stage"] == "grpo"), row[key])
                  for row in rows if key in row]  # fmt: skip
        x, y = np.array(points, dtype=float).T
        width = max(1, len(y) // 20)
        smooth = np.convolve(y, np.ones(width) / width, mode="valid")
        axis = figure.add_subplot(n_rows, 3, number, title=key, xlabel="step (SFT, then GRPO)")
        axis.plot(x, y, color="C0", alpha=0.3, linewidth=0.8)
        axis.plot(x[width // 2 :][: len(smooth)], smooth, color="C0")
        axis.axvline(n_sft, color="gray", linestyle=":", linewidth=1)


def _plot_pair(figure, report):
    """Per-query differences of the first two runs of a report, for its first measure."""
    (a, first), (b, second), *_ = report["per_query"].items()
    metric = next(iter(first))
    first, second = first[metric], second[metric]
    differences = sorted((100 * (second[q] - first[q]) for q in first if q in second), reverse=True)
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    figure.set_size_inches(6.4, 2.8)
    axis = figure.add_subplot()
    axis.bar(range(1, len(differences) + 1), differences, width=1.0)
    axis.axhline(np.mean(differences), color="black", linestyle=":")
    axis.set(xlabel="queries, sorted; dotted: mean", ylabel=f"{metric}, difference in points")
    axis.set_title(f"{b} - {a}: {wins} better, {losses} worse, {len(differences)} queries")


def plot(path, out):
    """Draw metrics.jsonl, or the .json that --json printed for two runs; OUT's suffix counts."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    is_log = Path(path).suffix == ".jsonl"
    with numbered_lines(path) as lines:
        rows = list(map(json.loads, lines)) if is_log else json.loads("".join(lines))
    style = {"font.size": 8, "axes.titlesize": 8, "axes.grid": True, "grid.alpha": 0.3}
    with rc_context(style), open_atomic(out, "wb") as file:
        figure = Figure(layout="constrained")
        try:
            (_plot_training if is_log else _plot_pair)(figure, rows)
            figure.savefig(file, format=Path(out).suffix[1:] or "png", dpi=150)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{path} has nothing to draw or lacks a field ({error})") from None


# --- Command line ---------------------------------------------------------------------------------


def table(title, rows):
    """{row name: {column: value}} as aligned text; fractions, but not p-values, times 100."""
    def text(column, x):
        if isinstance(x, list):
            return " to ".join(text(column, part) for part in x)
        if isinstance(x, float):
            return f"{x:.4f}" if column.startswith("p_") else f"{100 * x:.2f}"
        return "-" if x is None else str(x)

    lines = [[title, *next(iter(rows.values()))]]
    lines += [[name, *itertools.starmap(text, row.items())] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join(map("  ".join, aligned))


def evaluate_files(args):
    """All numbers for --qrels and each --run, as --json prints them."""
    given = Path(args.qrels)
    given = find_packed(given / "qrels" / "test.tsv") if given.is_dir() else given
    path, qrels = given.absolute(), read_qrels(given)
    exclusions = find_packed(path.parent.parent / "excluded.tsv")
    in_folder = path.parent.name == "qrels" and exclusions.exists()
    excluded = read_excluded(exclusions) if in_folder else {}
    report = {"runs": {}, "queries": {}, "ties": {}, "comparisons": {}, "per_query": {}}
    for file in args.run:
        name = Path(file.removesuffix(".gz")).stem
        name = file if name in report["runs"] else name  # a.run of another folder
        run, n_removed = remove_documents(read_run(file), excluded, args.ignore_identical_ids)
        n_scored = len(run.keys() & qrels.keys())
        if n_scored == 0:
            raise ValueError(f"{file} and {args.qrels} share no query: of one collection?")
        values = evaluate_run(qrels, run, args.metrics, relevance_level=args.relevance_level,
                              complete=args.complete)  # fmt: skip
        report["per_query"][name] = values
        report["runs"][name] = {m: math.fsum(of.values()) / len(of) for m, of in values.items()}
        report["queries"][name] = {
            "scored": n_scored, "missing in the run": len(qrels) - n_scored,
            "without judgements": len(run) - n_scored, "documents excluded": n_removed}  # fmt: skip
        report["ties"][name] = tie_report(qrels, run, complete=args.complete)
    first, *others = report["per_query"].items()
    for (name, values), metric in itertools.product(others, args.metrics):
        compared = compare_runs(first[1][metric], values[metric], seed=args.seed)
        report["comparisons"][f"{name} - {first[0]}, {metric}"] = compared
    if args.paper:  # the task is biology of biology/qrels/test.tsv, and of biology.qrels
        task = path.parts[-3] if in_folder else path.name.partition(".")[0]
        tasks = TASKS[args.paper].split()
        if task not in tasks:
            raise ValueError(f"{task!r} is no task of {args.paper}: {', '.join(tasks)}")
        for system, figures in PUBLISHED[args.paper].items():
            value = figures[tasks.index(task)] / 100
            row = {metric: value if metric == "ndcg@10" else None for metric in args.metrics}
            report["runs"][f"{system} (published)"] = row
    return report


def build_parser():
    """The options, grouped as --help shows them."""
    about, _, commands, *_ = __doc__.split("\n\n")
    form, flag = argparse.RawDescriptionHelpFormatter, {"action": "store_true"}
    parser = argparse.ArgumentParser(description=about, epilog=commands, formatter_class=form,
                                     usage="evaluate.py [options], see --help")
    add = parser.add_argument_group("evaluate runs").add_argument
    add("--qrels", help="judgements: TREC, BEIR or JSON")
    add("--run", nargs="+", action="extend", help="TREC or JSON; compared with the first one")
    add("--metrics", nargs="+", default=["ndcg@10", "recall@100", "map", "mrr@10"],
        help="ndcg recall p map mrr, each with @k")
    add("--complete", **flag, help="mean over all judged queries, missing ones 0")
    add("--relevance-level", type=int, default=1, help="relevant from this grade on")
    add("--ignore-identical-ids", **flag, help="drop documents named like their query")
    add = parser.add_argument_group("output").add_argument
    add("--json", **flag, help="print everything as JSON, each query too; fractions 0-1")
    add("--paper", choices=list(PUBLISHED), help="add the paper's NDCG@10")
    add("--out", help="of --prepare (a folder) or --plot (a picture)")
    add("--overwrite", **flag, help="replace outputs that exist")
    add("--seed", type=int, default=0, help="of the randomisation test and the bootstrap")
    add = parser.add_argument_group("prepare a benchmark, or draw a picture").add_argument
    add("--prepare", help="bright/TASK, r2med/TASK or beir/NAME, as a BEIR folder")
    add("--source", help="folder of a local clone, instead of the Hugging Face hub")
    add("--plot", help="metrics.jsonl, or the .json that --json printed for two runs")
    return parser


def main():
    """Parse the command line and run one of the three commands."""
    parser = build_parser()
    args = parser.parse_args()
    if args.prepare:
        out = args.out or f"data/{args.prepare}"
        refuse_overwrite(out, args.overwrite)
        print(prepare(args.prepare, out, source=args.source))
    elif args.plot:
        out = args.out or Path(args.plot).with_suffix(".png")
        refuse_overwrite(out, args.overwrite)
        plot(args.plot, out)
        print(f"drew {out}")
    elif args.qrels and args.run:
        report = evaluate_files(args)
        if args.json:
            print(json.dumps(report, indent=1))
            return
        over = "all judged queries (--complete)" if args.complete else "queries in both"
        print(f"{args.qrels}: relevant from grade {args.relevance_level}; mean over {over}")
        titles = {"runs": "run", "queries": "queries", "ties": "ndcg@k", "comparisons": "paired"}
        for part in filter(report.get, titles):
            print("\n" + table(titles[part], report[part]))
    else:
        parser.error("nothing to do: give --qrels and --run, --prepare or --plot")


if __name__ == "__main__":
    run_cli(main)
