"""What evaluate.py promises: exact measures, files that read back, and errors that help.

    python -m pytest tests/test_evaluate.py

Peers (pytrec_eval, bm25s) come with requirements-dev.txt. Real files are found through
GROUPRANK_TEST_DATA; their tests skip where it is unset.
"""

import ast
import contextlib
import gzip
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import evaluate

SCRIPT = Path(evaluate.__file__)
DATA = os.environ.get("GROUPRANK_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="GROUPRANK_TEST_DATA is not set")
log2 = math.log2


def command(*arguments, check=True):
    """Run evaluate.py as a user does, but in this process; (exit status, stdout, stderr)."""
    status, out, err = 0, io.StringIO(), io.StringIO()
    with (mock.patch.object(sys, "argv", [str(SCRIPT), *map(str, arguments)]),
          contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):  # fmt: skip
        try:
            evaluate.run_cli(evaluate.main)
        except SystemExit as ended:
            status = ended.code or 0
    assert not check or status == 0, err.getvalue()
    return status, out.getvalue(), err.getvalue()


def mean(values):
    return math.fsum(values.values()) / len(values)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# --- Measures: sums that can be checked by eye ----------------------------------------------------


def test_ndcg_equals_hand_sum():
    # ranking: grades 0, 2, 0, 1; judged elsewhere: one more document of grade 1
    dcg = 2 / log2(3) + 1 / log2(5)
    ideal = 2 / log2(2) + 1 / log2(3) + 1 / log2(4)
    assert evaluate.ndcg([0, 2, 0, 1], [2, 1, 1, 0]) == pytest.approx(dcg / ideal, abs=1e-15)


def test_ndcg_cut_off_applies_to_ranking_and_ideal():
    # k = 2: only rank 2 counts, and the ideal has two documents
    expected = (2 / log2(3)) / (2 / log2(2) + 1 / log2(3))
    assert evaluate.ndcg([0, 2, 0, 1], [2, 1, 1, 0], k=2) == pytest.approx(expected, abs=1e-15)


def test_negative_grades_have_no_gain_and_no_cost():
    assert evaluate.ndcg([-2, 1], [1, -2]) == evaluate.ndcg([0, 1], [1, 0])
    assert evaluate.ndcg([-1], [-1]) == 0.0


def test_recall_and_precision_count_grades_at_the_level():
    ranked, everything = [0, 2, 1, 0], [2, 1, 1]
    assert evaluate.recall(ranked, everything, 2) == 1 / 3
    assert evaluate.recall(ranked, everything, 4) == 2 / 3
    assert evaluate.recall(ranked, everything, 4, level=2) == 1 / 1
    assert evaluate.precision(ranked, 2) == 1 / 2
    assert evaluate.precision(ranked, 10) == 2 / 10  # divides by k, not by what was retrieved


def test_average_precision_equals_hand_sum():
    # relevant at ranks 2 and 3 of three relevant documents: (1/2 + 2/3) / 3
    assert evaluate.average_precision([0, 2, 1, 0], [2, 1, 1]) == pytest.approx((1 / 2 + 2 / 3) / 3)
    assert evaluate.average_precision([0, 2, 1, 0], [2, 1, 1], k=2) == pytest.approx((1 / 2) / 3)


def test_reciprocal_rank_is_of_the_first_relevant_document():
    assert evaluate.reciprocal_rank([0, 0, 1, 1]) == 1 / 3
    assert evaluate.reciprocal_rank([0, 0, 1, 1], k=2) == 0.0
    assert evaluate.reciprocal_rank([1, 0, 2], level=2) == 1 / 3


def test_measures_without_any_relevant_document_are_zero():
    for ranked in ([], [0, 0], [0, -1]):
        assert evaluate.ndcg(ranked, ranked) == 0.0
        assert evaluate.recall(ranked, ranked, 10) == 0.0
        assert evaluate.precision(ranked, 10) == evaluate.precision(ranked) == 0.0
        assert evaluate.average_precision(ranked, ranked) == 0.0
        assert evaluate.reciprocal_rank(ranked) == 0.0


def test_measures_take_lists_arrays_and_numbers_in_arrays():
    ranked, everything = [0, 2, 1], [2, 1, 1]
    for form in (np.array, lambda values: [np.array(value) for value in values]):
        assert evaluate.ndcg(form(ranked), form(everything)) == evaluate.ndcg(ranked, everything)
        assert evaluate.recall(form(ranked), form(everything), 2) == 1 / 3
        assert evaluate.precision(form(ranked), 2) == 1 / 2
        assert evaluate.average_precision(form(ranked), form(everything)) == pytest.approx(7 / 18)
        assert evaluate.reciprocal_rank(form(ranked)) == 1 / 2


@pytest.mark.parametrize("name, call", [
    ("ndcg", "ndcg([0, 2], [2, 1])"),
    ("recall", "recall([0, 2], [2, 1], 2)"),
    ("precision", "precision([0, 2], 2)"),
    ("average_precision", "average_precision([0, 2], [2, 1])"),
    ("reciprocal_rank", "reciprocal_rank([0, 2])"),
    ("tie_averaged", "tie_averaged([1, 1, 0], [0, 2, 1])"),
    ("minmax", "minmax([1, 2, 3])"),
    ("strictly_decreasing", "strictly_decreasing([1, 1])"),
])  # fmt: skip
def test_each_formula_runs_when_pasted_alone(name, call):
    source = SCRIPT.read_text()
    body = re.search(rf"^def {name}\(.*?(?=^\S)", source, re.M | re.S)[0]
    alone = {"np": np, "math": math}
    exec(body, alone)
    assert np.array_equal(eval(call, alone), eval(call, vars(evaluate)))


def test_only_functions_above_are_called_so_that_one_can_stop_reading_anywhere():
    tree = ast.parse(SCRIPT.read_text())
    places = {node.name: node.lineno for node in tree.body if hasattr(node, "name")}
    for node in (node for node in tree.body if hasattr(node, "name")):
        names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
        own = {n.id for n in names if isinstance(n.ctx, ast.Store)}
        own |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
        for name in {n.id for n in names} & places.keys() - own:
            assert places[name] <= node.lineno, f"{node.name} calls {name}, which stands below it"


def test_formulas_do_not_modify_their_arguments():
    ranked, everything, scores = [0, 2, -1], [2, 1, -1], {"a": 1.0, "b": 2.0}
    evaluate.ndcg(ranked, everything)
    evaluate.average_precision(ranked, everything)
    evaluate.tie_averaged(ranked, everything)
    evaluate.sort_run(scores)
    evaluate.remove_documents({"q": scores}, {"q": {"a"}})
    assert (ranked, everything, scores) == ([0, 2, -1], [2, 1, -1], {"a": 1.0, "b": 2.0})


# --- Ties -----------------------------------------------------------------------------------------


def all_tie_breaks(scores):
    """Every order of the documents that the scores allow."""
    levels = [[i for i, s in enumerate(scores) if s == level] for level in sorted({*scores}, reverse=True)]
    for orders in itertools.product(*(itertools.permutations(level) for level in levels)):
        yield [i for order in orders for i in order]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=6), st.integers(1, 7))
def test_tie_averaged_values_give_the_exact_expectation_over_all_tie_breaks(documents, k):
    scores, gains = zip(*documents, strict=True)
    orders = list(all_tie_breaks(scores))
    mean = sum(evaluate.ndcg([gains[i] for i in order], gains, k) for order in orders) / len(orders)
    assert evaluate.ndcg(evaluate.tie_averaged(scores, gains), gains, k) == pytest.approx(mean)
    relevant = [gain >= 2 for gain in gains]
    recall = sum(evaluate.recall([gains[i] for i in o], gains, k, level=2) for o in orders) / len(orders)
    averaged = sum(evaluate.tie_averaged(scores, relevant)[:k]) / max(1, sum(relevant))
    assert averaged == pytest.approx(recall)


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 9)), max_size=8), st.randoms())
def test_tie_averaged_does_not_depend_on_the_order_of_the_documents(documents, rng):
    shuffled = rng.sample(documents, len(documents))
    columns = [tuple(zip(*d, strict=True)) or ((), ()) for d in (documents, shuffled)]
    averaged = [evaluate.tie_averaged(*pair) for pair in columns]
    assert np.array_equal(*averaged)


def test_tie_averaged_by_hand():
    assert evaluate.tie_averaged([5, 7, 5], [4, 1, 2]).tolist() == [1.0, 3.0, 3.0]
    assert evaluate.tie_averaged([], []).tolist() == []


def test_several_rankings_of_the_same_documents_are_measured_at_once():
    rows, gains = [[5, 7, 5], [1, 2, 3]], [4, 1, 2]
    ranked = evaluate.tie_averaged(rows, gains)
    assert ranked.tolist() == [[1.0, 3.0, 3.0], [2.0, 1.0, 4.0]]
    one_by_one = [evaluate.ndcg(evaluate.tie_averaged(row, gains), gains) for row in rows]
    assert evaluate.ndcg(ranked.T, gains).tolist() == one_by_one


def test_runs_sort_by_float32_score_and_then_by_id_descending():
    assert evaluate.sort_run({"a": 1.0, "b": 2.0, "c": 1.0}) == ["b", "c", "a"]
    assert 1.0 + 1e-9 != 1.0 and np.float32(1.0 + 1e-9) == np.float32(1.0)
    assert evaluate.sort_run({"a": 1.0 + 1e-9, "b": 1.0}) == ["b", "a"]
    assert evaluate.sort_run({"a": -0.0, "b": 0.0}) == ["b", "a"]
    assert evaluate.sort_run({"a": 1e300, "b": 1e200}) == ["b", "a"]  # both infinite in float32
    assert evaluate.sort_run({"10": 1.0, "9": 1.0}) == ["9", "10"]  # ids are text, never numbers


def test_tied_ids_compare_as_bytes_and_not_as_utf16():
    ids = ["\uff5e", "\U0001f600", "é", "e", "z", "Z"]  # utf-16 would put U+1F600 before U+FF5E
    assert evaluate.sort_run(dict.fromkeys(ids, 1.0)) == sorted(ids, key=str.encode, reverse=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_rejected(bad):
    with pytest.raises(ValueError, match="document b"):
        evaluate.sort_run({"a": 1.0, "b": bad})
    with pytest.raises(ValueError, match="document b"):
        evaluate.evaluate_run({"q": {"a": 1}}, {"q": {"a": 1.0, "b": bad}})


def test_minmax_scales_and_makes_constant_lists_zero():
    assert evaluate.minmax([1, 3, 2]) == [0.0, 1.0, 0.5]
    assert evaluate.minmax([4, 4]) == [0.0, 0.0]
    assert evaluate.minmax([]) == []
    with pytest.raises(ValueError, match="finite"):
        evaluate.minmax([1, math.nan])


# --- Against trec_eval ----------------------------------------------------------------------------

PEER = {
    "ndcg@10": "ndcg_cut_10", "ndcg": "ndcg", "recall@5": "recall_5", "p@5": "P_5", "map": "map",
    "map@5": "map_cut_5", "mrr": "recip_rank",
}  # fmt: skip
PEER_MEASURES = {"ndcg_cut", "ndcg", "recall", "P", "map", "map_cut", "recip_rank"}


def assert_equal_to_pytrec_eval(qrels, run, level=1):
    """Negative grades are 0 for the peer: it writes outside its memory when a query has several."""
    pytrec_eval = pytest.importorskip("pytrec_eval")
    clipped = {qid: {doc: max(grade, 0) for doc, grade in docs.items()} for qid, docs in qrels.items()}
    peer = pytrec_eval.RelevanceEvaluator(clipped, PEER_MEASURES, relevance_level=level).evaluate(run)
    ours = evaluate.evaluate_run(qrels, run, list(PEER), relevance_level=level)
    for metric, name in PEER.items():
        assert ours[metric].keys() == peer.keys()
        for qid, value in ours[metric].items():
            assert value == pytest.approx(peer[qid][name], abs=1e-12), (metric, qid, qrels, run)


IDS = st.sampled_from(["a", "b", "B", "aa", "é", "z", "\uff5e", "\U0001f600", "1", "10", "9", "d 1"])
SCORES = st.one_of(
    st.integers(-3, 3).map(float),  # ties
    st.sampled_from([1.0, 1.0 + 1e-9, 1.0 - 1e-9, 16777216.0, 16777217.0]),  # ties in float32 only
    st.floats(-1e38, 1e38),
    st.floats(allow_nan=False, allow_infinity=False),  # huge: infinite in float32
)
QRELS = st.dictionaries(st.sampled_from(["1", "2", "é"]),
                        st.dictionaries(IDS, st.integers(-2, 4), min_size=1), min_size=1)  # fmt: skip
RUNS = st.dictionaries(st.sampled_from(["1", "2", "3"]), st.dictionaries(IDS, SCORES, min_size=1), min_size=1)


@settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(QRELS, RUNS, st.integers(1, 3))
def test_all_measures_equal_pytrec_eval_on_random_runs(qrels, run, level):
    assert_equal_to_pytrec_eval(qrels, run, level)


@pytest.mark.parametrize("seed", range(5))
def test_all_measures_equal_pytrec_eval_on_big_runs_full_of_ties(seed):
    """300 queries each: 1 to 300 documents, 2 to 200 distinct scores."""
    rng = random.Random(seed)
    qrels, run = {}, {}
    for query in range(300):
        docs = [f"d{i}" for i in range(rng.randint(1, 300))]
        distinct = rng.choice([2, 10, 200])
        run[f"q{query}"] = {doc: rng.randrange(distinct) / 7 for doc in rng.sample(docs, rng.randint(1, len(docs)))}
        qrels[f"q{query}"] = {doc: rng.randint(-1, 3) for doc in rng.sample(docs, rng.randint(1, len(docs)))}
    assert_equal_to_pytrec_eval(qrels, run)


def test_ten_thousand_documents_and_a_single_one():
    rng = random.Random(0)
    run = {f"d{i}": rng.choice([rng.random(), 0.5]) for i in range(10_000)}
    judged = {f"d{rng.randrange(12_000)}": rng.randint(0, 3) for _ in range(400)}
    assert_equal_to_pytrec_eval({"1": judged, "2": {"d": 1}}, {"1": run, "2": {"d": -1.0}})


def test_queries_without_overlap_give_empty_results_or_zeros_when_complete():
    qrels, run = {"1": {"a": 1}}, {"2": {"a": 1.0}}
    assert evaluate.evaluate_run(qrels, run) == {"ndcg@10": {}}
    assert evaluate.evaluate_run(qrels, run, complete=True) == {"ndcg@10": {"1": 0.0}}


def test_complete_counts_missing_queries_as_zero():
    qrels, run = {"1": {"a": 1}, "2": {"a": 1}}, {"1": {"a": 1.0}}
    assert mean(evaluate.evaluate_run(qrels, run)["ndcg@10"]) == 1.0
    assert mean(evaluate.evaluate_run(qrels, run, complete=True)["ndcg@10"]) == 1 / 2


@pytest.mark.parametrize("metric", ["dcg@10", "ndcg@0", "ndcg@x", "p@-1", ""])
def test_unknown_metrics_are_named(metric):
    with pytest.raises(ValueError, match=re.escape(repr(metric))):
        evaluate.evaluate_run({}, {}, [metric])


def golden(name):
    """{(measure, query): text} of trec_eval's own expected output."""
    rows = (line.split("\t") for line in Path(DATA, "trec_eval", name).read_text().splitlines())
    return {(measure.strip(), qid.strip()): value.strip() for measure, qid, value in rows}


TREC_EVAL = {"ndcg": "ndcg", "map": "map", "mrr": "recip_rank"}
TREC_EVAL |= {f"ndcg@{k}": f"ndcg_cut_{k}" for k in (5, 10, 15, 20, 30, 100, 200, 500, 1000)}
TREC_EVAL |= {f"p@{k}": f"P_{k}" for k in (5, 10, 15, 20, 30, 100, 200, 500, 1000)}
TREC_EVAL |= {f"recall@{k}": f"recall_{k}" for k in (5, 10, 15, 20, 30, 100, 200, 500, 1000)}
TREC_EVAL |= {f"map@{k}": f"map_cut_{k}" for k in (5, 10, 15, 20, 30, 100, 200, 500, 1000)}


@needs_data
@pytest.mark.parametrize("run_file, expected, complete", [
    ("results.test", "out.test.aq", False),
    ("results.trunc", "out.test.aqc", True),
])  # fmt: skip
def test_every_measure_equals_trec_evals_own_expected_output(run_file, expected, complete):
    folder, known = Path(DATA, "trec_eval"), golden(expected)
    qrels, run = evaluate.read_qrels(folder / "qrels.test"), evaluate.read_run(folder / run_file)
    values = evaluate.evaluate_run(qrels, run, list(TREC_EVAL), complete=complete)
    compared = 0
    for metric, name in TREC_EVAL.items():
        assert f"{mean(values[metric]):.4f}" == known[name, "all"], metric
        for qid, value in values[metric].items():
            assert f"{value:.4f}" == known.get((name, qid), "0.0000"), (metric, qid)
            compared += (name, qid) in known
    assert compared == 3 * len(TREC_EVAL)
    assert {qid for name, qid in known if name == "map"} == {*qrels, "all"}


@needs_data
def test_the_biology_run_of_bright_scores_4349():
    run = Path(DATA, "bright", "biology.reasonir_top100.run")
    _, out, _ = command("--qrels", Path(DATA, "bright", "biology.qrels"), "--run", run, "--json")
    assert round(json.loads(out)["runs"]["biology.reasonir_top100"]["ndcg@10"], 4) == 0.4349


@needs_data
def test_the_stackoverflow_run_whose_ids_hold_spaces_loads_whole():
    run = evaluate.read_run(Path(DATA, "bright", "stackoverflow.reasonir_top100.run"))
    assert len(run) == 117 and all(len(scores) == 100 for scores in run.values())
    assert "pytorch_torch_tensor_functions/Memory Management_2_0.txt" in run["4"]


@needs_data
def test_the_given_order_of_novel_eval_scores_as_published(tmp_path):
    """21 queries of 20 passages in the given order: NDCG@1/5/10 = 64.29 / 58.24 / 65.03."""
    qrels = evaluate.read_qrels(Path(DATA, "novel_eval", "qrels.txt"))
    rankings = {qid: [(f"{qid}-{i}", 0.0) for i in range(20)] for qid in qrels}  # all tied on purpose
    evaluate.write_run(tmp_path / "given.run", rankings)
    values = evaluate.evaluate_run(qrels, evaluate.read_run(tmp_path / "given.run"), ["ndcg@1", "ndcg@5", "ndcg@10"])
    assert [f"{100 * mean(v):.2f}" for v in values.values()] == ["64.29", "58.24", "65.03"]


@needs_data
def test_minmax_equals_pyserinis_normalised_run():
    folder = Path(DATA, "fusion")
    run = evaluate.read_run(folder / "simple_trec_run_fusion_1.txt")
    known = evaluate.read_run(folder / "simple_trec_run_normalize_verify.txt")["1"]
    assert dict(zip(run["1"], evaluate.minmax(run["1"].values()), strict=True)) == known


# --- Comparing runs -------------------------------------------------------------------------------


def test_a_paired_comparison_counts_tests_and_is_seeded():
    a = {str(i): 0.5 for i in range(5)}
    b = {"0": 0.6, "1": 0.7, "2": 0.8, "3": 0.9, "4": 0.5, "5": 1.0}  # query 5: in one run only
    result = evaluate.compare_runs(a, b, seed=1)
    assert (result["queries"], result["wins"], result["ties"], result["losses"]) == (5, 4, 1, 0)
    assert result["difference"] == pytest.approx((0.1 + 0.2 + 0.3 + 0.4) / 5)
    # of the 2^5 sign patterns, the four non-zero differences agree in 2 * 2: p = 4 / 32
    assert result["p_randomisation"] == pytest.approx(4 / 32, abs=0.01)
    low, high = result["interval"]
    assert 0.0 < low < 0.2 < high < 0.4
    assert result == evaluate.compare_runs(a, b, seed=1) != evaluate.compare_runs(a, b, seed=2)


def test_equal_runs_are_not_different():
    a = {"1": 0.5, "2": 0.25}
    result = evaluate.compare_runs(a, a)
    assert (result["p_randomisation"], result["interval"]) == (1.0, [0.0, 0.0])
    with pytest.raises(ValueError, match="no query in common"):
        evaluate.compare_runs({"1": 0.0}, {"2": 0.0})


def test_the_tie_report_brackets_every_tie_break():
    # b, c and d share the second to fourth rank; c is relevant: gain 1 / log2(rank + 1)
    qrels, run = {"q": {"c": 1}}, {"q": {"a": 3.0, "b": 2.0, "c": 2.0, "d": 2.0, "e": 1.0}}
    report = evaluate.tie_report(qrels, run, k=3)
    assert (report["slots"], report["decided"]) == (3, 2)
    assert report["best"] == pytest.approx(1 / log2(3))
    assert report["worst"] == 0.0  # rank 4 is beyond k
    assert report["expected"] == pytest.approx((1 / log2(3) + 1 / log2(4) + 0) / 3)


def test_the_tie_report_of_a_run_without_ties_is_a_point():
    report = evaluate.tie_report({"q": {"a": 1}}, {"q": {"a": 1.0, "b": 2.0}})
    assert report["decided"] == 0
    assert report["worst"] == report["expected"] == report["best"] == pytest.approx(1 / log2(3))


# --- Run and qrels files --------------------------------------------------------------------------


@pytest.mark.parametrize("text, expected", [
    ("1 Q0 a 1 2.5 tag\n", {"1": {"a": 2.5}}),
    ("1\tQ0\ta\t1\t2.5\ttag", {"1": {"a": 2.5}}),
    ("1\tQ0\ta b\t1\t  2.5\trun tag\n", {"1": {"a b": 2.5}}),
    ("1 Q0 dir/Memory Management 2.txt 1 2.5 tag\n", {"1": {"dir/Memory Management 2.txt": 2.5}}),
    ("1 Q0 a  b 1 2.5 tag\n", {"1": {"a  b": 2.5}}),
    ("1 Q0 x 1 9 tag\n1 Q0 b 2 3 4 5 tag\n", {"1": {"x": 9.0, "b 2 3": 5.0}}),  # the id takes it
    ("\n\r\n1   Q0 a 1 -2.5e-3  tag\r\n", {"1": {"a": -0.0025}}),
    ("\ufeff1 Q0 a\u00a0b 1 2 tag\n", {"1": {"a\u00a0b": 2.0}}),  # no-break space: part of the id
    ("2 Q0 a 1 1 t\n1 Q0 a 1 1 t\n2 Q0 b 1 1 t\n", {"2": {"a": 1.0, "b": 1.0}, "1": {"a": 1.0}}),
    ('{"1": {"a": 2.5, "b": 1}}', {"1": {"a": 2.5, "b": 1.0}}),
    ('\n {"1":\n {"a b": -1}}\n', {"1": {"a b": -1.0}}),
])  # fmt: skip
@pytest.mark.parametrize("packed", [False, True])
def test_runs_are_read_in_every_form(tmp_path, text, expected, packed):
    path = write(tmp_path / "x.run", gzip.compress(text.encode()) if packed else text)
    assert evaluate.read_run(path) == expected
    assert list(evaluate.read_run(path)) == list(expected)


@pytest.mark.parametrize("text, message", [
    ("1 Q0 a 1 2.5 t\n1 Q0 a 2 2.0 t\n", "line 2: query 1 lists document a a second time"),
    ("1 Q0 a 1 2.5 t\n2 Q0 b 1 2 t\n1 Q0 a 2 2.0 t\n", "line 3: query 1 lists document a"),
    ("1 Q0 a 1 2.5 t\n1 Q0 b 1\n", "line 2: not `qid Q0 docid rank score tag`: '1 Q0 b 1'"),
    ("q1 Q0 my doc 1 3.5", "line 1: not `qid Q0"),  # no tag: the columns are shifted
    ("q1\tQ0\td 1\t1\t0.5", "line 1: not `qid Q0"),
    ("q1 Q0 d x 1 t", "line 1: not `qid Q0"),
    ("1 Q0 a 1 2.5 a tag with spaces\n", "line 1: not `qid Q0"),  # between spaces: an id's
    ("1 Q0 a 1 high t\n", "line 1: could not convert string to float: 'high'"),
    ("1 Q0 a 1 nan t\n", "line 1: query 1, document a: nan is not a finite number"),
    ("1 Q0 a 1 1e999 t\n", "line 1: query 1, document a: 1e999 is not a finite number"),
    ("", "the run is empty"),
    (b"1 Q0 b 1 2 t\n1 Q0 a\xff 1 2 t\n", "line 2: 'utf-8' codec can't decode byte 0xff"),
    ('{"1": {"a": NaN}}', "query 1, document a: nan is not a finite number"),
    ('{"1": {"a": "x"}}', "could not convert string to float: 'x'"),
    ('{"1": [1]}', "query 1 should hold {document id: number}"),
    ('{"1": ', "line 1: Expecting value"),
])  # fmt: skip
def test_bad_runs_are_refused_with_file_and_line(tmp_path, text, message):
    path = write(tmp_path / "x.run", text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        evaluate.read_run(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text, expected", [
    ("1 0 a 2\n1 0 b -1\n", {"1": {"a": 2, "b": -1}}),
    ("1\t0\ta b\t2\n", {"1": {"a b": 2}}),
    ("1 0 a b 2\n", {"1": {"a b": 2}}),
    ("query-id\tcorpus-id\tscore\n1\ta b\t2\n", {"1": {"a b": 2}}),
    ("1\ta\t2\n\n1\tb\t0\n", {"1": {"a": 2, "b": 0}}),
    ('{"1": {"a": 2}}', {"1": {"a": 2}}),
    ("1 0 a 2\n1 0 a 2\n", {"1": {"a": 2}}),
])  # fmt: skip
def test_qrels_are_read_in_every_form(tmp_path, text, expected):
    assert evaluate.read_qrels(write(tmp_path / "qrels", text)) == expected
    assert evaluate.read_qrels(write(tmp_path / "qrels.gz", gzip.compress(text.encode()))) == expected


@pytest.mark.parametrize("text, message", [
    ("1 0 a 2\n1 0 a 1\n", "line 2: document a of query 1 has two different grades"),
    ("1 0 a high\n", "line 1: not `qid 0 docid grade`"),
    ("1 0 a 0.5\n", "line 1: not `qid 0 docid grade`"),
    ("1 a\n", "line 1: not `qid 0 docid grade`"),
    ("1 0 a 1\n1 0\n", "line 2: not `qid 0 docid grade`"),
    ("", "no judgement"),
])  # fmt: skip
def test_bad_qrels_are_refused_with_file_and_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate.read_qrels(write(tmp_path / "qrels", text))


@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=60))
def test_written_scores_decrease_strictly_in_float32_and_only_where_needed(scores):
    values = evaluate.strictly_decreasing(scores)
    assert all(np.float32(a) > np.float32(b) for a, b in itertools.pairwise(values))
    assert all(np.float32(value) == value for value in values)
    if all(np.float32(a) > np.float32(b) for a, b in itertools.pairwise(scores)):
        assert values == [float(np.float32(score)) for score in scores]  # only rounded


def test_tied_scores_move_by_single_float32_steps():
    step = float(np.spacing(np.float32(5)))  # the gap above 5; the gap below it is the same
    assert evaluate.strictly_decreasing([5, 5, 5]) == [5.0, 5.0 - step, 5.0 - 2 * step]
    for bad in (1e39, math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="does not fit into float32"):
            evaluate.strictly_decreasing([bad])


@pytest.mark.parametrize("spaced", [False, True])
def test_a_written_run_reads_back_in_the_same_order_everywhere(tmp_path, spaced):
    docs = [f"d{' ' * spaced}{i}" for i in range(30)]
    random.Random(0).shuffle(docs)
    evaluate.write_run(tmp_path / "x.run", {"q": [(doc, 10 - i // 7) for i, doc in enumerate(docs)]})
    run = evaluate.read_run(tmp_path / "x.run")
    assert evaluate.sort_run(run["q"]) == docs == list(run["q"])
    lines = (tmp_path / "x.run").read_text().splitlines()
    assert all(len(line.split("\t" if spaced else " ")) == 6 for line in lines)
    printed = [float(re.split("\t" if spaced else " ", line)[4]) for line in lines]
    assert all(a > b for a, b in itertools.pairwise(printed))


@pytest.mark.parametrize("rankings", [
    {"q": [("a\tb", 1.0)]}, {"q": [("", 1.0)]}, {"q\n": [("a", 1.0)]}, {"q": [("a", 2.0), ("a", 1.0)]},
])  # fmt: skip
def test_runs_that_could_not_be_read_back_are_not_written(tmp_path, rankings):
    with pytest.raises(ValueError):
        evaluate.write_run(tmp_path / "x.run", rankings)
    assert list(tmp_path.iterdir()) == []


def test_atomic_files_appear_complete_or_not_at_all(tmp_path):
    path = write(tmp_path / "x", "old")
    with contextlib.suppress(RuntimeError), evaluate.open_atomic(path) as file:
        file.write("new")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with evaluate.open_atomic(tmp_path / "new" / "y", "wb") as file:
        file.write(b"\xff")
        assert not (tmp_path / "new" / "y").exists()
    assert (tmp_path / "new" / "y").read_bytes() == b"\xff"


# --- Collections ----------------------------------------------------------------------------------


def test_a_collection_reads_back_as_written_with_titles_in_front(tmp_path):
    corpus = {"a b": "text", "c": ("Title", "body"), "d": ("Only a title", "")}
    queries, qrels = {"1": "what\nis it"}, {"1": {"c": 2, "a b": 0}}
    evaluate.write_collection(tmp_path, corpus, queries, qrels, {"1": {"d"}})
    back = evaluate.read_collection(tmp_path)
    assert back.corpus == {"a b": "text", "c": "Title\nbody", "d": "Only a title"}
    assert (back.queries, back.qrels, back.excluded) == (queries, qrels, {"1": {"d"}})
    assert (tmp_path / "qrels" / "test.tsv").read_text().startswith("query-id\tcorpus-id\tscore\n1\tc\t2\n")
    evaluate.write_collection(tmp_path, corpus, queries, {})
    back = evaluate.read_collection(tmp_path)
    assert (back.qrels, back.excluded) == ({}, {})  # old ones would be applied


def test_rewritten_queries_are_picked_by_name_and_qrels_are_optional(tmp_path):
    write(tmp_path / "corpus.jsonl", '{"_id": "a", "text": "x"}\n')
    write(tmp_path / "queries.gpt4.jsonl", '{"_id": "1", "text": "rewritten"}\n')
    collection = evaluate.read_collection(tmp_path, queries="gpt4")
    assert (collection.queries, collection.qrels, collection.excluded) == ({"1": "rewritten"}, {}, {})
    write(tmp_path / "qrels" / "train.tsv", "query-id\tcorpus-id\tscore\n1\ta\t2\n")
    assert evaluate.read_collection(tmp_path, queries="gpt4").qrels == {}
    (tmp_path / "qrels" / "test.tsv.gz").write_bytes(gzip.compress(b"query-id\tcorpus-id\tscore\n1\ta\t3\n"))
    assert evaluate.read_collection(tmp_path, queries="gpt4").qrels == {"1": {"a": 3}}
    assert evaluate.read_collection(tmp_path, queries="gpt4", split="train").qrels == {"1": {"a": 2}}
    with pytest.raises(OSError, match="queries.jsonl"):
        evaluate.read_collection(tmp_path)


@pytest.mark.parametrize("corpus, message", [
    ('{"_id": "a", "text": "x"}\n{"_id": "a", "text": "y"}\n', ": id 'a' appears twice"),
    ('{"_id": 7, "text": "x"}\n', "line 1: needs the keys _id and text"),
    ('{"_id": "a"}\n', "line 1: needs the keys _id and text"),
    ('{"_id": "a", "text": "x"}\n{"_id"\n', "line 2: Expecting"),
    ("[1]\n", "line 1: not a JSON object"),
    ("", "is empty"),
    ('\n{"_id": "a", "text": "caf\udce9"}\n', "line 2: 'utf-8' codec can't decode byte 0xe9"),
    ("version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "line 1: Expecting value"),
])  # fmt: skip
def test_bad_collections_are_refused_with_file_and_place(tmp_path, corpus, message):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(corpus.encode(errors="surrogateescape"))
    write(tmp_path / "queries.jsonl", '{"_id": "1", "text": "q"}\n')
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*" + re.escape(message)) as refused:
        evaluate.read_collection(tmp_path)
    with pytest.raises(ValueError) as loading:
        evaluate.read_texts(path)
    assert str(refused.value) == str(loading.value)


ODD_CORPUS = (
    '\ufeff{"_id": "b", "title": " T ", "text": "body"}\n\n \u00a0\r\n'
    '{"_id": "a b", "text": "caf\u00e9 \u2028 \u4e2d\U0001f600 \\u00e9\\n"}\r\n'
    '{"text": "x", "_id": "last", "more": [1]}'
)


@pytest.mark.parametrize("packed", [False, True])
def test_only_the_texts_that_are_kept_are_held(tmp_path, packed):
    text = gzip.compress(ODD_CORPUS.encode()) if packed else ODD_CORPUS
    for name in ("corpus.jsonl", "queries.jsonl"):
        write(tmp_path / name, text)
    collection = evaluate.read_collection(tmp_path)
    assert list(collection.corpus) == ["b", "a b", "last"] and collection.corpus["b"] == "T\nbody"
    kept = evaluate.read_collection(tmp_path, keep={"last", "not there"})
    assert kept.corpus == {"last": "x"} and kept.queries == collection.queries


@pytest.mark.parametrize("second, message", [
    ('{"_id": "a", "text": "again"}', "appears twice"),
    ('{"_id": "b"}', "line 2: needs the keys _id and text (or title)"),
])  # fmt: skip
def test_lines_that_are_not_kept_are_checked_all_the_same(tmp_path, second, message):
    path = write(tmp_path / "corpus.jsonl", '{"_id": "a", "text": "x"}\n' + second)
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate.read_texts(path, keep={"z"})


def test_an_empty_text_is_left_out_with_a_note_and_a_title_alone_is_a_text(tmp_path, capsys):
    rows = [{"_id": "a", "title": "T", "text": None}, {"_id": "b", "text": " "}, {"_id": "c", "text": "C"}]
    path = tmp_path / "corpus.jsonl"
    evaluate.write_lines(path, rows)
    assert evaluate.read_texts(path) == {"a": "T", "c": "C"}
    assert capsys.readouterr().err == f"note: {path}: 1 texts are empty and left out\n"
    path.rename(f"{path}.gz")  # by its name; its bytes say that it is none
    assert evaluate.read_texts(path, keep={"c"}) == {"c": "C"}


def test_half_an_emoji_in_a_text_can_be_written_again(tmp_path):
    path = write(tmp_path / "corpus.jsonl", r'{"_id": "a", "text": "cut \ud83d"}' + "\n")
    texts = evaluate.read_texts(path)
    assert texts == {"a": "cut ?"}
    evaluate.write_lines(tmp_path / "rows.jsonl", [texts])


def test_packed_collections_are_read_and_packed_runs_written(tmp_path):
    for name in ("corpus", "queries"):
        evaluate.write_lines(tmp_path / f"{name}.jsonl.gz", [{"_id": "a", "text": "A"}])
        assert (tmp_path / f"{name}.jsonl.gz").read_bytes()[:2] == b"\x1f\x8b"
    for name, text in (("qrels/test.tsv", "a\tb\t1\n"), ("excluded.tsv", "a\tc\n")):
        write(tmp_path / f"{name}.gz", gzip.compress(text.encode()))
    packed = evaluate.read_collection(tmp_path)
    assert (packed.corpus, packed.qrels, packed.excluded) == ({"a": "A"}, {"a": {"b": 1}}, {"a": {"c"}})
    run = write(tmp_path / "x.run", "a Q0 c 1 2.0 x\na Q0 b 2 1.0 x\n")
    args = evaluate.build_parser().parse_args(["--qrels", str(tmp_path / "qrels" / "test.tsv.gz"), "--run", str(run)])
    report = evaluate.evaluate_files(args)
    assert report["queries"]["x"]["documents excluded"] == 1 and report["runs"]["x"]["ndcg@10"] == 1.0
    evaluate.write_collection(tmp_path, {"a": "new"}, {"a": "new"}, {})  # a plain file is newer than its packed one
    assert evaluate.read_collection(tmp_path) == evaluate.Collection({"a": "new"}, {"a": "new"}, {}, {})
    evaluate.write_run(tmp_path / "x.run.gz", {"q": [("a", 1.0)]})
    assert evaluate.read_run(tmp_path / "x.run.gz") == {"q": {"a": 1.0}}
    assert gzip.open(tmp_path / "x.run.gz", "rt").read() == "q Q0 a 1 1.0 grouprank\n"


def test_a_folder_that_is_none_is_said_so(tmp_path):
    for path in (tmp_path / "none", write(tmp_path / "corpus.jsonl", "{}")):
        with pytest.raises(ValueError, match="is no folder with corpus.jsonl and queries.jsonl"):
            evaluate.read_collection(path)


@given(st.dictionaries(st.text(min_size=1).filter(lambda id: id.strip() and not set(id) & set("\t\r\n")),
                       st.text().filter(str.strip), min_size=1))
def test_any_text_that_was_written_is_read_back(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("corpus")
    evaluate.write_collection(folder, texts, {"q": "x"}, {})
    assert evaluate.read_texts(folder / "corpus.jsonl") == texts


# --- BM25 -----------------------------------------------------------------------------------------


def test_bm25_equals_hand_sum():
    # "cat" is in 2 of 3 documents; lengths 3, 1, 2, mean 2; "the" is a stop word
    bm25 = evaluate.BM25(["the cat cat dog", "cat", "Dog-fish"])
    idf = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    first = idf * 2 / (2 + 0.9 * (1 - 0.4 + 0.4 * 3 / 2))
    second = idf * 1 / (1 + 0.9 * (1 - 0.4 + 0.4 * 1 / 2))
    assert bm25.scores("the cat?") == pytest.approx([first, second, 0.0])
    assert bm25.scores("CAT cat") == pytest.approx([2 * first, 2 * second, 0.0])  # repeated: counts twice
    assert bm25.scores("the unseen") == pytest.approx([0.0, 0.0, 0.0])


def test_bm25_search_is_best_first_with_ties_by_number():
    bm25 = evaluate.BM25(["a1", "b1", "a1", "c1", "a1"])
    documents, scores = bm25.search("a1", 4)
    assert documents.tolist() == [0, 2, 4, 1]
    assert scores[0] == scores[2] > scores[3] == 0.0
    assert bm25.search("a1", 2)[0].tolist() == [0, 2]
    assert bm25.search("zzz", 99)[0].tolist() == [0, 1, 2, 3, 4]


def test_bm25_survives_empty_texts_but_not_an_empty_corpus():
    assert evaluate.BM25(["", "the"]).search("the", 5)[1].tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="at least one document"):
        evaluate.BM25([])


@pytest.mark.parametrize("seed", range(3))
def test_bm25_scores_equal_bm25s_on_random_corpora(seed):
    bm25s = pytest.importorskip("bm25s")
    rng = random.Random(seed)
    words = [f"word{int(rng.paretovariate(0.6))}" for _ in range(20_000)]
    texts = [" ".join(rng.sample(words, rng.randint(2, 60))) for _ in range(400)]
    queries = [rng.sample(words, 5) for _ in range(50)]
    peer = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
    peer.index(bm25s.tokenize(texts, stopwords=[], show_progress=False), show_progress=False)
    ours = evaluate.BM25(texts)
    for query in queries:
        np.testing.assert_allclose(ours.scores(" ".join(query)), peer.get_scores(query), atol=1e-5)


# --- The paper's benchmarks: loaders on small files of the documented schemas ---------------------


def write_rows(path, rows, parquet):
    """Rows as PATH.jsonl, or as PATH-00000-of-00001.parquet, the hub's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if parquet:
        table = pytest.importorskip("pyarrow").Table.from_pylist(rows)
        name = path.with_name(path.name + "-00000-of-00001.parquet")
        pytest.importorskip("pyarrow.parquet").write_table(table, name)
    else:
        write(path.with_name(path.name + ".jsonl"), "".join(json.dumps(row) + "\n" for row in rows))


def small_bright(folder, parquet=False):
    """Two queries, four documents in the schema of xlangai/BRIGHT."""
    example = {"reasoning": "r", "gold_ids_long": ["long/1"], "gold_answer": "a"}
    examples = [
        {"query": "q zero", "id": "0", "excluded_ids": ["N/A"], "gold_ids": ["d/a b.txt", "d/1.txt"], **example},
        {"query": "q one", "id": "1", "excluded_ids": ["d/2.txt"], "gold_ids": ["d/1.txt"], **example},
    ]
    documents = [("d/a b.txt", "text of a b"), ("d/1.txt", "one"), ("d/2.txt", "two"), ("d/blank.txt", "\n")]
    rows = [{"id": doc, "content": text} for doc, text in documents]
    write_rows(folder / "documents" / "pony", rows, parquet)
    write_rows(folder / "long_documents" / "pony", [{"id": "long/1", "content": "a long text"}], parquet)
    write_rows(folder / "examples" / "pony", examples, parquet)
    rewritten = [{**row, "query": f"rewritten {row['query']}"} for row in examples]
    write_rows(folder / "gpt4_reason" / "pony", rewritten, parquet)
    return folder


@pytest.mark.parametrize("parquet", [False, True])
def test_prepare_bright_keeps_gold_excluded_and_rewritten_queries(tmp_path, parquet):
    source = small_bright(tmp_path / "clone", parquet)
    _, out, _ = command("--prepare", "bright/pony", "--source", source, "--out", tmp_path / "b")
    assert "3 documents (1 left out, 0 judged ones absent), 2 queries, rewritten as gpt4_reason" in out
    collection = evaluate.read_collection(tmp_path / "b")
    assert collection.corpus == {"d/a b.txt": "text of a b", "d/1.txt": "one", "d/2.txt": "two"}
    assert collection.queries == {"0": "q zero", "1": "q one"}
    assert collection.qrels == {"0": {"d/a b.txt": 1, "d/1.txt": 1}, "1": {"d/1.txt": 1}}
    assert collection.excluded == {"1": {"d/2.txt"}}  # and no "N/A"
    rewritten = evaluate.read_collection(tmp_path / "b", queries="gpt4_reason")
    assert rewritten.queries == {"0": "rewritten q zero", "1": "rewritten q one"}


@pytest.mark.parametrize("parquet", [False, True])
def test_prepare_r2med(tmp_path, parquet):
    clone = tmp_path / "clone"
    write_rows(clone / "corpus", [{"id": "x/Phototaxis_3.txt", "text": "light"}, {"id": "y", "text": "z"}], parquet)
    write_rows(clone / "query", [{"id": "0", "text": "why"}], parquet)
    write_rows(clone / "qrels", [{"q_id": "0", "p_id": "x/Phototaxis_3.txt", "score": 1}], parquet)
    evaluate.prepare("r2med/Biology", tmp_path / "r", source=clone)
    collection = evaluate.read_collection(tmp_path / "r")
    assert collection.queries == {"0": "why"} and len(collection.corpus) == 2
    assert collection.qrels == {"0": {"x/Phototaxis_3.txt": 1}}


def test_prepare_r2med_with_the_older_qrels_txt(tmp_path):
    clone = tmp_path / "clone"
    write_rows(clone / "corpus", [{"id": "x", "text": "light"}], False)
    write_rows(clone / "query", [{"id": "0", "text": "why"}], False)
    write(clone / "qrels.txt", "0 0 x 1\n")
    evaluate.prepare("r2med/IIYi-Clinical", tmp_path / "r", source=clone)
    assert evaluate.read_collection(tmp_path / "r").qrels == {"0": {"x": 1}}


@pytest.mark.parametrize("layout", ["folder", "hub"])
def test_prepare_beir_keeps_titles_and_only_the_judged_queries(tmp_path, layout):
    clone = tmp_path / "clone"
    corpus = [{"_id": "a", "title": "T", "text": "body"}, {"_id": "b", "title": None, "text": "x"}]
    queries = [{"_id": "1", "text": "judged"}, {"_id": "2", "text": "of the training split"}]
    if layout == "folder":
        write_rows(clone / "corpus", [{**row, "metadata": {}} for row in corpus], False)
        write_rows(clone / "queries", queries, False)
        write(clone / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore\n1\ta\t2\n")
    else:
        write_rows(clone / "corpus" / "corpus", corpus, True)
        write_rows(clone / "queries" / "queries", queries, True)
        write(clone / "test.tsv", "query-id\tcorpus-id\tscore\n1\ta\t2\n")
    evaluate.prepare("beir/nfcorpus", tmp_path / "n", source=clone)
    collection = evaluate.read_collection(tmp_path / "n")
    assert collection.corpus == {"a": "T\nbody", "b": "x"}
    assert (collection.queries, collection.qrels) == ({"1": "judged"}, {"1": {"a": 2}})
    assert collection.excluded == {}
    evaluate.prepare("beir/arguana", tmp_path / "a", source=clone)  # there queries are documents
    assert evaluate.read_collection(tmp_path / "a").excluded == {"1": {"1"}}


@pytest.mark.parametrize("parquet", [False, True])
def test_what_prepare_writes_can_be_read_also_with_ids_as_integers_and_null_texts(tmp_path, parquet):
    rows, clone = [{"_id": 7, "title": "T", "text": None}, {"_id": 8, "title": "", "text": "x"}], tmp_path / "beir"
    write_rows(clone / "corpus" / "corpus", rows, parquet)
    write_rows(clone / "queries" / "queries", [{"_id": 1, "text": "judged"}], parquet)
    write(clone / "test.tsv", "query-id\tcorpus-id\tscore\n1\t7\t2\n")
    evaluate.prepare("beir/nfcorpus", tmp_path / "b", source=clone)
    collection = evaluate.read_collection(tmp_path / "b")
    assert (collection.corpus, collection.queries) == ({"7": "T", "8": "x"}, {"1": "judged"})
    clone = tmp_path / "r2med"
    write_rows(clone / "corpus", [{"id": 5, "text": "light"}], parquet)
    write_rows(clone / "query", [{"id": 0, "text": "why"}], parquet)
    write_rows(clone / "qrels", [{"q_id": 0, "p_id": 5, "score": 2.0}], parquet)
    evaluate.prepare("r2med/Biology", tmp_path / "r", source=clone)
    collection = evaluate.read_collection(tmp_path / "r")
    assert (collection.queries, collection.qrels) == ({"0": "why"}, {"0": {"5": 2}})
    write_rows(clone / "qrels", [{"q_id": 0, "p_id": 5, "score": 0.5}], parquet)
    with pytest.raises(ValueError, match="r2med/Biology: the grade 0.5 is no whole number"):
        evaluate.prepare("r2med/Biology", tmp_path / "half", source=clone)


def test_prepare_names_what_is_wrong(tmp_path):
    for name in ("bright", "bright/chemistry", "msmarco/x", "r2med/biology"):
        with pytest.raises(ValueError, match="unknown benchmark"):
            evaluate.prepare(name, tmp_path / "b", source=tmp_path)
    with pytest.raises(ValueError, match=r"has none of examples/pony\.jsonl"):
        evaluate.prepare("bright/pony", tmp_path / "b", source=tmp_path)


def test_rows_without_an_expected_field_are_named(tmp_path):
    source = small_bright(tmp_path / "clone")
    write(source / "documents" / "pony.jsonl", '{"id": "d/1.txt", "text": "not content"}\n')
    with pytest.raises(ValueError, match="bright/pony: a row lacks a field or holds an odd value .'content'"):
        evaluate.prepare("bright/pony", tmp_path / "b", source=source)


def test_judged_documents_that_the_corpus_lacks_are_an_error(tmp_path):
    write_rows(tmp_path / "c" / "corpus", [{"_id": "a", "text": "x"}], False)
    write_rows(tmp_path / "c" / "queries", [{"_id": "1", "text": "q"}], False)
    write(tmp_path / "c" / "test.tsv", "query-id\tcorpus-id\tscore\n1\tgone\t2\n")
    with pytest.raises(ValueError, match="1 of 1 judged documents are missing"):
        evaluate.prepare("beir/other", tmp_path / "n", source=tmp_path / "c")


def test_a_few_absent_judged_documents_are_counted_but_accepted(tmp_path):
    """BEIR's arguana judges 1,406 documents, of which its corpus lacks 5."""
    write_rows(tmp_path / "c" / "corpus", [{"_id": f"d{i}", "text": "x"} for i in range(199)], False)
    write_rows(tmp_path / "c" / "queries", [{"_id": "1", "text": "q"}], False)
    rows = "".join(f"1\td{i}\t1\n" for i in range(200))
    write(tmp_path / "c" / "test.tsv", "query-id\tcorpus-id\tscore\n" + rows)
    line = evaluate.prepare("beir/other", tmp_path / "n", source=tmp_path / "c")
    assert "1 judged ones absent" in line


def test_published_means_equal_the_paper():
    """Averages that the paper prints (its tables) from the per-task figures that we store."""
    printed = {
        "bright": {"BM25": 27.0, "retriever": 32.9,
                   "GroupRank-7B": 34.3, "GroupRank-32B": 38.0},
        "r2med": {"retriever": 42.9, "GroupRank-7B": 47.8, "GroupRank-32B": 52.3},
    }  # fmt: skip
    for benchmark, means in printed.items():
        for system, mean in means.items():
            figures = evaluate.PUBLISHED[benchmark][system]
            assert len(figures) == len(evaluate.TASKS[benchmark].split())
            assert np.mean(figures) == pytest.approx(mean, abs=0.06)


# --- The command line -----------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """A BEIR folder named pony with two runs; query 3 is judged but in no run."""
    folder = tmp_path / "pony"
    qrels = {"1": {"a": 1, "b": 0}, "2": {"c": 2}, "3": {"a": 1}}
    evaluate.write_collection(folder, dict.fromkeys("abcd", "text"), dict.fromkeys("123", "q"), qrels, {"2": {"d"}})
    write(tmp_path / "one.run", "1 Q0 b 1 2 t\n1 Q0 a 2 1 t\n2 Q0 d 1 2 t\n2 Q0 c 2 1 t\n9 Q0 a 1 1 t\n")
    write(tmp_path / "two.run", "1 Q0 a 1 2 t\n1 Q0 b 2 1 t\n2 Q0 c 1 1 t\n2 Q0 b 2 1 t\n")  # b, c: tied
    return tmp_path


def test_the_table_says_everything_about_missing_queries_and_exclusions(small):
    qrels = small / "pony" / "qrels" / "test.tsv"
    _, out, _ = command("--qrels", qrels, "--run", small / "one.run", "--metrics", "ndcg@10", "p@1")
    # query 1: relevant document at rank 2; query 2: d is excluded, so c is first
    assert re.search(rf"^one +{50 * (1 / log2(3) + 1):.2f} +50.00$", out, re.M)
    titles = ("queries", "scored", "missing in the run", "without judgements", "documents excluded")
    assert re.search("^" + " +".join(titles) + r"\none +2 +1 +1 +1$", out, re.M)


def test_json_holds_fractions_comparisons_ties_and_each_query(small):
    qrels = small / "pony" / "qrels" / "test.tsv"
    _, out, _ = command("--qrels", qrels, "--run", small / "one.run", small / "two.run", "--json", "--metrics", "ndcg@10", "map",
                        "--complete", "--paper", "bright")  # fmt: skip
    report = json.loads(out)
    # two: query 1 is perfect; in query 2, c and b tie and c comes first (ids descending); 3 is missing
    assert report["runs"]["two"]["ndcg@10"] == pytest.approx((1 + 1 + 0) / 3)
    assert report["per_query"]["two"]["ndcg@10"] == {"1": 1.0, "2": 1.0, "3": 0.0}
    assert report["comparisons"]["two - one, ndcg@10"]["queries"] == 3
    assert report["ties"]["two"] | {"worst": 0, "expected": 0, "best": 0} == {
        "k": 10, "slots": 4, "decided": 2, "worst": 0, "expected": 0, "best": 0}  # fmt: skip
    assert report["runs"]["GroupRank-32B (published)"] == {"ndcg@10": 0.149, "map": None}


def test_options_that_change_the_numbers_are_named_in_the_output(small):
    arguments = ("--qrels", small / "pony" / "qrels" / "test.tsv", "--run", small / "two.run")
    assert "relevant from grade 1; mean over queries in both" in command(*arguments)[1]
    _, out, _ = command(*arguments, "--complete", "--relevance-level", "2")
    assert "relevant from grade 2; mean over all judged queries (--complete)" in out


def test_documents_named_like_their_query_are_dropped_on_request(small):
    qrels, run = write(small / "q", "1 0 a 1\n"), write(small / "r", "1 Q0 1 1 2 t\n1 Q0 a 2 1 t\n")
    arguments = ("--qrels", qrels, "--run", run, "--metrics", "mrr", "--json")
    means = [json.loads(command(*arguments, *more)[1])["runs"]["r"]["mrr"]
             for more in ((), ("--ignore-identical-ids",))]  # fmt: skip
    assert means == [1 / 2, 1.0]


def test_an_optional_package_that_is_absent_is_named_with_its_pip_command(small):
    code = ("import sys; sys.modules['matplotlib'] = None; sys.argv = ['evaluate.py', '--plot', 'x.jsonl']\n"
            "import evaluate; evaluate.run_cli(evaluate.main)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SCRIPT.parent, check=False)
    assert done.returncode == 2 and done.stderr.rstrip().endswith("pip install matplotlib")


@pytest.mark.parametrize("arguments, message", [
    (("--qrels", "nowhere", "--run", "one.run"), "error: nowhere: No such file or directory"),
    (("--qrels", "pony/qrels/test.tsv", "--run", "nowhere"), "error: nowhere: No such file or directory"),
    (("--qrels", "pony/qrels/test.tsv", "--run", "pony"), "error: pony: Is a directory"),
    (("--qrels", "pony/qrels/test.tsv", "--run", "other.run"), "share no query"),
    (("--qrels", "pony/qrels/test.tsv", "--run", "one.run", "--metrics", "dcg"), "unknown metric 'dcg'"),
    (("--qrels", "pony/qrels/test.tsv", "--run", "one.run", "--paper", "r2med"), "'pony' is no task of r2med"),
])  # fmt: skip
def test_mistakes_end_in_one_line_and_status_2(small, monkeypatch, arguments, message):
    monkeypatch.chdir(small)
    write(small / "other.run", "77 Q0 a 1 1 t\n")
    status, out, err = command(*arguments, check=False)
    assert (status, out) == (2, "")
    assert message in err and err.startswith("error: ") and err.count("\n") == 1


def test_no_command_is_a_usage_error_and_interrupts_exit_with_130():
    assert command(check=False)[0] == 2
    code = ("import evaluate, threading, time\n"
            "threading.Thread(target=time.sleep, args=(60,)).start()  # a request in flight\n"
            "def interrupted():\n    raise KeyboardInterrupt\n"
            "evaluate.run_cli(interrupted)")
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, timeout=20)
    assert done.returncode == 130  # at once


def test_faults_of_ours_keep_their_traceback():
    def broken():
        raise KeyError("x")

    with pytest.raises(KeyError):
        evaluate.run_cli(broken)


def test_help_starts_fast_and_imports_nothing_heavy():
    code = ("import sys; sys.argv = ['evaluate.py', '--help']\nimport evaluate\ntry:\n evaluate.main()\n"
            "finally:\n heavy = {'torch', 'matplotlib', 'pyarrow', 'huggingface_hub', 'scipy', 'pandas'}\n"
            " assert not heavy & set(sys.modules)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SCRIPT.parent, check=False)
    assert done.returncode == 0 and "evaluate runs:" in done.stdout, done.stderr


def test_the_commands_of_the_docstring_parse():
    for line in evaluate.__doc__.splitlines():
        if line.strip().startswith("python evaluate.py"):
            arguments = line.split("#")[0].split()[2:]
            assert vars(evaluate.build_parser().parse_args(arguments))


# --- Pictures -------------------------------------------------------------------------------------


def metrics_file(path):
    """A training log with some keys absent here and there."""
    rows = [{"stage": "sft", "step": i, "loss": 3 / (i + 1), "lr": 1e-3, "grad_norm": 1.0} for i in range(1, 61)]
    for i in range(1, 41):
        row = {"stage": "grpo", "step": i, "reward": 0.5 + i / 100, "reward/ndcg": 0.6 + i / 200, "kl": i / 1e4,
               "entropy": 0.5 - i / 400, "completion_tokens": 100 + i, "format_ok": 1.0, "loss": 0.0}  # fmt: skip
        rows.append({**row, "eval/ndcg@10": 0.8 + i / 400} if i % 10 == 0 else row)
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


needs_matplotlib = pytest.mark.skipif(
    not importlib.util.find_spec("matplotlib"), reason="matplotlib is not installed"
)


@needs_matplotlib
@pytest.mark.parametrize("text, message", [("{}\n", "nothing to draw"), ("1 Q0 a\n", "line 1: "), ("", "nothing")])
def test_files_with_nothing_to_draw_are_named_and_leave_no_picture(tmp_path, text, message):
    status, _, err = command("--plot", write(tmp_path / "x.jsonl", text), check=False)
    assert status == 2 and message in err and "x.jsonl" in err and err.count("\n") == 1
    assert not (tmp_path / "x.png").exists()


@needs_matplotlib
def test_training_and_comparisons_become_pictures(small):
    report = command("--qrels", small / "pony" / "qrels" / "test.tsv", "--run", small / "one.run",
                     small / "two.run", "--json")[1]  # fmt: skip
    for file in (metrics_file(small / "m.jsonl"), write(small / "pair.json", report)):
        out = file.with_suffix(".png")
        command("--plot", file, "--out", out)
        assert out.read_bytes().startswith(b"\x89PNG")
        assert command("--plot", file, "--out", out, check=False)[0] == 2  # exists


def test_a_query_that_exclusion_empties_counts_as_missing():
    run, n = evaluate.remove_documents({"a": {"d": 1.0}, "b": {"d": 1.0}}, {"a": {"d"}})
    assert (run, n) == ({"b": {"d": 1.0}}, 1)


def test_integer_scores_leave_biology_to_the_tie_break(real_data):
    """BRIGHT biology, scores times ten and rounded: the figures that the README names."""
    run = evaluate.read_run(real_data / "bright" / "biology.reasonir_top100.run")
    rounded = {q: {d: float(round(10 * s)) for d, s in scores.items()} for q, scores in run.items()}
    qrels = evaluate.read_qrels(real_data / "bright" / "biology.qrels")
    report = evaluate.tie_report(qrels, rounded)
    assert (report["slots"], report["decided"]) == (1030, 1010)
    spread = [round(100 * report[name], 2) for name in ("worst", "expected", "best")]
    assert spread == [20.24, 31.18, 65.17]
