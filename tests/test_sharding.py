"""Networks built under ZeRO-3: the same values as built whole, and whole on rank 0 alone."""

from __future__ import annotations

import json
from pathlib import Path

from launching import ROOT, finish, start


def test_networks_are_built_in_shares_with_the_values_they_have_when_built_whole(tmp_path: Path) -> None:
    """Under deepspeed.zero.Init ResNets and transformers' models would silently start from other values."""
    finish(start("zero3", "--num_processes=2", str(ROOT / "tests" / "launched_build.py"), str(tmp_path)))
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for seen in ranks:
        large = seen.pop("large")
        for name, found in seen.items():
            assert (found["differ"], found["left_whole"]) == ([], 0), name
            assert found["numel"] / 2 <= found["share"] <= found["numel"] / 2 + found["num_tensors"][0], name
            assert found["num_tensors"][0] == found["num_tensors"][1], name
        seen["large"] = large
    whole = 50 * 4 * 2**20
    # Rank 1 holds its half and a layer or two on the way.
    assert ranks[1]["large"]["rise"] < 0.75 * whole, ranks[1]["large"]
