"""Model, LoRA, token log-probabilities, decoding and both training stages, on tiny models."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers
from conftest import ARCHITECTURES, save_tiny_model, tiny_model, write_rows

import grouprank

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
END = 2


def random_ids(rng, n):
    """n token ids that are not special."""
    return rng.integers(3, 400, n).tolist()


def blocks_of(seed=0, prompts=(30, 1, 12), completions=((1, 7, 5), (4, 2), (9, 9, 1, 3))):
    """Prompts with completions of various lengths; one prompt has a single token."""
    rng = np.random.default_rng(seed)
    return [
        (random_ids(rng, p), [random_ids(rng, c) for c in lengths])
        for p, lengths in zip(prompts, completions, strict=True)
    ]


def prepared(kind, *, lora=False, checkpointing=False, dtype=torch.float64):
    """A tiny model in training mode, with adapters that are not zero."""
    model = tiny_model(kind)
    if lora:
        grouprank.add_lora(model, rank=4, alpha=8.0)
        for layer in grouprank.lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.1)
    if checkpointing:
        grouprank.recompute_activations(model)
    grouprank.share_prompts(model, True)
    return model.to(dtype).train()


def loss_and_gradients(model, blocks, shared, weights=None, chunk_tokens=4):
    """A weighted sum of log-probabilities and the gradient of every trained tensor."""
    model.zero_grad()
    logp, entropy = grouprank.completion_logprobs(
        grouprank.Policy(model, chunk_tokens), blocks, "cpu", shared
    )
    weights = torch.linspace(-1, 1, len(logp)) if weights is None else weights
    (logp * weights.to(logp.dtype)).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logp.detach(), entropy, grads


def largest_gap(grads, others):
    """max over tensors of ||difference|| / ||gradient||."""
    assert grads.keys() == others.keys() and grads
    largest = max(g.norm() for g in others.values())
    return max(
        ((g - others[n]).norm() / others[n].norm().clamp(min=1e-3 * largest)).item()
        for n, g in grads.items()
    )


# --- Packed rows against separate rows --------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_running_a_prompt_once_gives_the_same_numbers_and_gradients(kind, lora, checkpointing):
    blocks = blocks_of()
    for dtype, logp_gap, grad_gap in ((torch.float64, 1e-6, 1e-5), (torch.float32, 5e-5, 1e-4)):
        model = prepared(kind, lora=lora, checkpointing=checkpointing, dtype=dtype)
        packed = loss_and_gradients(model, blocks, shared=True)
        rows = loss_and_gradients(model, blocks, shared=False)
        assert (packed[0] - rows[0]).abs().max() < logp_gap
        assert (packed[1] - rows[1]).abs().max() < 10 * logp_gap
        assert largest_gap(packed[2], rows[2]) < grad_gap


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_log_probabilities_are_those_of_the_library(kind):
    model = tiny_model(kind).double()
    (prompt, completions), *_ = blocks = blocks_of()
    expected = []
    for completion in completions:
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        expected.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0])
    grouprank.share_prompts(model, True)
    logp, _ = grouprank.completion_logprobs(grouprank.Policy(model), blocks[:1], "cpu", True)
    assert torch.allclose(logp, torch.cat(expected), atol=1e-9)


def test_padding_and_the_order_of_rows_change_nothing():
    model = prepared("qwen2")
    blocks = blocks_of()
    alone = [grouprank.completion_logprobs(grouprank.Policy(model), [b], "cpu", False)[0] for b in blocks]
    together, _ = grouprank.completion_logprobs(grouprank.Policy(model), blocks, "cpu", False)
    backwards, _ = grouprank.completion_logprobs(
        grouprank.Policy(model), blocks[::-1], "cpu", False
    )
    assert torch.allclose(together, torch.cat(alone), atol=1e-7)
    assert torch.allclose(backwards, torch.cat(alone[::-1]), atol=1e-7)


def test_entropy_is_that_of_the_next_token_distribution():
    hidden, head = torch.randn(5, 8), torch.nn.Linear(8, 11)
    _, entropy = grouprank.token_logprobs(head, hidden, torch.zeros(5, dtype=torch.long))
    expected = torch.distributions.Categorical(logits=head(hidden)).entropy()
    assert torch.allclose(entropy, expected, atol=1e-6)


@pytest.mark.parametrize("shared", [True, False])
def test_passes_hold_every_completion_once_and_obey_the_budget(shared):
    prompts, lengths = [30, 5, 100], [[3, 40, 7, 9], [1, 1], [20] * 5]
    for budget in (10, 60, 140, 1000):
        passes = grouprank.plan_passes(prompts, lengths, budget, shared)
        seen = [(b, g) for chunk in passes for b, gs in chunk for g in gs]
        assert sorted(seen) == [(b, g) for b in range(3) for g in range(len(lengths[b]))]
        for chunk in passes:
            sizes = [prompts[b] + sum(lengths[b][g] for g in gs) for b, gs in chunk]
            tokens = sum(sizes) if shared else len(sizes) * max(sizes)
            assert tokens <= budget or sum(len(gs) for _, gs in chunk) == 1


# --- LoRA -------------------------------------------------------------------------------------


def test_lora_starts_at_the_base_model_and_trains_every_adapter():
    model = tiny_model("qwen3")
    ids = torch.arange(3, 40)[None]
    before = model(ids).logits
    n_layers = grouprank.add_lora(model, rank=4, alpha=8.0)
    assert n_layers == 2 * 7  # q, k, v, o, gate, up and down of two layers; not the head
    assert torch.equal(model(ids).logits, before)
    grouprank.recompute_activations(model)
    model.train()
    machine = grouprank.pick_machine("cpu", "fp32")
    optimizer = grouprank.Optimizer(model, machine, grad_clip=1.0, weight_decay=0.0)
    optimizer.backward(-model(ids).logits.log_softmax(-1)[..., 5].mean())
    optimizer.step(1e-2)
    layers = grouprank.lora_layers(model)
    assert all(layer.lora_B.norm() > 0 for layer in layers.values())
    assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())
    with grouprank.lora_disabled(model):
        assert torch.allclose(model(ids).logits, before, atol=1e-6)
    assert not torch.allclose(model(ids).logits, before, atol=1e-3)


def test_a_merged_model_gives_the_same_logits_and_ordinary_names():
    model = prepared("qwen2", lora=True, dtype=torch.float32).eval()
    ids = torch.arange(3, 40)[None]
    grouprank.share_prompts(model, False)
    before = model(ids).logits
    weights = grouprank.plain_state_dict(model)
    grouprank.merge_lora(model)
    assert torch.allclose(model(ids).logits, before, atol=1e-5)
    assert weights.keys() == tiny_model("qwen2").state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(weights[n], t) for n, t in model.state_dict().items())


def test_our_adapters_load_in_peft_and_peft_adapters_load_here(tmp_path):
    peft = pytest.importorskip("peft")
    ids = torch.arange(3, 40)[None]
    model = prepared("qwen2", lora=True, dtype=torch.float32).eval()
    grouprank.share_prompts(model, False)
    expected = model(ids).logits
    grouprank.save_adapter(model, tmp_path / "ours", "base")
    theirs = peft.PeftModel.from_pretrained(tiny_model("qwen2"), tmp_path / "ours").eval()
    assert torch.allclose(theirs(ids).logits, expected, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = tiny_model("qwen2")
    grouprank.load_adapter(loaded, tmp_path / "theirs")
    assert torch.allclose(loaded(ids).logits, expected, atol=1e-5)


# --- Decoding ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_greedy_decoding_equals_generate_of_the_library(kind, shared):
    model, rng = tiny_model(kind), np.random.default_rng(1)
    prompts = [random_ids(rng, n) for n in (17, 1, 6)]
    expected = [
        model.generate(torch.tensor([p]), max_new_tokens=15, do_sample=False, eos_token_id=END)
        for p in prompts
    ]
    grouprank.share_prompts(model, shared)
    answers = grouprank.generate(
        model, prompts, [[(0,)]] * 3, max_new_tokens=15, end_ids=[END], temperature=0.0, shared=shared
    )
    for prompt, (answer,), ids in zip(prompts, answers, expected, strict=True):
        assert answer == ids[0, len(prompt) :].tolist()


def sample_all(model, prompts, n_answers, **options):
    """Sample with many end tokens, so that answers end at different steps."""
    seeds = [[(7, f"prompt {len(p)}", g) for g in range(n_answers)] for p in prompts]
    options = {"max_new_tokens": 40, "end_ids": list(range(2, 30))} | options
    return grouprank.generate(model, prompts, seeds, **options)


def test_what_is_drawn_does_not_depend_on_the_batch():
    model, rng = tiny_model("qwen2"), np.random.default_rng(2)
    grouprank.share_prompts(model, True)
    prompts = [random_ids(rng, n) for n in (25, 3, 11, 8)]
    together = sample_all(model, prompts, 6)
    assert len({len(a) for answers in together for a in answers}) > 5  # rows ended one by one
    alone = [sample_all(model, [p], 6)[0] for p in prompts]
    small_waves = sample_all(model, prompts, 6, cache_gib=1e-9)
    assert together == alone == small_waves
    grouprank.share_prompts(model, False)
    assert sample_all(model, prompts, 6, shared=False) == together


@pytest.mark.parametrize("shared", [True, False])
def test_answers_that_ended_are_dropped_from_the_batch(shared):
    model = tiny_model("qwen2")
    grouprank.share_prompts(model, shared)
    sizes = []
    model.get_decoder().layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(args[0].shape[0]), with_kwargs=True
    )
    prompts = [random_ids(np.random.default_rng(2), n) for n in (25, 3)]
    answers = sample_all(model, prompts, 8, shared=shared)
    decoded = sizes[1:]  # the first call is the prompts'
    assert decoded[0] == 16 and decoded[-1] <= 4 and decoded == sorted(decoded, reverse=True)
    assert max(len(a) for row in answers for a in row) == len(sizes)


def test_samples_follow_the_exact_next_token_distribution():
    """Chi-square over 20,000 draws of the first two tokens with a vocabulary of 8."""
    model = tiny_model("qwen2", vocab_size=8, seed=3)
    grouprank.share_prompts(model, True)
    seeds = [[(i,) for i in range(20_000)]]
    (answers,) = grouprank.generate(model, [[3, 5, 6]], seeds, max_new_tokens=2, end_ids=[7])
    first = model(torch.tensor([[3, 5, 6]])).logits[0, -1].softmax(-1)
    expected = torch.zeros(8, 9)
    expected[7, 8] = first[7]  # the end token is followed by nothing
    for token in range(7):
        second = model(torch.tensor([[3, 5, 6, token]])).logits[0, -1].softmax(-1)
        expected[token, :8] = first[token] * second
    counts = torch.zeros(8, 9)
    for answer in answers:
        counts[answer[0], answer[1] if len(answer) > 1 else 8] += 1
    likely = expected > 0
    difference = (counts - 20_000 * expected)[likely] ** 2 / (20_000 * expected[likely])
    degrees = int(likely.sum()) - 1
    assert counts[~likely].sum() == 0
    assert difference.sum() < degrees + 4 * (2 * degrees) ** 0.5  # four standard deviations


def test_sampling_honours_temperature_and_nucleus():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(1000, -1)
    uniforms = torch.linspace(0, 0.999, 1000, dtype=torch.float64)
    plain = grouprank.sample_tokens(logits, uniforms, 1.0, 1.0).bincount(minlength=4)
    assert torch.allclose(plain / 1000, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.002)
    nucleus = grouprank.sample_tokens(logits, uniforms, 1.0, 0.7).bincount(minlength=4)
    assert torch.allclose(nucleus / 1000, torch.tensor([0.5, 0.3, 0, 0]) / 0.8, atol=0.002)
    cold = grouprank.sample_tokens(logits, uniforms, 0.5, 1.0).bincount(minlength=4)
    squares = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    assert torch.allclose(cold / 1000, squares / squares.sum(), atol=0.002)
    assert (grouprank.sample_tokens(logits, uniforms, 0.0, 1.0) == 0).all()


def test_every_end_token_of_tokenizer_and_generation_config_counts():
    model = tiny_model("qwen2")
    model.generation_config.eos_token_id = [5, 9]
    tokenizer = type("Tokenizer", (), {"eos_token_id": END})
    assert grouprank.end_token_ids(model, tokenizer) == [2, 5, 9]


def test_waves_fit_the_cache_budget_with_the_longest_prompts_first():
    waves = grouprank.plan_waves([10, 50, 20, 40], 2, 5, budget_tokens=130)
    assert waves == [[1, 3], [2, 0]]
    assert grouprank.plan_waves([500], 8, 100, budget_tokens=10) == [[0]]
    assert grouprank.plan_waves([10, 50, 20, 40], 2, 5, 130, shared=False) == [[1], [3], [2, 0]]


# --- Training ---------------------------------------------------------------------------------

RESPONSES = [
    '<reason>the first</reason><answer>{"[1]": 9, "[2]": 0}</answer>',
    '<reason>the second, clearly</reason><answer>{"[1]": 1, "[2]": 8}</answer>',
]
PROMPT = grouprank.Prompt(system="", user="{query}\n{documents}")


def training_rows(n=4):
    """Rows with a response and scores."""
    return [
        {
            "id": f"row {i}",
            "query": "which one?" * (1 + i % 2),
            "docs": [{"id": "a", "text": f"yes {i}"}, {"id": "b", "text": "no " * (i + 1)}],
            "scores": [9, 0] if i % 2 == 0 else [1, 8],
            "response": RESPONSES[i % 2],
        }
        for i in range(n)
    ]


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
        "device": "cpu", "precision": "fp32", "save_every": 0,
    }  # fmt: skip
    return grouprank.Config(**(values | changes))


def job_for(cfg, tmp_path):
    """A Job on the tiny model, as train() makes it."""
    machine = grouprank.pick_machine(cfg.device, cfg.precision)
    tokenizer = grouprank.load_tokenizer(cfg.model)
    model = grouprank.load_model(cfg.model, machine, trainable=cfg.lora_rank == 0)
    encoder = grouprank.PromptEncoder(tokenizer, max_doc_tokens=100, max_prompt_tokens=400)
    rows = grouprank.read_rows(cfg.data)
    items, _ = grouprank.encode_rows(rows, encoder, PROMPT, cfg.max_new_tokens)
    grouprank.share_prompts(model, cfg.shared_prompt)
    grouprank.set_up_training(model, cfg, machine)
    log = grouprank.Log(tmp_path)
    return grouprank.Job(
        cfg, tmp_path, machine, model, tokenizer, PROMPT, log, items, [], cfg.shared_prompt
    )


def reward_letter_e(text, gold, **_):
    """A reward that random weights can earn: the share of the letter e."""
    return grouprank.Reward(text.count("e") / (len(text) + 1), "ok")


def gradients_of(job):
    """Gradients of the trained weights, and clear them."""
    grads = {n: p.grad.clone() for n, p in job.model.named_parameters() if p.grad is not None}
    job.model.zero_grad()
    return grads


class NoStep(grouprank.Optimizer):
    """Leaves the gradients for the test to look at."""

    def step(self, lr):
        return 0.0, True


def sft_gradients(cfg, tmp_path):
    """Gradients of one SFT step."""
    job = job_for(cfg, tmp_path)
    optimizer = NoStep(job.model, job.machine, grad_clip=1.0, weight_decay=0.0)
    grouprank.sft_step(job, grouprank.Policy(job.model), job.items, 10, optimizer, 0)
    return gradients_of(job)


def test_sft_gradient_does_not_depend_on_the_split_into_passes(folders, tmp_path):
    whole = sft_gradients(settings(folders), tmp_path)
    for tokens in (1, 150, 260):
        split = sft_gradients(settings(folders, max_tokens_per_pass=tokens), tmp_path)
        assert largest_gap(split, whole) < 1e-5


def test_gradient_checkpointing_does_not_change_the_gradient(folders, tmp_path):
    plain = sft_gradients(settings(folders, grad_checkpointing="off"), tmp_path)
    recomputed = sft_gradients(settings(folders, grad_checkpointing="on"), tmp_path)
    assert largest_gap(recomputed, plain) < 1e-6


def test_the_end_token_is_trained_and_the_prompt_is_not(folders, tmp_path):
    job = job_for(settings(folders), tmp_path)
    item = job.items[0]
    assert item.response[-1] == job.tokenizer.eos_token_id == END
    _, _, predictors, targets, _ = grouprank.packed_inputs([(item.prompt, [item.response])], "cpu")
    assert targets.tolist() == item.response  # nothing of the prompt, the end token included
    assert predictors[0] == len(item.prompt) - 1  # the last prompt token predicts the first


@pytest.mark.parametrize("shared", [True, False])
def test_grpo_gradient_does_not_depend_on_the_split_into_passes(
    folders, tmp_path, monkeypatch, shared
):
    monkeypatch.setattr(grouprank, "score_completion", reward_letter_e)
    gradients = []
    for tokens in (100_000, 300, 1):
        cfg = settings(folders, max_tokens_per_pass=tokens, shared_prompt=shared, kl_coef=0.05)
        job = job_for(cfg, tmp_path)
        policy = grouprank.Policy(job.model)
        reference = grouprank.Reference(job, policy)
        with torch.no_grad():  # a reference that differs, so that the KL term counts
            for weight in job.model.parameters():
                weight.add_(0.01)
        batch = grouprank.collect_rollouts(job, job.items[:2], 0)
        totals = [[r.total for r in row] for row in batch.rewards]
        advantages = grouprank.relative_advantages(totals)
        passes = grouprank.build_passes(batch, advantages, cfg, shared, "cpu")
        optimizer = NoStep(job.model, job.machine, grad_clip=1.0, weight_decay=0.0)
        numbers = grouprank.policy_update(job, policy, reference, passes, optimizer, 0.0)
        assert numbers["kl"] > 0
        gradients.append(gradients_of(job))
    assert largest_gap(gradients[1], gradients[0]) < 1e-4
    assert largest_gap(gradients[2], gradients[0]) < 1e-4


@pytest.mark.parametrize("lora", [False, True])
def test_any_split_and_order_gives_the_gradient_of_one_pass_of_rows(lora):
    """In float64: five answers a prompt in budgets that five does not divide, lengths of 1."""
    rng = np.random.default_rng(5)
    lengths = [(30, (1, 7, 5, 2, 9)), (1, (4, 1, 2, 8, 3)), (12, (9, 9, 1, 3, 6))]
    items = [grouprank.Item(f"i{n}", random_ids(rng, n), None, None) for n, _ in lengths]
    answers = [[random_ids(rng, c) for c in cs] for _, cs in lengths]
    advantages = grouprank.relative_advantages(rng.random((3, 5)))
    model = prepared("qwen2", lora=lora)
    policy = grouprank.Policy(model, 4)

    def gradient(order, max_tokens, shared):
        batch = grouprank.RolloutBatch(
            [items[b] for b in order], [answers[b] for b in order], [], [], None)
        cfg = grouprank.Config(max_tokens_per_pass=max_tokens)
        passes = grouprank.build_passes(batch, advantages[list(order)], cfg, shared, "cpu")
        model.zero_grad()
        for part in passes:
            logp, _ = grouprank.completion_logprobs(policy, part.blocks, "cpu", shared)
            ref = 0.9 * logp.detach()  # some other policy
            grouprank.grpo_loss(logp, logp.detach(), ref, part.advantages, part.weights,
                                kl_coef=0.1).backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return grads, len(passes)

    expected, n_passes = gradient((0, 1, 2), 10_000, shared=False)
    assert n_passes == 1
    for max_tokens in (10_000, 60, 44, 35, 1):
        for order in ((0, 1, 2), (2, 0, 1)):
            for shared in (True, False):
                found, n_passes = gradient(order, max_tokens, shared)
                assert n_passes > 1 or max_tokens == 10_000
                assert largest_gap(found, expected) < 1e-5


def test_a_second_update_keeps_the_old_log_probabilities_and_may_clip(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(grouprank, "score_completion", reward_letter_e)
    cfg = settings(folders, clip_eps=1e-4, kl_coef=0.0)
    job = job_for(cfg, tmp_path)
    batch = grouprank.collect_rollouts(job, job.items[:2], 0)
    advantages = grouprank.relative_advantages([[r.total for r in row] for row in batch.rewards])
    passes = grouprank.build_passes(batch, advantages, cfg, True, "cpu")
    optimizer = grouprank.Optimizer(job.model, job.machine, grad_clip=1.0, weight_decay=0.0)
    update = (job, grouprank.Policy(job.model), None, passes, optimizer, 1e-2)
    first = grouprank.policy_update(*update)
    old = [part.old_logp.clone() for part in passes]
    second = grouprank.policy_update(*update)
    assert first["clip_share"] == 0 < second["clip_share"]
    assert all(torch.equal(part.old_logp, o) for part, o in zip(passes, old, strict=True))


def aligned_upper_left(query, key, value, prompt_key, prompt_value, lengths, scaling):
    """A wrong attention: completions see nothing of their prompt."""
    return grouprank.causal_attention(query, key, value, scaling)


def test_packed_rows_that_differ_from_separate_ones_are_not_used(
    folders, tmp_path, monkeypatch, capsys
):
    """With a wrong packed attention, training is that of --no-shared-prompt, and says why."""
    monkeypatch.setattr(grouprank, "score_completion", reward_letter_e)
    plain = settings(folders, stage="grpo", shared_prompt=False)
    expected = grouprank.train(plain, PROMPT, tmp_path / "rows").model.state_dict()
    monkeypatch.setattr(grouprank, "attend_completions", aligned_upper_left)
    job = grouprank.train(settings(folders, stage="grpo"), PROMPT, tmp_path / "wrong")
    assert "packed and separate rows differ" in capsys.readouterr().out
    assert not job.shared
    found = job.model.state_dict()
    assert all(torch.allclose(found[name], w, atol=1e-5) for name, w in expected.items())


def test_a_model_whose_attention_slides_trains_on_separate_rows(
    folders, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(grouprank, "score_completion", reward_letter_e)
    model = tiny_model("qwen2").config.to_dict() | {
        "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1,
        "layer_types": ["full_attention", "sliding_attention"]}  # fmt: skip
    config = transformers.Qwen2Config(**model)
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    grouprank.load_tokenizer(str(folders / "qwen2")).save_pretrained(tmp_path / "model")
    cfg = settings(folders, model=str(tmp_path / "model"), stage="grpo")
    job = grouprank.train(cfg, PROMPT, tmp_path / "out")
    assert not job.shared
    assert "note: prompts are run once for each answer: it has sliding_attention layers" in (
        capsys.readouterr().out
    )


def test_equal_rewards_leave_the_weights_where_they_are(folders, tmp_path):
    """Random weights never write an answer: every reward is -0.5, and every advantage 0."""
    cfg = settings(folders, stage="grpo", kl_coef=0.0)
    job = grouprank.train(cfg, PROMPT, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert all(line["zero_spread"] == 1 and line["grad_norm"] == 0 for line in lines)
    assert all(line["reward"] == -0.5 and line["format_ok"] == 0 for line in lines)
    original = grouprank.load_model(cfg.model, job.machine, trainable=True).state_dict()
    assert all(torch.equal(job.model.state_dict()[n], w) for n, w in original.items())


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_trains_in_both_stages(folders, tmp_path, monkeypatch, kind, lora_rank):
    monkeypatch.setattr(grouprank, "score_completion", reward_letter_e)
    cfg = settings(folders, kind, lora_rank=lora_rank, max_new_tokens=70, updates_per_batch=2)
    grouprank.train(cfg, PROMPT, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    sft = [line for line in lines if line["stage"] == "sft"]
    grpo = [line for line in lines if line["stage"] == "grpo"]
    assert sft[-1]["loss"] < sft[0]["loss"]
    assert len(grpo) == 2 and all(np.isfinite(line["grad_norm"]) for line in grpo)
    assert grpo[0]["grad_norm"] > 0
    machine = grouprank.pick_machine("cpu")
    loaded = grouprank.load_model(str(tmp_path), machine, trainable=False)  # an ordinary folder
    started = grouprank.load_model(str(tmp_path / "sft"), machine, trainable=False)
    assert loaded.state_dict().keys() == started.state_dict().keys()
    moved = [not torch.equal(loaded.state_dict()[n], w) for n, w in started.state_dict().items()]
    assert any(moved)
    assert (tmp_path / "adapter" / "adapter_config.json").exists() == (lora_rank > 0)
    if lora_rank:
        grouprank.load_adapter(started, tmp_path / "adapter")
        ids = torch.arange(3, 60)[None]
        assert torch.allclose(started(ids).logits, loaded(ids).logits, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_float32_weights(folders, tmp_path, precision):
    cfg = settings(folders, precision=precision, stage="sft", sft_epochs=6.0)
    job = grouprank.train(cfg, PROMPT, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert {p.dtype for p in job.model.parameters()} == {torch.float32}


def test_an_overflow_skips_the_step_and_halves_the_loss_scale(folders, tmp_path):
    job = job_for(settings(folders, precision="fp16"), tmp_path)
    optimizer = grouprank.Optimizer(job.model, job.machine, grad_clip=1.0, weight_decay=0.0)
    before = {n: p.clone() for n, p in job.model.named_parameters()}
    scale = optimizer.scaler.get_scale()
    loss = sum(p.sum() for p in job.model.parameters())
    optimizer.backward(loss * float("inf"))
    norm, moved = optimizer.step(1e-2)
    assert not moved and not np.isfinite(norm)
    assert optimizer.scaler.get_scale() == scale / 2
    assert all(torch.equal(before[n], p) for n, p in job.model.named_parameters())


def test_the_log_stays_json_when_a_norm_is_not_finite(tmp_path):
    log = grouprank.Log(tmp_path)
    log.write("sft", 1, 2, {"loss": 1.0, "grad_norm": float("inf"), "skipped": 1})
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail) == {
        "stage": "sft", "step": 1, "loss": 1.0, "skipped": 1,
    }  # fmt: skip


def test_without_loss_scaling_a_gradient_that_is_not_finite_moves_nothing(folders, tmp_path):
    job = job_for(settings(folders), tmp_path)
    optimizer = grouprank.Optimizer(job.model, job.machine, grad_clip=1.0, weight_decay=0.0)
    before = {n: p.clone() for n, p in job.model.named_parameters()}
    optimizer.backward(sum(p.sum() for p in job.model.parameters()) * float("nan"))
    assert optimizer.step(1e-2)[1] is False
    assert all(torch.equal(before[n], p) for n, p in job.model.named_parameters())


def test_dropout_is_off_while_training(tmp_path):
    model = tiny_model("qwen2")
    model.model.layers[0].self_attn.attention_dropout = 0.5
    model.model.layers[0].extra = torch.nn.Dropout(0.5)
    cfg = grouprank.Config(lora_rank=0)
    grouprank.set_up_training(model, cfg, grouprank.pick_machine("cpu"))
    assert model.model.layers[0].self_attn.attention_dropout == 0.0
    assert model.model.layers[0].extra.p == 0.0


def test_learning_rate_rises_then_falls():
    rate = [grouprank.learning_rate(s, 10, 1.0, 0.2, "linear") for s in range(10)]
    assert rate[:3] == [0.5, 1.0, 1.0] and rate[-1] == pytest.approx(1 / 8)
    assert grouprank.learning_rate(9, 10, 1.0, 0.0, "constant") == 1.0
    assert grouprank.learning_rate(5, 10, 1.0, 0.0, "cosine") == pytest.approx(0.5)


def test_batches_visit_every_row_once_an_epoch():
    batches = [grouprank.shuffled_batch(10, step, 4, (0, 1)) for step in range(5)]
    rows = [row for batch in batches for row in batch]
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10] != rows[10:]


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    folders, tmp_path, monkeypatch, lora_rank
):
    """From a bfloat16 folder: what OUT/sft rounds must be rounded in the uninterrupted run too."""
    monkeypatch.setattr(grouprank, "score_completion", reward_letter_e)
    model = tiny_model("qwen2", 300).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    grouprank.load_tokenizer(str(folders / "qwen2")).save_pretrained(tmp_path / "bf16")
    cfg = settings(tmp_path, "bf16", data=str(folders / "rows.jsonl"), save_every=1, keep=1,
                   lora_rank=lora_rank, grpo_epochs=2.0, max_new_tokens=70)  # fmt: skip
    whole = grouprank.train(cfg, PROMPT, tmp_path / "whole")

    class Stop(BaseException):
        """Stands for a kill."""

    def stop_after(n):
        writes = []
        write = grouprank.Log.write

        def counted(self, stage, step, *rest):
            write(self, stage, step, *rest)
            writes.append(step)
            if len(writes) == n:
                raise Stop

        return counted

    out = tmp_path / "stopped"
    out.mkdir()
    for n, resume in ((2, False), (2, True), (2, True)):  # in SFT, at the first GRPO step, in GRPO
        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(grouprank.Log, "write", stop_after(n))
            grouprank.train(dataclasses.replace(cfg, resume=resume), PROMPT, out)
    job = grouprank.train(dataclasses.replace(cfg, resume=True), PROMPT, out)
    weights = whole.model.state_dict()
    assert all(torch.equal(weights[n], w) for n, w in job.model.state_dict().items())

    def steps(folder):
        timed = {"seconds", "tokens_per_s", "rollout_s"}
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        return [{k: v for k, v in row.items() if k not in timed} for row in rows]

    assert steps(out) == steps(tmp_path / "whole")
    assert job.seconds.keys() == whole.seconds.keys() == {"sft", "grpo", "train"}


def test_an_unreadable_checkpoint_is_passed_over(tmp_path, capsys):
    grouprank.save_state(tmp_path, "sft-0000001", {"step": 1}, keep=3)
    whole = (tmp_path / "sft-0000001.pt").read_bytes()
    (tmp_path / "sft-0000002.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "sft-0000003.pt").write_bytes(b"not a checkpoint")
    assert grouprank.last_state(tmp_path, "sft") == {"step": 1}
    assert capsys.readouterr().out.count("is unreadable") == 2


def test_a_row_that_comes_twice_in_a_batch_draws_other_answers(folders, tmp_path):
    job = job_for(settings(folders), tmp_path)
    batch = grouprank.collect_rollouts(job, [job.items[0], job.items[0]], 0)
    assert batch.completions[0] != batch.completions[1]


@pytest.mark.parametrize("kind", ["Cohere", "Granite"])
def test_models_that_scale_their_logits_are_refused(kind, tmp_path):
    """Applying the head alone would sample and train another distribution, silently."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    if kind == "Granite":
        config.logits_scaling = 4.0
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    torch.nn.init.normal_(model.get_output_embeddings().weight)
    with pytest.raises(ValueError, match="changes its logits after the head"):
        grouprank.check_head(model)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_grpo_trains_in_mixed_precision(folders, tmp_path, monkeypatch, precision):
    monkeypatch.setattr(grouprank, "score_completion", reward_letter_e)
    cfg = settings(folders, stage="grpo", precision=precision, lora_rank=4, grad_checkpointing="on")
    grouprank.train(cfg, PROMPT, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert all(np.isfinite(line["grad_norm"]) and line["skipped"] == 0 for line in lines)
    assert lines[0]["grad_norm"] > 0 and lines[0]["kl"] < 1e-6


def test_resume_refuses_other_settings_and_changed_data(folders, tmp_path):
    rows = training_rows(2)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    cfg = settings(folders, data=data, stage="sft", sft_epochs=1.0, save_every=1)
    grouprank.train(cfg, PROMPT, tmp_path / "run")
    with pytest.raises(ValueError, match="trained with --sft-lr 0.01, not 0.02"):
        changed = dataclasses.replace(cfg, sft_lr=0.02, resume=True)
        grouprank.train(changed, PROMPT, tmp_path / "run")
    write_rows(data, rows[:1])
    with pytest.raises(ValueError, match="data have changed"):
        grouprank.train(dataclasses.replace(cfg, resume=True), PROMPT, tmp_path / "run")


def test_sft_overfits_the_authors_two_rows_and_returns_their_scores(real_data, tmp_path):
    """Two real groups of ten: after SFT from random weights, greedy decoding is the target."""
    rows = []
    for line in (real_data / "diver_sample" / "groupwise_sft_data_example.jsonl").open():
        sample = json.loads(line)
        pieces = sample["instruction"].split("\n[")
        texts = [p.partition("]. ")[2] for p in pieces if p.partition("]")[0].isdigit()]
        rows.append(
            {
                "id": sample["item_id"],
                "query": sample["query"],
                "docs": [{"id": str(i), "text": text} for i, text in enumerate(texts)],
                "scores": grouprank.parse_answer(sample["output"], len(texts)).scores,
                "response": sample["output"],
            }
        )
    assert [len(row["docs"]) for row in rows] == [10, 10]
    texts = [row["response"] for row in rows]
    save_tiny_model(tmp_path / "model", texts=texts, vocab_size=1000, width=64)
    cfg = settings(
        tmp_path, "model", data=write_rows(tmp_path / "rows.jsonl", rows), stage="sft",
        max_doc_tokens=8, sft_epochs=130.0, sft_batch=2, sft_lr=1e-2, max_new_tokens=600,
    )  # fmt: skip
    job = grouprank.train(cfg, PROMPT, tmp_path / "run")
    answers = grouprank.generate(
        job.model, [item.prompt for item in job.items], [[(0,)]] * 2,
        max_new_tokens=600, end_ids=job.end_ids, temperature=0.0,
    )  # fmt: skip
    for (ids,), row in zip(answers, rows, strict=True):
        answer = grouprank.parse_answer(grouprank.decode_text(job.tokenizer, ids), 10)
        assert (answer.status, answer.scores) == ("ok", row["scores"])


def test_a_checkpoint_without_its_head_is_refused_not_filled_with_random_weights(tmp_path):
    model = tiny_model("llama")  # its head is a tensor of its own
    weights = {n: w for n, w in model.state_dict().items() if n != "lm_head.weight"}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match="has no lm_head.weight"):
        grouprank.load_model(str(tmp_path), grouprank.pick_machine("cpu"), trainable=False)
    tied = save_tiny_model(tmp_path / "tied", "qwen2")  # here the head is the embedding
    grouprank.load_model(str(tied), grouprank.pick_machine("cpu"), trainable=False)
