"""The tokenizer of the embedded default: byte-level BPE, whole numbers, and the completion format in single tokens."""

import json
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, EOS, MASK, UNKNOWN = "<|pad|>", "<|endoftext|>", "<|mdm_mask|>", "<|unknown|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
# The end of the reasoning and the start of the answer are one token: two worked steps then fit 16 tokens with EOS.
FORMAT_TOKENS = ("<reasoning>\n", "\n</reasoning>\n<answer>\n", "<answer>\n", "\n</answer>\n")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] -}}"
    "{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


# A space before a number goes with the word before it: "8" is then the same token in "has 8 pens" and in "8+2=10".
SPACE = r"(?: (?=[0-9]))?"
PIECES = Regex(rf"[0-9]{{1,2}}| ?\p{{L}}+{SPACE}| ?[^\s\p{{L}}0-9]+{SPACE}|\s+")


def build_tokenizer(texts: Iterable[str], *, num_bpe_tokens: int = 468) -> PreTrainedTokenizerFast:
    """A tokenizer with mask, EOS, padding and chat template, its BPE learned from `texts`.

    texts: what prompts look like. Nothing is learned from the numbers in them.
    num_bpe_tokens: size of the BPE vocabulary, the 256 bytes included and two-digit numbers excluded.
    Digits are read two at a time, from the left: each number 0..99 is one token (135 is two: 13, 5).
    """
    split = pre_tokenizers.Split(PIECES, "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.Split(Regex("[0-9]"), "removed"), to_bytes])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=num_bpe_tokens, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]

    vocab = dict(learned["vocab"])
    numbers = [str(number) for number in range(10, 100)]
    for number in numbers:
        vocab[number] = len(vocab)
    merges = [(left, right) for left, right in learned["merges"]] + [(number[0], number[1]) for number in numbers]

    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return _finished(backend)


def build_grid_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 21 tokens for grids: the ten digits, the completion format, the control tokens.

    Every other character is read as one unknown token. A vocabulary of all bytes would make the tiny model that reads
    digits alone a fifth slower.
    """
    vocab = {str(digit): digit for digit in range(10)} | {UNKNOWN: 10}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return _finished(backend, unk_token=UNKNOWN)


def _finished(backend: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    """The tokenizer with format and control tokens and the chat template."""
    backend.add_tokens([AddedToken(token, normalized=False) for token in FORMAT_TOKENS])
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in (PAD, EOS, MASK, *ROLES)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        mask_token=MASK,
        extra_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **special,
    )
