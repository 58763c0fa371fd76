"""What a block model's rollouts cost against a full canvas of the same size: tokens through the network, CPU time.

    OMP_NUM_THREADS=1 python benchmarks/blocks.py [--lengths 16 64] [--model FOLDER]

Both networks have the embedded models' shape and random weights; no answer ends early. With --model: the tokens
that pass through a trained block model for each rollout of its recipe (threshold 0.9, T 1), until its answers end.
"""

import argparse
import time

import torch

from dgrpo import SamplerConfig, generate, load_model
from dgrpo.evaluation.answers import encode_prompts
from dgrpo.run.steps import embedded_checkpoint
from dgrpo.tasks import gsm8k, load_rows
from dgrpo.tiny.build import in_blocks

GROUP = 8


def measure(model, prompts: tuple[torch.Tensor, torch.Tensor], config: SamplerConfig) -> tuple[float, float]:
    """Tokens through the network and CPU seconds, of one rollout."""
    tokens: list[int] = []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda module, ids: tokens.append(ids[0].numel()))
    started = time.process_time()
    with torch.no_grad():
        generate(model, *prompts, config, row_keys=torch.arange(len(prompts[0])))
    seconds = time.process_time() - started
    handle.remove()
    return sum(tokens) / len(prompts[0]), seconds / len(prompts[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--model", help="a trained block model instead, by its folder")
    arguments = parser.parse_args()
    full, tokenizer = load_model(str(embedded_checkpoint(gsm8k.TASK)))
    rows, _ = load_rows(gsm8k.TASK, "embedded", num_train=16, num_held_out=1, instruction="")
    messages = [row["prompt"] for row in rows for _ in range(GROUP)]
    prompts = encode_prompts(tokenizer, messages, torch.device("cpu"))
    if arguments.model:
        model, _ = load_model(arguments.model)
        tokens, seconds = measure(
            model, prompts, SamplerConfig(20, diffusion_steps=20, temperature=1.0, threshold=0.9)
        )
        print(f"{tokens:.1f} tokens through the network, {1e3 * seconds:.2f} CPU ms for each rollout")
        return
    torch.manual_seed(0)
    for parameter in full.parameters():
        torch.nn.init.normal_(parameter, std=0.05) if parameter.dim() == 2 else torch.nn.init.ones_(parameter)
    blocks = in_blocks(full, 4).eval()
    prompts = prompts[0][: 2 * GROUP], prompts[1][: 2 * GROUP]
    print("| C | tokens: full | block | CPU us per token: full | block | ratio |\n|---|---|---|---|---|---|")
    for length in arguments.lengths:
        found = {}
        for name, model, block_length in (("full", full, length), ("block", blocks, None)):
            config = SamplerConfig(length, block_length, length, temperature=1.0, stop_at_eos=False)
            measure(model, prompts, config)
            found[name] = measure(model, prompts, config)
        (full_tokens, full_seconds), (block_tokens, block_seconds) = found["full"], found["block"]
        print(
            f"| {length} | {full_tokens:.0f} | {block_tokens:.0f} | {1e6 * full_seconds / length:.0f} | "
            f"{1e6 * block_seconds / length:.0f} | {full_seconds / block_seconds:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
