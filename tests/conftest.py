"""Small models and data for the tests: random weights, real folders, nothing downloaded."""

import contextlib
import gc
import json
import os
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import grouprank

torch.set_num_threads(1)  # tiny matrices gain nothing from a second thread that they wait for
transformers.utils.logging.disable_progress_bar()

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ARCHITECTURES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


def byte_tokenizer(texts=(), vocab_size=400):
    """A byte-level BPE tokenizer with ChatML turns, trained on `texts`."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(kind="qwen2", vocab_size=400, seed=0, width=32, layers=2, context=4096):
    """A causal language model with random weights, grouped-query attention included."""
    config_class, model_class = ARCHITECTURES[kind]
    torch.manual_seed(seed)
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        max_position_embeddings=context,
        tie_word_embeddings=kind != "llama",
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=None,
        attn_implementation="sdpa",
    )
    return model_class(config).eval()


def save_tiny_model(folder, kind="qwen2", texts=(), vocab_size=400, **options):
    """Save a tiny model with its tokenizer as an ordinary Hugging Face folder."""
    tokenizer = byte_tokenizer(texts, vocab_size)
    tiny_model(kind, len(tokenizer), **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class ManyAtOnce(ThreadingHTTPServer):
    """Without a longer queue, the kernel drops connections that come together."""

    request_queue_size = 64


class LocalServer:
    """A server at `url` for as long as a `with` lasts; subclasses answer in post(handler, body)."""

    def listen(self):
        """The server itself; a subclass may speak something else than JSON over HTTP."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with contextlib.suppress(OSError):  # a client that hung up
                    outer.post(self, body)

            def send(self, status, payload):
                self.send_response(status)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *args):
                pass

        return ManyAtOnce(("127.0.0.1", 0), Handler)

    def __enter__(self):
        self.server = self.listen()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.server.server_close()


class ChatServer(LocalServer):
    """Chat completions; `answer(body)` gives the text, or a status to fail with."""

    def __init__(self, answer, delay_s=0.0):
        self.answer, self.delay_s, self.bodies = answer, delay_s, []

    def post(self, handler, body):
        self.bodies.append(body)
        time.sleep(self.delay_s)
        text = self.answer(body)
        if isinstance(text, int):
            return handler.send(text, b'{"error": "no"}')
        message = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}],
                   "usage": {"prompt_tokens": 10, "completion_tokens": 5}}  # fmt: skip
        handler.send(200, json.dumps(message).encode())


LONGEST_FIRST = ("benches", "training", "trust", "processes", "commands", "devices", "synth")


def pytest_collection_modifyitems(items):
    """A long file that began last would leave the other workers idle."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_collection_finish():
    """No garbage collection goes through the libraries' objects again, and no fork copies them."""
    gc.freeze()


def everything(costs):
    """The share of the only process."""
    return list(range(len(costs)))


class NoStep:
    """Stands for an optimizer, and leaves the gradients for the test to look at."""

    def backward(self, loss):
        loss.backward()

    def step(self, lr):
        return {"grad_norm": 0.5, "skipped": 0, "lr": lr}


def write_rows(path, rows):
    """Write training rows as JSONL."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def warned_of_nothing():
    """What one test was warned of, once, is news to the next."""
    grouprank.print_once.cache_clear()


@pytest.fixture
def ctrl_c():
    """SIGINT interrupts, also where the tests are started in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def real_data():
    """The folder of real test data; tests that need it are skipped where it is not given."""
    folder = os.environ.get("GROUPRANK_TEST_DATA")
    if not folder:
        pytest.skip("GROUPRANK_TEST_DATA is not set")
    return Path(folder)
