"""Training goes on where it stopped, leaves a checkpoint that transformers reads, and learns."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import Qwen2VLForConditionalGeneration

from models.train import export, train
from models.train.marks import NUM_MARKS
from models.train.network import TinyQwen2VL
from models.train.optimiser import Weights, orthogonal
from models.train.packing import Encoder, Packed, Plan, Room, packed_batch

ROOM = Room(
    patches=600,
    pairs=64,
    runs=24,
    shared=512,
    turns=512,
    samples=16,
    asked=64,
    learnt=256,
    marks=128,
)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(train.FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def batch(tokenizer: Tokenizer) -> Packed:
    return packed_batch(Encoder(tokenizer), "a few steps", Plan(0, ("scene",), ROOM), 1.0)


def run_slice(out: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, float]:
    """Two seconds of training on small batches, drawn in this process."""
    words = ["train", "--out", str(out), "--minutes", "0.03", "--minutes-in-all", "1"]
    words += ["--workers", "0", "--uses", "1", "--small", "--log-every", "1"]
    words += ["--eval-batches", "1", "--kinds", "scene", "--easy", "1000", *options]
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr(train, "SMALL_ROOM", ROOM)
    train.main()
    saved = torch.load(out / "state.pt", weights_only=True)
    progress: dict[str, float] = saved["progress"]
    return progress


def test_second_slice_goes_on_where_the_first_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_slice(tmp_path, monkeypatch)
    left = load_state(tmp_path)
    run_slice(tmp_path, monkeypatch, "--minutes", "0")
    found = load_state(tmp_path)
    second = run_slice(tmp_path, monkeypatch)

    assert left.keys() == found.keys()
    assert all(torch.equal(left[name], found[name]) for name in left)
    assert 1 <= first["step"] < second["step"]
    assert first["drawn"] < second["drawn"]
    assert first["spent_s"] < second["spent_s"]


def load_state(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(folder / "state.pt", weights_only=True)["weights"]
    return weights


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

    options = ("--start-from", str(start), "--minutes", "0")
    progress = run_slice(tmp_path / "second", monkeypatch, *options)

    assert 0 == progress["step"]
    assert start.read_bytes() == (tmp_path / "second" / "model.safetensors").read_bytes()


def test_checkpoint_stays_under_sixteen_megabytes(tmp_path: Path) -> None:
    model = TinyQwen2VL(848, NUM_MARKS)
    export.write_weights(tmp_path, dict(model.named_parameters()))

    assert (tmp_path / "model.safetensors").stat().st_size < 16_000_000


@pytest.mark.parametrize("use_muon", [True, False])
def test_a_few_steps_on_one_batch_lower_both_losses(batch: Packed, use_muon: bool) -> None:
    torch.manual_seed(0)
    model = TinyQwen2VL(848, NUM_MARKS)
    step = train.Step(model, Weights(model, CPU, use_muon), batch, ROOM)
    seen = []
    for _ in range(6):
        step(batch, 2e-3)
        seen.append(step.read())

    assert seen[-1]["scene"] < seen[0]["scene"] - 0.5
    assert seen[-1]["marks"] < seen[0]["marks"]


def test_losses_do_not_depend_on_what_fills_a_batch_up(batch: Packed) -> None:
    torch.manual_seed(0)
    model = TinyQwen2VL(848, NUM_MARKS)
    filled = batch.each(torch.Tensor.clone)
    num_used = int((batch.feature_rows < len(batch.ids)).sum()) * 4
    assert num_used < len(batch.patches), "this batch has no filler"
    filled.patches[num_used:] = 255

    for one, other in zip(
        train.losses_of(model, batch, ROOM), train.losses_of(model, filled, ROOM), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_a_gradient_that_is_no_number_moves_nothing() -> None:
    model = TinyQwen2VL(64, 4)
    weights = Weights(model, CPU)
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.fill_(0.01)
    weights.step()  # from here on the averages are no zeros
    before = {name: tensor.clone() for name, tensor in weights.state().items()}
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.fill_(float("nan"))

    weights.rate.fill_(1e-3)
    weights.step()

    after = weights.state()
    assert 1 == after.pop("num_skipped").item()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_every_parameter_of_the_model_is_moved(batch: Packed) -> None:
    model = TinyQwen2VL(848, NUM_MARKS)
    weights = Weights(model, CPU)
    before = {name: tensor.clone() for name, tensor in weights.named().items()}
    step = train.Step(model, weights, batch, ROOM)
    step(batch, 1e-2)

    # Decay moves a weight, too: only its gradient says that the losses depend on it.
    assert [] == [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert before.keys() == dict(model.named_parameters()).keys()
    still = [n for n, tensor in weights.named().items() if torch.equal(before[n], tensor)]
    assert [] == still
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights.named()[name].bfloat16()), name


@pytest.mark.parametrize("shape", [(2, 32, 128), (2, 128, 32)])
def test_orthogonal_matrices_have_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape) * 1e-3).float())

    assert 0.5 < values.min()
    assert values.max() < 1.3


def test_replay_hands_out_each_batch_as_often_as_asked(batch: Packed) -> None:
    replay = train.Replay(iter(lambda: batch, None), CPU, uses=3)

    for _ in range(900):
        replay.next()

    assert 900 / 3 <= replay.num_drawn <= 900 / 3 + train.MIN_KEPT
