"""LLaVA-1.5 as its users know it from vLLM, and what is its own."""

import base64
import json
import resource
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from transformers.image_transforms import center_crop

from engine import LLM, Result, SamplingParams
from engine.errors import BadConfig
from engine.families import resizing
from engine.families.protocol import Plan, Visual
from engine.families.resizing import crop_centre, resize_padded
from tests.engine.families import CASES, Asked, Oracle
from tests.engine.pictures import GREEDY, cut_picture, data_url, draw, error_of, token_ids
from tests.engine.test_config import Change, rewrite
from tests.engine.tiny_llava import (
    IMAGE_ID,
    LLAVA_NEXT_WINDOW,
    LLAVA_SIGLIP,
    write_tiny_llava,
    write_tiny_llava_next,
    write_tiny_text,
)

QUESTION = "What is the content of this image?"
PROMPT = f"USER: <image>\n{QUESTION}\nASSISTANT:"
# Takes only texts, as the templates for LLaVA that go about do, and writes the first token itself.
TEXT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] | upper + ': ' + message['content'] + '\n' }}{% endfor %}ASSISTANT:"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("llava"), seed=4)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(model=str(folder)) as llm:
        yield llm


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return Oracle(CASES["llava"], folder)


def ask(oracle: Oracle, prompt: str, picture: Image.Image) -> list[int]:
    return oracle.generate(Asked("", prompt, [picture], [], 12))


def test_example_of_a_prompt_with_one_picture(llm: LLM, oracle: Oracle) -> None:
    picture = draw(1, 120, 90)
    outputs = llm.generate({"prompt": PROMPT, "multi_modal_data": {"image": picture}}, GREEDY)

    assert [ask(oracle, PROMPT, picture)] == token_ids(outputs)
    assert 16 == list(outputs[0].prompt_token_ids or ()).count(IMAGE_ID)
    assert ask(oracle, PROMPT, draw(2, 120, 90)) != token_ids(outputs)[0]


def chat(llm: LLM, picture: Image.Image, **options: Any) -> Any:
    content = [
        {"type": "text", "text": QUESTION},
        {"type": "image_url", "image_url": {"url": data_url(picture)}},
    ]
    return llm.chat([{"role": "user", "content": content}], GREEDY, use_tqdm=False, **options)


def test_chat_without_a_template_of_the_checkpoint(llm: LLM, oracle: Oracle) -> None:
    results = chat(llm, draw(3))

    assert f"USER: <image>\n{QUESTION} ASSISTANT:" == results[0].prompt
    assert [ask(oracle, results[0].prompt, draw(3))] == token_ids(results)


def test_turns_of_the_assistant_end_in_its_token(llm: LLM) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c <image>"},
    ]
    (result,) = llm.chat(messages, GREEDY, use_tqdm=False)

    assert "Be brief. USER: a ASSISTANT: b</s>USER: c <image> ASSISTANT:" == result.prompt
    assert IMAGE_ID not in (result.prompt_token_ids or ())  # what a user types binds no picture


def test_chat_with_a_template_from_a_file(folder: Path, tmp_path: Path, oracle: Oracle) -> None:
    path = tmp_path / "template_llava.jinja"
    path.write_text(TEXT_TEMPLATE)
    with LLM(str(folder), chat_template=str(path)) as llm:
        results = chat(llm, draw(3))

    text = f"USER: <image>\n{QUESTION}\nASSISTANT:"
    assert f"<s>{text}" == results[0].prompt
    assert [ask(oracle, text, draw(3))] == token_ids(results)  # and one first token, not two


@pytest.mark.parametrize("content", ["ab", ["ab"], [{"type": "text", "text": "ab"}]])
def test_template_that_reads_parts_alone_is_given_parts(llm: LLM, content: Any) -> None:
    """As published with checkpoints of this family: of a plain text it would show nothing."""
    template = (
        "{% for message in messages %}{{ message['role'] | upper }}: "
        "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{{ part['text'] }} {% endfor %}{% endfor %}"
    )
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": content}]
    (result,) = llm.chat(messages, GREEDY, use_tqdm=False, chat_template=template)

    assert "SYSTEM: s USER: ab " == result.prompt


# As published: a tokenizer's own may be that of a text model, and know no pictures.
TEMPLATE_FILES = {
    "tokenizer_config.json": "T{{ messages[0].content }}",
    "chat_template.json": "Q{{ messages[0].content }}A",
    "chat_template.jinja": "J{{ messages[0].content }}",
}


@pytest.mark.parametrize(
    ("files", "expected", "of_text"),
    [
        ([], "USER: x ASSISTANT:", None),
        (["chat_template.json"], "QxA", "QxA"),
        (["chat_template.json", "tokenizer_config.json"], "QxA", "Tx"),
        (["tokenizer_config.json"], "Tx", "Tx"),
        (list(TEMPLATE_FILES), "QxA", "Jx"),
    ],
)
def test_processors_template_goes_before_the_tokenizers(
    tmp_path: Path, files: list[str], expected: str, of_text: str | None
) -> None:
    write_tiny_llava(tmp_path / "sees")
    write_tiny_text(tmp_path / "reads", changes={"text": {"model_type": "llama"}})
    written = []
    for folder in (tmp_path / "sees", tmp_path / "reads"):
        for name in files:
            path = folder / name
            words = json.loads(path.read_text()) if path.exists() else {}
            words["chat_template"] = text = TEMPLATE_FILES[name]
            path.write_text(text if path.suffix == ".jinja" else json.dumps(words))
        with LLM(str(folder)) as llm:
            written += llm.chat({"role": "user", "content": "x"}, GREEDY, use_tqdm=False)

    assert [expected, of_text] == [result.prompt for result in written]


def test_turns_of_vicuna_are_for_llamas_alone(tmp_path: Path) -> None:
    """Other text models know other turns: which, their checkpoints must say."""
    write_tiny_llava(tmp_path / "qwen2", changes=LLAVA_SIGLIP)
    write_tiny_llava_next(tmp_path / "mistral", changes=LLAVA_NEXT_WINDOW)
    for name in ("qwen2", "mistral"):
        with pytest.raises(BadConfig, match=r"has no chat template\. Give one"):
            LLM(str(tmp_path / name), needs_chat_template=True)


def test_features_in_place_of_a_picture(llm: LLM) -> None:
    family = llm.engine.checkpoint.family
    (features,) = family.encode([cut_picture(family, draw(5))])
    given = {"prompt": PROMPT, "multi_modal_data": {"image": features[None]}}
    seen = {"prompt": PROMPT, "multi_modal_data": {"image": draw(5)}}
    with_grid = {"image_embeds": features, "image_grid_thw": torch.tensor([[1, 8, 8]])}

    assert (16, 48) == features.shape
    assert token_ids(llm.generate(seen, GREEDY)) == token_ids(llm.generate(given, GREEDY))
    assert "This model takes no image_grid_thw" in error_of(
        llm.generate({"prompt": PROMPT, "multi_modal_data": {"image": with_grid}}, GREEDY)
    )


def test_layers_that_nobody_reads_are_let_go(llm: LLM) -> None:
    assert 2 == len(llm.engine.checkpoint.family._tower._layers)  # type: ignore[attr-defined]


def converse(llm: LLM, *parts: dict[str, Any], **options: Any) -> Result:
    content = [{"type": "text", "text": "A"}, *parts, {"type": "text", "text": "B"}]
    return llm.chat([{"role": "user", "content": content}], GREEDY, use_tqdm=False, **options)[0]


def encode_clip(frames: list[Image.Image]) -> str:
    """An animation as a data URL; a frame every half second."""
    file = BytesIO()
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:], duration=500)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def test_clip_in_a_conversation_is_shown_as_its_frames(folder: Path, llm: LLM) -> None:
    frames = [draw(place, 120, 90) for place in range(10)]
    clip = {"type": "video_url", "video_url": {"url": encode_clip(frames)}, "num_frames": 4}
    kept = [{"type": "image", "image": frames[place]} for place in (0, 3, 6, 9)]
    with LLM(str(folder), limit_mm_per_prompt={"image": 4}) as many:
        expected = converse(many, *kept)

    seen = converse(llm, clip)

    assert expected.prompt_token_ids == seen.prompt_token_ids
    assert token_ids([expected]) == token_ids([seen])
    assert [("image", 0), ("image", 1), ("image", 2), ("image", 3)] == [
        (used.kind, used.index) for used in seen.images
    ]
    assert [0.0, 1.5, 3.0, 4.5] == [used.times_s[0] for used in seen.images if used.times_s]
    assert [0, 3, 6, 9] == [used.frame_indices[0] for used in seen.images if used.frame_indices]
    assert {(1, 120, 90)} == {(used.num_frames, used.width, used.height) for used in seen.images}


def test_frames_of_a_clip_stand_where_it_stood_and_count_as_one_clip(llm: LLM) -> None:
    frames = [draw(place, 120, 90) for place in range(3)]
    clip = {"type": "video", "video": frames[:2]}
    picture = {"type": "image", "image": frames[2]}

    before, after = converse(llm, clip, picture), converse(llm, picture, clip)

    assert [1, 1, None] == [used.num_frames for used in before.images]
    assert [None, 1, 1] == [used.num_frames for used in after.images]
    assert "At most 1 video(s)" in error_of([converse(llm, clip, clip)])
    assert "At most 1 image(s)" in error_of([converse(llm, picture, clip, picture)])


def test_bad_clip_of_frames_is_told_as_a_clip(llm: LLM) -> None:
    bad = {"type": "video", "video": b"no clip"}

    assert "Failed to load video" in error_of([converse(llm, bad)])
    small = {"type": "video", "video": [draw(1)], "max_pixels": 10_000}
    assert "max_pixels is not for this model" in error_of([converse(llm, small)])


def test_clip_of_too_many_frames_is_told_how_to_ask_for_fewer(llm: LLM) -> None:
    error = error_of([converse(llm, {"type": "video", "video": [draw(1)] * 130})])

    assert "2080 image tokens" in error
    assert error.endswith("Of a clip, num_frames says how many frames are looked at.")


def test_prompt_that_is_written_by_hand_holds_no_clip(llm: LLM) -> None:
    prompt = {"prompt": PROMPT, "multi_modal_data": {"video": [draw(1)]}}

    assert "Unsupported modality: video. Use image." == error_of(
        llm.generate(prompt, GREEDY, use_tqdm=False)
    )


def test_size_is_not_to_choose(llm: LLM) -> None:
    prompt = {
        "prompt": PROMPT,
        "multi_modal_data": {"image": draw(1)},
        "mm_processor_kwargs": {"max_pixels": 10_000},
    }

    assert (
        "max_pixels is not for this model, which sees every picture at a size of its own. Leave it out."
        == error_of(llm.generate(prompt, GREEDY, use_tqdm=False))
    )


def test_strip_is_refused_before_it_is_resampled(llm: LLM) -> None:
    prompt = {"prompt": PROMPT, "multi_modal_data": {"image": draw(1, 1, 201)}}

    assert "1x201: one side is over 200 times" in error_of(llm.generate(prompt, GREEDY))


def test_pictures_behind_the_end_of_the_context_are_not_cut(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(str(folder), limit_mm_per_prompt={"image": 100}, max_model_len=64) as llm:
        family = llm.engine.checkpoint.family
        cut, kept = family.cut_picture, list[Visual]()

        def keep(image: Image.Image, plan: Plan) -> Visual:
            kept.append(cut(image, plan))
            return kept[-1]

        monkeypatch.setattr(family, "cut_picture", keep)
        prompt = {"prompt": "<image>" * 100, "multi_modal_data": {"image": [draw(1)] * 100}}
        error = error_of(llm.generate(prompt, GREEDY, use_tqdm=False))

    assert "1600 image tokens" in error
    assert 3 == len(kept)  # 16 tokens each, and one of the 64 is for the answer


def test_prompt_that_is_too_long_tells_no_size_that_would_do(llm: LLM) -> None:
    prompt = {"prompt": PROMPT + "x" * 1990, "multi_modal_data": {"image": draw(1)}}
    error = error_of(llm.generate(prompt, SamplingParams(max_tokens=4)))

    assert "16 image tokens" in error
    assert "max_pixels" not in error


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            rewrite("preprocessor_config.json", lambda c: c.update(crop_size=64)),
            "makes pictures of 64x64 pixels, and its encoder reads 56x56",
        ),
        (
            rewrite("preprocessor_config.json", lambda c: c.update(do_resize=False)),
            "config.json and preprocessor_config.json that go together",
        ),
        (
            rewrite("config.json", lambda c: c["text_config"].update(model_type="gemma2")),
            "The model's text part is of the type 'gemma2', which is not supported yet here: use gemma3",
        ),
        (
            rewrite(
                "config.json",
                lambda c: c["text_config"].update(
                    rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
                ),
            ),
            "The model's positions are of the type 'dynamic', which changes with the length",
        ),
        (
            rewrite("config.json", lambda c: c["vision_config"].update(model_type="dinov2")),
            "The model's encoder is of the type 'dinov2', which is not supported yet here",
        ),
        (
            rewrite("config.json", lambda c: c.update(image_token_index=7)),
            "The tokenizer does not fit the model: <image> is not its token 7.",
        ),
    ],
)
def test_checkpoint_that_cannot_work_is_told(tmp_path: Path, change: Change, said: str) -> None:
    write_tiny_llava(tmp_path)
    change(tmp_path)
    with pytest.raises(BadConfig, match=said.replace(".", r"\.")):
        LLM(str(tmp_path))


@pytest.mark.parametrize("sides", [(300, 40), (40, 300), (64, 64), (256, 3), (3, 256)])
def test_border_of_a_long_strip_is_not_held_to_be_resampled(
    sides: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, grey = draw(1, *sides), (120, 130, 140)

    def see() -> npt.NDArray[np.int64]:
        seen = resize_padded(picture, 56, 56, grey, Image.Resampling.BICUBIC)
        assert (56, 56) == seen.size
        return np.asarray(seen, dtype=np.int64)

    whole = see()
    monkeypatch.setattr(resizing, "MAX_SQUARE_PIXELS", 0)

    # Pillow resamples across first, too: rounded differently only where that is not the longer side.
    assert np.abs(whole - see()).max() <= (3 if sides[1] > sides[0] else 0)


def test_long_strip_takes_no_memory_for_its_square() -> None:
    strip = Image.new("RGB", (200, 40_000), (255, 0, 0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seen = resize_padded(strip, 56, 56, (0, 0, 255), Image.Resampling.BICUBIC)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

    assert {(0, 0, 255)} == {seen.getpixel((0, y)) for y in range(56)}
    assert grown_kib < 500_000  # the square has 6 GB


@pytest.mark.parametrize("sides", [(7, 9), (20, 3), (3, 20), (31, 40), (10, 10)])
def test_crop_is_transformers_own(sides: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*sides, 3), dtype=np.uint8)
    cropped = crop_centre(Image.fromarray(pixels), 10, 13)
    theirs: Callable[..., Any] = center_crop

    np.testing.assert_array_equal(
        theirs(pixels, (10, 13), input_data_format="channels_last"), np.asarray(cropped)
    )
