"""Training goes on where it stopped, leaves a checkpoint that transformers reads, and learns."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import Qwen2VLForConditionalGeneration

from models.train import corpus, export, train
from models.train.marks import LABELS
from models.train.network import TinyQwen2VL


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def run_slice(out: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, float]:
    """Two seconds of training on small micro-batches, drawn in this process."""
    words = ["train", "--out", str(out), "--minutes", "0.03", "--minutes-in-all", "1"]
    words += ["--workers", "0", "--uses", "1", "--accumulate", "1", "--patches", "600"]
    words += ["--eval-batches", "0", "--kinds", "scene", "--easy", "1000", *options]
    monkeypatch.setattr("sys.argv", words)
    train.main()
    saved = torch.load(out / "state.pt", weights_only=True)
    progress: dict[str, float] = saved["progress"]
    return progress


def test_second_slice_goes_on_where_the_first_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_slice(tmp_path, monkeypatch)
    second = run_slice(tmp_path, monkeypatch)

    assert 1 <= first["step"] < second["step"]
    assert first["consumed"] < second["consumed"]
    assert first["spent_s"] < second["spent_s"]


def test_checkpoint_of_a_slice_loads_in_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_slice(tmp_path, monkeypatch)
    for file in train.FOLDER.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, tmp_path)

    load: Any = Qwen2VLForConditionalGeneration.from_pretrained  # typed as if it gave no report
    model, report = load(tmp_path, output_loading_info=True)

    assert model.num_parameters() > 7_000_000
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_a_run_can_start_from_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_slice(tmp_path / "first", monkeypatch)
    start = tmp_path / "first" / "model.safetensors"

    progress = run_slice(tmp_path / "second", monkeypatch, "--start-from", str(start))

    assert 1 <= progress["step"] < 1000


def test_checkpoint_stays_under_sixteen_megabytes(tmp_path: Path) -> None:
    model = TinyQwen2VL(848, len(LABELS))
    export.write_weights(tmp_path, dict(model.named_parameters()))

    assert (tmp_path / "model.safetensors").stat().st_size < 16_000_000


def test_a_few_steps_on_one_micro_batch_lower_both_losses() -> None:
    torch.manual_seed(0)
    tokenizer_json = (train.FOLDER / "tokenizer.json").read_text()
    encoder = corpus.Encoder(Tokenizer.from_str(tokenizer_json))
    batch = corpus.micro_batch(encoder, "a few steps", "scene", is_easy=True, num_patches=600)
    model = TinyQwen2VL(848, len(LABELS))
    weights = train.Weights(model, torch.device("cpu"))
    before = [loss.item() for loss in train.losses_of(model, batch)]

    for _ in range(6):
        answers, marks = train.losses_of(model, batch)
        torch.autograd.backward([answers + marks])
        weights.step(1e-3)

    after = [loss.item() for loss in train.losses_of(model, batch)]
    assert after[0] < before[0] - 0.5
    assert after[1] < before[1]


def test_a_gradient_that_is_no_number_moves_nothing() -> None:
    model = TinyQwen2VL(64, 4)
    weights = train.Weights(model, torch.device("cpu"))
    before = [exact.clone() for exact in weights.exact]
    for rounded in weights.rounded:
        rounded.grad = torch.full_like(rounded, float("nan"))

    weights.step(1e-3)

    assert weights.num_skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(before, weights.exact, strict=True))


def test_replay_hands_out_each_micro_batch_as_often_as_asked() -> None:
    tokenizer_json = (train.FOLDER / "tokenizer.json").read_text()
    encoder = corpus.Encoder(Tokenizer.from_str(tokenizer_json))
    batch = corpus.micro_batch(encoder, "replay", "text")
    replay = train.Replay(iter(lambda: batch, None), torch.device("cpu"), uses=3)

    for _ in range(900):
        replay.next()

    assert 900 / 3 <= replay.num_drawn <= 900 / 3 + train.MIN_KEPT
