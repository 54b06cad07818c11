"""Reranking (Eq. 1, Sec. 4.5): the three methods, pooling, fusion, retries, interrupted and split
jobs, sweeps, both back ends, misbehaving servers, real passages."""

import io
import json
import math
import os
import re
import signal
import threading
import time
import urllib.error
from collections import Counter

import numpy as np
import pytest
from conftest import LocalServer, save_tiny_model
from hypothesis import given
from hypothesis import strategies as st

import evaluate
import grouprank

# --- Groups, pooling, fusion --------------------------------------------------------------------


@given(st.integers(1, 120), st.integers(1, 25), st.integers(1, 3), st.integers(0, 2**32))
def test_every_round_holds_every_document_once_in_balanced_groups(n_docs, size, rounds, seed):
    rng = np.random.default_rng(seed)
    plan = grouprank.plan_groups(n_docs, size, rounds, 0, rng)
    assert len(plan) == rounds
    for groups in plan:
        assert sorted(i for group in groups for i in group) == list(range(n_docs))
        assert len(groups) == math.ceil(n_docs / size)  # Eq. 1: M = ceil(N / c)
        sizes = [len(group) for group in groups]
        assert max(sizes) <= size and max(sizes) - min(sizes) <= 1


def test_overlapping_groups_give_every_document_the_same_number_of_votes():
    (groups,) = grouprank.plan_groups(100, 20, 1, 10, np.random.default_rng(0))
    assert len(groups) == 10 and {len(group) for group in groups} == {20}
    assert set(Counter(i for group in groups for i in group).values()) == {2}


def test_groups_are_random_and_depend_on_the_seed_alone():
    first, again, other = (
        grouprank.plan_groups(50, 10, 1, 0, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first[0][0] != sorted(first[0][0])


@given(st.integers(1, 120), st.integers(1, 25), st.integers(0, 2**32))
def test_ranked_groups_hold_neighbours_in_random_order(n_docs, size, seed):
    """Tables 4 and 5 compare who is grouped with whom; what stands first in a prompt stays random."""
    first, second = grouprank.plan_groups(n_docs, size, 2, 0, np.random.default_rng(seed), True)
    assert [i for group in first for i in sorted(group)] == list(range(n_docs))
    assert list(map(sorted, first)) == list(map(sorted, second))
    assert len(first) == math.ceil(n_docs / size)
    if n_docs == size == 20:
        assert first != second and first[0] != sorted(first[0])


def windows_of_rank_llm(n_docs, window, step):
    """The loop of rank_llm's sliding windows, in our words."""
    windows, end, start = [], n_docs, n_docs - window
    while end > 0 and start + step != 0:
        start = max(start, 0)
        windows.append((start, end))
        start, end = start - step, end - step
    return windows


@given(st.integers(1, 150), st.integers(1, 30), st.integers(1, 30))
def test_windows_slide_up_as_in_rank_llm(n_docs, window, step):
    step = min(step, window)
    windows = grouprank.window_places(n_docs, window, step)
    if n_docs != window - step:  # there, the loop above never starts and ranks nothing
        assert windows == windows_of_rank_llm(n_docs, window, step)
    assert len(windows) == (1 + math.ceil((n_docs - window) / step) if n_docs > window else 1)
    assert {i for start, end in windows for i in range(start, end)} == set(range(n_docs))


def test_fusion_is_a_weighted_sum_with_min_max_first_stage_scores():
    """Means 8 and 2 of 10; first-stage scores 30, 10 become 1, 0; weight 0.25."""
    fused = grouprank.fuse_scores([8, 2, None], [30, 10, 20], 0.25)
    assert fused[:2] == pytest.approx([0.75 * 0.8 + 0.25 * 1, 0.75 * 0.2 + 0.25 * 0])
    assert fused[2] is None
    assert grouprank.fuse_scores([8, 2], [5, 5], 0.25) == pytest.approx([0.75 * 0.8, 0.75 * 0.2])


def test_ties_go_by_first_stage_rank():
    assert grouprank.order_candidates([0.5, 0.7, 0.5, 0.7]) == [1, 3, 0, 2]


def test_unscored_documents_keep_their_places_and_never_count_as_zero():
    assert grouprank.order_candidates([None, 0.1, None, 0.9]) == [0, 3, 2, 1]
    assert grouprank.order_candidates([None, None, None]) == [0, 1, 2]


def make_answer(scores, method="groupwise"):
    """A well-formed answer."""
    body = json.dumps({f"[{i}]": s for i, s in enumerate(scores, 1)})
    if method == "pointwise":
        (body,) = scores
    if method == "listwise":
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        body = " > ".join(f"[{i + 1}]" for i in order)
    return f"<reason>fine</reason><answer>{body}</answer>"


class Scripted:
    """A back end that answers with the number at the end of each document, with planned faults."""

    model = "scripted"  # like an endpoint's: a name

    def __init__(self, faults=()):
        self.faults = list(faults)
        self.seeds, self.batches = [], []

    def __call__(self, chats, temperature, top_p, progress=None):
        answers = []
        self.batches.append(chats)
        for chat in chats:
            self.seeds.append(chat.seed)
            method = next(name for name, m in grouprank.METHODS.items() if m.prompt == chat.prompt)
            text = make_answer([int(text.split()[-1]) for text in chat.texts], method)
            fault = self.faults.pop(0) if self.faults else None
            if fault is not None:
                text = fault
            error = "HTTP 500" if text == "error" else ""
            answers.append(grouprank.Completion("" if error else text, error=error))
        return answers


def candidates(scores, qid="q"):
    """A query whose documents carry the score that a good model would give."""
    n = len(scores)
    texts = [f"text {i} {score}" for i, score in enumerate(scores)]
    return grouprank.Candidates(qid, "query", [f"d{i}" for i in range(n)], texts, list(range(n, 0, -1)))


def rank(backend, queries, **changes):
    """Rank with small groups; returns the rankings and the counts."""
    cfg = grouprank.Config(**({"docs_per_group": 3} | changes))
    counts, prompt = Counter(), grouprank.METHODS[cfg.method].prompt
    return grouprank.rank_queries(backend, prompt, queries, cfg, counts), counts


def test_scores_are_pooled_over_groups_and_rounds():
    (ranking,), counts = rank(Scripted(), [candidates([1, 9, 5, 9, 0, 7, 3])], rounds=4)
    assert ranking.order == [1, 3, 5, 2, 6, 0, 4]
    assert ranking.means == [1, 9, 5, 9, 0, 7, 3]
    assert {len(votes) for votes in ranking.votes} == {4}
    assert counts["calls"] == math.ceil(7 / 3) * 4 == counts["ok"]


@pytest.mark.parametrize(
    ("fault", "counted"),
    [
        ("no tags at all", "bad_tags"),
        ("<reason></reason><answer>{not json}</answer>", "bad_json"),
        (make_answer([9, 9]), "missing"),
        (make_answer([9, 9, 9, 9]), "out_of_range"),
        (make_answer([9, 9, 99]), "bad_score"),
        ("error", "errors"),
    ],
)
def test_an_unusable_answer_is_asked_again_with_another_seed(fault, counted):
    backend = Scripted([fault])
    (ranking,), counts = rank(backend, [candidates([1, 9, 5])])
    assert ranking.order == [1, 2, 0] and ranking.means == [1, 9, 5]
    assert counts[counted] == counts["retried"] == 1 and counts["calls"] == 2
    assert len(set(backend.seeds)) == 2
    assert counts["failed groups"] == counts["unscored documents"] == 0


def test_a_harmless_fault_is_counted_and_not_asked_again():
    text = '<answer>{"[1]": 1, "[2]": 9, "[3]": 5}</answer>'
    (ranking,), counts = rank(Scripted([text]), [candidates([0, 0, 0])])
    assert sorted(ranking.means) == [1, 5, 9]
    assert counts["bad_tags"] == counts["calls"] == 1


def test_when_all_tries_fail_the_valid_scores_of_the_tries_stand():
    partial = '<reason></reason><answer>{"[1]": 4}</answer>'
    other = '<reason></reason><answer>{"[1]": 8, "[3]": 6}</answer>'
    backend = Scripted([partial, "nothing", other, "nothing"])
    query = candidates([0, 0, 0])
    (ranking,), counts = rank(backend, [query], retries=3)
    means = [ranking.means[i] for i in ranking.reasons[0][0]]
    assert means == [4, None, 6]  # in the order of the prompt; the earliest score stands
    assert (counts["failed groups"], counts["unscored documents"]) == (1, 1)
    assert sorted(ranking.order) == [0, 1, 2]


# --- The three methods --------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "c", "t", "w", "s"), [(100, 20, 1, 20, 10), (95, 20, 4, 20, 10),
                                                     (7, 3, 2, 4, 1), (20, 20, 1, 20, 10),
                                                     (3, 20, 2, 20, 10)])  # fmt: skip
def test_calls_are_those_of_the_formulas(n, c, t, w, s):
    """The paper's Table 13: N/c, N and N/s, times the rounds or passes."""
    expected = {"groupwise": math.ceil(n / c) * t, "pointwise": n * t,
                "listwise": (1 + math.ceil((n - w) / s) if n > w else 1) * t}  # fmt: skip
    query = candidates([i * 7 % 11 for i in range(n)])
    for method, calls in expected.items():
        backend = Scripted()
        settings = {"docs_per_group": c, "rounds": t, "window": w, "step": s, "method": method}
        _, counts = rank(backend, [query], **settings)
        assert counts["calls"] == len(backend.seeds) == calls == counts["ok"], method
        assert calls == grouprank.planned_calls(query, grouprank.Config(**settings))
        assert len(set(backend.seeds)) == calls  # no two calls share a random stream
        asked_at_once = [len(chats) for chats in backend.batches]
        assert asked_at_once == ([1] * calls if method == "listwise" else [calls])


@given(st.data())
def test_every_document_comes_out_once_whatever_the_method_and_the_answers(data):
    text = st.one_of(st.none(), st.sampled_from([
        "error", "no tags", "<answer>[9] > [1] > [1]</answer>", "<answer>3</answer>",
        make_answer([9, 9]), "<reason></reason><answer>[2]</answer>", "<answer>[0] > [77]</answer>",
    ]))  # fmt: skip
    backend = Scripted(data.draw(st.lists(text, max_size=40)))
    queries = [candidates([5] * data.draw(st.integers(1, 13)), f"q{i}") for i in range(2)]
    method = data.draw(st.sampled_from(sorted(grouprank.METHODS)))
    rankings, _ = rank(backend, [*queries, candidates([1], "never fails")], method=method, retries=1,
                       window=4, step=2, rounds=2, grouping=data.draw(st.sampled_from(["random", "rank"])))  # fmt: skip
    for query, ranking in zip(queries, rankings, strict=False):
        assert sorted(ranking.order) == list(range(len(query.ids)))
        values = grouprank.carried_scores(ranking)
        assert values == sorted(values, reverse=True)


def test_pointwise_asks_for_one_document_with_its_own_prompt():
    backend = Scripted()
    (ranking,), _ = rank(backend, [candidates([1, 10, 5])], method="pointwise", rounds=2)
    assert ranking.order == [1, 2, 0] and ranking.votes == [[1, 1], [10, 10], [5, 5]]
    assert {chat.prompt for chat in backend.batches[0]} == {grouprank.METHODS["pointwise"].prompt}
    assert sorted(chat.texts for chat in backend.batches[0][:3]) == [("text 0 1",), ("text 1 10",), ("text 2 5",)]


def test_one_document_a_group_is_the_papers_c_1_and_keeps_the_groupwise_prompt():
    backend = Scripted()
    (ranking,), counts = rank(backend, [candidates([1, 10, 5])], docs_per_group=1)
    assert ranking.order == [1, 2, 0] and counts["calls"] == 3
    assert {chat.prompt for chat in backend.batches[0]} == {grouprank.Prompt()}


def slide_by_hand(scores, window, step, passes):
    """Sort each window where it stands, from the bottom up."""
    order = list(range(len(scores)))
    for _ in range(passes):
        for start, end in windows_of_rank_llm(len(scores), window, step) or [(0, len(scores))]:
            order[start:end] = sorted(order[start:end], key=lambda i: -scores[i])
    return order


@given(st.lists(st.integers(0, 10), min_size=1, max_size=60), st.integers(1, 8), st.integers(1, 3))
def test_listwise_equals_sorting_each_window_where_it_stands(scores, step, passes):
    window = step + 3
    (ranking,), _ = rank(Scripted(), [candidates(scores)], method="listwise", window=window,
                         step=step, rounds=passes)  # fmt: skip
    assert ranking.order == slide_by_hand(scores, window, step, passes)
    n = len(scores)
    assert [ranking.means[i] for i in ranking.order] == pytest.approx([10 * (n - p) / n for p in range(n)])


def test_one_pass_brings_the_best_ten_of_a_hundred_to_the_top():
    scores = [i % 50 for i in range(100)]  # the best stand in the middle and at the bottom
    (ranking,), _ = rank(Scripted(), [candidates(scores)], method="listwise")
    best = sorted(scores, reverse=True)
    assert [scores[i] for i in ranking.order[:10]] == best[:10]
    assert [scores[i] for i in ranking.order] != best  # one pass does not sort the whole list


def test_windows_of_all_queries_are_asked_together_and_each_waits_for_the_one_below():
    backend = Scripted()
    queries = [candidates(range(n), f"q{n}") for n in (30, 20, 10)]
    rankings, counts = rank(backend, queries, method="listwise", window=10, step=5)
    asked = [[chat.seed[1] for chat in chats] for chats in backend.batches]
    assert asked == [["q30", "q20", "q10"], ["q30", "q20"], ["q30", "q20"], ["q30"], ["q30"]]
    assert counts["calls"] == 5 + 3 + 1
    assert backend.batches[0][0].texts[-1] == "text 29 29"  # the list's last document
    assert backend.batches[1][0].texts[-5:] == tuple(f"text {i} {i}" for i in range(29, 24, -1))
    assert [r.order[0] for r in rankings] == [29, 19, 9]


@given(st.lists(st.integers(0, 7), max_size=8))
def test_a_permutation_is_repaired_as_reference_tools_do_and_counted(numbers):
    """RankGPT and rank_llm: of a repeated number the first counts, unknown ones go, the rest follow."""
    answer = " > ".join(f"[{number}]" for number in numbers)
    backend = Scripted([f"<reason>x</reason><answer>{answer}</answer>"])
    (ranking,), counts = rank(backend, [candidates([0] * 5)], method="listwise", retries=0)
    order = []
    for number in [*numbers, 1, 2, 3, 4, 5]:
        if 1 <= number <= 5 and number - 1 not in order:
            order.append(number - 1)
    assert ranking.order == order
    known = [number for number in numbers if 1 <= number <= 5]
    counted = ("bad_json" if not known else "out_of_range" if known != numbers
               else "duplicate" if len(set(known)) < len(known)
               else "missing" if len(known) < 5 else "ok")  # fmt: skip
    assert counts[counted] == counts["calls"] == 1
    assert counts["failed groups"] == (counted == "bad_json")  # asked again, then the window's order


def test_a_window_without_a_usable_answer_is_asked_again_and_in_the_end_keeps_its_order():
    scores = [3, 9, 1, 7, 2, 8]  # windows [2, 6), [0, 4)
    backend = Scripted(["nothing", "error"])
    (ranking,), counts = rank(backend, [candidates(scores)], method="listwise", window=4, step=2, retries=1)
    assert [scores[i] for i in ranking.order] == [9, 7, 3, 1, 2, 8]  # the first window never answered
    assert [ranking.means[i] for i in ranking.order[-2:]] == [None, None]
    assert (counts["failed groups"], counts["retried"], counts["unscored documents"]) == (1, 1, 2)
    assert counts["errors"] == counts["bad_tags"] == 1


def test_a_listwise_place_fuses_with_the_first_stage():
    """Places 1, 1/2 from the model against 1, 0 (reversed) from the first stage."""
    (ranking,), _ = rank(Scripted(), [candidates([1, 9])], method="listwise", fusion_weight=0.5)
    assert ranking.finals == pytest.approx([0.5 * 0.5 + 0.5 * 1, 0.5 * 1 + 0.5 * 0])
    assert ranking.order == [0, 1]


@pytest.mark.parametrize("method", ["groupwise", "pointwise", "listwise"])
def test_an_answer_that_was_cut_anywhere_gives_no_score_that_was_not_meant(method):
    """A 10 cut to 1, or a [12] cut to [1], must not count."""
    gold = [10] if method == "pointwise" else [10, 3, *range(10), 10]
    text = make_answer(gold, method)
    order = sorted(range(len(gold)), key=lambda i: -gold[i])
    readable = 0
    for cut in range(len(text) + 1):
        completion = grouprank.Completion(text[:cut], truncated=True)
        answer = grouprank.count_answer(completion, grouprank.METHODS[method], len(gold), Counter())
        if answer.scores is not None and method == "listwise":
            seen = [i for i in order if f"[{i + 1}]" in text[:cut] or text[:cut].endswith(f"[{i + 1}")]
            read = sorted(range(len(gold)), key=lambda i: -answer.scores[i])
            assert any(read[:k] == order[:k] and read[k:] == sorted(read[k:]) for k in (len(seen), len(seen) - 1))
            readable += 1
        elif answer.scores is not None and any(s is not None for s in answer.scores):
            assert answer.scores == gold
            readable += 1
    assert readable > 0


def test_the_prompt_is_the_methods_unless_the_checkpoint_was_trained_for_it(tmp_path, capsys):
    prompt = grouprank.Prompt("Rate.", "{query} {documents}")
    meta = {"prompt": {"system": prompt.system, "user": prompt.user}, "prompt_hash": prompt.hash}
    (tmp_path / "meta.json").write_text(json.dumps(meta))  # of a groupwise checkpoint
    model = {"model": str(tmp_path)}
    assert grouprank.rerank_settings(model)[1] == prompt
    assert capsys.readouterr().err == ""
    asked = grouprank.rerank_settings(model | {"method": "listwise"})[1]
    assert asked == grouprank.METHODS["listwise"].prompt
    assert "another wording can cost points silently" in capsys.readouterr().err
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"method": "pointwise"}))
    cfg, asked = grouprank.rerank_settings(model)
    assert (cfg.method, asked) == ("pointwise", prompt)
    assert grouprank.rerank_settings(model | {"method": "groupwise"})[1] == grouprank.Prompt()


def test_other_methods_are_trained_by_sft_on_rows_of_ones_own():
    train = ["--train", "--method", "listwise"]
    with pytest.raises(ValueError, match="--method needs --model: the demo's rows are groupwise"):
        grouprank.main(train)
    with pytest.raises(ValueError, match="--method listwise can be trained by --stage sft"):
        grouprank.main([*train, "--model", "m", "--data", "rows.jsonl"])


def test_reading_candidates_honours_exclusions_and_the_cut(tmp_path):
    evaluate.write_collection(
        tmp_path, {"a": "A", "b": "B", "c": "C"}, {"q": "Q", "r": "R"},
        {"q": {"a": 1}}, {"q": {"b"}},
    )  # fmt: skip
    evaluate.write_run(tmp_path / "x.run", {"q": [("b", 3.0), ("c", 2.0), ("a", 1.0)]})
    cfg = grouprank.Config(data=str(tmp_path), run=str(tmp_path / "x.run"), top_k=2)
    queries, _, counts = grouprank.read_candidates(cfg)
    assert [(q.qid, q.ids, list(q.texts)) for q in queries] == [("q", ["c", "a"], ["C", "A"])]
    assert counts["queries without a run"] == 1


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("", r"x\.run: the run is empty"),
        ('{"q": {}}', r"x\.run: the run is empty"),
        ("z Q0 a 1 1.0 t", "share no query: the run has 'z', the collection 'q'"),
        ("q Q0 z 1 1.0 t", r"query 'q' names document 'z', which .*corpus\.jsonl does not have"),
        ("q Q0 b 1 1.0 t", r"x\.run leaves nothing to rerank: .* excludes each document"),
    ],
)
def test_a_run_without_candidates_is_one_sentence(tmp_path, run, message):
    evaluate.write_collection(tmp_path, {"a": "A", "b": "B"}, {"q": "Q"}, {"q": {"a": 1}}, {"q": {"b"}})
    (tmp_path / "x.run").write_text(run)
    with pytest.raises(ValueError, match=message):
        grouprank.read_candidates(grouprank.Config(data=str(tmp_path), run=str(tmp_path / "x.run")))


def test_texts_are_read_when_their_batch_of_queries_is_asked(tmp_path, monkeypatch):
    n_queries = 3 * grouprank.QUERIES_PER_BATCH
    corpus = {f"d{i}": f"text 3 {i % 10}" for i in range(n_queries)}
    ids = list(corpus)
    run = {f"q{i}": [(ids[i], 2.0), (ids[i - 1], 1.0)] for i in range(n_queries)}
    evaluate.write_collection(tmp_path, corpus, dict.fromkeys(run, "query"), {"q0": {"d0": 1}})
    evaluate.write_run(tmp_path / "x.run", run)
    n_read, pread = [0], os.pread
    monkeypatch.setattr(os, "pread", lambda *args: n_read.append(n_read[-1] + 1) or pread(*args))
    cfg = grouprank.Config(data=str(tmp_path), run=str(tmp_path / "x.run"))
    queries, _, _ = grouprank.read_candidates(cfg)
    n_read[:] = [0]
    task = grouprank.describe_task(cfg, grouprank.Prompt(), queries, "")
    assert len(n_read) == 1  # comparing two jobs reads no text either
    batches = grouprank.rank_batches(Scripted(), grouprank.Prompt(), queries, cfg)
    after = [n_read[-1] for _ in batches]  # two documents a query, each read once
    assert after == [2 * grouprank.QUERIES_PER_BATCH * i for i in (1, 2, 3)]
    evaluate.write_collection(tmp_path, corpus | {"d0": "other"}, dict.fromkeys(run, "query"), {"q0": {"d0": 1}})
    changed = grouprank.describe_task(cfg, grouprank.Prompt(), grouprank.read_candidates(cfg)[0], "")
    assert changed["candidates"] != task["candidates"]


# --- Jobs that stop and go on, jobs in parts, sweeps ----------------------------------------------


@pytest.fixture
def collection(tmp_path):
    """Nine queries with seven documents each; a document ends with the score it deserves."""
    corpus, queries, qrels, run = {}, {}, {}, {}
    for q in range(9):
        queries[f"q{q}"] = f"query {q}"
        qrels[f"q{q}"] = {f"q{q} d{i}": (i * (q + 2)) % 11 for i in range(7)}  # ids hold spaces
        corpus |= {d: f"text of {d} {score}" for d, score in qrels[f"q{q}"].items()}
        run[f"q{q}"] = [(d, 7.0 - i) for i, d in enumerate(qrels[f"q{q}"])]
    evaluate.write_collection(tmp_path / "beir", corpus, queries, qrels)
    evaluate.write_run(tmp_path / "first.run", run)
    return tmp_path


@pytest.fixture
def command(collection, monkeypatch):
    """Run one command on the collection with a scripted back end; returns that."""
    monkeypatch.setattr(grouprank, "QUERIES_PER_BATCH", 2)

    def run(mode, out, *options, backend=None):
        backend = backend or Scripted()
        monkeypatch.setattr(grouprank, "load_backend", lambda cfg: backend)
        grouprank.main([*mode.split(), "--endpoint=http://h/v1", "--model=m", "--docs-per-group=3",
                        f"--data={collection / 'beir'}", f"--run={collection / 'first.run'}",
                        f"--out={collection / out}", *options])  # fmt: skip
        return backend

    return run


class Dying(Scripted):
    """A back end whose process is killed in the middle of its third batch, while it writes a line."""

    def __init__(self, partial):
        super().__init__()
        self.partial = partial

    def __call__(self, *arguments, **options):
        if len(self.batches) == 2:
            with open(self.partial, "a") as file:
                file.write('{"task": {"docs_per')
            raise KeyboardInterrupt
        return super().__call__(*arguments, **options)


def test_a_killed_job_goes_on_and_ends_with_the_same_bytes(collection, command, capsys):
    whole = command("--rerank", "whole.run")
    partial = collection / "o.run.partial"
    killed = Dying(partial)
    with pytest.raises(KeyboardInterrupt):
        command("--rerank", "o.run", backend=killed)
    assert not (collection / "o.run").exists() and len(killed.seeds) == 2 * 2 * 3
    with pytest.raises(ValueError, match="holds a part of this job: add --resume"):
        command("--rerank", "o.run")
    with pytest.raises(ValueError, match="belongs to another job: its rounds is 1, not 2"):
        command("--rerank", "o.run", "--resume", "--rounds=2")
    rest = command("--rerank", "o.run", "--resume", "--concurrency=3")
    assert killed.seeds + rest.seeds == whole.seeds  # nothing is asked twice
    assert (collection / "o.run").read_bytes() == (collection / "whole.run").read_bytes()
    counts = [json.loads((collection / f"{name}.run.json").read_text())["counts"] for name in ("o", "whole")]
    assert counts[0] == counts[1] and counts[0]["calls"] == 9 * 3
    assert not partial.exists()
    assert command("--rerank", "o.run", "--resume").seeds == []
    assert "is complete" in capsys.readouterr().out
    with pytest.raises(ValueError, match="o.run belongs to another job: its rounds is 1, not 2"):
        command("--rerank", "o.run", "--resume", "--rounds=2")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_batch_saves_and_says_how_to_go_on(collection, command, capfd, number):
    class Signalled(Scripted):
        def __call__(self, *arguments, **options):
            if len(self.batches) == 1:
                os.kill(os.getpid(), number)
            return super().__call__(*arguments, **options)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background: ignored
    try:
        with pytest.raises(SystemExit) as stop:
            command("--rerank", "o.run", backend=Signalled())
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == 128 + number
    assert "stopped after batch 2; to go on, repeat the command with --resume" in capfd.readouterr().out
    command("--rerank", "whole.run")
    command("--rerank", "o.run", "--resume")
    assert (collection / "o.run").read_bytes() == (collection / "whole.run").read_bytes()


def test_a_folder_as_out_is_refused_before_anything_is_asked(collection, command):
    (collection / "folder").mkdir()
    backend = Scripted()
    with pytest.raises(ValueError, match="folder is a folder; --rerank writes a run file"):
        command("--rerank", "folder", backend=backend)
    assert backend.seeds == []


def test_a_second_process_is_refused_in_one_job(collection, command):
    class Twice(Scripted):
        def __call__(self, *arguments, **options):
            for option in ("--resume", "--overwrite"):
                with pytest.raises(ValueError, match="another process works on .*o.run.partial"):
                    grouprank.main([*given, option])
            return super().__call__(*arguments, **options)

    given = ["--rerank", "--endpoint=http://h/v1", "--model=m", f"--data={collection / 'beir'}",
             f"--run={collection / 'first.run'}", f"--out={collection / 'o.run'}"]  # fmt: skip
    command("--rerank", "whole.run")
    command("--rerank", "o.run", backend=Twice())
    assert (collection / "o.run").read_bytes() == (collection / "whole.run").read_bytes()
    assert not (collection / "o.run.partial").exists()


def test_other_candidates_are_another_job(collection, command):
    with pytest.raises(KeyboardInterrupt):
        command("--rerank", "o.run", backend=Dying(collection / "o.run.partial"))
    with pytest.raises(ValueError, match="belongs to another job: its candidates is"):
        command("--rerank", "o.run", "--resume", "--top-k=5", "--run", str(collection / "first.run"))
    command("--rerank", "o.run", "--overwrite")
    assert (collection / "o.run").exists()


@pytest.mark.parametrize("method", sorted(grouprank.METHODS))
def test_parts_of_a_job_merge_to_the_bytes_of_the_whole(collection, command, method):
    command("--rerank", "whole.run", "--method", method)
    parts = [command("--rerank", "o.run", f"--shard={i}/4", "--method", method) for i in (1, 2, 3, 4)]
    assert [len({seed[1] for seed in part.seeds}) for part in parts] == [3, 2, 2, 2]
    grouprank.main(["--merge", "--out", str(collection / "o.run")])
    assert (collection / "o.run").read_bytes() == (collection / "whole.run").read_bytes()
    whole, merged = (json.loads((collection / f"{n}.run.json").read_text()) for n in ("whole", "o"))
    for name in ("counts", "queries", "documents", "task", "prompt_hash"):
        assert merged[name] == whole[name]


def test_a_merge_misses_no_part(collection, command):
    merge = ["--merge", "--out", str(collection / "o.run")]
    with pytest.raises(ValueError, match=r"needs the parts of one split, o.run.1-of-N to .* there are ; missing are o.run.1-of-1"):
        grouprank.main(merge)
    for i in (1, 4):
        command("--rerank", "o.run", f"--shard={i}/4")
    with pytest.raises(ValueError, match=r"missing are o.run.2-of-4, o.run.3-of-4"):
        grouprank.main(merge)
    command("--rerank", "o.run", "--shard=2/4", "--rounds=2")
    command("--rerank", "o.run", "--shard=3/4")
    with pytest.raises(ValueError, match="o.run.2-of-4 belongs to another job: its rounds is 2, not 1"):
        grouprank.main(merge)
    command("--rerank", "o.run", "--shard=2/4", "--overwrite")
    lines = (collection / "o.run.3-of-4").read_text().splitlines(keepends=True)
    (collection / "o.run.3-of-4").write_text("".join(lines[:7]))
    with pytest.raises(ValueError, match="o.run.3-of-4 holds 1 queries, not the 2 that were written"):
        grouprank.main(merge)
    command("--rerank", "o.run", "--shard=1/3")
    with pytest.raises(ValueError, match=r"there are o.run.1-of-3, o.run.1-of-4, .* missing are none"):
        grouprank.main(merge)
    with pytest.raises(ValueError, match="--shard 11/12: there are only 9 queries"):
        command("--rerank", "o.run", "--shard=11/12")
    for wrong in ("0/4", "5/4", "x", "1/0", "-1/4"):
        with pytest.raises(ValueError, match="--shard must be i/n"):
            grouprank.Config(shard=wrong)


def test_a_sweep_writes_a_line_for_each_combination_and_keeps_finished_ones(collection, command, capsys):
    path = collection / "sweep.jsonl"
    sweep = "--sweep docs-per-group=1,7 rounds=1,2"
    first = command(sweep, "sweep.jsonl")
    rows = [json.loads(line) for line in path.open()]
    assert [(r["docs_per_group"], r["rounds"], r["calls"]) for r in rows] == [
        (1, 1, 9 * 7), (1, 2, 9 * 14), (7, 1, 9), (7, 2, 18)]  # fmt: skip
    assert all(r["ndcg@10"] == pytest.approx(1.0) and r["queries"] == 9 for r in rows)
    assert "docs-per-group 7, rounds 2: NDCG@10 1.0000, 2 calls and" in capsys.readouterr().out
    with pytest.raises(ValueError, match="add --resume"):
        command(sweep, "sweep.jsonl")
    with pytest.raises(ValueError, match="--shard splits a --rerank"):
        command(sweep, "other.jsonl", "--shard=1/2")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]) + '{"docs')
    second = command(sweep.replace("1,7", "1,7,3"), "sweep.jsonl", "--resume")
    assert second.seeds[:18] == first.seeds[-18:] and len(second.seeds) == 18 + 27 + 54
    again = [json.loads(line) for line in path.open()]
    assert [line | {"seconds": 0} for line in again[:4]] == [row | {"seconds": 0} for row in rows]


def test_a_sweep_measures_the_ranking_that_a_run_would_hold(collection, command):
    """Tied scores go by first-stage rank, not by document id as in a run with ties."""
    tied = [make_answer([5] * n) for _ in range(9) for n in (3, 2, 2)]
    command("--sweep rounds=1", "s.jsonl", backend=Scripted(tied))
    (row,) = map(json.loads, (collection / "s.jsonl").open())
    qrels = evaluate.read_qrels(collection / "beir" / "qrels" / "test.tsv")
    first_stage = evaluate.read_run(collection / "first.run")
    assert row["ndcg@10"] == pytest.approx(grouprank.mean_ndcg(qrels, first_stage))


def test_a_sweep_over_methods_gives_each_its_prompt(collection, command):
    backend = command("--sweep method=pointwise,listwise,groupwise grouping=rank", "s.jsonl")
    asked = dict.fromkeys(chat.prompt for chats in backend.batches for chat in chats)
    assert list(asked) == [grouprank.METHODS[m].prompt for m in ("pointwise", "listwise", "groupwise")]
    rows = [json.loads(line) for line in (collection / "s.jsonl").open()]
    assert [(r["method"], r["grouping"], r["calls"]) for r in rows] == [
        ("pointwise", "rank", 63), ("listwise", "rank", 9), ("groupwise", "rank", 27)]  # fmt: skip


def test_a_sweep_is_drawn_with_a_line_for_each_setting(tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    rows = [{"method": "groupwise", "docs_per_group": c, "rounds": t, "grouping": g, "seed": s,
             "ndcg@10": 0.5 + 0.01 * c + 0.1 * s}
            for c in (5, 10) for t in (1, 2) for g in ("random", "rank") for s in (0, 1)]  # fmt: skip
    rows.append({"method": "pointwise", "docs_per_group": 20, "rounds": 1, "grouping": "random", "ndcg@10": 0.4})
    evaluate._plot_sweep(figure, rows)
    left, right = figure.axes
    lines = {line.get_label(): np.ravel(line.get_data()) for line in left.get_lines()}
    labels = {f"groupwise, {grouping}, t = {t}" for grouping in ("random", "rank") for t in (1, 2)}
    assert lines.keys() == labels | {"pointwise, t = 1"}
    assert lines["groupwise, rank, t = 2"] == pytest.approx([5, 10, 60.0, 65.0])  # the mean of two seeds
    assert lines["pointwise, t = 1"] == pytest.approx([0, 1, 40, 40])  # across the axes: it has no c
    assert [line.get_label() for line in right.get_lines()][-1] == "pointwise"
    figure.savefig(tmp_path / "x.png")
    for axis in figure.axes:
        assert axis.get_legend().get_window_extent().y1 < axis.get_window_extent().y0  # covers no curve


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["model=a,b"], "one of method, grouping"),
        (["rounds"], "give NAME=V1,V2"),
        (["rounds=1", "rounds=2"], "once for each NAME"),
    ],
)
def test_a_wrong_sweep_is_one_sentence(items, message):
    with pytest.raises(ValueError, match=message):
        grouprank.read_sweep(items)


@pytest.mark.parametrize(("item", "option"), [("rounds=1,two", "rounds"), ("method=pairwise", "method")])
def test_a_value_of_a_sweep_is_one_that_its_option_takes(item, option, capsys):
    with pytest.raises(SystemExit):
        grouprank.read_sweep([item])
    assert f"argument --{option}: invalid" in capsys.readouterr().err


# --- A local server that speaks the chat-completions interface -----------------------------------


# What a misbehaving server does to a request.
ANSWERS = ("json", "missing", "out of range", "length")  # an answer comes, with fewer scores
FAULTS = (*ANSWERS, "500", "429", "429 wait", "408", "close", "half", "short", "html", "no choices",
          "no message", "not a dict", "hang", "dribble")  # fmt: skip


class GoldServer(LocalServer):
    """Answers prompts with gold labels, looked up by document text; every third request fails.

    With `always`, every request meets that fault.
    """

    def __init__(self, gold, faulty=False, always=""):
        self.gold, self.faulty, self.always = gold, faulty, always
        self.requests, self.lock = [], threading.Lock()

    def post(self, handler, body):
        with self.lock:
            number = len(self.requests)
            self.requests.append((handler.path, body, handler.headers.get("Authorization")))
        fault = self.always
        if self.faulty and number % 3 == 0:
            fault = FAULTS[number // 3 % len(FAULTS)]
        self.reply(handler, body, fault)

    def scores(self, body):
        """The gold labels of the documents in the prompt, in their order."""
        block = body["messages"][-1]["content"]
        block = re.split(r"documents?:\n\n", block)[1].partition("\n\nReply in exactly")[0]
        found = [self.gold[piece.partition("]")[2]] for piece in ("\n\n" + block).split("\n\n[")[1:]]
        return found

    def reply(self, handler, body, fault):
        if fault[:3].isdigit():
            handler.send_response(int(fault[:3]))
            if fault == "429 wait":
                handler.send_header("Retry-After", "0")
            handler.end_headers()
            handler.wfile.write(b'{"error": "[1] 10 [2] 10"}')
            return
        if fault == "close":
            handler.connection.close()
            return
        if fault == "hang":
            time.sleep(0.6)
            return
        payload = self.payload(self.scores(body), body, fault)
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(payload)))
        handler.end_headers()
        payload = payload[:-9] if fault == "short" else payload
        if fault == "dribble":
            for i in range(30):
                handler.wfile.write(payload[i : i + 1])
                time.sleep(0.02)
        else:
            handler.wfile.write(payload)

    def payload(self, scores, body, fault):
        """The bytes of an answer, damaged as `fault` says."""
        asked = body["messages"][0]["content"]
        method = "pointwise" if "rate" in asked else "listwise" if "order them" in asked else "groupwise"
        text = make_answer(scores, method)
        if fault == "json":
            text = text.replace("}", "")
        if fault == "missing":
            text = "" if len(scores) == 1 else make_answer(scores[:-1], method)
        if fault == "out of range":
            text = text.replace("0</answer>", "11</answer>") if len(scores) == 1 else make_answer([*scores, 3], method)
        if fault == "length":
            text = text[: len(text) - len("0}</answer>")]
        message = {"message": {"role": "assistant", "content": text},
                   "finish_reason": "length" if fault == "length" else "stop"}  # fmt: skip
        data = {"choices": [message], "usage": {"prompt_tokens": 100, "completion_tokens": 50}}
        data |= {"no choices": {"choices": []}, "no message": {"choices": [{"message": None}]}}.get(fault, {})
        payload = json.dumps("sorry" if fault == "not a dict" else data).encode()
        if fault == "html":
            payload = b"<html>[1] 10 [2] 10</html>"
        return payload[: len(payload) // 2] if fault == "half" else payload


@pytest.fixture(scope="module")
def novel(real_data, tmp_path_factory):
    """The 21 queries with 20 passages each, as a BEIR folder and a run in the given order."""
    folder = tmp_path_factory.mktemp("novel")
    source = real_data / "novel_eval"
    queries = dict(line.split("\t", 1) for line in (source / "queries.tsv").read_text().splitlines())
    corpus = dict(line.split("\t", 1) for line in (source / "corpus.tsv").read_text().splitlines())
    qrels = evaluate.read_qrels(source / "qrels.txt")
    evaluate.write_collection(folder, corpus, queries, qrels)
    run = {}
    for entry in json.loads((source / "data.json").read_text()):
        hits = entry["hits"]
        run[str(hits[0]["qid"])] = [(h["docid"], float(-i)) for i, h in enumerate(hits)]
    evaluate.write_run(folder / "first.run", run)
    return folder


def measured(folder, run):
    """NDCG@1, @5 and @10 in percent, two decimals."""
    metrics = ("ndcg@1", "ndcg@5", "ndcg@10")
    qrels = evaluate.read_qrels(folder / "qrels" / "test.tsv")
    values = evaluate.evaluate_run(qrels, evaluate.read_run(run), metrics)
    return [round(100 * float(np.mean(list(values[m].values()))), 2) for m in metrics]


def test_the_given_order_of_the_real_passages_scores_as_published(novel):
    assert measured(novel, novel / "first.run") == [64.29, 58.24, 65.03]


def test_a_model_that_never_answers_returns_the_first_stage_order(novel, tmp_path):
    texts = list(evaluate.read_collection(novel).corpus.values())
    save_tiny_model(tmp_path / "model", texts=texts, vocab_size=2000, context=8192)
    out = tmp_path / "out.run"
    grouprank.main(
        ["--rerank", "--model", str(tmp_path / "model"), "--data", str(novel), "--run",
         str(novel / "first.run"), "--out", str(out), "--max-new-tokens", "8", "--retries", "1",
         "--max-doc-tokens", "100", "--device", "cpu"]
    )  # fmt: skip
    assert measured(novel, out) == [64.29, 58.24, 65.03]
    before, after = evaluate.read_run(novel / "first.run"), evaluate.read_run(out)
    assert {q: evaluate.sort_run(s) for q, s in after.items()} == {
        q: evaluate.sort_run(s) for q, s in before.items()
    }
    counts = json.loads((tmp_path / "out.run.json").read_text())["counts"]
    assert counts["calls"] == counts["bad_tags"] == counts["truncated"] == 42
    assert (counts["failed groups"], counts["unscored documents"]) == (21, 420)


def rerank_with_server(novel, out, monkeypatch, faulty, **options):
    """Rerank through a server that knows the labels; returns the server and the sidecar."""
    collection = evaluate.read_collection(novel)
    gold = {}
    for qid, judged in collection.qrels.items():
        gold |= {grouprank.defuse(collection.corpus[d]): int(s) for d, s in judged.items()}
        assert qid in collection.queries
    monkeypatch.setattr(grouprank.Endpoint.__init__, "__kwdefaults__", {"tries": 6, "backoff_s": 0.01})
    with GoldServer(gold, faulty) as server:
        arguments = ["--rerank", "--endpoint", server.url, "--model", "gold", "--data", str(novel),
                     "--run", str(novel / "first.run"), "--out", str(out)]  # fmt: skip
        grouprank.main([*arguments, *(f"--{k}={v}" for k, v in options.items())])
    return server, json.loads(out.with_name(out.name + ".json").read_text())


def test_a_server_that_answers_with_the_labels_scores_100(novel, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    server, sidecar = rerank_with_server(novel, tmp_path / "o.run", monkeypatch, faulty=False)
    assert measured(novel, tmp_path / "o.run") == [100.0, 100.0, 100.0]
    assert sidecar["counts"]["ok"] == sidecar["counts"]["calls"] == len(server.requests) == 21
    assert sidecar["counts"]["prompt tokens"] == 2100
    path, body, key = server.requests[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret-key")
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.3, 0.8, 8000)
    assert "secret-key" not in (tmp_path / "o.run.json").read_text()


def test_retries_bring_a_failing_server_back_to_100(novel, tmp_path, monkeypatch):
    """Every third request fails, in each way in turn, sixteen requests at a time."""
    _, sidecar = rerank_with_server(
        novel, tmp_path / "o.run", monkeypatch, faulty=True, rounds=3,
        **{"docs-per-group": 10, "timeout-s": 0.3},
    )  # fmt: skip
    assert measured(novel, tmp_path / "o.run") == [100.0, 100.0, 100.0]
    counts = sidecar["counts"]
    assert counts["failed groups"] == counts["unscored documents"] == 0
    for fault in ("bad_json", "missing", "out_of_range", "truncated"):
        assert counts[fault] > 0


def test_pointwise_through_a_failing_server_ends_with_the_bytes_of_a_healthy_one(novel, tmp_path, monkeypatch):
    settings = {"method": "pointwise", "top-k": 12, "timeout-s": 0.3}
    rerank_with_server(novel, tmp_path / "healthy.run", monkeypatch, faulty=False, **settings)
    _, sidecar = rerank_with_server(novel, tmp_path / "o.run", monkeypatch, faulty=True, **settings)
    assert (tmp_path / "o.run").read_bytes() == (tmp_path / "healthy.run").read_bytes()
    counts = sidecar["counts"]
    assert counts["failed groups"] == counts["unscored documents"] == 0
    assert counts["calls"] - counts["retried"] == 21 * 12


def test_listwise_through_a_failing_server_repairs_or_asks_again(novel, tmp_path, monkeypatch):
    _, sidecar = rerank_with_server(novel, tmp_path / "o.run", monkeypatch, faulty=True,
                                    method="listwise", window=10, step=5, **{"timeout-s": 0.3})  # fmt: skip
    counts = sidecar["counts"]
    assert counts["failed groups"] == counts["unscored documents"] == 0
    assert counts["calls"] - counts.get("retried", 0) == 21 * 3
    assert counts["missing"] > 0 and counts["out_of_range"] > 0
    assert measured(novel, tmp_path / "o.run")[2] > 95  # a missing document goes to the window's end


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_always_misbehaves_ends_in_counts_and_never_in_a_wrong_score(fault):
    """Ten queries at once: a document has the score that the server meant for it, or none."""
    queries = [candidates([10, 3, 7], f"q{i}") for i in range(10)]
    gold = {text: int(text.split()[-1]) for query in queries for text in query.texts}
    cfg = grouprank.Config(retries=1, timeout_s=0.15, concurrency=10)
    with GoldServer(gold, always=fault) as server:
        endpoint = grouprank.Endpoint(server.url, "x", cfg, tries=2, backoff_s=0.001)
        if fault not in ANSWERS:
            with pytest.raises(ValueError, match="none of 20 calls was answered; the first error: "):
                grouprank.rank_queries(endpoint, grouprank.Prompt(), queries, cfg, Counter())
            assert len(server.requests) == 10 * 2 * 2  # bounded: tries, and one more try of the group
            return
        counts = Counter()
        rankings = grouprank.rank_queries(endpoint, grouprank.Prompt(), queries, cfg, counts)
    assert counts["failed groups"] == 10 and counts["errors"] == 0 and counts["calls"] == 20
    for query, ranking in zip(queries, rankings, strict=True):
        right = [{gold[text]} for text in query.texts]
        assert all(set(votes) <= score for votes, score in zip(ranking.votes, right, strict=True))
    if fault in ("json", "length"):
        assert all(ranking.order == [0, 1, 2] for ranking in rankings)
        assert counts["unscored documents"] == 30


def test_a_request_that_the_server_refuses_is_not_sent_again():
    """HTTP 400, such as a prompt over its context, cannot get better; other prompts go on."""
    class Refusing(GoldServer):
        def reply(self, handler, body, fault):
            super().reply(handler, body, "400" if "too long 0" in str(body) else "")

    queries = [candidates([1, 9, 5], "q"), candidates([0], "r")]
    queries[1].texts[0] = "too long 0"
    gold = {text: int(text.split()[-1]) for query in queries for text in query.texts}
    counts, cfg = Counter(), grouprank.Config()
    with Refusing(gold) as server:
        endpoint = grouprank.Endpoint(server.url, "x", cfg, backoff_s=0.001)
        rankings = grouprank.rank_queries(endpoint, grouprank.Prompt(), queries, cfg, counts)
    assert rankings[0].order == [1, 2, 0] and len(server.requests) == 2
    assert (counts["errors"], counts["failed groups"], counts["retried"]) == (1, 1, 0)
    assert any(key.startswith("error: HTTP 400: ") for key in counts)


def test_requests_are_spread_over_servers_and_a_dead_one_is_set_aside():
    """Server b is down at first: no answer is lost, and b is not asked again at each request."""
    queries = [candidates([i % 11, 9, 5], f"q{i}") for i in range(60)]
    gold = {text: int(text.split()[-1]) for query in queries for text in query.texts}
    cfg = grouprank.Config(concurrency=8, timeout_s=5.0)
    with GoldServer(gold) as a, GoldServer(gold, always="500") as b:
        urls = f"{a.url}, http://127.0.0.1:9/v1 {b.url}"
        endpoint = grouprank.Endpoint(urls, "x", cfg, backoff_s=0.05)
        first, second = (Counter(), Counter())
        rankings = grouprank.rank_queries(endpoint, grouprank.Prompt(), queries, cfg, first)
        asked_while_dead = len(b.requests)
        b.always = ""
        time.sleep(max(0.0, max(s.rests_until for s in endpoint.servers) - time.monotonic()))
        again = grouprank.rank_queries(endpoint, grouprank.Prompt(), queries, cfg, second)
        alone = grouprank.Endpoint(a.url, "x", cfg)
        expected = grouprank.rank_queries(alone, grouprank.Prompt(), queries, cfg, Counter())
    assert rankings == again == expected  # which server answers changes nothing
    assert first == second and first["ok"] == first["calls"] == 60 and first["errors"] == 0
    assert asked_while_dead < 20 and len(b.requests) - asked_while_dead > 15  # back at its share
    assert all(server.in_flight == 0 for server in endpoint.servers)


def test_idle_servers_are_asked_in_turn_and_busy_ones_are_spared():
    endpoint = grouprank.Endpoint("http://a/v1,http://b/v1", "x", grouprank.Config())
    a, b = endpoint.servers
    assert [endpoint.take() for _ in range(4)] == [a, b, a, b]
    endpoint.give_back(b, 0.0)
    assert endpoint.take() is b
    endpoint.give_back(b, 0.5)  # b fails: the next ones go to a, however busy
    assert [endpoint.take() for _ in range(3)] == [a, a, a] and a.in_flight == 5


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(st.sampled_from(["choices", "message", "content", "usage",
                                                       "prompt_tokens", "finish_reason"]), inner)))
def test_no_json_of_a_server_can_stop_a_run(value):
    endpoint = grouprank.Endpoint("http://h/v1", "x", grouprank.Config())
    endpoint.opener.open = lambda *_, **__: io.BytesIO(json.dumps(value).encode())
    completion, _ = endpoint.try_once("http://h/v1/chat/completions", {})
    assert isinstance(completion.text, str) and isinstance(completion.truncated, bool)


def test_written_runs_decrease_strictly_for_every_evaluator(novel, tmp_path, monkeypatch):
    """trec_eval keeps scores as float32 and breaks ties by document id."""
    rerank_with_server(novel, tmp_path / "o.run", monkeypatch, faulty=False)
    rows = [line.split() for line in (tmp_path / "o.run").read_text().splitlines()]
    for qid in {row[0] for row in rows}:
        scores = np.array([row[4] for row in rows if row[0] == qid], dtype=np.float32)
        assert (np.diff(scores) < 0).all()


def test_a_wrong_key_or_model_name_stops_at_once_with_the_servers_words():
    class Refusing(LocalServer):
        def post(self, handler, body):
            handler.send(404, b"no such model")

    chat = grouprank.Chat(grouprank.Prompt(), "q", ("d",), (0,))
    with Refusing() as server:
        endpoint = grouprank.Endpoint(server.url, "x", grouprank.Config(), backoff_s=0.01)
        with pytest.raises(ValueError, match="HTTP 404: no such model"):
            endpoint([chat], 0.3, 0.8)


def test_a_dead_server_stops_the_run_with_its_words_instead_of_a_ranking():
    cfg = grouprank.Config(docs_per_group=3, retries=1)
    endpoint = grouprank.Endpoint("http://127.0.0.1:9/v1", "x", cfg, tries=2, backoff_s=0.001)
    with pytest.raises(ValueError, match="none of 2 calls was answered; the first error: .*refused"):
        grouprank.rank_queries(
            endpoint, grouprank.Prompt(), [candidates([1, 9, 5])], cfg, Counter()
        )


def test_the_key_is_not_repeated_when_a_server_repeats_it(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    endpoint = grouprank.Endpoint("http://127.0.0.1:9/v1", "x", grouprank.Config(), tries=1)

    def refuse(url, body):
        raise urllib.error.HTTPError(url, 401, "no", {}, io.BytesIO(b"bad sk-secret"))

    monkeypatch.setattr(endpoint, "post", refuse)
    with pytest.raises(ValueError, match=r"HTTP 401: bad \*\*\*"):
        endpoint([grouprank.Chat(grouprank.Prompt(), "q", ("d",), (0,))], 0.3, 0.8)


def test_documents_for_a_server_are_cut_too():
    endpoint = grouprank.Endpoint("http://h/v1", "x", grouprank.Config(max_doc_tokens=5))
    endpoint.ask_all = lambda bodies, progress: bodies
    (body,) = endpoint([grouprank.Chat(grouprank.Prompt(), "q", ("word " * 100, "short"), (0,))], 0.0, 1.0)
    assert body["messages"][-1]["content"].count("word ") == 4  # four characters for a token


# --- Python -------------------------------------------------------------------------------------


def test_rank_returns_what_cross_encoders_return():
    ranker = grouprank.GroupRanker(Scripted(), grouprank.Prompt(), grouprank.Config())
    rows = ranker.rank("query", ["a 1", "b 9", "c 5"], top_k=2, return_documents=True)
    assert rows == [
        {"corpus_id": 1, "score": 9.0, "text": "b 9"},
        {"corpus_id": 2, "score": 5.0, "text": "c 5"},
    ]
    assert ranker.rank("query", []) == []


def test_a_checkpoint_brings_its_prompt_and_sizes_and_a_wrong_prompt_warns(tmp_path, capsys):
    prompt = grouprank.Prompt("Rank.", "{query} {documents}")
    meta = {"prompt": {"system": prompt.system, "user": prompt.user}, "prompt_hash": prompt.hash,
            "docs_per_group": 7, "max_new_tokens": 50}  # fmt: skip
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    cfg, found = grouprank.rerank_settings({"model": str(tmp_path), "max_new_tokens": 60})
    assert (found, cfg.docs_per_group, cfg.max_new_tokens) == (prompt, 7, 60)
    (tmp_path / "other.txt").write_text("x\n---\n{query}{documents}")
    grouprank.rerank_settings({"model": str(tmp_path), "prompt_file": str(tmp_path / "other.txt")})
    assert "another wording can cost points silently" in capsys.readouterr().err
    with pytest.raises(TypeError, match="docs_per_grup"):
        grouprank.rerank_settings({"docs_per_grup": 3})
