"""The arithmetic of growing: bytes and seconds of a GRPO step, by hand and against real tensors."""

import bench_growing
import pytest
import torch
import transformers

import grouprank

CONFIG = bench_growing.shape((8, 24, 3, 4, 2, 2, 100, True))  # one block: 8*8 + 2*8*4 + 8*8 + 3*8*24
N_BLOCK, N_ALL = 768, 3 * 768 + 100 * 8
STEP = {"prompt_tokens": 50, "answer_tokens": 10, "prompts_per_process": 2}


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_model(tied):
    numbers = (16, 48, 2, 4, 2, 8, 60, tied)  # heads wider than the model, as Qwen3 has them
    config = transformers.Qwen3Config(**vars(bench_growing.shape(numbers)), pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    n_block, n_embedding, n_adapter = bench_growing.count_parameters(config, lora_rank=3)
    assert 2 * n_block + n_embedding == sum(p.numel() for p in model.parameters() if p.ndim == 2)
    grouprank.add_lora(model, 3, 3.0)
    assert n_adapter == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name, billions", [("0.6B", 0.60), ("1.7B", 1.72), ("4B", 4.02), ("8B", 8.19),
                                            ("14B", 14.77), ("32B", 32.76)])  # fmt: skip
def test_the_shapes_of_the_table_have_the_published_sizes(name, billions):
    config = bench_growing.shape(bench_growing.QWEN3[name])
    n_block, n_embedding, _ = bench_growing.count_parameters(config)
    assert (config.num_hidden_layers * n_block + n_embedding) / 1e9 == pytest.approx(billions, abs=0.006)


@pytest.mark.parametrize("w", [1, 2, 8])
def test_full_training_takes_sixteen_bytes_a_parameter_and_what_does_not_shrink(w):
    use = bench_growing.estimate_memory(CONFIG, **STEP, lora_rank=0, n_processes=w)
    assert use["weights"] + use["gradients"] + use["moments"] == 16 * N_ALL / w
    assert use["reference"] == 2 * N_ALL / w
    assert use["replica"] == (2 * N_ALL if w > 1 else 0)  # one process decodes with its own weights
    assert bench_growing.estimate_memory(CONFIG, **STEP, lora_rank=0, kl=False)["reference"] == 0


def test_autograd_keeps_the_cast_weights_unless_activations_are_computed_again():
    uses = [bench_growing.estimate_memory(CONFIG, **STEP, lora_rank=0, n_processes=8, checkpointing=on, element_bytes=n)
            for on, n in ((False, 2), (True, 2), (False, 4))]  # fmt: skip
    assert [use["casts"] for use in uses] == [2 * N_ALL, 0, 0]


def test_a_training_pass_lets_autocast_keep_no_copy_of_the_weights():
    config = transformers.Qwen3Config(
        **vars(bench_growing.shape((16, 48, 2, 4, 2, 4, 60, True))), pad_token_id=0)
    model, seen = transformers.AutoModelForCausalLM.from_config(config), []
    machine, cfg = grouprank.Machine(torch.device("cpu"), torch.bfloat16), grouprank.Config(lora_rank=0)
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(torch.is_autocast_cache_enabled()))
    job = grouprank.Job(cfg, None, machine, model, None, None, None, [], [], False)
    policy = grouprank.Policy(model)
    optimizer = grouprank.Optimizer(model, machine, grad_clip=1.0, weight_decay=0.0)
    batch = grouprank.RolloutBatch([grouprank.Item("p", [3, 4], None, None)], [[[5], [6]]], [], [], None)
    passes = grouprank.build_passes(batch, grouprank.relative_advantages([[0, 1]]), cfg, False, machine.device)
    grouprank.policy_update(job, policy, None, passes, optimizer, 1e-3)
    assert seen and not any(seen)


def test_lora_keeps_the_whole_base_on_every_process_and_trains_the_adapters():
    n_adapter = 3 * 2 * (2 * (8 + 8) + 2 * (8 + 4) + 3 * (8 + 24))  # 3 blocks, rank 2
    uses = [bench_growing.estimate_memory(CONFIG, **STEP, lora_rank=2, n_processes=w) for w in (1, 64)]
    assert uses[0] == uses[1]
    assert uses[0]["weights"] == 2 * N_ALL + 4 * n_adapter
    assert (uses[0]["gradients"], uses[0]["moments"]) == (4 * n_adapter, 8 * n_adapter)
    assert (uses[0]["reference"], uses[0]["replica"], uses[0]["casts"]) == (0, 0, 0)


def test_the_peak_is_what_stays_and_the_larger_of_decoding_and_updating():
    small, large = (bench_growing.estimate_memory(CONFIG, **STEP | {"prompts_per_process": 1000}, tokens_per_pass=130,
                                              lora_rank=2, cache_bytes=n) for n in (1, 1e9))  # fmt: skip
    stays = small["weights"] + small["moments"]
    assert small["peak"] == stays + small["gradients"] + small["activations"] + small["working"]
    assert large["cache"] == 1000 * (50 + 8 * 10) * 2 * 3 * 4 * 2  # keys and values, 3 layers, bf16
    assert large["peak"] == stays + large["cache"] + 1000 * 8 * 100 * 26
    assert small["cache"] == large["cache"] / 1000  # one prompt at a time is the least


def test_a_pass_keeps_less_with_checkpointing_and_its_logits_come_in_chunks():
    row, kind = [(50, [10] * 8)], {"lora": True, "element_bytes": 2}
    slim = bench_growing.shape((8, 24, 3, 4, 2, 2, 1, True))  # one word: no logits to speak of
    block = bench_growing.activation_bytes(slim, row, **kind)
    assert bench_growing.pass_bytes(slim, row, **kind, checkpointing=False) == (3 * block, block)
    assert bench_growing.pass_bytes(slim, row, **kind, checkpointing=True) == (3 * 130 * 8 * 2, 2 * block)
    wide = bench_growing.shape((8, 24, 3, 4, 2, 2, 10**6, True))
    assert bench_growing.pass_bytes(wide, row, **kind, checkpointing=True)[1] == 80 * 10**6 * (2 + 16)
    long = bench_growing.pass_bytes(wide, [(50, [1000] * 8)], **kind, checkpointing=True)
    assert long[1] == 1024 * 10**6 * (2 + 16)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_keeps_for_a_layer(lora, dtype):
    """Adapters' cast weights, rank-wide products and sums are left out: up to 10 % here."""
    n_prompt, lengths, kept = 96, [12] * 4, []
    for n_layers in (2, 4):
        config = transformers.Qwen3Config(
            **vars(bench_growing.shape((64, 192, n_layers, 4, 2, 16, 128, True))),
            attn_implementation="sdpa", pad_token_id=0)  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype if lora else torch.float32)
        machine = grouprank.Machine(torch.device("cpu"), dtype)
        grouprank.share_prompts(model, True)
        grouprank.set_up_training(model, grouprank.Config(lora_rank=2 if lora else 0), machine)
        own, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def keep(tensor, own=own, saved=saved):
            if (place := tensor.untyped_storage().data_ptr()) not in own:
                saved[place] = tensor
            return tensor

        with machine.autocast(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            blocks = [(list(range(n_prompt)), [list(range(n)) for n in lengths])]
            grouprank.completion_logprobs(grouprank.Policy(model), blocks, "cpu", True)
        casts = 0 if lora or dtype == torch.float32 else 2 * n_layers * bench_growing.count_parameters(config)[0]
        kept.append(sum(tensor.untyped_storage().nbytes() for tensor in saved.values()) - casts)
    estimate = bench_growing.activation_bytes(
        config, [(n_prompt, lengths)], lora=lora, element_bytes=dtype.itemsize)
    assert 0.9 < estimate / ((kept[1] - kept[0]) / 2) < 1.02


def test_seconds_by_hand():
    sizes = {"prompt_tokens": 50, "answer_tokens": 10, "rollouts_per_prompt": 8, "prompts_per_process": 4}
    n, q = 3 * N_BLOCK, 8  # parameters of the blocks, query width
    prompt = 2 * n * 50 + 4 * q * 3 * 50**2 / 2
    answers = 80 * (2 * n + 2 * 800) + 4 * q * 3 * 80 * (50 + 5)
    times = bench_growing.estimate_seconds(CONFIG, **sizes, flops=1e6, bandwidth=1e30)
    assert times["prefill"] == 4 * prompt / 1e6
    assert times["decode"] == 4 * answers / 1e6
    assert times["update"] == 4 * 4 * (prompt + answers) / 1e6  # LoRA 2, checkpointing, reference
    assert times["step"] == times["prefill"] + times["decode"] + times["update"]
    full = bench_growing.estimate_seconds(
        CONFIG, **sizes, flops=1e6, bandwidth=1e30, lora_rank=0, checkpointing=False, kl=False)
    assert full["update"] == 3 * 4 * (prompt + answers) / 1e6
    slow = bench_growing.estimate_seconds(CONFIG, **sizes, flops=1e30, bandwidth=1e6, prompts_per_wave=2)
    weights, cache = 2 * (n + 800), 2 * 3 * 4 * 2 * (50 + 80 / 2)  # read in each of 10 steps
    assert slow["decode"] == pytest.approx(10 * (2 * weights + 4 * cache) / 1e6)  # two waves
    rows = bench_growing.estimate_seconds(CONFIG, **sizes, flops=1e6, bandwidth=1e30, shared=False)
    assert rows["prefill"] == 8 * times["prefill"]


def test_calls_and_tokens_of_a_query():
    calls, prompt, answer = bench_growing.price_queries(20, 4)
    assert (calls, answer) == (20, 20 * (100 + 20 * 20))
    assert 4 * 100 * 300 < prompt < 4 * 100 * 310 + 20 * 400  # documents, their numbers, instructions
    assert bench_growing.price_queries(1, 1)[0] == 100


def test_readme_has_the_tables_that_the_functions_give(capsys):
    bench_growing.show_steps()
    bench_growing.show_queries()
    readme = (bench_growing.ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    missing = [line for line in capsys.readouterr().out.splitlines() if line and line not in readme]
    assert not missing
