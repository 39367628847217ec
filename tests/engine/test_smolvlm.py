"""Clips of SmolVLM2: what stands in the prompt, what is seen of a frame, and by which template."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor
from transformers.video_utils import VideoMetadata

from engine import LLM, Request, SamplingParams
from engine.checkpoint import read_checkpoint
from engine.config import EngineConfig
from engine.errors import BadConfig, BadPrompt, PlaceholderMismatch
from engine.families.smolvlm import count_in_words
from engine.processor import Prepared, Processor
from media.decoded import Frames
from tests.engine.families import CASES, Asked, Case, Oracle, size, write_smolvlm_clip
from tests.engine.pictures import as_frames, cut_clip, draw, draw_clip, error_of
from tests.engine.test_config import rewrite
from tests.engine.tiny_llava import IDEFICS3_MARKS, SMOLVLM_OTHER, write_tiny_smolvlm
from tests.media.clips import clip, shades

ONE = SamplingParams(max_tokens=1)
NUM_ROWS = 9  # of a tile of the default checkpoint
SPLITTING = pre_tokenizers.Sequence(  # as SmolVLM2's tokenizer
    [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
)
PROMPTS = (
    "User: <video>Describe it.",
    "<video>",
    "User:<video>\nDescribe it.",
    "User: What is this?<video>  \n And this?",
    "User: <video><video>\n\nDescribe it.",
)
PARTS_TEMPLATE = (
    "{% for part in messages[0].content %}"
    "{{ part.text if part.type == 'text' else '<' ~ part.type ~ '>' }}{% endfor %}"
)
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module", params=["smolvlm", "smolvlm, uneven tiles and Qwen2"])
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def folder(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return case.write(tmp_path_factory.mktemp("smolvlm"), seed=5, changes=case.changes)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), limit_mm_per_prompt={"image": 2, "video": 3}, device="cpu") as llm:
        yield llm


@pytest.fixture(scope="module")
def merging(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_merging(tmp_path_factory.mktemp("merging"))


def read(folder: Path, **options: Any) -> Processor:
    """No weights are needed."""
    config = EngineConfig(str(folder), limits={"image": 2, "video": 2}, device="cpu", **options)
    return Processor(config, read_checkpoint(config))


def write_merging(folder: Path) -> Path:
    """A checkpoint with a tokenizer of merges, in which it matters what stands beside what."""
    write_tiny_smolvlm(folder)
    told = VideoMetadata(32, 1.0, frames_indices=[*range(32)])
    texts = [write_smolvlm_clip(NUM_ROWS, number, told) for number in (2, 32)]
    texts += [*PROMPTS, "Describe it.\n\n"]
    marks = ["<s>", *IDEFICS3_MARKS]
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = SPLITTING, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=marks,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts * 20, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))

    def fit(config: dict[str, Any]) -> None:
        config["image_token_id"] = marks.index("<image>")
        config["text_config"]["vocab_size"] = tokenizer.get_vocab_size()

    rewrite("config.json", fit)(folder)
    return folder


def time_frames(num_frames: int, *, step: int, fps: float = 29.97) -> tuple[Frames, VideoMetadata]:
    """Every so many frames of a clip that goes on a while, as we and as transformers know them."""
    indices = tuple(range(0, num_frames * step, step))
    num_source = num_frames * step + 40
    images = as_frames(draw_clip(7, num_frames, 60, 40)).images
    frames = Frames(images, tuple(i / fps for i in indices), fps, num_source, indices)
    told = VideoMetadata(num_source, fps, duration=num_source / fps, frames_indices=[*indices])
    return frames, told


def prepare(processor: Processor, prompt: str, **media: Any) -> Prepared:
    return processor.prepare(Request(prompt=prompt, multi_modal_data=media))


# --- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(("num_frames", "step"), [(1, 13), (2, 300), (32, 5_000), (5, 700_000)])
def test_clip_stands_in_the_prompt_as_transformers_writes_it(
    merging: Path, prompt: str, num_frames: int, step: int
) -> None:
    """Beside any words, with more than sixty minutes, and of more than a day."""
    frames, told = time_frames(num_frames, step=step)
    expanded = write_smolvlm_clip(NUM_ROWS, num_frames, told)
    clips = [frames] * prompt.count("<video>")
    tokenizer = AutoTokenizer.from_pretrained(merging)
    prepared = prepare(read(merging), prompt, video=clips)

    assert tokenizer(prompt.replace("<video>", expanded))["input_ids"] == prepared.token_ids
    assert [num_frames * NUM_ROWS] * len(clips) == [len(one.rows) for one in prepared.media]
    assert {tokenizer.convert_tokens_to_ids("<image>")} == {
        prepared.token_ids[row] for one in prepared.media for row in one.rows
    }


def test_length_that_nobody_knows_is_the_moment_of_the_last_frame(merging: Path) -> None:
    (frames, told), tokenizer = (time_frames(5, step=900), AutoTokenizer.from_pretrained(merging))
    told.duration = None
    bare = Frames(frames.images, frames.times_s)
    expanded = write_smolvlm_clip(NUM_ROWS, 5, told)

    assert (
        tokenizer(expanded)["input_ids"] == prepare(read(merging), "<video>", video=bare).token_ids
    )


@pytest.mark.parametrize("num_processes", [0, 1])
@pytest.mark.parametrize("start_s", [0.0, 1.4])
def test_file_says_how_long_all_of_it_is_wherever_it_is_decoded(
    merging: Path, num_processes: int, start_s: float
) -> None:
    num_source, fps = 25, 10
    part = {
        "type": "video",
        "video": clip(shades(num_source), fps=fps),
        "num_frames": 3,
        "start_s": start_s,
    }
    request = Request(
        messages=[{"role": "user", "content": [part]}], params=ONE, chat_template=PARTS_TEMPLATE
    )
    with LLM(
        str(merging), device="cpu", load_format="dummy", num_media_processes=num_processes
    ) as llm:
        (result,) = list(llm.stream([request]))
    assert result.error is None
    (used,) = result.images
    assert used.frame_indices is not None
    told = VideoMetadata(
        num_source, fps, duration=num_source / fps, frames_indices=[*used.frame_indices]
    )
    expected = write_smolvlm_clip(NUM_ROWS, 3, told)

    assert AutoTokenizer.from_pretrained(merging)(expected)["input_ids"] == result.prompt_token_ids
    assert "from a 0:00:02 [H:MM:SS] video" in expected
    assert (start_s > 1) == ("Frame from 00:00:" not in expected)


def test_tokenizer_that_would_write_other_words_is_refused_with_the_clip(tmp_path: Path) -> None:
    write_merging(tmp_path)

    def join(tokenizer: dict[str, Any]) -> None:  # an f with the space behind it, and nothing else
        tokenizer["pre_tokenizer"]["pretokenizers"][1]["use_regex"] = False
        model = tokenizer["model"]
        model["merges"], model["vocab"]["fĠ"] = [["f", "Ġ"]], model["vocab"].pop("Ġof")

    rewrite("tokenizer.json", join)(tmp_path)
    processor = read(tmp_path)
    frames, _ = time_frames(2, step=10)

    with pytest.raises(BadPrompt, match="tokenizer that is not SmolVLM2's"):
        prepare(processor, "<video>", video=frames)
    assert 1 == len(prepare(processor, "<image>", image=draw(1)).media)


@pytest.mark.parametrize(("num_marks", "num_clips"), [(0, 1), (1, 0), (2, 1)])
def test_each_clip_needs_its_placeholder(merging: Path, num_marks: int, num_clips: int) -> None:
    frames, _ = time_frames(2, step=10)
    with pytest.raises(PlaceholderMismatch, match="<video>"):
        prepare(read(merging), "a" + "<video>" * num_marks, video=[frames] * num_clips or None)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (1, "one"),
        (12, "twelve"),
        (19, "nineteen"),
        (20, "twenty"),
        (32, "thirty-two"),
        (64, "sixty-four"),
        (90, "ninety"),
        (100, "one hundred"),
        (115, "one hundred and fifteen"),
        (768, "seven hundred and sixty-eight"),
        (1_000, "one thousand"),
        (1_001, "one thousand and one"),
        (1_100, "one thousand, one hundred"),
        (21_234, "twenty-one thousand, two hundred and thirty-four"),
        (300_000, "three hundred thousand"),
    ],
)
def test_numbers_are_written_out_as_num2words_does(number: int, words: str) -> None:
    assert words == count_in_words(number)


# --- conversations ---------------------------------------------------------------------------------


def converse(clip: Any) -> list[dict[str, Any]]:
    def text(words: str) -> dict[str, str]:
        return {"type": "text", "text": words}

    return [
        {"role": "system", "content": [text("Be brief.")]},
        {"role": "user", "content": [{"type": "video", **clip}, text("Describe it.")]},
        {"role": "assistant", "content": [text("A red thing.")]},
        {"role": "user", "content": [text("And now?")]},
    ]


@pytest.mark.parametrize("own", [None, TEMPLATE])
def test_conversations_with_clips_are_written_as_its_processor_does(
    tmp_path: Path, own: str | None
) -> None:
    """Whatever template the checkpoint brings, as long as the caller brings none."""
    write_merging(tmp_path)
    if own is not None:
        (tmp_path / "chat_template.jinja").write_text(own)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    frames, told = time_frames(2, step=30)
    written: Any = tokenizer.apply_chat_template(
        converse({}),
        chat_template=DEFAULT_CHAT_TEMPLATE,
        add_generation_prompt=True,
        tokenize=False,
    )
    expanded = written.replace("<video>", write_smolvlm_clip(NUM_ROWS, 2, told))
    prepared = read(tmp_path).prepare(Request(messages=converse({"video": frames})))

    assert tokenizer(expanded)["input_ids"] == prepared.token_ids


def test_template_that_the_caller_chose_is_used_for_clips_too(merging: Path) -> None:
    frames, told = time_frames(2, step=30)
    tokenizer = AutoTokenizer.from_pretrained(merging)
    expected = "<video>\nBe brief.Describe it.".replace(
        "<video>", write_smolvlm_clip(NUM_ROWS, 2, told)
    )
    content = [{"type": "text", "text": "Be brief."}, {"type": "video", "video": frames}]
    messages = [{"role": "user", "content": content}, {"role": "user", "content": "Describe it."}]
    for options in ({"request": TEMPLATE}, {"engine": TEMPLATE}):
        processor = read(merging, chat_template=options.get("engine"))
        request = Request(messages=messages, chat_template=options.get("request"))

        assert tokenizer(expected)["input_ids"] == processor.prepare(request).token_ids


def test_placeholder_that_somebody_typed_is_words(merging: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(merging)
    for typed in ("<video>", "a <video>\n"):
        request = Request(messages=[{"role": "user", "content": typed}], chat_template=TEMPLATE)
        assert tokenizer(typed)["input_ids"] == read(merging).prepare(request).token_ids


# --- pixels and answers -----------------------------------------------------------------------------


def test_frames_of_all_sizes_are_cut_as_by_transformers(case: Case, folder: Path, llm: LLM) -> None:
    """Its processor of clips does not run without torchvision: that of pictures is told its sizes."""
    oracle, rng = Oracle(case, folder), random.Random("frames")
    told = SmolVLMVideoProcessor.from_pretrained(folder)
    mean, std = (np.array(value)[:, None, None] for value in (told.image_mean, told.image_std))
    family = llm.engine.checkpoint.family
    worst = 0.0
    for seed in range(40):
        frames = draw_clip(seed, rng.randint(1, 3), *size(rng))
        ours = cut_clip(family, frames).pixels.numpy().transpose(0, 3, 1, 2).astype(np.float64)
        given = oracle.read(Asked("", "<video>", [], [frames], 1))["pixel_values"][0].numpy()
        assert ours.shape == given.shape
        worst = max(worst, float(np.abs(ours - (given * std + mean) * 255).max()))

    assert worst < 0.01  # of 255 levels


def test_several_clips_among_pictures_are_answered_as_by_transformers(
    case: Case, folder: Path, llm: LLM
) -> None:
    oracle, rng = Oracle(case, folder), random.Random("clips")
    asked = []
    for number in range(10):
        clips = [
            draw_clip(rng.getrandbits(16), rng.randint(1, 5), *size(rng))
            for _ in range(rng.randint(1, 3))
        ]
        pictures = [draw(rng.getrandbits(24), *size(rng)) for _ in range(rng.randint(0, 2))]
        marks = ["<image>"] * len(pictures) + ["<video>"] * len(clips)
        rng.shuffle(marks)
        asked.append(Asked(str(number), "What? ".join(["", *marks, "a"]), pictures, clips, 6))
    expected = {one.name: oracle.generate(one) for one in asked}
    results = list(llm.stream([one.request() for one in asked]))

    assert [] == [result.error for result in results if result.error]
    assert expected == {result.request_id: list(result.outputs[0].token_ids) for result in results}
    assert len({tuple(ids) for ids in expected.values()}) > len(asked) // 2


def test_other_frames_give_another_answer(llm: LLM) -> None:
    """Or nothing above would say much."""
    said = set()
    for seed in range(4):
        given = {"prompt": "<video>a", "multi_modal_data": {"video": draw_clip(seed, 2)}}
        (result,) = llm.generate(given, use_tqdm=False)
        said.add(tuple(result.outputs[0].token_ids))

    assert len(said) > 1


@pytest.mark.parametrize(
    "clips",
    [{"max_image_size": {"longest_edge": 48}}, {"max_image_size": None}, {"do_resize": False}],
)
def test_frames_of_another_tile_than_the_encoders_are_refused(
    tmp_path: Path, clips: dict[str, Any]
) -> None:
    changes = {**SMOLVLM_OTHER, "clips": {**SMOLVLM_OTHER["clips"], **clips}}
    write_tiny_smolvlm(tmp_path, changes=changes)
    with pytest.raises(BadConfig, match="other tiles of frames"):
        LLM(str(tmp_path), device="cpu")


def test_what_is_too_long_names_no_size_that_would_not_help(llm: LLM) -> None:
    given = {"prompt": "<video>a", "multi_modal_data": {"video": draw_clip(1, 80, 8, 8)}}

    message = error_of(llm.generate(given, use_tqdm=False))
    assert "frames" in message
    assert "max_pixels" not in message
