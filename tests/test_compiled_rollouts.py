"""Compiled rollouts: the tokens of those that are not, few shapes, and nothing compiled twice."""

from dataclasses import replace

import published
import pytest
import torch
from trainers import EOS, lora, place_in_group, tiny_llada, tiny_trainer

from dgrpo import SamplerConfig, generate
from dgrpo.models import load_model

MODES = {
    "exact": {},
    "dual cache": {"cache": "dual", "cache_refresh": 3},
    "guidance": {"cfg_scale": 1.0},
    # Rows leave within a block.
    "threshold": {"threshold": 0.15},
    "policy": {"sampler_policy": "dgrpo.policies.remasking:rcr"},
}
FAMILIES = ["dream", "sdar", "a2d-qwen3"]
PADDING = torch.tensor([0, 2, 0, 4, 60, 5])


def assert_compiled_is_the_same(model, config, num_words):
    """Rollouts with and without, of rows that leave one by one; each padded number of rows is compiled once."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    prompts = torch.randint(0, num_words, (6, 70), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(70) >= PADDING[:, None]
    kwargs = {"row_keys": torch.arange(6)}
    expected = generate(model, prompts, mask, config, **kwargs)
    compiled = replace(config, compile_rollouts="eager")
    graphs = []
    # Prompts that are somewhat shorter have the same shapes.
    for width in (0, 0, 3):
        found = generate(model, prompts[:, width:], mask[:, width:], compiled, **kwargs)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        if width == 0:
            assert found.completion_ids.equal(expected.completion_ids)
            assert found.revealed_at.equal(expected.revealed_at)
            assert found.num_forwards == expected.num_forwards
            torch.testing.assert_close(found.confidence, expected.confidence, rtol=1e-4, atol=1e-5)
    assert 1 <= graphs[0] == graphs[1] <= graphs[2] <= 4
    assert not torch._dynamo.utils.counters["graph_break"]
    assert "network" not in vars(model)


def config_of(**settings):
    return SamplerConfig(16, 4, 16, **{"temperature": 1.0} | settings)


def test_what_has_no_fixed_shape_is_refused():
    for cache in ("prefix", "recompute"):
        with pytest.raises(ValueError, match="compile_rollouts='eager'.*take cache=dual or none"):
            config_of(cache=cache, compile_rollouts="eager")
    with pytest.raises(ValueError, match="compile_rollouts='yes'"):
        config_of(compile_rollouts="yes")
    model, prompts = tiny_llada(n_layers=1), torch.ones(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="'cudagraphs' on cpu"):
        generate(model, prompts, prompts.bool(), config_of(compile_rollouts="cudagraphs", temperature=0.0))
    for name, value, remedy in (
        ("num_experts", 8, "experts get other numbers of tokens"),
        ("_attn_implementation", "flash_attention_2", "choose 'sdpa'"),
    ):
        model = tiny_llada(n_layers=1)
        setattr(model.config, name, value)
        with pytest.raises(ValueError, match=remedy):
            generate(model, prompts, prompts.bool(), config_of(compile_rollouts="eager", temperature=0.0))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODES)
def test_every_mode_samples_the_same_tokens(name):
    assert_compiled_is_the_same(tiny_llada().eval(), config_of(**MODES[name]), EOS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_samples_the_same_tokens(tmp_path, kind):
    model, _ = load_model(published.write_checkpoint(tmp_path / kind, kind))
    config = config_of(cache=None if model.block_length else "dual")
    assert_compiled_is_the_same(model.eval(), config, published.NUM_WORDS - 8)


@pytest.mark.slow
def test_a_trainers_adapter_and_autocast_are_compiled_with_it(tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    trainer = tiny_trainer(tmp_path, place_in_group, lora=lora(), bf16=True, max_steps=2, compile_rollouts="eager")
    trainer.train()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert trainer.state.global_step == 2
