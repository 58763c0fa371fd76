"""Policies of one's own, the history that they leave, and rows that leave a block when they are done with it."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from trainers import EOS, MASK, VOCAB

from dgrpo import DiffuGRPOConfig
from dgrpo.sampling import Rollout, SamplerConfig, denoise, generate
from dgrpo.sampling.network import Network
from dgrpo.sampling.policy import commit

BLOCKS = SamplerConfig(max_completion_length=12, block_length=6, diffusion_steps=12, temperature=0.9)
KEYS = torch.randint(2**62, (5,), generator=torch.Generator().manual_seed(5))


def plain_commit(sight, budget, config):
    """What `commit` does, as a policy of one's own."""
    return commit(sight, budget, config)


def remask(sight, budget, config):
    """Commits twice its share, then hides the least confident of what is shown until the share is right (RCR)."""
    after = commit(sight, (2 * budget).minimum(sight.is_open.sum(1)), config)
    confidence = torch.where(sight.is_open, sight.probs, sight.confidence)
    hide = confidence.masked_fill(after == sight.mask_token_id, 2).argsort(1).argsort(1) < budget[:, None]
    last = sight.step + 2 >= sight.num_steps
    return after if last else torch.where(hide, sight.mask_token_id, after)


def edit(sight, budget, config):
    """Commits its share and overwrites shown tokens that the model would now replace."""
    after = commit(sight, budget, config)
    return torch.where(~sight.is_open & (sight.probs > 0.2), sight.tokens, after)


def shuffle(sight, budget, config):
    """Hides and overwrites by chance whatever it is shown."""
    written = torch.where(sight.noise < 0.7, sight.tokens, sight.ids)
    return torch.where(sight.noise < 0.3, sight.mask_token_id, written)


def without_end(model):
    model.generation_config.eos_token_id = VOCAB
    return model


def assert_same(rollout: Rollout, other: Rollout) -> None:
    for name in ("completion_ids", "completion_mask", "revealed_at", "history"):
        assert torch.equal(getattr(rollout, name), getattr(other, name)), name
    torch.testing.assert_close(rollout.confidence, other.confidence, rtol=0, atol=1e-6)
    torch.testing.assert_close(rollout.entropy, other.entropy, rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"cache": "dual"}, {"remasking": "random"}, {"temperature": 0.0}], ids=str)
def test_commit_as_a_policy_of_ones_own_samples_the_same(model, prompts, settings):
    config = replace(BLOCKS, **settings)
    expected = generate(model, *prompts, config, row_keys=KEYS)
    for policy in (plain_commit, f"{__name__}:plain_commit"):
        assert_same(generate(model, *prompts, replace(config, sampler_policy=policy), row_keys=KEYS), expected)


def test_a_policy_that_does_not_revise_takes_no_pass_more(model, prompts, monkeypatch):
    config = replace(BLOCKS, threshold=0.2)
    expected = generate(model, *prompts, config, row_keys=KEYS)
    own = replace(config, sampler_policy=plain_commit)
    rollout = generate(model, *prompts, own, row_keys=KEYS)
    # It might have changed something of the full block.
    assert rollout.num_forwards > expected.num_forwards
    monkeypatch.setattr(plain_commit, "revises", False, raising=False)
    assert generate(model, *prompts, own, row_keys=KEYS).num_forwards == expected.num_forwards
    assert_same(generate(model, *prompts, own, row_keys=KEYS), expected)


@pytest.mark.parametrize("policy", [remask, edit, shuffle])
@pytest.mark.parametrize("cache", [None, "prefix", "dual"])
def test_nothing_given_and_nothing_of_a_finished_block_is_changed(model, prompts, policy, cache):
    fixed = torch.full((5, 12), -1)
    fixed[0, [1, 4, 7]] = torch.tensor([3, 5, 9])
    fixed[1, :6] = 2
    config = replace(BLOCKS, sampler_policy=policy, cache=cache, stop_at_eos=False)
    rollout = generate(without_end(model), *prompts, config, row_keys=KEYS, fixed=fixed)
    given = fixed >= 0
    assert torch.equal(rollout.completion_ids[given], fixed[given])
    assert (rollout.revealed_at[given] == -1).all()
    assert (rollout.confidence[given] == 1).all()
    assert not (rollout.completion_ids == MASK).any()
    step, position, token = rollout.history.unbind(2)
    happened = step >= 0
    assert not given.gather(1, position.clamp(min=0))[happened].any()
    assert torch.equal((step // 6)[happened], (position // 6)[happened])
    # Each writes some place twice; all but `edit` hide tokens again.
    assert (happened.sum(1) > (~given).sum(1)).any()
    assert bool((token[happened] == -1).any()) == (policy is not edit)


def test_history_replays_to_what_the_network_saw(model, prompts):
    seen = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, ids: seen.append(ids[0][:, -12:].clone()))
    config = replace(BLOCKS, sampler_policy=shuffle)
    rollout = generate(without_end(model), *prompts, config, row_keys=KEYS, batch_size=1)
    states, steps = rollout.states()
    revised = 0
    passes = iter(seen)
    # Rows are denoised in order of length.
    for row in prompts[1].sum(1).argsort(stable=True).tolist():
        mine = {int(n): state for n, state in zip(steps[row], states[row], strict=True) if n >= 0}
        assert len(mine) > 6
        for number in range(12):
            # A step that changes nothing has no state of its own.
            canvas = next(passes)[0]
            if number in mine:
                assert torch.equal(mine[number].masked_fill(mine[number] < 0, MASK), canvas)
        revised += int((rollout.history[row, :, 0] >= 0).sum()) - 12
        last = {int(p): (int(s), int(t)) for s, p, t in rollout.history[row] if s >= 0}
        expected = [
            (int(s), int(t)) for s, t in zip(rollout.revealed_at[row], rollout.completion_ids[row], strict=True)
        ]
        assert [last[place] for place in range(12)] == expected
    assert revised > 20
    assert next(passes, None) is None


def test_history_keeps_what_was_drawn_behind_the_end(model, prompts):
    free = generate(without_end(model), *prompts, BLOCKS, row_keys=KEYS)
    assert torch.equal(free.history, replace(free, history=None).history)
    model.generation_config.eos_token_id = free.completion_ids[:, 2].unique().tolist()
    rollout = generate(model, *prompts, BLOCKS, row_keys=KEYS)
    assert rollout.completion_mask.sum(1).max() <= 3
    assert torch.equal(rollout.history, free.history[:, :6])
    few = rollout.rows([3, 1])
    assert torch.equal(few.history, rollout.history[[3, 1]])
    assert torch.equal(few.states()[0], rollout.states()[0][[3, 1]])


def test_a_rollout_without_revisions_has_one_state_for_each_step(rollout):
    states, steps = rollout.states()
    assert torch.equal(steps, torch.arange(5).expand(6, -1))
    for step in range(5):
        shown = rollout.revealed_at < step
        assert torch.equal(states[:, step], rollout.completion_ids.masked_fill(~shown, -1))


def test_a_policy_sees_how_sure_the_model_was_of_what_is_shown(model, prompts):
    seen = []

    def watch(sight, budget, config):
        seen.append(sight)
        return remask(sight, budget, config)

    fixed = torch.full((5, 12), -1)
    fixed[:, 2] = 4
    generate(without_end(model), *prompts, replace(BLOCKS, sampler_policy=watch), row_keys=KEYS, fixed=fixed)
    told = torch.zeros(5, 6)
    again = 0
    for sight in seen[:6]:
        assert (sight.confidence[:, 2] == 1).all()
        assert (sight.confidence[sight.is_open] == 0).all()
        shown = ~sight.is_open & (torch.arange(6) != 2)
        assert torch.equal(sight.confidence[shown], told[shown])
        after = remask(sight, -(-sight.is_open.sum(1) // (6 - sight.step)), BLOCKS)
        again += int((shown & (after == MASK)).sum())
        told = torch.where(sight.is_open, sight.probs, told)
    assert again > 0


# Rows leave


def stays(monkeypatch) -> None:
    monkeypatch.setattr(Network, "worth_leaving", lambda self, num_done, num_rows: False)


RULES = {"fixed": {}, "threshold": {"threshold": 0.25}, "factor": {"factor": 1.4}, "bound": {"entropy_bound": 4.0}}
CACHES = {"exact": {}, "guided": {"cfg_scale": 1.0}, "prefix": {"cache": "prefix", "cache_refresh": 2}}
CACHES["dual"] = {"cache": "dual"}


@pytest.mark.parametrize("given", [False, True], ids=["free", "given"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cache", CACHES)
def test_rows_that_leave_a_block_change_nothing_of_any_row(model, prompts, monkeypatch, rule, cache, given):
    fixed = None
    if given:
        fixed = torch.full((5, 12), -1)
        fixed[0, :5], fixed[1, 6:10], fixed[2, ::2], fixed[4, :12] = 3, 4, 5, 6
    config = replace(BLOCKS, **RULES[rule], **CACHES[cache])
    sizes = []
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    rollout = generate(model, *prompts, config, row_keys=KEYS, fixed=fixed)
    left = sum(sizes)
    if rule != "fixed" or given:
        assert left < max(sizes) * len(sizes)
    del sizes[:]
    stays(monkeypatch)
    everybody = generate(model, *prompts, config, row_keys=KEYS, fixed=fixed)
    assert_same(rollout, everybody)
    assert rollout.num_forwards == everybody.num_forwards
    if rule != "fixed" or given:
        assert left < sum(sizes)


def test_a_cache_is_copied_only_where_a_quarter_of_the_rows_is_done(model):
    network = Network(model, BLOCKS, 6)
    assert network.worth_leaving(1, 100)
    network.cache = object()
    assert not network.worth_leaving(24, 100)
    assert network.worth_leaving(25, 100)


@pytest.mark.parametrize("settings", [{}, {"sampler_policy": plain_commit}], ids=["commit", "own"])
def test_processes_make_equally_many_passes_where_rows_leave(tiny_llada, prompts, settings):
    config = replace(BLOCKS, threshold=0.3, **settings)
    ids, mask = prompts
    parts = [slice(0, 2), slice(2, 5)]
    alone = [generate(tiny_llada(), ids[part], mask[part], config, row_keys=KEYS[part]) for part in parts]
    barrier, flags = threading.Barrier(2, timeout=20), [False, False]

    def job(rank: int) -> Rollout:
        def any_rank(flag: bool) -> bool:
            flags[rank] = bool(flag)
            barrier.wait()
            answer = any(flags)
            barrier.wait()
            return answer

        part = parts[rank]
        return generate(tiny_llada(), ids[part], mask[part], config, row_keys=KEYS[part], any_rank=any_rank)

    with ThreadPoolExecutor(2) as pool:
        together = [future.result() for future in [pool.submit(job, rank) for rank in (0, 1)]]
    assert together[0].num_forwards == together[1].num_forwards
    assert together[0].num_forwards > min(rollout.num_forwards for rollout in alone)
    for mine, theirs in zip(together, alone, strict=True):
        assert_same(mine, theirs)


# Settings


def one_argument(sight):
    return sight.ids


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere.at_all:policy", "No module named 'nowhere'"),
        (f"{__name__}:nothing", "has no 'nothing'"),
        (f"{__name__}:EOS", "is no function"),
        (f"{__name__}:one_argument", "too many positional arguments"),
        ("no dots", "cannot import 'no dots'"),
    ],
)
def test_a_policy_that_cannot_be_is_refused_before_a_model_is_loaded(tmp_path, name, reason):
    message = rf"sampler_policy='{name}': name a function \(sight, budget, config\).*{reason}"
    with pytest.raises(ValueError, match=message):
        SamplerConfig(sampler_policy=name)
    with pytest.raises(ValueError, match=message):
        DiffuGRPOConfig(str(tmp_path), per_device_train_batch_size=6, sampler_policy=name, use_cpu=True)


def test_training_settings_reach_the_sampler(tmp_path):
    args = DiffuGRPOConfig(
        str(tmp_path), per_device_train_batch_size=6, sampler_policy=f"{__name__}:edit", use_cpu=True
    )
    assert args.sampler().policy is edit
    assert args.sampler().approximate
    assert args.sampler().exact().policy is None


def test_training_samples_by_it_and_logs_how_much_it_changes(trainer):
    run = trainer(sampler_policy=f"{__name__}:shuffle", max_steps=2, stop_at_eos=False)
    run.train()
    logged = {name for entry in run.state.log_history for name in entry}
    assert "rollout/agreement" in logged
    (batch, *_) = run._buffered_inputs
    step, _, token = batch["history"].unbind(2)
    assert ((token == -1) & (step >= 0)).any()


POLICY_FILE = """
def leftmost(sight, budget, config):
    print("asked", len(sight.ids))
    first = sight.positions.masked_fill(~sight.is_open, 10**6).argsort(1).argsort(1) < budget[:, None]
    return sight.tokens.where(first, sight.ids)
"""


@pytest.mark.slow
def test_an_evaluation_samples_by_a_file_of_the_users_own(tmp_path):
    (tmp_path / "my_policy.py").write_text(POLICY_FILE)
    command = [sys.executable, "-m", "dgrpo", "evaluate", "--task", "gsm8k", "--num_problems", "4"]
    command += ["--sampler_policy", "my_policy:leftmost", "--output_dir", "out"]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "asked 4" in done.stdout


@pytest.mark.parametrize("wrong", [lambda ids: ids[:, :-1], lambda ids: ids.masked_fill(ids == MASK, EOS)])
def test_a_policy_that_returns_something_else_is_told(model, prompts, wrong):
    config = replace(BLOCKS, sampler_policy=lambda sight, budget, config: wrong(sight.ids))
    with pytest.raises(
        ValueError, match=r"sampler_policy=.*must return ids \[5, 6\], each of them sight.ids, sight.tok"
    ):
        generate(model, *prompts, config, row_keys=KEYS)


def test_a_schedule_known_in_advance_looks_at_the_canvas_once_a_block(model, prompts, monkeypatch):
    looks = []
    right = denoise.Denoiser._num_left
    monkeypatch.setattr(denoise.Denoiser, "_num_left", lambda self, start: looks.append(start) or right(self, start))
    generate(without_end(model), *prompts, BLOCKS, row_keys=KEYS)
    assert looks == [0, 6]
