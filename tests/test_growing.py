"""The arithmetic of growing: parameters and bytes of tests/bench_growing.py against real tensors."""

import bench_growing
import pytest
import torch
import transformers

import grouprank

CONFIG = bench_growing.shape((8, 24, 3, 4, 2, 2, 100, True))  # one block: 8*8 + 2*8*4 + 8*8 + 3*8*24
N_ALL = 3 * 768 + 100 * 8
STEP = {"prompt_tokens": 50, "answer_tokens": 10, "prompts_per_process": 2}


def build(numbers, **options):
    """A Qwen3 of this shape with random weights."""
    config = transformers.Qwen3Config(
        **vars(bench_growing.shape(numbers)), attn_implementation="sdpa", pad_token_id=0)
    return transformers.AutoModelForCausalLM.from_config(config, **options)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_model(tied):
    model = build((16, 48, 2, 4, 2, 8, 60, tied))  # heads wider than the model, as Qwen3 has them
    n_block, n_embedding, n_adapter = bench_growing.count_parameters(model.config, lora_rank=3)
    assert 2 * n_block + n_embedding == sum(p.numel() for p in model.parameters() if p.ndim == 2)
    grouprank.add_lora(model, 3, 3.0)
    assert n_adapter == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name, billions", [("0.6B", 0.60), ("1.7B", 1.72), ("4B", 4.02), ("8B", 8.19),
                                            ("14B", 14.77), ("32B", 32.76)])  # fmt: skip
def test_the_shapes_of_the_table_have_the_published_sizes(name, billions):
    config = bench_growing.shape(bench_growing.QWEN3[name])
    n_block, n_embedding, _ = bench_growing.count_parameters(config)
    assert (config.num_hidden_layers * n_block + n_embedding) / 1e9 == pytest.approx(billions, abs=0.006)


def test_full_training_takes_sixteen_bytes_a_parameter_and_lora_the_base_once():
    full = bench_growing.estimate_memory(CONFIG, **STEP, lora_rank=0)
    assert full["weights"] + full["gradients"] + full["moments"] == 16 * N_ALL
    assert full["reference"] == 2 * N_ALL
    n_adapter = 3 * 2 * (2 * (8 + 8) + 2 * (8 + 4) + 3 * (8 + 24))  # 3 blocks, rank 2
    lora = bench_growing.estimate_memory(CONFIG, **STEP, lora_rank=2)
    assert (lora["weights"], lora["reference"]) == (2 * N_ALL + 4 * n_adapter, 0)
    assert (lora["gradients"], lora["moments"]) == (4 * n_adapter, 8 * n_adapter)


@pytest.mark.skipif(torch.__version__ < "2.11", reason="older attention on a CPU keeps more")
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_keeps_for_a_layer(lora, dtype):
    """Adapters' cast weights, rank-wide products and sums are left out: up to 10 % here."""
    n_prompt, lengths, kept = 96, [12] * 4, []
    machine = grouprank.Machine(torch.device("cpu"), dtype)
    for n_layers in (2, 4):
        model = build((64, 192, n_layers, 4, 2, 16, 128, True), dtype=dtype if lora else torch.float32)
        grouprank.share_prompts(model)
        grouprank.set_up_training(model, grouprank.Config(lora_rank=2 if lora else 0), machine)
        own, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def keep(tensor, own=own, saved=saved):
            if (place := tensor.untyped_storage().data_ptr()) not in own:
                saved[place] = tensor
            return tensor

        policy = grouprank.Policy(model, machine.autocast)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            blocks = [(list(range(n_prompt)), [list(range(n)) for n in lengths])]
            grouprank.completion_logprobs(policy, blocks, packed=True)
        n_block = bench_growing.count_parameters(model.config)[0]
        casts = 0 if lora or dtype == torch.float32 else 2 * n_layers * n_block
        kept.append(sum(tensor.untyped_storage().nbytes() for tensor in saved.values()) - casts)
    estimate = bench_growing.activation_bytes(
        model.config, [(n_prompt, lengths)], lora=lora, element_bytes=dtype.itemsize)
    assert 0.9 < estimate / ((kept[1] - kept[0]) / 2) < 1.02


def test_a_training_pass_lets_autocast_keep_no_copy_of_the_weights():
    model, seen = build((16, 48, 2, 4, 2, 4, 60, True)), []
    machine = grouprank.Machine(torch.device("cpu"), torch.bfloat16)
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(torch.is_autocast_cache_enabled()))
    policy = grouprank.Policy(model, lambda: machine.autocast(cache=False))
    grouprank.completion_logprobs(policy, [([3, 4], [[5]])], packed=False)
    assert seen == [False]


def test_the_docstring_has_the_tables_that_the_functions_give(capsys):
    bench_growing.show_steps()
    bench_growing.show_queries()
    lines = filter(None, capsys.readouterr().out.splitlines())
    assert not set(lines) - set(bench_growing.__doc__.splitlines())
