"""The measuring tool: it counts what is there, and its floors are those of the arithmetic."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoConfig

from bench import engine, phi3_v
from bench.configs import SHAPES, LlavaShape, build_llava_tokenizer, build_tokenizer, write_model
from bench.later_qwen import LaterQwenShape
from bench.profiles import Span, summarise
from bench.tiled import TiledShape
from bench.workloads import Line, build_prompts, read_work
from engine import LLM
from engine.families.phi3_v_model import Phi3VConfig
from engine.floors import H100, H200, Asked, count_patches, floor
from engine.request import ImageUsed, MediaKind
from models.train.settings import SPECIAL_TOKENS


def test_floor_of_captions_is_what_the_arithmetic_says(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(write_model("qwen2-vl-2b", tmp_path))
    caption = Asked([1564], 421, 64)
    frames = Asked([576] * 16, 2364, 128)

    of_caption = floor(config, [caption] * 1024, 256, H100, 2)
    of_frames = floor(config, [frames] * 192, 192, H100, 2)

    # worked out by hand, in milliseconds: 2.40, 1.12 and 12.6, 6.7 TFLOP, 1.60 and 11.0 GB
    assert pytest.approx((3.0, 1.4, 0.53), rel=0.03) == (
        of_caption.encode,
        of_caption.prefill,
        of_caption.decode,
    )
    assert pytest.approx((15.8, 8.4, 3.7), rel=0.03) == (
        of_frames.encode,
        of_frames.prefill,
        of_frames.decode,
    )


def test_floor_of_llava_is_what_the_arithmetic_says(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(write_model("llava-1.5-7b", tmp_path))
    least = floor(config, [Asked([576], 603, 64)] * 1024, 256, H100, 2)

    # worked out by hand, in milliseconds: 0.39 and 7.9 TFLOP, 24.6 GB
    assert pytest.approx((0.49, 9.9, 8.2), rel=0.03) == (
        least.encode,
        least.prefill,
        least.decode,
    )


def test_floor_of_phi_counts_every_tile(tmp_path: Path) -> None:
    config = Phi3VConfig.from_pretrained(write_model("phi-3.5-vision", tmp_path))
    image = ImageUsed(0, 640, 480, 4 * 336, 3 * 336, 1921, MediaKind.IMAGE)
    patches = count_patches(config, image)
    least = floor(config, [Asked(patches, 1950, 64)] * 64, 64, H100, 2)

    assert [576] * 13 == patches
    # worked out by hand, in milliseconds: 4.84 TFLOP of 13 tiles, 14.9 of the prompt, 57.3 GB
    assert pytest.approx((6.07, 18.6, 19.1), rel=0.01) == (
        least.encode,
        least.prefill,
        least.decode,
    )


def test_floors_of_later_generations_are_what_the_arithmetic_says(tmp_path: Path) -> None:
    windows = AutoConfig.from_pretrained(write_model("qwen2.5-vl-3b", tmp_path / "2.5"))
    deeper = AutoConfig.from_pretrained(write_model("qwen3-vl-2b", tmp_path / "3"))

    of_windows = floor(windows, [Asked([1564], 421, 64)] * 1024, 256, H100, 2)
    of_deeper = floor(deeper, [Asked([1200], 330, 64)] * 1024, 256, H100, 2)

    # worked out by hand: 1564 * 32 * 2 * 1280 * (5120 + 10260) = 1.97 TFLOP of layers, 0.065 of
    # attention (4 * 1564 + 28 * 64 patches seen), 0.032 of the merger, 0.002 of the embedding
    assert pytest.approx(2.07e12 / 798e12 * 1000, rel=0.01) == of_windows.encode
    # 1200 * 24 * 2 * 1024 * (4096 + 8192) = 0.725, 0.142, 4 mergers of 0.0151, 0.002
    assert pytest.approx(0.929e12 / 798e12 * 1000, rel=0.01) == of_deeper.encode
    # 28 layers of 2048 * (4096 + 2048 + 18432) * 2 * 330 = 0.930, head 0.0006, attention 0.0125
    assert pytest.approx(0.943e12 / 798e12 * 1000, rel=0.01) == of_deeper.prefill


def test_floors_of_tiled_models_are_what_the_arithmetic_says(tmp_path: Path) -> None:
    smol = AutoConfig.from_pretrained(write_model("smolvlm-2.2b", tmp_path / "smol"))
    intern = AutoConfig.from_pretrained(write_model("internvl3-2b", tmp_path / "intern"))
    of_smol = ImageUsed(0, 640, 480, 4 * 384, 3 * 384, 1100, MediaKind.IMAGE)
    of_intern = ImageUsed(0, 640, 480, 4 * 448, 3 * 448, 3330, MediaKind.IMAGE)
    single = ImageUsed(0, 448, 448, 448, 448, 258, MediaKind.IMAGE)

    assert [729] * 13 == count_patches(smol, of_smol)
    assert [1024] * 13 == count_patches(intern, of_intern)
    assert [1024] == count_patches(intern, single)
    tiles = floor(smol, [Asked([729] * 13, 1300, 64)] * 64, 64, H100, 2)
    wide = floor(intern, [Asked([1024] * 13, 3400, 64)] * 64, 64, H100, 2)
    # worked out by hand: a tile is 27 layers of 22.2 and 2.45 GFLOP, 3.4 behind them, 1.0 before: 0.670
    assert pytest.approx(13 * 0.670e12 / 798e12 * 1000, rel=0.01) == tiles.encode
    # a tile is 24 layers of 25.8 and 4.30 GFLOP, 3.2 and 1.2 behind them, 1.2 before: 0.728
    assert pytest.approx(13 * 0.728e12 / 798e12 * 1000, rel=0.01) == wide.encode
    # 24 layers of 67.1 million, 1300 tokens: 4.19 TFLOP, attention 0.166, head 0.0002
    assert pytest.approx(4.36e12 / 798e12 * 1000, rel=0.01) == tiles.prefill
    # 28 layers of 46.8 million, 3400 tokens: 8.91 TFLOP, attention 0.994, head 0.0005
    assert pytest.approx(9.91e12 / 798e12 * 1000, rel=0.01) == wide.prefill
    # 64 tokens of (24 * 67.1 + 100.7 million) * 2 / 64 bytes, and of 1332 rows of 196,608 bytes
    assert pytest.approx((3.42e9 + 16.76e9) / 3.0e12 * 1000, rel=0.01) == tiles.decode


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("qwen2-vl-2b", (6.280196157593985, 3.3109317472882207, 1.5001447590697674)),
        ("qwen2.5-vl-3b", (5.870426568822055, 6.927328792380952, 2.4595725891472866)),
        ("qwen3-vl-2b", (3.2718179499949875, 3.614898492524645, 3.853506639379845)),
        ("llava-1.5-7b", (3.1107566993216373, 15.969860988685046, 17.009784339844963)),
        ("phi-3.5-vision", (2.9714677879766076, 9.056835640461154, 12.162881012093024)),
        ("smolvlm-2.2b", (4.1323873087518805, 4.051720551298246, 6.00917407255814)),
        ("internvl3-2b", (3.068170168140351, 3.310930738686717, 1.4999507572093023)),
    ],
)
def test_figures_can_be_compared_with_those_of_before(
    tmp_path: Path, name: str, least: tuple[float, float, float]
) -> None:
    kind = Phi3VConfig if name == "phi-3.5-vision" else AutoConfig
    config = kind.from_pretrained(write_model(name, tmp_path))
    mixed = [Asked([1564], 421, 64), Asked([576] * 16, 2364, 128), Asked([], 50, 7)] * 30
    found = floor(config, mixed, 64, H200, 2)

    # as printed before an engine added them up itself
    assert pytest.approx(least, rel=1e-9) == (found.encode, found.prefill, found.decode)


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_special_tokens_stand_at_their_ids_inside_the_vocabulary(name: str) -> None:
    shape = SHAPES[name]
    if isinstance(shape, dict):
        tokenizer = phi3_v.build_tokenizer(shape["num_text_ids"])
        first = shape["num_text_ids"]
        assert [0, 1, 2] == [tokenizer.token_to_id(token) for token in ("<unk>", "<s>", "</s>")]
        assert [first, first + 7, first + 10, first + 44] == [
            tokenizer.token_to_id(token)
            for token in ("<|endoftext|>", "<|end|>", "<|user|>", "<|image|>")
        ]
        assert tokenizer.get_vocab_size() <= shape["vocab_size"]
        return
    if isinstance(shape, LlavaShape):
        tokenizer = build_llava_tokenizer(shape.num_text_ids)
        assert [0, 1, 2] == [tokenizer.token_to_id(token) for token in ("<unk>", "<s>", "</s>")]
        assert [1] == tokenizer.encode("").ids
        assert shape.num_text_ids == tokenizer.token_to_id("<image>")
        assert tokenizer.get_vocab_size() <= shape.vocab_size
        return
    if isinstance(shape, TiledShape):
        tokenizer = build_tokenizer(shape.num_text_ids, first=shape.first, last=shape.last)
        is_smol = shape.config["model_type"] == "idefics3"
        place = shape.num_text_ids + (1 if is_smol else 24)  # published: 49153 and 151667
        assert place == tokenizer.token_to_id(shape.placeholder)
        assert tokenizer.get_vocab_size() <= shape.text["vocab_size"]
        return
    tokenizer = build_tokenizer(shape.num_text_ids)

    assert shape.num_text_ids == tokenizer.token_to_id(SPECIAL_TOKENS[0])
    assert tokenizer.get_vocab_size() <= shape.vocab_size
    if isinstance(shape, LaterQwenShape):
        text = shape.text
        width = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
        assert 2 * sum(text["rope_parameters"]["mrope_section"]) == width
        return
    assert 2 * sum(shape.mrope_section) == shape.hidden_size // shape.num_attention_heads


def test_spans_that_overlap_count_once_and_gaps_are_named() -> None:
    spans = [Span("a", 0, 40), Span("b", 20, 60), Span("a", 80, 100)]
    found = summarise(spans)

    assert 0.8 == found["busy_share"]
    assert 0.75 == found["steady_busy_share"]
    assert [("a", 2), ("b", 1)] == [(k["name"], k["count"]) for k in found["kernels"]]
    assert [(0.02, "b", "a")] == [(g["ms"], g["after"], g["before"]) for g in found["gaps"]]


def test_work_may_be_a_file_and_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"sizes": [[64, 48]], "max_tokens": 3}\n{"sizes": [], "max_tokens": 2}\n')
    lines, num = read_work(str(path))
    path.write_text('{"sizes": [[64, 48]], "max_tokens": 3}\n{"sizes": [[0, 1]], "max_tokens": 2}')

    assert ([Line(((64, 48),), 3), Line((), 2)], 2) == (lines, num)
    with pytest.raises(ValueError, match="line 2"):
        read_work(str(path))


def test_slow_tail_has_the_tokens_of_the_even_work() -> None:
    (tail, num), (even, same_num) = read_work("tail"), read_work("even")

    assert num == same_num == len(tail) == len(even)
    assert {16: 0.95, 512: 0.05} == {
        tokens: count / num for tokens, count in Counter(line.max_tokens for line in tail).items()
    }
    assert sum(line.max_tokens for line in tail) == sum(line.max_tokens for line in even)
    assert {40, 41} == {line.max_tokens for line in even}


def test_pictures_of_another_run_are_others() -> None:
    lines = [Line(((64, 48),), 1), Line((), 1)]
    first, again, other = (build_prompts(lines, 3, start) for start in (0, 0, 2))

    assert [1, 0, 1] == [len(prompt.pictures) for prompt in first]
    assert first == again
    assert not {p for one in first for p in one.pictures} & {
        p for one in other for p in one.pictures
    }


@pytest.mark.parametrize(
    ("config", "tiles"), [("tiny-smolvlm", [36, 36, 36]), ("tiny-internvl", [16, 16, 16])]
)
def test_models_of_tiles_run_with_weights_that_were_drawn(
    tmp_path: Path, config: str, tiles: list[int]
) -> None:
    folder = write_model(config, tmp_path)
    prompts = build_prompts([Line(((112, 56),), 3), Line((), 2)], 2, 0)
    with LLM(str(folder), load_format="dummy", device="cpu", max_num_seqs=2) as llm:
        figures = engine.run(llm, prompts)
        (picture,) = [p for prompt in prompts for p in prompt.pictures]
        content = [{"type": "image", "image": picture}, {"type": "text", "text": "a"}]
        (result,) = llm.chat([{"role": "user", "content": content}], use_tqdm=False)

    assert 5 == round(figures["output_tokens_s"] * figures["wall_s"])
    assert tiles == count_patches(llm.engine.checkpoint.config, result.images[0])


@pytest.mark.parametrize("config", ["tiny-1m", "tiny-llava", "tiny-qwen2.5-vl", "tiny-qwen3-vl"])
def test_a_run_prints_its_figures_and_those_of_the_peer(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    config: str,
) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text(
        '{"sizes": [[84, 56]], "max_tokens": 3}\n{"sizes": [[56, 56], [28, 56]], "max_tokens": 5}\n'
    )
    words = f"--work {path} --model-config {config} --device cpu --num 4 --runs 1 --warm-up 1"
    words += " --llm quantization=fp8 --sampling temperature=0.7 --sampling top_p=0.9"
    monkeypatch.setattr(sys, "argv", ["engine", *words.split(), "--peer", "transformers"])
    engine.main()
    run, summary = (json.loads(line) for line in capsys.readouterr().out.splitlines())

    assert 4 == run["prompts"]
    # or nobody could tell its figures from others
    assert ["quantization=fp8"] == run["llm"]
    assert ["temperature=0.7", "top_p=0.9"] == run["sampling"]
    assert run["images_s"] == pytest.approx(run["prompts_s"] * 1.5, rel=0.01)
    assert run["output_tokens_s"] == pytest.approx(run["prompts_s"] * 4, rel=0.01)
    assert run["calls"]["decode"] >= 4
    assert set(run["ms_a_prompt"]) == {"all", "encode", "prefill", "decode", "idle"}
    assert summary["ratio"] > 0
