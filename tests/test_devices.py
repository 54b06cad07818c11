"""Every precision on every device that is here: the CPU, and CUDA where there is one."""

import copy
import functools

import numpy as np
import pytest
import torch
from conftest import save_tiny_model, tiny_model, write_rows

import grouprank

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PRECISIONS = ["fp32", "bf16", "fp16"]
PROMPT = grouprank.Prompt(system="rate", user="{query}\n{documents}")


def blocks_of(prompts=(200, 31, 90), completions=((33, 17, 65), (4, 21), (9, 40, 1, 30))):
    """Prompts of various lengths with completions, or branches, of various lengths."""
    rng = np.random.default_rng(0)
    return [(rng.integers(60, 300, p).tolist(), [rng.integers(60, 300, n).tolist() for n in lengths])
            for p, lengths in zip(prompts, completions, strict=True)]  # fmt: skip


def token_numbers(policy, packed):
    """Log-probabilities of completions, in packed or in separate rows."""
    policy.model.get_decoder().config._attn_implementation = grouprank.SHARED if packed else "sdpa"
    return grouprank.completion_logprobs(policy, blocks_of(), packed)[0]


def digit_numbers(policy, packed):
    """Log-probabilities of digits, in packed or in separate rows."""
    policy.model.get_decoder().config._attn_implementation = grouprank.SHARED if packed else "sdpa"
    return grouprank.digit_logprobs(policy, blocks_of(), list(range(50, 60)))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("numbers", [token_numbers, digit_numbers])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("device", DEVICES)
def test_packed_rows_are_separate_rows_in_every_precision(device, precision, numbers, checkpointing):
    """Against float64 on the CPU: values, and the gradient of a weighted sum."""
    machine = grouprank.pick_machine(device, precision)
    found = []
    for where, packed in ((None, False), (machine, False), (machine, True)):
        model = tiny_model("qwen3", width=64, layers=3).train()
        if where is None:
            policy = grouprank.Policy(model.double())
        else:
            autocast = functools.partial(machine.autocast, cache=False)
            policy = grouprank.Policy(model.to(machine.device), autocast)
        if checkpointing:
            grouprank.recompute_activations(model)
        logp = numbers(policy, packed)
        weights = torch.linspace(-1, 1, logp.numel()).view(logp.shape).to(logp)
        (weights * logp).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        found.append((logp.detach().cpu().double(), gradient.cpu().double()))
    (exact, slope), *others = found
    tolerance = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.01}[precision]
    for logp, gradient in others:
        assert (logp - exact).abs().mean() < tolerance
        assert (gradient - slope).norm() < 3 * tolerance * slope.norm()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("device", DEVICES)
def test_decoding_rounds_no_product_of_queries_and_keys(device, precision):
    """Large biases give all of them a common part, 80,000 here, beyond fp16; what differs decides."""
    machine, random = grouprank.pick_machine(device, precision), torch.Generator().manual_seed(0)
    query = torch.randn(2, 3, 4, 7, 64, generator=random)  # 2 prompts, 3 answers, 4 heads of 7 queries
    key = torch.randn(6, 4, 50, 64, generator=random)  # the buffer of the answers, half full
    query[..., 0] = key[..., 0] = 283
    query, key = (t.to(machine.device, machine.dtype) for t in (query, key))
    key = key[:, :, :30].unflatten(0, (2, 3))
    with machine.autocast():
        found = grouprank.attention_logits(query, key).cpu().double()
    assert (found - query.cpu().double() @ key.cpu().double().mT).abs().max() < 0.1


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("numbers", [token_numbers, digit_numbers])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("device", DEVICES)
def test_the_frozen_copy_is_exactly_the_policy_until_that_moves(device, precision, numbers, tied):
    machine = grouprank.pick_machine(device, precision)
    model = tiny_model("qwen2" if tied else "llama").to(machine.device)
    policy = grouprank.Policy(model, functools.partial(machine.autocast, cache=False))
    digits = list(range(50, 60)) if numbers is digit_numbers else ()
    reference = grouprank.make_reference(policy, machine, digits)
    with torch.no_grad():
        own = numbers(policy, True)
        assert torch.equal(reference(blocks_of()), own)
        model.model.layers[0].mlp.up_proj.weight += 0.01
        assert not torch.equal(numbers(policy, True), own)
        assert torch.equal(reference(blocks_of()), own)


@pytest.mark.parametrize("answer", ["reason", "direct"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("device", DEVICES)
def test_both_stages_train_in_every_precision_and_the_model_reranks(
    device, precision, answer, tmp_path, monkeypatch
):
    """With checkpointing and LoRA; on CUDA the largest pass is tried before the first step."""
    save_tiny_model(tmp_path / "model", "qwen3", vocab_size=300)
    answers = ['<reason>so</reason><answer>{"[1]": 9, "[2]": 0}</answer>'] * 4
    rows = [{"id": f"row {i}", "query": "which one?", "scores": [9, 0], "response": text,
             "docs": [{"id": "a", "text": f"yes {i}"}, {"id": "b", "text": "no " * (i + 1)}]}
            for i, text in enumerate(answers)]  # fmt: skip
    path, moved = write_rows(tmp_path / "rows.jsonl", rows), []
    cfg = grouprank.Config(
        model=str(tmp_path / "model"), data=path, eval_data=path, answer=answer, max_new_tokens=80,
        max_prompt_tokens=400, lora_rank=4, sft_batch=2, sft_lr=1e-2, grpo_lr=1e-2, sft_epochs=4.0,
        grpo_epochs=1.0, prompts_per_step=2, device=device, precision=precision, save_every=0,
        max_tokens_per_pass=4096, grad_checkpointing="on", docs_per_group=2)  # fmt: skip
    step = grouprank.Optimizer.step

    def watched(self, lr):
        before = copy.deepcopy(next(iter(self.weights.values())))
        done = step(self, lr)
        moved.append(not done["skipped"] and not torch.equal(before, next(iter(self.weights.values()))))
        return done

    monkeypatch.setattr(grouprank.Optimizer, "step", watched)
    if answer == "reason":  # a reward that random weights can earn
        monkeypatch.setattr(grouprank, "score_completion", lambda text, gold, **_: grouprank.Reward(
            text.count("e") / (len(text) + 1), "ok"))  # fmt: skip
    grouprank.train(cfg, PROMPT, tmp_path / "out")
    assert sum(moved) >= 3  # a step of fp16 may only halve the loss scale
    if answer == "direct":
        ranker = grouprank.GroupRanker.from_pretrained(str(tmp_path / "out"), device=device, precision=precision)
        assert len(ranker.rank("which one?", ["yes 1", "no", "no no"])) == 3
