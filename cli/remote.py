"""
The verbs that talk to a server: submit, status, results, cancel.

What is asked for goes to stdout, progress and notes to stderr. Exit codes: 0 done, 1 some items
failed or the server refused, 2 usage, 3 the server is out of reach, 130 Ctrl-C. A batch is the
server's: whatever ends here, it goes on.
"""

import json
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, Annotated, Any, Final

import typer

from cli.answers import one_line
from cli.client import DEFAULT_SERVER, Client, Polled, ServerError, UnreachableError
from cli.errors import ExitCode, FileError
from cli.inputs import CLIP_SUFFIXES, Found, Input, Refused, find_pictures
from cli.lines import build_clip, build_line, build_picture, encode
from cli.questions import CLIP_PROMPT, NUM_FRAMES, PICTURE_PROMPT
from cli.segments import parse_cut
from cli.show import Screen, note_left_out
from cli.uploads import upload_all
from cli.watch import describe, follow
from engine.config import BUNDLED_MODEL
from media.errors import MediaError
from media.limits import VIDEO_LIMITS
from media.segments import Cut

Server = Annotated[
    str, typer.Option(metavar="URL", envvar="DARKROOM_SERVER", help="Where the server is.")
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        metavar="KEY", envvar="DARKROOM_API_KEY", help="Not needed by an open server on this host."
    ),
]
BatchId = Annotated[str, typer.Argument(metavar="ID", help="batch_…, as `submit` wrote it.")]
AsJson = Annotated[
    bool, typer.Option("--json", envvar="DARKROOM_JSON", help="Write JSON, an object a line.")
]

INLINE_BYTES: Final = 48 * 1024 * 1024
"""Of media inside the lines; a third more as base64, well below what servers take as one file."""

RETRY_WAITS_S: Final = (0.5, 1.0, 2.0, 4.0)
TEMPORARY: Final = frozenset({502, 503, 504})
MAX_ERRORS: Final = 20


class ImagePolicy(StrEnum):
    REJECT = "reject"
    TRUNCATE = "truncate"
    SAMPLE = "sample"
    SPLIT = "split"


class OnInvalid(StrEnum):
    FAIL = "fail"
    SKIP = "skip"


def submit(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATH", help="One JSONL file, or pictures, folders and globs."),
    ],
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            envvar="DARKROOM_PROMPT",
            help="What to ask of pictures.",
            show_default=PICTURE_PROMPT,
        ),
    ] = None,
    frames: Annotated[
        int,
        typer.Option(
            min=1,
            max=VIDEO_LIMITS.max_frames,
            metavar="N",
            envvar="DARKROOM_FRAMES",
            help="Frames to look at of a clip, spread evenly over it; with --segments, of each.",
        ),
    ] = NUM_FRAMES,
    segments: Annotated[
        str | None,
        typer.Option(
            metavar="10s|30",
            envvar="DARKROOM_SEGMENTS",
            help="Ask about each segment of a clip, of so many seconds or so many of equal length.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            envvar="DARKROOM_MODEL",
            help="For pictures.",
            show_default="the one that the server runs",
        ),
    ] = None,
    window: Annotated[
        str, typer.Option(metavar="24h", envvar="DARKROOM_WINDOW", help="How long it may take.")
    ] = "24h",
    priority: Annotated[
        int, typer.Option(min=-10, max=10, envvar="DARKROOM_PRIORITY", help="Lower runs first.")
    ] = 0,
    image_policy: Annotated[
        ImagePolicy, typer.Option(envvar="DARKROOM_IMAGE_POLICY", help="For too many images.")
    ] = ImagePolicy.REJECT,
    on_invalid: Annotated[
        OnInvalid, typer.Option(envvar="DARKROOM_ON_INVALID", help="skip: bad lines fail alone.")
    ] = OnInvalid.FAIL,
    key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar="DARKROOM_IDEMPOTENCY_KEY",
            help="Any text. The same key and input again, after a break: the same batch.",
        ),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Show how it goes, until it ends.")] = False,
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
) -> None:
    """
    Hand in a batch, and write its id.

    A JSONL file goes as it is, in OpenAI's form. Pictures, and clips that are named, are sent inside
    the lines, or uploaded before where they are many, so the server needs no access to them.

    Ctrl-C while it waits leaves the batch as it is, and says how to go on.

    \b
    Exit codes:
      0    handed in; with --wait: every item has its text
      1    some failed, or the server refused
      2    a wrong option, or nothing to hand in
      3    the server is out of reach
      130  Ctrl-C

    \b
    Examples:
      darkroom submit captions.jsonl
      darkroom submit holiday/ --prompt "What is in the foreground?" --wait
      darkroom submit lecture.mp4 --segments 30s --frames 16
    """
    try:
        cut = None if segments is None else parse_cut(segments)
    except ValueError as error:  # also what media says of it
        raise typer.BadParameter(f"--segments: {error}") from error
    client = Client(server, api_key)
    key = key or secrets.token_hex(16)
    with problems_told():
        models = client.list_models()  # before anything is read or sent in vain
        if is_manifest(paths):
            found = Found()
        else:
            model = choose_model(model, models)
            found = find_pictures(paths)
        asking = Asking(model or BUNDLED_MODEL, prompt, frames, cut)
        with open_manifest(client, paths, found, asking) as manifest:
            batch = hand_in(
                client,
                manifest,
                key,
                completion_window=window,
                priority=priority,
                image_policy=image_policy.value,
                on_invalid=on_invalid.value,
            )
        typer.echo(batch["id"])
        code = show_until_end(client, client.poll(batch["id"])) if wait else ExitCode.DONE
        raise typer.Exit(max(code, ExitCode.SOME_FAILED) if manifest.num_refused else code)


def status(
    batch: BatchId,
    watch: Annotated[bool, typer.Option("--watch", help="Until it ends.")] = False,
    as_json: AsJson = False,
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
) -> None:
    """
    Show how a batch stands.

    Exit codes are those of `darkroom submit --wait`; while it runs, 0.
    """
    client = Client(server, api_key)
    with problems_told():
        polled = client.poll(batch)
        if watch and not as_json:
            raise typer.Exit(show_until_end(client, polled))
        show(polled, as_json=as_json)
        while watch and not polled.has_ended:
            polled = client.poll(batch, after=polled)
            show(polled, as_json=as_json)
        raise typer.Exit(judge(polled))


def results(
    batch: BatchId,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write there instead.")
    ] = None,
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
) -> None:
    """
    Write the results as NDJSON, failed items among them.

    Of a batch that has ended: its output file, then its errors file, each in input order. Of one
    that still runs: what there is so far, in the order in which it came.

    Exit codes are those of `darkroom submit --wait`; while it runs, 0.
    """
    client = Client(server, api_key)
    with problems_told():
        polled = client.poll(batch)
        pieces = read_results(client, polled)
        if output is None:
            for piece in pieces:
                sys.stdout.buffer.write(piece)
            sys.stdout.flush()
        else:
            write_whole(output, pieces)
        if not polled.has_ended:
            typer.echo("The batch still runs: there will be more.", err=True)
        raise typer.Exit(judge(polled))


def cancel(batch: BatchId, server: Server = DEFAULT_SERVER, api_key: ApiKey = None) -> None:
    """Stop a batch. What is done stays; asking twice is as good as once."""
    with problems_told():
        found = Client(server, api_key).cancel(batch)
        typer.echo(f"{found['id']} {found['status']}")


@contextmanager
def problems_told() -> Iterator[None]:
    try:
        yield
    except UnreachableError as error:
        tell_error(str(error))
        raise typer.Exit(ExitCode.UNREACHABLE) from error
    except ServerError as error:
        hint = " Give it with --api-key, or as DARKROOM_API_KEY." if error.status == 401 else ""
        tell_error(f"{error}{hint}")
        raise typer.Exit(ExitCode.SOME_FAILED) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(ExitCode.INTERRUPTED) from error
    except OSError as error:
        if error.filename is None:
            raise
        tell_error(f"{error.filename}: {error.strerror}.")
        raise typer.Exit(ExitCode.USAGE) from error


def tell_error(text: str) -> None:
    typer.echo(f"error: {text}", err=True)


# What is handed in


@dataclass(slots=True)
class Manifest:
    """
    The lines to hand in.

    Attributes:
        num_refused: inputs that could not be read, and were told of.
    """

    file: IO[bytes]
    name: str
    num_bytes: int
    num_refused: int = 0


def is_manifest(paths: list[str]) -> bool:
    return len(paths) == 1 and paths[0].endswith(".jsonl")


def choose_model(wanted: str | None, served: list[str]) -> str:
    """Nobody would ever run a batch for a model that the server does not have."""
    if wanted is None:
        return served[0] if len(served) == 1 else BUNDLED_MODEL
    if served and wanted not in served:
        tell_error(f"This server does not run {wanted}. It runs {', '.join(served)}.")
        raise typer.Exit(ExitCode.USAGE)
    return wanted


@dataclass(frozen=True, slots=True)
class Asking:
    """What is asked about pictures and clips; no prompt: the usual one of their kind."""

    model: str
    prompt: str | None
    num_frames: int
    cut: Cut | None

    @property
    def segments(self) -> dict[str, float] | None:
        """How clips are cut, in the words of a line."""
        if self.cut is None:
            return None
        wanted = {"seconds": self.cut.seconds, "count": self.cut.count}
        return {name: number for name, number in wanted.items() if number is not None}


@contextmanager
def open_manifest(
    client: Client, paths: list[str], found: Found, asking: "Asking"
) -> Iterator[Manifest]:
    """A JSONL file as it is, or lines about the pictures and clips that were found."""
    if is_manifest(paths):
        with Path(paths[0]).open("rb") as file:
            yield Manifest(file, Path(paths[0]).name, Path(paths[0]).stat().st_size)
        return
    screen = Screen("files")
    note_left_out(screen, found)
    media = [each.path for each in found.inputs if isinstance(each, Input)]
    uploaded: dict[str, str | FileError] = {}
    if count_bytes(media) > INLINE_BYTES:
        try:
            with screen.progress(len(media)):
                uploaded = upload_all(client, media, screen.count_up)
        except (KeyboardInterrupt, UnreachableError):
            typer.echo("Nothing was handed in. Again, only what is missing is uploaded.", err=True)
            raise
    with tempfile.TemporaryFile() as file:
        num_refused = write_lines(file, found, uploaded, asking)
        num_bytes = file.tell()
        if num_bytes == 0:
            raise typer.Exit(ExitCode.USAGE)
        file.seek(0)
        yield Manifest(file, "pictures.jsonl", num_bytes, num_refused)


def count_bytes(paths: list[str]) -> int:
    num_bytes = 0
    for path in paths:
        with suppress(OSError):  # told when it is read
            num_bytes += Path(path).stat().st_size
    return num_bytes


def write_lines(
    file: IO[bytes],
    found: Found,
    uploaded: dict[str, str | FileError],
    asking: "Asking",
) -> int:
    """Return how many inputs cannot be read; each is told of, and costs no other."""
    num_lines = num_refused = 0
    for each in found.inputs:
        source = each.problem if isinstance(each, Refused) else find_source(each.path, uploaded)
        if isinstance(source, MediaError):
            num_refused += 1
            tell_error(f"{one_line(each.path)}: {source}")
            continue
        num_lines += 1
        path = Path(each.path)
        is_clip = path.suffix.lower() in CLIP_SUFFIXES
        clip = build_clip(source, asking.num_frames, asking.segments)
        media = clip if is_clip else build_picture(source)
        text = asking.prompt or (CLIP_PROMPT if is_clip else PICTURE_PROMPT)
        file.write(build_line(f"{num_lines}:{path.name}", asking.model, media, text))
    return num_refused


def find_source(path: str, uploaded: dict[str, str | FileError]) -> str | FileError:
    """Where the server finds this file, or why it does not."""
    if path in uploaded:
        return uploaded[path]
    try:
        return encode(Path(path))
    except OSError as error:
        return FileError.because(error)


def hand_in(client: Client, manifest: Manifest, key: str, **options: Any) -> dict[str, Any]:
    """
    Upload the lines and make the batch of them, or find the one that the same key has made.

    The wish for a batch is sent again if its answer is lost: the key makes that safe.
    """
    is_asked = False
    try:
        uploaded = client.upload(manifest.file, manifest.num_bytes, manifest.name)
        is_asked = True
        batch = create(client, uploaded["id"], key, **options)
    except (KeyboardInterrupt, UnreachableError):
        if is_asked:
            text = (
                f"The batch may be there. The same command with --key {key} finds it, or makes it."
            )
        else:
            text = "Nothing was handed in."
        typer.echo(text, err=True)
        raise
    if batch["input_file_id"] != uploaded["id"]:  # it was there already, from another upload
        with suppress(UnreachableError, ServerError):
            client.delete_file(uploaded["id"])
        typer.echo("This was handed in before.", err=True)
    return batch


def create(client: Client, file: str, key: str, **options: Any) -> dict[str, Any]:
    for wait_s in RETRY_WAITS_S:
        try:
            return client.submit(file, key=key, **options)
        except UnreachableError:
            pass
        except ServerError as error:
            if error.status not in TEMPORARY:
                raise
        time.sleep(wait_s)
    return client.submit(file, key=key, **options)


# What people see


def show(polled: Polled, *, as_json: bool) -> None:
    batch = polled.batch
    if as_json:
        typer.echo(json.dumps(batch))
        return
    counts = batch["request_counts"]
    typer.echo(f"{batch['id']} {describe(batch)}")
    for state in ("failed", "expired", "cancelled"):
        if counts[state]:
            typer.echo(f"{counts[state]} {state}")
    errors = (batch["errors"] or {"data": []})["data"]
    for error in errors[:MAX_ERRORS]:
        place = "" if error["line"] is None else f"line {error['line']}: "
        tell_error(f"{place}{error['message']}")
    if len(errors) > MAX_ERRORS:
        typer.echo(f"... and {len(errors) - MAX_ERRORS} more; --json has all of them.", err=True)


def show_until_end(client: Client, polled: Polled) -> ExitCode:
    batch, where = polled.batch["id"], say_server(client)
    try:
        polled = follow(client, polled)
    except KeyboardInterrupt:
        typer.echo(
            f"The batch goes on. To watch it again: darkroom status {batch} --watch{where}\n"
            f"To stop it: darkroom cancel {batch}{where}",
            err=True,
        )
        raise
    except UnreachableError:
        again = f"darkroom status {batch} --watch{where}"
        typer.echo(f"The batch goes on when the server does. To watch it: {again}", err=True)
        raise
    show(polled, as_json=False)
    if polled.batch["output_file_id"] or polled.batch["error_file_id"]:
        typer.echo(f"Results: darkroom results {batch}{where}", err=True)
    return judge(polled)


def say_server(client: Client) -> str:
    """The option that a command in a hint needs, if it needs one."""
    usual = os.environ.get("DARKROOM_SERVER", DEFAULT_SERVER)
    return "" if client.server == usual else f" --server {client.server}"


def judge(polled: Polled) -> ExitCode:
    """0 also while it runs; 1 if it ended with anything but a text for every item."""
    batch, counts = polled.batch, polled.batch["request_counts"]
    is_good = not polled.has_ended or (
        batch["status"] == "completed" and counts["completed"] == counts["total"]
    )
    return ExitCode.DONE if is_good else ExitCode.SOME_FAILED


def read_results(client: Client, polled: Polled) -> Iterator[bytes]:
    if not polled.has_ended:
        yield from client.read_results(polled.batch["id"])
        return
    for file in (polled.batch["output_file_id"], polled.batch["error_file_id"]):
        if file is not None:
            yield from client.read_file(file)


def write_whole(path: Path, pieces: Iterator[bytes]) -> None:
    """Write a file that is there whole or, if that fails, as it was before."""
    if path.exists() and not path.is_file():  # a pipe or a device
        with path.open("wb") as file:
            file.writelines(pieces)
        return
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            file.writelines(pieces)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
