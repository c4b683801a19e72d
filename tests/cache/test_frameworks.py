"""Batches in PyTorch Lightning and accelerate: the real libraries, one and two processes."""

import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from store.builders import FAILED_ROW, FINE, tiny_plan
from torch import Tensor, nn

from dtcache.cache.batch import Batch
from dtcache.cache.cache import Cache

KEYS = sorted(sample.key for sample in tiny_plan().samples if sample.index != FAILED_ROW)
pytestmark = pytest.mark.slow


def fit(root: Path, folder: Path, precision: Any, **trainer: Any) -> list[tuple[int, list[str]]]:
    """Train a convolution with Lightning; return epoch and keys of each step."""
    lightning = pytest.importorskip("lightning")
    seen: list[tuple[int, list[str]]] = []
    checkpoint = trainer.pop("ckpt_path", None)

    class Student(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Conv2d(3, 4, 2, stride=2)

        def training_step(self, batch: Batch, number: int) -> Tensor:
            assert batch.images_BCHW.device == self.device
            seen.append((self.current_epoch, batch.keys))
            images = batch.images_BCHW.to(self.net.weight.dtype) / 255
            loss = (self.net(images) - batch.targets[FINE]).square().mean()
            self.log("loss", loss, on_epoch=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-4)

    with warnings.catch_warnings():
        # Lightning warns of its own deprecations, and of loaders without workers.
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*infer the `batch_size`.*")
        lightning.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            precision=precision,
            **trainer,
        ).fit(Student(), Cache(root).loader(batch_size=3, seed=1), ckpt_path=checkpoint)
    return seen


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true"])
def test_lightning_trains(tiny_cache: Path, tmp_path: Path, precision: str) -> None:
    """Lightning moves and converts batches, infers their size, and reads all samples per epoch."""
    seen = fit(tiny_cache, tmp_path, precision, max_epochs=2, enable_checkpointing=False)
    orders = [[key for at, keys in seen if at == epoch for key in keys] for epoch in range(2)]
    assert [sorted(order) for order in orders] == [KEYS, KEYS]
    assert orders[0] != orders[1]


def test_lightning_resumes_in_mid_epoch(tiny_cache: Path, tmp_path: Path) -> None:
    """A Lightning checkpoint of step 4 of 6 continues with the batches that were to come."""
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    saving = callbacks.ModelCheckpoint(
        dirpath=tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1
    )
    whole = fit(tiny_cache, tmp_path, "32-true", max_epochs=2, callbacks=[saving])
    (checkpoint,) = tmp_path.glob("step=4*.ckpt")
    rest = fit(
        tiny_cache,
        tmp_path,
        "32-true",
        max_epochs=2,
        enable_checkpointing=False,
        ckpt_path=checkpoint,
    )
    assert len(whole) == 6
    assert rest == whole[4:]


ACCELERATED = """
import json, os, signal, sys
from pathlib import Path
import torch
from accelerate import Accelerator
import dtcache

root, out, killed_after = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
cache = dtcache.open(root)
accelerator = Accelerator(cpu=True)
loader = cache.loader(batch_size=6, seed=5, device=accelerator.device)
student, loader = accelerator.prepare(torch.nn.Conv2d(3, 4, 2, stride=2), loader)
optimizer = torch.optim.SGD(student.parameters(), lr=1e-4)
state = out / "state.pt"
if state.exists():
    loader.load_state_dict(torch.load(state, weights_only=True))
seen = out / f"seen-{accelerator.process_index}-{killed_after}.jsonl"
steps = 0
for epoch in range(loader.epoch, 2):
    loader.set_epoch(epoch)
    for batch in loader:
        assert batch.images_BCHW.device == next(student.parameters()).device
        loss = (student(batch.images_BCHW / 255) - batch.targets["t150/stride2"]).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        with seen.open("a") as sink:
            sink.write(json.dumps([epoch, batch.keys]) + chr(10))
        steps += 1
        accelerator.wait_for_everyone()
        if steps == killed_after:
            if accelerator.is_main_process:
                torch.save(loader.state_dict(), state)
            accelerator.wait_for_everyone()
            os.kill(os.getpid(), signal.SIGKILL)
accelerator.end_training()
"""


def launch(root: Path, out: Path, killed_after: int) -> list[list[tuple[int, list[str]]]]:
    """Run the script in two processes over gloo; return what each rank saw, in order."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = out / "train.py"
    script.write_text(ACCELERATED)
    group = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(root), str(out), str(killed_after)],
            env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in ranks:
            errors = process.communicate(timeout=300)[1]
            assert process.returncode == (-9 if killed_after else 0), errors
    finally:
        for process in ranks:
            process.kill()
    return [
        [tuple(json.loads(line)) for line in path.read_text().splitlines()]
        for path in sorted(out.glob(f"seen-*-{killed_after}.jsonl"))
    ]


def test_accelerate_in_two_processes(tiny_cache: Path, tmp_path: Path) -> None:
    """Two ranks see each sample once per epoch; killed in mid-epoch, they resume at the next batch.

    The order is that of one process, which is the oracle.
    """
    loader = Cache(tiny_cache).loader(batch_size=6, seed=5)
    before = launch(tiny_cache, tmp_path, killed_after=1)
    after = launch(tiny_cache, tmp_path, killed_after=0)
    for epoch in range(2):
        wanted = [sorted(batch.keys) for batch in loader]
        assert sorted(key for keys in wanted for key in keys) == KEYS
        steps = [
            [keys for at, keys in first + second if at == epoch]
            for first, second in zip(before, after, strict=True)
        ]
        assert [sorted(one + other) for one, other in zip(*steps, strict=True)] == wanted
