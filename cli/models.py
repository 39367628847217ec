"""What `darkroom models` prints: the cards of the model families. It loads no torch."""

import json

import typer

from engine.config import DEFAULT_LIMITS
from engine.families.cards import CARDS, Card


def show_models(*, as_json: bool) -> None:
    if as_json:
        for card in CARDS:
            typer.echo(json.dumps(to_facts(card), ensure_ascii=False))
        return
    for card in CARDS:
        typer.echo(f"{', '.join(card.model_types)}: {card.models}")
        for name, text in describe(card).items():
            typer.echo(f"    {name:<12}{text}")
    limits = ",".join(f"{modality}={limit}" for modality, limit in DEFAULT_LIMITS.items())
    typer.echo(
        f"\nA prompt may hold {limits} where --limit-mm-per-prompt does not say otherwise. Sizes hold "
        "where\nneither a request nor the checkpoint says another one. docs/models.md says more, "
        "and docs/adding-a-family.md\nhow another family is added."
    )


def describe(card: Card) -> dict[str, str]:
    """What a family supports, by what it is about."""
    if card.picture is None:
        return {"pictures": "no", "clips": card.clips, "embeddings": card.embeddings}
    sizes = ", ".join(f"{word}={number}" for word, number in card.sizes.items())
    return {
        "pictures": sizes or f"seen {card.seen}",
        "several": card.several,
        "clips": card.clips,
        "embeddings": card.embeddings,
        "in a prompt": " ".join(mark for mark in (card.picture, card.clip) if mark),
    }


def to_facts(card: Card) -> dict[str, object]:
    """The same for programs, one object a family, with the limits of a prompt."""
    sees = card.picture is not None
    return {
        "model_types": card.model_types,
        "models": card.models,
        "image": sees,
        "video": card.takes_clips,
        "multi_image": sees,
        "embeddings": card.embeddings != "no",
        "placeholders": {"image": card.picture, "video": card.clip},
        "sizes": dict(card.sizes),
        "limits": dict(DEFAULT_LIMITS) if sees else {},
    }
