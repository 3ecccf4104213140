"""The benchmark of the pretraining loader: what it compares with is the same, and it runs."""

import io
import sys

import torch
from PIL import Image
from script_loader import script

from lymph_hf import LymphImageProcessor

bench = script("bench_loader")


def test_the_plain_way_gives_views_of_the_same_kind():
    processor = LymphImageProcessor(size={"height": 32, "width": 32})
    file = io.BytesIO()
    Image.new("RGB", (48, 40), (240, 240, 240)).save(file, "PNG")
    torch.manual_seed(0)
    for tensors in (False, True):
        view = bench.plain_view(processor, tensors=tensors)(file.getvalue())
        assert view.shape == (3, 32, 32)
        assert view.dtype == torch.float32
        assert 0.4 < view.mean() <= 1  # 240 of 255 on a scale from -1 to 1, more or less bright


def test_the_benchmark_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_loader.py", "--image-size", "32", "--batch-size", "2", "--rounds", "1"])
    threads = torch.get_num_threads()
    try:
        bench.main()
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert "1.00" in lines[2]
