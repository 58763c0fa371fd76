"""Accuracy of checkpoints or adapters on a task, at several generation lengths; or of stored generations.

    python recipes/evaluate.py --task gsm8k --model GSAI-ML/LLaDA-8B-Instruct --lengths 128 256 512
    accelerate launch recipes/evaluate.py --task gsm8k --adapter none runs/gsm8k     # before and after, side by side
    python recipes/evaluate.py --generations generations/*.json --protocol d1 strict --disagreements

As in the papers: greedy, in blocks of 32, with half as many denoising steps as tokens. The folder then holds the texts
in d1's JSON format, results.json and accuracy.png. --resume continues an interrupted run.
"""

import argparse

from dgrpo.cli import DTYPES, PROTOCOLS, REMASKING, STUDIED, Parser, mapping, named, one_line_errors, seed, whole


def main() -> None:
    parser = Parser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", nargs="+", help="Stored generations to grade, without a model.")
    parser.add_argument("--protocol", nargs="+", choices=PROTOCOLS, help="Default: both, where d1 has the task.")
    parser.add_argument("--disagreements", action="store_true", help="Where the protocols differ on them, and why.")
    parser.add_argument("--task", choices=STUDIED, help="'grpo': rows and rewards as the run had them.")
    parser.add_argument(
        "--model", nargs="+", type=named, help="Hub names or folders; default: the task's embedded checkpoint."
    )
    parser.add_argument(
        "--adapter", nargs="+", type=named, help="Trained adapters to put on top; 'none' is the model as it is."
    )
    parser.add_argument(
        "--dataset",
        type=named,
        help="What the model was trained on, of which the held-out part is asked; default: as its run.",
    )
    parser.add_argument(
        "--eval_dataset", type=named, help="Local file or dataset of which all rows are asked instead."
    )
    parser.add_argument("--instruction", help="Text before each question; default: as its run, or the task's.")
    parser.add_argument("--num_problems", type=whole, help="Default: all; of generated or undivided ones 512.")
    parser.add_argument("--lengths", nargs="+", type=whole, help="Tokens; default: 128 256 512.")
    parser.add_argument("--threshold", type=float, help="Commit every token at least this probable in a step.")
    parser.add_argument("--entropy_sum", type=float, help="SDAR's sum of entropies in nats, with remasking entropy.")
    parser.add_argument("--min_commit", type=whole, default=1, help="With one of these two: at least so many a step.")
    parser.add_argument("--remasking", choices=REMASKING, default="low_confidence", help="Their order.")
    parser.add_argument("--top_k", type=int, default=0, help="Draw from the k most likely words; 0: all.")
    parser.add_argument("--top_p", type=float, default=1.0, help="Draw from the fewest words with this share; 1: all.")
    parser.add_argument("--block_length", type=whole, help="Default: the model's own, or 32.")
    parser.add_argument("--diffusion_steps", type=whole, help="Default: half as many as tokens.")
    parser.add_argument("--temperature", type=float, help="Default: 0; of several samples 1.")
    parser.add_argument("--sampler_policy", help="What a denoising step writes: package.module:function.")
    parser.add_argument("--sampler_policy_kwargs", type=mapping, help="Settings of the policy, as JSON.")
    parser.add_argument("--compile_rollouts", help="Compile a step's layers: inductor, cudagraphs or eager; exact.")
    parser.add_argument("--samples", type=whole, default=1, help="Completions of each problem; above 1: pass@k.")
    parser.add_argument(
        "--select",
        nargs="+",
        choices=["majority", "best"],
        default=[],
        help="Also the accuracy of one chosen sample: the most frequent answer, or the highest reward where that "
        "reads no reference (sudoku, countdown).",
    )
    parser.add_argument("--seed", type=seed, default=0, help="Of the noise at a temperature above 0.")
    parser.add_argument("--batch_size", type=whole, default=64, help="Rows that a process samples at a time.")
    parser.add_argument("--chat_template_kwargs", type=mapping, help='JSON, such as {"enable_thinking": false}.')
    parser.add_argument("--dtype", choices=DTYPES, help="Default: bfloat16, on a CPU float32.")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="Default: the accelerator, if there is one.")
    parser.add_argument("--output_dir", default="runs/evaluation")
    parser.add_argument("--resume", action="store_true", help="Go on from the rows that output_dir holds.")
    arguments = parser.parse_args()
    if arguments.samples < 1 or (arguments.select and arguments.samples < 2):
        parser.error(f"--samples {arguments.samples}: at least 1, and 2 or more where --select chooses among them")
    if arguments.temperature is None:
        arguments.temperature = 1.0 if arguments.samples > 1 else 0.0
    elif arguments.samples > 1 and not arguments.temperature > 0:
        parser.error("--temperature 0 gives the same completion in every sample; take one above 0")
    # Imported where the command line is read: `--help` does not wait for torch and its kin.
    from dgrpo.run.evaluation import grade_models, grade_stored

    if arguments.generations:
        grade_stored(arguments)
    elif arguments.task:
        grade_models(arguments)
    else:
        parser.error("give --task, or --generations to grade stored ones")


if __name__ == "__main__":
    with one_line_errors():
        main()
