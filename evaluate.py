"""Evaluation for reranking: exact measures, run files, a BM25 baseline, the paper's benchmarks.

Self-contained (numpy and tqdm), for GroupRank (arXiv 2511.11653v3) and for any other ranking.

    python evaluate.py --qrels qrels.tsv --run a.run b.run                 # table, ties, paired tests
    python evaluate.py --qrels qrels.tsv --run a.run --metrics ndcg@10 recall@100 map mrr@10
    python evaluate.py --prepare bright/biology --out bright/biology       # a benchmark, as a BEIR folder
    python evaluate.py --qrels bright/biology/qrels/test.tsv --run a.run --paper bright
    python evaluate.py --plot runs/demo/metrics.jsonl --out curves.png

Sections: errors and output files - measures - ties - run and qrels files - collections - BM25 -
evaluating a run - comparing two runs - benchmarks of the paper - tables - pictures - command line.

Choices, each the convention of trec_eval unless said otherwise:
 1. A run is sorted by score, descending, and equal scores by document id, descending, compared as
    bytes. Scores are compared as float32, because that is how trec_eval keeps them: scores that
    differ only beyond it are ties. The rank column is ignored. `--ties first-stage` keeps ties in
    the order of the run file's lines (or of the run given with `--first-stage`).
 2. NDCG has linear gain and discount log2(rank + 1) (Eq. 9 of the paper); `--gain exponential`
    is 2^grade - 1. A document without judgement is not relevant; a negative grade has gain 0.
 3. A query without any relevant document scores 0 and is counted. Means run over the queries that
    both files have; `--complete` (trec_eval's -c) runs over all judged queries, missing ones 0.
 4. AP, recall, precision, reciprocal rank and success call a document relevant at grade >= 1
    (`--relevance-level`). Precision@k divides by k even where fewer documents were retrieved.
 5. judged@k divides by the number of documents retrieved, at most k (trec_eval has no such measure).
 6. RBO is RBO_ext of Webber, Moffat and Zobel (2010, Eq. 32).
"""

import argparse
import collections
import contextlib
import dataclasses
import gzip
import io
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

# --- Errors and output files ----------------------------------------------------------------------


def run_cli(main):
    """Run `main()`; a user's mistake becomes one line `error: ...` and exit status 2, no traceback.

    A mistake is a ValueError, an OSError or the ImportError of an optional package. Other
    exceptions are faults of ours and keep their traceback (all do, with GROUPRANK_TRACEBACK=1).
    """
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("GROUPRANK_TRACEBACK"):
            raise
        named = isinstance(error, OSError) and error.filename is not None and error.strerror
        message = f"{error.filename}: {error.strerror}" if named else str(error)
        print("error: " + " ".join(message.split()), file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def open_atomic(path, mode="w"):
    """Open a file for writing that appears under its name only when it is complete.

    It is written beside `path` under a temporary name, flushed to the disk and renamed; after an
    exception nothing is left and an older file at `path` is untouched. Text is UTF-8 with "\\n".
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
    taken = any(path.iterdir()) if path.is_dir() else path.exists()
    if taken and not overwrite:
        raise ValueError(f"{path} exists; choose another name or add --overwrite")


# --- Measures -------------------------------------------------------------------------------------
# One function per formula; each works when it is copied alone (import numpy as np, math).
# ranked_grades: grades in the order of the ranking, 0 where there is no judgement.
# judged_grades: all judged grades of the query, in any order, retrieved or not.


def ndcg(ranked_grades, judged_grades, k=10, *, exponential=False):
    """Normalised discounted cumulative gain of the first k documents, in [0, 1].

    NDCG@k = DCG@k / ideal DCG@k,  DCG@k = sum_{i=1..k} gain_i / log2(i + 1)     (trec_eval ndcg_cut)

    gain = max(grade, 0), or 2^grade - 1 with `exponential`. k=None: the whole list. The ideal ranks
    all `judged_grades`. No relevant document: 0.0. Linear in the gains of the ranking, so grades
    averaged over ties (`tie_averaged`) give the expected NDCG.
    """

    def dcg(grades):
        gains = (max(grade, 0.0) for grade in grades[:k])
        if exponential:
            gains = (2.0**gain - 1.0 for gain in gains)
        return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))

    ideal = dcg(sorted((float(grade) for grade in judged_grades), reverse=True))
    return dcg([float(grade) for grade in ranked_grades[:k]]) / ideal if ideal > 0 else 0.0


def recall(ranked_grades, judged_grades, k=None, *, level=1):
    """Share of the relevant documents (grade >= level) found in the first k; none relevant: 0.0.

    recall@k = |relevant in the first k| / |relevant|     (k=None: the whole list)
    """
    relevant = sum(float(grade) >= level for grade in judged_grades)
    found = sum(float(grade) >= level for grade in ranked_grades[:k])
    return found / relevant if relevant else 0.0


def precision(ranked_grades, k=None, *, level=1):
    """Share of relevant documents (grade >= level) among the first k.

    P@k = |relevant in the first k| / k     (k also where fewer are retrieved; k=None: their number)
    """
    found = sum(float(grade) >= level for grade in ranked_grades[:k])
    depth = len(ranked_grades) if k is None else k
    return found / depth if depth else 0.0


def average_precision(ranked_grades, judged_grades, k=None, *, level=1):
    """Mean over all relevant documents (grade >= level) of the precision at their rank.

    AP@k = sum_{i<=k, relevant} P@i / |relevant|     (not retrieved: 0; no relevant document: 0.0)
    """
    relevant = sum(float(grade) >= level for grade in judged_grades)
    found, total = 0, 0.0
    for rank, grade in enumerate(ranked_grades[:k], start=1):
        if float(grade) >= level:
            found += 1
            total += found / rank
    return total / relevant if relevant else 0.0


def reciprocal_rank(ranked_grades, k=None, *, level=1):
    """RR@k = 1 / rank of the first relevant document (grade >= level), 0.0 if none is in the first k."""
    for rank, grade in enumerate(ranked_grades[:k], start=1):
        if float(grade) >= level:
            return 1.0 / rank
    return 0.0


def success(ranked_grades, k=None, *, level=1):
    """success@k = 1.0 if a document with grade >= level is among the first k, else 0.0."""
    return float(any(float(grade) >= level for grade in ranked_grades[:k]))


def judged(ranked_flags, k=None):
    """judged@k = share of the first k retrieved documents that have a judgement at all.

    ranked_flags: true where the document is judged, in the order of the ranking. Empty list: 0.0.
    """
    flags = [bool(flag) for flag in ranked_flags[:k]]
    return sum(flags) / len(flags) if flags else 0.0


def rank_biased_overlap(ranking_a, ranking_b, p=0.9):
    """Extrapolated rank-biased overlap (RBO_ext; Webber et al. 2010, Eq. 32) of two finite lists.

    RBO = (1-p)/p (sum_{d=1..l} X_d/d p^d + sum_{d=s+1..l} X_s (d-s)/(s d) p^d)
          + ((X_l - X_s)/l + X_s/s) p^l

    X_d: number of documents that the first d of both share; s <= l: the lengths. In [0, 1]: 1 for
    identical lists (two empty ones too), 0 for disjoint ones (or one empty). On two orders of the
    same documents it is > 0, and p sets how much the top counts: the first 10 ranks hold about 86 %
    of the weight at p = 0.9. Raises ValueError unless 0 < p < 1 and no list repeats a document.
    """
    a, b = list(ranking_a), list(ranking_b)
    if not 0.0 < p < 1.0:
        raise ValueError(f"p must lie between 0 and 1, got {p}")
    if len(set(a)) < len(a) or len(set(b)) < len(b):
        raise ValueError("a ranking holds the same document twice")
    s, l = sorted((len(a), len(b)))
    if s == 0:
        return float(l == 0)
    seen_a, seen_b, shared, x = set(), set(), 0, [0]  # x[d] is X_d
    for d in range(l):
        for document in a[d : d + 1]:
            shared += document in seen_b
            seen_a.add(document)
        for document in b[d : d + 1]:
            shared += document in seen_a
            seen_b.add(document)
        x.append(shared)
    agreement = sum(x[d] / d * p**d for d in range(1, l + 1))
    agreement += sum(x[s] * (d - s) / (s * d) * p**d for d in range(s + 1, l + 1))
    tail = ((x[l] - x[s]) / l + x[s] / s) * p**l
    return min(1.0, (1 - p) / p * agreement + tail)


# --- Ties -----------------------------------------------------------------------------------------


def sort_run(scores):
    """Document ids of {id: score} in trec_eval's order: float32 score, then id, both descending.

    Ids are compared as UTF-8 bytes (strcmp); Python's order of code points is the same order.
    Scores beyond float32 become infinite and tie. Raises ValueError on nan or infinite scores.
    """
    values = as_float32(scores)
    return [doc for _, doc in sorted(zip(values.tolist(), scores), reverse=True)]


def as_float32(scores):
    """The scores of {id: score} as a float32 array, in the order of the dict."""
    values = np.fromiter(scores.values(), dtype=np.float64, count=len(scores))
    if not np.isfinite(values).all():
        bad = next(doc for doc, score in scores.items() if not math.isfinite(score))
        raise ValueError(f"document {bad}: score {scores[bad]} is not a finite number")
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def tie_averaged(scores, values):
    """`values` in descending order of `scores`, each run of tied scores replaced by its mean value.

    DCG, recall@k and precision@k are linear in the values (gains; 0/1 relevance), so a measure of the
    averaged values is its exact expectation over all orders of the ties:

        expected NDCG@k   = ndcg(tie_averaged(scores, gains), gains, k)
        expected recall@k = sum(tie_averaged(scores, relevant)[:k]) / sum(relevant)

    Both arguments have length N; the result is a list of N floats that does not depend on the order
    of the documents. Scores are compared exactly as they are given.
    """
    order = sorted(range(len(scores)), key=lambda i: -float(scores[i]))
    averaged, start = [], 0
    while start < len(order):
        stop = start
        while stop < len(order) and float(scores[order[stop]]) == float(scores[order[start]]):
            stop += 1
        tied = sorted(float(values[i]) for i in order[start:stop])  # sorted: same sum in any order
        averaged += [math.fsum(tied) / len(tied)] * len(tied)
        start = stop
    return averaged


def minmax(values):
    """Scale a list of numbers to [0, 1]: (v - min) / (max - min); a constant list becomes zeros."""
    numbers = [float(value) for value in values]
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError("min-max scaling needs finite numbers")
    low, high = min(numbers, default=0.0), max(numbers, default=0.0)
    return [(number - low) / (high - low) if high > low else 0.0 for number in numbers]


# --- Run and qrels files --------------------------------------------------------------------------

CHUNK = 1 << 22  # bytes read at a time: bounds the memory for tokens (guess; 1-16 MiB are alike)
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
RUN_LINE = {  # for lines that do not have exactly six columns: where does the id end, the tag begin?
    greedy: re.compile(
        rf"\s*(\S+)\s+\S+\s+(\S.*{lazy})\s+[-+]?\d+\s+({NUMBER})\s+(\S.*?)\s*", re.ASCII
    )
    for greedy, lazy in ((True, ""), (False, "?"))
}


def open_input(path):
    """Open a file for reading bytes; a gzip file (by its first bytes) is unpacked on the fly."""
    file = open(path, "rb")  # noqa: SIM115  (the caller closes it)
    packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return io.BufferedReader(gzip.GzipFile(fileobj=file)) if packed else file


def read_lines(path):
    """Yield (line number, line) of a UTF-8 text file, plain or gzip, without blank lines."""
    with open_input(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip(" \t\r\n")
            except UnicodeDecodeError:
                raise ValueError(f"{path}, line {number}: not UTF-8 text") from None
            if text:
                yield number, text


def read_json_object(path):
    """The content of a JSON file that holds an object, or None if the file is something else."""
    with open_input(path) as file:
        if not file.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            return None
        try:
            return json.loads(file.read().decode("utf-8-sig"), object_pairs_hook=_unique_pairs)
        except ValueError as error:  # JSONDecodeError, UnicodeDecodeError and repeated keys
            raise ValueError(f"{path}: {error}") from None


def _unique_pairs(pairs):
    """A dict of the pairs of one JSON object; a plain load would hide repeated ids."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        twice = collections.Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"id {twice!r} appears twice")
    return mapping


def read_run(path):
    """Read a run, {query id: {document id: score}}, in the order of the file.

    TREC: `qid Q0 docid rank score tag`, by tabs or spaces, plain or gzip; or JSON of that dict. Ids
    may hold spaces where tabs or the numbers beside them decide. Raises ValueError, naming file and
    line or ids, on malformed lines, scores that are not finite, and a document listed twice.
    """
    table = read_json_object(path)
    if table is not None:
        return {qid: _check_scores(path, qid, scores) for qid, scores in table.items()}
    run, intern, n_lines, tags = {}, {}, 0, set()
    with open_input(path) as file:
        while chunk := file.read(CHUNK) + file.readline():
            columns = _split_plain(chunk) or _split_odd(path, chunk, n_lines, tags)
            n_lines += chunk.count(b"\n")
            _add_to_run(path, run, *columns, intern)
    if not run:
        raise ValueError(f"{path}: the run is empty")
    return run


def _split_plain(chunk):
    """Columns (qids, docids, scores) of a chunk whose lines all have six plain columns, or None.

    A mark is put at each line's end before everything is split at once: that every seventh token
    is a mark proves that each line had six columns. Anything odd is left to `_split_odd`.
    """
    if not chunk.isascii() or b"\0" in chunk:
        return None
    text = chunk.decode("ascii") + ("" if chunk.endswith(b"\n") else "\n")
    tokens = text.replace("\n", " \0 ").split()
    if len(tokens) % 7 or tokens[6::7].count("\0") * 7 != len(tokens):
        return None
    try:
        scores = list(map(float, tokens[4::7]))
    except ValueError:
        return None
    return (tokens[0::7], tokens[2::7], scores) if np.isfinite(scores).all() else None


def _split_odd(path, chunk, n_lines, tags):
    """Columns of a chunk, line by line: ids or tags with spaces, other scripts, and errors.

    `tags` collects the run tags seen so far; they settle lines that could be read in two ways.
    """
    qids, docids, scores = [], [], []
    for number, line in enumerate(chunk.split(b"\n"), start=n_lines + 1):
        where = f"{path}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip(" \t\r")
        except UnicodeDecodeError:
            raise ValueError(f"{where}: not UTF-8 text") from None
        if text:
            qid, docid, score = _split_run_line(where, text, tags)
            qids.append(qid)
            docids.append(docid)
            scores.append(score)
    return qids, docids, scores


def _split_run_line(where, text, tags):
    """(qid, docid, score) of one line of a run; raises ValueError when it is not decidable."""
    fields = [field.strip() for field in text.split("\t", 5)]
    if len(fields) < 6:
        fields = re.split(r"\s+", text, flags=re.ASCII)
    if len(fields) == 6:
        qid, docid, score = fields[0], fields[2], fields[4]
    else:
        found = [match.groups() for form in RUN_LINE.values() if (match := form.fullmatch(text))]
        if not found:
            raise ValueError(f"{where}: expected six columns `qid Q0 docid rank score tag`: {text!r}")
        chosen = set(found) if len(set(found)) == 1 else {f for f in found if f[3] in tags}
        if len(chosen) != 1:
            raise ValueError(f"{where}: can be read in two ways, separate columns by tabs: {text!r}")
        qid, docid, score, tag = chosen.pop()
        tags.add(tag)
    try:
        if math.isfinite(float(score)):
            return qid, docid, float(score)
    except ValueError:
        pass
    raise ValueError(f"{where}: score {score!r} is not a finite number")


def _add_to_run(path, run, qids, docids, scores, intern):
    """Add columns of lines to `run`, a block of equal query ids at a time."""
    docids = list(map(intern.setdefault, docids, docids))  # one string per document, not per line
    changes = itertools.compress(itertools.count(1), map(operator.ne, qids, qids[1:]))
    for start, stop in itertools.pairwise([0, *changes, len(qids)]):
        if start == stop:
            continue
        block = dict(zip(docids[start:stop], scores[start:stop]))
        known = run.setdefault(intern.setdefault(qids[start], qids[start]), block)
        expected = stop - start
        if known is not block:
            expected += len(known)
            known.update(block)
        if len(known) < expected:
            counts = collections.Counter(docids[start:stop])
            twice = next((d for d, n in counts.items() if n > 1), None)
            twice = twice or "one of " + ", ".join(sorted(counts)[:3])
            raise ValueError(f"{path}: query {qids[start]} lists document {twice} twice")


def _check_scores(path, qid, scores):
    """One query of a JSON run as {docid: float}, or ValueError."""
    if not isinstance(scores, dict):
        raise ValueError(f"{path}: query {qid}: expected {{docid: score}}, got {scores!r:.60}")
    for docid, score in scores.items():
        if isinstance(score, bool) or not isinstance(score, (int, float)):
            raise ValueError(f"{path}: query {qid}, document {docid}: {score!r:.40} is no number")
        if not abs(score) <= sys.float_info.max:  # also true for nan
            raise ValueError(f"{path}: query {qid}, document {docid}: score {score} is not finite")
    return {docid: float(score) for docid, score in scores.items()}


def strictly_decreasing(scores):
    """The float32 numbers nearest from below to `scores` that decrease strictly, in this order.

    s_i = min(float32(score_i), the next float32 below s_{i-1}): a list that already decreases is
    only rounded. Raises ValueError on numbers that float32 cannot hold.
    """
    result, limit = [], np.float32(np.inf)
    for score in scores:
        with np.errstate(over="ignore"):
            value = min(np.float32(score), np.nextafter(limit, np.float32(-np.inf)))
        if not np.isfinite(value):
            raise ValueError(f"score {score} does not fit into a float32")
        result.append(value)
        limit = value
    return result


def write_run(path, rankings, tag="grouprank"):
    """Write {query id: [(document id, score), ...]}, best first, as a TREC run that reads the same.

    Scores are written as `strictly_decreasing` makes them, with all digits, so that every evaluator
    sees this order, ties or not. Columns are separated by spaces, or by tabs when an id holds spaces.
    """
    ids = itertools.chain(rankings, (doc for ranking in rankings.values() for doc, _ in ranking))
    spaced = any(re.search(r"\s", name, re.ASCII) for name in ids)
    if re.search(r"\s", tag):
        raise ValueError(f"run tag {tag!r} holds a space")
    with open_atomic(path) as file:
        for qid, ranking in rankings.items():
            if len({doc for doc, _ in ranking}) < len(ranking):
                raise ValueError(f"query {qid} ranks a document twice")
            values = strictly_decreasing(score for _, score in ranking)
            for rank, ((doc, _), value) in enumerate(zip(ranking, values), start=1):
                fields = (qid, "Q0", doc, str(rank), repr(float(value)), tag)
                if not qid or not doc or re.search(r"[\t\r\n]", qid + doc):
                    raise ValueError(f"id {doc!r} of query {qid!r} is empty or holds a tab or newline")
                file.write(("\t" if spaced else " ").join(fields) + "\n")


def read_qrels(path):
    """Read judgements, {query id: {document id: grade}}, as integers.

    TREC (`qid 0 docid grade`), BEIR (a header `query-id corpus-id score`), by tabs or spaces, plain
    or gzip, or JSON of that dict. Raises ValueError, naming the line, on anything else and on
    two different grades for one document.
    """
    table = read_json_object(path)
    if table is not None:
        rows = ((f"{path}: query {q}", q, d, g) for q, docs in table.items() for d, g in docs.items())
    else:
        rows = _qrels_rows(path)
    qrels = {}
    for where, qid, docid, grade in rows:
        try:
            number = int(grade)
        except ValueError:
            raise ValueError(f"{where}: grade {grade!r} is not an integer") from None
        if qrels.setdefault(qid, {}).setdefault(docid, number) != number:
            raise ValueError(f"{where}: document {docid} of query {qid} has two grades")
    if not qrels:
        raise ValueError(f"{path}: no judgement in the file")
    return qrels


def _qrels_rows(path):
    """Yield (where, qid, docid, grade) of a qrels file with three or four columns."""
    n_columns = None
    for number, line in read_lines(path):
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) == 1:
            fields = re.split(r"\s+", line, flags=re.ASCII)
        if n_columns is None:  # the first line tells: BEIR has three columns, TREC four
            n_columns = 3 if len(fields) == 3 else 4
            if n_columns == 3 and fields[0] in ("query-id", "query_id", "q_id", "qid"):
                continue
        if len(fields) < n_columns:
            raise ValueError(f"{path}, line {number}: expected {n_columns} columns: {line!r}")
        docid = " ".join(fields[n_columns - 2 : -1])  # an id with spaces
        yield f"{path}, line {number}", fields[0], docid, fields[-1]


# --- Collections: BEIR folders --------------------------------------------------------------------


@dataclasses.dataclass
class Collection:
    """What a BEIR folder holds. A document's text starts with its title, where it has one."""

    corpus: dict  # {document id: text}
    queries: dict  # {query id: text}
    qrels: dict  # {query id: {document id: grade}}, empty without judgements
    excluded: dict  # {query id: {document id, ...}}: never to be retrieved for that query (BRIGHT)


def read_collection(folder, queries=None, split="test"):
    """Read a BEIR folder: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv, excluded.tsv (if present).

    `queries`: the NAME of rewritten queries, read from queries.NAME.jsonl instead. Without a qrels
    folder the qrels are empty. Raises ValueError naming file, line or id on missing files or
    keys, repeated ids, empty documents and queries.
    """
    folder = Path(folder)
    query_file = folder / (f"queries.{queries}.jsonl" if queries else "queries.jsonl")
    for needed in (folder / "corpus.jsonl", query_file):
        if not needed.is_file():
            there = sorted(path.name for path in folder.glob("*.jsonl")) or "no .jsonl file"
            raise ValueError(f"{needed} is missing: {folder} is not a BEIR folder with it ({there})")
    qrels_file = folder / "qrels" / f"{split}.tsv"
    if qrels_file.parent.is_dir() and not qrels_file.is_file():
        splits = ", ".join(sorted(path.stem for path in qrels_file.parent.glob("*.tsv"))) or "none"
        raise ValueError(f"{qrels_file} is missing; splits there: {splits}")
    excluded_file = folder / "excluded.tsv"
    return Collection(
        corpus=_read_texts(folder / "corpus.jsonl"),
        queries=_read_texts(query_file),
        qrels=read_qrels(qrels_file) if qrels_file.is_file() else {},
        excluded=read_excluded(excluded_file) if excluded_file.is_file() else {},
    )


def read_jsonl(path):
    """Yield (line number, object) of a JSON-lines file, plain or gzip; ValueError names the line."""
    for number, line in read_lines(path):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object")
        yield number, row


def _read_texts(path):
    """{_id: text} of corpus.jsonl or queries.jsonl, the title in front."""
    texts = {}
    for number, row in read_jsonl(path):
        where = f"{path}, line {number}"
        if not isinstance(row.get("_id"), str) or not isinstance(row.get("text"), str):
            raise ValueError(f"{where}: needs the keys `_id` and `text`, both strings")
        text = join_title(row.get("title"), row["text"])
        if not text.strip():
            raise ValueError(f"{where}: {row['_id']!r} has no text; fill it in or remove the line")
        if texts.setdefault(row["_id"], text) is not text:
            raise ValueError(f"{where}: id {row['_id']!r} appears twice")
    if not texts:
        raise ValueError(f"{path} is empty")
    return texts


def join_title(title, text):
    """A document as every part of the project sees it: title, newline, text; or the text alone."""
    return "\n".join(part for part in ((title or "").strip(), text) if part)


def read_excluded(path):
    """Read excluded.tsv (query-id, corpus-id; a header is skipped): {query id: {document id, ...}}."""
    excluded = {}
    for number, line in read_lines(path):
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) != 2:
            raise ValueError(f"{path}, line {number}: expected query-id, tab, corpus-id: {line!r}")
        if number > 1 or fields[0] != "query-id":
            excluded.setdefault(fields[0], set()).add(fields[1])
    return excluded


def write_collection(folder, corpus, queries, qrels, excluded=None, split="test"):
    """Write a BEIR folder that `read_collection` reads back; files that are there are replaced.

    corpus: {id: text} or {id: (title, text)}, or an iterable of such pairs (any size);
    queries: {id: text}; qrels: {qid: {docid: grade}}; excluded: {qid: iterable of docids}.
    """
    folder = Path(folder)
    pairs = corpus.items() if isinstance(corpus, dict) else corpus
    titled = ((doc, ("", text) if isinstance(text, str) else text) for doc, text in pairs)
    rows = ({"_id": doc, "title": title, "text": text} for doc, (title, text) in titled)
    write_jsonl(folder / "corpus.jsonl", rows)
    write_jsonl(folder / "queries.jsonl", ({"_id": q, "text": t} for q, t in queries.items()))
    write_tsv(
        folder / "qrels" / f"{split}.tsv",
        ("query-id", "corpus-id", "score"),
        ((qid, doc, grade) for qid, docs in qrels.items() for doc, grade in docs.items()),
    )
    if excluded:
        pairs = ((qid, doc) for qid, docs in excluded.items() for doc in sorted(docs))
        write_tsv(folder / "excluded.tsv", ("query-id", "corpus-id"), pairs)


def write_jsonl(path, rows):
    """Write dicts as JSON lines, atomically."""
    with open_atomic(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_tsv(path, header, rows):
    """Write rows as tab-separated values, atomically; ValueError on a value with tab or newline."""
    with open_atomic(path) as file:
        for row in itertools.chain([header], rows):
            fields = [str(field) for field in row]
            if any(re.search(r"[\t\r\n]", field) for field in fields):
                raise ValueError(f"{path}: a value holds a tab or newline: {fields}")
            file.write("\t".join(fields) + "\n")


# --- BM25 -----------------------------------------------------------------------------------------

WORD = re.compile(r"\w+")  # runs of letters, digits and _ of any script
STOP_WORDS = (  # the 33 English stop words of Lucene's EnglishAnalyzer
    "a an and are as at be but by for if in into is it no not of on or such that the their then "
    "there these they this to was will with"
).split()


def tokenize(text):
    """Lower-case words of a text, without stop words; no stemming."""
    stop = set(STOP_WORDS)
    return [word for word in WORD.findall(text.lower()) if word not in stop]


class BM25:
    """BM25 as Lucene scores it (without its one-byte document lengths), over a list of texts.

    score(q, d) = sum over words t of q of  idf(t) * tf / (tf + k1 * (1 - b + b * |d| / avg|d|))
    idf(t) = ln(1 + (N - df + 0.5) / (df + 0.5));  a word that q repeats counts as often

    Words: `tokenize`. Defaults k1 0.9, b 0.4 are Anserini's, which BRIGHT's baseline uses too (with
    stemming, so its figures differ a little). The weight of each (word, document) pair is computed
    when indexing, so that a query only adds up slices. Documents are numbered from 0.
    """

    def __init__(self, texts, k1=0.9, b=0.4):
        self.vocabulary = collections.defaultdict()
        self.vocabulary.default_factory = self.vocabulary.__len__  # a new word gets the next number
        n_stop = len([self.vocabulary[word] for word in STOP_WORDS])
        words, counts = array("i"), []
        for text in texts:
            found = WORD.findall(text.lower())
            words.extend(map(self.vocabulary.__getitem__, found))
            counts.append(len(found))
        if not counts:
            raise ValueError("BM25 needs at least one document")
        self.vocabulary.default_factory = None
        self.n_docs = n = len(counts)

        words = np.frombuffer(words, dtype=np.int32) if words else np.zeros(0, np.int32)  # (T,)
        docs = np.repeat(np.arange(n), counts)  # (T,)
        docs, words = docs[words >= n_stop], words[words >= n_stop]
        lengths = np.bincount(docs, minlength=n)
        pairs = np.sort(words.astype(np.int64) * n + docs)  # equal pairs side by side
        first = np.flatnonzero(np.diff(pairs, prepend=-1))  # (P,) one posting per (word, document)
        tf = np.diff(first, append=len(pairs))
        words, self.docs = np.divmod(pairs[first], n)  # sorted by word, then document
        df = np.bincount(words, minlength=len(self.vocabulary))
        idf = np.log1p((n - df + 0.5) / (df + 0.5))
        norm = k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-9))
        self.weights = (idf[words] * tf / (tf + norm[self.docs])).astype(np.float32)
        self.starts = np.concatenate([[0], np.cumsum(df)])

    def scores(self, query):
        """BM25 of every document for a query text: float32 array of shape (N,), 0 where no word matches."""
        scores = np.zeros(self.n_docs, dtype=np.float32)
        for word, count in collections.Counter(WORD.findall(query.lower())).items():
            number = self.vocabulary.get(word)
            if number is not None:
                postings = slice(self.starts[number], self.starts[number + 1])
                scores[self.docs[postings]] += self.weights[postings] * np.float32(count)
        return scores

    def search(self, query, k):
        """The best min(k, N) documents: (indices, scores), best first, equal scores by index.

        Documents that share no word with the query come last with score 0.
        """
        scores = self.scores(query)
        k = min(k, self.n_docs)
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        best = np.arange(self.n_docs)
        if k < self.n_docs:
            threshold = np.partition(scores, self.n_docs - k)[self.n_docs - k]
            best = np.flatnonzero(scores >= threshold)
        best = best[np.argsort(-scores[best], kind="stable")[:k]]
        return best, scores[best]


# --- Evaluating a run -----------------------------------------------------------------------------

MEASURES = {  # name -> (aliases, does it need a cut-off)
    "ndcg": ((), False),
    "recall": (("r",), False),
    "p": (("precision",), False),
    "map": (("ap",), False),
    "mrr": (("rr", "recip_rank"), False),
    "success": (("hit",), True),
    "judged": ((), True),
    "rbo": ((), False),
}


def parse_metric(text):
    """("ndcg", 10) of "ndcg@10"; the cut-off is None where there is none (rbo@P: the float P)."""
    name, _, cut = text.strip().lower().partition("@")
    names = {alias: name for name, (aliases, _) in MEASURES.items() for alias in (name, *aliases)}
    if name not in names:
        raise ValueError(f"unknown metric {text!r}; known: {', '.join(MEASURES)}, with @k")
    name = names[name]
    try:
        k = None if not cut else float(cut) if name == "rbo" else int(cut)
    except ValueError:
        raise ValueError(f"metric {text!r}: {cut!r} is not a cut-off") from None
    if (k is None and MEASURES[name][1]) or (k is not None and (k <= 0 or (name == "rbo" and k >= 1))):
        raise ValueError(f"metric {text!r} needs a cut-off of at least 1, as in {name}@10")
    return name, k


def measure(metric, grades, flags, all_grades, *, level=1, exponential=False):
    """One metric (a pair of `parse_metric`) of one ranked list; see the functions it calls."""
    name, k = metric
    if name == "ndcg":
        return ndcg(grades, all_grades, k, exponential=exponential)
    if name == "recall":
        return recall(grades, all_grades, k, level=level)
    if name == "p":
        return precision(grades, k, level=level)
    if name == "map":
        return average_precision(grades, all_grades, k, level=level)
    if name == "mrr":
        return reciprocal_rank(grades, k, level=level)
    return success(grades, k, level=level) if name == "success" else judged(flags, k)


def rank_judged(scores, judgements, ties="trec_eval"):
    """Where the judged documents of one query stand: arrays (grades, ranks, first, tied), (J,) each.

    ranks: 0-based, unique; first: the number of documents with a higher score; tied: how many share
    the score, itself included. Counting, not sorting ids: a judged document's rank is the number of
    documents above it, and ids matter only inside its own tie.
    """
    values = as_float32(scores)  # (N,)
    ascending = np.sort(values)
    found = [doc for doc in judgements if doc in scores]
    with np.errstate(over="ignore"):
        own = np.array([scores[doc] for doc in found], dtype=np.float64).astype(np.float32)
    above = len(values) - np.searchsorted(ascending, own, side="right")
    tied = len(values) - above - np.searchsorted(ascending, own, side="left")
    ranks = above.copy()
    if (tied > 1).any():
        ids = list(scores)
        for value in set(own[tied > 1].tolist()):
            members = [ids[i] for i in np.flatnonzero(values == value)]
            if ties == "trec_eval":
                members.sort(reverse=True)
            place = {doc: position for position, doc in enumerate(members)}
            for j in np.flatnonzero(own == value):
                ranks[j] += place[found[j]]
    return np.array([judgements[doc] for doc in found], dtype=float), ranks, above, tied


def in_rank_order(n, ranks, values):
    """A list of n zeros with `values` put at `ranks` (both of shape (J,))."""
    ranked = np.zeros(n)
    ranked[ranks] = values
    return ranked.tolist()


def evaluate_run(
    qrels,
    run,
    metrics=("ndcg@10",),
    *,
    relevance_level=1,
    complete=False,
    ties="trec_eval",
    gain="linear",
    reference=None,
):
    """Every metric of every query: {metric: {query id: value}}, values in [0, 1].

    qrels {qid: {docid: grade}}, run {qid: {docid: score}}; queries that both have, in the order of
    the qrels, or with `complete` all of the qrels, missing ones 0. ties: "trec_eval" (document id,
    descending) or "first-stage" (order of the run's dict). gain: "linear" or "exponential".
    reference: the run that `rbo` compares with (no list there: 0). Raises ValueError on unknown
    names, levels below 1 and scores that are not finite.
    """
    if ties not in ("trec_eval", "first-stage") or gain not in ("linear", "exponential"):
        raise ValueError(f"unknown ties {ties!r} or gain {gain!r}")
    if relevance_level < 1:
        raise ValueError(f"the relevance level must be at least 1, got {relevance_level}")
    parsed = {metric: parse_metric(metric) for metric in metrics}
    if reference is None and any(name == "rbo" for name, _ in parsed.values()):
        raise ValueError("rbo compares two runs: give a second one")
    results = {metric: {} for metric in metrics}
    for qid, judgements in tqdm(qrels.items(), desc="queries", disable=None, leave=False):
        scores = run.get(qid)
        if scores:
            try:
                values, ranks, _, _ = rank_judged(scores, judgements, ties)
            except ValueError as error:
                raise ValueError(f"query {qid}: {error}") from None
            grades = in_rank_order(len(scores), ranks, values)
            flags = in_rank_order(len(scores), ranks, 1)
            all_grades = list(judgements.values())
        elif not complete:
            continue
        for metric, (name, k) in parsed.items():
            if not scores:
                value = 0.0
            elif name == "rbo":
                orders = [_ranking(r.get(qid, {}), ties) for r in (run, reference)]
                value = rank_biased_overlap(*orders, p=k or 0.9)
            else:
                rules = {"level": relevance_level, "exponential": gain == "exponential"}
                value = measure((name, k), grades, flags, all_grades, **rules)
            results[metric][qid] = value
    return results


def _ranking(scores, ties):
    """Document ids best first, under either rule for ties."""
    if ties == "trec_eval":
        return sort_run(scores)
    values = as_float32(scores)
    ids = list(scores)
    return [ids[i] for i in np.argsort(-values, kind="stable")]


def mean(values):
    """Arithmetic mean of a dict's values; 0.0 for an empty dict."""
    return math.fsum(values.values()) / len(values) if values else 0.0


def remove_documents(run, excluded=None, identical_ids=False):
    """A run without excluded documents and, on request, without those named like their query.

    excluded: {qid: {docid, ...}} (BRIGHT); identical_ids: as BEIR's own evaluation does by default.
    Returns (new run, number of documents removed); the given run is not changed.
    """
    kept, n_removed = {}, 0
    for qid, scores in run.items():
        unwanted = set((excluded or {}).get(qid, ())) | ({qid} if identical_ids else set())
        kept[qid] = {doc: s for doc, s in scores.items() if doc not in unwanted} if unwanted else scores
        n_removed += len(scores) - len(kept[qid])
    return kept, n_removed


# --- Command line ---------------------------------------------------------------------------------


def main():
    """Parse the command line and run one of the three commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--qrels", required=True)
    parser.add_argument("--run", nargs="+", required=True)
    parser.add_argument("--metrics", nargs="+", default=["ndcg@10"])
    args = parser.parse_args()
    qrels = read_qrels(args.qrels)
    for path in args.run:
        values = evaluate_run(qrels, read_run(path), args.metrics)
        print(path, *(f"{metric} {100 * mean(v):.2f}" for metric, v in values.items()))


if __name__ == "__main__":
    run_cli(main)
