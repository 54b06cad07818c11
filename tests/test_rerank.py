"""Reranking (Eq. 1, Sec. 4.5): groups, pooling, fusion, retries, both back ends, real passages."""

import io
import json
import math
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from conftest import save_tiny_model
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


def make_answer(scores):
    """A well-formed answer."""
    body = json.dumps({f"[{i}]": s for i, s in enumerate(scores, 1)})
    return f"<reason>fine</reason><answer>{body}</answer>"


class Scripted:
    """A back end that answers with the number at the end of each document, with planned faults."""

    def __init__(self, faults=()):
        self.faults = list(faults)
        self.seeds = []

    def __call__(self, chats, temperature, top_p, progress=None):
        answers = []
        for chat in chats:
            self.seeds.append(chat.seed)
            text = make_answer([int(text.split()[-1]) for text in chat.texts])
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
    counts = Counter()
    return grouprank.rank_queries(backend, grouprank.Prompt(), queries, cfg, counts), counts


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


def test_reading_candidates_honours_exclusions_and_the_cut(tmp_path):
    evaluate.write_collection(
        tmp_path, {"a": "A", "b": "B", "c": "C"}, {"q": "Q", "r": "R"},
        {"q": {"a": 1}}, {"q": {"b"}},
    )  # fmt: skip
    evaluate.write_run(tmp_path / "x.run", {"q": [("b", 3.0), ("c", 2.0), ("a", 1.0)]})
    cfg = grouprank.Config(data=str(tmp_path), run=str(tmp_path / "x.run"), top_k=2)
    queries, _, counts = grouprank.read_candidates(cfg)
    assert [(q.qid, q.ids) for q in queries] == [("q", ["c", "a"])]
    assert counts["queries without a run"] == 1


# --- A local server that speaks the chat-completions interface -----------------------------------


class GoldServer:
    """Answers prompts with gold labels, looked up by document text; every third request fails."""

    FAULTS = ("json", "missing", "out of range", "500", "429", "length", "close", "half")

    def __init__(self, gold, faulty=False):
        self.gold, self.faulty = gold, faulty
        self.requests, self.lock = [], threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    number = len(outer.requests)
                    outer.requests.append((self.path, body, self.headers.get("Authorization")))
                fault = ""
                if outer.faulty and number % 3 == 0:
                    fault = outer.FAULTS[number // 3 % len(outer.FAULTS)]
                outer.reply(self, body, fault)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.server.server_close()

    def scores(self, body):
        """The gold labels of the documents in the prompt, in their order."""
        block = body["messages"][-1]["content"]
        block = block.partition("documents:\n\n")[2].partition("\n\nReply in exactly")[0]
        found = [self.gold[piece.partition("]")[2]] for piece in ("\n\n" + block).split("\n\n[")[1:]]
        return found

    def reply(self, handler, body, fault):
        if fault in ("500", "429"):
            handler.send_response(int(fault))
            if fault == "429":
                handler.send_header("Retry-After", "0")
            handler.end_headers()
            handler.wfile.write(b'{"error": "[1] 10 [2] 10"}')
            return
        if fault == "close":
            handler.connection.close()
            return
        scores = self.scores(body)
        text = make_answer(scores)
        if fault == "json":
            text = text.replace("}", "")
        if fault == "missing":
            text = make_answer(scores[:-1])
        if fault == "out of range":
            text = make_answer([*scores, 3])
        if fault == "length":
            text = text[: len(text) // 2]
        data = {
            "choices": [{"message": {"role": "assistant", "content": text},
                         "finish_reason": "length" if fault == "length" else "stop"}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 50},
        }  # fmt: skip
        payload = json.dumps(data).encode()
        if fault == "half":
            payload = payload[: len(payload) // 2]
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(payload)))
        handler.end_headers()
        handler.wfile.write(payload)


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
    """Every third request fails: broken JSON, missing or invented documents, errors, half answers."""
    _, sidecar = rerank_with_server(
        novel, tmp_path / "o.run", monkeypatch, faulty=True, rounds=3, **{"docs-per-group": 10}
    )
    assert measured(novel, tmp_path / "o.run") == [100.0, 100.0, 100.0]
    counts = sidecar["counts"]
    assert counts["failed groups"] == counts["unscored documents"] == 0
    for fault in ("bad_json", "missing", "out_of_range", "truncated"):
        assert counts[fault] > 0


def test_written_runs_decrease_strictly_for_every_evaluator(novel, tmp_path, monkeypatch):
    """trec_eval keeps scores as float32 and breaks ties by document id."""
    rerank_with_server(novel, tmp_path / "o.run", monkeypatch, faulty=False)
    rows = [line.split() for line in (tmp_path / "o.run").read_text().splitlines()]
    for qid in {row[0] for row in rows}:
        scores = np.array([row[4] for row in rows if row[0] == qid], dtype=np.float32)
        assert (np.diff(scores) < 0).all()


def test_a_wrong_key_or_model_name_stops_at_once_with_the_servers_words(tmp_path):
    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(404)
            self.end_headers()
            self.wfile.write(b"no such model")

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = grouprank.Endpoint(
        f"http://127.0.0.1:{server.server_port}/v1", "x", grouprank.Config(), backoff_s=0.01
    )
    chat = grouprank.Chat(grouprank.Prompt(), "q", ("d",), (0,))
    with pytest.raises(ValueError, match="HTTP 404: no such model"):
        endpoint([chat], 0.3, 0.8)
    server.shutdown()
    server.server_close()


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

    def refuse(body):
        error = grouprank.urllib.error.HTTPError(endpoint.url, 401, "no", {}, io.BytesIO(b"bad sk-secret"))
        raise error

    monkeypatch.setattr(endpoint, "post", refuse)
    with pytest.raises(ValueError, match=r"HTTP 401: bad \*\*\*"):
        endpoint.ask(grouprank.Chat(grouprank.Prompt(), "q", ("d",), (0,)), 0.3, 0.8)


def test_documents_for_a_server_are_cut_too():
    endpoint = grouprank.Endpoint("http://h/v1", "x", grouprank.Config(max_doc_tokens=5))
    assert endpoint.shorten(["word " * 100, "short"]) == ["word " * 4, "short"]


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
    with pytest.raises(ValueError, match="no such setting: docs_per_grup"):
        grouprank.rerank_settings({"docs_per_grup": 3})
