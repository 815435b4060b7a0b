"""From documents to tokens: the tokenizer, blocks to train on, and windows that score each held-out token once."""

import itertools
import math
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import EvalPrediction, PreTrainedTokenizerFast

from recipes.language.texts import DOMAINS, read

END_OF_TEXT = "<|endoftext|>"
IGNORED = -100  # the label of a token that is context only


def train_tokenizer(texts: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the documents to train on; `<|endoftext|>` stands between documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    documents = itertools.chain.from_iterable(read(texts, domain, "train") for domain in DOMAINS)
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def blocks_to_train_on(texts: Path, tokenizer_folder: Path, length: int, seed: int) -> Dataset:
    """All documents in random order, each followed by the end of text, cut into blocks of `length` tokens.

    The text is streamed once, and its blocks are kept on the disk: where a run resumes, the sampler goes to any block
    at once, while the shuffled stream itself would have to be read again up to there.
    """
    arguments = {"texts": str(texts), "tokenizer": str(tokenizer_folder), "length": length, "seed": seed}
    with tempfile.TemporaryDirectory() as cache:
        found = Dataset.from_generator(_stream_of_blocks, gen_kwargs=arguments, cache_dir=cache, keep_in_memory=True)
    if not len(found):
        raise ValueError(f"{texts} has less text than one block of {length} tokens: give more text or shorter blocks")
    return found


def _stream_of_blocks(texts: str, tokenizer: str, length: int, seed: int) -> Iterator[dict[str, list[int]]]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer)

    def tokens_of(rows):
        return {"input_ids": [[*ids, tokenizer.eos_token_id] for ids in tokenizer(rows["text"])["input_ids"]]}

    def cut(rows):
        tokens = list(itertools.chain.from_iterable(rows["input_ids"]))
        return {"input_ids": [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]}

    files = [str(Path(texts) / f"{domain}-train.jsonl") for domain in DOMAINS]
    documents = load_dataset("json", data_files=files, split="train", streaming=True)
    documents = documents.shuffle(seed=seed, buffer_size=100_000)
    tokenized = documents.map(tokens_of, batched=True, batch_size=100, remove_columns=["name", "text"])
    yield from tokenized.map(cut, batched=True, batch_size=1000)


# ---- held-out text


def held_out_windows(texts: Path, domain: str, tokenizer, length: int, num_bytes: int) -> Dataset:
    """Held-out documents of a domain, `num_bytes` of text in all, as windows of `length` tokens.

    Windows overlap by half: a token is scored in the first window that has it, behind at least `length / 2` others
    (but for the start of the text); in all later windows it has the label -100.
    """
    stream = [tokenizer.eos_token_id]
    for text in _first_bytes(texts, domain, num_bytes):
        stream += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    if len(stream) < length:
        raise ValueError(f"the held-out text of {domain!r} is shorter than one window of {length} tokens: give more")
    rows, scored = [], 1  # the first end of text is given
    for start in [*range(0, len(stream) - length, length // 2), len(stream) - length]:
        ids = stream[start : start + length]
        context = scored - start
        rows.append({"input_ids": ids, "labels": [IGNORED] * context + ids[context:]})
        scored = start + length
    return Dataset.from_list(rows)


def _first_bytes(texts: Path, domain: str, num_bytes: int) -> Iterator[str]:
    """Held-out documents in a fixed random order, the last one cut off, with exactly `num_bytes` if there are so many.

    (A last character that the cut has split is dropped.)
    """
    documents = read(texts, domain, "held_out")
    random.Random(0).shuffle(documents)
    for document in documents:
        data = document.encode()[:num_bytes]
        num_bytes -= len(data)
        if data:
            yield data.decode(errors="ignore")


def nats_of_labels(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-log p of each label that counts, else 0: (rows, tokens, vocabulary), (rows, tokens) -> (rows, tokens - 1)."""
    return functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none"
    )


class BitsPerByte:
    """The metric: nats of all scored tokens, ends of text included, over ln 2 and the bytes that they spell."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))  # byte-level BPE: one character is one byte
        self.lengths = np.array([0 if token in tokenizer.all_special_tokens else len(token) for token in tokens])

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        nats, labels = prediction.predictions, prediction.label_ids[:, 1:]
        num_bytes = int(self.lengths[labels[labels != IGNORED]].sum())
        bits = nats.astype(np.float64).sum() / math.log(2)
        return {"bits_per_byte": bits / num_bytes, "bytes": num_bytes, "tokens": int((labels != IGNORED).sum())}
