"""A random Qwen3-0.6B at full size: saved by transformers, opened by both, the same logits."""

import shutil

import pytest
import torch

from qwen_nb.model import Qwen

pytest.importorskip("transformers")


def test_full_size(tmp_path):
    if shutil.disk_usage(tmp_path).free < 4e9:
        pytest.skip("needs 4 GB of free disk for a checkpoint of 1.2 GB")
    from transformers import AutoModelForCausalLM

    from benchmarks.load import make_checkpoint

    make_checkpoint(tmp_path)
    ours, theirs = (
        Qwen.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path).eval(),
    )
    assert (
        sum(p.numel() for p in ours.parameters()) == 596_049_920
        and next(ours.parameters()).dtype == torch.bfloat16
    )
    ids = torch.randint(0, 151_936, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1.6e-2, atol=0.05)
        assert torch.equal(ours(ids[:, :4]).argmax(-1), theirs(ids[:, :4]).logits.argmax(-1))
