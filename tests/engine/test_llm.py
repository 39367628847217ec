"""`LLM.generate` and its constructor: what vLLM's users know works here, and one bad prompt costs one."""

import json
import logging
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine import LLM, PromptFailedError, Request, Result, SamplingParams
from engine.config import BUNDLED_FOLDER
from engine.errors import BadConfig, BadPrompt
from engine.kernels.quantised import Fp8Linear
from engine.kv import KVShape
from engine.processor import Processor
from engine.runner import num_kv_rows
from models.train.settings import SYSTEM_PROMPT
from tests.engine.pictures import (
    CLIP,
    GREEDY,
    PICTURE,
    draw,
    encode_base64,
    error_of,
    features_of,
    texts,
    token_ids,
)
from tests.engine.tiny import Shape, write_tiny_qwen2_vl
from tests.engine.ways import in_pieces, keeping_prefixes

ROOT = Path(__file__).parents[2]
SYSTEM = f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n"
USER = "<|im_start|>user\n"
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"
WHAT = f"{USER}{PICTURE}What is the content of this image?{ANSWER}"

# --- the examples of vLLM's page "Using VLMs"; the import, the model and its marks are ours ---------


def test_one_picture(model: str) -> None:
    llm = LLM(model=model)
    image = draw(1, 168, 168)
    outputs = llm.generate({"prompt": WHAT, "multi_modal_data": {"image": image}})

    for o in outputs:
        generated_text = o.outputs[0].text
        assert generated_text
    assert 1 == len(outputs)


def test_picture_as_embeddings_has_the_answer_of_the_picture(model: str) -> None:
    llm = LLM(model=model)
    image = draw(2, 168, 168)
    (features,), _ = features_of(llm, image)
    image_embeds = features[None]
    from_picture = llm.generate({"prompt": WHAT, "multi_modal_data": {"image": image}})
    outputs = llm.generate({"prompt": WHAT, "multi_modal_data": {"image": image_embeds}})

    assert (1, 36, features.shape[1]) == image_embeds.shape
    assert texts(from_picture) == texts(outputs)
    assert token_ids(from_picture) == token_ids(outputs)


def test_embeddings_with_their_grid_have_the_answer_of_the_picture(model: str) -> None:
    llm = LLM(model=model)
    image = draw(3, 200, 120)
    (features,), grids = features_of(llm, image)
    from_picture = llm.generate({"prompt": WHAT, "multi_modal_data": {"image": image}})
    for image_embeds in (features, features[None]):
        mm_data = {"image": {"image_embeds": image_embeds, "image_grid_thw": torch.tensor(grids)}}
        outputs = llm.generate({"prompt": WHAT, "multi_modal_data": mm_data})

        assert token_ids(from_picture) == token_ids(outputs)


def test_batch_of_two_prompts(model: str) -> None:
    llm = LLM(model=model)
    image_1, image_2 = draw(4, 168, 168), draw(5, 120, 200)
    colour = f"{USER}{PICTURE}What's the color of this image?{ANSWER}"
    outputs = llm.generate(
        [
            {"prompt": WHAT, "multi_modal_data": {"image": image_1}},
            {"prompt": colour, "multi_modal_data": {"image": image_2}},
        ]
    )

    assert [WHAT, colour] == [o.prompt for o in outputs]
    assert [1, 1] == [len(o.images) for o in outputs]
    assert all(texts(outputs))


def test_two_pictures_in_one_prompt(model: str) -> None:
    llm = LLM(
        model=model,
        trust_remote_code=True,
        max_model_len=4096,
        limit_mm_per_prompt={"image": 2},
    )
    prompt = f"{USER}{PICTURE}\n{PICTURE}\nWhat is the content of each image?{ANSWER}"
    image1, image2 = draw(6, 168, 168), draw(7, 112, 112)
    outputs = llm.generate({"prompt": prompt, "multi_modal_data": {"image": [image1, image2]}})
    swapped = llm.generate({"prompt": prompt, "multi_modal_data": {"image": [image2, image1]}})

    assert texts(outputs)
    assert [(168, 168), (112, 112)] == [(i.used_width, i.used_height) for i in outputs[0].images]
    assert [(112, 112), (168, 168)] == [(i.used_width, i.used_height) for i in swapped[0].images]


def test_video_as_frames_in_a_chat(model: str) -> None:
    llm = LLM(model, limit_mm_per_prompt={"image": 4})
    video_frames = [draw(seed, 168, 168) for seed in range(4)]
    message: dict[str, Any] = {
        "role": "user",
        "content": [
            {
                "type": "text",
                "text": "Describe this set of frames. Consider the frames to be a part of the same "
                "video.",
            },
        ],
    }
    for i in range(len(video_frames)):
        base64_image = encode_base64(video_frames[i], "JPEG")
        new_image = {
            "type": "image_url",
            "image_url": {"url": f"data:image/jpeg;base64,{base64_image}"},
        }
        message["content"].append(new_image)
    outputs = llm.chat([message])

    assert all(texts(outputs))
    assert 4 == len(outputs[0].images)


def test_code_on_the_page_for_users_of_vllm_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "vllm.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    if not (BUNDLED_FOLDER / "model.safetensors").is_file():
        shape: Shape = {"text_width": 256, "mrope_section": (8, 12, 12)}
        random_model = write_tiny_qwen2_vl(tmp_path, **shape)
        blocks = [block.replace("darkroom-tiny", str(random_model)) for block in blocks]
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    num_answers = 0
    for block in blocks:
        exec(block, names)  # noqa: S102 - the page is ours
        num_answers += len(texts(names["outputs"]))

    assert 5 == len(blocks)
    assert 6 == num_answers
    assert capsys.readouterr().out


def test_bundled_model_sees_its_pictures(bundled: str) -> None:
    llm = LLM(bundled)
    names = ["one.png", "four.png", "small.png", "tall.png"]
    outputs = llm.generate(
        [
            {
                "prompt": f"{SYSTEM}{USER}{PICTURE}Describe the image.{ANSWER}",
                "multi_modal_data": {"image": Image.open(ROOT / "samples" / name)},
            }
            for name in names
        ]
    )
    expected = json.loads((ROOT / "samples" / "expected.json").read_text())
    num_right = sum(
        said == expected[name] for said, name in zip(texts(outputs), names, strict=True)
    )

    assert len(names) == num_right
    assert {"stop"} == {output.outputs[0].finish_reason for output in outputs}


# --- forms of prompts --------------------------------------------------------------------------------


def test_one_prompt_may_come_in_any_form(llm: LLM) -> None:
    text = "Say something."
    ids: list[int] = llm.get_tokenizer()(text)["input_ids"]
    forms: list[Any] = [
        text,
        {"prompt": text},
        ids,
        {"prompt_token_ids": ids},
        {"prompt_token_ids": ids, "prompt": text},
        {"prompt_token_ids": None, "prompt": text},
        Request(prompt=text),
        [text],
        [ids],
        np.array(ids),
        torch.tensor(ids),
        [np.int64(index) for index in ids],
        {"prompt_token_ids": np.array(ids)},
        [np.array(ids)],
    ]
    answers = [token_ids(llm.generate(form, GREEDY, use_tqdm=False)) for form in forms]

    assert [answers[0]] * len(forms) == answers
    assert 1 == len(answers[0])


def test_result_tells_the_prompt_and_its_ids(llm: LLM) -> None:
    ids: list[int] = llm.get_tokenizer()("One")["input_ids"]
    forms = ["One", ids, {"prompt_token_ids": ids, "prompt": "One"}]
    results = llm.generate(forms, GREEDY, use_tqdm=False)
    failed = llm.generate([{"prompt": "Two", "promt": 1}, 3.5], GREEDY, use_tqdm=False)

    assert ["One", None, "One"] == [result.prompt for result in results]
    assert ["Two", None] == [result.prompt for result in failed]
    assert [ids] * 3 == [list(result.prompt_token_ids or ()) for result in results]


def test_prompts_with_and_without_pictures_are_mixed_and_come_back_in_order(llm: LLM) -> None:
    prompts: list[Any] = [
        {
            "prompt": f"{number} {PICTURE * (number % 3)}",
            "multi_modal_data": {"image": [draw(number + i) for i in range(number % 3)]},
        }
        for number in range(20)
    ]
    together = llm.generate(prompts, GREEDY, use_tqdm=False)
    alone = [llm.generate(prompt, GREEDY, use_tqdm=False)[0] for prompt in prompts]

    assert [prompt["prompt"] for prompt in prompts] == [result.prompt for result in together]
    assert token_ids(alone) == token_ids(together)
    assert [number % 3 for number in range(20)] == [len(result.images) for result in together]


def test_no_prompts_have_no_results(llm: LLM) -> None:
    assert [] == llm.generate([], use_tqdm=False)


def test_parameters_are_one_for_all_or_one_each(llm: LLM) -> None:
    prompts = ["a", "b", "c"]
    each = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (1, 2, 3)]

    lengths = [len(ids) for ids in token_ids(llm.generate(prompts, each, use_tqdm=False))]

    assert [1, 2, 3] == lengths
    for wrong in (each[:2], [*each, each[0]]):
        with pytest.raises(
            BadPrompt,
            match=rf"^The lengths of prompts \(3\) and params \({len(wrong)}\) must be the same\.",
        ):
            llm.generate(prompts, wrong, use_tqdm=False)
    with pytest.raises(ValueError, match=r"^The lengths of prompts \(3\) and priorities \(1\)"):
        llm.generate(prompts, each, priority=[0], use_tqdm=False)


def test_without_parameters_the_models_own_are_used(llm: LLM) -> None:
    defaults = llm.get_default_sampling_params()
    (result,) = llm.generate("Go on.", use_tqdm=False)

    assert (0.0, 256) == (defaults.temperature, defaults.max_tokens)
    assert result.stamp is not None
    assert (0.0, 256) == (result.stamp.sampling["temperature"], result.stamp.sampling["max_tokens"])


def test_defaults_are_changed_by_replacing_them(llm: LLM) -> None:
    defaults = llm.get_default_sampling_params()
    params = replace(defaults, max_tokens=3, ignore_eos=True)
    (result,) = llm.generate("Go on.", params, use_tqdm=False)

    assert 3 == len(result.outputs[0].token_ids)
    with pytest.raises(AttributeError):
        defaults.max_tokens = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="max_tokens"):
        replace(defaults, max_tokens=0)


def test_names_of_requests_are_kept(llm: LLM) -> None:
    requests = [Request(prompt="a", request_id="first"), "b", Request(prompt=7, request_id="bad")]
    results = llm.generate(requests, GREEDY, use_tqdm=False)

    assert ["first", "1", "bad"] == [result.request_id for result in results]


def test_lower_priority_runs_first(tiny_folder: Path) -> None:
    llm = LLM(str(tiny_folder), max_num_seqs=1)
    long = SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True)
    priorities = [0, 3, 1, 4, 2, 5]
    results = llm.generate(
        list("0314 5"), [long] + [GREEDY] * 5, priority=priorities, use_tqdm=False
    )

    assert [] == [result.error for result in results if result.error]
    # One may slip in before the long one. While that runs, the others get ready and in line.
    ranked = zip(results, priorities, strict=True)
    by_start = [p for _, p in sorted((r.metrics.scheduled_ts or 0, p) for r, p in ranked)]
    in_line = [p for p in by_start[1:] if p]
    assert sorted(in_line) == in_line


def test_priority_orders_all_prompts_and_results_stay_in_theirs(tiny_folder: Path) -> None:
    llm = LLM(str(tiny_folder), max_num_seqs=1)
    once = SamplingParams(temperature=0, max_tokens=1)
    priorities = [5] * 100 + [1] * 3
    results = llm.generate([str(n) for n in range(103)], once, priority=priorities, use_tqdm=False)
    starts = [result.metrics.scheduled_ts or 0 for result in results]

    assert [str(n) for n in range(103)] == [result.prompt for result in results]
    assert max(starts[100:]) < sorted(starts[:100])[4]  # a few may be ready a moment earlier


@pytest.mark.parametrize("priority", ["high", 1.5, True])
def test_priority_that_is_no_number_costs_its_prompt_alone(llm: LLM, priority: Any) -> None:
    priorities = [0, priority, 1] * 5
    results = llm.generate(["x"] * 15, GREEDY, priority=priorities, use_tqdm=False)
    bad = results[1::3]
    unset = Request(prompt="x", priority=None)  # type: ignore[arg-type]
    streamed = list(llm.stream([unset, "y"], GREEDY))

    for result in bad:
        assert error_of([result]).startswith("priority is a ")
    assert 10 == len(texts([result for result in results if result not in bad]))
    assert [True, False] == sorted((r.error is None for r in streamed), reverse=True)


def test_priority_of_the_call_goes_before_that_of_a_request(llm: LLM) -> None:
    requests = [Request(prompt="x", priority=3)] * 2
    seen = []

    def record(numbered: Any) -> Any:
        for request in numbered:
            seen.append(request.priority)
            yield Result.failed(request.request_id, BadPrompt("is", remedy=""))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm.engine, "stream", record)
        llm.generate(requests, priority=[0, None], use_tqdm=False)  # type: ignore[list-item]

    assert [0, 3] == seen


# --- one bad prompt ----------------------------------------------------------------------------------


def prompts_with_one_bad() -> list[Any]:
    prompts: list[Any] = [
        {"prompt": f"{PICTURE}{number}", "multi_modal_data": {"image": draw(number)}}
        if number % 2
        else f"Number {number}"
        for number in range(100)
    ]
    prompts[37] = {"prompt": PICTURE * 5, "multi_modal_data": {"image": [draw(0)] * 5}}
    return prompts


def test_one_bad_prompt_among_100_costs_itself_alone(llm: LLM) -> None:
    prompts = prompts_with_one_bad()
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    results = llm.generate(prompts, params, use_tqdm=False)
    good = [prompt for number, prompt in enumerate(prompts) if number != 37]
    without = llm.generate(good, params, use_tqdm=False)

    assert 100 == len(results)
    assert [37] == [number for number, result in enumerate(results) if result.error]
    assert token_ids(without) == token_ids([r for r in results if r.error is None])
    assert [str(number) for number in range(100)] == [result.request_id for result in results]


def test_on_error_raise_tells_the_first_error_after_all_have_run(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=2)
    bars: list[Bar] = []

    with pytest.raises(PromptFailedError, match=r"^At most 4 image") as caught:
        llm.generate(
            [*prompts_with_one_bad(), 3.5],
            params,
            use_tqdm=lambda **options: Bar(bars, **options),
            on_error="raise",
        )

    error = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - our own

    assert "37" == caught.value.result.request_id == error.result.request_id
    assert ("too_many_images", "image", False) == (error.code, error.param, error.retryable)
    assert 99 == sum(result.error is None for result in error.results)
    assert 101 == bars[0].num_done
    assert isinstance(error, ValueError)


def test_failure_of_the_engine_is_no_value_error(llm: LLM) -> None:
    def fetch() -> Any:
        raise OSError

    prompt = {"prompt": PICTURE, "multi_modal_data": {"image": fetch}}
    with pytest.raises(PromptFailedError) as caught:
        llm.generate(prompt, GREEDY, use_tqdm=False, on_error="raise")

    assert ("engine_failure", True) == (caught.value.code, caught.value.retryable)
    assert not isinstance(caught.value, ValueError)


def test_on_error_knows_two_words(llm: LLM) -> None:
    with pytest.raises(ValueError, match="on_error"):
        llm.generate("a", GREEDY, on_error="ignore")  # type: ignore[arg-type]


def test_too_many_pictures_are_refused_before_one_is_decoded(tiny_folder: Path) -> None:
    llm = LLM(str(tiny_folder))
    num_calls = 0

    def fetch() -> Any:
        nonlocal num_calls
        num_calls += 1
        return draw(1)

    prompt = {"prompt": PICTURE * 3, "multi_modal_data": {"image": [fetch] * 3}}
    results = llm.generate([prompt, "Good."], GREEDY, use_tqdm=False)

    assert 0 == num_calls
    assert results[1].error is None
    assert error_of(results[:1]) == (
        "At most 1 image(s) may be provided in one prompt. Set `--limit-mm-per-prompt` to increase "
        'this limit. This prompt has 3; use image=3, or limit_mm_per_prompt={"image": 3} in Python, '
        "or image_policy=truncate, sample or split in a job."
    )
    assert results[0].error is not None
    assert ("too_many_images", "image", False) == (
        results[0].error.code,
        results[0].error.param,
        results[0].error.retryable,
    )


def test_too_many_pictures_are_refused_before_their_placeholders_are_counted(llm: LLM) -> None:
    prompt = {"prompt": "none", "multi_modal_data": {"image": [draw(1)] * 5}}

    assert error_of(llm.generate(prompt, GREEDY, use_tqdm=False)).startswith("At most 4 image(s)")


def test_a_modality_may_be_switched_off(tiny_folder: Path) -> None:
    llm = LLM(str(tiny_folder), limit_mm_per_prompt={"image": 0})
    prompt = {"prompt": PICTURE, "multi_modal_data": {"image": draw(1)}}

    error = error_of(llm.generate(prompt, GREEDY, use_tqdm=False))

    assert error.startswith("At most 0 image(s) may be provided in one prompt.")
    assert "switched off" in error


# --- the length of prompts --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short(tiny_folder: Path) -> LLM:
    """A context of 64 tokens; a text has as many tokens as bytes."""
    return LLM(str(tiny_folder), max_model_len=64)


def test_text_alone_may_be_too_long(short: LLM) -> None:
    def fetch() -> Any:
        raise AssertionError("nothing has to be fetched to know this")

    prompt = {"prompt": "x" * 98 + PICTURE, "multi_modal_data": {"image": fetch}}
    results = short.generate(["x" * 65, prompt], GREEDY, use_tqdm=False)

    for result, num_tokens in zip(results, (65, 100), strict=True):
        assert result.error is not None
        assert ("prompt_too_long", "input_tokens") == (result.error.code, result.error.param)
        assert result.error.message.startswith(
            "This model's maximum context length is 64 tokens. However, your prompt contains "
            f"{num_tokens} input tokens, which exceeds this limit even without any output tokens. "
            "Please reduce the length of the input prompt."
        )


def test_endless_text_is_read_no_further_than_the_context(
    short: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    encode = Processor._encode_plain

    def note(self: Processor, text: str) -> list[int]:
        read.append(len(text))
        return encode(self, text)

    monkeypatch.setattr("engine.processor.PIECE_CHARACTERS", 40)
    monkeypatch.setattr(Processor, "_encode_plain", note)
    endless = "x" * 100_000
    (asked,) = short.generate(endless, GREEDY, use_tqdm=False)
    (chatted,) = short.chat([{"role": "user", "content": endless}], GREEDY, use_tqdm=False)
    (answered,) = short.generate("x" * 50, GREEDY, use_tqdm=False)

    for result in (asked, chatted):
        assert result.error is not None
        assert ("prompt_too_long", "input_tokens") == (result.error.code, result.error.param)
        assert "your prompt contains at least 72 input tokens" in result.error.message
    assert [40] * 6 + [40, 10] == read
    assert answered.error is None


def test_text_and_pictures_together_may_be_too_long(short: LLM) -> None:
    prompt = {"prompt": "x" * 38 + PICTURE, "multi_modal_data": {"image": draw(1, 224, 224)}}
    results = short.generate([prompt, "Good."], GREEDY, use_tqdm=False)
    error = error_of(results[:1])

    assert results[1].error is None
    assert error.startswith(
        "The decoder prompt (length 104) is longer than the maximum model length of 64. Make sure "
        "that `max_model_len` is no smaller than the number of text tokens plus multimodal tokens. "
        "For image inputs, the number of image tokens depends on the number of images, and "
        "possibly their aspect ratios as well."
    )
    assert "40 text tokens and 64 image tokens" in error


def test_size_that_a_too_long_prompt_is_told_to_use_fits(tiny_folder: Path) -> None:
    llm = LLM(str(tiny_folder), max_model_len=64, limit_mm_per_prompt={"image": 3, "video": 1})
    sizes = [(224, 224), (150, 90), (60, 220)]
    for num_letters in range(0, 50, 7):
        prompt = {
            "prompt": "x" * num_letters + PICTURE * len(sizes),
            "multi_modal_data": {"image": [draw(1, *size) for size in sizes]},
        }
        error = error_of(llm.generate(prompt, GREEDY, use_tqdm=False))
        (advice,) = re.findall(r"max_pixels=(\d+) or less", error)
        smaller = {**prompt, "mm_processor_kwargs": {"max_pixels": int(advice)}}

        assert texts(llm.generate(smaller, GREEDY, use_tqdm=False))


def test_prompt_of_exactly_the_context_leaves_no_room_for_an_answer(short: LLM) -> None:
    results = short.generate(["x" * 64, "x" * 63], GREEDY, use_tqdm=False)

    assert error_of(results[:1]).startswith(
        "The decoder prompt (length 64) plus the number of requested output tokens (at least 1) is "
        "longer than the maximum model length of 64. Make sure that `max_model_len` is no smaller "
        "than the number of text tokens (prompt + requested output tokens)."
    )
    assert 1 == len(results[1].outputs[0].token_ids)
    assert "length" == results[1].outputs[0].finish_reason


def test_max_tokens_over_the_context_is_refused_and_one_over_the_rest_is_cut(short: LLM) -> None:
    wanted = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (65, 64)]
    results = short.generate(["x" * 60] * 2, wanted, use_tqdm=False)

    assert error_of(results[:1]).startswith(
        "max_tokens=65 cannot be greater than max_model_len=64. Please request fewer output tokens."
    )
    assert 4 == len(results[1].outputs[0].token_ids)


def test_max_tokens_none_means_what_is_left(short: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    (result,) = short.generate("x" * 40, params, use_tqdm=False)

    assert 24 == len(result.outputs[0].token_ids)
    assert () == tuple(result.flags)


def test_no_size_makes_the_engine_allocate_it_before_it_is_refused(llm: LLM) -> None:
    prompt = {
        "prompt": PICTURE,
        "multi_modal_data": {"image": draw(1)},
        "mm_processor_kwargs": {"min_pixels": 10**14},
    }

    assert "is longer than the maximum model length" in error_of(
        llm.generate(prompt, GREEDY, use_tqdm=False)
    )


# --- what stands in a prompt ------------------------------------------------------------------------


def test_missing_placeholder_is_told_by_number(llm: LLM) -> None:
    prompt = {"prompt": PICTURE + "?", "multi_modal_data": {"image": [draw(1), draw(2)]}}

    assert error_of(llm.generate(prompt, GREEDY, use_tqdm=False)).startswith(
        "Expected there to be 2 prompt updates corresponding to 2 image items, but instead found 1 "
        "prompt updates! This prompt has 2 image(s) and 1 placeholder(s) `<|image_pad|>`"
    )


def test_placeholder_without_a_picture_is_told(llm: LLM) -> None:
    for prompt in (
        PICTURE + "?",
        {"prompt": PICTURE * 2, "multi_modal_data": {"image": draw(1)}},
        {"prompt_token_ids": llm.get_tokenizer()(PICTURE)["input_ids"]},
    ):
        error = error_of(llm.generate(prompt, GREEDY, use_tqdm=False))

        assert error.startswith(
            "Found more '<|image_pad|>' placeholders in input prompt than actual multimodal data "
            "items."
        )


def test_picture_does_not_take_the_place_of_a_clip(llm: LLM) -> None:
    prompt = {"prompt": "<|video_pad|>", "multi_modal_data": {"image": draw(1)}}

    assert "found 0 prompt updates" in error_of(llm.generate(prompt, GREEDY, use_tqdm=False))


@pytest.mark.parametrize(
    ("prompt", "code", "start"),
    [
        (None, "bad_prompt", "prompt is a NoneType."),
        (3.5, "bad_prompt", "prompt is a float."),
        ("", "empty_prompt", "The decoder prompt cannot be empty."),
        ({"prompt": ""}, "empty_prompt", "The decoder prompt cannot be empty."),
        ({"prompt_token_ids": []}, "empty_prompt", "The decoder prompt cannot be empty."),
        ([[]], "empty_prompt", "The decoder prompt cannot be empty."),
        ({"promt": "x"}, "bad_prompt", "prompt has an unknown key 'promt'."),
        ({"prompt_token_ids": "text"}, "bad_prompt", "prompt_token_ids is a str that holds no"),
        ({"prompt_token_ids": np.zeros(3)}, "bad_prompt", "prompt_token_ids is a ndarray that"),
        ({"prompt_token_ids": np.zeros(0)}, "empty_prompt", "The decoder prompt cannot be empty."),
        ({"prompt_token_ids": [5, -1]}, "bad_prompt", "prompt_token_ids holds the token id -1."),
        ([[5, 10**6]], "bad_prompt", "prompt_token_ids holds the token id 1000000."),
        ({"prompt": "half \ud83d"}, "bad_prompt", "prompt holds half of a surrogate pair."),
        (
            {"prompt": "x", "multi_modal_data": {"audio": [0.1]}},
            "unsupported_modality",
            "Unsupported modality: audio.",
        ),
        ({"prompt": "x", "multi_modal_data": [1]}, "bad_prompt", "multi_modal_data is a list."),
        (
            {"prompt": PICTURE, "multi_modal_data": {"image": b"no picture"}},
            "image_unreadable",
            "Failed to load image: ",
        ),
        (
            {"prompt": PICTURE, "multi_modal_data": {"image": "cat.jpg"}},
            "bad_prompt",
            "multi_modal_data['image'] holds a str.",
        ),
        (
            {"prompt": PICTURE, "multi_modal_data": {"image": lambda: 7}},
            "bad_prompt",
            "image came as a int.",
        ),
        (
            {"prompt": PICTURE, "multi_modal_data": {"image": np.zeros((4, 4, 3))}},
            "image_values_not_supported",
            "Failed to load image: float64 does not say which value is white.",
        ),
        (
            {"prompt": PICTURE, "multi_modal_data": {"image": np.zeros((2, 900, 3), np.uint8)}},
            "image_too_narrow",
            "Image dimensions 900x2: one side is over 200 times the other",
        ),
        (
            {"prompt": "x", "mm_processor_kwargs": {"num_crops": 4}},
            "bad_prompt",
            "num_crops is not for this model. Use min_pixels and max_pixels, or leave it out.",
        ),
        ({"prompt": "x", "mm_processor_kwargs": 4}, "bad_prompt", "mm_processor_kwargs"),
        (
            {"prompt": "x", "media_io_kwargs": {"image": {"image_mode": "L"}}},
            "bad_prompt",
            "media_io_kwargs['image'] has the key \"image_mode\"",
        ),
        (
            {"prompt": PICTURE, "multi_modal_uuids": {"image": ["sku-1"]}},
            "media_not_given",
            "Cache miss for image at index 0 but data is not provided.",
        ),
        (
            {"prompt": PICTURE, "multi_modal_data": {"image": [draw(1), None]}},
            "media_not_given",
            "Cache miss for image at index 1 but data is not provided.",
        ),
        (
            {"prompt": CLIP, "multi_modal_data": {"video": [None]}},
            "media_not_given",
            "Cache miss for video at index 0 but data is not provided.",
        ),
    ],
)
def test_bad_prompt_is_told_what_is_wrong(llm: LLM, prompt: Any, code: str, start: str) -> None:
    bad, good = llm.generate([prompt[0] if isinstance(prompt, list) else prompt, "x"], GREEDY)

    assert error_of([bad]).startswith(start)
    assert bad.error is not None
    assert code == bad.error.code
    assert not bad.error.retryable
    assert good.error is None


def test_parameters_of_another_type_are_told(llm: LLM) -> None:
    params: Any = {"temperature": 0}
    bad, good = llm.generate(["a", "b"], [params, GREEDY], use_tqdm=False)

    assert error_of([bad]).startswith("sampling_params is a dict.")
    assert good.error is None


def test_ids_that_may_all_not_be_chosen_are_told(llm: LLM) -> None:
    (end,) = llm.engine.checkpoint.eos_token_ids[:1]
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 3, "min_tokens": 2}
    allowed = SamplingParams(allowed_token_ids=[end, 65], **options)
    nothing = SamplingParams(allowed_token_ids=[end], **options)
    stops = SamplingParams(allowed_token_ids=[65], stop_token_ids=[65], ignore_eos=True, **options)
    good, *bad = llm.generate(["a"] * 3, [allowed, nothing, stops], use_tqdm=False)

    assert [("nothing_allowed", False)] * 2 == [
        (result.error.code, result.error.retryable) for result in bad if result.error
    ]
    assert good.error is None


def test_token_ids_outside_the_vocabulary_are_told(llm: LLM) -> None:
    params = SamplingParams(stop_token_ids=[10**6])

    assert "below the vocabulary size of 272" in error_of(llm.generate("a", params))


@pytest.mark.parametrize(
    ("image", "start"),
    [
        (
            torch.zeros(1, 9, 63),
            "Image embedding hidden dimension mismatch: got 63, but model expects 64. Embedding "
            "shape: (1, 9, 63).",
        ),
        # One picture as a tensor, channels first: the usual trap, and its way out.
        (torch.zeros(3, 56, 84), "Image embedding hidden dimension mismatch: got 84, but"),
        (
            {"image_embeds": torch.zeros(9, 64)},
            "The data should contain the fields: {'image_embeds', 'image_grid_thw'}, but only found "
            "the following keys: {'image_embeds'}",
        ),
        (
            {"image_embeds": torch.zeros(9, 64), "image_grid_thw": torch.tensor([[1, 6, 8]])},
            "image_grid_thw stands for 12 tokens, but image_embeds has 9.",
        ),
        (
            {"image_embeds": torch.zeros(9, 64), "image_grid_thw": torch.tensor([[1, 3, 12]])},
            "image_grid_thw must hold times, rows and columns of 1 or more, rows and columns even",
        ),
        (
            {"image_embeds": torch.zeros(9, 64), "image_grid_thw": torch.tensor([1, 6, 6])},
            "image_embeds must be (total tokens, hidden) and image_grid_thw (pictures, 3)",
        ),
        (
            {"image_embeds": "features", "image_grid_thw": [[1, 6, 6]]},
            "image_embeds and image_grid_thw must be tensors",
        ),
        (
            {"image_embeds": torch.zeros(9, 64), "image_grid_thw": [[1, 6], [2]]},
            "image_embeds and image_grid_thw must be tensors",
        ),
        (
            {"image_embeds": torch.zeros(9, 64), "image_grid_thw": [[1, torch.nan, 6]]},
            "image_grid_thw must hold whole numbers, got torch.float32.",
        ),
        (torch.full((1, 9, 64), torch.nan), "Image embeddings must be finite"),
        (torch.zeros(1, 9, 64, dtype=torch.int64), "Image embeddings must be finite floating"),
        (torch.zeros(1, 9, 64).to_sparse(), "Image embeddings must be dense"),
        ([torch.zeros(0, 64)], "Image embeddings must be dense"),
    ],
)
def test_embeddings_that_do_not_fit_are_told(llm: LLM, image: Any, start: str) -> None:
    prompt = {"prompt": PICTURE, "multi_modal_data": {"image": image}}
    count = 3 if isinstance(image, torch.Tensor) and len(image) == 3 else 1
    prompt["prompt"] = PICTURE * count
    results = llm.generate(prompt, GREEDY, use_tqdm=False)

    assert error_of(results).startswith(start)
    assert results[0].error is not None
    assert "bad_embeddings" == results[0].error.code


def test_trap_of_one_picture_as_a_tensor_names_its_way_out(llm: LLM) -> None:
    picture = torch.from_numpy(np.moveaxis(np.asarray(draw(1, 64, 80)), -1, 0).copy())
    trapped = {"prompt": PICTURE * 3, "multi_modal_data": {"image": picture.float()}}
    mended = {"prompt": PICTURE, "multi_modal_data": {"image": [picture]}}

    # 64 pixels wide: the last axis is the hidden size by chance, and only the rest can tell.
    assert llm.generate(trapped, GREEDY, use_tqdm=False)[0].images[0].kind == "embeds"
    assert texts(llm.generate(mended, GREEDY, use_tqdm=False))
    trapped["multi_modal_data"] = {"image": picture.float()[..., :60]}
    assert "put it into a list" in error_of(llm.generate(trapped, GREEDY, use_tqdm=False))


# --- the constructor --------------------------------------------------------------------------------


def build(folder: Path, words: dict[str, Any]) -> LLM:
    return LLM(str(folder), **words)


def test_unknown_word_is_a_type_error_that_names_the_nearest(tiny_folder: Path) -> None:
    for word, nearest in (
        ("max_model_length", "max_model_len"),
        ("limit_mm_per_promt", "limit_mm_per_prompt"),
        ("enforce_eagre", "enforce_eager"),
    ):
        with pytest.raises(TypeError, match=f"{word}.*Did you mean {nearest}"):
            build(tiny_folder, {word: 1})
    with pytest.raises(TypeError, match=r"'zzz'\.$"):
        build(tiny_folder, {"zzz": 1})


def test_words_of_vllm_that_have_no_use_are_said_once(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words: dict[str, Any] = {
        "tokenizer_mode": "auto",
        "allowed_local_media_path": "",
        "allowed_media_domains": None,
        "enable_mm_embeds": True,
        "hf_overrides": None,
        "swap_space": 4,
        "disable_log_stats": True,
        "tokenizer_revision": None,
        "generation_config": "auto",
        "max_logprobs": 20,
        "download_dir": None,
        "enable_lora": False,
    }
    with caplog.at_level(logging.WARNING, logger="engine"):
        llm = build(tiny_folder, words)
        llm.generate("a", GREEDY, use_tqdm=False)
    said = [record.getMessage() for record in caplog.records]

    for word in words:
        assert 1 == sum(f"name={word}:" in message for message in said)


def test_all_of_vllms_usual_words_are_taken(tiny_folder: Path) -> None:
    llm = LLM(
        model=str(tiny_folder),
        tokenizer=str(tiny_folder),
        trust_remote_code=False,
        dtype="auto",
        revision=None,
        seed=None,
        gpu_memory_utilization=0.92,
        kv_cache_memory_bytes=1 << 24,
        max_model_len=512,
        max_num_seqs=8,
        max_num_batched_tokens=1024,
        limit_mm_per_prompt={"image": {"count": 2, "width": 512, "height": 512}, "video": 0},
        mm_processor_kwargs={"min_pixels": 3136, "max_pixels": 12544},
        tensor_parallel_size=1,
        quantization=None,
    )
    by_dtype = LLM(str(tiny_folder), dtype=torch.bfloat16)  # type: ignore[arg-type]

    assert 512 == llm.engine.checkpoint.max_model_len
    assert torch.bfloat16 == by_dtype.engine.checkpoint.dtype
    assert texts(by_dtype.generate("a", GREEDY, use_tqdm=False))


def test_fp8_answers_with_another_rounding(tiny_folder: Path) -> None:
    """On a CPU it computes what a GPU would; every layer takes part."""
    with LLM(str(tiny_folder), quantization="fp8") as llm:
        (output,) = llm.generate("a", GREEDY, use_tqdm=False)
        runner: Any = llm.engine._runner

        assert output.outputs[0].token_ids
        layers = runner._text.layers
        assert all(isinstance(layer.mlp.down, Fp8Linear) for layer in layers)


def test_rows_in_fp8_take_less_and_answer_alike_however_they_are_read(tiny_folder: Path) -> None:
    """Whole prompts read back what pieces and later prompts would: the same numbers, not better ones."""
    prompts = [f"{PICTURE}{'and so on ' * 9}{n}" for n in range(3)]
    asked = [{"prompt": p, "multi_modal_data": {"image": draw(1, 200, 150)}} for p in prompts]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=1)

    def numbers(llm: LLM) -> list[list[Any]]:
        outputs = llm.generate(asked, params, use_tqdm=False)
        return [
            [
                (token, pytest.approx(found.logprob, abs=1e-4))
                for step in output.outputs[0].logprobs or ()
                for token, found in step.items()
            ]
            for output in outputs
        ]

    with LLM(str(tiny_folder)) as llm:
        exact, row_bytes = numbers(llm), llm.engine.checkpoint.kv_shape.row_bytes
    with LLM(str(tiny_folder), kv_cache_dtype="fp8") as llm:
        whole = numbers(llm)
        with keeping_prefixes(llm):
            with in_pieces(llm):
                pieces = numbers(llm)
            kept = numbers(llm)

        assert row_bytes == 4 * llm.engine.checkpoint.kv_shape.row_bytes
    assert whole == pieces == kept
    assert whole != exact


@pytest.mark.parametrize(
    ("dtype", "capability", "why"),
    [
        ("float16", (9, 0), r"needs dtype bfloat16 on a GPU, not float16\. Give dtype="),
        ("bfloat16", (8, 0), r"needs a GPU of compute capability 8\.9 or later \(Ada, Hopper\)\. "),
    ],
)
def test_fp8_that_a_gpu_cannot_do_is_refused_with_the_reason(
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    capability: tuple[int, int],
    why: str,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
    with pytest.raises(BadConfig, match=rf"^quantization='fp8' {why}"):
        LLM(str(tiny_folder), device="cuda", dtype=dtype, quantization="fp8")


def test_rows_in_fp8_that_a_gpu_cannot_read_are_refused(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (8, 0))
    with pytest.raises(BadConfig, match=r"^kv_cache_dtype='fp8' needs a GPU of compute.* 8\.9"):
        LLM(str(tiny_folder), device="cuda", kv_cache_dtype="fp8")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("engine.checkpoint.MAX_KERNEL_DIM", 4)
    with pytest.raises(BadConfig, match=r"^kv_cache_dtype='fp8' is not supported .* wider than 4"):
        LLM(str(tiny_folder), device="cuda", kv_cache_dtype="fp8")


def test_another_gpu_than_the_first_is_chosen_outside(tiny_folder: Path) -> None:
    with pytest.raises(BadConfig, match=r"^device='cuda:1' is not supported.*CUDA_VISIBLE_DEVICES"):
        LLM(str(tiny_folder), device="cuda:1")


def test_what_merged_layers_left_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch keeps the blocks of freed weights; a driver says that they are in use."""
    config = SimpleNamespace(
        num_hidden_layers=1, num_key_value_heads=1, hidden_size=8, num_attention_heads=1
    )
    checkpoint: Any = SimpleNamespace(
        kv_shape=KVShape.of(config, torch.float32),
        device=torch.device("cuda"),
    )
    free = [10_000]
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: free.append(70_000))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (free[-1], 100_000))
    rows = num_kv_rows(checkpoint, least=16, most=9999, kv_bytes=None, utilization=0.9)

    assert (70_000 - 10_000 - 10_000) // 64 == rows


def test_what_is_not_supported_is_refused(llm: LLM, tiny_folder: Path) -> None:
    lora: Any = object()
    with pytest.raises(BadConfig, match=r"^tensor_parallel_size must be 1"):
        LLM(str(tiny_folder), tensor_parallel_size=2)
    with pytest.raises(BadPrompt, match=r"^lora_request is not supported.* merge_and_unload"):
        llm.generate("a", lora_request=lora)
    with pytest.raises(BadPrompt, match=r"^lora_request is not supported.* merge_and_unload"):
        llm.chat([{"role": "user", "content": "a"}], lora_request=lora)
    with pytest.raises(BadPrompt, match=r"^tools is not supported"):
        llm.chat([{"role": "user", "content": "a"}], tools=lora)
    with pytest.raises(BadPrompt, match=r"^tokenization_kwargs is not supported"):
        llm.generate("a", tokenization_kwargs={"truncate_prompt_tokens": 3})
    with pytest.raises(BadConfig, match=r"^kv_cache_dtype must be one of auto, fp8, .* 'fp8_e5m2'"):
        build(tiny_folder, {"kv_cache_dtype": "fp8_e5m2"})
    with pytest.raises(BadConfig, match=r"^quantization must be None or 'fp8', got 'awq'"):
        build(tiny_folder, {"quantization": "awq"})
    for word, value in (
        ("hf_overrides", {"rope_theta": 1}),
        ("enable_lora", True),
        ("default_mm_loras", {"image": "a"}),
        ("lora_modules", ["a=b"]),
    ):
        with pytest.raises(BadConfig, match=rf"^{word} is not supported") as caught:
            build(tiny_folder, {word: value})
        assert ("merge_and_unload" in str(caught.value)) == ("lora" in word)


def test_words_that_ask_for_nothing_are_taken(llm: LLM) -> None:
    llm.reset_mm_cache()
    message = [{"role": "user", "content": "a"}]

    assert texts(llm.generate("a", GREEDY, use_tqdm=False, tokenization_kwargs={}))
    assert texts(llm.chat(message, GREEDY, use_tqdm=False, tokenization_kwargs=None))


# --- the bar ----------------------------------------------------------------------------------------


class Bar:
    """What is used of a tqdm bar."""

    def __init__(self, bars: "list[Bar]", *, total: int, desc: str) -> None:
        self.total, self.desc = total, desc
        self.num_done = 0
        self.is_closed = False
        bars.append(self)

    def update(self, count: int) -> None:
        self.num_done += count

    def close(self) -> None:
        self.is_closed = True


def test_bar_counts_every_prompt_once(llm: LLM) -> None:
    bars: list[Bar] = []

    def make_bar(**options: Any) -> Bar:
        return Bar(bars, **options)

    llm.generate(["a", 3.5, "c"], GREEDY, use_tqdm=make_bar)
    llm.chat([{"role": "user", "content": "a"}], GREEDY, use_tqdm=make_bar)

    assert [(3, "Processed prompts"), (1, "Processed prompts")] == [
        (bar.total, bar.desc) for bar in bars
    ]
    assert [3, 1] == [bar.num_done for bar in bars]
    assert all(bar.is_closed for bar in bars)


def test_bar_is_shown_unless_it_is_switched_off(
    llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    without = capsys.readouterr()
    llm.generate(["a", "b"], GREEDY)
    shown = capsys.readouterr()

    assert ("", "") == without
    assert "Processed prompts: 100%" in shown.err


# --- sampling through the whole engine ---------------------------------------------------------------


def ask(llm: LLM, prompt: Any, **params: Any) -> Result:
    (result,) = llm.generate(prompt, SamplingParams(**params), use_tqdm=False)
    assert result.error is None
    return result


def test_n_outputs_are_numbered_and_differ(llm: LLM) -> None:
    prompt = {"prompt": PICTURE + "?", "multi_modal_data": {"image": draw(1)}}
    result = ask(llm, prompt, n=4, temperature=1.5, seed=3, max_tokens=8, ignore_eos=True)
    ids = [tuple(output.token_ids) for output in result.outputs]

    assert [0, 1, 2, 3] == [output.index for output in result.outputs]
    assert 4 == len(set(ids))
    assert 32 == result.metrics.num_generation_tokens


@pytest.mark.parametrize("max_num_seqs", [3, 256])
def test_picture_of_many_outputs_is_encoded_once(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, max_num_seqs: int
) -> None:
    llm = LLM(str(tiny_folder), max_num_seqs=max_num_seqs, encoder_cache_bytes=0)
    family = llm.engine.checkpoint.family
    encode, num_encoded = family.encode, 0

    def count(visuals: Any) -> Any:
        nonlocal num_encoded
        num_encoded += len(visuals)
        return encode(visuals)

    prompt = {"prompt": PICTURE + "?", "multi_modal_data": {"image": draw(1)}}
    params = {"n": 8, "temperature": 1.5, "seed": 3, "max_tokens": 8, "ignore_eos": True}
    expected = ask(llm, prompt, **params)
    monkeypatch.setattr(type(family), "encode", staticmethod(count))
    result = ask(llm, prompt, **params)

    assert 1 == num_encoded
    assert expected.outputs == result.outputs
    assert expected.outputs[0].token_ids != expected.outputs[7].token_ids


def test_ids_are_lists_as_vllm_has_them(llm: LLM) -> None:
    (bad,) = llm.generate([3.5], GREEDY, use_tqdm=False)
    result = ask(llm, "x", temperature=0, max_tokens=3, logprobs=1)

    assert list is type(result.prompt_token_ids) is type(result.outputs[0].token_ids)
    assert list is type(result.outputs[0].logprobs)
    assert [] == bad.outputs[0].token_ids


def test_seed_repeats_whatever_the_neighbours_and_the_order(llm: LLM) -> None:
    seeded = SamplingParams(temperature=1.2, seed=11, max_tokens=10, ignore_eos=True)
    free = SamplingParams(temperature=1.2, max_tokens=7, ignore_eos=True)
    (alone,) = token_ids(llm.generate("Draw.", seeded, use_tqdm=False))
    prompts = [f"Neighbour {number}" for number in range(9)]
    for place in (0, 4, 9):
        among = [*prompts[:place], "Draw.", *prompts[place:]]
        params = [seeded if prompt == "Draw." else free for prompt in among]

        assert alone == token_ids(llm.generate(among, params, use_tqdm=False))[place]


def test_requests_without_a_seed_differ_and_the_stamp_names_theirs(llm: LLM) -> None:
    params = SamplingParams(temperature=1.5, max_tokens=10, ignore_eos=True)
    results = llm.generate(["Draw."] * 3, params, use_tqdm=False)
    (stamp,) = [result.stamp for result in results[1:2]]
    assert stamp is not None
    again = ask(llm, "Draw.", temperature=1.5, max_tokens=10, ignore_eos=True, seed=stamp.seed)

    assert 3 == len({tuple(ids) for ids in token_ids(results)})
    assert token_ids(results[1:2]) == token_ids([again])


@pytest.mark.parametrize("seed", [0, 2**40, 2**80, -7, None])
def test_stamp_of_any_engine_seed_can_be_asked_again(tiny_folder: Path, seed: int | None) -> None:
    params = SamplingParams(temperature=1.5, max_tokens=10, ignore_eos=True)
    with LLM(str(tiny_folder), seed=seed) as llm:
        results = llm.generate(["Draw."] * 4, params, use_tqdm=False)
        stamps = [result.stamp.seed for result in results if result.stamp]
        again = [replace(params, seed=stamp) for stamp in stamps]

        assert token_ids(results) == token_ids(llm.generate(["Draw."] * 4, again, use_tqdm=False))
    assert 4 == len(set(stamps))
    assert all(stamp is not None and 2**20 < stamp < 2**63 for stamp in stamps)


def test_engine_without_a_seed_draws_anew(tiny_folder: Path) -> None:
    def draw_once(seed: int | None) -> list[list[int]]:
        with LLM(str(tiny_folder), seed=seed) as llm:
            params = SamplingParams(temperature=1.5, max_tokens=20, ignore_eos=True)
            return token_ids(llm.generate("Draw.", params, use_tqdm=False))

    assert draw_once(0) == draw_once(0)
    assert draw_once(None) != draw_once(None)


def test_stop_string_is_found_across_the_borders_of_tokens(llm: LLM) -> None:
    options = {"temperature": 0, "max_tokens": 60, "ignore_eos": True}
    whole = ask(llm, "Go on and on.", **options).outputs[0].text
    stop = next(
        whole[at : at + 3]
        for at in range(5, len(whole) - 3)
        if whole[at : at + 3].isprintable() and "\ufffd" not in whole[at : at + 3]
    )
    cut = ask(llm, "Go on and on.", stop=["never there", stop], **options).outputs[0]
    kept = ask(llm, "Go on and on.", stop=stop, include_stop_str_in_output=True, **options)

    assert len(stop) == 3
    assert ("stop", stop) == (cut.finish_reason, cut.stop_reason)
    assert whole[: whole.index(stop)] == cut.text
    assert whole[: whole.index(stop) + 3] == kept.outputs[0].text


def test_stop_ids_end_the_output_and_are_named(llm: LLM) -> None:
    ids = list(
        ask(llm, "Stop.", temperature=0, max_tokens=20, ignore_eos=True).outputs[0].token_ids
    )
    stopped = ask(
        llm, "Stop.", temperature=0, max_tokens=20, ignore_eos=True, stop_token_ids=[ids[6]]
    ).outputs[0]
    first = ids.index(ids[6])

    assert ids[: first + 1] == list(stopped.token_ids)
    assert ("stop", ids[6]) == (stopped.finish_reason, stopped.stop_reason)


@pytest.fixture
def ends_early(llm: LLM) -> Callable[..., Result]:
    """Ask with a bias that makes the end of the text the likeliest token everywhere."""
    end = llm.engine.checkpoint.eos_token_ids[0]

    def ask_with_bias(**params: Any) -> Result:
        return ask(llm, "End.", temperature=0, logit_bias={end: 100}, **params)

    return ask_with_bias


def test_text_ends_with_the_models_end(ends_early: Callable[..., Result]) -> None:
    output = ends_early(max_tokens=9).outputs[0]

    assert ("", "stop", None) == (output.text, output.finish_reason, output.stop_reason)
    assert 1 == len(output.token_ids)


def test_min_tokens_and_ignore_eos_put_the_end_off(ends_early: Callable[..., Result]) -> None:
    late = ends_early(max_tokens=9, min_tokens=5).outputs[0]
    never = ends_early(max_tokens=9, ignore_eos=True).outputs[0]

    assert (6, "stop") == (len(late.token_ids), late.finish_reason)
    assert (9, "length") == (len(never.token_ids), never.finish_reason)


def test_cut_and_empty_texts_are_flagged(llm: LLM, ends_early: Callable[..., Result]) -> None:
    cut = ask(llm, "x", temperature=0, ignore_eos=True)
    chosen = ask(llm, "x", temperature=0, ignore_eos=True, max_tokens=16)
    looping = ask(
        llm,
        "x",
        temperature=0,
        allowed_token_ids=[65],
        max_tokens=40,
        repetition_detection={"max_pattern_size": 2, "min_count": 5},
    )

    assert ["cut_off"] == list(cut.flags)
    assert [] == list(chosen.flags)
    assert ["empty"] == list(ends_early(max_tokens=4).flags)
    assert ["looping"] == list(looping.flags)
    assert "repetition" == looping.outputs[0].finish_reason


def test_cut_text_is_told_once_in_the_log(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    llm = LLM(str(tiny_folder))
    for _ in range(3):
        ask(llm, "x", temperature=0, ignore_eos=True)
        ask(llm, "x", temperature=0, ignore_eos=True, max_tokens=3)
    told = [r.getMessage() for r in caplog.records if "text_cut_off" in r.getMessage()]

    assert [
        "text_cut_off max_tokens=16: it was not given, and the text went on; give max_tokens"
    ] == (told)


def test_penalties_change_what_is_said(llm: LLM) -> None:
    plain = ask(llm, "aaaa", temperature=0, max_tokens=40, ignore_eos=True)
    for penalty in ({"repetition_penalty": 5.0}, {"frequency_penalty": 2.0}):
        other = ask(llm, "aaaa", temperature=0, max_tokens=40, ignore_eos=True, **penalty)
        ids = list(other.outputs[0].token_ids)

        assert ids != list(plain.outputs[0].token_ids)
    assert len(set(ids)) > len(set(plain.outputs[0].token_ids)) // 2


def test_logprobs_are_those_of_a_forward_pass_over_the_whole_text(
    llm: LLM, tiny_folder: Path
) -> None:
    from engine.reference import Reference
    from media.images import from_pil

    image, prompt = draw(5, 120, 90), f"Look: {PICTURE}"
    form = {"prompt": prompt, "multi_modal_data": {"image": image}}
    results = [
        ask(llm, form, max_tokens=10, ignore_eos=True, logprobs=3, **params)
        for params in ({"temperature": 0.0}, {"temperature": 1.3, "seed": 5})
    ]
    reference = Reference(tiny_folder)
    for result in results:
        output = result.outputs[0]
        ids = list(output.token_ids)
        expected = reference.logprobs(prompt, [from_pil(image)], [], ids)
        assert output.logprobs is not None
        chosen = [found[i].logprob for found, i in zip(output.logprobs, ids, strict=True)]

        torch.testing.assert_close(
            torch.tensor(chosen), expected[range(10), ids], atol=1e-4, rtol=0
        )
        assert sum(chosen) == pytest.approx(output.cumulative_logprob, abs=1e-6)
        for found, row in zip(output.logprobs, expected, strict=True):
            top = row.topk(3).indices.tolist()
            assert set(top) <= set(found)
            assert [1, 2, 3] == [found[i].rank for i in top]


def test_no_logprobs_where_none_were_asked_for(llm: LLM) -> None:
    output = ask(llm, "x", temperature=0, max_tokens=3).outputs[0]

    assert output.logprobs is None
    assert output.cumulative_logprob is None


def test_metrics_tell_the_way_of_a_request(llm: LLM) -> None:
    metrics = ask(llm, "x", temperature=0, max_tokens=5, ignore_eos=True).metrics
    times = [
        metrics.queued_ts,
        metrics.scheduled_ts,
        metrics.first_token_ts,
        metrics.last_token_ts,
    ]

    assert None not in times
    assert metrics.preprocess_ms is not None
    assert metrics.preprocess_wait_ms is not None  # nothing else was there to do
    assert metrics.preprocess_wait_ms > 0
    assert times == sorted(times, key=lambda time: time or 0.0)
    assert 5 == metrics.num_generation_tokens
    assert metrics.arrival_time is not None
    for taken in (metrics.first_token_latency, metrics.prefill_ms, metrics.decode_ms):
        assert taken is not None
        assert taken > 0
