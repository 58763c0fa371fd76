"""Reinforcement learning for masked diffusion language models, from the command line.

  dgrpo train gsm8k                     trains a tiny embedded model on this machine's CPU, in minutes
  dgrpo report runs/gsm8k               writes runs/gsm8k/report.html: curves, and completions worth reading
  dgrpo evaluate --task gsm8k --adapter none runs/gsm8k      accuracy before and after
  dgrpo watch --adapter runs/gsm8k      plays how an answer is denoised
  dgrpo chat --adapter runs/gsm8k       answers what you type; `dgrpo generate` answers a file of prompts
  dgrpo fill --prompt QUESTION TEXT     writes what TEXT has hidden as [MASK], between words that stay
  dgrpo study --task gsm8k --presets diffu_grpo tracerl      compares methods over seeds, as a table and a plot
  dgrpo plan --config gsm8k_llada_8b    what a run will cost on a GPU, before it is rented

`dgrpo COMMAND --help` says more. On several GPUs: `accelerate launch --config_file FILE -m dgrpo train ...`.
"""

import argparse
import sys
from pathlib import Path

from dgrpo import __version__
from dgrpo.cli import (
    CARDS,
    DTYPES,
    RECIPES,
    STUDIED,
    TRAINABLE,
    Parser,
    found_file,
    mapping,
    named,
    one_line_errors,
    positive_number,
    run_recipe,
    seed,
    whole,
)

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


def chosen(arguments: argparse.Namespace) -> tuple:
    """The checkpoint that the arguments name, and its sampler; refused before the time that loading a model takes."""
    import torch

    from dgrpo.evaluation.checkpoints import NO_ADAPTER, checkpoints
    from dgrpo.run.callbacks import no_bars_without_a_terminal
    from dgrpo.run.steps import default_to_one_thread, embedded_checkpoint
    from dgrpo.tasks import EMBEDDED, EMBEDDED_MODELS, gsm8k

    no_bars_without_a_terminal()
    folders = {name: embedded_checkpoint(gsm8k.TASK, name) for name in EMBEDDED_MODELS}
    models = [str(folders.get(arguments.model, arguments.model))] if arguments.model else []
    adapters = [arguments.adapter] if arguments.adapter not in (None, NO_ADAPTER) else []
    [checkpoint] = checkpoints(models, adapters, folders[EMBEDDED])
    if embedded := Path(checkpoint.model).parent in {folder.parent for folder in folders.values()}:
        default_to_one_thread()
    # The embedded models are trained on canvases of this length.
    arguments.max_completion_length = arguments.max_completion_length or (16 if embedded else 128)
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={arguments.device!r}: {str(error).splitlines()[0]}") from error
    return checkpoint, sampler(arguments)


def loaded(arguments: argparse.Namespace, checkpoint) -> tuple:
    """Model and tokenizer of a checkpoint, on the device."""
    from dgrpo.models import load_model

    dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16")
    model, tokenizer = load_model(checkpoint.model, dtype, adapter=checkpoint.adapter)
    return model.to(arguments.device), tokenizer


def sampler(arguments: argparse.Namespace):
    """The sampler that the arguments describe."""
    from dgrpo.sampling import SamplerConfig

    arguments.diffusion_steps = arguments.diffusion_steps or arguments.max_completion_length
    fields = SamplerConfig.__dataclass_fields__
    return SamplerConfig(**{name: value for name, value in vars(arguments).items() if name in fields})


def watch(arguments: argparse.Namespace) -> None:
    """Plays the denoising of one prompt in the terminal, or writes it as a page or an image."""
    import torch

    from dgrpo.evaluation.answers import as_in_training, encode_prompts
    from dgrpo.player.export import load_rollout, save_rollout, write_gif, write_html
    from dgrpo.player.terminal import play
    from dgrpo.sampling import generate
    from dgrpo.tasks import prompt_messages

    checkpoint, config = chosen(arguments)
    rollout = load_rollout(arguments.rollout) if arguments.rollout else None
    for name in ("save", "html", "gif"):
        path = getattr(arguments, name)
        if path and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
            raise ValueError(f"{name}={path!r}: no file can be written there; name one in a folder that exists.")
    model, tokenizer = loaded(arguments, checkpoint)
    if rollout is None:
        messages = prompt_messages(arguments.prompt, "")
        prompt_ids, prompt_mask = encode_prompts(tokenizer, [messages], torch.device(arguments.device))
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


def chat(arguments: argparse.Namespace) -> None:
    """Answers what is typed, line after line."""
    from dgrpo.player.chat import chat

    checkpoint, config = chosen(arguments)
    model, tokenizer = loaded(arguments, checkpoint)
    chat(
        model,
        tokenizer,
        config,
        system_prompt=arguments.system_prompt,
        seed=arguments.seed,
        steps_per_second=arguments.speed,
        template_settings=arguments.chat_template_kwargs,
    )


def generate(arguments: argparse.Namespace) -> None:
    """Answers the prompts of a file, or of standard input, as JSON lines."""
    from dataclasses import asdict

    from tqdm import tqdm

    from dgrpo.evaluation.files import fingerprint
    from dgrpo.evaluation.generation import Output, complete, output_settings, prompt_rows
    from dgrpo.tasks.columns import PromptColumns

    if arguments.samples > 1 and not arguments.temperature:
        raise ValueError("temperature=0.0 gives the same completion in every sample; set --temperature above 0.")
    columns = PromptColumns(arguments.prompt_column, arguments.system_prompt, arguments.prompt_format)
    rows = prompt_rows(arguments.prompts)
    for row in rows:
        columns.prompt_of(row)  # which refuses what cannot be asked
    checkpoint, config = chosen(arguments)
    settings = output_settings(
        rows,
        model=fingerprint(checkpoint.model),
        adapter=arguments.adapter and fingerprint(arguments.adapter),
        sampler=asdict(config),
        columns=asdict(columns),
        **{name: getattr(arguments, name) for name in ("seed", "dtype", "samples", "chat_template_kwargs")},
    )
    output = Output(arguments.output, settings, resume=arguments.resume)
    model, tokenizer = loaded(arguments, checkpoint)
    total = len(rows) * arguments.samples
    with tqdm(total=total, unit="completion", disable=not (arguments.output and sys.stderr.isatty())) as bar:
        complete(
            model,
            tokenizer,
            rows,
            columns,
            config,
            output,
            num_samples=arguments.samples,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            template_settings=arguments.chat_template_kwargs,
            on_batch=bar.update,
        )


def fill(arguments: argparse.Namespace) -> None:
    """Fills the holes of a text, and prints each way with its bound, the likeliest first."""
    from dgrpo.evaluation.filling import fill
    from dgrpo.tasks import prompt_messages
    from dgrpo.text import printable

    if arguments.samples > 1 and not arguments.temperature:
        raise ValueError("temperature=0.0 fills a text in one way; set --temperature above 0 for several samples.")
    checkpoint, config = chosen(arguments)
    model, tokenizer = loaded(arguments, checkpoint)
    found = fill(
        model,
        tokenizer,
        arguments.text,
        config,
        prompt=prompt_messages(arguments.prompt, "") if arguments.prompt else None,
        lengths=arguments.lengths,
        num_samples=arguments.samples,
        num_views=arguments.views,
        seed=arguments.seed,
    )
    for each in found:
        print(f"{each.bound:10.2f} nats, {each.num_tokens} tokens written\n{printable(each.text)}")


def compare(arguments: argparse.Namespace) -> None:
    """Prints the table of several runs and draws their curves."""
    from dgrpo.report.compare import compare

    compare(arguments.runs, arguments.png, x=arguments.x)


def report(arguments: argparse.Namespace) -> None:
    """Writes the page of a run again; on request its curves as an image, which takes seconds to import and draw."""
    from dgrpo.report.data import write_curves, write_report

    files = ("config.yaml", "metrics.csv", "summary.json")
    if arguments.folder.is_dir() and not any((arguments.folder / name).is_file() for name in files):
        raise ValueError(f"run_dir={str(arguments.folder)!r}: there is no run here, none of {', '.join(files)}.")
    print(write_report(arguments.folder))
    if arguments.png:
        print(write_curves(arguments.folder))


def plan(arguments: argparse.Namespace) -> None:
    """Prints what a recipe's run will cost."""
    from dgrpo.run.plan import main

    arguments.config = found_file("--config", arguments.config)
    main(arguments)


def study(arguments: argparse.Namespace) -> None:
    """Compares presets by many short runs, and prints the table."""
    from dgrpo.run.study import Budget, study

    names = ["recipe" if each == "none" else Path(each).stem for each in arguments.presets]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"presets={arguments.presets}: {repeated!r} is there twice; name each once.")
    settings = [[] if each == "none" else ["--preset", each] for each in arguments.presets]
    seconds = arguments.seconds or ([] if arguments.rollouts else [60.0])
    sys.path.append("")
    table = study(
        arguments.task,
        dict(zip(names, settings, strict=True)),
        Budget(tuple(seconds), tuple(arguments.rollouts)),
        arguments.output_dir,
        seeds=range(arguments.seeds),
        common=arguments.settings,
        learning_rates=arguments.learning_rates,
        workers=arguments.workers,
    )
    print(f"\n{table}\n\nTable and plot: {arguments.output_dir / arguments.task}.md, .png")


def check_rows(arguments: argparse.Namespace) -> None:
    """Puts the references of a dataset's training rows through rewards and says how many pass."""
    from dgrpo.reliability.columns import check_columns
    from dgrpo.run.own_data import parse_own_data
    from dgrpo.run.validate import validate
    from dgrpo.tasks import find_task, load_rows
    from dgrpo.trainers.plugins import resolve_reward

    sys.path.append("")
    names, dataset = arguments.reward_funcs or [], arguments.dataset
    if arguments.task == "grpo":
        settings = [*arguments.settings, *(["--dataset", dataset] if dataset else [])]
        recipe, task = parse_own_data(
            str(RECIPES / "grpo.py"), [*settings, *(["--reward_funcs", *names] if names else [])]
        )
        names, dataset = recipe.reward_funcs, recipe.dataset
    else:
        task = find_task(arguments.task)
    rows, _ = load_rows(task, dataset, num_train=arguments.num_train_problems)
    rewards = [resolve_reward(name) for name in names] or [task.grade]
    check_columns(rewards, rows.column_names)
    result = validate(rows, rewards, task, file=arguments.left_out)
    print(f"{result}{f'; see {arguments.left_out}' if result.left_out else ''}")


def add_conversation(parser: argparse.ArgumentParser) -> None:
    """The arguments that say how a prompt is put to the model."""
    parser.add_argument("--system_prompt", help="system message of each conversation that has none")
    parser.add_argument("--chat_template_kwargs", type=mapping, help='JSON, such as {"enable_thinking": false}')


def add_model(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a model."""
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        type=named,
        help="hub name or folder; default: what the adapter was trained on, or the tiny 'embedded' ('embedded-block')",
    )
    add("--adapter", type=named, help="a trained adapter to put on top")
    add("--dtype", choices=DTYPES, help="of the weights; default: float32 on a CPU, else bfloat16")
    add("--device", default="cpu", help="cpu or cuda")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a model and describe its sampler: the fields of `SamplerConfig`."""
    add_model(parser)
    add = parser.add_argument_group("sampler").add_argument
    tokens = "tokens of the completion; default: 128, of the embedded models 16"
    add("--max_completion_length", "--length", type=whole, help=tokens)
    add("--block_length", type=whole, help="tokens of a block; default: the model's own, or at most 32")
    add("--diffusion_steps", "--steps", type=whole, help="denoising steps; default: one for each token")
    add("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    add("--seed", type=seed, default=0, help="of the noise at a temperature above 0")
    add("--top_k", type=int, default=0, help="draw from the k most likely words; 0: all")
    add("--top_p", type=float, default=1.0, help="draw from the fewest words with this share; 1: all")
    add(
        "--remasking", default="low_confidence", help="order: low_confidence, random, entropy, topk_margin, sequential"
    )
    add("--cfg_scale", type=float, default=0.0, help="classifier-free guidance; 0: off")
    add("--stop_at_eos", type=yes_or_no, default=True, help="stop behind the block in which a completion ends")
    add("--logits_eos_inf", type=yes_or_no, default=False, help="never draw the end of text")
    add("--confidence_eos_eot_inf", type=yes_or_no, default=False, help="commit a block's end-of-text tokens last")
    add("--cache", choices=["prefix", "dual", "recompute"], help="prefix, dual: approximate, faster (full attention)")
    add("--cache_refresh", type=int, help="steps between refreshes of that cache; default: each block")
    add("--threshold", type=float, help="commit every token at least this probable in a step")
    add("--factor", type=float, help="Fast-dLLM's rule on sorted confidences")
    add("--entropy_bound", type=float, help="EB-Sampler's bound in nats")
    add("--entropy_sum", type=float, help="SDAR's sum of entropies in nats")
    add("--min_commit", type=int, default=1, help="with one of these four rules: at least so many tokens a step")
    add("--sampler_policy", help="what a step writes: package.module:function")
    add("--sampler_policy_kwargs", type=mapping, help="its settings, as JSON")
    add("--compile_rollouts", help="compile a step's layers: inductor, cudagraphs or eager; exact")


def yes_or_no(text: str) -> bool:
    """A truth value as settings of `dgrpo train` are written."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def build_parser() -> argparse.ArgumentParser:
    """The command line of everything that is not read by a recipe itself."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = Parser("dgrpo", allow_abbrev=False, description=__doc__, formatter_class=plain)
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
    watching.add_argument("--rollout", help="a stored rollout to play instead of sampling one")
    watching.add_argument("--save", help="store the rollout in this file")
    watching.add_argument("--html", help="write a self-contained page with a slider over the steps")
    watching.add_argument("--gif", help="write an animated image")
    watching.add_argument("--speed", type=positive_number, default=8.0, help="steps a second")
    add_sampling(watching)
    watching.set_defaults(run=watch)

    generating = commands.add_parser(
        "generate", allow_abbrev=False, help="answer the prompts of a file, as JSON lines"
    )
    generating.add_argument(
        "prompts",
        nargs="?",
        default="-",
        help="text (a prompt a line), JSON lines or a dataset; default: standard input",
    )
    generating.add_argument("--output", help="file of JSON lines to write; default: standard output")
    generating.add_argument("--resume", action="store_true", help="continue the file where a run was cut off")
    generating.add_argument("--samples", type=whole, default=1, help="completions of each prompt")
    generating.add_argument("--batch_size", type=whole, default=16, help="completions sampled at a time")
    generating.add_argument("--prompt_column", help="field with a text or messages; default: prompt, or messages")
    generating.add_argument(
        "--prompt_format", choices=["chat", "plain"], default="chat", help="plain: texts without the chat template"
    )
    add_conversation(generating)
    add_sampling(generating)
    generating.set_defaults(run=generate)

    chatting = commands.add_parser("chat", allow_abbrev=False, help="talk with a model, and watch it write")
    chatting.add_argument("--speed", type=positive_number, default=30.0, help="steps a second, at most")
    add_conversation(chatting)
    add_sampling(chatting)
    chatting.set_defaults(run=chat)

    filling = commands.add_parser("fill", allow_abbrev=False, help="fill what a text has hidden as [MASK]")
    filling.add_argument("text", help="with [MASK] for each token that is to be written; its other words stay")
    filling.add_argument("--prompt", help="a question that the text answers; default: the text stands alone")
    filling.add_argument("--lengths", type=whole, nargs="+", help="tokens to try for the text's only hole")
    filling.add_argument("--samples", type=whole, default=1, help="ways of filling it at a temperature above 0")
    filling.add_argument("--views", type=whole, default=128, help="masked views of the bound that ranks them")
    filling.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    filling.add_argument("--threshold", type=float, help="commit every token at least this probable in a step")
    filling.add_argument("--seed", type=seed, default=0, help="of noise and views")
    add_model(filling)
    filling.set_defaults(run=fill, max_completion_length=None, diffusion_steps=None)

    checking = commands.add_parser("validate", help="check that each row's reference scores 1, without training")
    checking.add_argument(
        "--task",
        required=True,
        help="a task's name, or package.module:TASK; of 'grpo' further settings are those of `dgrpo train grpo`",
    )
    checking.add_argument("--dataset", type=named, help="as of `dgrpo train`; default: the task's own")
    checking.add_argument("--reward_funcs", nargs="+", type=named, help="default: the task's own grader")
    checking.add_argument("--num_train_problems", type=whole, help="check only so many rows")
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
    planning.add_argument("--gpus", type=whole, default=1, help="processes, each with a GPU")
    planning.add_argument("--zero", type=int, default=0, choices=(0, 2, 3), help="DeepSpeed's stage")
    planning.add_argument("--prompt_tokens", type=whole, help="default: max_prompt_length, or 200")
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

    studying = commands.add_parser(
        "study",
        allow_abbrev=False,
        help="compare methods: many short runs, a table and a plot",
        description="Trains each preset with several seeds, measures all of them on the same held-out problems after "
        "the same time or rollouts, and writes a table (mean, least, most) and a plot. Run again, it resumes. "
        "Rollouts are exact and the learning rate constant after its warm-up, unless a setting says otherwise.",
        epilog="Further settings are those of `dgrpo train TASK`, for all runs: such as --num_eval_problems 128.",
    )
    studying.add_argument("--presets", nargs="+", default=["none"], help="names or YAML files; none: the recipe alone")
    studying.add_argument("--task", required=True, choices=STUDIED, metavar="TASK", help=", ".join(STUDIED))
    studying.add_argument("--seeds", type=whole, default=3, help="runs of each preset: seeds 0, 1, 2, ... (3)")
    studying.add_argument("--seconds", type=positive_number, nargs="+", help="of training; CPU seconds on a CPU (60)")
    studying.add_argument("--rollouts", type=whole, nargs="+", default=[], help="batches of rollouts")
    studying.add_argument(
        "--learning_rates",
        type=positive_number,
        nargs="+",
        default=[],
        help="tried first over half of the budget, on a seed of its own; the best is compared",
    )
    studying.add_argument("--output_dir", type=Path, default=Path("runs/study"), help="results are kept here")
    studying.add_argument("--workers", type=whole, default=1, help="runs at a time")
    studying.set_defaults(run=study)

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
            checks_own_data = arguments.command == "validate" and arguments.task == "grpo"
            with_settings = arguments.command in ("plan", "study") or checks_own_data
            if settings and not with_settings:
                parser.error(f"unrecognized arguments: {' '.join(settings)}")
            if with_settings:
                arguments.settings = settings
            arguments.run(arguments)


if __name__ == "__main__":
    main()
