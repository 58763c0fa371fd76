"""Settings of a run: what a recipe adds to the trainer's and the model's, how they are read and stored."""

import json
import re
import sys
from dataclasses import MISSING, asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from transformers import TrainingArguments
from trl import ModelConfig, TrlParser

from dgrpo.cli import print_help
from dgrpo.secrets import redacted
from dgrpo.tasks import EMBEDDED
from dgrpo.trainers import DiffuGRPOConfig


@dataclass
class RecipeConfig:
    """What a recipe adds to the trainer's and the model's settings."""

    reward_funcs: list[str] = field(
        default_factory=list, metadata={"help": "Rewards: 'package.module:function' or installed names."}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Hub name, local .jsonl/.json/.csv/.parquet file, or 'embedded'."}
    )
    eval_dataset: str | None = field(default=None, metadata={"help": "Held-out rows, if not of the same source."})
    num_train_problems: int | None = field(default=None, metadata={"help": "Use only so many training problems."})
    num_eval_problems: int = field(default=512, metadata={"help": "Held-out problems of each evaluation."})
    evaluate_every: int = field(default=0, metadata={"help": "Updates between evaluations; 0: before and after only."})
    eval_sampler: Literal["exact", "parallel", "training"] = field(
        default="exact",
        metadata={
            "help": "Evaluate by the exact sampler; with the rollouts' parallel decoding (threshold and its kin), but "
            "without a cache; or with all of their shortcuts."
        },
    )
    coverage_problems: int = field(
        default=0,
        metadata={"help": "Held-out problems for pass@1 and pass@8 before and after, such as 64; 0: not measured."},
    )
    instruction: str | None = field(default=None, metadata={"help": "Text before each question; default: the task's."})
    adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "A trained adapter (for example of recipes/sft.py) to start from."}
    )
    sample_every: int = field(default=4, metadata={"help": "Rollouts between printed completions; 0: none."})
    keep_best: bool = field(
        default=True, metadata={"help": "Keep the weights of the best evaluation in output_dir/best (evaluate_every)."}
    )
    validate: bool = field(
        default=True, metadata={"help": "Before training, leave out rows whose own reference the rewards do not pass."}
    )
    resume: bool = field(default=False, metadata={"help": "Resume from the last whole checkpoint in output_dir."})

    def __post_init__(self):
        for name, least in {
            "num_train_problems": 1,
            "num_eval_problems": 1,
            "evaluate_every": 0,
            "coverage_problems": 0,
            "sample_every": 0,
        }.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name}={value}: must be {least} or more.")


def parse_recipe(recipe: str, *config_types: type, argv: list[str] | None = None) -> tuple:
    """The recipe's settings: a YAML, then --preset FILE, then the command line.

    The YAML is --config FILE. Without it, the embedded model has that beside the recipe; of which nothing holds for
    another model, that has the defaults of the classes. `--threshold none` takes back a file's `threshold`, and so for
    every setting that is None by default.

    Raises:
        ValueError: a file cannot be read, a setting is unknown or of the wrong type.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if print_help(Path(recipe).stem, argv):
        raise SystemExit(0)
    config, preset = _option(argv, "--config"), _option(argv, "--preset")
    above = read_yaml(preset) if preset else {}
    model = _option(list(argv), "--model_name_or_path") or above.get("model_name_or_path", EMBEDDED)
    files = [config or (str(Path(recipe).with_suffix(".yaml")) if model == EMBEDDED else None), preset]
    settings: dict[str, Any] = {"output_dir": f"runs/{Path(recipe).stem}"}
    for file in filter(None, files):
        settings |= read_yaml(file)
    # Without abbreviations: `--learning_rat 1` must be refused, not read as the learning rate.
    parser = TrlParser(config_types or (RecipeConfig, DiffuGRPOConfig, ModelConfig), allow_abbrev=False)  # type: ignore[arg-type]  # TRL: a NewType
    known = {action.dest for action in parser._actions}
    if unknown := sorted(set(settings) - known):
        raise ValueError(
            f"{' + '.join(filter(None, files))}: unknown keys {unknown}. Remove them or mend their spelling."
        )
    for action in parser._actions:
        if action.default is None and any(_takes_none(argv, option) for option in action.option_strings):
            settings[action.dest] = None
    parser.error = _refuse  # type: ignore[method-assign]  # argparse prints 223 lines of usage
    for action in parser._actions:
        value = settings.get(action.dest)
        if isinstance(value, dict | list) and action.nargs is None and action.type in (int, float, bool):
            raise ValueError(f"{action.dest}={value!r}: must be one value, not several.")
        if isinstance(value, bool) and action.type in (int, float):
            raise ValueError(f"{action.dest}={value!r}: must be a number.")
    parser.set_defaults_with_config(**settings)
    try:
        *configs, rest = parser.parse_args_into_dataclasses(args=argv, return_remaining_strings=True)
    except json.JSONDecodeError as error:
        raise ValueError(f"a setting's mapping is no JSON: {error} in {error.doc!r:.80}.") from error
    except (ValueError, TypeError) as error:
        # Of the libraries' own checks too.
        raise ValueError(str(error)) from error
    if rest:
        raise ValueError(f"unknown arguments {rest}. `--help-all` lists the settings.")
    if checkpoint := next((c.resume_from_checkpoint for c in configs if hasattr(c, "resume_from_checkpoint")), None):
        raise ValueError(
            f"resume_from_checkpoint={checkpoint!r} is not read; --resume true resumes from the newest whole "
            "checkpoint in output_dir."
        )
    for name in ("model_name_or_path", "dataset", "eval_dataset"):
        if any(getattr(config, name, None) == "" for config in configs):
            raise ValueError(f"{name}='': it is empty; name one, or leave it out.")
    return tuple(configs)


def _refuse(message: str) -> NoReturn:
    # argparse says `argument --learning_rate/--learning-rate: ...`.
    message = re.sub(r"^argument --(\w+)(/--[\w-]+)*", r"\1", message.rstrip("."))
    raise ValueError(f"{message}. `--help-all` lists the settings.")


def read_yaml(file: str) -> dict[str, Any]:
    """The settings of a YAML file; ValueError where it is none."""
    try:
        loaded = yaml.safe_load(Path(file).read_text("utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ValueError(f"config={file!r} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"config={file!r}: must be a YAML mapping of settings.")
    return loaded


def _option(argv: list[str], name: str) -> str | None:
    """Takes `name VALUE` or `name=VALUE` out of argv."""
    for index, word in enumerate(argv):
        if word == name and index + 1 < len(argv):
            del argv[index]
            return argv.pop(index)
        if word.startswith(name + "="):
            return argv.pop(index).partition("=")[2]
    return None


def _takes_none(argv: list[str], option: str) -> bool:
    """Whether argv says `option none`, which is then taken out of it."""
    for index, word in enumerate(argv):
        words = 1 if word == f"{option}=none" else 2
        if argv[index : index + words] in ([option, "none"], [f"{option}=none"]):
            del argv[index : index + words]
            return True
    return False


def begun_with(recipe: Any, model_config: ModelConfig) -> dict[str, dict[str, Any]]:
    """What a checkpoint remembers of the run beside the trainer's settings."""
    return {"recipe": asdict(recipe), "model": asdict(model_config)}


def write_config(
    output_dir: Path, recipe: Any, args: TrainingArguments, model_config: ModelConfig, resumed: bool = False
) -> None:
    """Writes config.yaml: what was asked for beyond the defaults, of model, recipe and trainer; --config reads it.

    A resumed run leaves that of its first part as it is; where it asks for something else, that is in
    config.resumed-1.yaml, and so on.
    """
    settings = _changed(model_config, asdict(model_config)) | asdict(recipe) | _changed(args, args.to_dict())
    # The one follows from the other, and both are not taken.
    settings.pop("generation_batch_size", None)
    text = yaml.safe_dump(json.loads(json.dumps(redacted(settings), default=str)), sort_keys=False)
    path = output_dir / "config.yaml"
    if resumed and path.exists():
        last = path
        for number in count(1):
            path = output_dir / f"config.resumed-{number}.yaml"
            if not path.exists():
                break
            last = path
        if _but_resume(text) == _but_resume(last.read_text()):
            return
    path.write_text(text)


def _but_resume(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("resume:")]


def _changed(config: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Those of a configuration's values that are not its defaults; no secrets."""
    plain = {name: each.default for name, each in type(config).__dataclass_fields__.items()}
    made = {
        name: each.default_factory()
        for name, each in type(config).__dataclass_fields__.items()
        if each.default_factory is not MISSING
    }
    return {name: value for name, value in values.items() if value != (plain | made).get(name) and name != "hub_token"}
