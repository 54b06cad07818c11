"""Packed rows, LoRA, decoding, the two training steps and whole runs, on tiny models."""

import copy
import dataclasses
import functools
import gzip
import json
import math
import types

import numpy as np
import pytest
import torch
import transformers
from conftest import (
    ARCHITECTURES,
    NoStep,
    byte_tokenizer,
    everything,
    save_tiny_model,
    tiny_model,
    write_rows,
)
from safetensors.torch import load_file
from torch import nn

import grouprank

END = 2


def random_ids(rng, n):
    """n token ids that are not special."""
    return rng.integers(3, 300, n).tolist()


def blocks_of(seed=0, prompts=(30, 1, 12), completions=((1, 7, 5), (4, 2), (9, 9, 1, 3))):
    """Prompts with completions of various lengths; one prompt has a single token."""
    rng = np.random.default_rng(seed)
    return [(random_ids(rng, p), [random_ids(rng, c) for c in lengths])
            for p, lengths in zip(prompts, completions, strict=True)]


def prepared(kind, *, lora=False, checkpointing=False, dtype=torch.float64):
    """A tiny model in training mode, with adapters that are not zero."""
    model = tiny_model(kind)
    if lora:
        grouprank.add_lora(model, rank=4, alpha=8.0)
        for layer in grouprank.lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.1)
    if checkpointing:
        grouprank.recompute_activations(model)
    assert grouprank.share_prompts(model)
    return model.to(dtype).train()


def run_rows(model):
    """From now on a prompt is run once for each of its answers."""
    model.get_decoder().config._attn_implementation = "sdpa"


def logprobs(model, blocks, packed):
    """completion_logprobs with the attention that it needs, the head in chunks of four."""
    model.get_decoder().config._attn_implementation = grouprank.SHARED if packed else "sdpa"
    return grouprank.completion_logprobs(grouprank.Policy(model, chunk_tokens=4), blocks, packed)


def next_tokens(model, prompt, completion):
    """Distribution of each token of a completion, by the library's own attention and logits."""
    run_rows(model)
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return torch.distributions.Categorical(logits=logits)


def library_logprobs(model, prompt, completion):
    """Log-probability of each token of a completion, by the library."""
    return next_tokens(model, prompt, completion).log_prob(torch.tensor(completion))


def gradients(model):
    """Gradients of the trained weights, and clear them."""
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def largest_gap(grads, others):
    """max over tensors of ||difference|| / ||gradient||."""
    assert grads.keys() == others.keys() and grads
    largest = max(g.norm() for g in others.values())
    return max(((g - others[n]).norm() / others[n].norm().clamp(min=1e-3 * largest)).item()
               for n, g in grads.items())


# --- Packed rows against separate rows ------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_running_a_prompt_once_gives_the_same_numbers_and_gradients(kind, lora, checkpointing):
    for dtype, logp_gap, grad_gap in ((torch.float64, 1e-6, 1e-5), (torch.float32, 5e-5, 1e-4)):
        model = prepared(kind, lora=lora, checkpointing=checkpointing, dtype=dtype)
        found = []
        for packed in (True, False):
            logp, entropy = logprobs(model, blocks_of(), packed)
            (logp * torch.linspace(-1, 1, len(logp), dtype=dtype)).sum().backward()
            found.append((logp.detach(), entropy, gradients(model)))
        (logp, entropy, grads), (row_logp, row_entropy, row_grads) = found
        assert (logp - row_logp).abs().max() < logp_gap
        assert (entropy - row_entropy).abs().max() < 10 * logp_gap
        assert largest_gap(grads, row_grads) < grad_gap


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_log_probabilities_and_entropies_are_those_of_the_library(kind, packed):
    """Row after row, whatever the padding; in the order of the blocks."""
    model = tiny_model(kind).double()
    for blocks in (blocks_of(), blocks_of()[::-1]):
        rows = [(prompt, c) for prompt, completions in blocks for c in completions]
        expected = (torch.cat([library_logprobs(model, *row) for row in rows]),
                    torch.cat([next_tokens(model, *row).entropy() for row in rows]))
        for found, library in zip(logprobs(model, blocks, packed), expected, strict=True):
            assert torch.allclose(found, library, atol=1e-9)


@pytest.mark.parametrize("packed", [True, False])
def test_passes_hold_every_completion_once_and_obey_the_budget(packed):
    prompts, lengths = [30, 5, 100], [[3, 40, 7, 9], [1, 1], [20] * 5]
    for budget in (10, 60, 140, 1000):
        passes = grouprank.plan_passes(prompts, lengths, budget, packed)
        seen = [(b, g) for chunk in passes for b, gs in chunk for g in gs]
        assert sorted(seen) == [(b, g) for b in range(3) for g in range(len(lengths[b]))]
        for chunk in passes:
            sizes = [prompts[b] + sum(lengths[b][g] for g in gs) for b, gs in chunk]
            tokens = sum(sizes) if packed else len(sizes) * max(sizes)
            assert tokens <= budget or sum(len(gs) for _, gs in chunk) == 1
    assert len(passes) == (1 if packed else 2)  # 296 tokens packed; as rows 5 x 120 and 6 x 70


# --- LoRA -----------------------------------------------------------------------------------------


def test_lora_starts_at_the_base_model_and_trains_every_adapter():
    model, ids = tiny_model("qwen3"), torch.arange(3, 40)[None]
    before = model(ids).logits
    assert grouprank.add_lora(model, rank=4, alpha=8.0) == 2 * 7  # linear layers; not the head
    assert torch.equal(model(ids).logits, before)
    grouprank.recompute_activations(model)
    model.train()
    optimizer = grouprank.Optimizer(model, grouprank.pick_machine("cpu", "fp32"))
    optimizer.backward(-model(ids).logits.log_softmax(-1)[..., 5].mean())
    optimizer.step(1e-2)
    assert all(layer.lora_B.norm() > 0 for layer in grouprank.lora_layers(model).values())
    assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())
    with grouprank.lora_disabled(model):
        assert torch.allclose(model(ids).logits, before, atol=1e-6)
    assert not torch.allclose(model(ids).logits, before, atol=1e-3)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_peft_opens_our_adapters_and_merges_them_to_what_we_merge(kind, tmp_path):
    peft = pytest.importorskip("peft")
    model, ids = prepared(kind, lora=True, dtype=torch.float32).eval(), torch.arange(3, 40)[None]
    run_rows(model)
    expected = model(ids).logits
    grouprank.save_adapter(model, tmp_path, "base")
    theirs = peft.PeftModel.from_pretrained(tiny_model(kind), tmp_path).eval()
    assert torch.allclose(theirs(ids).logits, expected, atol=1e-5)
    assert torch.allclose(theirs.merge_and_unload()(ids).logits, expected, atol=1e-5)
    weights = grouprank.plain_state_dict(model)
    grouprank.merge_lora(model)
    assert torch.allclose(model(ids).logits, expected, atol=1e-5)
    assert weights.keys() == tiny_model(kind).state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(weights[n], t) for n, t in model.state_dict().items())


def test_what_rounding_leaves_of_a_merged_update_is_told(capsys):
    """Weights of 1: bfloat16's next are 1 + 1/128 and 1 - 1/256. Updates of 1/2 stay, of 1/1000 go."""
    for size, share in ((0.5, 1.0), (0.001, 0.0)):
        model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(1, 1))
        model.get_output_embeddings = lambda head=model[1]: head
        model[0].weight.data.fill_(1.0)
        model = model.bfloat16()
        grouprank.add_lora(model, rank=1, alpha=1.0)
        model[0].lora_A.data.fill_(1.0)
        model[0].lora_B.data.fill_(size)
        assert grouprank.merge_lora(model) == pytest.approx(share, abs=1e-6)
        assert torch.equal(model[0].weight, torch.full((4, 8), 1 + (size == 0.5) * size).bfloat16())
        assert ("the merged weights keep 0% of what" in capsys.readouterr().out) == (share == 0)


def test_a_tied_head_is_stored_once_in_whatever_type(tmp_path):
    model = grouprank.demo_model(byte_tokenizer(), 0)
    model.stored_dtype = torch.bfloat16
    weights = grouprank.plain_state_dict(model)
    head, embeddings = weights["lm_head.weight"], weights["model.embed_tokens.weight"]
    assert head.dtype == torch.bfloat16 and head.data_ptr() == embeddings.data_ptr()
    model.save_pretrained(tmp_path, state_dict=weights)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_models_with_latent_attention_run_each_prompt_for_itself():
    """Their values have other sizes than their keys, which the cache of shared prompts stores together."""
    model = tiny_model("llama")
    assert grouprank.share_prompts(model)
    model.config.qk_head_dim, model.config.v_head_dim = 24, 16
    assert not grouprank.share_prompts(model)


# --- Decoding -------------------------------------------------------------------------------------

DECODERS = {"shared": grouprank.sample_answers, "library": grouprank.generate_answers}


def decoder_of(name, model):
    """A way to decode, and the model switched to it."""
    if name == "shared":
        grouprank.share_prompts(model)
    return DECODERS[name]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_greedy_decoding_equals_generate_of_the_library_prompt_by_prompt(kind, decoder):
    """Nothing else of the model's generation_config acts: it is no part of the trained model."""
    model, rng = tiny_model(kind), np.random.default_rng(1)
    for name, weight in model.named_parameters():  # else it would repeat its last token
        weight.data *= 10 if "_proj" in name or "q_norm" in name else 1
    prompts = [random_ids(rng, n) for n in (17, 1, 6)]

    def greedy(prompt, ends):
        rows = model.generate(torch.tensor([prompt]), max_new_tokens=15, do_sample=False,
                              eos_token_id=ends)
        return rows[0, len(prompt) :].tolist()

    free = [greedy(prompt, [1]) for prompt in prompts]
    ends = [free[0][7], free[2][3]]
    expected = [greedy(prompt, ends) for prompt in prompts]
    assert len(set(free[0])) > 9 and len(free[0]) == 15
    assert len(expected[2]) <= 4 and expected[2][-1] in ends  # ended, and holds its end
    own = model.generation_config
    own.repetition_penalty, own.min_new_tokens, own.eos_token_id = 5.0, 12, [free[1][0]]
    for end_ids, answers in (([1], free), (ends, expected)):
        found = decoder_of(decoder, model)(model, prompts, [[(0,)]] * 3, max_new_tokens=15,
                                           end_ids=end_ids, temperature=0.0)
        assert [row for (row,) in found] == answers
    assert model.generation_config is own and own.repetition_penalty == 5.0


MANY_ENDS = range(2, 30)  # so that answers end at different steps


def sample_all(model, prompts, n_answers, decode=grouprank.sample_answers, seed=7):
    """Sample several answers to each prompt."""
    seeds = [[(seed, f"prompt {len(p)}", g) for g in range(n_answers)] for p in prompts]
    return decode(model, prompts, seeds, max_new_tokens=40, end_ids=MANY_ENDS)


def test_what_is_drawn_does_not_depend_on_the_batch():
    model, rng = tiny_model("qwen2"), np.random.default_rng(2)
    grouprank.share_prompts(model)
    prompts = [random_ids(rng, n) for n in (25, 3, 11, 8)]
    together = sample_all(model, prompts, 6)
    assert len({len(a) for answers in together for a in answers}) > 5  # rows ended one by one
    assert together == [sample_all(model, [p], 6)[0] for p in prompts]
    assert together[::-1] == sample_all(model, prompts[::-1], 6)
    assert together != sample_all(model, prompts, 6, seed=8)


def test_the_librarys_draws_are_those_of_the_seeds_and_leave_the_random_state_alone():
    model, rng = tiny_model("qwen2"), np.random.default_rng(2)
    prompts = [random_ids(rng, n) for n in (25, 3, 11)]
    decode = functools.partial(sample_all, model, prompts, 6, grouprank.generate_answers)
    state, first = torch.get_rng_state(), decode()
    assert first == decode() != decode(seed=8)
    assert torch.equal(state, torch.get_rng_state())
    answers = [a for row in first for a in row]
    assert [len(row) for row in first] == [6, 6, 6] and len(set(map(tuple, answers))) > 12
    assert all((len(a) == 40 or a[-1] in MANY_ENDS) and not set(a[:-1]) & set(MANY_ENDS)
               for a in answers)  # cut, or up to the first end token and with it


def test_answers_that_ended_are_dropped_from_the_batch():
    model, sizes = tiny_model("qwen2"), []
    grouprank.share_prompts(model)
    model.get_decoder().layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(args[0].shape[0]), with_kwargs=True)
    prompts = [random_ids(np.random.default_rng(2), n) for n in (25, 3)]
    answers = sample_all(model, prompts, 8)
    decoded = sizes[1:]  # the first call is the prompts'
    assert decoded[0] == 16 and decoded[-1] <= 4 and decoded == sorted(decoded, reverse=True)
    assert max(len(a) for row in answers for a in row) == len(sizes)


@pytest.mark.parametrize("decoder", DECODERS)
def test_samples_follow_the_exact_next_token_distribution(decoder):
    """Chi-square over 20,000 draws of the first two tokens with a vocabulary of 8."""
    model, n = tiny_model("qwen2", vocab_size=8, seed=3), 20_000
    first = model(torch.tensor([[3, 5, 6]])).logits[0, -1].softmax(-1)
    expected = torch.zeros(8, 9)
    expected[7, 8] = first[7]  # the end token is followed by nothing
    for token in range(7):
        second = model(torch.tensor([[3, 5, 6, token]])).logits[0, -1].softmax(-1)
        expected[token, :8] = first[token] * second
    own = model.generation_config
    own.repetition_penalty, own.top_k, own.temperature = 2.0, 2, 0.5  # none of them acts
    (answers,) = decoder_of(decoder, model)(
        model, [[3, 5, 6]], [[(i,) for i in range(n)]], max_new_tokens=2, end_ids=[7])
    counts = torch.zeros(8, 9)
    for answer in answers:
        counts[answer[0], answer[1] if len(answer) > 1 else 8] += 1
    likely = expected > 0
    chi_square = ((counts - n * expected)[likely] ** 2 / (n * expected[likely])).sum()
    degrees = int(likely.sum()) - 1
    assert counts[~likely].sum() == 0
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5  # four standard deviations


def test_sampling_honours_temperature_and_nucleus():
    logits = torch.log(torch.tensor([[0.5, 0.15, 0.3, 0.05]])).expand(1000, -1)
    uniforms = torch.linspace(0, 0.999, 1000, dtype=torch.float64)
    for temperature, top_p, expected in (
            (1.0, 1.0, [0.5, 0.15, 0.3, 0.05]), (1.0, 0.7, [0.625, 0, 0.375, 0]),
            (1.0, 0.1, [1.0, 0, 0, 0]), (0.0, 1.0, [1.0, 0, 0, 0]),
            (0.5, 1.0, [0.25 / 0.365, 0.0225 / 0.365, 0.09 / 0.365, 0.0025 / 0.365])):
        tokens = grouprank.sample_tokens(logits, uniforms, temperature, top_p)
        found = tokens.bincount(minlength=4) / 1000
        assert torch.allclose(found, torch.tensor(expected), atol=0.002)


def test_a_draw_takes_the_token_whose_interval_of_the_distribution_holds_the_number():
    """Halves and quarters are exact, so that borders can be met; no token of zero mass is drawn."""
    logits = torch.tensor([[-math.inf, math.log(2), 0, -math.inf, 0]]).expand(5, -1)
    uniforms = torch.tensor([0, 0.4999, 0.5, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert grouprank.sample_tokens(logits, uniforms, 1.0, 1.0).tolist() == [1, 1, 2, 4, 4]
    # The nucleus ends where its mass reaches top_p, and no later.
    assert grouprank.sample_tokens(logits, uniforms, 1.0, 0.5).tolist() == [1] * 5
    assert grouprank.sample_tokens(logits, uniforms, 1.0, 0.75).tolist() == [1, 1, 1, 2, 2]


@pytest.mark.parametrize(("shared", "budget", "expected"), [
    (True, 130, [[50, 40], [20, 10]]), (True, 10, [[50], [40], [20], [10]]),
    (False, 130, [[50], [40], [20, 10]])])  # a prompt is stored once for each of its answers
def test_waves_fit_the_cache_budget_with_the_longest_prompts_first(folders, monkeypatch, shared, budget, expected):
    local, waves = run_for(settings(folders, max_new_tokens=5), folders).local, []

    def decode(model, prompts, seeds, **_):
        waves.append(list(map(len, prompts)))
        return [[[2]] * len(own) for own in seeds]

    monkeypatch.setattr(grouprank, "sample_answers" if shared else "generate_answers", decode)
    monkeypatch.setattr(local, "cache_tokens", lambda: budget)
    if not shared:
        run_rows(local.model)
    local.sample([[5] * n for n in (10, 50, 20, 40)], [[(0,), (1,)]] * 4)
    assert waves == expected


# --- Training steps -------------------------------------------------------------------------------

RESPONSES = [
    '<reason>the first</reason><answer>{"[1]": 9, "[2]": 0}</answer>',
    '<reason>the second, clearly</reason><answer>{"[1]": 1, "[2]": 8}</answer>',
]
PROMPT = grouprank.Prompt(system="", user="{query}\n{documents}")


def training_rows(n=4):
    """Rows with a response and scores."""
    return [{"id": f"row {i}", "query": "which one?" * (1 + i % 2),
             "docs": [{"id": "a", "text": f"yes {i}"}, {"id": "b", "text": "no " * (i + 1)}],
             "scores": [9, 0] if i % 2 == 0 else [1, 8], "response": RESPONSES[i % 2]}
            for i in range(n)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved tiny model of each architecture, and a file of rows."""
    root = tmp_path_factory.mktemp("training")
    for kind in ARCHITECTURES:
        save_tiny_model(root / kind, kind, vocab_size=300)
    write_rows(root / "rows.jsonl", training_rows())
    return root


def settings(folders, kind="qwen2", **changes):
    """A Config for a few quick steps."""
    values = {
        "model": str(folders / kind), "data": str(folders / "rows.jsonl"), "max_new_tokens": 80,
        "max_prompt_tokens": 400, "lora_rank": 0, "sft_batch": 4, "sft_lr": 1e-2, "grpo_lr": 1e-2,
        "sft_epochs": 3.0, "grpo_epochs": 1.0, "prompts_per_step": 2, "rollouts_per_prompt": 4,
        "device": "cpu", "precision": "fp32", "save_every": 0, "max_tokens_per_pass": 4096}
    return grouprank.Config(**(values | changes))


def run_for(cfg, out):
    """A Run before its first step, as train() makes it."""
    machine = grouprank.pick_machine(cfg.device, cfg.precision)
    model, tokenizer = grouprank.load_model(cfg.model, machine, trainable=cfg.lora_rank == 0)
    local = grouprank.LocalModel(model, tokenizer, machine, cfg)
    rows = grouprank.read_rows(cfg.data)
    items, _ = grouprank.encode_rows(rows, local.encoder, PROMPT, cfg)
    grouprank.set_up_training(model, cfg, machine)
    policy = grouprank.Policy(model, functools.partial(machine.autocast, cache=False))
    return grouprank.Run(cfg, out, PROMPT, local, policy, grouprank.Log(out), items, [], {})


def metrics(out, stage=None):
    """The lines of metrics.jsonl, which hold no NaN and no infinity."""
    text = (out / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    return [line for line in lines if stage in (None, line["stage"])]


def same_weights(model, weights):
    """Whether a model holds exactly these weights."""
    return all(torch.equal(weights[n], w) for n, w in model.state_dict().items())


def reward_letter_e(text, gold, **_):
    """A reward that random weights can earn: the share of the letter e."""
    return grouprank.Reward(text.count("e") / (len(text) + 1), "ok")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_sft_step_descends_the_mean_of_minus_log_p_over_all_response_tokens(checkpointing):
    """Eq. 3 with loops and the library's logits, for any split into passes."""
    model, rng = prepared("qwen2", checkpointing=checkpointing).eval(), np.random.default_rng(3)
    sizes = [(30, 7), (12, 1), (4, 9), (21, 4)]
    items = [grouprank.Item(f"row {p}", random_ids(rng, p), None, random_ids(rng, c))
             for p, c in sizes]
    total = sum(library_logprobs(model, item.prompt, item.response).sum() for item in items)
    (-total / 21).backward()
    expected = gradients(model)
    for max_tokens in (1, 40, 60, 10_000):
        done = grouprank.sft_step(grouprank.Policy(model.eval(), chunk_tokens=4), NoStep(), everything,
                                  items, 0.1, max_tokens)
        assert model.training  # gradient checkpointing works in this mode alone
        assert done.sums["loss"] == pytest.approx(-total.item() / 21)
        assert done.numbers == {"grad_norm": 0.5, "skipped": 0, "lr": 0.1}
        assert done.sums["tokens"] == 21
        assert largest_gap(gradients(model), expected) < 1e-9


def rollouts_of(model, seed=5, lengths=((1, 7, 5, 2, 9), (4, 1, 2, 8, 3), (9, 9, 1, 3, 6))):
    """Three prompts with five answers each: budgets that five does not divide, lengths of 1."""
    rng = np.random.default_rng(seed)
    items = [grouprank.Item(f"row {b}", random_ids(rng, p), (float(b),), None)
             for b, p in enumerate((30, 1, 12))]
    return items, [[grouprank.Sampled(random_ids(rng, n)) for n in row] for row in lengths]


@pytest.mark.parametrize("lora", [False, True])
def test_a_grpo_step_is_equation_7_for_any_order_and_split_packed_or_in_rows(lora):
    """With loops, the library's logits, a reward of our own and a reference that differs."""
    model = prepared("qwen2", lora=lora)
    items, answers = rollouts_of(model)
    cfg = grouprank.Config(kl_coef=0.1, clip_eps=0.2)

    def reward(ids, gold):
        return grouprank.Reward(len(ids) + gold[0] * ids[0], "ok" if ids[0] % 2 else "bad_tags")

    def reference(blocks):  # some other policy
        lengths = [len(ids) for _, rows in blocks for ids in rows]
        return torch.cat([torch.full((n,), -5.5 - n / 10, dtype=torch.float64) for n in lengths])

    objective, kl = 0.0, 0.0
    for item, row in zip(items, answers, strict=True):
        rewards = [len(ids) + item.gold[0] * ids[0] for ids, _ in row]
        mean = sum(rewards) / 5
        deviation = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 4)
        for (ids, _), r in zip(row, rewards, strict=True):
            logp = library_logprobs(model, item.prompt, ids)
            d = -5.5 - len(ids) / 10 - logp
            k3 = torch.exp(d) - d - 1
            ratio = torch.exp(logp - logp.detach())
            tokens = ratio * (r - mean) / (deviation + 1e-4) - 0.1 * k3
            objective, kl = objective + tokens.sum() / len(ids) / 15, kl + k3.sum().item()
    (-objective).backward()
    expected = gradients(model)
    grouprank.share_prompts(model)
    for max_tokens in (10_000, 60, 44, 35, 1):
        for order in ((0, 1, 2), (2, 0, 1)):
            for packed in (True, False):
                if not packed:
                    run_rows(model)
                done = grouprank.grpo_step(
                    grouprank.Policy(model.eval(), chunk_tokens=4), reference, NoStep(),
                    lambda prompts, seeds, order=order: [answers[b] for b in order], reward,
                    everything, [items[b] for b in order], None, 0.3,
                    dataclasses.replace(cfg, max_tokens_per_pass=max_tokens))
                assert largest_gap(gradients(model), expected) < 1e-5
                assert done.sums["loss"] == pytest.approx(-objective.item(), rel=1e-5)
                assert done.sums["kl"] == pytest.approx(kl) and done.sums["tokens"] == 70
                assert model.training  # gradient checkpointing works in this mode alone
            grouprank.share_prompts(model)


def test_the_numbers_of_a_grpo_step_are_means_over_its_rollouts():
    model = prepared("qwen2")
    items, _ = rollouts_of(model)
    answers = [[[5, END], [5, 6, 7, 8]], [], [[6, 9], [7, 8]]]  # none came for the second prompt
    parts = {5: grouprank.Reward(0.5, "ok", 0.25, 0.75, 1.0), 6: grouprank.Reward(-0.5, "bad_tags"),
             7: grouprank.Reward(-0.5, "bad_tags")}
    asked = []

    def answer(prompts, seeds):
        asked.append((prompts, seeds))
        return [[grouprank.Sampled(ids) for ids in row] for row in answers]

    def step(answer):
        return grouprank.grpo_step(
            grouprank.Policy(model), None, NoStep(), answer, lambda ids, gold: parts[ids[0]],
            everything, items, "seeds", 0.3, grouprank.Config(max_tokens_per_pass=100))

    done = step(answer)
    assert asked == [([item.prompt for item in items], "seeds")]
    assert done.numbers == {"dropped": 1, "lr": 0.3, "grad_norm": 0.5, "skipped": 0}
    assert grouprank.reward_numbers(done.rewards) == {
        "reward": 0.0, "reward/ndcg": 0.125, "reward/recall": 0.375, "reward/alignment": 0.5,
        "format_ok": 0.5, "zero_spread": 1.0}
    assert grouprank.answer_numbers(done.answers, [END]) == {
        "completion_tokens": 2.5, "truncated": 0.75, "n_tokens": 10}
    assert done.ids == ["row 0", "row 2"] and done.answers[1][0].ids == [6, 9]
    assert done.rewards == [[parts[5]] * 2, [parts[6], parts[7]]]
    unanswered = step(lambda prompts, seeds: [[], [], []])
    assert unanswered.numbers == {"dropped": 3, "lr": 0.3, "skipped": 1}


def test_a_second_update_keeps_the_old_log_probabilities_and_may_clip():
    model = prepared("qwen2", dtype=torch.float32)
    items, answers = rollouts_of(model)
    cfg = grouprank.Config(clip_eps=1e-4, kl_coef=0.0)
    advantages = np.random.default_rng(0).normal(size=(3, 5))
    optimizer = grouprank.Optimizer(model, grouprank.pick_machine("cpu", "fp32"))
    (part,) = grouprank.build_passes(items, answers, advantages, everything, model, 10_000)

    def update():
        sums = grouprank.grpo_pass(grouprank.Policy(model), None, optimizer, part, cfg)
        optimizer.step(1e-2)
        return sums, part.old_logp.clone()

    (first, old), (second, old_again) = update(), update()
    assert first["clip_share"] == 0 < second["clip_share"] <= second["tokens"]
    assert torch.equal(old, old_again)


def test_two_updates_of_a_batch_are_two_steps_of_the_optimizer():
    """The second one moves on from the first: its ratios are no longer 1. What the server's
    log-probabilities differ by is told once."""
    model = prepared("qwen2", dtype=torch.float32)
    items, answers = rollouts_of(model)
    answers = [[grouprank.Sampled(a.ids, [-5.0] * len(a.ids)) for a in row] for row in answers]
    found = {}
    for n_updates in (1, 2):
        optimizer, steps = grouprank.Optimizer(model, grouprank.pick_machine("cpu", "fp32")), []
        step, cfg = optimizer.step, grouprank.Config(updates_per_batch=n_updates, clip_eps=1e-4, kl_coef=0.0)
        optimizer.step = lambda lr, step=step, steps=steps: (steps.append(lr), step(lr))[1]
        before = copy.deepcopy(model.state_dict())
        done = grouprank.grpo_step(grouprank.Policy(model), None, optimizer, lambda prompts, seeds: answers,
                                   lambda ids, gold: grouprank.Reward(ids[0], "ok"), everything, items, None, 1e-2, cfg)
        assert steps == [1e-2] * n_updates
        found[n_updates] = done.sums
        model.load_state_dict(before)
    assert found[1]["told"] == found[2]["told"] == 70 and found[1]["mismatch"] == found[2]["mismatch"] > 0
    assert found[1]["loss"] != found[2]["loss"]


def test_adam_by_hand():
    """Gradients 3 and 0.5 of one weight: clipped to 1 and not; betas 0.9 and 0.98; no decay."""
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(2.0)
    optimizer = grouprank.Optimizer(model, grouprank.pick_machine("cpu", "fp32"))
    for gradient in (3.0, 0.5):
        optimizer.backward(gradient * model.weight.sum())
        norm = optimizer.step(0.1)["grad_norm"]
        assert norm == gradient
    mean, square = (0.9 * 0.1 + 0.1 * 0.5) / (1 - 0.9**2), (0.98 * 0.02 + 0.02 * 0.25) / (1 - 0.98**2)
    assert model.weight.item() == pytest.approx(2 - 0.1 - 0.1 * mean / math.sqrt(square))


def test_the_reward_of_a_run_is_weighted_as_its_options_say(folders, tmp_path):
    """Two documents, the worse one scored higher: NDCG 1 / log2(3); none reaches the level: recall 0."""
    given = {"ndcg_weight": 2.0, "recall_weight": 0.5, "align_weight": 0.0, "relevance_level": 11.0}
    run = run_for(dataclasses.replace(settings(folders), **given), tmp_path)
    text = '<reason>r</reason><answer>{"[1]": 9, "[2]": 1}</answer>'
    ids = run.local.tokenizer(text, add_special_tokens=False)["input_ids"]
    reward = run.reward([*ids, END], [0, 10])
    assert (reward.status, reward.recall) == ("ok", 0)
    assert reward.total == pytest.approx(2 / math.log2(3))


def test_local_answers_are_sampled_as_the_options_say(folders, tmp_path, monkeypatch):
    run, asked = run_for(settings(folders), tmp_path), []
    monkeypatch.setattr(grouprank, "sample_answers", lambda model, prompts, seeds, **options: (
        asked.append(options), [[[END]] for _ in prompts])[1])  # fmt: skip
    run.local([grouprank.Chat(PROMPT, "query", ("a", "b"), (0,))], 0.6, 0.9)
    run.answer([[5, 6]], [[(0,)]], temperature=0.0)
    assert [(options["temperature"], options["top_p"]) for options in asked] == [(0.6, 0.9), (0.0, 1.0)]


def test_training_rows_are_trimmed_as_the_options_say(folders):
    cfg = settings(folders, max_doc_chars=3, fold_lines=True, answer="direct")
    tokenizer = byte_tokenizer()
    encoder = grouprank.PromptEncoder(tokenizer, 100, 1000)
    row = grouprank.Example("r", "q", ("a\nbcd",), (1.0,), None)
    ((item,), _) = grouprank.encode_rows([row], encoder, PROMPT, cfg)
    assert "a b" in tokenizer.decode(item.prompt) and "a bc" not in tokenizer.decode(item.prompt)


def test_an_answer_ends_like_a_response_or_as_generation_config_says(folders, tmp_path):
    run = run_for(settings(folders), tmp_path)
    assert all(item.response.count(END) == 1 and item.response[-1] == END for item in run.items)
    run.model.generation_config.eos_token_id = [5, 9]
    local = grouprank.LocalModel(run.model, run.local.tokenizer, run.local.machine, run.cfg)
    assert local.end_ids == [END, 5, 9]


def test_a_row_that_comes_twice_in_a_batch_draws_other_answers(folders, tmp_path):
    run = run_for(settings(folders), tmp_path)
    items = [run.items[0], run.items[1], run.items[0]]
    seeds = grouprank.rollout_seeds(items, 3, 17, 2)
    assert seeds[:2] == [[(3, 17, f"row {i}", g) for g in range(2)] for i in range(2)]
    answers = run.answer([item.prompt for item in items], seeds)
    assert len({tuple(a.ids) for row in answers for a in row}) == 6


def test_batches_visit_every_row_once_an_epoch():
    batches = [grouprank.shuffled_batch(10, step, 4, (0, 1)) for step in range(5)]
    rows = [row for batch in batches for row in batch]
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10] != rows[10:]


@pytest.mark.parametrize(("precision", "factor"), [("fp16", math.inf), ("fp32", math.nan)])
def test_a_gradient_that_is_not_finite_moves_nothing_and_halves_the_loss_scale_of_fp16(
    folders, tmp_path, precision, factor
):
    run = run_for(settings(folders, precision=precision), tmp_path)
    optimizer = grouprank.Optimizer(run.model, run.local.machine)
    before, scale = copy.deepcopy(run.model.state_dict()), optimizer.scaler.get_scale()
    optimizer.backward(sum(p.sum() for p in run.model.parameters()) * factor)
    done = optimizer.step(1e-2)
    assert done["skipped"] == 1 and not math.isfinite(done["grad_norm"]) and same_weights(run.model, before)
    assert optimizer.scaler.get_scale() == (scale / 2 if precision == "fp16" else 1)


def test_dropout_is_off_while_training():
    model = tiny_model("qwen2")
    model.model.layers[0].self_attn.attention_dropout = 0.5
    model.model.layers[0].extra = torch.nn.Dropout(0.5)
    grouprank.set_up_training(model, grouprank.Config(lora_rank=0), grouprank.pick_machine("cpu"))
    assert model.model.layers[0].self_attn.attention_dropout == 0.0
    assert model.model.layers[0].extra.p == 0.0


# --- Memory: what would fail late is tried before the first step ----------------------------------


def memory_for(limit, monkeypatch):
    """A pass of more tokens than this runs out of memory, when its gradients are there already."""
    tried, whole = [], grouprank.grpo_pass

    def limited(policy, reference, optimizer, part, cfg):
        tokens = sum(len(prompt) + sum(map(len, rows)) for prompt, rows in part.blocks)
        tried.append((tokens, len(part.blocks[0][0])))
        assert policy.model.training  # as in a step: gradient checkpointing works in this mode
        sums = whole(policy, reference, optimizer, part, cfg)
        if tokens > limit:
            raise torch.OutOfMemoryError("simulated")
        return sums

    monkeypatch.setattr(grouprank, "grpo_pass", limited)
    return tried


@pytest.mark.parametrize("n_answers", [1, 4])
def test_the_tokens_of_a_pass_are_halved_until_the_largest_one_fits(
    folders, tmp_path, monkeypatch, n_answers
):
    """And nothing of the tries stays: no gradient, no moment, and the next step is the same.

    GRPO tries its longest prompt, whatever response SFT would learn from.
    """
    ends = []
    for limit in (math.inf, 700):
        run = run_for(settings(folders), tmp_path)
        optimizer = grouprank.Optimizer(run.model, run.local.machine)
        step = functools.partial(grouprank.sft_step, run.policy, optimizer, everything, run.items,
                                 1e-2, 4096)
        step()
        if limit == 700:
            before, items = copy.deepcopy(run.model.eval().state_dict()), list(run.items)
            if n_answers > 1:
                longest = max(len(item.prompt) for item in items) + 1
                items.append(grouprank.Item("last", [5] * longest, (1.0, 0.0), None))
            with monkeypatch.context() as patch:
                tried = memory_for(limit, patch)
                reference = grouprank.make_reference(run.policy, run.local.machine)
                found = grouprank.fit_memory(run, items, n_answers, reference, optimizer)
            sizes, prompts = zip(*tried, strict=True)
            assert found == 4096 // 2 ** (len(sizes) - 1)
            assert sizes[-1] <= limit < sizes[-2] and sizes[0] > 0.85 * 4096  # a full pass is tried
            assert n_answers == 1 or set(prompts) == {longest}
            assert same_weights(run.model, before)
            assert all(p.grad is None for p in run.model.parameters())
        step()
        ends.append(run.model)
    assert same_weights(ends[1], ends[0].state_dict())


def test_where_not_even_one_answer_fits_the_options_to_lower_are_named(
    folders, tmp_path, monkeypatch
):
    run = run_for(settings(folders), tmp_path)
    memory_for(100, monkeypatch)
    with pytest.raises(ValueError, match="one answer of 80 does not fit.*--max-prompt-tokens,"
                                         " --max-new-tokens or --docs-per-group"):
        grouprank.fit_memory(run, run.items, 4, None,
                             grouprank.Optimizer(run.model, run.local.machine))


def test_a_model_that_shares_no_prompts_is_tried_with_rows_and_a_resumed_run_with_its_own_moments(
    folders, tmp_path, monkeypatch
):
    """A pass of 4,096 tokens holds as many rows [prompt, answer] as fit, not more."""
    run = run_for(settings(folders), tmp_path)
    run_rows(run.model)
    optimizer = grouprank.Optimizer(run.model, run.local.machine)
    tried, made = memory_for(math.inf, monkeypatch), []
    monkeypatch.setattr(grouprank, "grpo_pass", lambda policy, reference, optimizer, part, cfg: tried.append(
        sum(len(prompt) + len(row) for prompt, rows in part.blocks for row in rows)))  # fmt: skip
    monkeypatch.setattr(torch, "zeros_like", lambda *args, like=torch.zeros_like, **options: (
        made.append(1), like(*args, **options))[1])  # fmt: skip
    grouprank.fit_memory(run, run.items, 4, None, optimizer)
    assert 0.85 * 4096 < tried[0] <= 4096
    assert len(made) == 3 * len(optimizer.weights)  # gradients and two moments
    grouprank.sft_step(run.policy, optimizer, everything, run.items, 1e-2, 4096)
    made.clear()
    grouprank.fit_memory(run, run.items, 4, None, optimizer)
    assert len(made) == len(optimizer.weights)


def test_the_passes_of_grpo_are_tried_before_the_supervised_stage_begins(folders, tmp_path, monkeypatch):
    """Not hours later; a stage alone is tried alone."""
    tried, answers = [], {"sft": [1], "grpo": [4], "both": [1, 4]}
    monkeypatch.setattr(grouprank, "fit_memory", lambda run, items, n, *rest: tried.append(n) or 4096)
    for stage, expected in answers.items():
        cfg = settings(folders, stage=stage, rollouts_per_prompt=4, max_tokens_per_pass=4096)
        run = run_for(cfg, tmp_path)
        run.local.machine = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
        monkeypatch.setattr(grouprank, "check_packing", lambda *rest: None)
        tried.clear()
        grouprank.start_stage(run, "grpo" if stage == "grpo" else "sft", run.items, None, None)
        assert tried == expected


def test_memory_that_pytorch_holds_and_does_not_use_is_room_for_the_cache(folders, tmp_path, monkeypatch):
    run = run_for(settings(folders), tmp_path)
    run.local.machine = grouprank.Machine(torch.device("cuda"), torch.float32)  # so it says
    for name, gib in (("memory_reserved", 7), ("memory_allocated", 2)):
        monkeypatch.setattr(torch.cuda, name, lambda device, gib=gib: gib * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**30, 80 * 2**30))
    of_eight_gib = run.local.cache_tokens()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (11 * 2**30, 80 * 2**30))
    assert run.local.cache_tokens() == pytest.approx(2 * of_eight_gib, abs=1)


def test_on_cuda_adam_is_fused_and_takes_the_state_of_one_that_is_not(folders, tmp_path):
    run = run_for(settings(folders), tmp_path)
    plain = grouprank.Optimizer(run.model, run.local.machine)
    grouprank.sft_step(run.policy, plain, everything, run.items, 1e-2, 4096)
    fused = grouprank.Optimizer(run.model, grouprank.Machine(torch.device("cuda"), torch.float32))
    fused.load(copy.deepcopy(plain.state()))
    assert [o.adam.param_groups[0]["fused"] for o in (plain, fused)] == [False, True]
    before = copy.deepcopy(run.model.state_dict())
    grouprank.sft_step(run.policy, fused, everything, run.items, 1e-2, 4096)
    assert not same_weights(run.model, before)


def test_on_a_gpu_memory_is_tried_before_the_first_step_and_what_fits_is_kept(
    folders, tmp_path, monkeypatch, capsys
):
    run = run_for(settings(folders), tmp_path)
    run.local.machine = grouprank.Machine(torch.device("cuda"), torch.float32)  # so it says
    memory_for(700, monkeypatch)
    optimizer = grouprank.Optimizer(run.model, grouprank.pick_machine("cpu"))
    grouprank.start_stage(run, "sft", run.items, None, optimizer)
    fitting = run.cfg.max_tokens_per_pass
    assert fitting in (512, 1024)
    assert f"memory suffices for --max-tokens-per-pass {fitting}" in capsys.readouterr().out
    assert json.loads((tmp_path / "run.json").read_text())["max_tokens_per_pass"] == fitting


# --- Whole runs -----------------------------------------------------------------------------------


def test_where_training_begins_with_grpo_the_best_model_is_measured_from_there_on(folders, tmp_path, monkeypatch):
    """A model that GRPO makes worse is not the best one."""
    monkeypatch.setattr(grouprank, "score_completion", lambda text, gold, **_: grouprank.Reward(
        1.0, "ok", ndcg=1.0 if len(untouched) else 0.5))  # fmt: skip
    untouched, step = [True], grouprank.Optimizer.step
    monkeypatch.setattr(grouprank.Optimizer, "step", lambda *args: (untouched.clear(), step(*args))[1])
    data = str(folders / "rows.jsonl")
    grouprank.train(settings(folders, stage="grpo", eval_data=data), PROMPT, tmp_path / "run")
    evaluated = [(line["step"], line["eval/ndcg@10"]) for line in metrics(tmp_path / "run") if "eval/ndcg@10" in line]
    assert evaluated[0] == (0, 1.0) and evaluated[-1][1] == 0.5
    assert json.loads((tmp_path / "run" / "best" / "meta.json").read_text())["step"] == 0


def test_packed_rows_that_differ_from_separate_ones_are_not_used(
    folders, tmp_path, monkeypatch, capsys
):
    """With a wrong packed attention, training is that of separate rows, and says why."""
    monkeypatch.setattr(grouprank, "score_completion", reward_letter_e)
    cfg = settings(folders, stage="grpo")
    with monkeypatch.context() as patch:
        patch.setattr(grouprank, "share_prompts", run_rows)
        expected = grouprank.train(cfg, PROMPT, tmp_path / "rows").model.state_dict()

    def upper_left(query, key, value, prompt_key, prompt_value, mask, scaling):
        return grouprank.causal_attention(query, key, value, scaling)  # nothing of the prompt

    monkeypatch.setattr(grouprank, "attend_completions", upper_left)
    run = grouprank.train(cfg, PROMPT, tmp_path / "wrong")
    assert "packed and separate rows differ" in capsys.readouterr().out
    assert not grouprank.shares_prompts(run.model)
    found = run.model.state_dict()
    assert all(torch.allclose(found[name], w, atol=1e-5) for name, w in expected.items())


def test_a_model_whose_attention_slides_trains_on_separate_rows(
    folders, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(grouprank, "score_completion", reward_letter_e)
    config = transformers.Qwen2Config(**tiny_model("qwen2", 300).config.to_dict() | {
        "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1,
        "layer_types": ["full_attention", "sliding_attention"]})
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    cfg = settings(folders, model=str(tmp_path / "model"), stage="grpo")
    run = grouprank.train(cfg, PROMPT, tmp_path / "out")
    assert not grouprank.shares_prompts(run.model)
    assert all(line["grad_norm"] > 0 and line["kl"] < 0.1 for line in metrics(tmp_path / "out"))
    note = "note: prompts are run once for each answer, as not all of the model's layers"
    assert note in capsys.readouterr().out


def test_equal_rewards_leave_the_weights_where_they_are(folders, tmp_path):
    """Random weights never write an answer: every reward is -0.5, and every advantage 0."""
    cfg = settings(folders, stage="grpo", kl_coef=0.0)
    run = grouprank.train(cfg, PROMPT, tmp_path)
    lines = metrics(tmp_path)
    assert all(line["zero_spread"] == 1 and line["grad_norm"] == 0 for line in lines)
    assert all(line["reward"] == -0.5 and line["format_ok"] == 0 for line in lines)
    original, _ = grouprank.load_model(cfg.model, run.local.machine, trainable=True)
    assert same_weights(run.model, original.state_dict())


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_trains_in_both_stages(folders, tmp_path, monkeypatch, kind, lora_rank):
    monkeypatch.setattr(grouprank, "score_completion", reward_letter_e)
    cfg = settings(folders, kind, lora_rank=lora_rank, max_new_tokens=70, updates_per_batch=2)
    grouprank.train(cfg, PROMPT, tmp_path)
    sft, grpo = metrics(tmp_path, "sft"), metrics(tmp_path, "grpo")
    assert sft[-1]["loss"] < sft[0]["loss"]
    assert len(grpo) == 2 and all(math.isfinite(line["grad_norm"]) for line in grpo)
    assert grpo[0]["grad_norm"] > 0
    final, cold_start = (grouprank.load_model(str(path), grouprank.pick_machine("cpu"))[0]
                         for path in (tmp_path, tmp_path / "sft"))  # ordinary folders
    assert final.state_dict().keys() == cold_start.state_dict().keys()
    assert not same_weights(final, cold_start.state_dict())
    assert (tmp_path / "adapter" / "adapter_config.json").exists() == (lora_rank > 0)
    if lora_rank:  # the final model is the cold start with the adapter
        peft, ids = pytest.importorskip("peft"), torch.arange(3, 60)[None]
        adapted = peft.PeftModel.from_pretrained(cold_start, tmp_path / "adapter").eval()
        assert torch.allclose(adapted(ids).logits, final(ids).logits, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_both_stages_train_float32_weights_in_mixed_precision(
    folders, tmp_path, monkeypatch, precision
):
    cfg = settings(folders, precision=precision, stage="sft", sft_epochs=6.0)
    run = grouprank.train(cfg, PROMPT, tmp_path / "sft")
    lines = metrics(tmp_path / "sft")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    monkeypatch.setattr(grouprank, "score_completion", reward_letter_e)
    cfg = settings(folders, stage="grpo", precision=precision, lora_rank=4, grad_checkpointing="on")
    grouprank.train(cfg, PROMPT, tmp_path / "grpo")
    lines = metrics(tmp_path / "grpo")
    assert all(math.isfinite(line["grad_norm"]) and line["skipped"] == 0 for line in lines)
    assert lines[0]["grad_norm"] > 0 and lines[0]["kl"] < 1e-6


@pytest.mark.parametrize("good", [10**9, 10])
def test_ten_steps_in_a_row_that_move_nothing_stop_a_run_and_name_their_rows(
    folders, tmp_path, monkeypatch, good
):
    """With every tenth step good, nine in a row never become ten."""
    taken = []

    def step(self, lr):
        self.adam.zero_grad()
        taken.append(lr)
        skipped = int(len(taken) % good > 0)
        return {"grad_norm": math.inf if skipped else 1.0, "skipped": skipped, "lr": lr}

    monkeypatch.setattr(grouprank.Optimizer, "step", step)
    cfg = settings(folders, stage="sft", sft_epochs=10.0, sft_batch=2)
    if good == 10:
        grouprank.train(cfg, PROMPT, tmp_path)
        assert len(taken) == 20
    else:
        with pytest.raises(ValueError, match="sft step 10: 10 steps.*'row [0-3]', 'row [0-3]'"):
            grouprank.train(cfg, PROMPT, tmp_path)
    assert sum(line["skipped"] for line in metrics(tmp_path)) == (18 if good == 10 else 10)


class Stop(BaseException):
    """Stands for a kill."""


def stop_after(n, patch):
    """Kill the run when it has logged n steps."""
    write, steps = grouprank.Log.write, []

    def counted(self, stage, step, *rest):
        write(self, stage, step, *rest)
        steps.append(step)
        if len(steps) == n:
            raise Stop

    patch.setattr(grouprank.Log, "write", counted)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    folders, tmp_path, monkeypatch, lora_rank
):
    """From a bfloat16 folder: what OUT/sft rounds must be rounded in the uninterrupted run too."""
    monkeypatch.setattr(grouprank, "score_completion", reward_letter_e)
    tiny_model("qwen2", 300).to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    byte_tokenizer().save_pretrained(tmp_path / "bf16")
    cfg = settings(tmp_path, "bf16", data=str(folders / "rows.jsonl"), save_every=1,
                   lora_rank=lora_rank, grpo_epochs=2.0, max_new_tokens=70, sft_warmup=0.5,
                   grpo_warmup=0.4, grpo_schedule="linear")
    whole = grouprank.train(cfg, PROMPT, tmp_path / "whole")
    for stage, *schedule in (("sft", cfg.sft_lr, 0.5, "cosine"), ("grpo", cfg.grpo_lr, 0.4, "linear")):
        rates = [line["lr"] for line in metrics(tmp_path / "whole", stage)]
        assert rates == [grouprank.learning_rate(i, len(rates), *schedule) for i in range(len(rates))]
    resumed, out = dataclasses.replace(cfg, resume=True), tmp_path / "stopped"
    for again in (cfg, resumed, resumed):  # in SFT, at the first GRPO step, in GRPO
        with monkeypatch.context() as patch, pytest.raises(Stop):
            stop_after(2, patch)
            grouprank.train(again, PROMPT, out)
    run = grouprank.train(resumed, PROMPT, out)
    assert same_weights(run.model, whole.model.state_dict())
    for name in ("model.safetensors", "config.json", "sft/model.safetensors", "sft/config.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"

    def untimed(folder):
        timed = {"seconds", "tokens_per_s", "rollout_s"}
        return [{k: v for k, v in line.items() if k not in timed} for line in metrics(folder)]

    assert untimed(out) == untimed(tmp_path / "whole")
    assert run.seconds.keys() == whole.seconds.keys() == {"sft", "grpo", "train"}


def test_training_rows_may_begin_with_a_byte_order_mark_and_be_packed(tmp_path):
    plain = write_rows(tmp_path / "rows.jsonl", training_rows())
    text = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "bom.jsonl").write_text(text, encoding="utf-8-sig")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("bom.jsonl", "rows.jsonl.gz"):
        assert grouprank.read_rows(str(tmp_path / name)) == grouprank.read_rows(plain)


def test_resume_refuses_other_settings_and_changed_data(folders, tmp_path):
    rows = training_rows(2)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    cfg = settings(folders, data=data, stage="sft", sft_epochs=1.0, save_every=1)
    grouprank.train(cfg, PROMPT, tmp_path / "run")
    resumed = dataclasses.replace(cfg, resume=True)
    with pytest.raises(ValueError, match="was begun with sft_lr 0.01, not 0.02"):
        grouprank.train(dataclasses.replace(resumed, sft_lr=0.02), PROMPT, tmp_path / "run")
    write_rows(data, rows[:1])
    with pytest.raises(ValueError, match="was begun with data"):
        grouprank.train(resumed, PROMPT, tmp_path / "run")


def test_sft_overfits_the_authors_two_rows_and_returns_their_scores(real_data, tmp_path):
    """Two real groups of ten, of whose reasons the beginning stays: after SFT from random weights,
    greedy decoding is the target."""
    rows = []
    for line in (real_data / "diver_sample" / "groupwise_sft_data_example.jsonl").open():
        sample = json.loads(line)
        pieces = sample["instruction"].split("\n[")
        texts = [p.partition("]. ")[2] for p in pieces if p.partition("]")[0].isdigit()]
        rows.append({"id": sample["item_id"], "query": sample["query"],
                     "docs": [{"id": str(i), "text": text} for i, text in enumerate(texts)],
                     "scores": grouprank.parse_answer(sample["output"], len(texts)).scores,
                     "response": sample["output"][:300] + sample["output"][sample["output"].index("</reason>"):]})
    assert [len(row["docs"]) for row in rows] == [10, 10]
    save_tiny_model(tmp_path / "model", texts=[row["response"] for row in rows], vocab_size=1000,
                    width=64)
    cfg = settings(tmp_path, "model", data=write_rows(tmp_path / "rows.jsonl", rows), stage="sft",
                   max_doc_tokens=8, sft_epochs=100.0, sft_batch=2, max_new_tokens=300)
    run = grouprank.train(cfg, PROMPT, tmp_path / "run")
    answers = run.answer([item.prompt for item in run.items], [[(0,)]] * 2, temperature=0.0)
    for (found,), row in zip(answers, rows, strict=True):
        answer = grouprank.parse_answer(run.local.text(found.ids), 10)
        assert (answer.status, answer.scores) == ("ok", row["scores"])


@pytest.mark.parametrize("kind", ["Cohere", "Granite"])
def test_models_that_scale_their_logits_are_refused(tmp_path, kind):
    """Applying the head alone would sample and train another distribution, silently."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if kind == "Granite":
        config.logits_scaling = 4.0
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    torch.nn.init.normal_(model.get_output_embeddings().weight)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="changes its logits after the head"):
        grouprank.load_model(str(tmp_path), grouprank.pick_machine("cpu"))


def test_a_checkpoint_without_its_head_is_refused_not_filled_with_random_weights(tmp_path):
    model = tiny_model("llama")  # its head is a tensor of its own
    weights = {n: w for n, w in model.state_dict().items() if n != "lm_head.weight"}
    model.save_pretrained(tmp_path, state_dict=weights)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no lm_head.weight"):
        grouprank.load_model(str(tmp_path), grouprank.pick_machine("cpu"))
    tied = save_tiny_model(tmp_path / "tied", "qwen2")  # here the head is the embedding
    grouprank.load_model(str(tied), grouprank.pick_machine("cpu"))
