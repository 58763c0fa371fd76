"""GSM8K for the conversion of SmolLM2: rows for recipes/sft.py, and what a checkpoint is worth on held-out ones.

    python examples/smollm2/gsm8k.py rows train.jsonl rows.jsonl --longest 160 --tokenizer smollm2
    python examples/smollm2/gsm8k.py measure smollm2 test.jsonl --convert
    python examples/smollm2/gsm8k.py measure runs/smollm2 test.jsonl

GSM8K's files have lines of `question` and `answer`; nothing is downloaded here.
"""

import argparse
import json
import logging
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dgrpo.logprobs import log_likelihood
from dgrpo.models import load_model
from dgrpo.sampling import SamplerConfig, generate
from dgrpo.trainers.sft import encode
from rewards.gsm8k import to_decimal

logging.disable(logging.WARNING)


def conversations(file: str) -> list[dict]:
    """The lines of a GSM8K file as prompt and completion, calculator annotations left out."""
    rows = []
    for line in Path(file).read_text().splitlines():
        row = json.loads(line)
        parts = row["answer"].split("<<")
        answer = parts[0] + "".join(part.partition(">>")[2] for part in parts[1:])
        rows.append(
            {
                "prompt": [{"role": "user", "content": row["question"]}],
                "completion": [{"role": "assistant", "content": answer}],
            }
        )
    return rows


def write_rows(arguments: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    rows = conversations(arguments.dataset)
    kept = [row for row in rows if sum(map(len, encode(row, tokenizer).values())) <= arguments.longest]
    Path(arguments.output).write_text("".join(json.dumps(row) + "\n" for row in kept))
    print(f"{len(kept)} of {len(rows)} rows")  # noqa: T201


def causal_nats(folder: str, rows: list[dict]) -> None:
    """Nats a token of the causal model itself, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            prompt, completion = row.values()
            logps = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            total -= logps.gather(1, torch.tensor(completion)[:, None]).sum().item()
            count += len(completion)
    print(f"causal: {total / count:.3f} nats a token")  # noqa: T201


def measure(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    for size in arguments.block_lengths:
        how = {"convert": "block"} if arguments.convert else {}
        model, tokenizer = load_model(arguments.folder, block_length=size, **how)
        chats = conversations(arguments.dataset)[: arguments.num_rows]
        rows = [encode(row, tokenizer) for row in chats]
        if arguments.convert and size == arguments.block_lengths[0]:
            causal_nats(arguments.folder, rows)
        bound, generator = 0.0, torch.Generator().manual_seed(0)
        for row in rows:
            ids = [torch.tensor([each]) for each in row.values()]
            # Masks of two sizes in blocks of 2, four in blocks of 4: one picture is exact for blocks of one token.
            samples = 1 if size == 1 else arguments.num_samples
            bound -= log_likelihood(model, *ids, samples, generator=generator).item()
        right = tokens = forwards = 0
        started = time.perf_counter()
        config = SamplerConfig(arguments.length, diffusion_steps=arguments.length, threshold=0.9)
        for chat, row in list(zip(chats, rows, strict=True))[: arguments.num_answers]:
            prompt = torch.tensor([row["prompt_ids"]])
            rollout = generate(model, prompt, torch.ones_like(prompt).bool(), config)
            written = rollout.completion_ids[rollout.completion_mask]
            text = tokenizer.decode(written, skip_special_tokens=True)
            gold = chat["completion"][0]["content"].rpartition("####")[2]
            right += to_decimal(text.rpartition("####")[2]) == to_decimal(gold)
            tokens, forwards = tokens + len(written), forwards + rollout.num_forwards
        seconds = time.perf_counter() - started
        count = sum(len(row["completion_ids"]) for row in rows)
        print(  # noqa: T201
            f"b={size}: bound {bound / count:.3f} nats a token; threshold 0.9: {tokens / forwards:.2f} tokens a "
            f"forward, {tokens / seconds:.1f} a second, {right} of {arguments.num_answers} right; last: {text!r}",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("rows", help="prompt/completion rows for recipes/sft.py")
    command.add_argument("dataset")
    command.add_argument("output")
    command.add_argument("--tokenizer", required=True, help="checkpoint folder")
    command.add_argument("--longest", type=int, default=160, help="tokens of prompt and completion")
    command.set_defaults(run=write_rows)
    command = commands.add_parser("measure", help="bound on held-out answers, tokens a forward")
    command.add_argument("folder")
    command.add_argument("dataset")
    command.add_argument("--convert", action="store_true", help="the folder holds the causal model")
    command.add_argument("--block_lengths", type=int, nargs="+", default=[1, 2, 4])
    command.add_argument("--num_rows", type=int, default=16)
    command.add_argument("--num_answers", type=int, default=8)
    command.add_argument("--num_samples", type=int, default=4)
    command.add_argument("--length", type=int, default=96)
    command.set_defaults(run=measure)
    arguments = parser.parse_args()
    arguments.run(arguments)
