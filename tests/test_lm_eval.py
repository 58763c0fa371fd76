"""The model `dgrpo` of lm-evaluation-harness; all but one test need the harness: pip install 'dgrpo[eval]'."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dgrpo import SamplerConfig, generate
from dgrpo.logprobs import log_likelihood
from dgrpo.noise import stream
from dgrpo.run.steps import CHECKPOINTS
from dgrpo.tiny import problems

ROOT = Path(__file__).parents[1]
CHECKPOINT = str(CHECKPOINTS / "gsm8k")
installed = importlib.util.find_spec("lm_eval") is not None
harness = pytest.mark.skipif(not installed, reason="lm-evaluation-harness is not installed")
QUESTION = "<|user|>Tom has 5 pens, buys 4 more and gives away 2. How many pens are left?<|assistant|>"

TASKS = {
    "tiny_write": """
task: tiny_write
output_type: generate_until
generation_kwargs: {until: ["</answer>"], do_sample: false, max_gen_toks: 16}
filter_list:
  - name: number
    filter: [{function: regex, regex_pattern: "<answer>\\\\s*(-?[0-9]+)"}, {function: take_first}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
doc_to_target: "{{gold}}"
""",
    "tiny_choose": """
task: tiny_choose
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tasks over 12 generated problems, as the harness reads them."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = []
    for row in problems.held_out_problems(12, 0):
        gold = int(row["answer"].rpartition("####")[2])
        shown = f"<reasoning>\n{row['reasoning']}\n</reasoning>\n<answer>\n{gold}\n</answer>"
        choices = [shown, "how many are left and are left and sold in all"]
        rows.append({"question": f"<|user|>{row['question']}<|assistant|>", "gold": str(gold), "choices": choices,
                     "label": 0})  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n"
        more = 'test_split: test\ndoc_to_text: "{{question}}"\ntarget_delimiter: ""\n'
        (folder / f"{name}.yaml").write_text(text + data + more)
    return folder


def language_model(**settings):
    from dgrpo.evaluation.harness import DiffusionLM

    # The tiny model knows 16 tokens on one block.
    return DiffusionLM(CHECKPOINT, **{"device": "cpu", "block_length": 16, "num_samples": 8} | settings)


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


@pytest.mark.skipif(installed, reason="lm-evaluation-harness is installed")
def test_without_the_harness_the_import_says_what_to_install():
    with pytest.raises(ImportError, match=r"dgrpo\[eval\]"):
        importlib.import_module("dgrpo.evaluation.harness")


@harness
def test_the_likelihood_of_one_token_is_exact_and_of_several_the_bound():
    lm = language_model()
    [one, more] = ["<", "<reasoning>\n5+4=9"]
    (exact, _), (bound, _) = lm.loglikelihood(requests("loglikelihood", (QUESTION, one), (QUESTION, more)))
    context = lm.tok_encode(QUESTION)
    [target], completion = lm.tok_encode(one), lm.tok_encode(QUESTION + more)[len(context) :]
    canvas = torch.tensor([[*context, lm.tokenizer.mask_token_id]])
    with torch.no_grad():
        logits = lm.model(input_ids=canvas, attention_mask=torch.ones_like(canvas)).logits
    assert exact == pytest.approx(logits[0, -1].log_softmax(-1)[target].item(), abs=1e-4)
    expected = log_likelihood(
        lm.model, torch.tensor([context]), torch.tensor([completion]), 8, generator=stream("lm_eval", 0, *context)
    )
    assert bound == pytest.approx(expected.item(), rel=1e-5)
    assert lm.loglikelihood(requests("loglikelihood", (QUESTION, more)))[0][0] == bound, "alone as beside others"


@harness
def test_a_continuation_is_greedy_where_denoising_writes_it():
    lm = language_model()
    context = lm.tok_encode(QUESTION)
    prompt_ids = torch.tensor([context])
    written = generate(
        lm.model, prompt_ids, torch.ones_like(prompt_ids) > 0, SamplerConfig(6, 6, 6, stop_at_eos=False)
    )
    own = written.completion_ids[0].tolist()
    other = [*own[:-1], own[-1] + 1]
    pairs = [(("", ""), context, ids) for ids in (own, other)]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(pairs)] == [True, False]
    assert not any(greedy for _, greedy in language_model(check_greedy=False)._loglikelihood_tokens(pairs))


@harness
def test_a_text_is_cut_where_the_task_stops():
    lm = language_model()
    kinds = [{"until": []}, {"until": ["</reasoning>", "<answer>"]}, {"until": "\n"}, {"until": [], "max_gen_toks": 4}]
    asked = [(QUESTION, {"do_sample": False, "max_gen_toks": 16} | kind) for kind in kinds]
    whole, before_answer, line, short = lm.generate_until(requests("generate_until", *asked))
    assert "<answer>" in whole
    assert before_answer == whole.partition("</reasoning>")[0].partition("<answer>")[0]
    assert line == whole.partition("\n")[0]
    assert len(lm.tok_encode(short)) <= 4
    assert lm.generate_until(requests("generate_until", asked[0])) == [whole]


@harness
def test_repeated_requests_are_drawn_anew_and_again_the_same():
    kwargs = {"until": [], "do_sample": True, "temperature": 2.0, "max_gen_toks": 16}
    asked = requests("generate_until", *[(QUESTION, kwargs)] * 4)
    first, again = (language_model(batch_size=size).generate_until(asked) for size in (4, 1))
    assert len(set(first)) > 1
    assert first == again
    assert language_model(seed=1).generate_until(asked) != first


@harness
def test_what_the_sampler_does_not_have_is_refused():
    lm = language_model()
    settings = {"until": [], "top_p": 1.0, "top_k": 0}
    lm._settings(settings)
    with pytest.raises(ValueError, match="no top_p"):
        lm.generate_until(requests("generate_until", (QUESTION, settings | {"top_p": 0.9})))
    with pytest.raises(ValueError, match="batch_size='auto'"):
        language_model(batch_size="auto")


@harness
def test_a_text_longer_than_the_window_is_the_sum_of_its_windows():
    text = "Tom has 5 pens, buys 4 more and gives away 2. How many pens are left?"
    lm = language_model(max_length=11, num_samples=2)
    ids = lm.tok_encode(text)
    assert len(ids) == 19, "two windows"
    [bound] = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    windows, start = [([lm.prefix_token_id], ids[:10])], 10
    while start < len(ids):
        end = min(start + 10, len(ids))
        windows.append((ids[end - 11 : start], ids[start:end]))
        start = end
    assert bound == pytest.approx(sum(lm._log_likelihood(*window) for window in windows), rel=1e-5)


@harness
def test_a_context_that_is_too_long_loses_its_beginning():
    lm = language_model(max_length=12)
    assert lm._fitted(list(range(40)), 4) == list(range(32, 40))
    assert lm._fitted([], 4) == [lm.prefix_token_id]


@harness
@pytest.mark.slow
def test_the_harness_evaluates_both_kinds_of_task(folder):
    import lm_eval
    from lm_eval.tasks import TaskManager

    import dgrpo.evaluation.harness

    assert lm_eval.api.registry.get_model("dgrpo") is dgrpo.evaluation.harness.DiffusionLM
    found = lm_eval.simple_evaluate(
        model="dgrpo",
        model_args=f"pretrained={CHECKPOINT},block_length=16,diffusion_steps=16,num_samples=8",
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=8,
        device="cpu",
        bootstrap_iters=0,
    )["results"]
    assert found["tiny_choose"]["acc,none"] >= 0.9
    assert 0.2 < found["tiny_write"]["exact_match,number"] < 0.9


@harness
@pytest.mark.slow
@pytest.mark.distributed
def test_the_command_gives_the_same_on_two_processes(folder, tmp_path):
    found = []
    for config, num_processes in (("cpu", 1), ("ddp", 2)):
        command = [
            sys.executable, "-m", "accelerate.commands.launch",
            *["--config_file", str(ROOT / f"recipes/accelerate/{config}.yaml"), "-m", "dgrpo.evaluation.harness"],
            *["--model", "dgrpo", "--model_args", f"pretrained={CHECKPOINT},block_length=16,num_samples=8"],
            *["--include_path", str(folder), "--tasks", "tiny_write,tiny_choose", "--batch_size", "8"],
            *["--output_path", str(tmp_path / config)],
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]
        assert ("on rank 1" in done.stdout + done.stderr) == (num_processes == 2)
        [file] = (tmp_path / config).rglob("results_*.json")
        results = json.loads(file.read_text())["results"]
        found.append((results["tiny_choose"]["acc,none"], results["tiny_write"]["exact_match,number"]))
    assert found[0] == found[1]
    assert not any(math.isnan(value) for value in found[0])
