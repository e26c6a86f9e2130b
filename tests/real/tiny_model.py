"""Make a tiny model that vLLM serves as any other: random weights, a trained tokenizer, a chat template.

usage: VENV/bin/python tests/real/tiny_model.py OUT_DIR

600,000 parameters start within a moment and fit two engines on two cores. float32 on a CPU makes greedy output a
function of the prompt alone, so answers of two engines can be compared to the byte. The weights come from one seed and
are saved once: every engine must load the same file. A directory that is complete is left unchanged.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

SEED = 7
MAX_POSITIONS = 4096
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def corpus() -> list[str]:
    """Three thousand sentences of made-up words, which the tokenizer merges until each word is one token."""
    rng = random.Random(SEED)
    starts, middles, ends = ["ka", "lo", "mi", "su", "te", "ra", "no", "vi"], ["", "n", "r", "ll", "st"], "aeo"
    words = [start + middle + end for start in starts for middle in middles for end in (*ends, "ing", "ed")]
    words += ["the", "of", "to", "and", "is", "it", "in", "for", "on", "with", "as", "at", "by", "this", "that"]
    words += ["prefill", "decode", "cache", "block", "token"]
    return [" ".join(rng.choices(words, k=rng.randint(5, 15))).capitalize() + "." for _ in range(3000)]


def save_tokenizer(out: Path) -> tuple[int, int, int]:
    """Train and save a byte-level BPE tokenizer; returns its size, its end-of-sequence id and its padding id."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(corpus(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        model_max_length=MAX_POSITIONS,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(out)
    return len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id


def save_weights(out: Path, vocab_size: int, eos: int, pad: int) -> None:
    """Save two random Qwen3 layers."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(SEED)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        initializer_range=0.2,  # ten times the usual: the output must vary with the prompt
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
        dtype="float32",
    )
    Qwen3ForCausalLM(config).to(torch.float32).save_pretrained(out, safe_serialization=True)


def main() -> None:
    out = Path(sys.argv[1])
    # save_pretrained writes this file too, so only what is written last, below, shows that the rest is complete.
    finished = out / "generation_config.json"
    if finished.exists() and json.loads(finished.read_text()).get("do_sample") is False:
        return
    out.mkdir(parents=True, exist_ok=True)
    vocab_size, eos, pad = save_tokenizer(out)
    save_weights(out, vocab_size, eos, pad)
    finished.write_text(json.dumps({"eos_token_id": eos, "pad_token_id": pad, "do_sample": False}))


if __name__ == "__main__":
    main()
