"""Data synthesis: equations by hand, steps on a small simulated world, a job that is killed."""

import dataclasses
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ChatServer, byte_tokenizer, save_tiny_model, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertModel

import evaluate
import grouprank
import synth
from grouprank import METHODS, Completion

ROOT = Path(__file__).resolve().parent.parent
OUTPUTS = ("reranker.train.jsonl", "reranker.dev.jsonl", "retriever.jsonl", "dropped.jsonl", "synth.json")


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


SMALL = {"llm": "simulated", "min_doc_chars": 20, "near_duplicate": 0.95, "group_sizes": "5-8",
         "groups_per_query": 4, "positive_level": 3, "negative_level": 1, "dev_share": 0.2,
         "pool_top": 5, "pool_random": 15, "min_agreement": 0.0}  # fmt: skip


def flags(**options):
    """Options as command-line arguments."""
    return [text for name, value in options.items() for text in (grouprank.flag(name), str(value))]


def simulated(body):
    """What the simulated teacher says to a request."""
    return synth.SimulatedTeacher(world()).answer(body["messages"], body["seed"])


def always(text):
    """A back end that gives one answer to everything."""
    return lambda chats, temperature, top_p, progress=None: [Completion(text)] * len(chats)


def synthesise(folder, out, backend=None, **options):
    """Run the pipeline in this process with a back end of our own."""
    cfg = synth.Config(**(SMALL | {"data": str(folder), "out": str(out)} | options))
    backend = backend or synth.SimulatedTeacher(world())

    def teachers(cfg, cache, ledger):
        return dict.fromkeys(("queries", *METHODS), synth.Teacher(cfg.llm, backend, cache, ledger, cfg))

    return synth.synthesise(cfg, teachers)


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


def test_the_authors_rows_hold_the_equal_sum_of_log_ranks(real_data):
    """exp(-S) is a product of two ranks in a pool of 50, and Eq. 2 orders as their sum does."""
    for row in evaluate.read_jsonl(real_data / "diver_sample/groupwise_sft_data_example.jsonl"):
        for recorded in row["final_rank_score"].values():
            product = round(math.exp(-recorded))
            pairs = [(p, product // p) for p in range(1, 51) if product % p == 0 and product // p <= 50]
            assert pairs  # two ranks of at most 50 make it up
            ours = synth.fuse_ranks(*zip(*pairs, strict=True), equal_sum=True)
            assert ours == pytest.approx([recorded] * len(pairs), abs=1e-9)
    p, l = [3, 1, 2, 5, 4], [2, 1, 4, 3, 5]  # noqa: E741
    half, whole = synth.fuse_ranks(p, l, 0.5), synth.fuse_ranks(p, l, equal_sum=True)
    assert whole == pytest.approx([2 * s for s in half])


def test_labels_are_the_pointwise_scores_dealt_out_in_fused_order():
    assert synth.deal_scores([-0.3, -0.1, -0.9, -0.5], [7, 3, 0, 9]) == [7, 9, 0, 3]
    assert synth.deal_scores([-0.1, -0.5, -0.5], [10, 4, 1]) == [10, 2.5, 2.5]


def test_agreement_is_ndcg_of_the_listwise_order_with_pointwise_gains():
    dcg = 4 / math.log2(2) + 0 / math.log2(3) + 8 / math.log2(4)
    ideal = 8 / math.log2(2) + 4 / math.log2(3)
    assert synth.teacher_agreement([8, 4, 0], [3, 1, 2]) == pytest.approx(dcg / ideal)
    assert synth.teacher_agreement([8, 4, 0], [1, 2, 3]) == 1.0


def test_first_stage_fusion_reproduces_pyserinis_files(real_data):
    """Interpolation, and RRF by the rank column (its gaps are gaps); min-max but for constant lists:
    0 here, 1 there."""
    read = lambda name: evaluate.read_run(real_data / f"fusion/simple_trec_run_{name}.txt")  # noqa: E731
    one, two = read("fusion_1"), read("fusion_2")

    def ranking(number, qid):
        lines = (real_data / f"fusion/simple_trec_run_fusion_{number}.txt").read_text().splitlines()
        place = {int(line.split()[3]): line.split()[2] for line in lines if line.split()[0] == qid}
        return [place.get(rank, "nothing") for rank in range(1, max(place, default=0) + 1)]

    for qid, expected in read("interpolation_verify").items():
        assert synth.interpolate(one.get(qid, {}), two.get(qid, {}), 0.4) == pytest.approx(expected)
    for qid, expected in read("rrf_verify").items():
        runs = [ranking(number, qid) for number in (1, 2)]
        fused = synth.reciprocal_rank_fusion(runs, k=60)
        assert {doc: fused[doc] for doc in expected} == pytest.approx(expected)
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


def test_the_authors_two_rows_are_groups_that_can_be_drawn():
    drawn = {tuple(synth.draw_group(50, 10, c, random.Random(s))) for c in (0, 1) for s in range(200)}
    assert tuple(range(0, 50, 5)) in drawn  # documents 1, 6, 11, ... 46 of the first row
    assert tuple(range(10)) in drawn  # documents 1 to 10 of the second


def test_group_sizes_follow_table_7():
    weights = synth.parse_sizes(synth.Config().group_sizes)
    assert weights[10] == 9300 and weights[20] == 8700 and weights[5] == weights[19] == 85
    assert set(weights) == set(range(5, 21))
    rng, labels = random.Random(0), list(range(50))
    sizes = Counter(len(docs) for _ in range(400) for docs, _ in synth.sample_groups(labels, 5, weights, 0.5, rng))
    assert abs(sizes[10] / 2000 - 9300 / 19190) < 0.04 and set(sizes) <= set(range(5, 21))


def test_groups_are_shuffled_differ_and_are_never_flat():
    labels = [0.0] * 30 + [float(i % 7) for i in range(20)]
    groups = synth.sample_groups(labels, 12, {5: 1.0}, 0.5, random.Random(3))
    assert 10 <= len({tuple(sorted(docs)) for docs, _ in groups}) == len(groups)
    assert all(len({labels[i] for i in docs}) > 1 for docs, _ in groups)
    assert any(docs != sorted(docs) for docs, _ in groups)
    assert synth.sample_groups([1.0] * 50, 3, {5: 1.0}, 0.5, random.Random(0)) == []
    assert synth.sample_groups(labels, 2, {60: 1.0}, 0.5, random.Random(0)) == []


def test_positions_carry_no_information_about_labels():
    """Over many groups, each position of the prompt has the same mean label."""
    labels = [10 * 0.9**i for i in range(50)]
    rng = random.Random(0)
    groups = [g for _ in range(300) for g, _ in synth.sample_groups(labels, 4, {10: 1.0}, 0.5, rng)]
    means = np.array([[labels[i] for i in docs] for docs in groups]).mean(axis=0)
    assert means.max() - means.min() < 0.6  # sorted groups: more than 4


def test_the_pool_is_the_top_and_random_deeper_ranks():
    ranked = [f"d{i}" for i in range(1, 301)]
    pool = synth.draw_pool(ranked, 10, 40, 200, random.Random(0))
    numbers = [int(doc[1:]) for doc in pool]
    assert numbers[:10] == list(range(1, 11)) and len(set(numbers)) == 50
    assert numbers == sorted(numbers) and 11 <= numbers[10] and numbers[-1] <= 200


def test_a_pool_that_does_not_fit_the_context_is_ranked_by_windows():
    texts = ["x" * 400] * 50  # 100 tokens each, and 6 for the number
    cfg = synth.Config(max_prompt_tokens=24000)
    cache = synth.AnswerCache(Path(os.devnull))
    teacher = synth.Teacher("m", always(""), cache, synth.Ledger(), cfg)
    assert synth.fitting_window(teacher, "query", texts, cfg) == 50
    small = dataclasses.replace(cfg, max_prompt_tokens=2600)
    prompt = METHODS["listwise"].prompt
    room = 2600 - (len(prompt.system + prompt.user) + len("query")) // 3
    assert 10 < synth.fitting_window(teacher, "query", texts, small) == room // 106 < 50
    assert synth.fitting_window(teacher, "query", texts, dataclasses.replace(cfg, listwise_window=7)) == 7


# --- Queries --------------------------------------------------------------------------------------


def test_near_duplicates_are_those_that_a_full_comparison_finds():
    rng = random.Random(0)
    words = [f"w{rng.randrange(50)}" for _ in range(900)]
    texts = {f"t{i}": " ".join(words[i * 3 : i * 3 + 15]) for i in range(120)}
    texts |= {f"{name}*": text + " extra" for name, text in list(texts.items())[::9]}
    index, kept, n_found = synth.NearDuplicates(0.7), {}, 0
    for name, text in texts.items():
        ours = synth.shingles(text)
        expected = [n for n, theirs in kept.items() if len(ours & theirs) / len(ours | theirs) >= 0.7]
        found = index.find(text)
        assert (found in expected) if expected else found is None
        n_found += bool(expected)
        kept[name] = ours
        index.add(name, text)
    assert n_found > 12


def test_near_duplicates_do_not_depend_on_the_order_of_words():
    assert synth.shingles("sea the") == synth.shingles("The sea?") == {" the ", " sea "}
    index = synth.NearDuplicates(0.5)
    index.add("a", "the sea")
    assert index.find("Sea: the!") == "a" and index.find("the deep sea") == "a"  # 2 of 2, 2 of 4
    assert index.find("the deepest sea") is None and index.find("") is None  # 2 of 7


def test_overlap_counts_different_words_without_stop_words():
    assert synth.word_overlap("why do the red leaves fall", "Red leaves are here") == 2 / 5


def test_a_query_is_read_only_from_the_right_form():
    assert synth.read_query('<reason>r</reason><answer>\n"why is\n it so?"</answer>') == "why is it so?"
    for text in ("why?", "<answer>why?</answer>", "<reason>r</reason><answer> </answer>"):
        assert synth.read_query(text) is None


def test_generated_queries_are_filtered_and_what_was_dropped_is_named(made):
    folder, out, work = made
    corpus = evaluate.read_texts(folder / "corpus.jsonl")
    dropped = Counter(row["reason"] for row in rows_of(out / "dropped.jsonl"))
    assert 5 < len(work.topics) == 40 - sum(dropped.values()) and dropped
    for topic in work.topics:
        assert topic.source in corpus and synth.word_overlap(topic.text, corpus[topic.source]) == 0
        best = sorted(topic.fused, reverse=True)[2]  # round trip: fused rank 3 or better
        assert topic.fused[topic.pool.index(topic.source)] >= best
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
    write_world(tmp_path / "w")
    write_rows(tmp_path / "test.jsonl", [{"_id": "t1", "text": "what do heart and lung have in common"}])
    cfg = synth.Config(near_duplicate=0.7, exclude_queries=str(tmp_path / "test.jsonl"))
    corpus = {"d": "cardiac enamel wolf tide nova"}
    work = synth.Work(cfg, corpus, {}, {})
    excluded, kept = synth.read_excluded_queries(cfg), synth.NearDuplicates(0.7)
    kept.add("g", "why do tides rise twice a day")
    fault = lambda text: synth.query_fault(synth.Topic("x", text, "d"), work, kept, excluded)  # noqa: E731
    assert fault("enamel wolf cardiac?") == "shares its words with the source"
    assert fault("Why do tides rise, twice a day?") == "near-duplicate"
    assert fault("what do heart and lung have in  common?") == "nearly an excluded query"
    assert fault("why so") == "length" and fault("") == "no answer in the right form"
    assert fault("why does the sea come and go") == ""


def test_given_queries_that_leak_stop_the_run_and_are_named(tmp_path):
    folder = write_world(tmp_path / "w")
    text = evaluate.read_texts(folder / "queries.jsonl")["q03"]
    write_rows(tmp_path / "test.jsonl", [{"_id": "secret", "text": text + "?"}])
    with pytest.raises(ValueError, match="'q03' is nearly the excluded 'secret'"):
        synthesise(folder, tmp_path / "out", exclude_queries=str(tmp_path / "test.jsonl"))


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
            label_of = dict(zip(t.pool, t.labels, strict=True))
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
        assert reward.status == "ok" and reward.ndcg >= 0.8


def test_every_row_says_where_it_comes_from(made):
    for row in rows_of(made[1] / "reranker.train.jsonl"):
        source, n = row["source"], len(row["docs"])
        assert source["models"]["pointwise"] == "simulated" and source["version"] == grouprank.VERSION
        assert source["prompt_hashes"]["listwise"] == METHODS["listwise"].prompt.hash
        scores = [synth.read_scores("pointwise", text, 1) for text in source["raw"]["pointwise"]]
        assert scores == [[score] for score in source["pointwise_scores"]] and len(source["retrieval_ranks"]) == n
        (order,) = source["raw"]["listwise"]
        assert sorted(synth.read_scores("listwise", order, 20)) == list(range(1, 21))
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
    texts = {row["docid"]: row["text"] for row in rows_of(export / "tevatron.corpus.jsonl")}
    for row in rows_of(export / "tevatron.train.jsonl"):
        assert row["query_id"] and row["query_text"] and row["positive_document_ids"]
        assert {*row["positive_document_ids"], *row["negative_document_ids"]} <= texts.keys()
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
    assert outputs(out) == before


def test_a_killed_job_goes_on_and_ends_with_the_same_bytes(tmp_path, monkeypatch):
    """SIGKILL in the middle; no answer that was written is asked for again."""
    folder = write_world(tmp_path / "w", n_docs=40, n_queries=4)
    options = SMALL | {"llm": "m", "data": folder, "concurrency": 4, "group_sizes": "5", "retries": 8}
    with ChatServer(simulated, delay_s=0.02) as server:
        arguments, parts = flags(**options, endpoint=server.url), tmp_path / "parts"
        command(monkeypatch, *arguments, "--out", tmp_path / "whole")
        n_whole, answers = len(server.bodies), parts / "answers.jsonl"
        server.bodies.clear()
        job = subprocess.Popen([sys.executable, "synth.py", *arguments, "--out", parts], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        while job.poll() is None and (not answers.exists() or answers.read_bytes().count(b"\n") < 40):
            time.sleep(0.01)
        job.send_signal(signal.SIGKILL)
        job.wait()
        assert not (parts / "retriever.jsonl").exists()
        command(monkeypatch, *arguments, "--out", parts)
    assert outputs(parts) == outputs(tmp_path / "whole")
    assert 0 <= len(server.bodies) - n_whole <= 4  # again only what was in flight when it was killed


def test_the_url_of_a_teacher_may_change_and_its_name_may_not(tmp_path):
    folder = write_world(tmp_path / "w", n_docs=30, n_queries=3)
    synthesise(folder, tmp_path / "out", pointwise_llm="p@http://one/v1")
    before = outputs(tmp_path / "out")
    synthesise(folder, tmp_path / "out", pointwise_llm="p@http://two/v1")
    assert outputs(tmp_path / "out") == before
    with pytest.raises(ValueError, match="made with --pointwise-llm p, not q"):
        synthesise(folder, tmp_path / "out", pointwise_llm="q@http://two/v1")


def test_a_second_process_in_one_folder_is_refused(tmp_path):
    """Before it changes a file there, even with --overwrite; afterwards it may go on."""
    folder, out = write_world(tmp_path / "w", n_docs=30, n_queries=3), tmp_path / "out"
    synthesise(folder, out)
    before = outputs(out)
    with grouprank.open_alone(out / "answers.jsonl"), pytest.raises(ValueError, match="another process works on"):
        synthesise(folder, out, beta=0.9, overwrite=True)
    assert outputs(out) == before
    synthesise(folder, out, beta=0.9, overwrite=True)
    assert outputs(out) != before


def test_a_corrupt_line_is_named_and_its_answer_asked_again(tmp_path, capsys):
    folder = write_world(tmp_path / "w", n_docs=30, n_queries=3)
    synthesise(folder, tmp_path / "out")
    before = outputs(tmp_path / "out")
    path = tmp_path / "out" / "answers.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], b'{"key": "half\n', b"\xff\xfe\n", b"[1]\n", *lines[5:-1], lines[-1][:40]]))
    asked, teacher = [], synth.SimulatedTeacher(world())

    def counting(chats, *rest):
        asked.extend(chats)
        return teacher(chats, *rest)

    capsys.readouterr()
    synthesise(folder, tmp_path / "out", counting)
    out, err = capsys.readouterr()
    assert "4 corrupt lines" in out
    assert [f"line {n} is corrupt" in err for n in (5, 6, 7, len(lines) + 2)] == [True] * 4
    assert len(asked) == 2 and outputs(tmp_path / "out") == before


def test_failures_are_logged_and_never_cached(tmp_path):
    folder = write_world(tmp_path / "w", n_docs=30, n_queries=2)
    teacher, failed = synth.SimulatedTeacher(world()), []

    def sometimes(chats, temperature, top_p, progress=None):
        answers = teacher(chats, temperature, top_p)
        for i in range(0, len(chats), 5):
            failed.append(chats[i].seed)
            answers[i] = Completion("", error="HTTP 500: boom")
        return answers

    synthesise(folder, tmp_path / "out", sometimes, retries=6)
    cached = {json.dumps(row["seed"]) for row in rows_of(tmp_path / "out" / "answers.jsonl")}
    logged = [row for row in rows_of(tmp_path / "out" / "failures.jsonl") if row["error"] != "unusable"]
    assert [row["seed"] for row in logged] == [list(seed) for seed in failed] and failed
    assert not cached & {json.dumps(seed) for seed in failed}


def test_a_finished_job_with_failed_tries_is_not_asked_again(tmp_path):
    """A retry that was usable counts, although the try before it was never answered."""
    folder = write_world(tmp_path / "w", n_docs=30, n_queries=2)
    teacher, calls = synth.SimulatedTeacher(world()), []

    def flaky(chats, temperature, top_p, progress=None):
        answers = teacher(chats, temperature, top_p)
        for i, chat in enumerate(chats):
            calls.append(chat.seed)
            if chat.seed[-1] == 0 and zlib.crc32(repr(chat.seed).encode()) % 4 == 0:
                answers[i] = Completion("", error="HTTP 500: boom")
        return answers

    synthesise(folder, tmp_path / "out", flaky, retries=6)
    before, n_calls = outputs(tmp_path / "out"), len(calls)
    synthesise(folder, tmp_path / "out", flaky, retries=6)
    assert len(calls) == n_calls and outputs(tmp_path / "out") == before


def test_a_job_goes_on_once_its_model_answers_in_the_right_form(tmp_path):
    folder = write_world(tmp_path / "w", n_docs=30, n_queries=2)
    with pytest.raises(ValueError, match="0 of 20 answers were usable"):
        synthesise(folder, tmp_path / "out", always("I am sorry"))
    assert synthesise(folder, tmp_path / "out").topics


def test_with_other_settings_old_outputs_go_at_once_and_answers_stay(tmp_path):
    folder = write_world(tmp_path / "w", n_docs=30, n_queries=2)
    synthesise(folder, tmp_path / "out", export=("trl",))
    n_answers = len(rows_of(tmp_path / "out" / "answers.jsonl"))
    with pytest.raises(ValueError, match="--seed 0, not 5"):
        synthesise(folder, tmp_path / "out", seed=5)
    with pytest.raises(ValueError, match="--max-calls"):
        synthesise(folder, tmp_path / "out", seed=5, overwrite=True, max_calls=3)
    left = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert left <= {"answers.jsonl", "failures.jsonl", "synth.json"}
    assert len(rows_of(tmp_path / "out" / "answers.jsonl")) >= n_answers


def test_changed_data_in_the_same_place_are_refused(tmp_path):
    folder = write_world(tmp_path / "w", n_docs=30, n_queries=2)
    synthesise(folder, tmp_path / "out")
    write_world(folder, n_docs=30, n_queries=2, seed=1)
    with pytest.raises(ValueError, match="made with other data"):
        synthesise(folder, tmp_path / "out")


def test_the_retriever_never_replaces_the_folder_of_its_data(tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    write_rows(data / "retriever.jsonl", [{"query": "a", "pos": ["b"], "neg": ["c"]}])
    for out in (data, tmp_path):
        with pytest.raises(ValueError, match="take another --out"):
            command(monkeypatch, "--train-retriever", data / "retriever.jsonl", "--encoder", "org/x",
                    "--out", out, "--overwrite")
    assert (data / "retriever.jsonl").exists()


@pytest.mark.parametrize(("option", "limit"), [("max_calls", 25), ("max_tokens", 200)])
def test_budgets_stop_the_job_and_a_larger_one_goes_on(tmp_path, option, limit):
    folder = write_world(tmp_path / "w", n_docs=30, n_queries=2)
    with pytest.raises(ValueError, match=grouprank.flag(option)):
        synthesise(folder, tmp_path / "out", **{option: limit})
    paid = len(rows_of(tmp_path / "out" / "answers.jsonl"))
    assert paid == 25 if option == "max_calls" else 0 < paid <= 64
    work = synthesise(folder, tmp_path / "out", **{option: 10**6})
    synthesise(folder, tmp_path / "whole")
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole") and work.topics


def test_a_dry_run_counts_the_calls_of_the_job_and_writes_nothing(tmp_path, monkeypatch, capsys):
    """It does not load an encoder either, and leaves a file of answers as it is, its cut last line included."""
    folder, out = write_world(tmp_path / "w", n_docs=40, n_queries=5), tmp_path / "out"
    arguments = flags(**SMALL, data=folder, out=out, sft_share=1.0, encoder="nobody/nothing")
    command(monkeypatch, *arguments, "--dry-run")
    said = capsys.readouterr().out
    # 5 queries x 20 documents, 5 lists, 4 queries (one is held out) x 4 groups
    assert f"{5 * 20 + 5 + 4 * 4} calls without retries" in said and not out.exists()
    out.mkdir()
    (out / "answers.jsonl").write_text('{"key": "ha')
    (out / "answers.jsonl").chmod(0o444)
    command(monkeypatch, *arguments, "--dry-run")
    assert [path.name for path in out.iterdir()] == ["answers.jsonl"]
    assert (out / "answers.jsonl").read_text() == '{"key": "ha'


def test_ctrl_c_keeps_what_is_on_its_way_and_says_how_to_go_on(tmp_path, capsys):
    folder, out = write_world(tmp_path / "w", n_docs=30, n_queries=4), tmp_path / "out"
    teacher, batches = synth.SimulatedTeacher(world()), []

    def interrupted(chats, *rest):
        batches.append(chats)
        if len(batches) == 2:
            os.kill(os.getpid(), signal.SIGINT)  # reaches the main thread, which waits
            time.sleep(0.2)
        return teacher(chats, *rest)

    with pytest.raises(KeyboardInterrupt):
        synthesise(folder, out, interrupted)
    assert f"stopped; all answers so far are in {out / 'answers.jsonl'}: the same command goes on" in (
        capsys.readouterr().err)
    assert len(rows_of(out / "answers.jsonl")) == 2 * synth.CALLS_PER_BATCH  # of 80
    synthesise(folder, out)
    synthesise(folder, tmp_path / "whole")
    assert outputs(out) == outputs(tmp_path / "whole")


def test_other_settings_do_not_replace_outputs_unless_told(tmp_path):
    folder = write_world(tmp_path / "w", n_docs=30, n_queries=3)
    synthesise(folder, tmp_path / "out")
    before = outputs(tmp_path / "out")
    with pytest.raises(ValueError, match="made with --beta 0.5, not 0.9"):
        synthesise(folder, tmp_path / "out", beta=0.9)
    assert outputs(tmp_path / "out") == before
    synthesise(folder, tmp_path / "out", always("no more answers are needed"), beta=0.9, sft_share=0.0, overwrite=True)
    assert outputs(tmp_path / "out") != before
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "retriever.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="exists"):
        synthesise(folder, tmp_path / "foreign")


# --- Bad input ------------------------------------------------------------------------------------


def test_an_llm_that_never_parses_stops_the_run_with_three_of_its_answers(tmp_path):
    folder = write_world(tmp_path / "w")
    with pytest.raises(ValueError, match=r"0 of 20 answers were usable.*\(1\) 'I am sorry'.*\(3\) 'I am sorry'"):
        synthesise(folder, tmp_path / "out", always("I am sorry"))
    assert len(rows_of(tmp_path / "out" / "answers.jsonl")) <= synth.CALLS_PER_BATCH
    small = write_world(tmp_path / "small", n_docs=6, n_queries=1)
    with pytest.raises(ValueError, match="does not answer in the form that the pointwise prompt asks for"):
        synthesise(small, tmp_path / "out2", always("I am sorry"), retries=0)


def test_an_endpoint_that_fails_or_is_down_is_one_clear_sentence(tmp_path, monkeypatch):
    folder = write_world(tmp_path / "w", n_docs=30, n_queries=3)
    monkeypatch.setitem(synth.Endpoint.__init__.__kwdefaults__, "backoff_s", 0.001)
    arguments = flags(**SMALL, data=folder, out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"in a row were not answered; the last one: .*refused"):
        command(monkeypatch, *arguments, "--endpoint", "http://127.0.0.1:9/v1")
    with ChatServer(lambda body: 401) as server, pytest.raises(ValueError, match="HTTP 401"):
        command(monkeypatch, *arguments, "--endpoint", server.url)
    small = write_world(tmp_path / "small", n_docs=6, n_queries=1)
    arguments = flags(**SMALL, data=small, out=tmp_path / "out2")
    with pytest.raises(ValueError, match="none of 6 calls was answered"):
        command(monkeypatch, *arguments, "--endpoint", "http://127.0.0.1:9/v1")


def test_a_full_disk_is_named_and_what_was_written_stays(tmp_path, monkeypatch):
    folder = write_world(tmp_path / "w", n_docs=30, n_queries=2)
    teacher = synth.SimulatedTeacher(world())

    def backend(chats, *rest):
        if len(caches[0].places) == 32:  # the disk is full after the first batch
            caches[0].file = open("/dev/full", "wb", buffering=0)
        return teacher(chats, *rest)

    caches, init = [], synth.AnswerCache.__init__

    def remember(self, path, **options):
        init(self, path, **options)
        caches.append(self)

    monkeypatch.setattr(synth.AnswerCache, "__init__", remember)
    with pytest.raises(OSError, match="No space left") as error:
        synthesise(folder, tmp_path / "out", backend)
    assert error.value.filename.endswith("answers.jsonl")
    assert len(rows_of(tmp_path / "out" / "answers.jsonl")) == 32


def test_an_empty_corpus_and_bad_bytes_are_named(tmp_path):
    folder = write_world(tmp_path / "w")
    good = (folder / "corpus.jsonl").read_bytes()
    for content, message in (
        (b"", "no document of at least 20 characters"),
        (good + b'{"_id": "z", "text": "caf\xe9"}\n', r"corpus.jsonl, line 91: .*utf-8"),
        (good + good[:80].split(b"\n")[0] + b"\n", "appears twice"),
        (good + b'{"_id": 7, "text": "x"}\n', "document 91: needs the keys"),
        (good + b"{nonsense\n", "line 91"),
    ):
        (folder / "corpus.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            synthesise(folder, tmp_path / "out")


def test_short_and_repeated_documents_are_dropped_and_counted(tmp_path):
    write_rows(tmp_path / "corpus.jsonl", [
        {"_id": "a", "title": "", "text": "the same text"}, {"_id": "b", "text": "the same text "},
        {"_id": "c", "title": "A title", "text": "and a text"}, {"_id": "d", "text": "short"},
    ])  # fmt: skip
    corpus, twins, counts = synth.read_corpus(tmp_path / "corpus.jsonl", 10)
    assert twins == {"b": "a"}
    assert corpus == {"a": "the same text", "c": "A title\nand a text"}
    assert counts == {"documents read": 4, "documents dropped: exact duplicate": 1,
                      "documents dropped: too short": 1}  # fmt: skip


def test_an_excluded_document_does_not_come_back_as_its_twin(tmp_path):
    write_rows(tmp_path / "corpus.jsonl", [
        {"_id": "kept", "text": "the same text"}, {"_id": "gold", "text": "the same text"}])
    write_rows(tmp_path / "queries.jsonl", [{"_id": "q", "text": "what text"}])
    (tmp_path / "excluded.tsv").write_text("query-id\tcorpus-id\nq\tgold\n", encoding="utf-8")
    _, _, excluded, _ = synth.read_input(synth.Config(data=str(tmp_path), min_doc_chars=5))
    assert excluded == {"q": {"gold", "kept"}}


def test_near_duplicate_queries_are_held_out_together():
    texts = [f"{word} leaves turn in the autumn of the year" for word in ("why do the", "how do")]
    topics = [synth.Topic(f"{i}{letter}", f"{text} {i * 7919} {i * 104729}{space}")
              for i in range(12) for letter, space, text in (("a", "", texts[0]), ("b", " ", texts[0]))]
    for seed in range(5):
        work = synth.Work(synth.Config(dev_share=0.3, seed=seed, near_duplicate=0.99), {}, {}, {})
        held_out = synth.hold_out(work, topics)
        assert 7 <= len(held_out) <= 8
        assert {qid[:-1] + "a" for qid in held_out} == {qid[:-1] + "a" for qid in held_out if qid[-1] == "b"}


def test_queries_of_the_same_words_are_held_out_together():
    topics = [synth.Topic(f"{i}{j}", " ".join(words)) for i in range(12)
              for j, words in enumerate(itertools.permutations((f"heart{i * 7919}", f"lung{i * 104729}", "bone")))]
    work = synth.Work(synth.Config(dev_share=0.25), {}, {}, {})
    held_out = Counter(qid[:-1] for qid in synth.hold_out(work, topics))
    assert set(held_out.values()) == {6} and len(held_out) == 3


def test_pools_shrink_to_a_small_corpus_and_say_so(tmp_path, capsys):
    folder = write_world(tmp_path / "w", n_docs=12, n_queries=3)
    work = synthesise(folder, tmp_path / "out")
    assert "the corpus has 12 documents" in capsys.readouterr().out
    assert {len(t.pool) for t in work.topics} == {12}


def test_excluded_documents_are_in_no_pool(tmp_path):
    folder = write_world(tmp_path / "w", n_docs=30, n_queries=3)
    banned = [f"d {i}/x" for i in range(15)]
    evaluate.write_lines(folder / "excluded.tsv", [("query-id", "corpus-id"), *(("q01", doc) for doc in banned)])
    work = synthesise(folder, tmp_path / "out")
    pools = {t.qid: set(t.pool) for t in work.topics}
    assert not pools["q01"] & set(banned) and pools["q00"] & set(banned)


def test_a_document_without_a_score_leaves_its_pool(tmp_path):
    folder = write_world(tmp_path / "w", n_docs=30, n_queries=3)
    teacher, unlucky = synth.SimulatedTeacher(world()), "d 3/x"

    def backend(chats, *rest):
        return [Completion("no") if unlucky in chat.seed else answer
                for chat, answer in zip(chats, teacher(chats, *rest), strict=True)]  # fmt: skip

    work = synthesise(folder, tmp_path / "out", backend, pool_random=25)
    assert all(unlucky not in t.pool and len(t.pool) == 29 for t in work.topics)
    assert work.counts["documents without a pointwise score"] == len(work.topics) == 3


@pytest.mark.parametrize("window", [0, 6])
def test_listwise_windows_carry_the_best_to_the_top(tmp_path, window):
    """With a flawless listwise teacher, windows put the best documents first."""
    folder = write_world(tmp_path / "w", n_docs=40, n_queries=6)
    flawless = synth.SimulatedTeacher(grouprank.DemoWorld(0, 0.0, recall=1.0))
    flawless.judge = lambda query, docs, form, rng: _truth(flawless, query, docs, form)
    work = synthesise(folder, tmp_path / "out", flawless, listwise_window=window)
    for t in work.topics:
        best = [score for _, score in sorted(zip(t.listwise, t.pointwise, strict=True))]
        assert best[:3] == sorted(t.pointwise, reverse=True)[:3]
        assert sorted(t.listwise) == list(range(1, len(t.pool) + 1))
    n_windows = 1 + math.ceil((20 - window) / 3) if window else 1  # of 6 of the 20, by 3
    assert all(len(t.keys["listwise"]) == n_windows for t in work.topics)


def _truth(teacher, query, docs, form):
    """A teacher without errors."""
    scores = [synth.true_score(teacher.world, query, words) for words in docs]
    answer = str(scores[0])
    if " > " in form:
        answer = " > ".join(f"[{i + 1}]" for i in sorted(range(len(docs)), key=lambda i: -scores[i]))
    elif '{"[1]"' in form:
        answer = json.dumps({f"[{i}]": score for i, score in enumerate(scores, 1)})
    return f"<reason></reason><answer>{answer}</answer>"


def test_a_local_model_runs_through_the_same_pipeline_and_is_stopped(tmp_path, monkeypatch):
    """Random weights never answer in form; a document longer than the context is cut, not refused."""
    folder = write_world(tmp_path / "w", n_docs=6, n_queries=1)
    rows = rows_of(folder / "corpus.jsonl")
    rows[0]["text"] *= 300
    write_rows(folder / "corpus.jsonl", rows)
    save_tiny_model(tmp_path / "model", vocab_size=300, context=2048)
    options = SMALL | {"llm": tmp_path / "model", "max_new_tokens": 5, "retries": 0}
    with pytest.raises(ValueError, match="does not answer in the form"):
        command(monkeypatch, *flags(**options, data=folder, out=tmp_path / "out"))
    assert len(rows_of(tmp_path / "out" / "answers.jsonl")) == 6


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
        docs = [part.partition("]")[2][:60] for part in asked.partition(":\n\n[")[2].split("\n\n[")]
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


def test_retrieval_ranks_by_bm25_and_honours_exclusions(folder, tmp_path, monkeypatch):
    command(monkeypatch, "--retrieve", "--data", folder, "--out", tmp_path / "x.run", "--top-k", 2)
    run = evaluate.read_run(tmp_path / "x.run")
    assert evaluate.sort_run(run["q1"]) == ["a", "b/c d"]
    assert "q2" not in run  # the only document with its word is excluded


def test_documents_without_a_word_of_the_query_are_not_in_the_run(folder, tmp_path, monkeypatch, capsys):
    """Short lists go through the reranker; a query that found nothing is named by a note."""
    options = flags(data=folder, out=tmp_path / "x.run", top_k=3)
    command(monkeypatch, "--retrieve", *options)
    run = evaluate.read_run(tmp_path / "x.run")
    assert {qid: set(docs) for qid, docs in run.items()} == {"q1": {"a", "b/c d"}}
    assert "note: 1 of 2 queries find no document" in capsys.readouterr().out
    cfg = grouprank.Config(data=str(folder), run=str(tmp_path / "x.run"))
    queries, _, _ = grouprank.read_candidates(cfg)
    assert [(q.qid, q.ids) for q in queries] == [("q1", ["a", "b/c d"])]


def test_rewritten_queries_are_used_when_named(folder, tmp_path, monkeypatch):
    (folder / "queries.long.jsonl").write_text('{"_id": "q1", "text": "sea"}\n')
    command(
        monkeypatch, "--retrieve", "--data", folder, "--queries", "long", "--out", tmp_path / "x.run"
    )
    run = evaluate.read_run(tmp_path / "x.run")
    assert run.keys() == {"q1"} and evaluate.sort_run(run["q1"])[0] == "e"


def test_an_existing_run_is_not_overwritten(folder, tmp_path, monkeypatch):
    (tmp_path / "x.run").write_text("old")
    with pytest.raises(ValueError, match="exists"):
        command(monkeypatch, "--retrieve", "--data", folder, "--out", tmp_path / "x.run")
    assert (tmp_path / "x.run").read_text() == "old"


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
    ranks = [[doc for doc, _ in synth.retrieve(CORPUS, QUERIES, {}, 3, encoder, alpha=a)["q1"]] for a in (1.0, 0.0)]
    fused = dict(synth.retrieve(CORPUS, QUERIES, {}, 3, encoder, fusion="rrf")["q1"])
    assert fused["a"] == pytest.approx(1 / 61 + 1 / (61 + ranks[1].index("a"))) and ranks[0][0] == "a"


@pytest.mark.parametrize("fusion", ["minmax", "rrf"])
def test_hybrid_scores_ignore_the_exclusions_of_other_queries_and_bm25_finds_by_words(bert, fusion):
    """Only the documents that BM25 (with a score above 0) or the encoder puts into its top 2."""
    corpus = {f"d{i}": f"{'red ' * (i % 3 == 0)}thing number {i} of them {'x' * i}" for i in range(20)}
    encoder = synth.Encoder(bert, synth.Config())
    asked = {"q1": "red", "q2": "number", "q3": "nowhere"}
    plain, others = (synth.retrieve(corpus, asked, excluded, 2, encoder, fusion=fusion)
                     for excluded in ({}, {"q2": {f"d{i}" for i in range(9)}}))  # fmt: skip
    assert plain["q1"] == others["q1"] and plain["q3"] == others["q3"]
    vectors, one = encoder.encode(corpus.values(), "document"), encoder.encode(["nowhere"], "query")[0]
    nearest = sorted(corpus, key=lambda doc: -float(vectors[list(corpus).index(doc)] @ one))[:2]
    assert [doc for doc, _ in plain["q3"]] == nearest


def test_a_candidate_with_the_fused_score_0_stays_a_candidate(bert):
    """The worst of both lists has 0 in each; it was found all the same, and has a rank."""
    corpus = {"good": "red red apples", "worst": "some red things of another kind, and so on"}
    encoder = synth.Encoder(bert, synth.Config(query_prefix=""))
    encoder.encode = lambda texts, kind: torch.tensor([[1.0, 0.0], [0.0, 1.0]][: len(list(texts))])
    run = synth.retrieve(corpus, {"q": "red"}, {}, 2, encoder)
    assert run["q"] == [("good", 1.0), ("worst", 0.0)]
    work, topic = synth.Work(synth.Config(), corpus, {}, {}), synth.Topic("q", "red")
    synth.fill_pools(work, [topic], encoder)
    assert topic.pool == ["good", "worst"] and topic.ranks == [1, 2]


def test_dense_search_in_blocks_is_exact():
    generator = torch.Generator().manual_seed(0)
    queries, docs = torch.randn(7, 16, generator=generator), torch.randn(301, 16, generator=generator)
    expected, order = (queries @ docs.T).topk(20, dim=1)
    for block in (1, 50, 1000):
        numbers, scores = synth.dense_search(queries, docs, 20, block=block)
        assert torch.equal(numbers, order) and torch.allclose(scores, expected)
    assert synth.dense_search(queries, docs[:3], 20)[0].shape == (7, 3)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_vectors_do_not_depend_on_padding_and_pool_what_they_say(bert, pooling):
    encoder = synth.Encoder(bert, synth.Config(pooling=pooling, doc_prefix="passage: ", chunk=2))
    texts = ["short", "a text that is quite a bit longer than the others", "another one"]
    both = encoder.encode(texts, "document")
    states = encoder.model(**encoder.tokenizer("passage: short", return_tensors="pt"))[0][0]
    expected = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]
    assert torch.allclose(both[0], expected / expected.norm(), atol=1e-5)
    assert torch.allclose(both.norm(dim=1), torch.ones(3))
    decoder_like = encoder.encode(["short"], "query")[0]  # no prefix here
    assert not torch.allclose(decoder_like, both[0], atol=1e-3)


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
    folder = sentence_transformers_files(
        bert, tmp_path / "st", "lasttoken", sentence_bert_config={"max_seq_length": 7},
        config_sentence_transformers={"prompts": {"query": "ask: ", "passage": "read: "}})
    encoder = synth.Encoder(folder, synth.Config())
    assert encoder.pooling == "last" and encoder.prefixes == {"query": "ask: ", "document": "read: "}
    assert encoder.max_tokens == 7 and not capsys.readouterr().out
    assert torch.allclose(encoder.encode(["red and no more"], "query"), encoder.encode(["red and"], "query"), atol=1e-6)
    given = synth.Encoder(folder, synth.Config(pooling="mean", query_prefix="", max_doc_tokens=5))
    assert given.pooling == "mean" and given.prefixes["query"] == "" and given.max_tokens == 5


def test_the_default_prompt_goes_before_texts_that_have_none_of_their_own(bert, tmp_path):
    prompts = {"prompts": {"all": "text: ", "query": "ask: "}, "default_prompt_name": "all"}
    folder = sentence_transformers_files(bert, tmp_path / "st", "cls_token", config_sentence_transformers=prompts)
    assert synth.Encoder(folder, synth.Config()).prefixes == {"query": "ask: ", "document": "text: "}


def test_what_no_file_says_of_an_encoder_is_printed(bert, tmp_path, capsys):
    assert synth.Encoder(bert, synth.Config()).pooling == "mean"
    assert "names its pooling, query prefix, document prefix: mean pooling, '' before queries" in capsys.readouterr().out
    synth.Encoder(sentence_transformers_files(bert, tmp_path / "st", "cls_token"), synth.Config())
    assert "names its query prefix, document prefix: cls pooling" in capsys.readouterr().out


@pytest.mark.parametrize(("pooling", "module", "message"), [
    ("max_tokens", None, "its pooling is max_tokens, which is not implemented"),
    ("cls_token", "Dense", "the module Dense, which is not implemented"),
])  # fmt: skip
def test_pooling_and_modules_that_are_not_implemented_are_refused(bert, tmp_path, pooling, module, message):
    folder = sentence_transformers_files(bert, tmp_path / "st", pooling, module)
    with pytest.raises(ValueError, match=message):
        synth.Encoder(folder, synth.Config())
    if not module:
        assert synth.Encoder(folder, synth.Config(pooling="mean")).pooling == "mean"


def test_bm25_equals_bm25s_on_real_passages(real_data):
    bm25s = pytest.importorskip("bm25s")
    read = lambda name: [line.split("\t", 1)[1] for line in (real_data / name).read_text("utf-8").splitlines()]  # noqa: E731
    texts, queries = read("novel_eval/corpus.tsv"), read("novel_eval/queries.tsv")
    split = lambda t: [w for w in evaluate.WORD.findall(t.lower()) if w not in evaluate.STOP_WORDS.split()]  # noqa: E731
    peer, index = bm25s.BM25(method="lucene", k1=0.9, b=0.4), evaluate.BM25(texts)
    peer.index([split(text) for text in texts], show_progress=False)
    for query in queries:
        known = [word for word in split(query) if word in peer.vocab_dict]
        assert np.abs(index.scores(query) - peer.get_scores(known)).max() < 1e-5


# --- The retriever --------------------------------------------------------------------------------

PAIRS = [{"query": f"q{i} {w}", "pos": [f"about {w}"], "neg": [f"about {v}" for v in "xyz"],
          "pos_scores": [9], "neg_scores": [2, 1, 0]} for i, w in enumerate("abcdefgh")]  # fmt: skip


def test_the_retriever_loss_equals_equations_written_with_loops():
    generator = torch.Generator().manual_seed(1)
    vectors = torch.nn.functional.normalize(torch.randn(3 + 6, 5, generator=generator), dim=1)
    known = torch.zeros(3, 6, dtype=torch.bool)
    known[0, 4] = True  # the positive of query 2 answers query 0 as well
    labels = torch.tensor([[9.0, 1.0], [6.0, 0.0], [10.0, 2.0]])
    total = 0.0
    for b in range(3):
        scores = [float(vectors[b] @ vectors[3 + j]) / 0.1 for j in range(6)]
        kept = [math.exp(s) for j, s in enumerate(scores) if not known[b, j]]
        total -= math.log(math.exp(scores[2 * b]) / sum(kept)) / 3
        gold = [math.exp(x / 2) for x in labels[b]]
        own = [math.exp(s) for s in scores[2 * b : 2 * b + 2]]
        for g, o in zip(gold, own, strict=True):
            total += 0.7 * g / sum(gold) * math.log(g / sum(gold) / (o / sum(own))) / 3
    loss = synth.retriever_loss(vectors, 3, 0.1, known, labels, 0.7)
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_gradient_caching_gives_the_gradient_of_the_whole_batch(bert):
    encoder = synth.Encoder(bert, synth.Config(), dtype=torch.float64)
    grouprank.set_up_training(encoder.model, grouprank.Config(lora_rank=0), encoder.machine)
    encoder.model.train()
    queries, docs = [row["query"] for row in PAIRS], [row["pos"][0] for row in PAIRS]
    loss_of = lambda vectors: synth.retriever_loss(  # noqa: E731
        vectors, 8, 0.1, torch.zeros(8, 8, dtype=torch.bool), torch.ones(8, 1))
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
    rows = [{"query": "p", "pos": ["x", "y"], "neg": ["n"], "pos_scores": [9, 8], "neg_scores": [0]},
            {"query": "q", "pos": ["y"], "neg": ["x"], "pos_scores": [7], "neg_scores": [1]}]  # fmt: skip
    texts, labels, known = synth.draw_batch(rows, 2, random.Random(0))
    assert texts[3:] == ["y", "x", "x"] and labels[1].tolist() == [7, 1, 1]
    assert known[0].tolist() == [False, False, False, True, True, True]
    assert not known[1, 3] and known[1, 0] == (texts[0] == "y")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_lowers_the_loss_and_the_folder_opens_again(bert, tmp_path, monkeypatch, capsys, precision):
    path = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    options = {"encoder": bert, "out": tmp_path / "out", "epochs": 12, "batch": 8, "chunk": 5, "lr": 3e-3,
               "contrast_temperature": 0.1, "pooling": "cls", "query_prefix": "query: ", "distill_weight": 0.2,
               "precision": precision, "grad_checkpointing": "on"}  # fmt: skip
    command(monkeypatch, "--train-retriever", path, *flags(**options))
    said = capsys.readouterr().out
    losses = [float(line.split("loss ")[1].split()[0]) for line in said.splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0] - 0.5
    again = synth.Encoder(str(tmp_path / "out"), synth.Config())
    assert again.pooling == "cls" and again.prefixes == {"query": "query: ", "document": ""}
    with pytest.raises(ValueError, match="exists"):
        command(monkeypatch, "--train-retriever", path, *flags(**options))


@pytest.mark.parametrize(("wrong", "message"), [
    ({"pos": []}, "needs a"), ({"query": None}, "needs a"), ({"pos": "abc"}, "needs a"), ({"neg": None}, "needs a"),
    ({"neg": ["n", 3, "m"]}, "needs a"), ({"neg": ["n", " ", "m"]}, "needs a"),
    ({"pos_scores": [1, 2]}, "each of the 1 texts"), ({"pos_scores": None}, "each of the 1 texts"),
    ({"neg_scores": [1, "2", 3]}, "each of the 3 texts"), ({"neg_scores": "123"}, "each of the 3 texts"),
    ({"neg_scores": [1, math.nan, 3]}, "each of the 3 texts"),
])  # fmt: skip
def test_wrong_retriever_rows_are_named(tmp_path, wrong, message):
    path = write_rows(tmp_path / "pairs.jsonl", [PAIRS[0], PAIRS[0] | wrong])
    with pytest.raises(ValueError, match=f"pairs.jsonl, line 2: .*{message}"):
        synth.read_pairs(path)
    Path(path).write_text("\n[1]\n")
    with pytest.raises(ValueError, match="line 2: not a JSON object"):
        synth.read_pairs(path)


# --- Demo and options -----------------------------------------------------------------------------


def test_the_demo_shows_that_fused_labels_beat_both_teachers(tmp_path, monkeypatch, capsys):
    """The whole demo with fewer documents and queries, three seeds."""
    monkeypatch.setattr(synth, "DEMO", synth.DEMO | {"generate_queries": 110, "groups_per_query": 1, "epochs": 6.0})
    monkeypatch.setattr(synth, "DEMO_DOCS", 300)
    monkeypatch.setattr(synth, "DEMO_TEST_QUERIES", 40)
    command(monkeypatch, "--demo", "--out", tmp_path / "demo")
    said = capsys.readouterr().out
    tables = [[float(x) for x in line.split()[2:]] for line in said.splitlines() if line.startswith("seed ")]
    assert len(tables) == 6
    for pointwise, listwise, fused, _ in tables[:3]:
        assert fused > max(pointwise, listwise)
    for bm25, untrained, trained in tables[3:]:
        assert trained > max(bm25, untrained) + 20
    assert "simulated" in said
    started, last = [], said.splitlines()[-1]
    monkeypatch.setattr(grouprank, "write_demo", lambda *rest: None)
    monkeypatch.setattr(grouprank, "train", lambda cfg, prompt, out: started.append(cfg) or 1 / 0)
    assert last.startswith("try: python grouprank.py --train --data ")
    with pytest.raises(ZeroDivisionError):
        grouprank.main(last.split()[3:])
    assert started[0].data == str(tmp_path / "demo" / "seed-0" / "reranker.train.jsonl")
    assert started[0].model == str(tmp_path / "demo" / "reranker" / "demo" / "untrained")


@pytest.mark.parametrize(("query", "options", "message"), [
    ("what do hearts do", [], "--data needs --model"), ("heart lung", ["--ablation"], "leave --data out"),
    ("heart lung", ["--out", "{p}"], "give another --out"),
])  # fmt: skip
def test_only_rows_of_the_demos_world_train_its_model(tmp_path, query, options, message):
    (tmp_path / "demo").mkdir()
    row = {"id": "r", "query": query, "docs": [{"id": "d", "text": "bile"}], "scores": [1]}
    rows = write_rows(tmp_path / "demo" / "rows.jsonl", [row])
    out = ["--out", str(tmp_path / "new"), *(option.format(p=tmp_path) for option in options)]
    with pytest.raises(ValueError, match=message):
        grouprank.main(["--train", "--data", rows, "--overwrite", *out])
    assert Path(rows).exists() and not (tmp_path / "new").exists()


@pytest.mark.parametrize(("options", "message"), [
    ({"beta": 1.5}, "--beta must be from 0 to 1"), ({"batch": 0}, "--batch must be positive"),
    ({"group_sizes": "5:x"}, "--group-sizes"), ({"group_sizes": "1:3"}, "sizes from 2"),
    ({"export": "word"}, "--export word"), ({"negative_level": 7}, "must be below"),
    ({"retries": -1}, "--retries must be at least 0"), ({"out": ""}, "needs --data, --out and --llm"),
])  # fmt: skip
def test_options_that_cannot_work_are_refused_in_words(tmp_path, monkeypatch, options, message):
    with pytest.raises(ValueError, match=message):
        command(monkeypatch, *flags(**({"data": tmp_path, "out": tmp_path / "o", "llm": "m"} | options)))


def test_every_option_is_read_and_says_where_its_default_comes_from():
    source = Path(synth.__file__).read_text("utf-8")
    for f in dataclasses.fields(synth.Config):
        assert source.count(f"cfg.{f.name}") or f.name in source.split("shared = ")[1][:600], f.name
        assert f.metadata["source"].startswith(("paper", "ours")) and f.metadata["help"]


def test_the_defaults_in_the_readme_are_the_codes():
    readme = (ROOT / "README.md").read_text("utf-8")
    section = readme[readme.index("## Synthesis") : readme.index("## Formats")]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `") and "`" not in line[30:]]
    rows = {name.strip(" `"): value.strip() for name, value in rows}
    fields = {f.name: str(f.default) for f in dataclasses.fields(synth.Config)}
    assert len(rows) > 10 and {name: fields[name] for name in rows} == rows
