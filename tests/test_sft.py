"""Masked fine-tuning: which tokens are trained on, with what weight."""

import pytest
import torch
from datasets import Dataset
from stopping import StopAt

from dgrpo import MaskedSFTConfig, MaskedSFTTrainer
from dgrpo.estimators import draw_masks
from dgrpo.noise import stream
from dgrpo.reliability import manifest
from dgrpo.reliability.checks import check_model
from dgrpo.reliability.manifest import resume_checkpoint, whole_checkpoints
from dgrpo.tasks.columns import from_s1k
from dgrpo.trainers.sft import encode

ROWS = [{"prompt": "a b c", "completion": "d e"}, {"prompt": "f", "completion": "g h i j"}]


@pytest.fixture
def trainer(model, tokenizer, tmp_path):
    """A function (**settings) -> MaskedSFTTrainer on two rows of different lengths."""

    def build(**settings) -> MaskedSFTTrainer:
        defaults = {"output_dir": str(tmp_path), "per_device_train_batch_size": 2, "max_steps": 1, "report_to": "none"}
        args = MaskedSFTConfig(
            **(defaults | {"use_cpu": True, "save_strategy": "no", "disable_tqdm": True} | settings)
        )
        return MaskedSFTTrainer(model, args, Dataset.from_list(ROWS), processing_class=tokenizer)

    return build


class Args:
    """The settings that the checks read of two visible GPUs."""

    n_gpu, deepspeed_plugin = 2, None


PAIR = {"prompt": "a b", "completion": "c"}
WRONG_DATA = {
    "none": (None, "train_dataset=NoneType: give one datasets.Dataset"),
    "a list": ([PAIR], "train_dataset=list: give one datasets.Dataset"),
    "a dict": ({"train": Dataset.from_list([PAIR])}, "train_dataset=dict: give one"),
    "a stream": (Dataset.from_list([PAIR]).to_iterable_dataset(), "rows cannot be streamed"),
    "text": (Dataset.from_list([{"text": "a"}]), r"\['completion', 'prompt'\]; it has \['text'\]. 'text' holds plain"),
    "messages": (Dataset.from_list([{"messages": []}]), "'messages' holds conversations: divide each"),
    "other names": (Dataset.from_list([{"question": "a", "answer": "b"}]), "it has .*question.* Rename them"),
    "no rows": (Dataset.from_list([PAIR]).select([]), "train_dataset: it has no rows"),
    "a number": (Dataset.from_list([{"prompt": 3, "completion": 4}]), "prompt=3, completion=4: give two strings"),
    "mixed": (Dataset.from_list([{"prompt": "a", "completion": [PAIR]}]), "prompt='a', completion=.*: give two"),
    "missing values": (
        Dataset.from_list([PAIR, {"prompt": None, "completion": None}]),
        "prompt=None, completion=None",
    ),
    "too long": (
        Dataset.from_list([{"prompt": "a " * 30, "completion": "b"}]),
        "max_length=20: all 1 rows are longer",
    ),
}


@pytest.mark.parametrize(("dataset", "message"), WRONG_DATA.values(), ids=WRONG_DATA)
def test_rows_that_cannot_be_trained_on_are_named(model, tokenizer, tmp_path, dataset, message):
    args = MaskedSFTConfig(str(tmp_path), use_cpu=True, max_length=20)
    with pytest.raises(ValueError, match=message):
        MaskedSFTTrainer(model, args, dataset, processing_class=tokenizer)
    if dataset is not None:
        with pytest.raises(ValueError, match=message.replace("train_dataset", "eval_dataset")):
            MaskedSFTTrainer(model, args, Dataset.from_list(ROWS), tokenizer, eval_dataset=dataset)


def test_rows_longer_than_the_context_of_the_model_are_left_out(tiny_llada, tokenizer, tmp_path):
    rows = Dataset.from_list([*ROWS, {"prompt": "a " * 30, "completion": "b"}])
    args = MaskedSFTConfig(str(tmp_path), use_cpu=True)
    assert len(MaskedSFTTrainer(tiny_llada(), args, rows, tokenizer).train_dataset) == 3
    assert len(MaskedSFTTrainer(tiny_llada(max_sequence_length=16), args, rows, tokenizer).train_dataset) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 cannot be honoured: the loss has no labels"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0 cannot be honoured"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True cannot be honoured"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True cannot be honoured"),
        ({"ignore_data_skip": True}, "ignore_data_skip=True cannot be honoured"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: must be"),
        ({"learning_rate": float("inf")}, "learning_rate=inf: must be"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0: must be"),
        ({"max_length": 0}, "max_length=0: must be"),
        ({"completion_canvas": -1}, "completion_canvas=-1: must be"),
        ({"max_steps": 0}, "max_steps=0: must be"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0: must be"),
        ({"adam_beta2": 1.0}, "adam_beta2=1.0: must be"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm=nan: must be"),
    ],
    ids=str,
)
def test_settings_that_fine_tuning_cannot_honour_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        MaskedSFTConfig(str(tmp_path), use_cpu=True, **settings)


def test_models_that_fine_tuning_cannot_train_are_refused(trainer, model, tokenizer, tmp_path):
    args, rows = MaskedSFTConfig(str(tmp_path), use_cpu=True), Dataset.from_list(ROWS)
    with pytest.raises(ValueError, match="compute_metrics cannot be honoured"):
        MaskedSFTTrainer(model, args, rows, tokenizer, compute_metrics=len)
    with pytest.raises(ValueError, match="model='owner/m': pass the model itself"):
        MaskedSFTTrainer("owner/m", args, rows, tokenizer)
    with pytest.raises(ValueError, match="processing_class: a tokenizer with a mask token is needed"):
        MaskedSFTTrainer(model, args, rows, None)
    with pytest.raises(ValueError, match="2 GPUs are visible to one process"):
        check_model(model, tokenizer, Args)
    with pytest.raises(ValueError, match="most updates round to nothing"):
        MaskedSFTTrainer(model.bfloat16(), args, rows, tokenizer)


def test_the_completion_ends_with_eos_and_fills_its_canvas(tokenizer):
    eos = tokenizer.eos_token_id
    assert encode(ROWS[0], tokenizer)["completion_ids"] == [3, 4, eos]
    assert encode(ROWS[0], tokenizer, completion_canvas=5)["completion_ids"] == [3, 4, eos, eos, eos]


def test_the_prompt_ends_where_the_model_starts_to_write(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'a ' if m['role'] == 'user' else 'b ' }}{{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}b{% endif %}"
    )
    row = {"prompt": [{"role": "user", "content": "c d"}], "completion": [{"role": "assistant", "content": "e f"}]}
    encoded = encode(row, tokenizer)
    assert tokenizer.decode(encoded["prompt_ids"]) == "a c d b"
    assert tokenizer.decode(encoded["completion_ids"]) == "e f <eos>"


def test_a_line_feed_behind_the_end_of_a_turn_is_not_trained_on(tokenizer):
    tokenizer.add_tokens(["\n"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '<eos>' + '\\n' }}{% endfor %}"
    row = {name: [{"role": name, "content": text}] for name, text in (("prompt", "a b"), ("completion", "c \n d"))}
    assert tokenizer.decode(encode(row, tokenizer)["completion_ids"]).split() == ["c", "d", "<eos>"]


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer):
    tokenizer.chat_template = "{% if add_generation_prompt %}a{% else %}b c{% endif %}"
    with pytest.raises(ValueError, match="chat_template"):
        encode({"prompt": [{"role": "user", "content": "d"}], "completion": []}, tokenizer)


def test_rows_of_s1k_become_reasoning_and_answer():
    row = {"question": "1 + 1?", "thinking_trajectories": ["One and one."], "attempt": "2", "solution": "unused"}
    example = from_s1k(row)
    assert example["prompt"] == [{"role": "user", "content": "1 + 1?"}]
    (message,) = example["completion"]
    assert message["role"] == "assistant"
    assert message["content"] == "<reasoning>\nOne and one.\n</reasoning>\n<answer>\n2\n</answer>"


def test_loss_is_llada_objective_with_the_drawn_masks(trainer, model, tokenizer):
    """Against the formula: mean over rows of (n/l) sum over the l hidden of -log p / number n of completion tokens."""
    run = trainer()
    batch = run._collate([run.train_dataset[0], run.train_dataset[1]])
    seen = []
    model.train()
    plain_forward = type(model)._score

    def spy(self, asked, *rest):
        seen.append(asked)
        return plain_forward(self, asked, *rest)

    type(model)._score = spy
    try:
        loss = run.compute_loss(model, batch)
    finally:
        type(model)._score = plain_forward
    generator = stream("sft", "train", run.args.seed, 0, 1, 0)
    hidden = draw_masks(batch["is_completion"], 1, generator)[0][:, 0]
    assert (hidden <= batch["is_completion"]).all()
    canvases = batch["input_ids"].masked_fill(hidden, tokenizer.mask_token_id)
    expected = 0.0
    for row in range(2):
        length = int(batch["attention_mask"][row].sum())
        logits = model(canvases[row : row + 1, :length]).logits[0]
        logps = logits.log_softmax(-1).gather(-1, batch["input_ids"][row, :length, None])[:, 0]
        per_token = -(logps * hidden[row, :length]).sum() / hidden[row].sum()
        expected = expected + per_token / 2
    assert hidden.any()
    assert torch.allclose(loss, expected, atol=1e-5)


def test_neither_prompt_nor_padding_is_trained_on(trainer, tokenizer):
    run = trainer()
    batch = run._collate([run.train_dataset[0], run.train_dataset[1]])
    assert batch["is_completion"].tolist() == [
        [False, False, False, True, True, True],
        [False, True, True, True, True, True],
    ]
    assert run._collate([{"prompt_ids": [0], "completion_ids": [1]}, {"prompt_ids": [0], "completion_ids": [1, 2]}])[
        "is_completion"
    ].tolist() == [[False, True, False], [False, True, True]]


def test_masks_depend_on_seed_and_step_not_on_evaluation_or_global_state(trainer):
    run = trainer()
    run.model.train()
    first = run._generator().get_state()
    run = trainer()
    torch.manual_seed(123)
    run.model.eval()
    run._generator()
    run.model.train()
    assert torch.equal(run._generator().get_state(), first)
    assert not torch.equal(run._generator().get_state(), first), "the next micro-batch has masks of its own"


def test_long_rows_are_left_out(trainer):
    assert len(trainer(max_length=6).train_dataset) == 2
    with pytest.raises(ValueError, match="max_length=4: all 2 rows are longer"):
        trainer(max_length=4)


@pytest.mark.slow
def test_it_fits_two_rows(trainer, model):
    run = trainer(max_steps=150, learning_rate=1e-2)
    run.train()
    losses = [logs["loss"] for logs in run.state.log_history if "loss" in logs]
    batch = run._collate([run.train_dataset[0], run.train_dataset[1]])
    final = sum(run.compute_loss(model, batch).item() for _ in range(20)) / 20
    assert final < 0.2, losses


def test_a_run_that_is_stopped_and_resumed_ends_bit_equal(tiny_llada, tokenizer, tmp_path):
    def run(folder: str, stop: int | None = None, **settings) -> dict[str, torch.Tensor]:
        args = MaskedSFTConfig(
            output_dir=str(tmp_path / folder), per_device_train_batch_size=1, max_steps=6, learning_rate=1e-2,
            use_cpu=True, report_to="none", disable_tqdm=True, save_steps=2,
        )  # fmt: skip
        callbacks = [StopAt(stop)] if stop else []
        rows = Dataset.from_list(ROWS)
        trainer = MaskedSFTTrainer(tiny_llada(), args, rows, processing_class=tokenizer, callbacks=callbacks)
        trainer.train(**settings)
        return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}

    straight = run("straight")
    run("cut", stop=4)
    # What a kill leaves of a checkpoint that was being written.
    (tmp_path / "cut/unfinished/checkpoint-6").mkdir(parents=True)
    resumed = run("cut", resume_from_checkpoint=resume_checkpoint(tmp_path / "cut", resume=True))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert [path.name for path in whole_checkpoints(tmp_path / "cut")] == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    ]
    assert not (tmp_path / "cut/unfinished").exists()


def test_no_resume_checkpoint_is_told(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(manifest.logger, "warning", told.append)
    assert resume_checkpoint(tmp_path, resume=False) is None
    assert not told
    assert resume_checkpoint(tmp_path, resume=True) is None
    assert "starts from the beginning" in told[0]
