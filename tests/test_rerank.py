"""Reranking (Eq. 1, Sec. 4.5): the three methods, pooling, fusion, retries, interrupted and split
jobs, local models and servers that misbehave, real passages, Python."""

import dataclasses
import functools
import gzip
import io
import json
import math
import os
import re
import signal
import threading
import time
import types
import urllib.error
from collections import Counter

import numpy as np
import pytest
from conftest import LocalServer, save_tiny_model
from hypothesis import given
from hypothesis import strategies as st

import evaluate
import grouprank

# --- Groups, windows, fusion ----------------------------------------------------------------------


@given(st.integers(1, 120), st.integers(1, 25), st.integers(1, 3), st.integers(0, 2**32))
def test_every_round_holds_every_document_once_in_balanced_groups(n_docs, size, rounds, seed):
    plan = grouprank.plan_groups(n_docs, size, rounds, 0, np.random.default_rng(seed))
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


def test_overlapping_groups_of_neighbours_end_where_the_list_ends():
    (groups,) = grouprank.plan_groups(95, 20, 1, 10, np.random.default_rng(0), True)
    assert [(min(group), max(group)) for group in groups] == [
        *((start, start + 19) for start in range(0, 71, 10)), (75, 94)]


def test_groups_are_random_and_depend_on_the_seed_alone():
    first, again, other = (grouprank.plan_groups(50, 10, 1, 0, np.random.default_rng(s)) for s in (1, 1, 2))
    assert first == again != other and first[0][0] != sorted(first[0][0])


@given(st.integers(1, 120), st.integers(1, 25), st.integers(0, 2**32))
def test_ranked_groups_hold_neighbours(n_docs, size, seed):
    """Tables 4 and 5 compare who is grouped with whom."""
    first, second = grouprank.plan_groups(n_docs, size, 2, 0, np.random.default_rng(seed), True)
    assert [i for group in first for i in sorted(group)] == list(range(n_docs))
    assert list(map(sorted, first)) == list(map(sorted, second))


def test_what_stands_first_in_a_ranked_group_is_random():
    first, second = grouprank.plan_groups(20, 20, 2, 0, np.random.default_rng(0), True)
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


# --- Asking, reading, asking again ----------------------------------------------------------------


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
    machine = types.SimpleNamespace(device="cpu")

    def __init__(self, faults=()):
        self.faults = list(faults)
        self.seeds, self.batches, self.temperatures = [], [], []

    def __call__(self, chats, temperature, top_p):
        answers = []
        self.batches.append(chats)
        self.temperatures.append(temperature)
        for chat in chats:
            self.seeds.append(chat.seed)
            method = next(name for name, m in grouprank.METHODS.items() if m.prompt == chat.prompt)
            text = make_answer([int(text.split()[-1]) for text in chat.texts], method)
            fault = self.faults.pop(0) if self.faults else None
            text = text if fault is None else fault
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


def test_groups_are_dealt_as_the_options_say():
    """Two queries of six documents in groups of three, as lists of the documents' numbers."""
    def dealt(**options):
        backend = Scripted()
        rank(backend, [candidates(range(6), qid) for qid in "qr"], **options)
        return [[int(text.split()[1]) for text in chat.texts] for chat in backend.batches[0]]

    assert [len(group) for group in dealt()] == [3] * 4
    assert [len(group) for group in dealt(docs_stride=2)] == [3] * 6
    assert list(map(sorted, dealt(grouping="rank"))) == [[0, 1, 2], [3, 4, 5]] * 2
    assert dealt(seed=1) == dealt(seed=1) != dealt(seed=2)
    assert dealt()[:2] != dealt()[2:]  # each query has its own


def test_fusion_may_standardise():
    """Scores 8, 2 and first-stage scores 2, 1: both 1, -1 when standardised, .8, .2 and 1, 0 when not."""
    found = {fusion: rank(Scripted(), [candidates([8, 2])], fusion=fusion, fusion_weight=0.5)[0][0].finals
             for fusion in ("minmax", "zscore")}  # fmt: skip
    assert found["zscore"] == pytest.approx([1, -1]) and found["minmax"] == pytest.approx([0.9, 0.1])


def test_documents_are_trimmed_as_the_options_say():
    backend, query = Scripted(), candidates([1, 2])._replace(texts=["a\nb 1 9", "2 " * 50])
    rank(backend, [query], max_doc_chars=5, fold_lines=True, retries=0, docs_per_group=2)
    assert sorted(backend.batches[0][0].texts) == ["2 2 2", "a b 1"]


def test_scores_are_pooled_over_groups_and_rounds():
    (ranking,), counts = rank(Scripted(), [candidates([1, 9, 5, 9, 0, 7, 3])], rounds=4)
    assert ranking.order == [1, 3, 5, 2, 6, 0, 4]
    assert ranking.means == [1, 9, 5, 9, 0, 7, 3]
    assert {len(votes) for votes in ranking.votes} == {4}
    assert counts["calls"] == math.ceil(7 / 3) * 4 == counts["ok"]


@pytest.mark.parametrize(("fault", "counted"), [
    ("no tags at all", "bad_tags"), ("<reason></reason><answer>{not json}</answer>", "bad_json"),
    (make_answer([9, 9]), "missing"), (make_answer([9, 9, 9, 9]), "out_of_range"),
    (make_answer([9, 9, 99]), "bad_score"), ("error", "errors"),
])  # fmt: skip
def test_an_unusable_answer_is_asked_again_with_another_seed(fault, counted):
    backend = Scripted([fault])
    (ranking,), counts = rank(backend, [candidates([1, 9, 5])])
    assert ranking.order == [1, 2, 0] and ranking.means == [1, 9, 5]
    assert counts[counted] == counts["retried"] == 1 and counts["calls"] == 2
    assert len(set(backend.seeds)) == 2
    for temperature, again in ((0.0, 0.3), (0.8, 0.8)):  # greedy decoding would repeat its mistake
        backend = Scripted([fault])
        rank(backend, [candidates([1, 9, 5])], temperature=temperature)
        assert backend.temperatures == [temperature, again]
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
    (ranking,), counts = rank(backend, [candidates([0, 0, 0])], retries=3)
    means = [ranking.means[i] for i in ranking.reasons[0][0]]
    assert means == [4, None, 6]  # in the order of the prompt; the earliest score stands
    assert (counts["failed groups"], counts["unscored documents"]) == (1, 1)
    assert sorted(ranking.order) == [0, 1, 2]


def test_a_cut_answer_that_went_on_behind_its_scores_was_a_draft_and_closing_words_are_not():
    text = make_answer([9, 1])
    for ending, truncated, scores in (("", True, [9, 1]), ("\n", True, [9, 1]), (" no wait", True, None),
                                      (" I hope this helps.", False, [9, 1])):
        completion, counts = grouprank.Completion(text + ending, truncated), Counter()
        found = grouprank.count_answer(completion, grouprank.METHODS["groupwise"], 2, counts)
        assert found.scores == scores and counts["truncated"] == truncated
    for cut, method in (('<answer>{"[1]": 9, "[2]": 1} no wait, let', "groupwise"), ("<answer>[2] > [1] > [3", "listwise"),
                        ('<ANSWER>{"[1]": 9, "[2]": 1}</ANSWER> no wait', "groupwise"),
                        ("<answer>[2] > [1] no", "listwise"), ("<answer>1", "pointwise")):  # fmt: skip
        completion = grouprank.Completion("<reason>r</reason>" + cut, truncated=True)
        assert grouprank.count_answer(completion, grouprank.METHODS[method], 1 if method == "pointwise" else 3,
                                      Counter()).scores is None  # fmt: skip


@pytest.mark.parametrize("method", ["groupwise", "pointwise", "listwise"])
def test_an_answer_that_was_cut_anywhere_gives_no_score_that_was_not_meant(method):
    """A 10 cut to 1, or a [12] cut to [1], must not count."""
    gold = [10] if method == "pointwise" else [10, 3, *range(10), 10]
    text, readable = make_answer(gold, method), 0
    best_first = sorted(range(len(gold)), key=lambda i: -gold[i])
    for cut in range(len(text) + 1):
        completion = grouprank.Completion(text[:cut], truncated=True)
        answer = grouprank.count_answer(completion, grouprank.METHODS[method], len(gold), Counter())
        if not any(answer.scores or ()):
            continue
        readable += 1
        if method != "listwise":
            assert answer.scores == gold
            continue
        n_seen = len(re.findall(r"\[\d+", text[:cut]))
        read = sorted(range(len(gold)), key=lambda i: -answer.scores[i])  # the rest in the prompt's order
        assert any(read[:n] == best_first[:n] and read[n:] == sorted(read[n:]) for n in (n_seen, n_seen - 1))
    assert readable > 0


# --- The three methods ----------------------------------------------------------------------------


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
    grouping = data.draw(st.sampled_from(["random", "rank"]))
    rankings, _ = rank(backend, [*queries, candidates([1], "never fails")], method=method, retries=1,
                       window=4, step=2, rounds=2, grouping=grouping)  # fmt: skip
    for query, ranking in zip(queries, rankings, strict=False):
        assert sorted(ranking.order) == list(range(len(query.ids)))
        values = grouprank.carried_scores(ranking)
        assert values == sorted(values, reverse=True)


def test_pointwise_has_its_own_prompt_and_groups_of_one_keep_the_groupwise_one():
    """The paper's c = 1 is not its pointwise baseline."""
    backend = Scripted()
    (ranking,), _ = rank(backend, [candidates([1, 10, 5])], method="pointwise", rounds=2)
    assert ranking.order == [1, 2, 0] and ranking.votes == [[1, 1], [10, 10], [5, 5]]
    assert {chat.prompt for chat in backend.batches[0]} == {grouprank.METHODS["pointwise"].prompt}
    asked = sorted(chat.texts for chat in backend.batches[0][:3])
    assert asked == [("text 0 1",), ("text 1 10",), ("text 2 5",)]
    (ranking,), counts = rank(backend, [candidates([1, 10, 5])], docs_per_group=1)
    assert ranking.order == [1, 2, 0] and counts["calls"] == 3
    assert {chat.prompt for chat in backend.batches[1]} == {grouprank.Prompt()}


@given(st.lists(st.integers(0, 10), min_size=1, max_size=60), st.integers(1, 8), st.integers(1, 3))
def test_listwise_equals_sorting_each_window_where_it_stands(scores, step, passes):
    window, n, order = step + 3, len(scores), list(range(len(scores)))
    (ranking,), _ = rank(Scripted(), [candidates(scores)], method="listwise", window=window,
                         step=step, rounds=passes)  # fmt: skip
    for start, end in (windows_of_rank_llm(n, window, step) or [(0, n)]) * passes:
        order[start:end] = sorted(order[start:end], key=lambda i: -scores[i])
    assert ranking.order == order
    assert [ranking.means[i] for i in ranking.order] == pytest.approx([10 * (n - p) / n for p in range(n)])


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


# --- What is asked: the prompt, the settings, the candidates --------------------------------------


def test_a_checkpoint_brings_its_method_prompt_and_sizes_and_another_wording_warns(tmp_path, capsys):
    prompt = grouprank.Prompt("Rate.", "{query} {documents}", "[{i}]{text}")
    meta = {"prompt": dataclasses.asdict(prompt), "prompt_hash": prompt.hash,
            "docs_per_group": 7, "max_new_tokens": 50, "method": "groupwise", "answer": "reason"}  # fmt: skip
    (tmp_path / "meta.json").write_text(json.dumps(meta))  # of a groupwise checkpoint
    model, warning = {"model": str(tmp_path)}, "another wording can cost points silently"
    cfg, asked = grouprank.read_settings(model | {"max_new_tokens": 60})
    assert (asked, cfg.docs_per_group, cfg.max_new_tokens) == (prompt, 7, 60)
    assert capsys.readouterr().err == ""
    assert grouprank.read_settings(model | {"method": "listwise"})[1] == grouprank.METHODS["listwise"].prompt
    assert warning in capsys.readouterr().err
    (tmp_path / "other.txt").write_text("x\n---\n{query}{documents}")
    asked = grouprank.read_settings(model | {"prompt_file": str(tmp_path / "other.txt")})[1]
    assert asked.system == "x" and warning in capsys.readouterr().err
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"method": "pointwise"}))
    cfg, asked = grouprank.read_settings(model)
    assert (cfg.method, asked) == ("pointwise", prompt)
    assert grouprank.read_settings(model | {"method": "groupwise"})[1] == grouprank.Prompt()


def test_candidates_honour_exclusions_and_the_cut_and_hold_only_texts_that_the_run_names(tmp_path, monkeypatch):
    corpus = {"a": "A", "b": "B", "c": "C"} | {f"other {i}": "text" for i in range(9)}
    evaluate.write_collection(tmp_path, corpus, {"q": "Q", "r": "R"}, {"q": {"a": 1}}, {"q": {"b"}})
    evaluate.write_run(tmp_path / "x.run", {"q": [("b", 3.0), ("c", 2.0), ("a", 1.0)]})
    held, read = [], evaluate.read_collection
    monkeypatch.setattr(evaluate, "read_collection", lambda *args, **options: (
        held.append(read(*args, **options)), held[-1])[1])  # fmt: skip
    cfg = grouprank.Config(data=str(tmp_path), run=str(tmp_path / "x.run"), top_k=2)
    queries, _, notes = grouprank.read_candidates(cfg)
    assert [(q.qid, q.ids, list(q.texts)) for q in queries] == [("q", ["c", "a"], ["C", "A"])]
    assert notes["queries without a run"] == 1 and not notes["documents below --top-k are left out"]
    (first,), _, notes = grouprank.read_candidates(dataclasses.replace(cfg, top_k=1))
    assert first.ids == ["c"] and notes["documents below --top-k are left out"] == 1
    assert held[0].corpus.keys() == {"a", "b", "c"}


# --- Jobs that stop and go on, jobs in parts ------------------------------------------------------


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
    """Run --rerank on the collection with a scripted back end; returns that."""
    monkeypatch.setattr(grouprank, "QUERIES_PER_BATCH", 2)

    def run(out, *options, backend=None):
        backend = backend or Scripted()
        monkeypatch.setattr(grouprank, "load_backend", lambda cfg: backend)
        grouprank.main(["--rerank", "--endpoint=http://h/v1", "--model=m", "--docs-per-group=3",
                        f"--data={collection / 'beir'}", f"--run={collection / 'first.run'}",
                        f"--out={collection / out}", *options])  # fmt: skip
        return backend

    return run


def sidecar_of(out):
    """What the file beside a run says."""
    return json.loads(out.with_name(f"{out.name}.json").read_text())


class Interrupted(Scripted):
    """A back end that `act`s in the middle of its third batch."""

    def __init__(self, act):
        super().__init__()
        self.act = act

    def __call__(self, *arguments, **options):
        if len(self.batches) == 2:
            self.act()
        return super().__call__(*arguments, **options)


def killed_while_writing(partial):
    """Half a line, and the end."""
    with open(partial, "a") as file:
        file.write('{"task": {"docs_per')
    raise KeyboardInterrupt


@pytest.fixture
def killed(collection, command):
    """The back end of a job that was killed in its third batch: o.run.partial is what it left."""
    backend = Interrupted(lambda: killed_while_writing(collection / "o.run.partial"))
    with pytest.raises(KeyboardInterrupt):
        command("o.run", backend=backend)
    return backend


def test_a_killed_job_goes_on_and_ends_with_the_same_bytes(collection, command, killed):
    whole = command("whole.run")
    assert not (collection / "o.run").exists() and len(killed.seeds) == 2 * 2 * 3
    rest = command("o.run", "--concurrency=3")
    assert killed.seeds + rest.seeds == whole.seeds  # nothing is asked twice
    assert (collection / "o.run").read_bytes() == (collection / "whole.run").read_bytes()
    counts = [sidecar_of(collection / name)["counts"] for name in ("o.run", "whole.run")]
    assert counts[0] == counts[1] and counts[0]["calls"] == 9 * 3
    assert not (collection / "o.run.partial").exists()


class Hopeless(Scripted):
    """A back end that has no answer to some queries."""

    def __init__(self, fault, *queries):
        super().__init__()
        self.fault, self.queries = fault, queries

    def __call__(self, chats, temperature, top_p):
        answers = super().__call__(chats, temperature, top_p)
        error = self.fault if self.fault == "too long" else ""
        return [grouprank.Completion(self.fault, error=error, hopeless=bool(error))
                if chat.query in self.queries else answer for chat, answer in zip(chats, answers, strict=True)]


@pytest.mark.parametrize("fault", ["?", "too long"])
def test_a_query_that_cannot_be_read_ends_no_job_that_has_read_others(collection, command, monkeypatch, fault):
    """Alone in the last batch it keeps its order, and is counted; a whole batch of them is an error."""
    monkeypatch.setattr(grouprank, "QUERIES_PER_BATCH", 8)
    command("o.run", backend=Hopeless(fault, "query 8"))
    given, found = (evaluate.read_run(collection / name)["q8"] for name in ("first.run", "o.run"))
    assert evaluate.sort_run(found) == evaluate.sort_run(given)
    counts = sidecar_of(collection / "o.run")["counts"]
    assert counts["unscored documents"] == 7 and counts["ok"] == 8 * 3
    with pytest.raises(ValueError, match=r"none of \d+ (answers could be read|calls was answered)"):
        command("q8.run", "--shard=9/9", backend=Hopeless(fault, "query 8"))  # it alone
    assert not (collection / "q8.run.9-of-9").exists()
    monkeypatch.setattr(grouprank, "QUERIES_PER_BATCH", 2)
    with pytest.raises(ValueError, match=r"none of \d+ (answers could be read|calls was answered)"):
        command("q.run", backend=Hopeless(fault, "query 4", "query 5"))


def test_the_same_command_goes_on_also_where_it_overwrites(collection, command):
    (collection / "o.run").write_text("an old one")
    act = functools.partial(killed_while_writing, collection / "o.run.partial")
    with pytest.raises(KeyboardInterrupt):
        command("o.run", "--overwrite", backend=Interrupted(act))
    assert (collection / "o.run").read_text() == "an old one"
    rest, whole = command("o.run", "--overwrite"), command("whole.run")
    assert len(rest.seeds) == len(whole.seeds) - 2 * 2 * 3
    assert (collection / "o.run").read_bytes() == (collection / "whole.run").read_bytes()


def test_a_job_that_never_began_gives_no_leave_to_overwrite(collection, command):
    def unreachable(*_):
        raise ValueError("no server can be reached")

    command("o.run")
    before = (collection / "o.run").read_bytes()
    with pytest.raises(ValueError, match="no server"):
        command("o.run", "--overwrite", "--seed=1", backend=unreachable)
    assert (collection / "o.run.partial").stat().st_size == 0
    with pytest.raises(ValueError, match="o.run exists"):
        command("o.run", "--seed=2")
    assert (collection / "o.run").read_bytes() == before


@pytest.mark.parametrize(("option", "message"), [("--rounds=2", "rounds 1, not 2"),
                                                 ("--top-k=5", "top_k 100, not 5")])  # fmt: skip
@pytest.mark.usefixtures("killed")
def test_a_job_with_other_settings_does_not_go_on(collection, command, option, message):
    with pytest.raises(ValueError, match=f"o.run.partial was begun with {message}"):
        command("o.run", "--resume", option)
    command("o.run", "--overwrite", option)
    assert (collection / "o.run").exists() and not (collection / "o.run.partial").exists()


def test_a_job_does_not_go_on_with_other_texts_or_with_a_model_trained_anew_in_its_folder(collection, command):
    """Lines of two models in one run would be nobody's ranking."""
    weights = collection / "model" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_text("of the first training")
    local = ["--endpoint=", f"--model={weights.parent}"]
    partial, corpus = collection / "o.run.partial", collection / "beir" / "corpus.jsonl"
    with pytest.raises(KeyboardInterrupt):
        command("o.run", *local, backend=Interrupted(lambda: killed_while_writing(partial)))
    before = corpus.read_text()
    corpus.write_text(before.replace("text of", "another text of"))
    with pytest.raises(ValueError, match="was begun with candidates"):
        command("o.run", *local, "--resume")
    corpus.write_text(before)
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 10**9))
    with pytest.raises(ValueError, match="was begun with weights"):
        command("o.run", *local, "--resume")


def test_a_second_process_is_refused_in_one_job(collection, command):
    def twice():
        for option in ("--resume", "--overwrite"):
            with pytest.raises(ValueError, match="another process works on .*o.run.partial"):
                command("o.run", option)

    command("whole.run")
    command("o.run", backend=Interrupted(twice))
    assert (collection / "o.run").read_bytes() == (collection / "whole.run").read_bytes()


@pytest.mark.parametrize("method", sorted(grouprank.METHODS))
def test_parts_of_a_job_concatenate_to_the_rankings_of_the_whole(collection, command, method):
    """`cat o.run.*-of-4 > o.run`: the same lines, the queries in another order."""
    ties = [make_answer([5] * n, method) for n in (3, 2, 2)] if method == "groupwise" else []
    command("whole.run", "--method", method, backend=Scripted(ties))  # the first query's scores tie
    parts = [command("o.run", f"--shard={i}/4", "--method", method, backend=Scripted(ties if i == 1 else []))
             for i in (1, 2, 3, 4)]  # fmt: skip
    assert [len({seed[1] for seed in part.seeds}) for part in parts] == [3, 2, 2, 2]
    joined = "".join(path.read_text() for path in sorted(collection.glob("o.run.*-of-4")))
    assert sorted(joined.splitlines()) == sorted((collection / "whole.run").read_text().splitlines()) != []
    (collection / "o.run").write_text(joined)
    one, other = ({qid: evaluate.sort_run(scores) for qid, scores in evaluate.read_run(collection / name).items()}
                  for name in ("o.run", "whole.run"))  # fmt: skip
    assert one == other and len(one) == 9


def test_a_part_without_queries_is_an_empty_run_and_a_packed_name_makes_gzip(collection, command):
    command("o.run", "--shard=12/12")
    assert (collection / "o.run.12-of-12").read_text() == "" and sidecar_of(collection / "o.run.12-of-12")["queries"] == 0
    command("o.run.gz")
    command("plain.run")
    assert gzip.open(collection / "o.run.gz").read() == (collection / "plain.run").read_bytes()


def test_a_document_without_text_stops_a_job_only_if_the_run_names_it(collection, command, capsys):
    corpus = collection / "beir" / "corpus.jsonl"
    whole = corpus.read_text()
    corpus.write_text(whole + '{"_id": "nobody names it", "text": ""}\n')
    command("o.run")
    assert f"note: {corpus}: 1 texts are empty and left out" in capsys.readouterr().err
    corpus.write_text(whole.replace("text of q3 d4 9", ""))
    with pytest.raises(ValueError, match="query 'q3' names document 'q3 d4', which .* does not have, or without text"):
        command("other.run")


@pytest.mark.parametrize("wrong", ["0/4", "5/4", "x", "1/0", "-1/4", "1/4/2"])
def test_a_part_is_one_of_its_split(wrong):
    with pytest.raises(ValueError, match="--shard must be i/n"):
        grouprank.Config(shard=wrong)


def test_the_sidecar_holds_what_made_the_run_and_nothing_of_training(collection, command, monkeypatch):
    monkeypatch.setattr("sys.argv", ["grouprank.py", "--rerank", "--rounds=2"])
    command("o.run", "--rounds=2", "--seed=3")
    said = sidecar_of(collection / "o.run")
    assert said.keys() == {"task", "prompt", "notes", "queries", "documents", "counts", "seconds",
                           "command", "versions"}  # fmt: skip
    assert (said["queries"], said["documents"], said["counts"]["calls"]) == (9, 63, 9 * 3 * 2)
    assert (said["task"]["rounds"], said["task"]["seed"], said["task"]["model"]) == (2, 3, "m")
    assert said["task"]["prompt"] == grouprank.Prompt(**said["prompt"]).hash
    assert said["command"] == ["--rerank", "--rounds=2"]
    assert not re.findall(r"sft|grpo|lora|_lr|\bkl_|reward|rollout|save_every", json.dumps(said["task"]))


# --- A local server that speaks the chat-completions interface ------------------------------------


# What a misbehaving server does to a request.
ANSWERS = ("json", "missing", "out of range", "length")  # an answer comes, with fewer scores
FAULTS = (*ANSWERS, "500", "429", "429 wait", "408", "close", "half", "short", "html", "no choices",
          "no message", "not a dict", "hang")  # fmt: skip


class GoldServer(LocalServer):
    """Answers prompts with gold labels, looked up by document text; every third request fails.

    With `always`, every request meets that fault.
    """

    def __init__(self, gold, faulty=False, always=""):
        self.gold, self.faulty, self.always = gold, faulty, always
        self.requests, self.agents, self.lock = [], set(), threading.Lock()

    def post(self, handler, body):
        with self.lock:
            number = len(self.requests)
            self.agents.add(handler.headers["User-Agent"])
            self.requests.append((handler.path, body, handler.headers.get("Authorization")))
        fault = self.always
        if self.faulty and number % 3 == 0:
            fault = FAULTS[number // 3 % len(FAULTS)]
        self.reply(handler, body, fault)

    def scores(self, body):
        """The gold labels of the documents in the prompt, in their order."""
        block = body["messages"][-1]["content"]
        block = re.split(r"documents?:\n\n", block)[1].partition("\n\nReply in exactly")[0]
        return [self.gold[piece.partition("] ")[2]] for piece in ("\n\n" + block).split("\n\n[")[1:]]

    def reply(self, handler, body, fault):
        if fault[:3].isdigit():
            handler.send_response(int(fault[:3]))
            if fault == "429 wait":
                handler.send_header("Retry-After", "0")
            handler.end_headers()
            handler.wfile.write(b'{"error": "[1] 10 [2] 10"}')
        elif fault == "close":
            handler.connection.close()
        elif fault == "hang":
            time.sleep(0.6)
        else:
            payload = self.payload(self.scores(body), body, fault)
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(payload)))
            handler.end_headers()
            handler.wfile.write(payload[:-9] if fault == "short" else payload)

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
        choice = {"message": {"content": text}, "finish_reason": "length" if fault == "length" else "stop"}
        choices = {"no choices": [], "no message": [{"message": None}]}.get(fault, [choice])
        data = {"choices": choices, "usage": {"prompt_tokens": 100, "completion_tokens": 50}}
        payload = json.dumps("sorry" if fault == "not a dict" else data).encode()
        if fault == "html":
            payload = b"<html>[1] 10 [2] 10</html>"
        return payload[: len(payload) // 2] if fault == "half" else payload


@pytest.fixture(scope="module")
def novel(real_data, tmp_path_factory):
    """The 21 queries with 20 passages each, as a BEIR folder and a run in the given order."""
    folder = tmp_path_factory.mktemp("novel")
    source = real_data / "novel_eval"
    queries, corpus = (dict(line.split("\t", 1) for line in (source / name).read_text().splitlines())
                       for name in ("queries.tsv", "corpus.tsv"))  # fmt: skip
    evaluate.write_collection(folder, corpus, queries, evaluate.read_qrels(source / "qrels.txt"))
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


def test_a_model_whose_answers_cannot_be_read_ends_in_a_sentence_and_not_in_the_first_stage_order(novel, tmp_path):
    texts = list(evaluate.read_collection(novel).corpus.values())
    save_tiny_model(tmp_path / "model", texts=texts[:20], context=8192)
    out = tmp_path / "out.run"
    with pytest.raises(grouprank.UnreadableAnswers, match="none of 42 answers could be read; one begins with '.+'"):
        grouprank.main(
            ["--rerank", "--model", str(tmp_path / "model"), "--data", str(novel), "--run",
             str(novel / "first.run"), "--out", str(out), "--max-new-tokens", "8", "--retries", "1",
             "--max-doc-tokens", "20", "--top-k", "5", "--device", "cpu"]
        )  # fmt: skip
    assert not out.exists()
    assert measured(novel, novel / "first.run") == [64.29, 58.24, 65.03]  # published


def rerank_with_server(novel, out, monkeypatch, faulty, **options):
    """Rerank through a server that knows the labels; returns the server and the sidecar."""
    collection, gold = evaluate.read_collection(novel), {}
    for judged in collection.qrels.values():
        gold |= {grouprank.defuse(collection.corpus[d]): int(s) for d, s in judged.items()}
    monkeypatch.setattr(grouprank.Endpoint.__init__, "__defaults__", (6, 0.01))
    with GoldServer(gold, faulty) as server:
        arguments = ["--rerank", "--endpoint", server.url, "--model", "gold", "--data", str(novel),
                     "--run", str(novel / "first.run"), "--out", str(out)]  # fmt: skip
        grouprank.main([*arguments, *(f"--{k}={v}" for k, v in options.items())])
    return server, sidecar_of(out)


def test_a_server_that_answers_with_the_labels_scores_100(novel, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key\n")  # as a file gives it
    out = tmp_path / "o.run"
    server, sidecar = rerank_with_server(novel, out, monkeypatch, faulty=False)
    assert measured(novel, out) == [100.0, 100.0, 100.0]
    assert sidecar["counts"]["ok"] == sidecar["counts"]["calls"] == len(server.requests) == 21
    assert sidecar["counts"]["prompt tokens"] == 2100
    path, body, key = server.requests[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret-key")
    assert server.agents == {"grouprank"}  # some servers ban urllib's own
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.3, 0.8, 8000)
    rows = [line.split() for line in out.read_text().splitlines()]
    for qid in {row[0] for row in rows}:  # trec_eval keeps float32 and breaks ties by document id
        scores = np.array([row[4] for row in rows if row[0] == qid], dtype=np.float32)
        assert (np.diff(scores) < 0).all()


@pytest.mark.parametrize(("options", "n_calls"), [
    ({"rounds": 3, "docs-per-group": 10}, 21 * 2 * 3), ({"method": "pointwise", "top-k": 12}, 21 * 12),
    ({"method": "listwise", "window": 10, "step": 5}, 21 * 3)])  # fmt: skip
def test_a_server_that_fails_at_every_third_request_costs_retries_and_no_score(
    novel, tmp_path, monkeypatch, options, n_calls
):
    """In each way in turn, sixteen requests at a time."""
    options, out = {"timeout-s": 0.3, **options}, tmp_path / "o.run"
    rerank_with_server(novel, tmp_path / "healthy.run", monkeypatch, faulty=False, **options)
    _, sidecar = rerank_with_server(novel, out, monkeypatch, faulty=True, **options)
    counts = sidecar["counts"]
    assert counts["failed groups"] == counts["unscored documents"] == 0
    assert counts["calls"] - counts.get("retried", 0) == n_calls
    if options.get("method") == "listwise":  # what an answer leaves out goes to the window's end
        assert counts["missing"] > 0 and counts["out_of_range"] > 0 and measured(novel, out)[2] > 95
    else:
        assert out.read_bytes() == (tmp_path / "healthy.run").read_bytes()
        assert counts["retried"] > 0 and counts["truncated"] > 0


def asked(endpoint, queries, **changes):
    """Rank with an endpoint; returns the rankings and the counts."""
    cfg, counts = grouprank.Config(**changes), Counter()
    return grouprank.rank_queries(endpoint, grouprank.Prompt(), queries, cfg, counts), counts


def gold_of(queries):
    """The score at the end of each document, by its text."""
    return {text: int(text.split()[-1]) for query in queries for text in query.texts}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_always_misbehaves_ends_in_counts_and_never_in_a_wrong_score(fault):
    """Ten queries at once: a document has the score that the server meant for it, or none."""
    queries = [candidates([10, 3, 7], f"q{i}") for i in range(10)]
    cfg = grouprank.Config(timeout_s=0.15, concurrency=10)
    with GoldServer(gold_of(queries), always=fault) as server:
        endpoint = grouprank.Endpoint(server.url, "x", cfg, tries=2, backoff_s=0.001)
        if fault not in ("missing", "out of range"):
            words = {"html": "answered NoAnswer: <html>", "not a dict": 'answered NoAnswer: "sorry"', "no choices": r"answered NoAnswer: \{'choices': \[\]",
                     "json": "none of 20 answers could be read", "length": "none of 20 answers could be read"}
            all_failed = r"none of 20 calls was answered; the first error: .* \(2 tries\)"
            with pytest.raises(ValueError, match=words.get(fault, all_failed)):
                asked(endpoint, queries, retries=1)
            assert len(server.requests) <= 10 * 2 * 2  # bounded: tries, and one more try of the group
            return
        rankings, counts = asked(endpoint, queries, retries=1)
    assert counts["failed groups"] == 10 and counts["errors"] == 0 and counts["calls"] == 20
    for query, ranking in zip(queries, rankings, strict=True):
        right = [{gold_of(queries)[text]} for text in query.texts]
        assert all(set(votes) <= score for votes, score in zip(ranking.votes, right, strict=True))


def test_a_model_that_was_trained_here_is_served_with_the_prompt_that_it_learned(tmp_path):
    """Without thinking; servers of other models, which may refuse the field, are not sent it."""
    (tmp_path / "meta.json").write_text('{"docs_per_group": 3}')
    queries, seen = [candidates([1, 9], "q")], {}
    served = {str(tmp_path): {"enable_thinking": False, "date_string": "26 Jul 2024"}, "x": None}
    for name, expected in served.items():
        with GoldServer(gold_of(queries)) as server:
            asked(grouprank.Endpoint(server.url, name, grouprank.Config()), queries)
        assert server.requests[0][1].get("chat_template_kwargs") == expected
    tokenizer = types.SimpleNamespace(
        chat_template="there is one", apply_chat_template=lambda turns, **options: seen.update(options) or "")
    grouprank.render_chat(tokenizer, "", "user")
    assert served[str(tmp_path)].items() <= seen.items()


def test_a_request_that_the_server_refuses_is_not_sent_again():
    """HTTP 400, such as a prompt over its context, cannot get better; other prompts go on."""
    class Refusing(GoldServer):
        def reply(self, handler, body, fault):
            super().reply(handler, body, "400" if "too long 0" in str(body) else "")

    queries = [candidates([1, 9, 5], "q"), candidates([0], "r")]
    queries[1].texts[0] = "too long 0"
    with Refusing(gold_of(queries)) as server:
        endpoint = grouprank.Endpoint(server.url, "x", grouprank.Config(), backoff_s=0.001)
        rankings, counts = asked(endpoint, queries)
    assert rankings[0].order == [1, 2, 0] and len(server.requests) == 2
    assert (counts["errors"], counts["failed groups"], counts["retried"]) == (1, 1, 0)
    assert counts["error: HTTP 400"] == 1


@pytest.mark.parametrize(("code", "retry_after", "expected"), [
    (500, None, [(0.5, 1.5), (1, 3), (2, 6), (4, 12), (8, 24)]),
    (429, "7", [(7, 7)] * 5), (503, "9999", [(60, 60)] * 5),
])  # fmt: skip
def test_pauses_double_unless_the_server_says_how_long_it_needs(code, retry_after, expected):
    endpoint, pauses = grouprank.Endpoint("http://h/v1", "x", grouprank.Config()), []

    def fail(url, body):
        headers = {"Retry-After": retry_after} if retry_after else {}
        raise urllib.error.HTTPError(url, code, "no", headers, io.BytesIO(b"overloaded"))

    endpoint.post = fail
    answer = endpoint.ask({"seed": 1}, types.SimpleNamespace(is_set=lambda: False, wait=lambda s: pauses.append(s)))
    assert answer.error == f"HTTP {code} (6 tries)" and not answer.hopeless
    assert all(low <= pause <= high for pause, (low, high) in zip(pauses, expected, strict=True))


def test_requests_go_to_the_server_with_the_fewest_in_flight():
    endpoint = grouprank.Endpoint("http://a/v1 http://b/v1", "x", grouprank.Config(concurrency=6))
    urls, all_there = [], threading.Barrier(6)

    def post(url, body):
        urls.append(url)
        all_there.wait(timeout=10)
        return json.dumps({"choices": [{"message": {"content": "x"}}]}).encode()

    endpoint.post = post
    endpoint.ask_all([{"seed": i} for i in range(6)])
    assert Counter(urls) == {"http://a/v1/chat/completions": 3, "http://b/v1/chat/completions": 3}
    assert set(endpoint.in_flight.values()) == {0}


def test_a_server_that_fails_rests_while_another_is_ready_and_no_answer_is_lost():
    queries = [candidates([i % 11, 9, 5], f"q{i}") for i in range(60)]
    cfg = grouprank.Config(concurrency=8, timeout_s=5.0)
    with GoldServer(gold_of(queries)) as a, GoldServer(gold_of(queries), always="500") as b:
        endpoint = grouprank.Endpoint(f"{b.url}, http://127.0.0.1:9/v1 {a.url}", "x", cfg, backoff_s=0.05)
        rankings, first = asked(endpoint, queries)
        n_while_failing = len(b.requests)
        b.always = ""
        endpoint.rests_until[b.url] = 0.0  # its rest is over
        again, second = asked(endpoint, queries)
        expected, _ = asked(grouprank.Endpoint(a.url, "x", cfg), queries)
    assert rankings == again == expected  # which server answers changes nothing
    assert first == second and first["ok"] == first["calls"] == 60 and first["errors"] == 0
    assert 1 <= n_while_failing <= 8 < len(b.requests)


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(st.sampled_from(["choices", "message", "content", "usage",
                                                       "prompt_tokens", "finish_reason"]), inner)))
def test_no_json_of_a_server_can_stop_a_run(value):
    endpoint = grouprank.Endpoint("http://h/v1", "x", grouprank.Config(), tries=1)
    endpoint.opener.open = lambda *_, **__: io.BytesIO(json.dumps(value).encode())
    completion = endpoint.ask({"seed": 1}, threading.Event())
    assert isinstance(completion.text, str) and isinstance(completion.truncated, bool)


@pytest.mark.parametrize(("reply", "words"), [
    (b'{"error": {"message": "Insufficient credits"}}', "Insufficient credits"),
    (b'{"error": "overdrawn", "choices": null}', "overdrawn"),
    (b'{"choices": []}', r"\{'choices': \[\]\}"),
    (b"", "an empty reply"), (b"Service temporarily unavailable", "Service temporarily"), (b"[]", r"\[\]"),
    (b'{"choices": [{"error": {"message": "No credits"}, "message": null}]}', "No credits"),
    (b"\n<!DOCTYPE html>\n<title>Sign in</title>", "<!DOCTYPE html> <title>Sign in</title>")])  # fmt: skip
def test_a_reply_that_is_no_answer_stops_after_three_tries_with_its_words(reply, words):
    endpoint = grouprank.Endpoint("http://h/v1", "x", grouprank.Config(concurrency=1), backoff_s=0.001)
    asked_for = []
    endpoint.post = lambda url, body: asked_for.append(url) or reply
    with pytest.raises(ValueError, match=f"http://h/v1 answered NoAnswer: {words}"):
        asked(endpoint, [candidates([1, 9, 5], f"q{i}") for i in range(4)])
    assert 3 <= len(asked_for) <= 6  # those that were on their way when the third one came


def test_an_error_under_status_200_with_a_code_that_passes_is_tried_again():
    """As OpenRouter and LiteLLM put them: at the top, or beside an empty answer."""
    endpoint = grouprank.Endpoint("http://h/v1", "x", grouprank.Config(concurrency=1), backoff_s=0.001)
    busy = {"error": {"message": "Rate limit", "code": 429}}
    beside = {"error": {"message": "Overloaded", "code": "503"}, "choices": [{"message": {"content": None}}]}
    right = {"choices": [{"message": {"content": make_answer([1, 9])}}]}
    replies = [busy, beside, busy, beside, right]
    endpoint.post = lambda url, body: json.dumps(replies.pop(0)).encode()
    rankings, counts = asked(endpoint, [candidates([0, 0])])
    assert rankings[0].order == [1, 0] and (counts["calls"], counts["errors"], replies) == (1, 0, [])


def test_one_flagged_document_costs_its_group_and_not_the_job():
    """Status 403, as moderation answers; nothing but 403 is an error, as with a key without rights."""
    queries = [candidates([1, 9], "good"), candidates([2, 8], "flagged")]

    def post(url, body, timeout_s=0.0):
        scores = [int(n) for n in re.findall(r"text \d (\d)", body["messages"][-1]["content"])]
        if 8 in scores:
            raise urllib.error.HTTPError(url, 403, "no", {}, io.BytesIO(b"input was flagged"))
        return json.dumps({"choices": [{"message": {"content": make_answer(scores)}}]}).encode()

    endpoint = grouprank.Endpoint("http://h/v1", "x", grouprank.Config(), backoff_s=0.001)
    endpoint.post = post
    rankings, counts = asked(endpoint, queries)
    assert [ranking.order for ranking in rankings] == [[1, 0], [0, 1]]
    assert (counts["calls"], counts["errors"], counts["failed groups"]) == (2, 1, 1)
    with pytest.raises(ValueError, match="none of 1 calls was answered; the first error: HTTP 403"):
        asked(endpoint, queries[1:])


def test_an_answer_that_thinks_only_is_read_where_a_whole_one_stands_and_named_where_not():
    def thinking(text):
        choice = {"message": {"content": None, "reasoning_content": text}, "finish_reason": "length"}
        endpoint = grouprank.Endpoint("http://h/v1", "x", grouprank.Config(), tries=1)
        endpoint.post = lambda url, body: json.dumps({"choices": [choice]}).encode()
        return endpoint

    rankings, _ = asked(thinking("so " + make_answer([1, 9])), [candidates([0, 0])])
    assert rankings[0].order == [1, 0]
    for key in ("content", "reasoning"):
        message = {"content": [{"type": "text", "text": make_answer([1, 9])}]} if key == "content" else {
            "content": None, key: make_answer([1, 9])}
        endpoint = grouprank.Endpoint("http://h/v1", "x", grouprank.Config(), tries=1)
        endpoint.post = lambda url, body, message=message: json.dumps({"choices": [{"message": message}]}).encode()
        assert asked(endpoint, [candidates([0, 0])])[0][0].order == [1, 0]
    with pytest.raises(ValueError, match="the server puts the text into reasoning_content"):
        asked(thinking("let me see <answer>"), [candidates([0, 0])])


def test_ctrl_c_in_a_program_that_asks_a_silent_server_ends_it_at_once(ctrl_c):
    """Threads that are left wait for the server, but a program that ends does not wait for them."""
    class Silent(LocalServer):
        def post(self, handler, body):
            reached.set()
            time.sleep(30)

    reached, before, started = threading.Event(), set(threading.enumerate()), time.perf_counter()
    with Silent() as server, pytest.raises(KeyboardInterrupt):
        ranker = grouprank.GroupRanker.from_pretrained("m", endpoint=server.url)
        threading.Thread(target=lambda: reached.wait() and os.kill(os.getpid(), signal.SIGINT),
                         daemon=True).start()
        ranker.rank("q", ["a", "b"])
    assert time.perf_counter() - started < 10
    left = set(threading.enumerate()) - before
    assert left and all(thread.daemon for thread in left)


def test_that_no_server_is_there_is_said_before_the_first_call():
    started = time.perf_counter()
    with pytest.raises(ValueError, match="127.0.0.1:9/v1: no server can be reached there .*refused"):
        grouprank.load_backend(grouprank.Config(model="m", endpoint="http://127.0.0.1:9/v1"))
    with GoldServer({}) as there:
        grouprank.load_backend(grouprank.Config(model="m", endpoint=f"http://127.0.0.1:9/v1,{there.url}"))
    assert time.perf_counter() - started < 5


def test_a_share_of_unreadable_answers_above_one_half_is_warned_of_once(capsys):
    texts = [make_answer([3, 4]), "I cannot help.", "I cannot help."]
    rankings, _ = rank(Scripted(texts), [candidates([0, 0], f"q{i}") for i in range(3)], retries=0)
    assert [ranking.means for ranking in rankings[1:]] == [[None, None]] * 2
    assert capsys.readouterr().err.count("2 of 3 answers could not be read; one begins with 'I cannot help.'") == 1


@pytest.mark.parametrize("status", ["401", "402", "404"])
def test_a_wrong_key_or_model_name_or_an_empty_account_stops_at_once_with_the_servers_words(status):
    with GoldServer({}, always=status) as server:
        endpoint = grouprank.Endpoint(server.url, "x", grouprank.Config(), backoff_s=30.0)
        with pytest.raises(ValueError, match=f"{server.url} answered HTTP {status}: .*error"):
            asked(endpoint, [candidates([1, 9, 5], f"q{i}") for i in range(4)])


def test_a_dead_server_stops_the_run_instead_of_a_ranking_and_the_screen_says_why(capsys):
    endpoint = grouprank.Endpoint("http://127.0.0.1:9/v1", "x", grouprank.Config(), tries=2, backoff_s=0.001)
    with pytest.raises(ValueError, match=r"none of 2 calls was answered; the first error: URLError \(2 tries\)"):
        asked(endpoint, [candidates([1, 9, 5])], retries=1)
    assert re.search("note: http://127.0.0.1:9/v1 answered URLError: .*refused", capsys.readouterr().err)


def test_a_server_that_dies_in_the_middle_stops_the_job_after_three_rounds_of_requests():
    """Each has had all its tries; a request that succeeds starts the count anew."""
    endpoint = grouprank.Endpoint("http://h/v1", "x", grouprank.Config(concurrency=1), tries=2, backoff_s=0.0)
    asked = []

    def post(url, body, timeout_s=0.0):
        asked.append(body["seed"])
        if len(asked) != 5:  # the third request is answered
            raise ConnectionResetError("gone")
        return json.dumps({"choices": [{"message": {"content": "fine"}}]}).encode()

    endpoint.post = post
    chat = grouprank.Chat(grouprank.Prompt(), "q", ("a",), (0,))
    with pytest.raises(ValueError, match="4 requests in a row failed, the last one at http://h/v1 with"
                                         " ConnectionResetError: gone; go on when a server works"):
        endpoint([chat] * 100, 0.0, 1.0)
    assert len(asked) >= 2 * 2 + 1 + 2 * 4


def test_a_dead_server_is_no_odd_query_also_of_direct_scores():
    """A job that has read others goes on behind a query that no request can serve, not without a server."""
    cfg = grouprank.Config(answer="direct", retries=0)
    endpoint = grouprank.Endpoint("http://h/v1", "x", cfg, tries=1)
    query, counts = candidates([1, 2, 3]), Counter(calls=7)

    def post(url, body, timeout_s=0.0):
        raise ConnectionResetError("gone") if dead else urllib.error.HTTPError(url, 400, "", {}, io.BytesIO(b"too long"))

    endpoint.post, dead = post, True
    with pytest.raises(ValueError, match="none of 1 calls was answered"):
        grouprank.rank_queries(endpoint, grouprank.Prompt(), [query], cfg, counts)
    dead = False
    (ranking,) = grouprank.rank_queries(endpoint, grouprank.Prompt(), [query], cfg, counts)
    assert ranking.means == [None] * 3 and counts["failed groups"] == 1


def test_documents_for_a_server_are_cut_too():
    endpoint = grouprank.Endpoint("http://h/v1", "x", grouprank.Config(max_doc_tokens=5))
    endpoint.ask_all = lambda bodies: asked.extend(bodies) or [grouprank.Completion("") for _ in bodies]
    asked = []
    (answer,) = endpoint([grouprank.Chat(grouprank.Prompt(), "q", ("word " * 100, "short"), (0,))], 0.0, 1.0)
    (body,) = asked
    assert answer.counts == {"document letters cut": 480}
    assert body["messages"][-1]["content"].count("word ") == 4  # four characters for a token
    endpoint.cfg = grouprank.Config(max_prompt_tokens=100)  # the longest documents pay first
    chat = grouprank.Chat(grouprank.Prompt("", "{query}{documents}"), "0123", ("x" * 1000, "y" * 300, "z" * 10), (0,))
    assert list(map(len, endpoint.shorten(chat))) == [(400 - 22 - 10) // 2] * 2 + [10]
    chat = dataclasses.replace(chat, query="long " * 100)  # no room: nothing blank is scored, the server refuses
    assert list(map(len, endpoint.shorten(chat))) == [1000, 300, 10]


# --- Python ---------------------------------------------------------------------------------------


def test_rank_returns_what_cross_encoders_return():
    ranker = grouprank.GroupRanker(Scripted(), grouprank.Prompt(), grouprank.Config())
    rows = ranker.rank("query", ["a 1", "b 9", "c 5"], top_k=2, return_documents=True)
    assert rows == [{"corpus_id": 1, "score": 9.0, "text": "b 9"}, {"corpus_id": 2, "score": 5.0, "text": "c 5"}]
    assert ranker.rank("query", []) == []


@pytest.mark.parametrize(("documents", "named"), [
    ("one text", "str"), ({"a": "b"}, "dict"), (None, "NoneType"), (b"bytes", "bytes"), (7, "int"),
    (iter(["a"]), "list_iterator"), (["a", None], "NoneType"), (["a", 3.0], "float")])
def test_documents_that_are_no_texts_are_named_at_the_door(documents, named):
    ranker = grouprank.GroupRanker(Scripted(), grouprank.Prompt(), grouprank.Config())
    with pytest.raises(TypeError, match=f"not {named}$"):
        ranker.rank("query", documents)
    with pytest.raises(TypeError, match="not bytes$"):
        ranker.rank(b"query", ["a 1"])
    with pytest.raises(ValueError, match="top_k must be a whole number from 1 on, got -1"):
        ranker.rank("query", ["a 1", "b 2"], top_k=-1)


def test_a_ranking_of_which_nothing_could_be_read_is_an_error_not_zeros():
    ranker = grouprank.GroupRanker(Scripted(["?"] * 4), grouprank.Prompt(), grouprank.Config())
    with pytest.raises(ValueError, match="none of 4 answers could be read; one begins with '[?]'"):
        ranker.rank("query", ["a 1", "b 2"])


def test_a_document_that_was_not_scored_keeps_its_place_with_the_score_of_the_one_before_it():
    class Partial(Scripted):
        def __call__(self, chats, *_):
            number = chats[0].texts.index("b")  # the second of the list gets no score
            scores = {f"[{i}]": 10 - i for i in (1, 2, 3) if i != number + 1}
            return [grouprank.Completion(f"<reason></reason><answer>{json.dumps(scores)}</answer>")]

    cfg = grouprank.Config(retries=0)
    first, second, third = grouprank.GroupRanker(Partial(), grouprank.Prompt(), cfg).rank("query", ["a", "b", "c"])
    assert second == {"corpus_id": 1, "score": first["score"]}
    assert first["score"] > third["score"] and {first["corpus_id"], third["corpus_id"]} == {0, 2}
