"""
The verbs that talk to a server: submit, status, results, cancel.

What is asked for goes to stdout, progress and notes to stderr. Exit codes: 0 done, 1 some items
failed or the server refused, 2 usage, 3 the server is out of reach.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from cli.client import DEFAULT_SERVER, Client, Polled, ServerError, UnreachableError
from cli.errors import ExitCode
from cli.inputs import Refused, find_pictures
from cli.lines import build_line, build_picture
from cli.questions import PICTURE_PROMPT
from engine.config import BUNDLED_MODEL

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


class ImagePolicy(StrEnum):
    REJECT = "reject"
    TRUNCATE = "truncate"
    SAMPLE = "sample"


class OnInvalid(StrEnum):
    FAIL = "fail"
    SKIP = "skip"


def submit(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATH", help="One JSONL file, or pictures, folders and globs."),
    ],
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", envvar="DARKROOM_PROMPT", help="What to ask of pictures.")
    ] = PICTURE_PROMPT,
    model: Annotated[
        str, typer.Option(metavar="MODEL", envvar="DARKROOM_MODEL", help="For pictures.")
    ] = BUNDLED_MODEL,
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
            help="The same key and file again: the same batch.",
        ),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Show how it goes, until it ends.")] = False,
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
) -> None:
    """
    Hand in a batch, and write its id.

    A JSONL file goes as it is, in OpenAI's form. Pictures are sent inside the lines, so the
    server needs no access to them.

    \b
    Examples:
      darkroom submit captions.jsonl
      darkroom submit holiday/ --prompt "What is in the foreground?" --wait
    """
    client = Client(server, api_key)
    with problems_told(), open_manifest(paths, prompt, model) as (file, num_bytes, name):
        uploaded = client.upload(file, num_bytes, name)
        batch = client.submit(
            uploaded["id"],
            key=key,
            completion_window=window,
            priority=priority,
            image_policy=image_policy.value,
            on_invalid=on_invalid.value,
        )
        typer.echo(batch["id"])
        if wait:
            raise typer.Exit(show_until_end(client, batch["id"]))


def status(
    batch: BatchId,
    watch: Annotated[bool, typer.Option("--watch", help="Until it ends.")] = False,
    as_json: AsJson = False,
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
) -> None:
    """Show how a batch stands."""
    client = Client(server, api_key)
    with problems_told():
        polled = client.poll(batch)
        if watch and not as_json:
            raise typer.Exit(show_until_end(client, batch, polled))
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
            with output.open("wb") as file:
                file.writelines(pieces)
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
        typer.echo(str(error), err=True)
        raise typer.Exit(ExitCode.UNREACHABLE) from error
    except ServerError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(ExitCode.SOME_FAILED) from error
    except OSError as error:
        typer.echo(f"{error.filename or 'A file'}: {error.strerror}", err=True)
        raise typer.Exit(ExitCode.USAGE) from error


@contextmanager
def open_manifest(
    paths: list[str], prompt: str, model: str
) -> Iterator[tuple[IO[bytes], int, str]]:
    """The lines to hand in: a file, how long it is, and its name."""
    if len(paths) == 1 and paths[0].endswith(".jsonl"):
        with Path(paths[0]).open("rb") as file:
            yield file, Path(paths[0]).stat().st_size, Path(paths[0]).name
        return
    with tempfile.TemporaryFile() as file:
        num_lines = 0
        for found in find_pictures(paths).inputs:
            if isinstance(found, Refused):
                typer.echo(f"error: {found.path}: {found.problem}", err=True)
                continue
            num_lines += 1
            path = Path(found.path)
            file.write(build_line(f"{num_lines}:{path.name}", model, build_picture(path), prompt))
        if num_lines == 0:
            raise typer.Exit(ExitCode.USAGE)
        num_bytes = file.tell()
        file.seek(0)
        yield file, num_bytes, "pictures.jsonl"


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
    for error in (batch["errors"] or {"data": []})["data"]:
        place = "" if error["line"] is None else f"line {error['line']}: "
        typer.echo(f"error: {place}{error['message']}", err=True)


def describe(batch: dict[str, Any]) -> str:
    counts = batch["request_counts"]
    return f"{batch['status']} {count_ended(counts)}/{counts['total']}"


def count_ended(counts: dict[str, int]) -> int:
    return sum(counts[state] for state in ("completed", "failed", "expired", "cancelled"))


def show_until_end(client: Client, batch: str, polled: Polled | None = None) -> ExitCode:
    """A bar where stderr is a terminal, otherwise a line for each new state; then how it ended."""
    polled = polled or client.poll(batch)
    is_terminal = sys.stderr.isatty()
    shown = ""
    with Progress(console=Console(file=sys.stderr), disable=not is_terminal) as bar:
        task = bar.add_task("", total=None)
        while not polled.has_ended:
            counts = polled.batch["request_counts"]
            status_now = polled.batch["status"]
            bar.update(
                task,
                description=status_now,
                total=counts["total"] or None,
                completed=count_ended(counts),
            )
            if status_now != shown and not is_terminal:
                typer.echo(describe(polled.batch), err=True)
            shown = status_now
            polled = client.poll(batch, after=polled)
    show(polled, as_json=False)
    return judge(polled)


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
