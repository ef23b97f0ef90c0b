"""A small language model from scratch that knows a shop's words, for a machine that cannot train a published one.

    python benchmarks/small_llm.py --data runs/shop-20000-0 --out runs/small_llm

An uncased byte-level BPE of 4,096 tokens and a Llama of 4 layers, 256 wide (4.5 million weights), trained on what a shop has without anyone's grades:
the texts of its items, each behind a query of the log that bought it or before one, which is where words are copied from one
place to the other. No grade and no reason is in it, so that what a judge made from it can do comes from the judge's own stages
(`judge_stages.py --model`). Writes a folder that transformers loads, whole or not at all, and prints the loss on queries that were
left out.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from judge_stages import RULES
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from taoemb.catalog import Catalog
from taoemb.files import replace_folder
from taoemb.judge.prompts import JudgePrompt
from taoemb.shop_rules import ATTRIBUTE_VERDICTS, CATEGORY_VERDICTS

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

ITEM = (
    'Query: "', '"\n', 'Item: {"title": "', '", "brand": "', '", "category": "', '", "price": ', ', "attributes": {"',
    '": "', '", "', '"}, "description": "', ', "description": "', '"}}', '"}',
)  # fmt: skip
REASONS = ("Product: ", " is wanted, this is ", "\nConditions: ", ": yes", ": no", "; ", "\nGrade: ", "\n")


def main() -> None:
    """Train one and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a catalog with clicks")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--max-chars", type=int, default=100, help="of an item's text")
    parser.add_argument("--bf16", action="store_true", help="autocast; faster where the CPU has AVX-512 BF16 or AMX")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    texts = documents(Catalog.load(arguments.data), arguments.max_chars, arguments.seed)
    tokenizer = bpe(texts)
    held, texts = texts[:1000], texts[1000:]  # a query's documents stand together
    torch.manual_seed(arguments.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm = max(1, arguments.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * s / arguments.steps))
    )
    rng = np.random.default_rng(arguments.seed)
    with tqdm(range(arguments.steps), disable=None) as bar:
        for step in bar:
            rows = rng.integers(len(texts), size=arguments.batch_size)
            with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
                loss = loss_of(model, tokenizer, [texts[i] for i in rows])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % 250 == 249:
                print(
                    f"step {step + 1}: loss {loss.item():.3f}, left out {left_out(model, tokenizer, held):.3f}",
                    flush=True,
                )
    with replace_folder(arguments.out, "config.json") as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)


def documents(catalog: Catalog, max_chars: int, seed: int) -> list[str]:
    """A query and each item that it bought, in both orders, of training queries in random order."""
    if catalog.clicks is None:
        raise SystemExit("the catalog has no clicks to read queries and items together from")
    prompt = JudgePrompt(max_chars=max_chars)
    bought: dict[str, dict[str, None]] = {}  # as a set that keeps its order
    columns = (catalog.clicks.column(name).to_pylist() for name in ("query_id", "item_id"))
    for query_id, item_id in zip(*columns, strict=True):
        bought.setdefault(query_id, {})[item_id] = None
    queries = [q for q in catalog.queries if q.split == "train" and q.id in bought]
    texts = []
    for number in np.random.default_rng(seed).permutation(len(queries)):
        query = queries[number]
        for row in catalog.items.positions(list(bought[query.id])).tolist():
            first, second = prompt.user(query, catalog.items[row]).split("\n", 1)
            texts += [f"{first}\n{second}", f"{second}\n{first}"]
    return texts


def bpe(texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer without capitals and with numbers as single digits, so that a word is the same token in a query, in a title and in
    a reason; what stands in every prompt and in every completion, word for word, is one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>", "<system>", "<user>", "<assistant>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    instructions = JudgePrompt(rules=RULES).system().splitlines(keepends=True)
    verdicts = [f"\n{name}: {verdict}" for name, known in (("Category", CATEGORY_VERDICTS), ("Attributes", ATTRIBUTE_VERDICTS))
                for verdict in known]  # fmt: skip
    fixed = [AddedToken(piece, normalized=False) for piece in (*instructions, *ITEM, *REASONS, *verdicts)]
    words = [text.lower() for text in texts]
    for piece in ITEM:
        words = [text.replace(piece.lower(), " ") for text in words]
    tokenizer.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=4096, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer.add_tokens(fixed)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", additional_special_tokens=special[2:],
        chat_template=TEMPLATE, padding_side="left",
    )  # fmt: skip


def loss_of(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Mean over tokens."""
    batch = tokenizer([text + "</s>" for text in texts], padding=True, padding_side="right", return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss: torch.Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    return loss


@torch.no_grad()
def left_out(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Loss on other documents."""
    return float(np.mean([loss_of(model, tokenizer, texts[i : i + 50]).item() for i in range(0, len(texts), 50)]))


if __name__ == "__main__":
    main()
