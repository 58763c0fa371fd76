"""Who sees whom: every kind of mask against the rule written out for one query and one key at a time."""

import pytest
import torch

from dgrpo.models.attention import attention_mask, block_causal, of_queries, positions_of, see

PADDING = torch.tensor([[False, False, True, True, True, True, True], [True] * 7])


def test_clean_and_noisy_copies_see_what_block_diffusion_says():
    blocks = torch.tensor([[0, 0, 1, 1, 2, 0, 0, 1, 1, 1, 1]])
    copies = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2]])
    visible = see(blocks, blocks, copies, copies)[0]
    for q in range(11):
        for k in range(11):
            block, copy, key_block, key_copy = blocks[0, q], copies[0, q], blocks[0, k], copies[0, k]
            if copy == 0:
                expected = key_copy == 0 and key_block <= block
            else:
                expected = (key_copy == 0 and key_block < block) or (key_copy == copy and key_block == block)
            assert visible[q, k] == expected, (q, k)


def test_causal_prefix_and_full_masks_are_blocks_of_other_lengths():
    positions = torch.arange(5)[None]
    assert see(positions, positions)[0].equal(torch.ones(5, 5).tril().bool())
    assert see(positions // 5, positions // 5).all()
    prefix = (positions - 2).clamp(min=0)
    expected = torch.ones(5, 5).tril().bool()
    expected[:3, :3] = True
    assert see(prefix, prefix)[0].equal(expected)


@pytest.mark.parametrize("num_queries", [7, 3])
@pytest.mark.parametrize("block_length", [1, 2, 4, 8])
def test_blocks_are_counted_from_each_text_s_first_token(num_queries, block_length):
    blocks = block_causal(num_queries, 7, block_length, PADDING, "cpu")
    visible = attention_mask(PADDING, blocks, "sdpa", torch.float32)[:, 0] == 0
    for row in range(2):
        start = int((~PADDING[row]).sum())
        for q in range(max(start, 7 - num_queries), 7):
            for k in range(7):
                seen = k >= start and (k - start) // block_length <= (q - start) // block_length
                assert visible[row, q - 7 + num_queries, k] == seen, (row, q, k)
    # A pad's softmax over no key would be no number.
    assert visible.any(-1).all()
    assert positions_of(PADDING).tolist() == [[-1, -1, 0, 1, 2, 3, 4], list(range(7))]


def test_no_mask_is_made_where_everybody_sees_everybody():
    assert attention_mask(None, None, "sdpa", torch.float32) is None
    assert block_causal(4, 4, 4, None, "cpu") is None
    assert block_causal(4, 12, 4, None, "cpu") is None
    assert block_causal(3, 7, 4, None, "cpu") is None
    assert block_causal(5, 12, 4, None, "cpu") is not None
    assert block_causal(4, 11, 4, None, "cpu") is not None


def test_masks_take_the_form_that_each_attention_function_expects():
    padding = torch.tensor([[False, True, True]])
    assert attention_mask(padding, None, "flash_attention_2", torch.float32) is padding
    added = attention_mask(padding, None, "sdpa", torch.bfloat16)
    assert added.dtype == torch.bfloat16
    assert added.tolist() == [[[[torch.finfo(torch.bfloat16).min, 0, 0]]]]
    assert added.equal(attention_mask(padding, None, "eager", torch.bfloat16))
    visible = torch.tensor([[[True, True, False], [True, True, True]]])
    both = attention_mask(padding.long(), visible, "sdpa", torch.float32)
    assert (both == 0).tolist() == [[[[False, True, False], [False, True, True]]]]
    assert (of_queries(both, slice(1, 2)) == 0).tolist() == [[[[False, True, True]]]]
    assert of_queries(added, slice(1, 2)) is added
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2'.*choose 'sdpa' or 'eager'"):
        attention_mask(None, visible, "flash_attention_2", torch.float32)
