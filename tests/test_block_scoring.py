"""Scoring a block model's rollouts and texts: estimators on each block, the clean past, and what trains on it."""

import functools
import itertools
import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from test_block_sampling import RULES, B, C, converted, sample, sdar, texts, weights
from test_sampler_policy import shuffle
from trainers import EOS, MASK, PROMPTS, place_in_group, tiny_tokenizer, tiny_trainer

from dgrpo import MaskedSFTConfig, MaskedSFTTrainer, MaskedViews, VRPOConfig, VRPOTrainer, estimators, per_token_logps
from dgrpo.logprobs import log_likelihood, score_views
from dgrpo.models.sdar import SDARConfig, SDARForCausalLM
from dgrpo.noise import stream
from dgrpo.views import views_of

KINDS = {"sdar": sdar, "shifted": converted}
LORA = {"r": 2, "target_modules": r".*(q_proj|up_proj)", "init_lora_weights": False}


def views(rollout, name: str, seed: int = 0, **settings) -> MaskedViews:
    def estimator(rollout, *, generator):
        return estimators.ESTIMATORS[name](rollout, generator=generator, **settings)

    return views_of(estimator, rollout, torch.Generator().manual_seed(seed))


def logps(model, rollout, views: MaskedViews, **settings):
    return per_token_logps(model, rollout.prompt_ids, rollout.prompt_mask, rollout.trace_ids(), views, **settings)


@pytest.mark.parametrize("rule", ["static", "static, 2 steps", "threshold", "sequential", "entropy"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_trace_is_what_the_sampler_recorded(kind, rule):
    model = KINDS[kind]()
    rollout = sample(model, temperature=0.9, **RULES[rule])
    trace = views(rollout, "trace")
    assert trace.weights.shape[1] <= B
    scored = (trace.weights != 0).any(1)
    assert (scored >= rollout.completion_mask).all()
    found = logps(model, rollout, trace)
    recorded = rollout.confidence.log().where(rollout.completion_mask, 0.0)
    torch.testing.assert_close(found.where(rollout.completion_mask, 0.0), recorded, rtol=0, atol=1e-5)
    # What was written behind the end before the answer's last token had a part in it.
    behind = scored & ~rollout.completion_mask
    last = rollout.written_at().masked_fill(~rollout.completion_mask, -1).unflatten(1, (-1, B)).amax(2)
    early = rollout.written_at() < last.repeat_interleave(B, 1)
    assert torch.equal(behind, early & (rollout.written_at() >= 0) & ~rollout.completion_mask)
    assert rule in ("static, 2 steps", "sequential") or behind.any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_grid_that_starts_at_the_completion_is_another_one(kind):
    model = KINDS[kind]()
    prompts = texts((5, 7))
    rollout = sample(model, prompts, **RULES["static"])
    right = logps(model, rollout, views(rollout, "left_to_right"))
    # The same texts, moved by their tails.
    ids = torch.cat([rollout.prompt_ids, rollout.trace_ids()], 1)
    moved = torch.stack([row.roll(-int(tail)) for row, tail in zip(ids, rollout.prompt_tail, strict=True)])
    wrong = per_token_logps(
        model, moved[:, :B], torch.ones(2, B).bool(), moved[:, B:], views(rollout, "left_to_right"), reduce=None
    ).sum(1)
    assert (right[0, 1:9] - wrong[0, :8]).abs().max() > 0.1


def test_of_a_revised_block_every_write_is_scored_in_its_state():
    model = sdar()
    rollout = sample(model, temperature=0.9, **RULES["static"], sampler_policy=shuffle)
    own = views(rollout, "every_write").check()
    canvases = own.each(lambda value: value[..., -C:]).canvases(rollout.trace_ids(), MASK)
    states, steps = (each.tolist() for each in rollout.states())
    for row, history in enumerate(rollout.history.tolist()):
        written = []
        for step, position, token in history:
            block = position // B * B
            # The block's number of this state, and what stood in the block.
            numbers = [s for s in steps[row] if s // B == step // B and s >= 0]
            before = states[row][steps[row].index(step)][block : block + B] if step >= 0 else []
            if token >= 0:
                view = numbers.index(step)
                assert canvases[row, view, block : block + B].tolist() == [MASK if t < 0 else t for t in before]
                written.append((view, position, token))
        view, position = own.weights[row].nonzero().unbind(1)
        found = list(zip(view.tolist(), position.tolist(), own.targets[row, view, position].tolist(), strict=True))
        assert set(found) <= set(written)
        answer = int(rollout.completion_mask[row].nonzero().max())
        assert {event for event in written if event[1] <= answer} <= set(found)
        # A single picture scored by itself, behind the clean past.
    logps(model, rollout, own)


@pytest.mark.parametrize("name", ["trace", "every_write", "one_step", "elbo", "coupled", "left_to_right"])
def test_passes_memory_and_neighbours_change_nothing(name):
    model = sdar()
    rollout = sample(model, temperature=0.9, **RULES["threshold"])
    own = views(rollout, name)
    weight = torch.randn(rollout.completion_ids.shape, generator=torch.Generator().manual_seed(1))

    def scores(**settings):
        model.zero_grad()
        found = logps(model, rollout, own, **settings)
        (found * weight).sum().backward()
        return found.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = scores()
    for found, expected in zip(scores(views_per_pass=1), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for row in range(len(weight)):
        one = rollout.rows([row])
        alone = own.each(lambda value, row=row: value[row : row + 1])
        alone = replace(alone, hidden=alone.hidden[..., -one.prompt_ids.shape[1] - C :])
        torch.testing.assert_close(logps(model, one, alone)[0].detach(), whole[0][row], rtol=0, atol=1e-5)


def tiny(size: int = 3):
    """Five words: 0 to 2, an end and a mask; blocks of three tokens."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": 5,
        "eos_token_id": 3,
        "max_position_embeddings": 32,
    }
    model = weights(SDARForCausalLM(SDARConfig(**sizes, bos_token_id=None, mask_token_id=4, block_size=size)))
    model.generation_config.eos_token_id = [3]
    return model


def test_probabilities_of_all_texts_sum_to_one():
    """Left to right, two blocks of 3 words of which the first begins with the prompt's last word."""
    model = tiny()
    prompt = torch.tensor([[0, 1, 2, 1]])
    rollout = sample(model, (prompt, torch.ones(1, 4).bool()), max_completion_length=6, diffusion_steps=6)
    every = torch.tensor(list(itertools.product(range(5), repeat=5)))
    ids = torch.cat([rollout.completion_ids[:, :1].expand(len(every), -1), every], 1)
    many = rollout.rows([0] * len(every))
    found = score_views(model, many.prompt_ids, many.prompt_mask, ids, _all_open(views(many, "left_to_right"))).logps
    assert found.sum((1, 2)).exp().sum().item() == pytest.approx(1, abs=1e-4)


def _all_open(drawn: MaskedViews) -> MaskedViews:
    """Also behind an end: each place, but the given one, is scored where a full text would be."""
    scored = torch.zeros_like(drawn.weights)
    for place in range(1, 6):
        scored[:, place - 1 if place < 3 else place - 3, place] = 1
    return MaskedViews(drawn.hidden, scored)


def test_the_elbo_s_mean_is_the_enumerated_one():
    model = tiny()
    prompt = torch.tensor([[0, 1, 2, 1]])
    rollout = sample(
        model, (prompt, torch.ones(1, 4).bool()), max_completion_length=6, diffusion_steps=6, stop_at_eos=False
    )
    rollout = type(rollout)(**vars(rollout) | {"completion_mask": torch.tensor([[False] + [True] * 5])})
    blocks = {0: [1, 2], 3: [3, 4, 5]}
    expected, known = 0.0, {}
    for places in blocks.values():
        for count in range(1, len(places) + 1):
            subsets = list(itertools.combinations(places, count))
            for subset in subsets:
                hidden = torch.zeros(1, 1, 3 + 6, dtype=torch.bool)
                hidden[0, 0, [3 + place for place in subset]] = True
                found = logps(model, rollout, MaskedViews(hidden, hidden[..., 3:].float()))[0]
                known[subset] = found
                expected += found.sum().item() * (len(places) / count) / len(subsets) / len(places)
    total, number = 0.0, 4000
    drawn = views(rollout, "elbo", num_samples=number)
    for first, places in blocks.items():
        for hidden, weight in zip(drawn.hidden[0, :, 3 + first : 6 + first], drawn.weights[0], strict=True):
            subset = tuple(first + place for place in hidden.nonzero()[:, 0].tolist())
            total += (known[subset] * weight)[places].sum().item()
    assert total == pytest.approx(expected, abs=0.02 * abs(expected))


def test_a_block_with_too_few_open_positions_for_a_range_hides_what_is_nearest():
    rollout = sample(sdar(), texts((7, 8)))
    drawn = views(rollout, "elbo", min_ratio=0.3, max_ratio=0.8)
    first = drawn.hidden[..., -C:][:, :, :B].sum(2)
    assert set(first[0].tolist()) == {1}
    assert set(first[1].tolist()) <= {2, 3}


def test_blocks_of_one_token_are_the_causal_model():
    model = tiny(1)
    ids = torch.randint(0, 3, (2, 9), generator=torch.Generator().manual_seed(0))
    bound = log_likelihood(model, ids[:, :4], ids[:, 4:], 1, generator=torch.Generator().manual_seed(0))
    for row in range(2):
        total = 0.0
        for place in range(4, 9):
            canvas = torch.cat([ids[row, :place], torch.tensor([4])])[None]
            total += model(canvas).logits[0, -1].log_softmax(-1)[ids[row, place]].item()
        assert bound[row].item() == pytest.approx(total, abs=1e-4)


def test_a_bound_on_the_likelihood_is_that_of_each_block():
    model = sdar()
    ids = torch.randint(0, 16, (1, 11), generator=torch.Generator().manual_seed(0))
    # One picture hides all three tokens of the only open block: the mean over counts with all subsets.
    found = log_likelihood(model, ids[:, :5], ids[:, 5:8], 600, generator=torch.Generator().manual_seed(0)).item()
    total = 0.0
    for count in (1, 2, 3):
        subsets = list(itertools.combinations((5, 6, 7), count))
        for subset in subsets:
            canvas = ids[:, :8].clone()
            canvas[0, list(subset)] = MASK
            logs = model(canvas).logits[0].log_softmax(-1)
            total += sum(logs[place, ids[0, place]].item() for place in subset) / count / len(subsets)
    assert found == pytest.approx(total, rel=0.06)


def words_of(prompts, completions, **columns):
    words_of.seen += [(len(p.split()), c) for p, c in zip(prompts, completions, strict=True)]
    return place_in_group(prompts, completions)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("estimator", "settings"),
    [
        ("trace", {"objective": "grpo", "beta": 0.1}),
        ("one_step", {}),
        ("elbo", {"importance_sampling_level": "sequence"}),
        ("coupled", {}),
    ],
)
def test_the_ratio_is_one_where_nothing_was_learned(tmp_path, kind, estimator, settings):
    """Through the shuffle, accumulation and two iterations, on prompts of every length modulo the block length."""
    words_of.seen = []
    run = tiny_trainer(
        tmp_path,
        words_of,
        LoraConfig(**LORA),
        KINDS[kind](),
        learning_rate=0.0,
        estimator=estimator,
        block_length=None,
        max_completion_length=8,
        diffusion_steps=8,
        temperature=1.0,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        views_per_pass=1,
        **settings,
    )
    plain, compared = run.objective, []

    def spy(batch, **more):
        if batch.old_logps is not None:
            compared.append(torch.equal(batch.logps, batch.old_logps) and batch.logps.ne(0).any().item())
        return plain(batch, **more)

    functools.update_wrapper(spy, plain.func)
    run.objective = spy
    run.train()
    rows = [row for row in run.state.log_history if "loss" in row]
    # The first inner iteration needs no old log-probabilities, the second one does.
    assert compared == [True] * 4
    assert all(row["grad_norm"] > 0 for row in rows)
    # Rewards see completions alone: of 8 positions, those that the prompt's last tokens take are gone.
    assert all(len(text.split()) <= 8 - length % B for length, text in words_of.seen)


@pytest.mark.slow
def test_learning_raises_what_is_rewarded(tmp_path):
    def share(prompts, completions, **columns):
        return [text.split().count("b") / 8 for text in completions]

    run = tiny_trainer(
        tmp_path,
        share,
        own_model=sdar(),
        estimator="trace",
        block_length=None,
        max_completion_length=8,
        diffusion_steps=8,
        temperature=1.0,
        max_steps=24,
        num_iterations=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
    )
    run.train()
    rewards = [row["reward"] for row in run.state.log_history if "reward" in row]
    assert sum(rewards[-6:]) / 6 > sum(rewards[:6]) / 6 + 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"p_mask_prompt": 0.15}, "p_mask_prompt=0.15: the model attends in blocks of 4 tokens"),
        (
            {"estimator": "block_random", "importance_sampling_level": "sequence"},
            "estimator='block_random': .*take 'elbo'",
        ),
        ({"block_length": 2}, "block_length=2: the model attends in blocks of 4 tokens"),
        ({"max_completion_length": 6}, "max_completion_length=6: must be a multiple"),
        ({"cache": "dual"}, "cache='dual': is for full attention"),
    ],
)
def test_what_speaks_of_full_attention_is_refused(tmp_path, settings, message):
    base = {"block_length": None, "max_completion_length": 8, "diffusion_steps": None}
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, own_model=sdar(), **base | settings)


def test_prompts_that_are_no_whole_blocks_are_refused():
    rollout = sample(sdar())
    prompts, mask = texts()
    with pytest.raises(ValueError, match="prompt_mask: a prompt has 5 tokens, but the blocks of block_length=4"):
        per_token_logps(
            sdar(),
            prompts,
            mask,
            rollout.completion_ids,
            MaskedViews(torch.zeros(8, 1, prompts.shape[1] + C).bool(), torch.zeros(8, 1, C)),
        )


def fine_tuning(tmp_path, model, **settings) -> MaskedSFTTrainer:
    rows = [{"prompt": prompt, "completion": text} for prompt, text in zip(PROMPTS, reversed(PROMPTS), strict=True)]
    args = {"per_device_train_batch_size": 4, "max_steps": 6, "report_to": "none", "use_cpu": True}
    args |= {"save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "learning_rate": 1e-2}
    return MaskedSFTTrainer(
        model, MaskedSFTConfig(str(tmp_path), **args | settings), Dataset.from_list(rows), tiny_tokenizer()
    )


@pytest.mark.parametrize("settings", [{}, {"mask_unit": "text"}, {"complementary": True}, {"token_weights": "mean"}])
@pytest.mark.parametrize("kind", KINDS)
def test_the_packed_loss_is_the_plain_one(tmp_path, kind, settings):
    """Each hidden token behind its own clean past and hidden neighbours, one text and block at a time."""
    model = KINDS[kind]()
    run = fine_tuning(tmp_path, model, **settings)
    batch = run._collate([run.train_dataset[row] for row in range(4)])
    drawn, draw = [], run._draw
    run._draw = lambda *args: drawn.append(draw(*args)) or drawn[-1]
    run.model.train()
    loss = run.compute_loss(model, batch)
    ids, _, is_open = run._texts(model, batch)
    [(hidden, weight)] = drawn
    assert torch.equal(hidden.any(1) | is_open, is_open)
    length = batch["attention_mask"].sum(1)
    assert ids.shape[1] % B == 0
    # Rows end in whole blocks of EOS, which are trained on.
    for row in range(4):
        fill = ids[row, length[row] : -(-length[row] // B) * B]
        assert (fill == EOS).all()
    if settings.get("token_weights") == "mean":
        weight = hidden / hidden.sum()
    else:
        weight = weight / (is_open.sum(1)[:, None, None] * 4)
    total = 0.0
    for row, picture, start in itertools.product(range(4), range(hidden.shape[1]), range(0, ids.shape[1], B)):
        own = hidden[row, picture, start : start + B]
        if own.any():
            noisy = ids[row, start : start + B].masked_fill(own, MASK)
            logits = model(torch.cat([ids[row, :start], noisy])[None]).logits[0, -B:].log_softmax(-1)
            logs = logits.gather(-1, ids[row, start : start + B, None])[:, 0]
            total -= (logs * weight[row, picture, start : start + B])[own].sum().item()
    assert loss.item() == pytest.approx(total, rel=1e-4)


def test_masks_have_the_elbo_s_law_in_each_block():
    is_open = torch.tensor([[False, True, True, True, True, False]])
    hidden, weight = estimators.draw_masks(is_open, 9000, stream("test"), block_length=3)
    assert not (hidden & ~is_open[:, None]).any()
    for places in ([1, 2], [3, 4]):
        counts = hidden[0][:, places].sum(1)
        for count in (1, 2):
            assert (counts == count).float().mean().item() == pytest.approx(0.5, abs=0.02)
        assert torch.allclose(weight[0][:, places].sum(1).float(), torch.full((9000,), 2 / 9000), rtol=1e-4)
        assert hidden[0][:, places[0]].float().mean().item() == pytest.approx(0.75, abs=0.02)


@pytest.mark.slow
def test_fine_tuning_goes_through_the_block_lengths(tmp_path):
    model = sdar()
    run = fine_tuning(tmp_path, model, block_schedule=[1, 2, 4])
    seen = []
    plain = run._log_bound
    run._log_bound = lambda *args: (seen.append(model.block_length), plain(*args))[1]
    run.train()
    assert seen == [1, 1, 2, 2, 4, 4]
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert all(map(math.isfinite, losses))
    with pytest.raises(ValueError, match="block_schedule=.* must end with the model's own, block_length=4"):
        fine_tuning(tmp_path, sdar(), block_schedule=[1, 2])


@pytest.mark.slow
def test_preferences_of_a_block_model_are_learned(tmp_path):
    from peft import get_peft_model

    pairs = [{"prompt": "a b c", "chosen": "d e", "rejected": "f"}, {"prompt": "g", "chosen": "h", "rejected": "i j"}]
    args = VRPOConfig(
        str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=12,
        learning_rate=2e-2,
        beta=0.5,
        lr_scheduler_type="constant",
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    torch.manual_seed(0)
    policy = get_peft_model(sdar(), LoraConfig(**LORA | {"init_lora_weights": True}))
    run = VRPOTrainer(policy, args, Dataset.from_list(pairs), tiny_tokenizer())
    run.train()
    margins = [row["preference/margin"] for row in run.state.log_history if "preference/margin" in row]
    assert margins[0] == pytest.approx(0, abs=1e-5)
    assert sum(margins[-3:]) / 3 > 0.1
