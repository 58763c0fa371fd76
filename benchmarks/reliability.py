"""The fault table: what is injected into a small run of the embedded default, what happens, what is lost.

    python benchmarks/reliability.py                                # about five minutes on a core
    python benchmarks/reliability.py --table docs/reliability.md    # also puts the table there

Each run is compared to the bit with one that was left alone: adapter, optimizer, random states, buffered rollout,
metrics (timings aside), completions and best weights. "Nothing" stands for no difference.
"""

import argparse
import csv
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_kill import PLACES, STEPS, arguments, differences  # noqa: E402
from warm import Warm  # noqa: E402

from dgrpo.run.lock import locked  # noqa: E402

REWARD = "rewards.gsm8k:correctness_reward"
LOSS = "dgrpo.trainers.grpo:DiffuGRPOTrainer._compute_loss"
NO_SPACE = [28, "No space left on device"]
# (fault, what goes wrong, settings)
FAULTS = [
    ("a reward raises", {"call": REWARD, "nth": 2, "raises": [5, "worker lost"]}, {}),
    ("a reward hangs", {"call": REWARD, "nth": 2, "sleeps": 600}, {"reward_timeout": 1}),
    ("a reward returns NaN", {"call": REWARD, "nth": 2, "returns": [float("nan")] * 16}, {}),
    ("a reward returns too few values", {"call": REWARD, "nth": 2, "returns": [1.0]}, {}),
    ("a reward returns no list", {"call": REWARD, "nth": 2, "returns": None}, {}),
    ("a loss is NaN", {"call": LOSS, "nth": 5, "factor": "nan"}, {}),
    ("a loss is infinite", {"call": LOSS, "nth": 5, "factor": "inf"}, {}),
    ("every loss is NaN from update 3 on", {"call": LOSS, "nth": 5, "factor": "nan", "times": 99}, {}),
    ("the disk is full, writing a checkpoint", {"call": "torch:save", "nth": 33, "raises": NO_SPACE}, {}),
    ("the disk is full, writing metrics.csv", {"call": "pathlib:Path.replace", "nth": 3, "raises": NO_SPACE}, {}),
]


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


# (damage to checkpoints, what it does to the run's folder, whose newest checkpoint is 5, settings of the resumed run)
DAMAGES = [
    ("a bit of the optimizer flipped", lambda run: flip_a_bit(run / "checkpoint-5/optimizer.pt"), {}),
    ("the adapter empty", lambda run: (run / "checkpoint-5/adapter_model.safetensors").write_bytes(b""), {}),
    ("the random states missing", lambda run: (run / "checkpoint-5/rng_state.pth").unlink(), {}),
    ("the manifest missing", lambda run: (run / "checkpoint-5/manifest.json").unlink(), {}),
    (
        "in every checkpoint a bit flipped",
        lambda run: [flip_a_bit(run / f"checkpoint-{step}/optimizer.pt") for step in (4, 5)],
        {},
    ),
    ("nothing, but resumed with another learning rate", lambda run: None, {"learning_rate": 0.5}),
    ("nothing, but resumed with another seed", lambda run: None, {"seed": 1}),
]
MARKERS = "<!-- table -->", "<!-- end of table -->"


def total(folder: Path, column: str) -> float:
    with open(folder / "metrics.csv", newline="") as file:
        return sum(float(row[column]) for row in csv.DictReader(file) if row.get(column))


def outcome(folder: Path, done) -> str:
    """How the processes ended, in words, with what was counted or the error's message."""
    if done.codes[0] == 0:
        counts = {
            "calls that raised": total(folder, "rewards/correctness_reward/errors"),
            "calls over time": total(folder, "rewards/correctness_reward/timeouts"),
            "values that are not finite": total(folder, "rewards/correctness_reward/non_finite"),
            "update skipped, its batch kept": len(list(folder.glob("bad_batches/*.json"))),
        }
        told = ", ".join(f"{int(count)} {name}" for name, count in counts.items() if count)
        return f"the run goes on; counted: {told}" if told else "the run goes on"
    if -9 in done.codes:
        return "killed, resumed"
    message = re.findall(r"^\w*(?:Error|Exception): (.*)", done.output, re.MULTILINE)[-1]
    # Its first sentence.
    return f"the run ends: {re.split(r'[.;] ', message.replace(str(folder), 'output_dir').replace('|', '/'))[0]}"


def rows(warm: Warm, folder: Path) -> list[tuple[str, str, str]]:
    """(fault, what happened, what was lost) of each."""
    found = []

    def run(name: str, number: int | str, settings: dict, **request):
        words = arguments(folder / name, **settings)
        return warm.run(folder / f"{name}_{number}.log", words, **request)

    def case(fault: str, wrong: list[dict], settings: dict, reference: str, last: int, config: str | None = None):
        name = f"run_{len(found)}"
        done = run(name, 0, settings, faults=wrong, config=config)
        happened = outcome(folder / name, done)
        before = done.codes
        if before[0] != 0:
            resumed = run(name, 1, settings, config=config)
            if any(resumed.codes):
                raise RuntimeError(resumed.output[-2000:])
        different = differences(folder / reference, folder / name, last)
        if not different:
            lost = "nothing" if before[0] == 0 else "nothing, once resumed"
        elif before[0] == 0 or (folder / name / "bad_batches").exists():
            lost = "what that rollout or those updates would have taught"
        else:
            lost = f"differs: {different}"
        found.append((fault, happened, lost))
        print(f"{fault}: {happened}; lost: {lost}", file=sys.stderr)

    run("straight", 0, {})
    for place, wrong in PLACES.items():
        case(f"SIGKILL {place}", [wrong | {"nth": wrong["nth"][1]}], {}, "straight", STEPS)
    for fault, wrong, settings in FAULTS:
        case(fault, [wrong], settings, "straight", STEPS)
    for damage, act, settings in DAMAGES:
        name = f"run_{len(found)}"
        run(name, 0, {}, faults=[PLACES["in an optimizer's step"] | {"nth": 6}])
        act(folder / name)
        done = run(name, 1, settings)
        if done.codes == [0]:
            different = differences(folder / "straight", folder / name, STEPS)
            happened, lost = "resumed from the checkpoint before", f"differs: {different}" if different else "nothing"
        else:
            happened, lost = outcome(folder / name, done), "nothing"
        found.append((f"damaged: {damage}", happened, lost))
        print(found[-1], file=sys.stderr)
    with locked(folder / "straight"):
        done = run("straight", 1, {})
    held = re.sub(r"\(process .*?\)", "(process N on HOST)", outcome(folder / "straight", done))
    found.append(("a second run in the same folder", held, "nothing"))
    few = {"max_steps": 6, "num_iterations": 2, "evaluate_every": 3}
    for config, name in (("ddp", "DDP"), ("zero2", "ZeRO-2")):
        run(config, 0, few, config=config)
        wrong = PLACES["writing the optimizer or the rollout"] | {"nth": 9, "rank": 1}
        case(f"SIGKILL of one of two processes ({name}), writing the rollout", [wrong], few, config, 6, config)
    done = run("ddp", 1, few)
    found.append(("resumed with another number of processes", outcome(folder / "ddp", done), "nothing"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="a Markdown file whose table is replaced")
    arguments_ = parser.parse_args()
    warm = Warm()
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = rows(warm, Path(folder))
    finally:
        warm.close()
    lines = [
        "| injected | what happens | what is lost |",
        "|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in found),
    ]
    print("\n".join(lines))
    if arguments_.table:
        start, end = MARKERS
        before, _, rest = arguments_.table.read_text().partition(start)
        after = rest.partition(end)[2]
        arguments_.table.write_text("\n".join([before + start, *lines, end]) + after)


if __name__ == "__main__":
    main()
