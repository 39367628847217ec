"""`darkroom models` shows every family with what it supports, to people and to programs."""

import json

from typer.testing import CliRunner

from cli.main import app
from engine.families.cards import CARDS


def test_every_family_stands_there_with_what_it_supports() -> None:
    run = CliRunner().invoke(app, ["models"], catch_exceptions=False)
    shown = run.stdout.splitlines()

    for card in CARDS:
        start = shown.index(f"{', '.join(card.model_types)}: {card.models}")
        block = shown[start + 1 : start + 6]
        assert f"    clips       {card.clips}" in block
        assert f"    embeddings  {card.embeddings}" in block
        assert (f"    several     {card.several}" in block) == (card.picture is not None)
    assert "    pictures    min_pixels=3136, max_pixels=1003520" in shown
    assert "A prompt may hold image=1,video=1 where" in run.stdout


def test_programs_get_one_object_a_family() -> None:
    run = CliRunner().invoke(app, ["models", "--json"], catch_exceptions=False)
    facts = [json.loads(line) for line in run.stdout.splitlines()]
    by_type = {name: one for one in facts for name in one["model_types"]}

    assert len(CARDS) == len(facts)
    assert {"min_pixels": 3136, "max_pixels": 1003520} == by_type["qwen2_vl"]["sizes"]
    assert (True, False, True) == tuple(
        by_type["llava"][name] for name in ("image", "video", "embeddings")
    )
    assert (False, False, {}) == tuple(
        by_type["llama"][name] for name in ("image", "multi_image", "limits")
    )
    assert {"image": 1, "video": 1} == by_type["phi3_v"]["limits"]
