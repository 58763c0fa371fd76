"""What is wrong with a model as a policy, and weights that 16 bits would round."""

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model

from dgrpo.models.adapters import adapters_to_float32, check_policy, refuse_16_bit_training


def with_lora(model, **settings):
    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2, **settings))


def test_an_adapter_loaded_for_inference_is_no_policy(tiny_llada, tmp_path):
    with_lora(tiny_llada()).save_pretrained(tmp_path)
    check_policy(PeftModel.from_pretrained(tiny_llada(), tmp_path, is_trainable=True))
    with pytest.raises(ValueError, match=r"is_trainable=True.*load_model\(base, adapter=folder\)"):
        check_policy(PeftModel.from_pretrained(tiny_llada(), tmp_path))


def test_a_frozen_model_and_virtual_tokens_are_no_policies(tiny_llada):
    check_policy(tiny_llada())
    with pytest.raises(ValueError, match="no parameter has requires_grad=True"):
        check_policy(tiny_llada().requires_grad_(False))
    settings = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, num_layers=2, token_dim=32, num_attention_heads=4
    )
    with pytest.raises(ValueError, match="PROMPT_TUNING.*train LoRA instead"):
        check_policy(get_peft_model(tiny_llada(), settings))


def test_adapters_are_stored_in_float32_and_16_bit_training_is_refused(tiny_llada):
    model = tiny_llada().bfloat16()
    with pytest.raises(ValueError, match=r"trained parameters are stored in torch\.bfloat16.*dtype=float32"):
        refuse_16_bit_training(model)
    model = with_lora(model, modules_to_save=["attn_norm"]).bfloat16()
    with pytest.raises(ValueError, match="trained parameters"):
        refuse_16_bit_training(model)
    plain = with_lora(tiny_llada().bfloat16()).bfloat16()
    adapters_to_float32(plain)
    refuse_16_bit_training(plain)
    for name, weight in plain.named_parameters():
        assert weight.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)
    check_policy(plain)


def test_a_16_bit_weight_does_not_move_where_the_same_weight_in_float32_does():
    """The reason for both functions: AdamW's step is the learning rate, far below the spacing of 16-bit weights."""
    moved = []
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.nn.Parameter(torch.full((100,), 0.02, dtype=dtype))
        before = weight.detach().clone()
        optimizer = torch.optim.AdamW([weight], lr=3e-6, weight_decay=0)
        for _ in range(10):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved.append(bool((weight != before).any()))
    assert moved == [False, True]
