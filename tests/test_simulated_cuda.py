"""Everything that samples, scores or trains, on a simulated device: the CPU's values, and few waits and launches."""

from dataclasses import fields

import published
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from peft import get_peft_model
from simulated_cuda import SimulatedCuda
from stopping import StopAt
from test_trainer_objectives import METHODS
from torch.nn.functional import one_hot
from trainers import EOS, PROMPTS, lora, place_in_group, tiny_llada, tiny_tokenizer, tiny_trainer

from dgrpo import MaskedSFTConfig, MaskedSFTTrainer, SamplerConfig, generate, per_token_logps
from dgrpo.estimators import ESTIMATORS
from dgrpo.evaluation.answers import answer_rows, as_in_training
from dgrpo.models import load_model
from dgrpo.trainers import VRPOConfig, VRPOTrainer
from dgrpo.views import draw_views

CHECKPOINT_STEPS = {"save_strategy": "steps", "save_steps": 1}
SAMPLERS = {
    "greedy": {},
    "temperature 1": {"temperature": 1.0},
    "random order": {"remasking": "random"},
    "entropy": {"remasking": "entropy"},
    "margin": {"remasking": "topk_margin"},
    "guidance": {"cfg_scale": 1.0},
    "ends last": {"confidence_eos_eot_inf": True, "logits_eos_inf": True},
    "prefix cache": {"cache": "prefix"},
    "dual cache": {"cache": "dual", "cache_refresh": 3},
    "threshold": {"threshold": 0.6},
    "factor": {"factor": 1.0},
    "entropy bound": {"entropy_bound": 0.3},
    "policy": {"sampler_policy": "test_simulated_cuda:hide_the_least_sure"},
}
FAMILIES = ["llada", "dream", "llada_moe", "llada2", "sdar", "a2d-qwen2", "a2d-qwen3", "a2d-llama"]
VIEWS = {
    "elbo": {"num_samples": 2},
    "trace": {"num_segments": 2},
    "block_random": {"block_length": 5},
}


def slow(case):
    return pytest.param(case, marks=pytest.mark.slow)


def hide_the_least_sure(sight, budget, config):
    """A policy that revises: commits everything, then hides the least probable token again."""
    least = one_hot(sight.probs.argmin(1), sight.probs.shape[1]).bool()
    return torch.where(least & (sight.step < 2), sight.mask_token_id, sight.tokens)


@pytest.fixture
def gpu():
    """A simulated device, of which accelerate knows nothing before or after the test."""

    def forget():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    forget()
    with SimulatedCuda() as device:
        yield device
    forget()


def test_what_cuda_refuses_is_refused(gpu):
    device, host = torch.ones(3, device="cuda"), torch.ones(3)
    assert device.is_cuda
    for mixed in (
        lambda: device + host,
        lambda: host.index_add(0, torch.zeros(3, dtype=torch.long).cuda(), host),
        lambda: torch.cat([device, host]),
        lambda: host[torch.zeros(1, dtype=torch.long, device="cuda")],
        lambda: torch.rand(3, device="cuda", generator=torch.Generator()),
    ):
        with pytest.raises(RuntimeError, match="device"):
            mixed()
    with pytest.raises(TypeError, match="numpy"):
        device.numpy()
    assert (device * host.sum()).cpu().equal(3 * host)


def test_waits_uploads_and_launches_are_counted(gpu):
    gpu.watch = "/tests/"
    values = torch.arange(4).cuda()
    gpu.line = lambda: "here"
    for wait in (
        lambda: values[0].item(),
        lambda: values.tolist(),
        lambda: values[values > 1],
        lambda: values.cpu(),
        lambda: values.nonzero(),
        lambda: values.unique(),
        lambda: bool(values.any()),
    ):
        before = gpu.waits.total()
        wait()
        assert gpu.waits.total() == before + 1
    uploads = gpu.uploads.total()
    assert torch.ones(2).to("cuda", non_blocking=True).device.type == "cuda"
    assert gpu.uploads.total() == uploads
    values[torch.tensor([0])], torch.tensor([1], device="cuda")
    assert gpu.uploads.total() == uploads + 2
    launches = gpu.launches.total()
    _ = (values + 1).view(2, 2).t() * 2
    assert gpu.launches.total() == launches + 2


def sampled(model, config, device="cpu"):
    ids = torch.randint(0, EOS, (4, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(5) >= torch.tensor([0, 2, 0, 4])[:, None]
    keys = torch.arange(4)
    return generate(model.to(device), ids.to(device), mask.to(device), config, row_keys=keys.to(device))


def assert_equal_rollouts(on_cpu, on_device):
    for field in fields(on_cpu):
        expected, found = getattr(on_cpu, field.name), getattr(on_device, field.name)
        if isinstance(expected, torch.Tensor):
            assert found.is_cuda
            torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)
        else:
            assert found == expected


@pytest.mark.parametrize("name", [name if name == "temperature 1" else slow(name) for name in SAMPLERS])
def test_every_sampler_writes_the_cpus_tokens_and_seldom_waits(gpu, name):
    """The fixed schedule is known in advance: no wait in a step. Rules and policies are asked after each."""
    counts = []
    for steps in (2, 4):
        config = SamplerConfig(4, 2, steps, stop_at_eos=False, **SAMPLERS[name])
        expected = sampled(tiny_llada(n_layers=1), config)
        before = gpu.counts(), gpu.counts("models")
        found = sampled(tiny_llada(n_layers=1), config, "cuda")
        (waits, uploads, launches), (*_, of_network) = (
            [new - old for new, old in zip(now, then, strict=True)]
            for now, then in zip((gpu.counts(), gpu.counts("models")), before, strict=True)
        )
        counts.append((waits, uploads, launches - of_network))
        assert_equal_rollouts(expected, found)
    (waits, uploads, launches), (more_waits, more_uploads, more_launches) = counts
    assert uploads == more_uploads, "as many for twice the steps"
    if config.parallel or config.policy is not None:
        assert more_waits <= 13 + 3 * found.num_forwards
    else:
        assert (waits, found.num_forwards) == (more_waits, 4), "as many for twice the steps"
        # Measured: 63 (greedy) to 115 (in random order, at temperature 1) a step beside the network's.
        assert more_launches - launches <= 2 * 130


@pytest.mark.parametrize("name", [name if name == "coupled" else slow(name) for name in ESTIMATORS])
def test_every_estimator_scores_as_on_the_cpu(gpu, rollout, name):
    """Views are those of the CPU exactly, scores and gradients within rounding."""

    def estimator(part, generator):
        return ESTIMATORS[name](part, generator=generator, **VIEWS.get(name, {}))

    hidden = draw_views(estimator, rollout, rollout.group, ("key",)).hidden
    views, found, counts = {}, {}, {}
    for device in ("cpu", "cuda"):
        there, model = rollout.to(device), tiny_llada().to(device).train()
        views[device] = estimator(there, torch.Generator().manual_seed(1))
        before = gpu.counts()
        logps = per_token_logps(
            model, there.prompt_ids, there.prompt_mask, there.completion_ids, views[device], views_per_pass=2
        )
        logps.sum().backward()
        counts[device] = [new - old for new, old in zip(gpu.counts(), before, strict=True)]
        found[device] = [logps.detach(), *(parameter.grad for parameter in model.parameters())]
    assert views["cuda"].hidden.cpu().equal(views["cpu"].hidden)
    assert views["cuda"].weights.cpu().equal(views["cpu"].weights)
    for expected, value in zip(found["cpu"], found["cuda"], strict=True):
        torch.testing.assert_close(value.cpu(), expected, rtol=1e-5, atol=1e-5)
    waits, uploads, _ = counts["cuda"]
    assert uploads == 0
    assert waits <= 6 + 4 * -(-hidden.shape[2] // 2), "a few for the batch, and for each pass"


def weights_of(trainer):
    return {name: parameter.detach().cpu() for name, parameter in trainer.model.named_parameters()}


def assert_equal_weights(expected, found):
    """Adam divides by the size of a gradient, its rounding included: equal but for that."""
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-4, msg=name)


def trained(folder, use_cpu, **settings):
    trainer = tiny_trainer(folder, place_in_group, use_cpu=use_cpu, **{"bf16": False, "max_steps": 2} | settings)
    trainer.train()
    assert trainer.accelerator.device.type == ("cpu" if use_cpu else "cuda")
    return weights_of(trainer)


RUNS = {
    "grpo": {},
    "grpo with a reference and several views": {
        "beta": 0.04,
        "lora": lora(),
        "estimator": "coupled",
        "views_per_pass": 1,
    },
    "exact kl": {"kl": "exact", "beta": 0.1, "lora": lora()},
    "dr_grpo": {"loss_type": "dr_grpo", "prompt_mask_scope": "row"},
    "sequence ratios": {"importance_sampling_level": "sequence", "estimator": "elbo"},
    **{objective: {"objective": objective} | settings for objective, settings in METHODS.items()},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_an_update_of_every_objective_is_the_cpus(gpu, tmp_path, name):
    expected = trained(tmp_path / "cpu", True, **RUNS[name])
    AcceleratorState._reset_state(reset_partial_state=True)
    assert_equal_weights(expected, trained(tmp_path / "gpu", False, **RUNS[name]))
    # Of two updates and their rollout; before views were drawn on the host it was several for each group and draw.
    assert gpu.counts("views")[:2] == gpu.counts("estimators")[:2] == (0, 0)


@pytest.mark.slow
def test_an_update_waits_a_fixed_number_of_times(gpu, tmp_path):
    """More inner updates of the same rollout: what each of them adds."""
    counts = []
    for updates in (2, 4):
        before = gpu.counts()
        trained(tmp_path / str(updates), False, num_iterations=updates, max_steps=updates)
        counts.append([new - old for new, old in zip(gpu.counts(), before, strict=True)])
    waits, uploads, launches = ((more - few) / 2 for few, more in zip(*counts, strict=True))
    assert waits <= 40
    assert uploads <= 20
    assert launches <= 1500


@pytest.mark.slow
def test_a_run_resumed_within_a_rollout_ends_as_the_straight_one(gpu, tmp_path):
    settings = {"max_steps": 4, "num_iterations": 4, **CHECKPOINT_STEPS}
    straight = trained(tmp_path / "straight", False, **settings)
    trained(tmp_path / "cut", False, callbacks=[StopAt(2)], **settings)
    resumed = tiny_trainer(tmp_path / "cut", place_in_group, use_cpu=False, bf16=False, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut/checkpoint-2"))
    assert resumed.state.global_step == 4
    assert all(weight.equal(straight[name]) for name, weight in weights_of(resumed).items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "vrpo"])
def test_fine_tuning_on_examples_is_the_cpus(gpu, tmp_path, kind):
    classes = {"sft": (MaskedSFTTrainer, MaskedSFTConfig), "vrpo": (VRPOTrainer, VRPOConfig)}
    trainer_class, config_class = classes[kind]
    columns = {"completion": ["b c"] * 4} if kind == "sft" else {"chosen": ["b c"] * 4, "rejected": ["d"] * 4}
    rows = Dataset.from_dict({"prompt": PROMPTS[:4], **columns})
    weights = {}
    for device in ("cpu", "cuda"):
        AcceleratorState._reset_state(reset_partial_state=True)
        model = get_peft_model(tiny_llada(), lora()) if kind == "vrpo" else tiny_llada()
        settings = {"per_device_train_batch_size": 2, "max_steps": 2, "report_to": "none", "save_strategy": "no"}
        settings |= {"use_cpu": device == "cpu", "bf16": False, "disable_tqdm": True}
        args = config_class(str(tmp_path / device), **settings)
        trainer = trainer_class(model, args, rows, tiny_tokenizer())
        trainer.train()
        assert next(trainer.model.parameters()).device.type == device
        weights[device] = weights_of(trainer)
    assert_equal_weights(weights["cpu"], weights["cuda"])


@pytest.mark.slow
def test_an_evaluation_answers_as_on_the_cpu(gpu):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    rows = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in PROMPTS[:3]]
    texts = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = get_peft_model(tiny_llada(), lora()).eval().to(device)
        with as_in_training(model):
            answers = answer_rows(
                model, tokenizer, rows, lambda prompts, **columns: [1.0] * len(prompts), SamplerConfig(6, 3, 6)
            )
        texts.append([answer.text for answer in answers])
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_16_bit_weights_with_an_adapter_run_in_16_bits_outside_training(gpu):
    """LoRA's float32 weights would otherwise pull the products beside them to float32."""
    model = get_peft_model(tiny_llada(dtype=torch.bfloat16).bfloat16(), lora()).eval().to("cuda")
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    ids = torch.randint(0, EOS, (2, 5)).cuda()
    dtypes = []
    linear = torch.nn.functional.linear

    def spy(x, weight, bias=None):
        dtypes.append(torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype)
        return linear(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch, as_in_training(model):
        patch.setattr(torch.nn.functional, "linear", spy)
        generate(model, ids, torch.ones_like(ids).bool(), SamplerConfig(4, 4, 2))
    assert set(dtypes) == {torch.bfloat16}
    assert set(gpu.attention) == {"flash"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_familys_network_gives_the_cpus_logits(gpu, tmp_path, kind):
    model, _ = load_model(published.write_checkpoint(tmp_path / kind, kind))
    ids = torch.randint(0, published.NUM_WORDS - 8, (3, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(9) >= 9 - torch.tensor([9, 4, 6])[:, None]
    with torch.no_grad():
        expected = model(ids, mask).logits
        model.to("cuda")
        ids, visible = ids.cuda(), mask.cuda()
        before = gpu.counts()
        found = model(ids, visible).logits
        waits, uploads, _ = (new - old for new, old in zip(gpu.counts(), before, strict=True))
    torch.testing.assert_close(found.cpu()[mask], expected[mask], rtol=1e-4, atol=1e-4)
    # Experts one by one (no grouped product in float32) must know how many tokens each gets.
    experts = 2 if kind in ("llada_moe", "llada2") else 0
    assert waits <= experts
    assert uploads == 0
