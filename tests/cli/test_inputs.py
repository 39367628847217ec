"""Which files and folders the command takes, and in what order."""

import gc
import os
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("av", reason="clips need PyAV, the extra `video`")

from cli.inputs import ClipReader, Found, Input, Refused, find_clips, find_pictures, natural_key
from media.decoded import Frames
from media.errors import MediaError
from media.frames import FrameSampling
from media.video import decode_video
from tests.cli.pictures import save_picture
from tests.media.clips import clip as video_clip
from tests.media.clips import shades

pytestmark = pytest.mark.usefixtures("folder")


def touch(*names: str) -> None:
    for name in names:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def paths(inputs: Iterable[Input | Refused]) -> list[str]:
    return [found.path for found in inputs]


# Pictures


def test_folder_gives_its_pictures_as_people_count_and_then_those_of_its_folders() -> None:
    touch("pics/10.png", "pics/2.JPG", "pics/b/1.webp", "pics/a/3.gif", "pics/a/notes.txt")

    found = find_pictures(["pics"])

    expected = ["pics/2.JPG", "pics/10.png", "pics/a/3.gif", "pics/b/1.webp"]
    assert expected == paths(found.inputs)


def test_file_is_taken_whatever_its_name() -> None:
    touch("picture-without-suffix", "photo.dat")

    found = find_pictures(["photo.dat", "picture-without-suffix"])

    assert ["photo.dat", "picture-without-suffix"] == paths(found.inputs)


def test_arguments_keep_their_order() -> None:
    touch("b.png", "a/1.png", "c.png")

    found = find_pictures(["c.png", "a", "b.png"])

    assert ["c.png", "a/1.png", "b.png"] == paths(found.inputs)


def test_hidden_files_and_folders_are_left_out_unless_named() -> None:
    touch("pics/._1.jpg", "pics/.thumbnails/1.jpg", "pics/1.jpg", ".hidden.jpg")

    found = find_pictures(["pics", ".hidden.jpg"])

    assert ["pics/1.jpg", ".hidden.jpg"] == paths(found.inputs)


def test_file_that_is_reached_twice_is_taken_once_where_it_came_first(folder: Path) -> None:
    touch("pics/1.png", "pics/2.png")

    found = find_pictures(
        ["pics/2.png", "pics", "./pics/1.png", "pics/../pics", str(folder / "pics/1.png")]
    )

    assert ["pics/2.png", "pics/1.png"] == paths(found.inputs)


def test_linked_folders_are_followed_and_a_circle_of_them_ends() -> None:
    touch("pics/1.png", "elsewhere/2.png")
    Path("pics/more").symlink_to(Path("elsewhere").absolute())
    Path("pics/again").symlink_to(Path("pics").absolute())

    found = find_pictures(["pics"])

    assert ["pics/1.png", "pics/more/2.png"] == paths(found.inputs)


def test_two_links_to_one_file_are_two_pictures() -> None:
    touch("blob")
    Path("pics").mkdir()
    for name in ("a.png", "b.png"):
        Path("pics", name).symlink_to(Path("blob").absolute())

    found = find_pictures(["pics"])

    assert ["pics/a.png", "pics/b.png"] == paths(found.inputs)


@pytest.mark.parametrize("as_absolute", [False, True])
def test_glob_that_no_shell_expanded_is_expanded(folder: Path, as_absolute: bool) -> None:
    touch("pics/10.png", "pics/9.png", "pics/deep/er/1.png", "pics/9.txt")
    root = f"{folder}/" if as_absolute else ""

    flat = find_pictures([f"{root}pics/*.png"])
    deep = find_pictures([f"{root}pics/**/*.png"])

    assert [f"{root}pics/9.png", f"{root}pics/10.png"] == paths(flat.inputs)
    assert {f"{root}pics/deep/er/1.png", *paths(flat.inputs)} == set(paths(deep.inputs))


def test_name_with_brackets_is_a_name_before_it_is_a_pattern() -> None:
    touch("scan[1].png", "scan1.png")

    found = find_pictures(["scan[1].png"])

    assert ["scan[1].png"] == paths(found.inputs)


def test_home_is_understood_in_quotes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch("1.png")
    monkeypatch.setenv("HOME", str(folder))

    found = find_pictures(["~/*.png", "~/1.png", "~nobody-of-that-name/1.png"])

    assert [f"{folder}/1.png", "~nobody-of-that-name/1.png"] == paths(found.inputs)


def test_argument_that_leads_nowhere_keeps_its_place_and_its_spelling() -> None:
    touch("a.png", "z.png")

    found = find_pictures(["a.png", "./no//where.png", "https://example.org/b.png", "z.png"])

    expected = ["a.png", "./no//where.png", "https://example.org/b.png", "z.png"]
    assert expected == paths(found.inputs)
    assert [Input, Refused, Refused, Input] == [type(one) for one in found.inputs]


def test_pictures_in_formats_that_are_not_read_are_counted() -> None:
    touch("pics/1.HEIC", "pics/2.heic", "pics/3.tif", "pics/4.png", "pics/notes.txt")

    found = find_pictures(["pics"])

    assert ["pics/4.png"] == paths(found.inputs)
    assert {".heic": 2, ".tif": 1} == found.left_out


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look everywhere")
def test_folder_that_may_not_be_opened_is_refused_and_the_rest_is_found() -> None:
    touch("pics/1.png", "pics/locked/2.png")
    Path("pics/locked").chmod(0)

    found = find_pictures(["pics"])

    assert ["pics/1.png", "pics/locked"] == paths(found.inputs)
    assert isinstance(found.inputs[1], Refused)


def test_pipes_and_folders_that_are_named_like_pictures_are_left_out() -> None:
    touch("pics/1.png", "pics/2.png/inside.png")
    os.mkfifo("pics/3.png")

    pictures, clips = find_pictures(["pics"]), find_clips(["pics"])

    assert ["pics/1.png", "pics/2.png/inside.png"] == paths(pictures.inputs)
    assert [Input("pics", ["pics/1.png"])] == clips.inputs


@pytest.mark.parametrize("find", [find_pictures, find_clips])
def test_links_in_a_circle_are_refused(find: Callable[[list[str]], Found]) -> None:
    Path("a").symlink_to("b")
    Path("b").symlink_to("a")

    found = find(["a", "a/1.png", "b/c/1.png"])

    assert ["a", "a/1.png", "b/c/1.png"] == paths(found.inputs)


@pytest.mark.parametrize("find", [find_pictures, find_clips])
def test_empty_path_is_not_the_current_folder(find: Callable[[list[str]], Found]) -> None:
    touch("1.png")

    (refused,) = find([""]).inputs

    assert isinstance(refused, Refused)
    assert "The path is empty." in str(refused.problem)


def test_name_that_is_too_long_for_the_system_is_refused_by_its_reason() -> None:
    (refused,) = find_pictures(["a" * 300]).inputs

    assert isinstance(refused, Refused)
    assert "It cannot be read: File name too long." == str(refused.problem)


def test_paths_stay_as_people_wrote_them() -> None:
    touch("pics/1.png", "pics/2.png", "top.png")

    found = find_pictures(["./pics//1.png", "pics/", "./top.png", "."])

    assert ["./pics//1.png", "pics/2.png", "./top.png"] == paths(found.inputs)


def test_what_is_left_out_counts_once_however_often_it_is_reached() -> None:
    touch("pics/1.png", "pics/2.heic", "pics/3.mp4")

    found = find_pictures(["pics", "./pics", "pics/../pics"])

    assert {".heic": 1, ".mp4": 1} == found.left_out


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look everywhere")
def test_file_behind_a_folder_that_may_not_be_opened_says_so() -> None:
    touch("locked/1.png")
    Path("locked").chmod(0)

    (refused,) = find_pictures(["locked/1.png"]).inputs

    assert isinstance(refused, Refused)
    assert "It cannot be read: Permission denied." == str(refused.problem)


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1)))
def test_any_names_can_be_sorted(names: list[str]) -> None:
    ordered = sorted(names, key=natural_key)

    assert sorted(names) == sorted(ordered)


def test_numbers_in_names_count_as_numbers() -> None:
    names = ["frame10", "frame2", "Frame1", "frame2b", "1", "frame"]

    ordered = sorted(names, key=natural_key)

    assert ["1", "frame", "Frame1", "frame2", "frame2b", "frame10"] == ordered


# Clips


def test_folder_is_one_clip_of_its_own_pictures_in_natural_order() -> None:
    touch("clip/frame10.png", "clip/frame2.png", "clip/inner/frame1.png", "clip/sound.wav")

    found = find_clips(["clip"])

    expected = Input("clip", ["clip/frame2.png", "clip/frame10.png"])
    assert [expected] == found.inputs


def test_folder_without_pictures_is_no_clip() -> None:
    touch("clips/a.mp4")

    found = find_clips(["clips"])

    (refused,) = found.inputs
    assert isinstance(refused, Refused)
    assert "no_pictures" == refused.problem.code
    assert "name them" in str(refused.problem)


def test_frames_of_a_folder_are_spread_evenly() -> None:
    frames = [f"clip/{index}.png" for index in range(9)]
    for index, path in enumerate(frames):
        save_picture(path, 10, 10 + index)
    clip = ClipReader(Input("clip", frames), FrameSampling(num_frames=3))

    images = [load() for load in clip.build_loaders()]

    assert [10, 14, 18] == [image.height_px for image in images]
    assert ((0, 4, 8), None) == (clip.indices, clip.times_s)


def test_frames_that_differ_in_size_are_no_clip_but_may_be_images() -> None:
    frames = ["clip/0.png", "clip/1.png"]
    for index, path in enumerate(frames):
        save_picture(path, 10 + index)
    clip = ClipReader(Input("clip", frames), FrameSampling(num_frames=2))

    with pytest.raises(MediaError, match=r"differ in size") as caught:
        clip.load()

    assert "frames_differ_in_size" == caught.value.code
    assert [10, 11] == [image.width_px for image in [load() for load in clip.build_loaders()]]


def test_folder_of_frames_keeps_to_the_limits_of_a_clip() -> None:
    frames = ["clip/0.png", "clip/1.png"]
    save_picture(frames[0], 7_000, 5_100)
    clip = ClipReader(Input("clip", frames), FrameSampling(num_frames=2))

    with pytest.raises(MediaError) as caught:
        clip.load()
    assert "7000x5100" in str(caught.value)


def test_clip_is_decoded_once_and_let_go_when_it_was_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoded: list[int] = []

    def decode(encoded: bytes, sampling: FrameSampling) -> Frames:
        decoded.append(len(encoded))
        return decode_video(encoded, sampling)

    monkeypatch.setattr("cli.inputs.decode_video", decode)
    Path("ball.mp4").write_bytes(video_clip(shades(20)))
    loaders = ClipReader(Input("ball.mp4"), FrameSampling(num_frames=4)).build_loaders()
    before = list(decoded)

    images = [weakref.ref(load().image) for load in loaders]
    gc.collect()

    assert ([], 1) == (before, len(decoded))
    assert [None] * 4 == [image() for image in images]


def test_shorter_clip_gives_as_many_images_as_it_has_frames() -> None:
    Path("ball.mp4").write_bytes(video_clip(shades(3)))

    loaders = ClipReader(Input("ball.mp4"), FrameSampling(num_frames=8)).build_loaders()

    assert 3 == len(loaders)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp"])
def test_still_picture_is_no_clip(suffix: str) -> None:
    save_picture(f"cat.{suffix}", 20)
    clip = ClipReader(Input(f"cat.{suffix}"), FrameSampling(num_frames=2))

    for read in (clip.load, clip.build_loaders):
        with pytest.raises(MediaError, match=r"a picture, not a clip: use `darkroom caption`"):
            read()


def test_clip_without_room_in_memory_is_its_own_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("cli.inputs.decode_video", fail)
    Path("ball.mp4").write_bytes(video_clip(shades(3)))

    with pytest.raises(MediaError) as caught:
        ClipReader(Input("ball.mp4"), FrameSampling(num_frames=2)).load()
    assert "no_memory" == caught.value.code


def test_bad_frame_is_named() -> None:
    save_picture("clip/0.png", 10)
    Path("clip/1.png").write_bytes(b"no picture")
    clip = ClipReader(Input("clip", ["clip/0.png", "clip/1.png"]), FrameSampling(num_frames=2))

    with pytest.raises(MediaError, match=r"^1\.png: Failed to load image") as caught:
        clip.load()

    assert "frame_unreadable" == caught.value.code
