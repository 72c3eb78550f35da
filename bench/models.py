"""Random models of the shapes in ``bench.work``, each a folder that every library loads."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.work import EOS, PAD, RESERVED, SHAPES

MOST_POSITIONS = 4096


def model_folder(name: str, root: Path) -> Path:
    """The folder of a model, made on first use."""
    folder = root / name
    if not (folder / "done").exists():
        shape = SHAPES[name]
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=MOST_POSITIONS,
            tie_word_embeddings=shape.tied,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        word_tokenizer(shape.vocab).save_pretrained(folder)
        (folder / "done").touch()
    return folder


def word_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """One word a token: ``w17`` is token 17."""
    words = {"<pad>": PAD, "<eos>": EOS, "<unk>": 2}
    words |= {f"<{i}>": i for i in range(3, RESERVED)} | {f"w{i}": i for i in range(RESERVED, vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )
