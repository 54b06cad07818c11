"""Data synthesis: equations by hand, steps on a small simulated world, a job that is killed."""

import contextlib
import dataclasses
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sqlite3
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import bench_synth
import pytest
import torch
from conftest import ChatServer, byte_tokenizer, save_tiny_model, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

import evaluate
import grouprank
import synth
from grouprank import METHODS, Chat, Completion

ROOT = Path(__file__).resolve().parent.parent
OUTPUTS = (*synth.OUTPUTS, "synth.json")


def command(monkeypatch, *arguments):
    """Run synth.py in this process."""
    monkeypatch.setattr(sys, "argv", ["synth.py", *map(str, arguments)])
    synth.main()


def rows_of(path):
    """The rows of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


# --- A world, a simulated teacher, and a server that speaks with its voice ------------------------


def world(seed=0):
    """The world of synth.py's demo."""
    return grouprank.DemoWorld(seed, 0.0, recall=0.875)


def write_world(folder, n_docs=90, n_queries=12, seed=0):
    """A small collection of the demo's world: documents of five words, given queries of three."""
    rng, made = random.Random(seed), world(seed)
    draw = made.draw_query
    corpus = {f"d {i}/x": " ".join(made.draw_document(rng, draw(rng, False))) for i in range(n_docs)}
    queries = {f"q{i:02}": " ".join(made.concepts[c][0] for c in draw(rng, False)) for i in range(n_queries)}
    evaluate.write_collection(folder, corpus, queries, {})
    return folder


SMALL = {"llm": "simulated", "near_duplicate": 0.95, "group_sizes": "5-8", "groups_per_query": 4, "positive_level": 3,
         "dev_share": 0.2, "pool_top": 5, "pool_random": 15, "min_agreement": 0.0}  # fmt: skip


def flags(**options):
    """Options as command-line arguments."""
    return [text for name, value in options.items() for text in (grouprank.flag(name), str(value))]


def simulated(body):
    """What the simulated teacher says to a request; the query and documents are found in its text."""
    system, user = (message["content"] for message in body["messages"])
    prompt = next(prompt for prompt in synth.PROMPTS.values() if prompt.system == system)
    asked = user.partition("\n\nReply in exactly this form")[0].split("\n")
    texts = [line.partition("]")[2].strip() for line in asked if line.startswith("[")]
    return synth.simulated_teacher(world())([Chat(prompt, asked[1], texts, body["seed"])])[0].text


def always(text):
    """A back end that gives one answer to everything."""
    return lambda chats, temperature, top_p: [Completion(text)] * len(chats)


def synthesise(folder, out, backend=None, **options):
    """Run the pipeline in this process with a back end of our own."""
    cfg = synth.Config(**(SMALL | {"data": str(folder), "out": str(out)} | options))
    model = ("simulated", backend or synth.simulated_teacher(world()))
    return synth.synthesise(cfg, lambda cfg: dict.fromkeys(synth.PROMPTS, model))


def answers_in(out):
    """The rows of a folder's answers as dicts, in the order in which they came."""
    database = sqlite3.connect(out / "answers.sqlite")
    database.row_factory = sqlite3.Row
    rows = [dict(row) for row in database.execute("SELECT * FROM answers ORDER BY rowid")]
    database.close()
    return rows


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One finished job with generated queries: (input folder, output folder, its Work)."""
    folder, out = tmp_path_factory.mktemp("world"), tmp_path_factory.mktemp("made") / "out"
    write_world(folder)
    return folder, out, synthesise(folder, out, generate_queries=40, export=tuple(synth.EXPORTS))


# --- Eq. 2 and labels -----------------------------------------------------------------------------


def test_equation_2_by_hand():
    fused = synth.fuse_ranks([1, 2, 4], [2, 1, 3], beta=0.25)
    assert fused == pytest.approx([-0.75 * math.log(2), -0.25 * math.log(2), -0.25 * math.log(4) - 0.75 * math.log(3)])


def test_equal_scores_share_their_mean_rank_so_that_the_other_teacher_decides():
    assert synth.mean_ranks([5, 9, 5, 0]) == [2.5, 1.0, 2.5, 4.0]
    assert synth.mean_ranks([0, 0, 0]) == [2.0] * 3
    first, second = synth.fuse_ranks(synth.mean_ranks([5, 5]), [2, 1])
    assert second > first
    assert len(set(synth.fuse_ranks([2, 1, 2.5], [5, 10, 4]))) == 1  # equal products tie exactly


def test_the_authors_rows_hold_twice_equation_2(real_data):
    """exp(-S) is a product of two ranks in a pool of 50, and Eq. 2 with beta 0.5 is half of S."""
    for row in evaluate.read_jsonl(real_data / "diver_sample/groupwise_sft_data_example.jsonl"):
        for recorded in row["final_rank_score"].values():
            product = round(math.exp(-recorded))
            pairs = [(p, product // p) for p in range(1, 51) if product % p == 0 and product // p <= 50]
            assert pairs  # two ranks of at most 50 make it up
            ours = synth.fuse_ranks(*zip(*pairs, strict=True))
            assert ours == pytest.approx([recorded / 2] * len(pairs), abs=1e-9)


def test_labels_are_the_pointwise_scores_dealt_out_in_fused_order():
    assert synth.deal_scores([-0.3, -0.1, -0.9, -0.5], [7, 3, 0, 9]) == [7, 9, 0, 3]
    assert synth.deal_scores([-0.1, -0.5, -0.5], [10, 4, 1]) == [10, 2.5, 2.5]


def test_first_stage_fusion_reproduces_pyserinis_files(real_data):
    """Interpolation; min-max but for constant lists: 0 here, 1 there."""
    read = lambda name: evaluate.read_run(real_data / f"fusion/simple_trec_run_{name}.txt")  # noqa: E731
    one, two = read("fusion_1"), read("fusion_2")
    for qid, expected in read("interpolation_verify").items():
        assert synth.interpolate(one.get(qid, {}), two.get(qid, {}), 0.4) == pytest.approx(expected)
    for qid, expected in read("normalize_verify").items():
        ours = dict(zip(one[qid], evaluate.minmax(one[qid].values()), strict=True))
        assert ours == (expected if len(expected) > 1 else dict.fromkeys(expected, 0.0))


# --- Algorithm 1 ----------------------------------------------------------------------------------


@given(st.integers(5, 60), st.integers(2, 20), st.booleans(), st.integers(0, 999))
@settings(max_examples=200, deadline=None)
def test_a_group_is_neighbours_or_evenly_spaced_and_inside_the_pool(n_docs, size, contiguous, seed):
    size = min(size, n_docs)
    docs = synth.draw_group(n_docs, size, contiguous, random.Random(seed))
    stride = 1 if contiguous else n_docs // size
    steps = [(b - a) % n_docs for a, b in itertools.pairwise([*docs, docs[0]])]  # on a circle
    assert len(set(docs)) == size and steps.count(stride) >= size - 1
    assert docs[0] >= 0 and docs[-1] < n_docs


@pytest.mark.parametrize("contiguous", [False, True])
def test_every_place_of_a_pool_is_drawn_equally_often(contiguous):
    """Also the first, which are the best, and the last, where a forced source stands."""
    rng, counts = random.Random(0), [0] * 50
    for _ in range(10_000):
        for i in synth.draw_group(50, 20, contiguous, rng):
            counts[i] += 1
    assert min(counts) > 0.93 * 4000 and max(counts) < 1.07 * 4000  # 4,000 +- five deviations


def test_group_sizes_follow_table_7():
    weights = synth.parse_sizes(synth.Config().group_sizes)
    assert weights[10] == 9300 and weights[20] == 8700 and weights[5] == weights[19] == 85
    assert set(weights) == set(range(5, 21))
    rng, labels = random.Random(0), list(range(50))
    sizes = Counter(len(docs) for _ in range(400) for docs, _ in synth.sample_groups(labels, 5, weights, 0.5, rng))
    assert abs(sizes[10] / 2000 - 9300 / 19190) < 0.04 and set(sizes) <= set(range(5, 21))


def test_groups_differ_and_are_never_flat():
    labels = [0.0] * 30 + [float(i % 7) for i in range(20)]
    groups = synth.sample_groups(labels, 12, {5: 1.0}, 0.5, random.Random(3))
    assert 10 <= len({tuple(sorted(docs)) for docs, _ in groups}) == len(groups)
    assert all(len({labels[i] for i in docs}) > 1 for docs, _ in groups)
    assert any(docs != sorted(docs) for docs, _ in groups)  # a position must not tell a rank
    assert synth.sample_groups([1.0] * 50, 3, {5: 1.0}, 0.5, random.Random(0)) == []
    assert synth.sample_groups(labels, 2, {60: 1.0}, 0.5, random.Random(0)) == []


def test_the_pool_is_the_top_and_random_deeper_ranks():
    ranked = [f"d{i}" for i in range(1, 301)]
    pool = synth.draw_pool(ranked, 10, 40, 200, random.Random(0))
    numbers = [int(doc[1:]) for doc in pool]
    assert numbers[:10] == list(range(1, 11)) and len(set(numbers)) == 50
    assert numbers == sorted(numbers) and 11 <= numbers[10] and numbers[-1] <= 200


# --- Queries --------------------------------------------------------------------------------------


def test_near_duplicates_are_those_that_a_full_comparison_finds():
    rng = random.Random(0)
    words = [f"w{rng.randrange(50)}" for _ in range(900)]
    texts = [" ".join(words[i * 3 : i * 3 + 15]) for i in range(120)]
    texts += [text + " extra" for text in texts[::9]]
    for threshold, n_expected in ((0.3, 117), (0.7, 14), (0.9, 1)):
        index, kept, n_found = synth.NearDuplicates(threshold), [], 0
        for text in texts:
            ours = synth.shingles(text)
            expected = any(len(ours & theirs) / len(ours | theirs) >= threshold for theirs in kept)
            assert index.has(text) == expected
            n_found += expected
            kept.append(ours)
            index.add(text)
        assert n_found >= n_expected


def test_each_step_may_have_its_own_model_and_server(monkeypatch):
    """NAME or NAME@URL; a name may hold an @ itself."""
    monkeypatch.setattr(grouprank, "load_backend", lambda cfg: (cfg.model, cfg.endpoint, cfg.max_new_tokens))
    cfg = synth.Config(llm="@cf/x-8b", endpoint="http://a/v1", pointwise_llm="small@http://b/v1", listwise_llm="x@2024",
                       max_new_tokens=77)  # fmt: skip
    main = ("@cf/x-8b", ("@cf/x-8b", "http://a/v1", 77))
    assert synth.load_models(cfg) == {
        "queries": main, "groupwise": main, "pointwise": ("small", ("small", "http://b/v1", 77)),
        "listwise": ("x@2024", ("x@2024", "http://a/v1", 77))}  # fmt: skip


def test_a_query_is_read_only_from_the_right_form():
    assert synth.read_answer("queries", '<reason>r</reason><answer>\n"why is\n it so?"</answer>') == "why is it so?"
    for text in ("why?", "<answer>why?</answer>", "<reason>r</reason><answer> </answer>"):
        assert synth.read_answer("queries", text) is None


def test_generated_queries_are_filtered_and_what_was_dropped_is_named(made):
    folder, out, work = made
    corpus = evaluate.read_texts(folder / "corpus.jsonl")
    dropped = Counter(row["reason"] for row in rows_of(out / "dropped.jsonl"))
    assert 5 < len(work.topics) == 40 - sum(dropped.values()) and dropped
    for topic in work.topics:
        assert topic.source in corpus and not set(topic.text.split()) & set(corpus[topic.source].split())
        best = sorted((c.fused for c in topic.pool), reverse=True)[2]  # round trip: fused rank 3 or better
        assert next(c.fused for c in topic.pool if c.doc == topic.source) >= best
        assert topic.forced == (topic.source_rank is None)


def test_queries_on_which_the_teachers_disagree_are_dropped(tmp_path):
    folder = write_world(tmp_path / "w")
    everyone = synthesise(folder, tmp_path / "all").topics
    agreements = sorted(t.agreement for t in everyone)
    limit = (agreements[3] + agreements[4]) / 2
    kept = synthesise(folder, tmp_path / "out", min_agreement=limit).topics
    assert [t.qid for t in kept] == [t.qid for t in everyone if t.agreement >= limit]
    assert Counter(row["reason"] for row in rows_of(tmp_path / "out" / "dropped.jsonl"))["the teachers disagree"] == 4


def test_queries_that_copy_or_repeat_or_leak_are_dropped(tmp_path):
    """Words count once and without stop words, in whatever order. Of a given query no form or length is asked."""
    tests = write_rows(tmp_path / "test.jsonl", [{"_id": "t", "text": "what do heart and lung have in common"}])
    work = synth.Work(synth.Config(near_duplicate=0.7, exclude_queries=str(tests)), {"d": "cardiac enamel wolf tide nova"})
    expected = {
        "enamel wolf cardiac and the?": "shares its words with the source",
        "why do tides rise twice a day": None, "twice a day, why do tides rise?": "near-duplicate",
        "what do heart and lung have in  common?": "nearly an excluded query",
        "why so": "length", "": "no answer in the right form", "why does the sea come and go": None,
    }  # fmt: skip
    work.topics = [synth.Topic(f"g{i}", text, "d") for i, text in enumerate(expected)]
    work.do(synth.filter_queries)
    assert {row["query"]: row["reason"] for row in work.dropped.values()} | {t.text: None for t in work.topics} == expected
    given = ["why do the leaves turn red", "what is a tide", "Why do the leaves turn red?", "heart and lung: what do they"
             " have in common", "short"]  # fmt: skip
    work.topics = [synth.Topic(f"q{i}", text) for i, text in enumerate(given)]
    work.do(synth.filter_queries)
    assert [t.qid for t in work.topics] == ["q0", "q1", "q4"]


# --- What is written ------------------------------------------------------------------------------


def test_rows_are_training_rows_with_the_labels_of_their_pool(made):
    _, out, work = made
    topics = {t.qid: t for t in work.topics}
    for name in OUTPUTS[:2]:
        rows = rows_of(out / name)
        assert rows == sorted(rows, key=lambda row: row["id"])
        assert len(grouprank.read_rows(out / name)) == len(rows) > 0
        for row in rows:
            t = topics[row["source"]["qid"]]
            label_of = {c.doc: c.label for c in t.pool}
            assert row["scores"] == [label_of[doc["id"]] for doc in row["docs"]]
            assert all(doc["text"] == work.corpus[doc["id"]] for doc in row["docs"])
    train, dev = ({row["source"]["qid"] for row in rows_of(out / name)} for name in OUTPUTS[:2])
    assert not train & dev and train | dev == set(topics)
    assert not any("response" in row for row in rows_of(out / "reranker.dev.jsonl"))


def test_responses_parse_and_agree_with_the_labels(made):
    rows = [row for row in rows_of(made[1] / "reranker.train.jsonl") if "response" in row]
    assert len(rows) > 10
    for row in rows:
        reward = grouprank.score_completion(row["response"], row["scores"])
        tied = grouprank.reward_scores([[0] * len(row["scores"])], row["scores"])[0].ndcg
        assert reward.status == "ok" and reward.ndcg >= (1 + tied) / 2  # halfway from chance to the best


def test_a_response_that_tells_no_document_from_another_agrees_with_no_labels(tmp_path):
    """Its NDCG alone, that of a random order, would often be above 0.8."""
    teacher = synth.simulated_teacher(world())

    def undecided(chats, *sampling):
        if chats[0].prompt is not synth.PROMPTS["groupwise"]:
            return teacher(chats, *sampling)
        return [Completion("<reason>r</reason><answer>" + json.dumps(
            {f"[{i}]": 5 for i in range(1, len(chat.texts) + 1)}) + "</answer>") for chat in chats]

    work = synthesise(write_world(tmp_path / "w"), tmp_path / "out", undecided, sft_share=1.0)
    assert work.counts["responses dropped: not in form, or not in accord with the labels"] > 10
    assert work.counts["responses"] == 0


def test_queries_that_are_judged_for_a_test_are_not_learned_from(tmp_path):
    folder = write_world(tmp_path / "w")
    evaluate.write_lines(folder / "qrels" / "test.tsv", [("query-id", "corpus-id", "score"), ("q03", "d 0/x", 1)])
    work = synthesise(folder, tmp_path / "out")
    assert "q03" not in {t.qid for t in work.topics} | work.dropped.keys()
    assert work.counts["queries left out: judged in qrels/test.tsv"] == 1
    queries = evaluate.read_texts(folder / "queries.jsonl")
    shouted = {"copy": queries["q03"].upper()}  # a test query under another id
    evaluate.write_collection(folder, work.corpus, queries | shouted, {"q03": {"d 0/x": 1}})
    work = synthesise(folder, tmp_path / "copied")
    assert work.dropped["copy"]["reason"] == "nearly an excluded query" and "q03" not in {t.qid for t in work.topics}
    evaluate.write_collection(folder, work.corpus, {"q03": "all"}, {"q03": {"d 0/x": 1}})
    with pytest.raises(ValueError, match="qrels/test.tsv judges all queries.*--generate-queries"):
        synthesise(folder, tmp_path / "other")


def test_every_row_says_where_it_comes_from(made):
    for row in rows_of(made[1] / "reranker.train.jsonl"):
        source, n = row["source"], len(row["docs"])
        assert source["models"]["pointwise"] == "simulated" and source["version"] == grouprank.VERSION
        assert source["prompt_hashes"]["listwise"] == METHODS["listwise"].prompt.hash
        scores = [synth.read_answer("pointwise", text) for text in source["raw"]["pointwise"]]
        assert scores == [[score] for score in source["pointwise_scores"]] and len(source["retrieval_ranks"]) == n
        (order,) = source["raw"]["listwise"]
        assert sorted(synth.read_answer("listwise", order, 20)) == list(range(1, 21))
        fused = synth.fuse_ranks(source["pointwise_ranks"], source["listwise_ranks"])
        assert source["fused"] == pytest.approx(fused) and source["seed"] == 0
        assert ("groupwise" in source["models"]) == ("response" in row)


def test_retriever_rows_hold_no_false_negatives_and_no_held_out_query(made):
    out = made[1]
    rows, held_out = rows_of(out / "retriever.jsonl"), rows_of(out / "reranker.dev.jsonl")
    assert rows and list(rows[0]) == ["query", "pos", "neg", "pos_scores", "neg_scores"]
    assert not {row["query"] for row in rows} & {row["query"] for row in held_out}
    for row in rows:
        assert min(row["pos_scores"]) >= 3 and max(row["neg_scores"]) <= 1
        assert len(row["pos"]) == len(row["pos_scores"]) and len(row["neg"]) == len(row["neg_scores"])
        assert not set(row["pos"]) & set(row["neg"])


def test_exports_have_the_fields_of_their_readers(made):
    export = made[1] / "export"
    n_rows = len(rows_of(made[1] / "reranker.train.jsonl"))
    lists = rows_of(export / "sentence-transformers.labeled_list.jsonl")
    assert len(lists) == n_rows and list(lists[0]) == ["query", "docs", "labels"]
    for form, answer in (("ms-swift", "messages"), ("trl", "completion")):
        for row in rows_of(export / f"{form}.sft.jsonl"):
            assert row[answer][-1]["role"] == "assistant"
            assert grouprank.parse_answer(row[answer][-1]["content"], 99).scores
        grpo = rows_of(export / f"{form}.grpo.jsonl")
        assert len(grpo) == n_rows and grpo[0].keys() - {"scores"} <= {"messages", "prompt"}


# --- Never lose a paid call -----------------------------------------------------------------------


def outputs(folder):
    """The bytes of all outputs."""
    return {name: (folder / name).read_bytes() for name in OUTPUTS}


def test_the_same_command_again_asks_nothing_and_writes_the_same_bytes(made):
    folder, out, _ = made
    before = outputs(out)

    def refuse(chats, *rest):
        raise AssertionError("asked again")

    synthesise(folder, out, refuse, generate_queries=40)
    assert outputs(out) == before and (out / "export").exists()


def test_a_killed_job_goes_on_and_ends_with_the_same_bytes(tmp_path, monkeypatch):
    """SIGKILL in the middle; no answer that was written is asked for again."""
    folder = write_world(tmp_path / "w", n_docs=40, n_queries=4)
    options = SMALL | {"llm": "m", "data": folder, "concurrency": 4, "group_sizes": "5"}
    with ChatServer(simulated, delay_s=0.02) as server:
        arguments, parts = flags(**options, endpoint=server.url), tmp_path / "parts"
        command(monkeypatch, *arguments, "--out", tmp_path / "whole")
        n_whole = len(server.bodies)
        server.bodies.clear()
        job = os.fork()  # a process that need not import torch again
        if not job:
            try:
                command(monkeypatch, *arguments, "--out", parts)
            finally:
                os._exit(0)
        while len(server.bodies) < 40:
            time.sleep(0.01)
        os.kill(job, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(job, 0)[1]) == signal.SIGKILL  # it had not ended
        assert len(answers_in(parts)) >= 36 and not (parts / "retriever.jsonl").exists()
        command(monkeypatch, *arguments, "--out", parts)
    assert outputs(parts) == outputs(tmp_path / "whole")
    assert 0 <= len(server.bodies) - n_whole <= 4  # again only what was in flight when it was killed


def test_a_second_process_in_one_folder_is_refused(tmp_path):
    """Before it changes a file there, even with --overwrite; afterwards it may go on."""
    folder, out = write_world(tmp_path / "w", n_docs=30, n_queries=3), tmp_path / "out"
    synthesise(folder, out)
    before = outputs(out)
    with grouprank.open_alone(out / "failures.jsonl"), pytest.raises(ValueError, match="another process works on"):
        synthesise(folder, out, beta=0.9, overwrite=True)
    assert outputs(out) == before
    synthesise(folder, out, beta=0.9, overwrite=True)
    assert outputs(out) != before


def test_failures_are_logged_and_never_cached_and_a_retry_that_was_usable_is_not_asked_again(tmp_path):
    folder, out = write_world(tmp_path / "w", n_docs=30, n_queries=2), tmp_path / "out"
    teacher, calls, failed = synth.simulated_teacher(world()), [], []

    def flaky(chats, temperature, top_p):
        answers = teacher(chats)
        for i, chat in enumerate(chats):
            calls.append(chat.seed)
            if chat.seed[-1] == 0 and zlib.crc32(repr(chat.seed).encode()) % 4 == 0:
                failed.append(list(chat.seed))
                answers[i] = Completion("", error="HTTP 500: boom")
        return answers

    synthesise(folder, out, flaky)
    assert not {row["seed"] for row in answers_in(out)} & {json.dumps(seed) for seed in failed}
    assert [row["seed"] for row in rows_of(out / "failures.jsonl") if row["error"] != "unusable"] == failed != []
    before, n_calls = outputs(out), len(calls)
    synthesise(folder, out, flaky)
    assert len(calls) == n_calls and outputs(out) == before


def test_prompts_that_a_server_always_refuses_do_not_stop_a_job(tmp_path):
    """One in twenty, whose further tries are made one after the other; a server that fails at all stops it."""
    teacher, refused = synth.simulated_teacher(world()), Completion("", error="HTTP 400", hopeless=True)

    def ask(refuse, n=500):
        def backend(chats, *rest):
            return [refused if refuse(chat.seed[1]) else teacher([chat])[0] for chat in chats]

        text = world().concepts[0][0]
        with contextlib.closing(sqlite3.connect(":memory:", check_same_thread=False)) as database:
            teachers = synth.Teachers(database, synth.Config(out=str(tmp_path)), {"pointwise": ("m", backend)})
            return teachers.ask("pointwise", [(text, [text], (i,)) for i in range(n)])

    missing = [i for i, answer in enumerate(ask(lambda i: i % 20 == 0)) if answer is None]
    assert missing == list(range(0, 500, 20))
    with pytest.raises(ValueError, match="HTTP 400"):
        ask(lambda i: i >= 100)


def test_with_other_settings_outputs_are_replaced_only_by_overwrite_and_answers_stay(tmp_path):
    folder, out = write_world(tmp_path / "w", n_docs=30, n_queries=2), tmp_path / "out"
    synthesise(folder, out, export=("trl",))
    before, n_answers = outputs(out), len(answers_in(out))
    with pytest.raises(ValueError, match="was begun with beta 0.5, not 0.9; give the same, a new --out, or --overwrite"):
        synthesise(folder, out, beta=0.9)
    with pytest.raises(ValueError, match="--max-calls"):
        synthesise(folder, out, seed=5, overwrite=True, max_calls=3)
    assert outputs(out) == before and not (out / "export").exists()  # which would be of other rows
    synthesise(folder, out, always("no more answers are needed"), beta=0.9, sft_share=0.0, overwrite=True)
    assert outputs(out) != before and len(answers_in(out)) == n_answers
    write_rows(tmp_path / "retriever.jsonl", [])
    with pytest.raises(ValueError, match="retriever.jsonl exists"):
        synthesise(folder, tmp_path)


def test_a_file_that_is_no_database_is_named(tmp_path):
    (tmp_path / "answers.sqlite").write_bytes(b"x" * 5000)
    with pytest.raises(ValueError, match="answers.sqlite: file is not a database"):
        synthesise(write_world(tmp_path / "w"), tmp_path)


def test_a_folder_of_the_first_edition_is_refused(tmp_path):
    (tmp_path / "answers.jsonl").write_text("")
    with pytest.raises(ValueError, match="is of the first edition"):
        synthesise(write_world(tmp_path / "w"), tmp_path)


def test_the_retriever_never_replaces_the_folder_of_its_data(tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    write_rows(data / "retriever.jsonl", [{"query": "a", "pos": ["b"], "neg": ["c"]}])
    for out in (data, tmp_path):
        with pytest.raises(ValueError, match="take another --out"):
            command(monkeypatch, "--train-retriever", data / "retriever.jsonl", "--encoder", "org/x",
                    "--out", out, "--overwrite")
    assert (data / "retriever.jsonl").exists()


def test_a_budget_stops_the_job_and_a_larger_one_goes_on(tmp_path):
    folder = write_world(tmp_path / "w", n_docs=30, n_queries=2)
    with pytest.raises(ValueError, match="--max-calls"):
        synthesise(folder, tmp_path / "out", max_calls=35)
    for _ in range(2):
        assert len(answers_in(tmp_path / "out")) == synth.CALLS_PER_BATCH
        with pytest.raises(ValueError, match="--max-calls"):  # it bounds all starts together
            synthesise(folder, tmp_path / "out", max_calls=35)
    synthesise(folder, tmp_path / "out", max_calls=10**6)
    synthesise(folder, tmp_path / "whole")
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def test_a_dry_run_counts_the_calls_of_the_job_and_writes_nothing(tmp_path, monkeypatch, capsys):
    """It does not load an encoder either."""
    folder, out = write_world(tmp_path / "w", n_docs=40, n_queries=5), tmp_path / "out"
    arguments = flags(**SMALL, data=folder, out=out, sft_share=1.0, encoder="nobody/nothing")
    command(monkeypatch, *arguments, "--dry-run")
    # 5 queries x (20 documents, a list, 4 groups); then each of them is asked for, too
    said = capsys.readouterr().out  # nothing is known of answers: 100 tokens, and 20 for each document
    assert "dry run: 125 calls, " in said and "(158 each; the limit is 8,000); up to 4 times as much" in said
    command(monkeypatch, *arguments, "--dry-run", "--generate-queries", "5")
    assert "dry run: 130 calls, " in capsys.readouterr().out and not out.exists()


def test_ctrl_c_keeps_what_is_on_its_way(tmp_path, ctrl_c):
    folder, out = write_world(tmp_path / "w", n_docs=30, n_queries=4), tmp_path / "out"
    teacher, batches = synth.simulated_teacher(world()), []

    def interrupted(chats, *rest):
        batches.append(chats)
        if len(batches) == 2:
            os.kill(os.getpid(), signal.SIGINT)  # reaches the main thread, which waits
            time.sleep(0.2)
        return teacher(chats, *rest)

    with pytest.raises(KeyboardInterrupt):
        synthesise(folder, out, interrupted)
    assert len(answers_in(out)) == 2 * synth.CALLS_PER_BATCH  # of 80
    synthesise(folder, out)
    synthesise(folder, tmp_path / "whole")
    assert outputs(out) == outputs(tmp_path / "whole")


# --- Bad input ------------------------------------------------------------------------------------


def test_an_llm_that_never_parses_stops_the_run_with_one_of_its_answers(tmp_path):
    """With a model that does, the same folder goes on; a corpus smaller than a pool is the pool."""
    folder = write_world(tmp_path / "w", n_docs=12, n_queries=3)
    with pytest.raises(ValueError, match="the pointwise prompt asks for; .* 'I am sorry'"):
        synthesise(folder, tmp_path / "out", always("I am sorry"))
    assert len(answers_in(tmp_path / "out")) == synth.CALLS_PER_BATCH
    work = synthesise(folder, tmp_path / "out")
    assert {len(t.pool) for t in work.topics} == {12}


def test_an_endpoint_that_fails_or_is_down_is_one_clear_sentence(tmp_path, monkeypatch):
    folder = write_world(tmp_path / "w", n_docs=6, n_queries=1)
    monkeypatch.setattr(synth.Endpoint.__init__, "__defaults__", (6, 0.001))  # tries, backoff_s
    arguments = flags(**SMALL, data=folder, out=tmp_path / "out")
    with pytest.raises(ValueError, match="http://127.0.0.1:9/v1: no server can be reached there .*refused"):
        command(monkeypatch, *arguments, "--endpoint", "http://127.0.0.1:9/v1")
    with ChatServer(lambda body: 401) as server, pytest.raises(ValueError, match="HTTP 401"):
        command(monkeypatch, *arguments, "--endpoint", server.url)


def test_a_full_disk_is_named_and_what_was_written_stays(tmp_path, monkeypatch):
    folder, connect = write_world(tmp_path / "w", n_docs=60, n_queries=2), sqlite3.connect

    def connect_to_a_small_disk(*arguments, **options):
        database = connect(*arguments, **options)
        database.execute("PRAGMA max_page_count = 8")
        return database

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", connect_to_a_small_disk)
        with pytest.raises(ValueError, match=r"answers.sqlite: database or disk is full"):
            synthesise(folder, tmp_path / "out", pool_random=50)
    assert len(answers_in(tmp_path / "out")) >= synth.CALLS_PER_BATCH
    synthesise(folder, tmp_path / "out", pool_random=50)


def test_an_empty_corpus_and_bad_bytes_are_named(tmp_path):
    folder = write_world(tmp_path / "w")
    good = (folder / "corpus.jsonl").read_bytes()
    for content, message in (
        (b'{"_id": "a", "text": "short"}\n', "no document has 20 characters"),
        (good + b'{"_id": "z", "text": "caf\xe9"}\n', r"corpus.jsonl, line 91: .*utf-8"),
        (good + good[:80].split(b"\n")[0] + b"\n", "appears twice"),
        (good + b"{nonsense\n", "line 91"),
    ):
        (folder / "corpus.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            synthesise(folder, tmp_path / "out")
    (folder / "corpus.jsonl").write_bytes(good)
    (folder / "queries.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="queries.jsonl"):
        synthesise(folder, tmp_path / "out")


def test_documents_that_are_short_or_equal_go_and_what_is_excluded_does_not_come_back(tmp_path):
    texts = {"kept": "the same text of twenty letters", "gold": "the same text of twenty letters", "d": "short"}
    evaluate.write_collection(tmp_path, texts, {"q": "what text"}, {}, {"q": {"gold", "unknown"}})
    work = synth.read_input(synth.Config(data=str(tmp_path)))
    assert work.corpus == {"kept": texts["kept"]} and work.excluded == {"q": {"kept"}} and work.topics
    assert +work.counts == {"documents dropped: too short, or equal": 2}


def test_excluded_documents_are_in_no_pool(tmp_path):
    folder = write_world(tmp_path / "w", n_docs=30, n_queries=3)
    banned = [f"d {i}/x" for i in range(15)]
    evaluate.write_lines(folder / "excluded.tsv", [("query-id", "corpus-id"), *(("q01", doc) for doc in banned)])
    work = synthesise(folder, tmp_path / "out")
    pools = {t.qid: {c.doc for c in t.pool} for t in work.topics}
    assert not pools["q01"] & set(banned) and pools["q00"] & set(banned)


def test_a_document_without_a_score_leaves_its_pool(tmp_path):
    folder = write_world(tmp_path / "w", n_docs=30, n_queries=3)
    teacher, unlucky = synth.simulated_teacher(world()), "d 3/x"

    def backend(chats, *rest):
        return [Completion("no") if unlucky in chat.seed else answer
                for chat, answer in zip(chats, teacher(chats, *rest), strict=True)]  # fmt: skip

    work = synthesise(folder, tmp_path / "out", backend, pool_random=25)
    assert all(len(t.pool) == 29 and unlucky not in {c.doc for c in t.pool} for t in work.topics)
    assert work.counts["documents without a pointwise score"] == len(work.topics) == 3


def test_a_local_model_runs_through_the_same_pipeline_and_is_stopped(tmp_path, monkeypatch):
    """Random weights never answer in form; a document longer than the context is cut, not refused."""
    folder = write_world(tmp_path / "w", n_docs=6, n_queries=1)
    rows = rows_of(folder / "corpus.jsonl")
    rows[0]["text"] *= 300
    write_rows(folder / "corpus.jsonl", rows)
    save_tiny_model(tmp_path / "model", vocab_size=300, context=2048)
    options = SMALL | {"llm": tmp_path / "model", "max_new_tokens": 5}
    with pytest.raises(ValueError, match="does not do what the pointwise prompt asks for"):
        command(monkeypatch, *flags(**options, data=folder, out=tmp_path / "out"))
    assert len(answers_in(tmp_path / "out")) == 24


def test_real_passages_through_a_server(real_data, tmp_path, monkeypatch):
    """The whole pipeline on novel_eval's passages; the server answers by the gold labels."""
    source = real_data / "novel_eval"
    pairs = lambda name: [line.split("\t", 1) for line in (source / name).read_text("utf-8").splitlines()]  # noqa: E731
    texts, queries = dict(pairs("corpus.tsv")), dict(pairs("queries.tsv"))
    qrels = evaluate.read_qrels(source / "qrels.txt")
    evaluate.write_collection(tmp_path / "w", texts, queries, {})
    grade = {(queries[q], texts[doc][:60]): g for q, judged in qrels.items() for doc, g in judged.items()}

    def answer(body):
        asked, _, form = body["messages"][-1]["content"].partition("\n\nReply in exactly this form")
        query = asked.split("\n")[1]
        docs = [part.partition("] ")[2][:60] for part in asked.partition(":\n\n[")[2].split("\n\n[")]
        scores = [5 * grade.get((query, doc), 0) for doc in docs]
        if " > " in form:
            text = " > ".join(f"[{i + 1}]" for i in sorted(range(len(docs)), key=lambda i: -scores[i]))
        else:
            scored = {f"[{i}]": score for i, score in enumerate(scores, 1)}
            text = json.dumps(scored) if '{"[1]"' in form else str(scores[0])
        return f"<reason>known</reason>\n<answer>\n{text}\n</answer>"

    with ChatServer(answer) as server:
        command(monkeypatch, *flags(data=tmp_path / "w", out=tmp_path / "out", llm="gold", endpoint=server.url,
                                     pool_random=15))
    rows = rows_of(tmp_path / "out" / "reranker.train.jsonl")
    assert len(rows) > 25 and any("response" in row for row in rows)
    retriever = rows_of(tmp_path / "out" / "retriever.jsonl")
    assert len(retriever) >= 15  # of 21 queries: one is held out, others lack a positive in the pool
    by_text = {text: doc for doc, text in texts.items()}
    ids = {query: qid for qid, query in queries.items()}
    for row in retriever:
        judged = qrels[ids[row["query"]]]
        assert all(judged.get(by_text[text], 0) >= 1 for text in row["pos"])
        assert all(judged.get(by_text[text], 0) == 0 for text in row["neg"])


# --- Retrieval ------------------------------------------------------------------------------------

CORPUS = {"a": "red apples and green pears", "b/c d": "red wine", "e": "the sea"}
QUERIES = {"q1": "red apples", "q2": "wine"}


@pytest.fixture
def folder(tmp_path):
    """A collection in which one document is excluded for one query."""
    folder = tmp_path / "beir"
    evaluate.write_collection(folder, CORPUS, QUERIES, {"q1": {"a": 1}}, {"q2": {"b/c d"}})
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tiny bidirectional encoder with random weights and with dropout."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                         intermediate_size=64, max_position_embeddings=128)).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_retrieval_ranks_by_bm25_honours_exclusions_and_takes_rewritten_queries(folder, tmp_path, monkeypatch):
    command(monkeypatch, "--retrieve", "--data", folder, "--out", tmp_path / "x.run", "--top-k", 2)
    run = evaluate.read_run(tmp_path / "x.run")
    assert evaluate.sort_run(run["q1"]) == ["a", "b/c d"]
    assert "q2" not in run  # the only document with its word is excluded
    (folder / "queries.long.jsonl").write_text('{"_id": "q1", "text": "sea"}\n')
    command(monkeypatch, "--retrieve", "--data", folder, "--queries", "long", "--out", tmp_path / "y.run")
    run = evaluate.read_run(tmp_path / "y.run")
    assert run.keys() == {"q1"} and evaluate.sort_run(run["q1"])[0] == "e"


def test_documents_without_a_word_of_the_query_are_not_in_the_run(folder, tmp_path, monkeypatch, capsys):
    """Short lists go through the reranker; a query that found nothing is named by a note."""
    options = flags(data=folder, out=tmp_path / "x.run", top_k=3)
    command(monkeypatch, "--retrieve", *options)
    with pytest.raises(ValueError, match="x.run exists"):
        command(monkeypatch, "--retrieve", *options)
    run = evaluate.read_run(tmp_path / "x.run")
    assert {qid: set(docs) for qid, docs in run.items()} == {"q1": {"a", "b/c d"}}
    assert "1 queries find no document" in capsys.readouterr().out
    cfg = grouprank.Config(data=str(folder), run=str(tmp_path / "x.run"))
    queries, _, _ = grouprank.read_candidates(cfg)
    assert [(q.qid, q.ids) for q in queries] == [("q1", ["a", "b/c d"])]


def test_hybrid_scores_are_those_of_the_formula_over_all_documents(bert):
    """Where the lists reach the end of the corpus: S = alpha minmax(BM25) + (1 - alpha) minmax(cos)."""
    encoder = synth.Encoder(bert, synth.Config())
    docs, query = list(CORPUS.values()), QUERIES["q1"]
    vectors, one = encoder.encode(docs, "document"), encoder.encode([query], "query")[0]
    parts = (evaluate.BM25(docs).scores(query), (vectors @ one).tolist())
    lexical, dense = map(evaluate.minmax, parts)
    run = synth.retrieve(CORPUS, QUERIES, {"q2": {"a"}}, 3, encoder, alpha=0.25)
    expected = {doc: 0.25 * x + 0.75 * y for doc, x, y in zip(CORPUS, lexical, dense, strict=True)}
    assert dict(run["q1"]) == pytest.approx(expected, abs=1e-6)
    assert [s for _, s in run["q1"]] == sorted(dict(run["q1"]).values(), reverse=True)
    assert {doc for doc, _ in run["q2"]} == {"b/c d", "e"}


def test_hybrid_scores_ignore_the_exclusions_of_other_queries_and_bm25_finds_by_words(bert):
    """Only the documents that BM25 (with a score above 0) or the encoder puts into its top 2."""
    corpus = {f"d{i}": f"{'red ' * (i % 3 == 0)}thing number {i} of them {'x' * i}" for i in range(20)}
    encoder = synth.Encoder(bert, synth.Config())
    asked = {"q1": "red", "q2": "number", "q3": "nowhere"}
    plain, others = (synth.retrieve(corpus, asked, excluded, 2, encoder)
                     for excluded in ({}, {"q2": {f"d{i}" for i in range(9)}}))  # fmt: skip
    assert plain["q1"] == others["q1"] and plain["q3"] == others["q3"]
    vectors, one = encoder.encode(list(corpus.values()), "document"), encoder.encode(["nowhere"], "query")[0]
    nearest = sorted(corpus, key=lambda doc: -float(vectors[list(corpus).index(doc)] @ one))[:2]
    assert [doc for doc, _ in plain["q3"]] == nearest


def test_a_candidate_with_the_fused_score_0_stays_a_candidate(bert):
    """The worst of both lists has 0 in each; it was found all the same, and has a rank."""
    corpus = {"good": "red red apples", "worst": "some red things of another kind, and so on"}
    encoder = synth.Encoder(bert, synth.Config())
    encoder.encode = lambda texts, kind: torch.tensor([[1.0, 0.0], [0.0, 1.0]][: len(list(texts))])
    run = synth.retrieve(corpus, {"q": "red"}, {}, 2, encoder)
    assert run["q"] == [("good", 1.0), ("worst", 0.0)]
    work = synth.Work(synth.Config(), corpus, topics=[synth.Topic("q", "red")], encoder=encoder)
    synth.fill_pools(work)
    assert [(c.doc, c.rank) for c in work.topics[0].pool] == [("good", 1), ("worst", 2)]


def test_dense_search_is_exact():
    generator = torch.Generator().manual_seed(0)
    queries, docs = torch.randn(70, 16, generator=generator), torch.randn(301, 16, generator=generator)
    assert torch.equal(synth.dense_search(queries, docs, 20), (queries @ docs.T).topk(20, dim=1).indices)
    assert synth.dense_search(queries, docs[:3], 20).shape == (70, 3)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_vectors_do_not_depend_on_padding_and_pool_what_they_say(bert, pooling):
    encoder = synth.Encoder(bert, synth.Config(pooling=pooling, doc_prefix="passage: ", chunk=2))
    both = encoder.encode(["short", "a text that is quite a bit longer", "another one"], "document")
    states = encoder.model(**encoder.tokenizer("passage: short", return_tensors="pt"))[0][0]
    expected = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]
    assert torch.allclose(both[0], expected / expected.norm(), atol=1e-5)
    assert torch.allclose(both.norm(dim=1), torch.ones(3))


def sentence_transformers_files(source, target, pooling="cls", module=None, **files):
    """A copy of an encoder's folder, with what sentence-transformers writes beside a model."""
    shutil.copytree(source, target)
    modules = ["Transformer", "Pooling", "Normalize", *filter(None, [module])]
    content = {"modules": [{"idx": i, "path": f"{i}_{name}" if i else "", "type": f"sentence_transformers.models.{name}"}
                           for i, name in enumerate(modules)], **files}
    for name, value in content.items():
        (target / f"{name}.json").write_text(json.dumps(value))
    modes = {f"pooling_mode_{mode}": mode == pooling for mode in ("cls_token", "mean_tokens", "max_tokens", "lasttoken")}
    (target / "1_Pooling").mkdir()
    (target / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32} | modes))
    return str(target)


def test_an_encoder_follows_the_files_of_sentence_transformers(bert, tmp_path, capsys):
    """A default prompt goes before texts that have none of their own; options overrule the files."""
    prompts = {"prompts": {"query": "ask: ", "passage": "read: "}}
    folder = sentence_transformers_files(bert, tmp_path / "st", "lasttoken", sentence_bert_config={"max_seq_length": 7},
                                         config_sentence_transformers=prompts)  # fmt: skip
    encoder = synth.Encoder(folder, synth.Config())
    assert (encoder.pooling, encoder.max_tokens) == ("last", 7)
    assert "last pooling, before texts {'query': 'ask: ', 'document': 'read: '}" in capsys.readouterr().out
    assert torch.allclose(encoder.encode(["red and no more"], "query"), encoder.encode(["red and"], "query"), atol=1e-6)
    given = synth.Encoder(folder, synth.Config(pooling="mean", query_prefix="", max_doc_tokens=5))
    assert given.pooling == "mean" and given.prefixes["query"] == "" and given.max_tokens == 5
    prompts = {"prompts": {"all": "text: ", "query": "ask: "}, "default_prompt_name": "all"}
    folder = sentence_transformers_files(bert, tmp_path / "other", "cls_token", config_sentence_transformers=prompts)
    assert synth.Encoder(folder, synth.Config()).prefixes == {"query": "ask: ", "document": "text: "}


@pytest.mark.parametrize(("pooling", "module", "message"), [
    ("max_tokens", None, "pooling max_tokens is not implemented"),
    ("cls_token", "Dense", "the module Dense of its modules.json is not implemented"),
])  # fmt: skip
def test_pooling_and_modules_that_are_not_implemented_are_refused(bert, tmp_path, pooling, module, message):
    folder = sentence_transformers_files(bert, tmp_path / "st", pooling, module)
    with pytest.raises(ValueError, match=message):
        synth.Encoder(folder, synth.Config())
    if not module:
        assert synth.Encoder(folder, synth.Config(pooling="mean")).pooling == "mean"


def test_an_encoder_whose_weights_lack_is_refused_not_filled_with_random_ones(bert, tmp_path):
    shutil.copytree(bert, tmp_path / "lacking")
    weights = load_file(tmp_path / "lacking" / "model.safetensors")
    for drop, refused in (("pooler.", False), ("encoder.layer.1.attention.self.query", True)):  # no pooler is used
        kept = {name: weight for name, weight in weights.items() if not name.startswith(drop)}
        save_file(kept, tmp_path / "lacking" / "model.safetensors", metadata={"format": "pt"})
        if refused:
            with pytest.raises(ValueError, match="has no encoder.layer.1.attention.self.query.bias: it would be random"):
                synth.Encoder(str(tmp_path / "lacking"), synth.Config())
        else:
            synth.Encoder(str(tmp_path / "lacking"), synth.Config())


def test_an_encoder_without_its_tokenizers_files_is_refused(bert, tmp_path):
    """transformers makes one up, to which every word is unknown."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(bert) / name, tmp_path)
    with pytest.raises(ValueError, match="the checkpoint has no tokenizer"):
        synth.Encoder(str(tmp_path), synth.Config())


@pytest.mark.parametrize(("break_it", "message"), [
    (lambda st: (st / "1_Pooling" / "config.json").unlink(), "its pooling has no config.json"),
    (lambda st: (st / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true, "include_prompt": false}'),
     "or leaves prefixes out"),
    (lambda st: (st / "modules.json").write_text('[{"idx": 0, "path": ""}]'), "the module None of its modules.json"),
    (lambda st: (st / "config_sentence_transformers.json").write_text('{"similarity_fn_name": "dot"}'),
     "it compares by dot, not by cosine"),
])  # fmt: skip
def test_odd_files_of_sentence_transformers_are_named(bert, tmp_path, break_it, message):
    folder = sentence_transformers_files(bert, tmp_path / "st", "mean_tokens")
    break_it(Path(folder))
    with pytest.raises(ValueError, match=message):
        synth.Encoder(folder, synth.Config())


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "xlm-roberta"])
def test_length_and_case_are_read_whatever_the_file_is_called(bert, tmp_path, name):
    settings = {f"sentence_{name}_config": {"max_seq_length": 7, "do_lower_case": True}}
    encoder = synth.Encoder(sentence_transformers_files(bert, tmp_path / "st", "mean_tokens", **settings), synth.Config())
    assert encoder.max_tokens == 7
    assert torch.equal(encoder.encode(["RED Wine"], "query"), encoder.encode(["red wine"], "query"))


def test_a_document_longer_than_the_positions_of_a_roberta_is_cut_to_them(tmp_path):
    """It counts positions from behind its padding: of 20 two are reserved."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    RobertaModel(RobertaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                               intermediate_size=64, max_position_embeddings=20, pad_token_id=1)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = synth.Encoder(str(tmp_path), synth.Config())
    assert encoder.max_tokens == 18
    assert encoder.encode(["word " * 100], "document").isfinite().all()


def test_bm25_alone_encodes_nothing(folder, bert):
    class Untouchable:
        def encode(self, *_):
            pytest.fail("encoded")

    run = synth.retrieve(CORPUS, QUERIES, {}, 3, Untouchable(), alpha=1.0)
    assert run == synth.retrieve(CORPUS, QUERIES, {}, 3)


# --- The retriever --------------------------------------------------------------------------------

PAIRS = [{"query": f"q{i} {w}", "pos": [f"about {w}"], "neg": [f"about {v}" for v in "xyz"]}
         for i, w in enumerate("abcdefgh")]  # fmt: skip


def test_the_retriever_loss_equals_equations_written_with_loops():
    generator = torch.Generator().manual_seed(1)
    vectors = torch.nn.functional.normalize(torch.randn(3 + 6, 5, generator=generator), dim=1)
    known = torch.zeros(3, 6, dtype=torch.bool)
    known[0, 4] = True  # the positive of query 2 answers query 0 as well
    total = 0.0
    for b in range(3):
        scores = [float(vectors[b] @ vectors[3 + j]) / 0.1 for j in range(6)]
        kept = [math.exp(s) for j, s in enumerate(scores) if not known[b, j]]
        total -= math.log(math.exp(scores[2 * b]) / sum(kept)) / 3
    assert synth.retriever_loss(vectors, 3, 0.1, known).item() == pytest.approx(total, rel=1e-5)


def test_gradient_caching_gives_the_gradient_of_the_whole_batch(bert):
    encoder = synth.Encoder(bert, synth.Config(), dtype=torch.float64)
    grouprank.set_up_training(encoder.model, grouprank.Config(lora_rank=0), encoder.machine)
    encoder.model.train()
    queries, docs = [row["query"] for row in PAIRS], [row["pos"][0] for row in PAIRS]
    loss_of = lambda vectors: synth.retriever_loss(vectors, 8, 0.1, torch.zeros(8, 8, dtype=torch.bool))  # noqa: E731
    whole = loss_of(torch.cat([encoder.vectors(queries, "query"), encoder.vectors(docs, "document")]))
    whole.backward()
    expected = {n: p.grad.clone() for n, p in encoder.model.named_parameters() if p.grad is not None}
    encoder.model.zero_grad()
    chunks = [(part[i : i + 3], kind) for kind, part in (("query", queries), ("document", docs)) for i in range(0, 8, 3)]
    loss = synth.cached_backward(encoder, chunks, loss_of, torch.Tensor.backward)
    assert loss == pytest.approx(whole.item(), rel=1e-6)
    for name, gradient in expected.items():
        found = dict(encoder.model.named_parameters())[name].grad
        assert torch.allclose(found, gradient, rtol=1e-3, atol=1e-6), name


def test_a_known_positive_of_another_row_is_no_negative():
    rows = [{"query": "p", "pos": ["x", "y"], "neg": ["n"]}, {"query": "q", "pos": ["y"], "neg": ["x"]}]
    texts, known = synth.draw_batch(rows, 2, random.Random(0))
    assert texts[3:] == ["y", "x", "x"]
    assert known[0].tolist() == [False, False, False, True, True, True]
    assert not known[1, 3] and known[1, 0] == (texts[0] == "y")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_lowers_the_loss_and_the_folder_opens_again(bert, tmp_path, monkeypatch, capsys, precision):
    path = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    options = {"encoder": bert, "out": tmp_path / "out", "epochs": 12, "batch": 8, "chunk": 5, "lr": 3e-3,
               "contrast_temperature": 0.1, "pooling": "cls", "query_prefix": "query: ",
               "precision": precision}  # fmt: skip
    command(monkeypatch, "--train-retriever", path, *flags(**options))
    said = capsys.readouterr().out
    losses = [float(line.split("loss ")[1].split()[0]) for line in said.splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0] - 0.5
    again = synth.Encoder(str(tmp_path / "out"), synth.Config())
    assert again.pooling == "cls" and again.prefixes == {"query": "query: ", "document": ""}
    with pytest.raises(ValueError, match="exists"):
        command(monkeypatch, "--train-retriever", path, *flags(**options))


def test_wrong_retriever_rows_are_refused(tmp_path, monkeypatch):
    for wrong in ([PAIRS[0] | {"pos": []}], [PAIRS[0], {"query": "q"}], [], [PAIRS[0] | {"neg": "text"}]):
        path = write_rows(tmp_path / "pairs.jsonl", wrong)
        with pytest.raises(ValueError, match='pairs.jsonl: needs rows, each with "query"'):
            command(monkeypatch, "--train-retriever", path, "--encoder", "org/x", "--out", tmp_path / "out")


# --- Demo and options -----------------------------------------------------------------------------


def test_the_demo_shows_that_fused_labels_beat_both_teachers(tmp_path, monkeypatch, capsys):
    """The whole demo with fewer documents and queries."""
    for name, value in bench_synth.SMALL.items():
        monkeypatch.setattr(synth, name, value)
    work, encoder = synth.run_demo({"out": str(tmp_path)})
    said, folder = capsys.readouterr().out, tmp_path / "seed-0"
    quality = bench_synth.label_quality(work, world())
    assert quality["fused"] > max(quality["pointwise"], quality["listwise"])
    found = bench_synth.retrieval_quality(folder, encoder)
    assert found["trained on these labels"] > max(found["BM25"], found["untrained encoder"]) + 0.2
    assert "simulated" in said
    with pytest.raises(ValueError, match="exists"):
        command(monkeypatch, "--demo", "--out", tmp_path)


@pytest.mark.parametrize(("options", "message"), [
    ({"beta": 1.5}, "--beta must be from 0 to 1"),
    ({"group_sizes": "5:x"}, "--group-sizes"), ({"group_sizes": "1:3"}, "sizes from 2"),
    ({"export": "word"}, "--export word"),
    ({"out": ""}, "needs --data, --out and --llm"),
])  # fmt: skip
def test_options_that_cannot_work_are_refused_in_words(tmp_path, monkeypatch, options, message):
    with pytest.raises(ValueError, match=message):
        command(monkeypatch, *flags(**({"data": tmp_path, "out": tmp_path / "o", "llm": "m"} | options)))


def test_every_option_is_read_and_says_where_its_default_comes_from():
    source = Path(synth.__file__).read_text("utf-8")
    passed_on = {*re.findall(r"\w+", inspect.getsource(synth.load_models)), "pointwise_llm", "listwise_llm"}
    for f in dataclasses.fields(synth.Config):
        assert f"cfg.{f.name}" in source or f'"{f.name}"' in source or f.name in passed_on, f.name
        assert f.metadata["source"].startswith(("paper", "ours")) and f.metadata["help"]


def test_help_ends_with_the_commands_and_a_mistyped_option_costs_one_line(capsys):
    with pytest.raises(SystemExit):
        synth.main(["--help"])
    examples = capsys.readouterr().out.split("examples:\n")[1].splitlines()
    assert len(examples) == 5 and all(line in synth.__doc__ for line in examples)
    with pytest.raises(SystemExit):
        synth.main(["--frobnicate"])
    assert len(capsys.readouterr().err.splitlines()) == 2
