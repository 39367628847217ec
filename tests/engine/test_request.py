"""What goes in and comes out: vLLM's names and defaults, checked values, and errors that say what to do."""

import copy
import dataclasses
import inspect
import logging
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import errors
from engine.errors import (
    BadEmbeddings,
    BadPrompt,
    BadSamplingParams,
    EmptyPrompt,
    EngineError,
    EngineFailure,
    Fault,
    ImageTooNarrow,
    MaxTokensTooLarge,
    MediaRefused,
    NoChatTemplate,
    PlaceholderMismatch,
    PromptTooLong,
    RequestError,
    ResultError,
    TooManyImages,
    TooManyVideos,
    UnsupportedModality,
    UnsupportedPart,
    to_result_error,
)
from engine.request import (
    CompletionOutput,
    FinishReason,
    Flag,
    ImageUsed,
    Metrics,
    RepetitionDetectionParams,
    RequestOutput,
    Result,
    SamplingParams,
    Stamp,
    find_flags,
)

# Sampling parameters


def test_defaults_are_those_of_vllm() -> None:
    expected = {
        "n": 1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None,
        "ignore_eos": False,
        "max_tokens": 16,
        "min_tokens": 0,
        "logprobs": None,
        "prompt_logprobs": None,
        "detokenize": True,
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "include_stop_str_in_output": False,
    }

    params = SamplingParams()

    assert expected == {name: getattr(params, name) for name in expected}
    assert ((), ()) == (params.stop_strings, params.stop_token_ids)


def test_default_max_tokens_is_known_as_never_given_even_in_copies() -> None:
    params = SamplingParams()

    copies = [
        params,
        params.clone(),
        copy.copy(params),
        pickle.loads(pickle.dumps(params)),  # noqa: S301 - our own
        dataclasses.replace(params, temperature=0.5),
    ]

    assert [(16, False)] * 5 == [(each.max_tokens, each.max_tokens_given) for each in copies]


@pytest.mark.parametrize("max_tokens", [16, 1, None])
def test_max_tokens_counts_as_given_whatever_its_value(max_tokens: int | None) -> None:
    params = SamplingParams(max_tokens=max_tokens)

    assert (max_tokens, True) == (params.max_tokens, params.max_tokens_given)


def test_values_at_the_limits_are_accepted() -> None:
    params = SamplingParams(
        n=16384,
        presence_penalty=-2,
        frequency_penalty=2,
        repetition_penalty=0.001,
        temperature=2,
        top_p=1e-9,
        top_k=-1,
        min_p=1,
        logprobs=20,
        min_tokens=7,
        max_tokens=7,
        seed=2**64 - 1,
    )

    assert (0, 2.0, 2**64 - 1) == (params.top_k, params.temperature, params.seed)


def test_numbers_of_numpy_become_plain_numbers() -> None:
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3))  # type: ignore[arg-type]

    assert (float, int) == (type(params.temperature), type(params.top_k))


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("n", 0, "n must be in [1, 16384], got 0."),
        ("n", 16385, "n must be in [1, 16384], got 16385."),
        ("n", 1.0, "n must be a whole number, got 1.0."),
        ("temperature", -0.1, "temperature must be in [0, 2], got -0.1."),
        ("temperature", 2.1, "temperature must be in [0, 2], got 2.1."),
        ("temperature", math.nan, "temperature must be a finite number, got nan."),
        ("temperature", math.inf, "temperature must be a finite number, got inf."),
        ("temperature", "0.5", "temperature must be a number, got '0.5'."),
        ("temperature", True, "temperature must be a number, got True."),
        ("temperature", None, "temperature must be a number, got None."),
        ("top_p", 0, "top_p must be over 0 and at most 1, got 0.0."),
        ("top_p", 1.1, "top_p must be over 0 and at most 1, got 1.1."),
        ("top_k", -2, "top_k must be at least -1, got -2."),
        ("top_k", 1.5, "top_k must be a whole number, got 1.5."),
        ("min_p", -0.1, "min_p must be in [0, 1], got -0.1."),
        ("presence_penalty", 2.5, "presence_penalty must be in [-2, 2], got 2.5."),
        ("frequency_penalty", -3, "frequency_penalty must be in [-2, 2], got -3.0."),
        ("repetition_penalty", 0, "repetition_penalty must be over 0, got 0.0."),
        ("repetition_penalty", 1e300, "repetition_penalty must be in [0.001, 1000], got 1e+300."),
        ("repetition_penalty", 1e-9, "repetition_penalty must be in [0.001, 1000], got 1e-09."),
        ("max_tokens", 0, "max_tokens must be at least 1, got 0."),
        ("max_tokens", True, "max_tokens must be a whole number, got True."),
        ("min_tokens", -1, "min_tokens must be at least 0, got -1."),
        ("min_tokens", 17, "min_tokens must be at most max_tokens=16 (the default"),
        ("seed", "7", "seed must be a whole number, got '7'."),
        ("seed", 2**64, "seed must be in ["),
        ("logprobs", 21, "logprobs must be at most 20, or -1 for all, got 21."),
        ("logprobs", True, "logprobs must be a whole number, got True."),
        ("logprob_token_ids", list(range(129)), "logprob_token_ids must be at most 128 ids"),
        ("stop", "", "stop must be strings of at least one character, got ''."),
        ("stop", ["a", 1], "stop must be strings of at least one character, got 1."),
        ("stop", 1, "stop must be a list, got 1."),
        ("stop_token_ids", [-1], "stop_token_ids must be at least 0, got -1."),
        ("stop_token_ids", "12", "stop_token_ids must be a list, got '12'."),
        ("allowed_token_ids", [], "allowed_token_ids must hold at least one token id"),
        ("logit_bias", {"x": 1}, "logit_bias must be a whole number, got 'x'."),
        ("logit_bias", {1: "2"}, "logit_bias must be a number, got '2'."),
        ("logit_bias", [1], "logit_bias must map token ids to numbers, got a list."),
        ("ignore_eos", 1, "ignore_eos must be True or False, got 1."),
        ("repetition_detection", 3, "repetition_detection must be a RepetitionDetectionParams"),
        ("repetition_detection", {"size": 3}, "repetition_detection must have no keys but"),
    ],
)
def test_bad_value_is_refused_with_what_was_given_and_what_is_allowed(
    name: str, value: object, text: str
) -> None:
    kwargs: dict[str, Any] = {name: value}

    with pytest.raises(BadSamplingParams) as caught:
        SamplingParams(**kwargs)

    assert str(caught.value).startswith(text)
    assert name == caught.value.param


@pytest.mark.parametrize(
    ("name", "value"),
    [("prompt_logprobs", 0), ("structured_outputs", {"json": {}}), ("bad_words", ["no"])],
)
def test_what_is_not_supported_yet_is_refused_by_name(name: str, value: object) -> None:
    kwargs: dict[str, Any] = {name: value}

    with pytest.raises(BadSamplingParams, match=f"^{name} is not supported yet"):
        SamplingParams(**kwargs)


def test_empty_list_of_bad_words_forbids_nothing() -> None:
    params = SamplingParams(bad_words=[])

    assert SamplingParams() == params


def test_several_outputs_need_a_temperature() -> None:
    with pytest.raises(BadSamplingParams, match=r"^n must be 1 when using greedy"):
        SamplingParams(n=2, temperature=0)


def test_stop_strings_need_text() -> None:
    with pytest.raises(BadSamplingParams, match="only supported when detokenize is True"):
        SamplingParams(stop="x", detokenize=False)


def test_tiny_temperature_is_raised_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="engine.request"):
        params = SamplingParams(temperature=1e-6)

    assert (0.01, False) == (params.temperature, params.greedy)
    assert ["temperature_raised given=1e-06 used=0.01"] == [r.getMessage() for r in caplog.records]


def test_seed_minus_one_means_no_seed() -> None:
    params = SamplingParams(seed=-1)

    assert params.seed is None


def test_bias_is_clipped_and_its_keys_may_come_from_json() -> None:
    params = SamplingParams(logit_bias={"5": 1000, 6: -1000.0, 7: 1})  # type: ignore[dict-item]

    assert {5: 100.0, 6: -100.0, 7: 1.0} == params.logit_bias


def test_lists_become_tuples_without_repeats() -> None:
    params = SamplingParams(stop=["b", "a", "b"], stop_token_ids=[3, 1, 3], allowed_token_ids=[2])

    assert (("b", "a"), (3, 1), (2,)) == (
        params.stop_strings,
        params.stop_token_ids,
        params.allowed_token_ids,
    )


def test_params_are_frozen_hashable_and_equal_by_value() -> None:
    params = SamplingParams(stop="x", logit_bias={1: 2.0})

    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 3  # type: ignore[misc]

    assert {params} == {params.clone()}


@given(
    temperature=st.floats(0, 2),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(-1, 10**6),
    seed=st.none() | st.integers(-1, 2**64 - 1),
    max_tokens=st.none() | st.integers(1, 10**6),
)
def test_checked_params_pass_their_own_check_unchanged(
    temperature: float, top_p: float, top_k: int, seed: int | None, max_tokens: int | None
) -> None:
    params = SamplingParams(
        temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, max_tokens=max_tokens
    )

    assert params == dataclasses.replace(params)


def test_model_defaults_are_read_and_gaps_keep_ours() -> None:
    config = {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": None,
        "max_new_tokens": 99,
        "eos_token_id": [1, 2],
    }

    params = SamplingParams.from_generation_config(config)

    assert SamplingParams(temperature=0.7, top_k=20, max_tokens=99) == params
    assert not SamplingParams.from_generation_config({}).max_tokens_given


def test_a_model_that_says_not_to_sample_is_greedy_by_default() -> None:
    assert SamplingParams.from_generation_config({"do_sample": False}).greedy
    assert not SamplingParams.from_generation_config({}).greedy


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(stop_token_ids=[100]),
        SamplingParams(allowed_token_ids=[3, 100]),
        SamplingParams(logprob_token_ids=[100]),
        SamplingParams(logit_bias={100: 1.0}),
    ],
)
def test_token_ids_outside_the_vocabulary_are_refused(params: SamplingParams) -> None:
    params.check_vocab(101)

    with pytest.raises(BadSamplingParams, match="below the vocabulary size of 100, got 100"):
        params.check_vocab(100)


# Repetition


def is_repeated(token_ids: list[int], low: int, high: int, count: int) -> bool:
    """The definition, word for word."""
    return any(
        size * count <= len(token_ids)
        and token_ids[-size * count :] == token_ids[len(token_ids) - size :] * count
        for size in range(max(1, low), high + 1)
    )


@given(
    token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=16),
    low=st.integers(0, 3),
    more=st.integers(0, 3),
    count=st.integers(2, 4),
)
def test_repetition_is_found_exactly_where_the_tail_repeats(
    token_ids: list[int], low: int, more: int, count: int
) -> None:
    detection = RepetitionDetectionParams(low + more, low, count)

    found = detection.is_found_in(token_ids)

    assert is_repeated(token_ids, low, low + more, count) == found


def test_repetition_may_be_asked_for_by_a_mapping() -> None:
    params = SamplingParams(
        repetition_detection={"max_pattern_size": 3, "min_count": 2}  # type: ignore[arg-type]
    )

    assert RepetitionDetectionParams(3, 0, 2) == params.repetition_detection


@pytest.mark.parametrize(
    ("sizes", "text"), [((2, 3, 2), "must be at most"), ((2, 1, 1), "at least 2")]
)
def test_senseless_repetition_detection_is_refused(sizes: tuple[int, int, int], text: str) -> None:
    with pytest.raises(BadSamplingParams, match=text):
        RepetitionDetectionParams(*sizes)


# Results


def test_result_has_the_fields_of_vllm_in_their_order_and_then_ours() -> None:
    names = [field.name for field in dataclasses.fields(Result)]

    assert [
        "request_id",
        "prompt",
        "prompt_token_ids",
        "prompt_logprobs",
        "outputs",
        "finished",
        "metrics",
        "lora_request",
        "encoder_prompt",
        "encoder_prompt_token_ids",
        "num_cached_tokens",
        "error",
        "images",
        "stamp",
        "flags",
    ] == names
    assert RequestOutput is Result


def test_output_is_finished_once_it_has_a_reason() -> None:
    growing = CompletionOutput(0, "a", [1])

    ended = dataclasses.replace(growing, finish_reason=FinishReason.STOP)

    assert (False, True) == (growing.finished(), ended.finished())
    assert "stop" == ended.finish_reason


def test_failed_result_has_one_empty_output_and_says_why() -> None:
    image = ImageUsed(0, 640, 480, 616, 476, 374)
    stamp = Stamp("m", None, "float32", "cpu", "0.1.0", {"temperature": 0.0})

    result = Result.failed(
        "7", EngineFailure(), prompt="hi", metrics=Metrics(1.0), images=[image], stamp=stamp
    )

    assert ["error", "", []] == [
        result.outputs[0].finish_reason,
        result.outputs[0].text,
        result.outputs[0].token_ids,
    ]
    assert result.error == ResultError("engine_failure", str(EngineFailure()), retryable=True)
    assert (True, "hi", [image], stamp) == (
        result.finished,
        result.prompt,
        result.images,
        result.stamp,
    )


@pytest.mark.parametrize(
    ("params", "text", "reason", "expected"),
    [
        (SamplingParams(), "a", FinishReason.LENGTH, (Flag.CUT_OFF,)),
        (SamplingParams(max_tokens=16), "a", FinishReason.LENGTH, ()),
        (SamplingParams(), "a", FinishReason.STOP, ()),
        (SamplingParams(), " \n", FinishReason.STOP, (Flag.EMPTY,)),
        (SamplingParams(detokenize=False), "", FinishReason.STOP, ()),
        (SamplingParams(), "aaa", FinishReason.REPETITION, (Flag.LOOPING,)),
    ],
)
def test_cut_empty_and_looping_texts_are_flagged(
    params: SamplingParams, text: str, reason: FinishReason, expected: tuple[Flag, ...]
) -> None:
    output = CompletionOutput(0, text, [1], finish_reason=reason)

    flags = find_flags(params, [output])

    assert expected == flags


# Errors

EXAMPLES: list[EngineError] = [
    EngineFailure(),
    EmptyPrompt(),
    NoChatTemplate(),
    TooManyImages(limit=1, given=3),
    TooManyVideos(limit=0, given=1),
    PromptTooLong(max_model_len=10, num_text_tokens=11),
    MaxTokensTooLarge(max_tokens=20, max_model_len=10, num_prompt_tokens=4),
    BadPrompt("is a float", where="prompts[3]", remedy="Give a str"),
    PlaceholderMismatch(num_items=1, num_placeholders=0, placeholder="<image>"),
    UnsupportedModality("audio"),
    UnsupportedPart("audio_url", ["text", "image_url"]),
    ImageTooNarrow(width=1000, height=1),
    MediaRefused("The video is too large.", code="video_too_large"),
    BadEmbeddings.wrong_width(shape=(1, 4, 8), expected=16),
    BadSamplingParams("top_k must be at least -1, got -2.", param="top_k"),
    errors.BadConfig("max_num_seqs must be at least 1, got 0."),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_error_survives_the_way_out_of_a_worker_process(error: EngineError) -> None:
    copied = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own

    assert (type(error), to_result_error(error)) == (type(copied), to_result_error(copied))


def test_every_error_has_its_own_code() -> None:
    classes = [
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, EngineError) and kind is not MediaRefused
    ]

    codes = {kind.code for kind in classes}

    assert len(classes) == len(codes)


def test_clients_errors_are_value_errors_and_not_retried() -> None:
    clients = [error for error in EXAMPLES if isinstance(error, RequestError)]

    assert {(Fault.CLIENT, False)} == {(error.fault, error.retryable) for error in clients}
    assert all(isinstance(error, ValueError) for error in clients)
    assert (Fault.ENGINE, True) == (EngineFailure().fault, EngineFailure().retryable)


def test_too_many_images_says_vllms_sentence_then_how_many_and_what_to_do() -> None:
    text = (
        "At most 1 image(s) may be provided in one prompt. Set `--limit-mm-per-prompt` to increase "
        'this limit. This prompt has 3; use image=3, or limit_mm_per_prompt={"image": 3} in '
        "Python, or image_policy=truncate, sample or split in a job."
    )

    error = TooManyImages(limit=1, given=3)

    assert text == str(error)
    assert ResultError("too_many_images", text, retryable=False, param="image") == to_result_error(
        error
    )


def test_too_many_videos_says_the_same_of_videos() -> None:
    error = TooManyVideos(limit=1, given=2)

    assert str(error) == (
        "At most 1 video(s) may be provided in one prompt. Set `--limit-mm-per-prompt` to increase "
        'this limit. This prompt has 2; use video=2, or limit_mm_per_prompt={"video": 2} in Python.'
    )


def test_limit_of_zero_says_that_the_modality_is_switched_off() -> None:
    error = TooManyImages(limit=0, given=1)

    assert "image input is switched off here (image=0)" in str(error)


def test_models_own_limit_is_not_said_to_be_a_setting() -> None:
    error = TooManyImages(limit=1, given=2, is_model_limit=True)

    assert str(error).endswith(
        "This prompt has 2, and the model itself takes no more than 1: send fewer, or "
        "image_policy=truncate, sample or split in a job."
    )


@pytest.mark.parametrize(
    ("num_text", "num_image", "start", "end"),
    [
        (
            5000,
            0,
            "This model's maximum context length is 4096 tokens. However, your prompt contains "
            "5000 input tokens, which exceeds this limit even without any output tokens. Please "
            "reduce the length of the input prompt. ",
            "This prompt has 5000 text tokens and 0 image tokens; at most 4095 would fit: shorten "
            "the text.",
        ),
        (
            120,
            5080,
            "The decoder prompt (length 5200) is longer than the maximum model length of 4096. "
            "Make sure that `max_model_len` is no smaller than the number of text tokens plus "
            "multimodal tokens. For image inputs, the number of image tokens depends on the number "
            "of images, and possibly their aspect ratios as well. ",
            "beside this text at most 3975 image tokens would fit: use max_pixels=640000 or less, "
            "or fewer images.",
        ),
        (
            4000,
            96,
            "The decoder prompt (length 4096) plus the number of requested output tokens (at least "
            "1) is longer than the maximum model length of 4096. Make sure that `max_model_len` is "
            "no smaller than the number of text tokens (prompt + requested output tokens). ",
            "at most 95 image tokens would fit: use max_pixels=640000 or less, or fewer images.",
        ),
    ],
)
def test_prompt_too_long_says_vllms_text_then_what_would_fit(
    num_text: int, num_image: int, start: str, end: str
) -> None:
    error = PromptTooLong(
        max_model_len=4096,
        num_text_tokens=num_text,
        num_image_tokens=num_image,
        max_pixels=640000,
    )

    assert (start, end) == (str(error)[: len(start)], str(error)[-len(end) :])


def test_prompt_that_no_size_would_fit_is_not_told_to_use_one() -> None:
    error = PromptTooLong(max_model_len=64, num_text_tokens=60, num_image_tokens=80)

    assert "max_pixels" not in str(error)
    assert str(error).endswith("no size makes these images so few: send fewer, or less text.")


def test_placeholder_mismatch_says_which_and_how_many() -> None:
    too_few = PlaceholderMismatch(num_items=2, num_placeholders=1, placeholder="<image>")

    too_many = PlaceholderMismatch(num_items=1, num_placeholders=2, placeholder="<image>")

    assert str(too_few).startswith(
        "Expected there to be 2 prompt updates corresponding to 2 image items, but instead found "
        "1 prompt updates! This prompt has 2 image(s) and 1 placeholder(s) `<image>`"
    )
    assert str(too_many).startswith(
        "Found more '<image>' placeholders in input prompt than actual multimodal data items."
    )


def test_three_dimensional_tensor_is_told_how_to_be_a_picture() -> None:
    error = BadEmbeddings.wrong_width(shape=(3, 224, 224), expected=64)

    assert str(error).startswith(
        "Image embedding hidden dimension mismatch: got 224, but model expects 64. Embedding "
        "shape: (3, 224, 224)."
    )
    assert "put it into a list" in str(error)


def test_missing_fields_are_named_in_a_stable_order() -> None:
    error = BadEmbeddings.missing_fields(required={"b", "a"}, found=["a"])

    assert str(error).startswith(
        "The data should contain the fields: {'a', 'b'}, but only found the following keys: {'a'}"
    )


def test_clients_own_words_are_cut_short_and_objects_named_by_type() -> None:
    long = UnsupportedPart("x" * 1000, ["text"])

    odd = UnsupportedPart(object(), ["text"])

    assert len(str(long)) < 200
    assert str(odd) == "Unsupported chat content part type: object. Supported types: text."
    assert str(UnsupportedModality(object())) == "Unsupported modality: object. Use image or video."


def test_no_chat_template_opens_with_the_known_sentence() -> None:
    assert str(NoChatTemplate()).startswith(
        "As of transformers v4.44, default chat template is no longer allowed, so you must provide "
        "a chat template if the tokenizer does not define one. Pass chat_template="
    )
