"""
The `darkroom` command: its verbs and their options.

Nothing here runs a model: a verb turns its options into values and hands them to the room that
does. Importing this file loads neither torch nor transformers, so that --help is quick.
"""

import os
import platform
import re
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from cli import keys, remote
from cli.demo import run_demo
from cli.errors import CannotStartError, ExitCode
from cli.garbage import put_off
from cli.inputs import Found, Input, find_clips, find_pictures
from cli.local import EngineOptions, run
from cli.models import show_models
from cli.questions import (
    CLIP_PROMPT,
    NUM_FRAMES,
    PICTURE_PROMPT,
    Form,
    Question,
    Segmented,
    ask_about_clip,
    ask_about_picture,
    ask_in_segments,
)
from cli.segments import parse_cut
from cli.show import Screen, note_left_out
from engine.config import BUNDLED_MODEL, LORA_REMEDY
from engine.errors import BadSamplingParams
from engine.request import SamplingParams
from media.errors import BadFrameSamplingError
from media.frames import build_sampling
from media.limits import VIDEO_LIMITS

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,  # plain text can be piped and copied
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with `darkroom demo`. `darkroom VERB --help` explains a verb.",
)

Model = Annotated[
    str,
    typer.Option(
        metavar="MODEL",
        envvar="DARKROOM_MODEL",
        help=f"Folder of a checkpoint, or its hub id if it is in the cache. {BUNDLED_MODEL} comes with Darkroom.",
    ),
]
Device = Annotated[
    str, typer.Option(metavar="DEVICE", envvar="DARKROOM_DEVICE", help="auto, cpu or cuda.")
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="DTYPE", envvar="DARKROOM_DTYPE", help="auto, float32, float16 or bfloat16."
    ),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        envvar="DARKROOM_MAX_MODEL_LEN",
        help="Room for one prompt and its text, in tokens.",
        show_default="what the model allows",
    ),
]
MaxPixels = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        envvar="DARKROOM_MAX_PIXELS",
        help="Largest area at which a picture is looked at, in pixels; less is quicker.",
        show_default="what the model says",
    ),
]
MaxTokens = Annotated[
    int,
    typer.Option(min=1, metavar="N", envvar="DARKROOM_MAX_TOKENS", help="Longest text, in tokens."),
]
Temperature = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=2.0,
        metavar="T",
        envvar="DARKROOM_TEMPERATURE",
        help="0 gives the same text every time; more gives more variety.",
    ),
]


def check_text(text: str) -> str:
    """Refuse bytes that are no UTF-8, which Python hands over as lone surrogates."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise typer.BadParameter("The text is not UTF-8.")
    return text


Prompt = Annotated[
    str,
    typer.Option(
        metavar="TEXT", envvar="DARKROOM_PROMPT", help="What to ask.", callback=check_text
    ),
]
AsJson = Annotated[
    bool,
    typer.Option(
        "--json", envvar="DARKROOM_JSON", help="Write NDJSON: an object a line, errors included."
    ),
]


def show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"darkroom {find_version('darkroom')}")
        raise typer.Exit


def find_version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def main() -> None:
    """What a shell starts: the command, in a process that ends when it says so."""
    put_off()
    open_missing_streams()
    # Pillow warns of large pictures. Ours are refused or read by limits of our own, in one line.
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")
    try:
        app()
    except SystemExit as end:
        if end.code == ExitCode.INTERRUPTED:
            leave(ExitCode.INTERRUPTED)
        raise
    except OSError as error:
        if error.filename is not None:
            raise
        # One of the streams, since no file is to blame: a full disk, most often.
        with suppress(OSError):
            print(f"error: The output cannot be written: {error.strerror}.", file=sys.stderr)
        leave(ExitCode.SOME_FAILED)


def open_missing_streams() -> None:
    """Let nothing that is opened later take the number of a stream that the shell has closed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115


def leave(code: ExitCode) -> NoReturn:
    """End without waiting: threads that read a pipe which nobody writes to would hold the process."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


@app.callback()
def darkroom(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=show_version, is_eager=True, help="Show the version and end."
        ),
    ] = False,
) -> None:
    """
    Run vision-language models over many pictures.

    Texts go to stdout; progress, notes and errors go to stderr. Every option can also be set by
    the environment variable that stands beside it.
    """


@app.command()
def caption(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH", help="Pictures, folders of them, or globs.")
    ],
    prompt: Prompt = PICTURE_PROMPT,
    model: Model = BUNDLED_MODEL,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    as_json: AsJson = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_model_len: MaxModelLen = None,
    max_pixels: MaxPixels = None,
) -> None:
    """
    Caption pictures, each by itself.

    Folders are searched with the folders in them; hidden files are left out. Texts come in the
    order of the paths, each as soon as all before it are done, as one line `path: text`.

    A picture that cannot be read costs one line on stderr and no other picture.

    \b
    Exit codes:
      0    every picture has its text
      1    some failed, the rest is done
      2    a wrong option or model
      130  stopped by Ctrl-C, which lets begun pictures end; twice leaves at once

    \b
    Examples:
      darkroom caption holiday/
      darkroom caption holiday/ cat.png --prompt "What is in the foreground?"
      darkroom caption 'scans/**/*.jpg' --json > captions.ndjson
    """
    found = find_pictures(paths)
    raise typer.Exit(
        run(
            found.inputs,
            partial(ask_about_picture, prompt=prompt),
            build_screen("images", found, as_json=as_json),
            options=EngineOptions(model, device, dtype, max_model_len, max_pixels),
            params=build_params(max_tokens, temperature),
            limits={"image": 1, "video": 0},
        )
    )


@app.command()
def describe(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="CLIP", help="Clips, folders of frames (one clip each), or globs."),
    ],
    frames: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=VIDEO_LIMITS.max_frames,
            metavar="N",
            envvar="DARKROOM_FRAMES",
            help="Frames to look at, spread evenly over the clip.",
            show_default=f"{NUM_FRAMES}, or what --fps makes of the clip",
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            envvar="DARKROOM_FPS",
            help="Frames to look at for each second of the clip; with --frames, at most so many.",
        ),
    ] = None,
    start: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", envvar="DARKROOM_START", help="Where to begin, from the first frame."
        ),
    ] = 0.0,
    end: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            envvar="DARKROOM_END",
            help="Where to end.",
            show_default="the clip's end",
        ),
    ] = None,
    keyframes: Annotated[
        bool,
        typer.Option(
            "--keyframes",
            envvar="DARKROOM_KEYFRAMES",
            help="Look at key frames only: quicker, but they stand where the encoder put them.",
        ),
    ] = False,
    dedupe: Annotated[
        bool,
        typer.Option(
            "--dedupe",
            envvar="DARKROOM_DEDUPE",
            help="Leave out frames that look like the one before.",
        ),
    ] = False,
    segments: Annotated[
        str | None,
        typer.Option(
            metavar="10s|30",
            envvar="DARKROOM_SEGMENTS",
            help="Ask about each segment by itself, of so many seconds or so many of equal length, "
            "and then for all of them as one text. The options above count for each.",
        ),
    ] = None,
    prompt: Prompt = CLIP_PROMPT,
    form: Annotated[
        Form,
        typer.Option("--as", envvar="DARKROOM_AS", help="Show the model a video, or still images."),
    ] = Form.VIDEO,
    model: Model = BUNDLED_MODEL,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    as_json: AsJson = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_model_len: MaxModelLen = None,
    max_pixels: MaxPixels = None,
) -> None:
    """
    Describe clips by a few of their frames.

    A folder is one clip: its pictures are the frames, in the order in which people count
    (frame2 before frame10). --json says which frames were looked at, and their times; with --dedupe
    also how many were left out.

    With --segments, what stands for each segment comes before the clip's own line, after its times;
    --json has it under parts.

    Output, errors and exit codes are those of `darkroom caption`.

    \b
    Examples:
      darkroom describe ball.mp4
      darkroom describe lecture.mp4 --segments 30s
      darkroom describe ball.mp4 --frames 16 --json
      darkroom describe lecture.mp4 --start 600 --end 660 --fps 0.5 --dedupe
      darkroom describe timelapse/ --as images --prompt "What changes?"
    """
    asked = {"num_frames": frames, "fps": fps, "start_s": start, "end_s": end}
    given = {name: value for name, value in asked.items() if value is not None}
    if frames is None and fps is None:
        given["num_frames"] = NUM_FRAMES
    try:
        sampling = build_sampling({**given, "keyframes": keyframes, "dedupe_frames": dedupe})
    except BadFrameSamplingError as error:
        raise typer.BadParameter(_in_options(str(error))) from error
    ask: Callable[[Input], Question | Segmented]
    ask = partial(ask_about_clip, sampling=sampling, form=form, prompt=prompt)
    if segments is not None:
        try:
            cut = parse_cut(segments)
        except ValueError as error:  # also what media says of it
            raise typer.BadParameter(f"--segments: {error}") from error
        ask = partial(ask_in_segments, sampling=sampling, form=form, prompt=prompt, cut=cut)
    found = find_clips(paths)
    is_video = form is Form.VIDEO
    max_frames = sampling.num_frames or VIDEO_LIMITS.max_frames
    raise typer.Exit(
        run(
            found.inputs,
            ask,
            build_screen("clips", found, as_json=as_json),
            options=EngineOptions(model, device, dtype, max_model_len, max_pixels),
            params=build_params(max_tokens, temperature),
            limits={"image": 0, "video": 1} if is_video else {"image": max_frames, "video": 0},
        )
    )


def _in_options(text: str) -> str:
    """What media says of a sampling, in the words of this command."""
    return re.sub(r"\b(start|end)_s\b", r"--\1", re.sub(r"\bfps\b", "--fps", text))


@app.command()
def demo(
    device: Device = "auto",
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 if a drawn picture is described wrongly.")
    ] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Ask the engine in this process, without a service.")
    ] = False,
) -> None:
    """
    Caption the sample pictures with the bundled model and mark what is right.

    Drawn pictures have one true sentence each, so the demo knows. The samples go through a whole
    service, started for them and stopped again: its database and files stay in a new folder, or in
    DARKROOM_HOME where it is set.
    """
    raise typer.Exit(run_demo(device, must_be_right=check, is_offline=offline))


for verb in (remote.submit, remote.status, remote.results, remote.cancel):
    app.command()(verb)
app.add_typer(keys.app, name="keys")


Limits = Annotated[
    str | None,
    typer.Option(
        metavar="LIMITS",
        help="What one prompt may hold, as image=4,video=1,frames=64 (of a clip) or as JSON.",
        show_default="DARKROOM_MODELS, DARKROOM_LIMIT_MM_PER_PROMPT",
    ),
]
ServedModelName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        envvar="DARKROOM_SERVED_MODEL_NAME",
        help="What jobs call the model.",
        show_default="MODEL, as it is given",
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        metavar="REVISION",
        envvar="DARKROOM_REVISION",
        help="Branch, tag or commit of a hub id in the cache; each result names the commit.",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        envvar="DARKROOM_TRUST_REMOTE_CODE",
        help="Let code that lies beside the weights run. No model of docs/models.md needs it.",
    ),
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        envvar="DARKROOM_CHAT_TEMPLATE",
        help="Chat template in place of the model's own, as a file or as Jinja text.",
    ),
]
ProcessorKwargs = Annotated[
    str | None,
    typer.Option(
        "--mm-processor-kwargs",
        metavar="JSON",
        envvar="DARKROOM_MM_PROCESSOR_KWARGS",
        help='How pictures and clips are looked at, as {"num_crops": 4} or {"max_pixels": 200704}.',
    ),
]
Task = Annotated[
    str | None,
    typer.Option(
        metavar="TASK", hidden=True, help="vLLM's word for what a server does: generate, or auto."
    ),
]


def refuse_lora(given: object) -> None:
    """vLLM's words for adapters, which would otherwise be taken for typing errors."""
    if given:
        raise typer.BadParameter(f"No adapter is applied per request. {LORA_REMEDY}.")


EnableLora = Annotated[bool, typer.Option("--enable-lora", hidden=True, callback=refuse_lora)]
LoraModules = Annotated[
    list[str] | None, typer.Option(metavar="NAME=PATH", hidden=True, callback=refuse_lora)
]
Workers = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="N",
        envvar="DARKROOM_WORKERS",
        help="Processes that run the model, one a GPU where there are any.",
    ),
]
Host = Annotated[
    str, typer.Option(metavar="ADDRESS", envvar="DARKROOM_HOST", help="Address to listen on.")
]
Port = Annotated[
    int,
    typer.Option(min=1, max=65535, metavar="N", envvar="DARKROOM_PORT", help="Port to listen on."),
]


@app.command()
def api(host: Host = "127.0.0.1", port: Port = 8000) -> None:
    """
    Serve OpenAI's files and batches over HTTP. Workers do the work: see `darkroom worker`.

    Requests need an API key (`darkroom keys create`), but for a server without DARKROOM_DATABASE_URL
    that listens for this host alone.
    """
    from cli.server import run_api

    _exit_after(lambda: run_api(host, port))


@app.command()
def up(
    model: Model = BUNDLED_MODEL,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    limit_mm_per_prompt: Limits = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_model_len: MaxModelLen = None,
    served_model_name: ServedModelName = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    chat_template: ChatTemplate = None,
    mm_processor_kwargs: ProcessorKwargs = None,
    workers: Workers = 1,
) -> None:
    """
    Run a whole service on this machine: API, workers and a broker of its own. Ctrl-C stops it.

    Without DARKROOM_DATABASE_URL, DARKROOM_BLOBS and DARKROOM_REDIS_URL all data lies in
    DARKROOM_HOME, by default ~/.darkroom. Then requests from this host need no key; with another
    --host all need one: see `darkroom keys create`.

    Ctrl-C: what is begun goes on for DARKROOM_DRAIN_S. Twice: now. Nothing that was handed in is lost.

    \b
    Examples:
      darkroom up
      darkroom submit samples/ --wait      in another terminal
    """
    from cli.server import ServeOptions, run_up

    options = ServeOptions(
        model,
        served_model_name,
        limit_mm_per_prompt,
        max_model_len,
        device,
        dtype,
        workers,
        revision,
        trust_remote_code,
        chat_template,
        mm_processor_kwargs,
    )
    _exit_after(lambda: run_up(options, host, port))


@app.command()
def serve(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Folder of a checkpoint, its hub id if it is in the cache, or the bundled model.",
        ),
    ],
    host: Host = "127.0.0.1",
    port: Port = 8000,
    limit_mm_per_prompt: Limits = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_model_len: MaxModelLen = None,
    served_model_name: ServedModelName = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    chat_template: ChatTemplate = None,
    mm_processor_kwargs: ProcessorKwargs = None,
    workers: Workers = 1,
    task: Task = None,
    enable_lora: EnableLora = False,
    lora_modules: LoraModules = None,
) -> None:
    """
    Serve one model, in the words of vLLM's `serve`: `darkroom up` for whoever comes from there.

    What has no option here, fp8 and kept prefixes among it, is a setting: see docs/deploy.md.

    \b
    Examples:
      darkroom serve Qwen/Qwen2-VL-2B-Instruct --limit-mm-per-prompt image=2 --max-model-len 4096
      darkroom serve microsoft/Phi-3.5-vision-instruct --task generate --trust-remote-code \\
        --max-model-len 4096 --limit-mm-per-prompt image=2
    """
    if task not in (None, "generate", "auto"):
        raise typer.BadParameter(
            "Darkroom writes text from pictures and text: generate, or leave it out.",
            param_hint="--task",
        )
    up(
        model,
        host,
        port,
        limit_mm_per_prompt,
        device,
        dtype,
        max_model_len,
        served_model_name,
        revision,
        trust_remote_code,
        chat_template,
        mm_processor_kwargs,
        workers,
    )


def _exit_after(run: Callable[[], int]) -> NoReturn:
    try:
        code = run()
    except CannotStartError as error:
        typer.echo(f"error: {error}", err=True)
        code = error.code
    raise typer.Exit(code)


@app.command()
def worker(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            envvar="DARKROOM_MODEL",
            help="Folder of a checkpoint, its hub id if it is in the cache, or the bundled model.",
        ),
    ] = None,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="Serve no model but expand and finish jobs.")
    ] = False,
    limit_mm_per_prompt: Limits = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_model_len: MaxModelLen = None,
    served_model_name: ServedModelName = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    chat_template: ChatTemplate = None,
    mm_processor_kwargs: ProcessorKwargs = None,
) -> None:
    """
    Serve jobs: of one model on this machine's device, or the work around them.

    Database, blobs and broker are named by DARKROOM_DATABASE_URL, DARKROOM_BLOBS and
    DARKROOM_REDIS_URL; without them they lie under DARKROOM_HOME and need nothing else.

    SIGTERM or Ctrl-C: what is begun goes on for DARKROOM_DRAIN_S, and everything else goes to
    other workers. Twice: now.

    \b
    Exit codes:
      0    stopped as asked
      2    a setting that cannot work, or a schema of another version
      3    database or broker out of reach: start it again
      70   the device was lost: start it again
      75   stopped, and the deadline cut some work short

    \b
    Examples:
      darkroom worker --cpu
      darkroom worker --model darkroom-tiny --limit-mm-per-prompt image=4
    """
    from cli.worker import run_worker

    if not cpu and model is None:
        raise typer.BadParameter("give --model MODEL, or --cpu", param_hint="--model")
    _exit_after(
        lambda: run_worker(
            model=None if cpu else model,
            served_model_name=served_model_name,
            limits=limit_mm_per_prompt,
            max_model_len=max_model_len,
            device=device,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            chat_template=chat_template,
            mm_processor_kwargs=mm_processor_kwargs,
        )
    )


@app.command()
def migrate(
    check: Annotated[
        bool,
        typer.Option("--check", help="Change nothing; exit with 1 if the schema is another one."),
    ] = False,
) -> None:
    """
    Bring the database of DARKROOM_DATABASE_URL to this version's schema, once for all hosts.

    API and workers do not start on any other schema; a service without DARKROOM_DATABASE_URL
    migrates its own by itself. It may run while others work, and twice at once: one waits for
    the other. It gives up, with nothing changed, if others hold a table for too long.

    \b
    Exit codes:
      0    the schema is up to date
      1    with --check: it is not
      2    it cannot be, with this version or these settings
      3    the database does not answer, or is too busy
    """
    from cli.migrate import run_migrate

    _exit_after(lambda: run_migrate(is_check=check))


@app.command()
def models(as_json: AsJson = False) -> None:
    """
    Show the model families: what each supports, and the limits where nobody says otherwise.

    A checkpoint belongs to one by the model_type of its config.json; any size of it will do.
    """
    show_models(as_json=as_json)


@app.command()
def version() -> None:
    """Show the versions of Darkroom and of what it runs on."""
    typer.echo(f"darkroom {find_version('darkroom')}")
    typer.echo(f"python {platform.python_version()}")
    for package in ("torch", "transformers", "pillow", "av"):
        typer.echo(f"{package} {find_version(package)}")


def build_screen(noun: str, found: Found, *, as_json: bool) -> Screen:
    screen = Screen(noun, as_json=as_json)
    note_left_out(screen, found)
    return screen


def build_params(max_tokens: int, temperature: float) -> SamplingParams:
    try:
        return SamplingParams(max_tokens=max_tokens, temperature=temperature)
    except BadSamplingParams as error:
        raise typer.BadParameter(str(error), param_hint=f"--{error.param}") from error
