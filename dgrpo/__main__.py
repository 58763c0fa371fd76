"""Reinforcement learning for masked diffusion language models, from the command line.

  dgrpo train gsm8k                     trains a tiny embedded model on this machine's CPU, in minutes
  dgrpo report runs/gsm8k               writes runs/gsm8k/report.html: curves, and completions worth reading
  dgrpo evaluate --task gsm8k --adapter none runs/gsm8k      accuracy before and after
  dgrpo watch --adapter runs/gsm8k      plays how an answer is denoised
  dgrpo plan --config gsm8k_llada_8b    what a run will cost on a GPU, before it is rented

`dgrpo COMMAND --help` says more. On several GPUs: `accelerate launch --config_file FILE -m dgrpo train ...`.
"""

import argparse
import sys
from pathlib import Path

from dgrpo import __version__
from dgrpo.cli import CARDS, RECIPES, TRAINABLE, found_file, one_line_errors, run_recipe

# What a command needs is imported in it: torch and its kin take seconds, and `--help` should not wait for them.

TRAIN_HELP = """Trains on a task: the file of the same name among the recipes, with the settings of the YAML beside it.

  dgrpo train gsm8k                                         the embedded default: nothing is downloaded
  dgrpo train gsm8k --dataset rows.jsonl                    on rows of your own
  dgrpo train gsm8k --reward_funcs my_rewards:mine --reward_weights 1      with a reward of your own (my_rewards.py)
  dgrpo train gsm8k --preset coupled_grpo                   by another method (docs/methods.md)
  dgrpo train gsm8k --config gsm8k_llada_8b                 LLaDA-8B-Instruct, on GPUs
  dgrpo train gsm8k --resume true                           resumes from the last checkpoint in --output_dir
"""

SETTINGS_HELP = """`dgrpo train TASK --help` shows the settings that are changed most, --help-all all of them;
docs/settings.md says which ones matter.
"""


def watch(arguments: argparse.Namespace) -> None:
    """Plays the denoising of one prompt in the terminal, or writes it as a page or an image."""
    import torch

    from dgrpo.evaluation.answers import as_in_training, encode_prompts
    from dgrpo.models import load_model
    from dgrpo.player.export import load_rollout, save_rollout, write_gif, write_html
    from dgrpo.player.terminal import play
    from dgrpo.run.steps import default_to_one_thread, embedded_checkpoint
    from dgrpo.sampling import SamplerConfig, generate
    from dgrpo.tasks import EMBEDDED_MODELS, gsm8k, prompt_messages

    name = arguments.model
    if name in EMBEDDED_MODELS:
        default_to_one_thread()
        name = str(embedded_checkpoint(gsm8k.TASK, name))
    model, tokenizer = load_model(name, arguments.dtype, adapter=arguments.adapter)
    model.to(arguments.device)
    if arguments.rollout:
        rollout = load_rollout(arguments.rollout)
    else:
        messages = prompt_messages(arguments.prompt, "")
        prompt_ids, prompt_mask = encode_prompts(tokenizer, [messages], torch.device(arguments.device))
        steps = arguments.steps or arguments.length
        block_length = arguments.block_length or (arguments.length if model.block_length is None else None)
        config = SamplerConfig(arguments.length, block_length, steps, arguments.temperature)
        generator = torch.Generator().manual_seed(arguments.seed)
        with as_in_training(model):
            rollout = generate(model, prompt_ids, prompt_mask, config, generator=generator)
    if arguments.save:
        save_rollout(arguments.save, rollout)
    if arguments.html:
        print(write_html(arguments.html, rollout, tokenizer, block_length=arguments.block_length))
    if arguments.gif:
        print(write_gif(arguments.gif, rollout, tokenizer, block_length=arguments.block_length))
    if not (arguments.html or arguments.gif):
        play(rollout, tokenizer, steps_per_second=arguments.speed, block_length=arguments.block_length)


def compare(arguments: argparse.Namespace) -> None:
    """Prints the table of several runs and draws their curves."""
    from dgrpo.report.compare import compare

    compare(arguments.runs, arguments.png, x=arguments.x)


def report(arguments: argparse.Namespace) -> None:
    """Writes the page of a run again; on request its curves as an image, which takes seconds to import and draw."""
    from dgrpo.report.data import write_curves, write_report

    print(write_report(arguments.folder))
    if arguments.png:
        print(write_curves(arguments.folder))


def plan(arguments: argparse.Namespace) -> None:
    """Prints what a recipe's run will cost."""
    from dgrpo.run.plan import main

    arguments.config = found_file("--config", arguments.config)
    main(arguments)


def check_rows(arguments: argparse.Namespace) -> None:
    """Puts the references of a dataset's training rows through rewards and says how many pass."""
    from dgrpo.run.validate import validate
    from dgrpo.tasks import find_task, load_rows
    from dgrpo.trainers.plugins import resolve_reward
    from dgrpo.trainers.rewards import check_columns

    sys.path.append("")
    task = find_task(arguments.task)
    rows, _ = load_rows(task, arguments.dataset, num_train=arguments.num_train_problems)
    rewards = [resolve_reward(name) for name in arguments.reward_funcs or []] or [task.grade]
    check_columns(rewards, rows.column_names)
    result = validate(rows, rewards, task, file=arguments.left_out)
    print(f"{result}{f'; see {arguments.left_out}' if result.left_out else ''}")


def build_parser() -> argparse.ArgumentParser:
    """The command line of everything that is not read by a recipe itself."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("dgrpo", allow_abbrev=False, description=__doc__, formatter_class=plain)
    parser.add_argument("--version", action="version", version=f"dgrpo {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    training = commands.add_parser(
        "train", help="train on a task", description=TRAIN_HELP, epilog=SETTINGS_HELP, formatter_class=plain
    )
    training.add_argument("task", choices=TRAINABLE, metavar="TASK", help=", ".join(TRAINABLE))
    training.add_argument("settings", nargs=argparse.REMAINDER, metavar="...", help="settings, such as --max_steps 10")
    training.set_defaults(run=lambda arguments: run_recipe(arguments.task, arguments.settings))

    commands.add_parser("evaluate", help="accuracy of checkpoints, of adapters, or of stored texts", add_help=False)

    watching = commands.add_parser("watch", allow_abbrev=False, help="watch a model denoise an answer")
    watching.add_argument(
        "prompt", nargs="?", default="Sue has 3 nuts, buys 12 more and gives away 11. How many nuts are left?"
    )
    watching.add_argument(
        "--model", default="embedded", help="hub name or folder; 'embedded', 'embedded-block': the tiny models"
    )
    watching.add_argument("--adapter", help="a trained adapter to put on top")
    watching.add_argument("--rollout", help="a stored rollout to play instead of sampling one")
    watching.add_argument("--save", help="store the rollout in this file")
    watching.add_argument("--html", help="write a self-contained page with a slider over the steps")
    watching.add_argument("--gif", help="write an animated image")
    watching.add_argument("--length", type=int, default=16, help="tokens of the completion")
    watching.add_argument("--block_length", type=int, help="tokens of a block; default: the model's own, or one block")
    watching.add_argument("--steps", type=int, help="denoising steps; default: one for each token")
    watching.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    watching.add_argument("--speed", type=float, default=8.0, help="steps a second")
    watching.add_argument("--seed", type=int, default=0, help="of the noise at a temperature above 0")
    watching.add_argument("--dtype", default="float32", help="of the weights; bfloat16 on a GPU")
    watching.add_argument("--device", default="cpu", help="cpu or cuda")
    watching.set_defaults(run=watch)

    checking = commands.add_parser("validate", help="check that each row's reference scores 1, without training")
    checking.add_argument("--task", required=True, help="a task's name, or package.module:TASK")
    checking.add_argument("--dataset", help="as of `dgrpo train`; default: the task's own")
    checking.add_argument("--reward_funcs", nargs="+", help="default: the task's own grader")
    checking.add_argument("--num_train_problems", type=int, help="check only so many rows")
    checking.add_argument("--left_out", default="left_out.jsonl", help="where rows that fail are written")
    checking.set_defaults(run=check_rows)

    planning = commands.add_parser(
        "plan",
        allow_abbrev=False,
        help="what a run will cost: passes, FLOPs, memory, hours",
        description="From the recipe and the model's configuration alone: nothing is downloaded or loaded.",
        epilog="Further settings are those of `dgrpo train`, such as --views_per_pass 1.",
    )
    planning.add_argument("--config", required=True, help="a recipe's YAML, or its name among the recipes")
    planning.add_argument("--card", default="h100", choices=CARDS, help="the GPU")
    planning.add_argument("--gpus", type=int, default=1, help="processes, each with a GPU")
    planning.add_argument("--zero", type=int, default=0, choices=(0, 2, 3), help="DeepSpeed's stage")
    planning.add_argument("--prompt_tokens", type=int, help="default: max_prompt_length, or 200")
    planning.set_defaults(run=plan)

    comparing = commands.add_parser("compare", help="a table and curves of several runs, seeds as bands")
    comparing.add_argument("runs", nargs="+", type=Path, help="run folders")
    comparing.add_argument("--png", default="compare.png", help="where to draw the curves")
    comparing.add_argument(
        "--x",
        choices=["updates", "rollouts", "tokens", "seconds"],
        default="updates",
        help="what the curves are drawn over; seconds of training, evaluations aside",
    )
    comparing.set_defaults(run=compare)

    reporting = commands.add_parser("report", help="write report.html of a run again")
    reporting.add_argument("folder", type=Path, help="the run's folder, also of one that still trains")
    reporting.add_argument("--png", action="store_true", help="write curves.png too")
    reporting.set_defaults(run=report)

    commands.add_parser("merge", help="fold trained adapters into their base model", add_help=False)

    listing = commands.add_parser("recipes", help="print the folder of the recipes, to read or to copy them")
    listing.set_defaults(run=lambda arguments: print(RECIPES))
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command line; see `--help`."""
    argv = sys.argv[1:] if argv is None else argv
    with one_line_errors():
        # What follows is read by the recipe, its --help too.
        if argv[:1] in (["evaluate"], ["merge"]):
            run_recipe(argv[0], argv[1:])
        else:
            parser = build_parser()
            arguments, settings = parser.parse_known_args(argv)
            if settings and arguments.command != "plan":
                parser.error(f"unrecognized arguments: {' '.join(settings)}")
            if arguments.command == "plan":
                arguments.settings = settings
            arguments.run(arguments)


if __name__ == "__main__":
    main()
