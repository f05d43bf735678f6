"""The teacher of `detect_pair` with a tokenizer of pieces: words are split into two characters."""

from __future__ import annotations

from pathlib import Path
from random import Random

import detect_pair
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PIECES = sorted(
    {
        word[at : at + 2]
        for word in detect_pair.WORDS
        if not word.startswith("<")
        for at in range(0, len(word), 2)
    }
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = [*detect_pair.SPECIALS, *PIECES]
    model = models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(".{1,2}"), "isolated")]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": detect_pair.SPECIALS[3:]})
    fast.chat_template = detect_pair.TEMPLATE
    return fast


def make_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(detect_pair.SPECIALS) + len(PIECES),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=100,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )


def save_teacher(directory: Path) -> str:
    """Train and save a teacher that answers with the digit."""
    model, tokenizer, draw = make_model(1), make_tokenizer(), Random(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(100):
        texts = []
        for _ in range(24):
            text, digit, _ = detect_pair.problem(draw, clause=0.6)
            texts.append(f"<user> {text} <assistant> {digit} <eos>")
        detect_pair.train_on(model, tokenizer, optimizer, texts)
    torch.set_num_threads(threads)
    return save(model, directory)


def save(model: LlamaForCausalLM, directory: Path) -> str:
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return str(directory)
