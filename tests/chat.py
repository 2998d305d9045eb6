"""A small chat model for tests: its own words, a chat template of Llama Guard's form, trained for a moment or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SPECIAL = ["<|pad|>", "<|begin|>", "<|eot|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{{ '<|begin|>' }}{% for m in messages %}<|user|>"
    "{% if categories is defined and categories %}Task: is the User safe?\n"
    "{% for key in categories %}{{ key }}: {{ categories[key] }}\n{% endfor %}{% endif %}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}User: {{ m['content'][0]['text'] | trim }}{% endif %}"
    "<|eot|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = "safe unsafe the cat hurts nobody and bombs kill people while trees grow Task: is the User S1: Sexual\n\n"


def chat_model(folder: Path, positions: int = 512, chat: bool = True, scale: float = 12.0, seed: int = 0) -> Path:
    """A checkpoint of a llama of some thousand parameters with a byte-level tokenizer; `chat`: with a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from pipeline_lib.models import llama
    from pipeline_lib.models.checkpoint import save_checkpoint

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [TEXT * 4], trainers.BpeTrainer(vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2]
    )
    if chat:
        tokenizer.chat_template = TEMPLATE
    torch.manual_seed(seed)
    sizes = {"dim": 32, "layers": 2, "heads": 2, "kv_heads": 1, "ffn": 64, "vocab": 340, "max_seq_len": positions}
    model = llama.build({"family": "llama", **sizes})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder, model.config, model.state_dict(), tokenizer, "LlamaForCausalLM")
    return folder


def teach(folder: Path, pairs: list[tuple[list[int], list[int]]], steps: int = 60) -> None:
    """Train the checkpoint to answer each prompt (token ids) with its answer."""
    import torch

    from pipeline_lib.models.checkpoint import load_model

    model: Any = load_model(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    longest = max(len(p) + len(a) for p, a in pairs)
    ids = torch.zeros(len(pairs), longest, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(pairs):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval().save_pretrained(folder)


def dataset(folder: Path, rows: dict[str, list[Any]], split: str = "test") -> Path:
    """A folder like an artifact of the dataset stage."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    ids = {"id": [f"{split}-{number}" for number in range(len(rows["text"]))]}
    pq.write_table(pa.table({**ids, **rows}), folder / f"{split}-00000.parquet")
    return folder


def adds_bos(folder: Path) -> None:
    """Let the tokenizer put `bos` before every text by itself, as Llama 3's does, beside the one in its template."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    post = TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = post
    tokenizer.save_pretrained(folder)
