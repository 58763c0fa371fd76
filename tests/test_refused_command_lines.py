"""Wrong command lines of every command: one line that names the setting, before a model is loaded."""

import json
import sys

import pytest

import dgrpo.models
import dgrpo.run.steps
from dgrpo.__main__ import main

WRONG = [
    ("train gsm8k --save_total_limit 0", "save_total_limit=0: must be a positive whole number, or null"),
    ("train sft --save_total_limit -1", "save_total_limit=-1"),
    ("train gsm8k --threshold 2", "threshold=2.0: is a probability"),
    ("train gsm8k --model_init_kwargs {}", "model_init_kwargs"),
    ("train gsm8k --sampler_policy raises:f", "cannot import 'raises' of 'raises:f' (RuntimeError: no licence, "),
    ("train gsm8k --sampler_policy raises:f", "raises.py line 3)"),
    ("train gsm8k --estimator leaves:f", "estimator: cannot import 'leaves' of 'leaves:f' (SystemExit: 3"),
    ("train gsm8k --reward_funcs leaves:f", "reward_funcs: cannot import 'leaves'"),
    ("validate --task leaves:f", "task: cannot import 'leaves'"),
    ("evaluate --task gsm8k --sampler_policy raises:f", "RuntimeError: no licence"),
    ("train gsm8k --dataset=", "dataset='': it is empty"),
    ("train sft --dataset=", "dataset='': it is empty"),
    ("train vrpo --model_name_or_path=", "model_name_or_path='': it is empty"),
    ("train gsm8k --gradient_checkpointing_kwargs {}", "gradient_checkpointing_kwargs: unknown keys ['tea']"),
    ("train sft --optim_target_modules tea", "optim_target_modules='tea': optim='adamw_torch_fused' does not read"),
    ("train sft --mask_unit block", "mask_unit='block', block_schedule=None: this model's attention is full"),
    ("train sft --block_length 0", "block_length=0: must be a positive whole number"),
    ("train sft --convert tea", "convert='tea': choose"),
    ("train sft --num_examples 0", "num_examples=0"),
    ("train vrpo --num_eval_problems -1", "num_eval_problems=-1: must be 0 or more"),
    ("train vrpo --lora_target_modules tea", "lora_target_modules=tea: the model has none of them"),
    ("train gsm8k --adapter_name_or_path half", "adapter='half': it holds no adapter_model.safetensors"),
    ("train gsm8k --output_dir /proc/nowhere", "output_dir='/proc/nowhere' cannot be written"),
    ("evaluate --task gsm8k --batch_size 0", "argument --batch_size: '0' is no whole number of 1 or more"),
    ("evaluate --task gsm8k --num_problems -3", "argument --num_problems: '-3'"),
    ("evaluate --task gsm8k --threshold 2", "threshold=2.0: is a probability"),
    ("evaluate --task gsm8k --chat_template_kwargs [1]", "'[1]' is no mapping in JSON"),
    ("evaluate --task gsm8k --dtype tea", "--dtype: invalid choice: 'tea'"),
    ("evaluate --task gsm8k --model=", "argument --model: it is empty"),
    ("evaluate --task gsm8k --output_dir rows.jsonl", "output_dir='rows.jsonl' is no folder"),
    ("validate --task gsm8k --num_train_problems -4", "'-4' is no whole number"),
    ("generate number.jsonl", "prompt_column='prompt'"),
    ("generate rows.jsonl --output rows.jsonl", "output='rows.jsonl' exists"),
    ("generate rows.jsonl --resume", "resume: only a file can be continued"),
    ("generate rows.jsonl --temperature nan", "temperature=nan: must be a finite number"),
    ("generate rows.jsonl --threshold 2", "threshold=2.0"),
    ("generate rows.jsonl --device tea", "device='tea'"),
    ("generate rows.jsonl --sampler_policy raises:f", "RuntimeError: no licence"),
    ("study --task gsm8k --presets nobody", "preset='nobody': there is no such file here"),
    ("study --task gsm8k --presets wd1 wd1", "'wd1' is there twice"),
    ("study --task gsm8k --learning_rat 1", "unknown arguments ['--learning_rat', '1']"),
    ("study --task sft", "argument --task: invalid choice: 'sft'"),
    ("study --task gsm8k --seconds 0", "argument --seconds: '0' is no number above 0"),
    ("chat --speed 0", "argument --speed: '0' is no number above 0"),
    ("chat --seed -1", "argument --seed: '-1' is no whole number of 0 or more"),
    ("watch --rollout rows.jsonl", "rows.jsonl is no stored rollout"),
    ("watch --html nowhere/page.html", "html='nowhere/page.html': no file can be written there"),
    ("plan --config gsm8k_llada_8b --gpus 0", "argument --gpus: '0'"),
    ("plan --config gsm8k_llada_8b --lora_target_modules tea", "the model has none of them"),
    ("report .", "there is no run here"),
    ("merge --adapter= --output_dir out", "argument --adapter: it is empty"),
]


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_a_wrong_command_line_is_one_line(monkeypatch, tmp_path, capsys, line, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "raises.py").write_text("def f():\n    pass\nraise RuntimeError('no licence')\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "1 + 1?"}) + "\n")
    (tmp_path / "number.jsonl").write_text(json.dumps({"prompt": 3}) + "\n")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for module in (dgrpo.models, dgrpo.run.steps):
        monkeypatch.setattr(module, "load_model", None)
    monkeypatch.setattr(sys, "argv", ["dgrpo"])
    with pytest.raises(SystemExit) as stopped:
        main([json.dumps({"tea": 1}) if word == "{}" else word for word in line.split()])
    told = stopped.value.code if isinstance(stopped.value.code, str) else capsys.readouterr().err
    assert message in told
    assert len(told.strip().splitlines()) == 1
