"""The network that is trained, against transformers' on the checkpoint that it becomes."""

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from engine.reference import Reference
from media.decoded import Frames, RGBImage
from models.train import corpus, export
from models.train.corpus import Sample
from models.train.network import TinyQwen2VL
from models.train.packing import Encoder, Packed, Room, Rows, pack, rows_of

DRAWERS: dict[str, Callable[[random.Random], list[Sample]]] = {
    "scene": lambda rng: [corpus.scene_sample(rng, (150, 110)) for _ in range(3)],
    "photo": lambda rng: [corpus.photo_sample(rng, (90, 260)) for _ in range(3)],
    "word": lambda rng: [corpus.word_sample(rng, (240, 80)) for _ in range(3)],
    "images": lambda rng: [
        corpus.images_sample(rng, [(120, 120), (300, 100), (120, 120)]) for _ in range(3)
    ],
    "frames": lambda rng: [
        corpus.motion_sample(rng, (110, 90), 5, is_video=False) for _ in range(2)
    ],
    "video": lambda rng: [corpus.motion_sample(rng, (110, 90), 8, is_video=True) for _ in range(2)],
    "odd video": lambda rng: [
        corpus.motion_sample(rng, (90, 140), 5, is_video=True) for _ in range(2)
    ],
    "text": lambda rng: [corpus.text_sample(rng) for _ in range(4)],
}
TOLERANCE = 1e-4
ROOM = Room(
    patches=1792,
    pairs=1024,
    runs=40,
    shared=1024,
    turns=1024,
    samples=16,
    asked=64,
    learnt=640,
    marks=256,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Where cores are busy, threads wait for each other longer than so small a model computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(export.FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def network(tokenizer: Tokenizer) -> TinyQwen2VL:
    """Random weights, larger than a training starts with, each one a bfloat16 as in a checkpoint."""
    torch.manual_seed(0)
    network = TinyQwen2VL(-(-tokenizer.get_vocab_size() // 16) * 16)
    with torch.no_grad():
        for parameter in network.parameters():
            moved = parameter + torch.randn_like(parameter) * 0.05
            parameter.copy_(moved.bfloat16())
    return network.eval()


@pytest.fixture(scope="module")
def published(
    tokenizer: Tokenizer, network: TinyQwen2VL, tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    folder = tmp_path_factory.mktemp("checkpoint")
    export.write_configs(folder, tokenizer)
    export.write_weights(folder, network.state_dict())
    return Reference(folder)


@pytest.mark.parametrize("seed", ["a", "b"])
@pytest.mark.parametrize("kind", DRAWERS)
def test_logits_equal_transformers_on_the_exported_checkpoint(
    kind: str, seed: str, tokenizer: Tokenizer, network: TinyQwen2VL, published: Reference
) -> None:
    rng = random.Random(f"{kind} {seed}")
    samples = [*DRAWERS["word"](rng)[:1], *DRAWERS[kind](rng)]  # a neighbour of another size first
    all_rows = [rows_of(rng, Encoder(tokenizer), sample) for sample in samples]
    logits = compute_logits(network, pack(iter(all_rows), ROOM))

    shared, turn = 0, ROOM.shared
    for sample, rows in zip(samples, all_rows, strict=True):
        num_shared = len(rows.shared.ids)
        turn += sum(len(turn.ids) for turn in rows.turns[:-1])
        last = rows.turns[-1].ids
        found = torch.cat((logits[shared : shared + num_shared], logits[turn : turn + len(last)]))
        expected = expected_logits(published, [*rows.shared.ids, *last], sample)
        difference = (found - expected).abs().max().item()
        assert difference <= TOLERANCE, f"{sample.kind}: {difference:.1e}"
        assert expected.std() > 0.1, "logits so close to each other prove little"
        shared, turn = shared + num_shared, turn + len(last)


@torch.inference_mode()
def compute_logits(network: TinyQwen2VL, batch: Packed) -> Tensor:
    features = network.features(batch, ROOM)
    return network.logits(network.hidden(batch, features, ROOM))


@torch.inference_mode()
def expected_logits(published: Reference, ids: list[int], sample: Sample) -> Tensor:
    """What transformers says of the sample's own pictures, which it cuts and places itself."""
    config = published.model.config
    placeholders = (config.image_token_id, config.video_token_id)
    prompt = [
        id_
        for id_, run in itertools.groupby(ids)
        for id_ in (run if id_ not in placeholders else [id_])
    ]
    pictures = [RGBImage(picture) for picture in sample.pictures]
    inputs = published.encode(
        prompt,
        images=() if sample.is_video else pictures,
        videos=[Frames(tuple(pictures))] if sample.is_video else (),
    )
    assert ids == inputs["input_ids"][0].tolist()
    published.model.model.rope_deltas = None
    logits: Tensor = published.model(**inputs).logits[0]
    return logits


def test_turns_that_share_pictures_do_not_see_each_other(
    tokenizer: Tokenizer, network: TinyQwen2VL
) -> None:
    rng = random.Random("turns")
    rows = next(r for r in _scenes(rng, Encoder(tokenizer)) if len(r.turns) > 2)
    batch = pack(iter([rows]), ROOM)
    start = ROOM.shared + len(rows.turns[0].ids)
    first = slice(ROOM.shared, start)
    others = slice(start, start + sum(len(turn.ids) for turn in rows.turns[1:]))

    before = compute_logits(network, batch)
    batch.ids[others] = batch.ids[0]
    after = compute_logits(network, batch)

    torch.testing.assert_close(before[first], after[first])
    assert not torch.allclose(before[others], after[others])


def _scenes(rng: random.Random, encoder: Encoder) -> Iterator[Rows]:
    while True:
        yield rows_of(rng, encoder, corpus.scene_sample(rng, (150, 110)))


def test_checkpoint_goes_back_into_the_network(network: TinyQwen2VL, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    export.write_weights(tmp_path, network.state_dict())
    weights = export.unpublished(load_file(tmp_path / "model.safetensors"))

    # The head that only training needs stays behind.
    expected = {n: t for n, t in network.state_dict().items() if n.startswith("model.")}
    assert expected.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(expected[name], tensor.float()), name
