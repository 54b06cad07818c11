"""Rollouts from inference servers: a small server with vLLM's routes wraps the same tiny model."""

import functools
import json
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import LocalServer, byte_tokenizer, save_tiny_model, tiny_model, write_rows
from safetensors.torch import load_file

import grouprank

PROMPT = grouprank.Prompt("rate {n}", "{query}\n{documents}")
SAMPLING = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
            "presence_penalty": 0.0, "frequency_penalty": 0.0}  # fmt: skip


def add_adapter(model, folder):
    """Add W + alpha/r B A of a folder in PEFT's format to a model."""
    about = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in sorted(tensors)[::2]:  # each A is followed by its B
        layer = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        update = tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
        layer.weight.data += about["lora_alpha"] / about["r"] * update


class InferenceServer(LocalServer):
    """Completions of token ids by a model with adapters; `fault` names one misbehaviour.

    The sampled answers follow from the request's seed, and the log-probabilities are the model's.
    """

    lock = threading.Lock()  # one model runs at a time, as here is one processor

    def __init__(self, model, fault=""):
        self.model_folder, self.fault = str(model), fault
        self.adapters, self.requests, self.told = {}, [], Counter()

    def post(self, handler, body):
        with self.lock:
            status, text = getattr(self, handler.path.removeprefix("/v1/"))(body)
        if status is None:
            return handler.connection.close()
        handler.send(status, text.encode())

    def load_lora_adapter(self, body):
        """vLLM reads the folder at once, and answers in plain text."""
        if self.fault == "no adapters":
            return 404, '{"detail": "Not Found"}'
        if body["lora_name"] in self.adapters:
            return 400, '{"error": {"message": "The adapter has already been loaded."}}'
        model, _ = grouprank.load_model(self.model_folder, grouprank.pick_machine("cpu"))
        add_adapter(model, Path(body["lora_path"]))
        assert grouprank.share_prompts(model)
        self.adapters[body["lora_name"]] = model
        if self.fault == "closed":
            return None, ""  # loaded, but the answer is lost
        return 200, f"Success: LoRA adapter '{body['lora_name']}' added successfully."

    def unload_lora_adapter(self, body):
        known = self.adapters.pop(body["lora_name"], None)
        return (200, "Success") if known else (404, "{}")

    def completions(self, body):
        """n sampled answers with their ids and log-probabilities, or the fault."""
        self.requests.append(body)
        first = self.told["asked"] == 0
        self.told["asked"] += 1
        faults = {"500": (500, "{}"), "closed": (None, ""), "half": (200, '{"choices": [')}
        if self.fault in faults and (first or self.told["asked"] % 2 == 0):
            return faults[self.fault]
        if body["model"] not in self.adapters:
            return 404, '{"error": {"message": "The model does not exist."}}'
        model, ends, prompt = self.adapters[body["model"]], body["stop_token_ids"], body["prompt"]
        seeds = [[(body["seed"], number) for number in range(body["n"])]]
        (answers,) = grouprank.sample_answers(model, [prompt], seeds, max_new_tokens=body["max_tokens"],
                                              end_ids=ends, temperature=body["temperature"])
        with torch.no_grad():
            logp, _ = grouprank.completion_logprobs(
                grouprank.Policy(model), [(prompt, answers)], packed=True)
        parts = logp.split([len(ids) for ids in answers])
        choices = [{"text": "", "token_ids": ids, "finish_reason": "stop" if ids[-1] in ends else "length",
                    "logprobs": {"token_logprobs": part.tolist()}}
                   for ids, part in zip(answers, parts, strict=True)]
        return 200, json.dumps({"model": body["model"], "choices": self.spoil(choices)}
                               | ({"model": "base"} if self.fault == "stale" else {}))

    def spoil(self, choices):
        """The choices with the fault, if it is one of theirs."""
        for choice in choices:
            if self.fault == "no ids":
                del choice["token_ids"]
            if self.fault == "no log-probabilities":
                choice["logprobs"] = None
            if self.fault == "aborted":
                choice["finish_reason"] = "abort"
            if self.fault == "no end" and choice["finish_reason"] == "stop":
                choice["token_ids"].pop()
                choice["logprobs"]["token_logprobs"].pop()
        return choices[1:] if self.fault == "one is missing" else choices


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model and rows to train on."""
    place = tmp_path_factory.mktemp("rollouts")
    save_tiny_model(place / "model")
    write_rows(place / "rows.jsonl", [
        {"id": f"row {i}", "query": "which " * (i + 1), "scores": [9, 0],
         "docs": [{"id": "a", "text": f"yes {i}"}, {"id": "b", "text": "no"}]} for i in range(4)])
    return place


def train(place, out, urls, monkeypatch, **changes):
    """Three GRPO steps with the rewards of random answers; the lines of metrics.jsonl."""
    def reward(text, gold, **_):
        return grouprank.Reward(len(set(text)) / 20, "ok", ndcg=0.5)

    cfg = grouprank.Config(**{
        "model": str(place / "model"), "data": str(place / "rows.jsonl"), "out": str(out),
        "stage": "grpo", "lora_rank": 4, "device": "cpu", "max_new_tokens": 10, "grpo_lr": 1e-2,
        "max_prompt_tokens": 400, "prompts_per_step": 2, "rollouts_per_prompt": 4,
        "grpo_epochs": 1.5, "rollout_endpoint": tuple(urls), "timeout_s": 20.0} | changes)  # fmt: skip
    patient = functools.partial(grouprank.RolloutServers, tries=4, backoff_s=0.01)
    with monkeypatch.context() as patch:
        patch.setattr(grouprank, "score_completion", reward)
        patch.setattr(grouprank, "RolloutServers", patient)
        grouprank.train(cfg, PROMPT, out)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_each_step_is_sampled_by_its_own_adapter_on_every_server(place, tmp_path, monkeypatch):
    with InferenceServer(place / "model") as a, InferenceServer(place / "model") as b:
        rows = train(place, tmp_path / "out", [a.url, b.url], monkeypatch)
        assert len(rows) == 3 and all(row["dropped"] == 0 for row in rows)
        names = [body["model"] for body in a.requests + b.requests]
        assert sorted(name[-7:] for name in names) == ["0000000"] * 2 + ["0000001"] * 2 + ["0000002"] * 2
        assert a.requests and b.requests  # both are asked
        assert list(a.adapters) == list(b.adapters) == [max(names)]  # older ones were unloaded
    assert [path.name for path in (tmp_path / "out/rollouts").iterdir()] == [max(names)]
    assert all(0 <= row["mismatch"] < 1e-4 for row in rows)  # float32 here and there, in other batches
    assert rows[-1]["kl"] > 0  # the adapter moved, so that a stale one would show as a mismatch


def test_the_distribution_is_said_in_full_and_prompts_are_token_ids(place, tmp_path, monkeypatch):
    with InferenceServer(place / "model") as server:
        train(place, tmp_path / "out", [server.url], monkeypatch, eval_data=str(place / "rows.jsonl"))
    tokenizer = byte_tokenizer()
    rollouts = [body for body in server.requests if body["n"] == 4]
    assert len(rollouts) == 6 and len(server.requests) == 6 + 2 * 4  # and the held-out rows, before and after
    for body in server.requests:
        assert SAMPLING.items() <= body.items()
        assert body["temperature"] == (1.0 if body["n"] == 4 else 0.0)
        assert tokenizer.decode(body["prompt"]).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("fault", ["500", "closed", "half"])
def test_a_server_that_fails_now_and_then_costs_nothing_but_time(place, tmp_path, monkeypatch, fault):
    with InferenceServer(place / "model", fault) as server:
        rows = train(place, tmp_path / "out", [server.url], monkeypatch)
    assert len(rows) == 3 and all(row["dropped"] == 0 for row in rows)
    assert server.told["asked"] > 6


@pytest.mark.parametrize("fault", ["stale", "one is missing", "aborted", "no ids", "no adapters"])
def test_answers_that_cannot_be_used_come_from_another_server(place, tmp_path, monkeypatch, capsys, fault):
    """Alone, such a server stops the run with a sentence and nothing is trained on its answers."""
    with InferenceServer(place / "model", fault) as bad, InferenceServer(place / "model") as good:
        rows = train(place, tmp_path / "both", [bad.url, good.url], monkeypatch)
        assert len(rows) == 3 and all(row["dropped"] == 0 for row in rows)
        assert all(row["mismatch"] < 1e-4 for row in rows)
        said = capsys.readouterr().out
        assert (f"{bad.url} did not load the adapter" in said) == (fault == "no adapters")
        words = ("could load the adapter" if fault == "no adapters"
                 else r"none of 2 prompts was answered by --rollout-endpoint: \w+ \(4 tries\)")
        with pytest.raises(ValueError, match=words):
            train(place, tmp_path / "alone", [bad.url], monkeypatch)
    assert not (tmp_path / "alone/metrics.jsonl").read_text()


def test_servers_that_are_all_down_stop_the_run_with_a_sentence(place, tmp_path, monkeypatch):
    with InferenceServer(place / "model") as gone:
        pass
    with pytest.raises(ValueError, match="no --rollout-endpoint could load the adapter .*Connection refused"):
        train(place, tmp_path / "out", [gone.url], monkeypatch)


@pytest.mark.parametrize("fault", ["no log-probabilities", "no end"])
def test_what_a_server_does_not_tell_is_done_without(place, tmp_path, monkeypatch, fault):
    """The ratio then starts from this process's own log-probabilities."""
    with InferenceServer(place / "model", fault) as server:
        rows = train(place, tmp_path / "out", [server.url], monkeypatch)
    assert len(rows) == 3 and all(row["dropped"] == 0 for row in rows)
    if fault == "no end":
        assert rows[0]["mismatch"] < 1e-4
    else:
        assert all("mismatch" not in row for row in rows)


def test_an_end_that_is_not_told_is_the_tokenizers_own(tmp_path):
    """Of several end tokens the chat's is the one that answers end with, not the lowest number."""
    cfg = grouprank.Config(stage="grpo", rollout_endpoint=("http://a:8000/v1",))
    servers = grouprank.RolloutServers(cfg, tmp_path, end_ids=[0, 2], eos_id=2)

    def read(ids, reason):
        answer = {"model": "m", "choices": [{"token_ids": ids, "finish_reason": reason}]}
        return servers.read(answer, {"model": "m", "n": 1}).sampled[0].ids

    assert read([70], "stop") == [70, 2]
    assert read([70, 0], "stop") == [70, 0]
    assert read([70], "length") == [70]


def test_an_unanswered_prompt_is_left_out_and_counted(place, tmp_path, monkeypatch, capsys):
    class Refusing(InferenceServer):
        def completions(self, body):
            longest = byte_tokenizer().decode(body["prompt"]).count("which") == 4
            return (400, "too long") if longest else super().completions(body)

    with Refusing(place / "model") as server:
        rows = train(place, tmp_path / "out", [server.url], monkeypatch)
    assert sum(row["dropped"] for row in rows) in (1, 2)  # it comes in 1.5 epochs
    said = capsys.readouterr()
    assert "dropped 1" in said.out and f"{server.url} answered HTTP 400: too long" in said.err


def test_the_ratio_starts_from_the_samplers_log_probabilities_and_is_clipped(monkeypatch):
    """Eq. 7 by hand: ratio 2 is clipped to 1.2 for a positive advantage; NaN is taken as ratio 1."""
    logp = torch.tensor([-1.0, -1.0], requires_grad=True)
    sampler = torch.tensor([-1.0 - torch.tensor(2.0).log(), float("nan")])
    part = grouprank.Pass([([1], [[2, 3]])], torch.tensor([1.0, 1.0]), torch.tensor([0.5, 0.5]), sampler)
    monkeypatch.setattr(grouprank, "completion_logprobs", lambda *_: (logp, torch.zeros(2)))
    optimizer = SimpleNamespace(backward=lambda loss: loss.backward())
    sums = grouprank.grpo_pass(grouprank.Policy(tiny_model()), None, optimizer, part,
                               grouprank.Config(clip_eps=0.2, kl_coef=0.0))
    assert sums["loss"] == pytest.approx(-(1.2 + 1.0) / 2)
    assert (sums["tokens"], sums["clip_share"], sums["told"]) == (2, 1, 1)
    assert sums["mismatch"] == pytest.approx(0.693147, abs=1e-5)
    assert logp.grad.tolist() == [0.0, pytest.approx(-0.5)]


def test_settings_that_cannot_work_are_refused():
    for changes in ({"stage": "both"}, {"stage": "grpo", "lora_rank": 0}):
        with pytest.raises(ValueError, match="--rollout-endpoint needs --stage grpo, LoRA"):
            grouprank.Config(rollout_endpoint=("http://127.0.0.1:9/v1",), **changes)
