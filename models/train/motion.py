"""
Clips: two to sixteen frames in which one shape moves, appears or vanishes, or nothing happens.

A clip and its reverse have different answers, so an engine that swaps frames says something wrong.
"""

import random
from dataclasses import dataclass, replace

from PIL import Image

from models.train.scenes import (
    COLOURS,
    SHAPES,
    Scene,
    Thing,
    Turn,
    draw_scene,
    listed,
    places,
    put,
    sentence,
    sizes_that_can_be_seen,
    with_article,
)

EVENTS = ("moves", "appears", "vanishes", "nothing")
MAX_BYSTANDERS = 2


@dataclass(frozen=True, slots=True)
class Clip:
    """
    One event among shapes that stay where they are.

    Attributes:
        scene: the shapes that do not change, and the background.
        actor: the shape of the event, where it starts (or where it appears or vanishes).
        end: the same shape where the movement ends; equal to `actor` unless it moves.
        change_at: the share of the clip, 0 to 1, after which a shape has appeared or vanished.
    """

    scene: Scene
    event: str
    actor: Thing
    end: Thing
    change_at: float


def random_clip(rng: random.Random, width_px: int, height_px: int) -> Clip:
    event = rng.choices(EVENTS, weights=(6, 2, 2, 1))[0]
    spots = rng.sample(places(width_px, height_px), 3 if rng.random() < 0.5 else 2)
    looks = rng.sample([(shape, colour) for shape in SHAPES for colour in COLOURS], 3)
    size = rng.choice(sizes_that_can_be_seen(width_px, height_px))

    def thing(number: int, spot: tuple[int, int]) -> Thing:
        return put(rng, width_px, height_px, Thing(*looks[number], size, *spot))

    actor = thing(0, spots[0])
    end = actor
    if event == "moves":
        target = put(rng, width_px, height_px, replace(actor, row=spots[1][0], column=spots[1][1]))
        end = replace(target, diameter=actor.diameter)
        bystanders = [thing(1, spots[2])] if len(spots) > 2 else []
    else:
        bystanders = [thing(1, spots[1])] if event == "nothing" or rng.random() < 0.7 else []
        bystanders += [thing(2, spots[2])] if len(spots) > 2 else []
    background = rng.choice(("white", "grey", "black", "beige"))
    scene = Scene(width_px, height_px, background, tuple(bystanders[:MAX_BYSTANDERS]))
    return Clip(scene, event, actor, end, rng.uniform(0.05, 0.95))


def reverse(clip: Clip) -> Clip:
    """What the same frames show when they are played backwards."""
    event = {"appears": "vanishes", "vanishes": "appears"}.get(clip.event, clip.event)
    return replace(
        clip, event=event, actor=clip.end, end=clip.actor, change_at=1.0 - clip.change_at
    )


def draw_clip(rng: random.Random, clip: Clip, num_frames: int) -> list[Image.Image]:
    """The frames in order; the background keeps its exact colour, as a camera on a stand would."""
    seed = rng.getrandbits(32)  # the same strokes and colours in every frame
    return [draw_scene(random.Random(seed), scene) for scene in frame_scenes(clip, num_frames)]


def frame_scenes(clip: Clip, num_frames: int) -> list[Scene]:
    """What each frame shows, in order; the actor, where it is there, comes last."""
    first_with_change = min(num_frames - 1, max(1, round(clip.change_at * num_frames)))
    frames = []
    for index in range(num_frames):
        share = index / (num_frames - 1)
        changed = index >= first_with_change
        things = list(clip.scene.things)
        if clip.event in ("moves", "nothing") or (clip.event == "appears") == changed:
            things.append(_at(clip, share))
        frames.append(replace(clip.scene, things=tuple(things)))
    return frames


def _at(clip: Clip, share: float) -> Thing:
    return replace(
        clip.actor,
        x=clip.actor.x + (clip.end.x - clip.actor.x) * share,
        y=clip.actor.y + (clip.end.y - clip.actor.y) * share,
    )


def describe(clip: Clip) -> str:
    noun = clip.actor.noun
    if clip.event == "moves":
        return sentence(f"the {noun} moves from the {clip.actor.place} to the {clip.end.place}")
    if clip.event == "appears":
        return sentence(f"{with_article(noun)} appears at the {clip.actor.place}")
    if clip.event == "vanishes":
        return sentence(f"the {noun} vanishes from the {clip.actor.place}")
    return sentence("nothing moves")


def questions(rng: random.Random, clip: Clip) -> list[Turn]:
    noun, event = clip.actor.noun, clip.event
    turns: list[Turn] = []
    for word, happening in (("moves", "moves"), ("appears", "appears"), ("vanishes", "vanishes")):
        article = with_article(noun) if happening == "appears" else f"the {noun}"
        turns.append((f"What {word}?", sentence(article if event == happening else "nothing")))
    if event == "moves":
        turns.append((f"Where does the {noun} start?", sentence(f"at the {clip.actor.place}")))
        turns.append((f"Where does the {noun} end?", sentence(f"at the {clip.end.place}")))
    if clip.scene.things:
        still = listed([f"the {thing.noun}" for thing in _reading_order(clip.scene.things)])
        everything = (
            still
            if event != "nothing"
            else listed([f"the {t.noun}" for t in _reading_order((*clip.scene.things, clip.actor))])
        )
        turns.append(("What stays in place?", sentence(everything)))
    turns.append(("What colour is the background?", sentence(clip.scene.background)))
    return rng.sample(turns, min(4, len(turns)))


def _reading_order(things: tuple[Thing, ...]) -> list[Thing]:
    return sorted(things, key=lambda thing: (thing.row, thing.column))
