"""The data benchmark: that both loaders make the same images, and what it reports."""

import numpy as np

from unialign_jax.benchmarks import data
from unialign_jax.benchmarks.photos import Photos
from unialign_jax.data import images
from unialign_jax.data.jsonl import JsonlSource


def test_both_loaders_make_the_same_images(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_PHOTOS", 2)
    source = JsonlSource(data._draw_photos(tmp_path))
    theirs = Photos([source[0].target, source[1].target], 96)
    for i in range(2):
        difference = images.load(source[i].target, 96, 96).astype(int) - theirs[i]
        assert np.abs(difference).max() <= 2  # Pillow rounds between the two passes of a resize


def test_report(monkeypatch):
    for name, value in {"_PHOTOS": 8, "BATCH": 4, "SIZE": 64, "_WARM_UP": 1, "_ROUNDS": 1, "_BATCHES": 2}.items():
        monkeypatch.setattr(data, name, value)
    monkeypatch.setattr(data, "_WORKERS", (0,))
    report = data.run()
    assert report["settings"] == {"size": 64, "batch": 4, "images": 8}
    assert [(result["loader"], result["workers"]) for result in report["results"]] == [
        ("ours, image files", 0),
        ("ours, ArrayRecord", 0),
        ("ours, cached latents", 0),
        ("PyTorch DataLoader", 0),
    ]
    assert all(result["images_per_cpu_second"] > 0 and result["images_per_second"] > 0 for result in report["results"])
