"""Looking at rollouts and runs: `python -m dgrpo watch | compare | report`."""

import argparse
import sys
from pathlib import Path

import torch

from dgrpo.compare import compare
from dgrpo.evaluate import encode_prompts
from dgrpo.models import load_model
from dgrpo.player import load_rollout, play, save_rollout
from dgrpo.player_export import write_gif, write_html
from dgrpo.report import write_curves, write_report
from dgrpo.run import CHECKPOINTS
from dgrpo.sampling import SamplerConfig, generate
from dgrpo.tasks import prompt_messages


def watch(arguments: argparse.Namespace) -> None:
    """Plays the denoising of one prompt in the terminal, or writes it as a page or an image."""
    model, tokenizer = load_model(arguments.model, arguments.dtype, adapter=arguments.adapter)
    model.to(arguments.device)
    if arguments.rollout:
        rollout = load_rollout(arguments.rollout)
    else:
        messages = prompt_messages(arguments.prompt, "")
        prompt_ids, prompt_mask = encode_prompts(tokenizer, [messages], torch.device(arguments.device))
        steps = arguments.steps or arguments.length
        config = SamplerConfig(
            arguments.length, arguments.block_length or arguments.length, steps, arguments.temperature
        )
        generator = torch.Generator().manual_seed(arguments.seed)
        rollout = generate(model, prompt_ids, prompt_mask, config, generator=generator)
    if arguments.save:
        save_rollout(arguments.save, rollout)
    if arguments.html:
        print(write_html(arguments.html, rollout, tokenizer, block_length=arguments.block_length))
    if arguments.gif:
        print(write_gif(arguments.gif, rollout, tokenizer, block_length=arguments.block_length))
    if not (arguments.html or arguments.gif):
        play(rollout, tokenizer, steps_per_second=arguments.speed, block_length=arguments.block_length)


def main(argv: list[str] | None = None) -> None:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(
        "dgrpo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    watching = commands.add_parser("watch", help="watch a model denoise an answer")
    watching.add_argument(
        "prompt", nargs="?", default="Tom has 5 pens, buys 4 more and gives away 2. How many pens are left?"
    )
    watching.add_argument("--model", default=str(CHECKPOINTS / "gsm8k"), help="hub name or folder")
    watching.add_argument("--adapter", help="a trained adapter to put on top")
    watching.add_argument("--rollout", help="a stored rollout to play instead of sampling one")
    watching.add_argument("--save", help="store the rollout in this file")
    watching.add_argument("--html", help="write a self-contained page with a slider over the steps")
    watching.add_argument("--gif", help="write an animated image")
    watching.add_argument("--length", type=int, default=16, help="tokens of the completion")
    watching.add_argument("--block_length", type=int, help="tokens of a block; default: one block")
    watching.add_argument("--steps", type=int, help="denoising steps; default: one for each token")
    watching.add_argument("--temperature", type=float, default=0.0)
    watching.add_argument("--speed", type=float, default=8.0, help="steps a second")
    watching.add_argument("--seed", type=int, default=0)
    watching.add_argument("--dtype", default="float32")
    watching.add_argument("--device", default="cpu")
    watching.set_defaults(run=watch)

    comparing = commands.add_parser("compare", help="a table and curves of several runs, seeds as bands")
    comparing.add_argument("runs", nargs="+", type=Path, help="run folders")
    comparing.add_argument("--png", default="compare.png", help="where to draw the curves")
    comparing.set_defaults(run=lambda arguments: compare(arguments.runs, arguments.png))

    reporting = commands.add_parser("report", help="write report.html and curves.png of a run again")
    reporting.add_argument("folder", type=Path)
    reporting.set_defaults(run=lambda arguments: print(write_report(arguments.folder), write_curves(arguments.folder)))

    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except ValueError as error:
        sys.exit(f"dgrpo: {error}")


if __name__ == "__main__":
    main()
