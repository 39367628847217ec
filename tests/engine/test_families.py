"""Every family of the table says what transformers' `generate` says, and sees what its processor sees."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import LLM, Request
from engine.errors import BadConfig
from engine.families.idefics3 import Idefics3
from engine.families.pixtral import Pixtral
from engine.families.protocol import Visual
from engine.processor import Prepared
from tests.engine.families import CASES, NUM_ASKED, Asked, Case, Oracle, mixed, size
from tests.engine.pictures import GREEDY, cut_picture, draw, encode, error_of, token_ids
from tests.engine.test_config import rewrite
from tests.engine.tiny import write_tiny_qwen2_vl
from tests.engine.tiny_llava import (
    write_tiny_gemma3,
    write_tiny_idefics3,
    write_tiny_internvl,
    write_tiny_llava,
    write_tiny_llava_next,
    write_tiny_pixtral,
)
from tests.engine.tiny_phi3_v import write_tiny_phi3_v
from tests.engine.ways import in_pieces, keeping_prefixes

NUM_ALONE = NUM_ASKED or 12
NUM_SIZES = NUM_ASKED or 50

Answers = dict[str, list[int]]


@dataclass(frozen=True, slots=True)
class Loaded:
    """One shape, as the engine and as transformers read it."""

    case: Case
    llm: LLM
    oracle: Oracle


@pytest.fixture(scope="module", params=CASES)
def loaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Loaded]:
    case = CASES[request.param]
    folder: Path = case.write(tmp_path_factory.mktemp("family"), seed=3, changes=case.changes)
    llm = LLM(str(folder), limit_mm_per_prompt={"image": 8}, max_num_seqs=24)
    yield Loaded(case, llm, Oracle(case, folder))
    llm.close()


def answers(llm: LLM, asked: Sequence[Asked]) -> Answers:
    results = list(llm.stream([one.request() for one in asked]))
    assert [] == [r.error for r in results if r.error]
    return {result.request_id: list(result.outputs[0].token_ids) for result in results}


def test_mixed_requests_are_answered_as_by_transformers_in_any_order(loaded: Loaded) -> None:
    asked = mixed(loaded.case, NUM_ASKED or loaded.case.num_requests, "families")
    expected = {one.name: loaded.oracle.generate(one) for one in asked}
    alone: Answers = {}
    for one in asked[:NUM_ALONE]:
        alone |= answers(loaded.llm, [one])

    assert len({tuple(ids) for ids in expected.values()}) > len(asked) // 4
    assert expected == answers(loaded.llm, asked)
    assert expected == answers(loaded.llm, random.Random(5).sample(asked, len(asked)))
    with keeping_prefixes(loaded.llm):
        with in_pieces(loaded.llm):
            assert expected == answers(loaded.llm, asked)
        assert expected == answers(loaded.llm, asked)
    assert alone == {name: ids for name, ids in expected.items() if name in alone}


def test_pictures_of_all_sizes_are_cut_as_by_transformers(loaded: Loaded) -> None:
    family = loaded.llm.engine.checkpoint.family
    if "image" not in family.modalities:
        pytest.skip("it sees no pictures")
    rng = random.Random("sizes")
    worst = 0.0
    for seed in range(NUM_SIZES):
        picture = draw(seed, *size(rng))
        visual = cut_picture(family, picture)
        ours = visual.pixels.numpy().transpose(0, 3, 1, 2).astype(np.float64)
        theirs = loaded.oracle.pixels(picture)
        assert theirs.shape == ours.shape, picture.size
        worst = max(worst, float(np.abs(ours - theirs).max()))
        asked = Asked("", loaded.case.picture, [picture], [], 1)
        expected = loaded.oracle.read(asked)["input_ids"][0].tolist()
        prepared = loaded.llm.engine._processor.prepare(asked.request())
        assert expected == prepared.token_ids, picture.size

    assert worst < 0.01  # of 255 levels; one is what we promise


def test_encoded_files_are_seen_as_what_they_hold(loaded: Loaded) -> None:
    """Where a family only resamples, whoever decodes a file does that too."""
    if "image" not in loaded.llm.engine.checkpoint.family.modalities:
        pytest.skip("it sees no pictures")
    prompt = loaded.case.before + loaded.case.picture + loaded.case.after
    picture = draw(1, 90, 70)
    plain, encoded = (
        {"prompt": prompt, "multi_modal_data": {"image": image}}
        for image in (picture, encode(picture))
    )
    results = loaded.llm.generate([plain, encoded], GREEDY, use_tqdm=False)
    prepared = [loaded.llm.engine._processor.prepare(Request(prompt=p)) for p in (plain, encoded)]
    one, other = (visual_of(p).pixels for p in prepared)

    assert torch.equal(one, other)
    assert 1 == len({tuple(ids) for ids in token_ids(results)})


def test_features_of_a_picture_say_what_it_says_or_are_refused(loaded: Loaded) -> None:
    family = loaded.llm.engine.checkpoint.family
    if "image" not in family.modalities:
        pytest.skip("it sees no pictures")
    prompt = loaded.case.before + loaded.case.picture + loaded.case.after
    picture = draw(4, 90, 70)
    visual = cut_picture(family, picture)
    (features,) = family.encode([visual])
    seen, handed = (
        loaded.llm.generate(
            {"prompt": prompt, "multi_modal_data": {"image": image}}, GREEDY, use_tqdm=False
        )
        for image in (picture, features[None])
    )
    if isinstance(family, Pixtral):
        assert "embeddings" in error_of(handed) or "image_embeds" in error_of(handed)
    elif isinstance(family, Idefics3) and len(visual.pixels) > 1:
        assert "text between the tiles" in error_of(handed)
    else:
        assert seen[0].prompt_token_ids == handed[0].prompt_token_ids
        assert token_ids(seen) == token_ids(handed)


@pytest.mark.parametrize("write", [write_tiny_internvl, write_tiny_idefics3])
def test_text_model_that_nobody_compared_is_refused(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    write(tmp_path)
    rewrite("config.json", lambda c: c["text_config"].update(model_type="gemma2"))(tmp_path)
    with pytest.raises(BadConfig, match="text part is of the type 'gemma2'"):
        LLM(str(tmp_path))


# What a processor may be silent of: transformers has a default for each.
MAY_BE_NULL = (
    *("do_resize", "do_rescale", "do_normalize", "do_image_splitting", "do_pad", "num_crops"),
    *("resample", "rescale_factor", "image_mean", "image_std", "min_pixels", "max_pixels"),
)


@pytest.mark.parametrize(
    "write",
    [
        write_tiny_gemma3,
        write_tiny_idefics3,
        write_tiny_internvl,
        write_tiny_llava,
        write_tiny_llava_next,
        write_tiny_phi3_v,
        write_tiny_pixtral,
        write_tiny_qwen2_vl,
    ],
)
def test_null_of_a_processor_is_silence(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    write(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    said = {k: v for k, v in json.loads(path.read_text()).items() if k not in MAY_BE_NULL}
    seen = []
    for words in ({}, dict.fromkeys(MAY_BE_NULL)):
        path.write_text(json.dumps(said | words))
        with LLM(str(tmp_path)) as llm:
            family = llm.engine.checkpoint.family
            seen += family.encode([cut_picture(family, draw(7, 90, 70))])

    assert torch.equal(*seen)


@pytest.mark.parametrize("write", [write_tiny_internvl, write_tiny_llava, write_tiny_pixtral])
def test_colours_hold_only_where_pictures_are_normalised(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    write(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    said = json.loads(path.read_text())
    seen = []
    for words in (
        {"do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.2] * 3},
        {"do_normalize": True, "image_mean": [0.0] * 3, "image_std": [1.0] * 3},
    ):
        path.write_text(json.dumps(said | words))
        with LLM(str(tmp_path)) as llm:
            family = llm.engine.checkpoint.family
            seen += family.encode([cut_picture(family, draw(7, 90, 70))])

    assert torch.equal(*seen)


def visual_of(prepared: Prepared) -> Visual:
    (placed,) = prepared.media
    assert isinstance(placed.content, Visual)
    return placed.content


def test_what_a_family_does_not_see_is_refused(loaded: Loaded) -> None:
    known = loaded.llm.engine.checkpoint.family.modalities
    if "video" in known:
        pytest.skip("it sees clips")
    given = {"prompt": "x", "multi_modal_data": {"video": [draw(1), draw(2)]}}
    (result,) = loaded.llm.generate(given, use_tqdm=False)

    assert result.error is not None
    advice = "Use image." if "image" in known else "This model reads text alone."
    assert f"Unsupported modality: video. {advice}" == result.error.message


def test_chat_of_a_text_model_takes_no_pictures(loaded: Loaded) -> None:
    if "image" in loaded.llm.engine.checkpoint.family.modalities:
        pytest.skip("it sees pictures")
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    seen, said = (
        loaded.llm.chat(
            {"role": "user", "content": content}, GREEDY, use_tqdm=False, chat_template=template
        )
        for content in ([{"type": "image", "image": draw(1)}, "x"], "x")
    )
    clip = [{"role": "user", "content": [{"type": "video", "video": [draw(1), draw(2)]}]}]
    watched = loaded.llm.chat(clip, GREEDY, use_tqdm=False, chat_template=template)

    assert "Unsupported modality: image. This model reads text alone." == error_of(seen)
    assert "Unsupported modality: video. This model reads text alone." == error_of(watched)
    assert "x" == said[0].prompt
    assert 12 == len(token_ids(said)[0])
