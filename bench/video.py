"""
Sampling a long clip against decoding all of it: `python -m bench.video`.

One minute is encoded, of a textured picture that pans behind squares that move, and its packets are
repeated with later times, so that an hour is made in a second. Key frames stand where the encoder puts
them: at most 250 frames apart, as is x264's default, and nowhere else in such a clip.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt

from media.frames import FrameSampling
from media.video import decode_video

Pixels = npt.NDArray[np.uint8]
MINUTE_S = 60


def draw_minute(width: int, height: int, fps: int, seconds: int = MINUTE_S) -> Iterator[Pixels]:
    rng = np.random.default_rng(1)
    coarse = rng.integers(0, 256, (height // 8, 2 * width // 8, 3), np.uint8)
    texture = coarse.repeat(8, axis=0).repeat(8, axis=1)
    for place in range(seconds * fps):
        left = place * 2 % width
        pixels = texture[:, left : left + width].copy()
        for square in range(4):
            x, y = (place * (3 + square)) % (width - 64), (square + 1) * height // 6
            pixels[y : y + 64, x : x + 64] = (60 * square, 255 - 60 * square, 128)
        yield pixels


def encode_minute(width: int, height: int, fps: int, seconds: int = MINUTE_S) -> bytes:
    import av
    from av.video.stream import VideoStream

    file = BytesIO()
    with av.open(file, "w", format="mp4") as target:
        stream = target.add_stream("libx264", rate=fps, options={"preset": "veryfast", "crf": "30"})
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for pixels in draw_minute(width, height, fps, seconds):
            target.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        target.mux(stream.encode())
    return file.getvalue()


def repeat(encoded: bytes, times: int, length_s: Fraction, container: str = "mp4") -> bytes:
    """
    The packets of a clip so many times over, one after the other.

    Args:
        length_s: from the first frame of one to the first of the next.
    """
    import av

    with av.open(BytesIO(encoded), "r") as source:
        stream = source.streams.video[0]
        packets = [packet for packet in source.demux(stream) if packet.size]
        file = BytesIO()
        with av.open(file, "w", format=container) as target:
            copy = target.add_stream_from_template(stream)
            for number in range(times):
                for packet in packets:
                    assert packet.pts is not None
                    assert packet.dts is not None
                    assert packet.time_base is not None
                    later = number * round(length_s / packet.time_base)
                    again = av.Packet(bytes(packet))
                    again.pts, again.dts = packet.pts + later, packet.dts + later
                    again.time_base, again.duration = packet.time_base, packet.duration
                    again.is_keyframe, again.stream = packet.is_keyframe, copy
                    target.mux(again)
    return file.getvalue()


def decode_all(encoded: bytes, num_threads: int) -> int:
    """Decode every frame and look at none; 0 threads are as many as FFmpeg likes."""
    import av

    with av.open(BytesIO(encoded), "r") as source:
        stream = source.streams.video[0]
        stream.codec_context.thread_count = num_threads
        if num_threads != 1:
            stream.thread_type = "AUTO"
        return sum(1 for _ in source.decode(stream))


def measure(call: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    found = call()
    spent = {"wall_s": time.perf_counter() - wall_s, "cpu_s": time.process_time() - cpu_s}
    return {name: round(seconds, 3) for name, seconds in spent.items()}, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--size", default="1280x720")
    parser.add_argument("--fps", type=int, default=30)
    parser.add_argument("--num-frames", type=int, default=32)
    parser.add_argument("--container", default="mp4", choices=("mp4", "matroska", "mpegts"))
    options = parser.parse_args()
    width, height = map(int, options.size.split("x"))
    minute = encode_minute(width, height, options.fps)
    encoded = repeat(minute, options.minutes, Fraction(MINUTE_S), options.container)
    num_frames = options.num_frames
    report: dict[str, Any] = {"clip": vars(options), "bytes": len(encoded)}
    report["sampled"], frames = measure(lambda: decode_video(encoded, FrameSampling(num_frames)))
    sampling = FrameSampling(num_frames, keyframes=True)
    report["key frames"], _ = measure(lambda: decode_video(encoded, sampling))
    report["all"], num_decoded = measure(lambda: decode_all(encoded, 1))
    report["all, FFmpeg's threads"], _ = measure(lambda: decode_all(encoded, 0))
    assert num_decoded == frames.source_num_frames
    report["num_frames"] = {"in the clip": num_decoded, "kept": frames.num_frames}
    report["sampled of all"] = round(report["sampled"]["cpu_s"] / report["all"]["cpu_s"], 4)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
