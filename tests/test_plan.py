"""`dgrpo plan` against what is counted and measured on small models."""

from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from published import write_checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dgrpo.__main__ import main
from dgrpo.cli import CARDS
from dgrpo.estimators import ESTIMATORS
from dgrpo.logprobs import score_views
from dgrpo.models.families import FAMILIES
from dgrpo.models.llada import LLaDAConfig, LLaDAModelLM
from dgrpo.models.loading import family_of, load_config
from dgrpo.models.sdar import SDARConfig, SDARForCausalLM
from dgrpo.noise import stream
from dgrpo.run.live import LiveBytes
from dgrpo.run.memory import _even_experts, _whole, activations
from dgrpo.run.plan import plan_of
from dgrpo.run.scored import Pass
from dgrpo.run.shapes import SHAPES, Network, model_configuration, on_meta
from dgrpo.sampling import SamplerConfig, generate
from dgrpo.views import MaskedViews, views_of

SHAPE = {"d_model": 96, "n_heads": 4, "n_layers": 3, "mlp_hidden_size": 224, "vocab_size": 3000}
TOKENS = {"eos_token_id": 2990, "pad_token_id": 2990, "mask_token_id": 2991}
RECIPE = """
max_completion_length: 32
block_length: 8
diffusion_steps: 16
num_generations: 3
per_device_train_batch_size: 6
max_prompt_length: 16
num_iterations: 4
beta: 0.04
max_steps: 40
use_peft: true
lora_r: 8
lora_dropout: 0.0
gradient_checkpointing: false
bf16: false
"""


@pytest.fixture
def recipe(tmp_path):
    """A function (**settings) -> command line of a recipe for a small LLaDA."""
    LLaDAConfig(**SHAPE, **TOKENS).save_pretrained(tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(f"{RECIPE}model_name_or_path: {tmp_path / 'model'}\n")

    def words(**settings):
        given = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        return ["--config", str(tmp_path / "recipe.yaml"), "--use_cpu", "true", *given]

    return words


@pytest.fixture
def policy():
    """The recipe's model with its adapter, its weights random."""
    model = LLaDAModelLM(LLaDAConfig(**SHAPE, **TOKENS))
    return get_peft_model(model, LoraConfig(r=8, target_modules=FAMILIES["llada"].lora_targets))


def flops_of(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", ["llada", "dream", "llada_moe"])
def test_flops_are_those_that_torch_counts(tmp_path, kind, adapted):
    folder = write_checkpoint(tmp_path / kind, kind)
    family, config = family_of(folder), load_config(folder)
    config._attn_implementation = "eager"
    lora = LoraConfig(r=4, target_modules=family.lora_targets) if adapted else None
    model = on_meta(config, family, torch.float32, lora, checkpointing=False)
    rows, tokens, asked = 8, 24, 8
    ids = torch.zeros(rows, tokens, dtype=torch.long, device="meta")
    base = model.get_base_model() if adapted else model
    with _even_experts(), torch.no_grad():
        counted = flops_of(lambda: base.hidden_states(ids, columns=slice(tokens - asked, tokens)))
    planned = sum(Network(model).forward(rows, tokens, asked))
    assert planned == pytest.approx(counted, rel=0.02)


def test_an_updates_flops_are_those_that_torch_counts(policy):
    policy.enable_input_require_grads()
    policy.train().get_base_model().config._attn_implementation = "eager"
    ids = torch.zeros(4, 24, dtype=torch.long)
    counted = flops_of(lambda: policy.get_base_model().hidden_states(ids).sum().backward())
    frozen, trained, attention = Network(policy).forward(4, 24, 24)
    # The fused kernel computes its scores again in the backward pass, the eager one does not.
    assert Network(policy).update(4, 24, 24, 0) - attention // 2 == pytest.approx(counted, rel=0.02)
    assert trained > 0


@pytest.mark.slow
def test_parts_of_a_cycle_are_counted(recipe):
    plan = plan_of(recipe())
    parts = {part.name: part for part in plan.parts}
    # Two groups of three, each with one view: whole completions hidden, so each group is one canvas.
    assert (parts["updates"].canvases, parts["updates"].passes) == (4 * 2, 4)
    assert parts["old policy"].canvases == 3 * 2
    assert parts["reference"].canvases == 4 * 2
    # The first step of a rollout shows two prompts, not six rows.
    assert (parts["rollout"].canvases, parts["rollout"].passes) == (2 + 15 * 6, 16)
    assert plan.cycles == 10
    # Without a block length, that of full attention.
    assert plan_of(recipe(block_length="none")).parts == plan_of(recipe(block_length=32)).parts
    views = plan_of(recipe(estimator="coupled", views_per_pass=1))
    parts = {part.name: part for part in views.parts}
    assert (parts["updates"].canvases, parts["updates"].passes) == (4 * (2 + 6 + 6), 4 * 3)


def measured(model, call) -> int:
    for weight in model.parameters():
        if weight.requires_grad:
            weight.grad = torch.zeros_like(weight)
    with LiveBytes(model) as live:
        call()
    return live.peak


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("estimator", ["one_step", "coupled"])
def test_an_updates_memory_is_what_a_real_one_holds(recipe, policy, checkpointing, estimator):
    if checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        policy.enable_input_require_grads()
    policy.train()
    plan = plan_of(recipe(estimator=estimator, gradient_checkpointing=checkpointing))
    views = 1 if estimator == "one_step" else 3
    hidden = torch.ones(6, views, 32).bool()
    if views == 3:
        hidden[:, 1] = torch.rand(6, 32) < 0.5
        hidden[:, 2] = ~hidden[:, 1]
    whole = torch.cat([torch.zeros(6, views, 16).bool(), hidden], 2)
    prompts = torch.randint(0, 2990, (2, 16)).repeat_interleave(3, 0)
    answers = torch.randint(0, 2990, (6, 32))
    asked = (prompts, torch.ones_like(prompts).bool(), answers, MaskedViews(whole, hidden.float()))
    peak = measured(policy, lambda: score_views(policy, *asked).logps.sum().backward())
    assert plan.memory["update"] == pytest.approx(peak, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"cache": "dual"}, {"temperature": 1.0}])
def test_a_rollouts_memory_is_what_a_real_one_holds(recipe, policy, settings):
    plan = plan_of(recipe(**settings))
    prompts = torch.randint(0, 2990, (2, 16)).repeat_interleave(3, 0)
    config = SamplerConfig(32, 8, 16, **{"temperature": 0.9} | settings)
    model = policy.get_base_model()
    keys = torch.arange(6)
    peak = measured(policy, lambda: generate(model, prompts, torch.ones_like(prompts).bool(), config, row_keys=keys))
    assert plan.memory["rollout"] == pytest.approx(peak, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["one_step", "trace"])
def test_a_block_models_costs_are_those_of_a_real_one(recipe, tmp_path, estimator):
    """FLOPs of a rollout and of scoring within 2 %, memory of a rollout and of an update within 15 %."""
    sizes = {"hidden_size": 96, "intermediate_size": 224, "num_hidden_layers": 3, "head_dim": 24, "vocab_size": 3000}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "block_size": 8}
    config = SDARConfig(**sizes, **heads, **TOKENS)
    config.save_pretrained(tmp_path / "block")
    settings = {"max_completion_length": 64, "block_length": "none", "diffusion_steps": 32, "num_iterations": 1}
    settings |= {"model_name_or_path": tmp_path / "block", "use_peft": False, "estimator": estimator}
    plan = plan_of(recipe(**settings))
    parts = {part.name: part for part in plan.parts}
    model = SDARForCausalLM(config).train()
    # No token ends a completion. The counter knows nothing of the fused kernel's shared keys.
    model.generation_config.eos_token_id, model.config._attn_implementation = 3000, "eager"
    prompts = torch.randint(0, 2990, (2, 16)).repeat_interleave(3, 0)
    sampler, keys = SamplerConfig(64, None, 32, temperature=0.9), torch.arange(6)
    rollouts = []

    def sample():
        rollouts.append(generate(model, prompts, torch.ones_like(prompts).bool(), sampler, row_keys=keys))

    assert parts["rollout"].flops == pytest.approx(flops_of(sample), rel=0.02)
    assert parts["rollout"].passes == rollouts[0].num_forwards
    views = views_of(ESTIMATORS[estimator], rollouts[0], stream("views"))
    asked = (prompts, torch.ones_like(prompts).bool(), rollouts[0].trace_ids(), views)
    with torch.no_grad():
        assert parts["reference"].flops == pytest.approx(flops_of(lambda: score_views(model, *asked)), rel=0.02)
    counted = flops_of(lambda: score_views(model, *asked).logps.sum().backward())
    # The fused kernel computes its scores again in the backward pass, the eager one does not: half an attention.
    assert counted < parts["updates"].flops < 1.1 * counted
    model.config._attn_implementation = "sdpa"
    assert plan.memory["rollout"] == pytest.approx(measured(model, sample), rel=0.15)
    peak = measured(model, lambda: score_views(model, *asked).logps.sum().backward())
    assert plan.memory["update"] == pytest.approx(peak, rel=0.15)


def test_layers_that_are_not_run_are_extrapolated():
    def build(layers):
        config = LLaDAConfig(**SHAPE | TOKENS | {"n_layers": layers})
        lora = LoraConfig(r=8, target_modules=FAMILIES["llada"].lora_targets)
        return on_meta(config, FAMILIES["llada"], torch.float32, lora, checkpointing=False)

    asked = {"hidden_states": partial(_whole, [Pass(2, 24, 8, 24)]), "grad": True, "bf16": False}
    expected = activations(lambda layers: build(8), 4, **asked)
    assert activations(build, 8, **asked) == pytest.approx(expected, rel=0.02)


def test_the_shapes_known_by_name_are_those_that_are_published():
    sizes = {"LLaDA-8B": 8_015_581_184, "LLaDA-MoE-7B": 7_356_880_896, "Dream-v0-7B": 7_615_616_512}
    sizes |= {"SDAR-8B": 8_190_735_360}
    for name, expected in sizes.items():
        family, config = model_configuration(f"somebody/{name}-Chat")
        model = on_meta(config, family, torch.bfloat16, None, checkpointing=False)
        assert sum(weight.numel() for weight in model.parameters()) == expected, name
    assert {key for _, key, _ in SHAPES} <= set(FAMILIES)


def test_what_cannot_be_planned_is_refused(recipe):
    with pytest.raises(ValueError, match="no folder, and not among the shapes"):
        plan_of(recipe(model_name_or_path="somebody/unknown"))


@pytest.mark.slow
def test_the_command_says_what_fits_and_what_to_change(recipe, capsys):
    main(["plan", *recipe()])
    assert "h100: fits in 80 GB" in capsys.readouterr().out
    config = ["plan", "--config", "gsm8k_llada_8b", "--card", "rtx3090"]
    main([*config, "--per_device_train_batch_size", "24", "--prompt_mask_scope", "row"])
    printed = capsys.readouterr().out
    assert "335.5 million of them trained" in printed
    assert "does not fit in 24 GB" in printed
    assert printed.rstrip().splitlines()[-1].startswith("with --gradient_checkpointing true --views_per_pass 1")
    assert set(CARDS) >= {"h100", "a100-40", "rtx4090"}
