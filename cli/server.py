"""
`darkroom api`, `up` and `serve`: the HTTP server, and a whole service on this machine.

`up` and `serve` start the API, a worker for the cpu queue and those of a model, each as a process of
its own, on one broker.
"""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Final, NoReturn

from cli.errors import CannotStartError, ExitCode
from cli.garbage import settle
from cli.group import Group, Member
from cli.service import prepare_database, read_object, reported

if TYPE_CHECKING:
    from api.config import ApiConfig
    from tasks.config import Config

API_THREADS: Final = 40
BACKLOG: Final = 2048
WORKER_NICENESS: Final = 5
"""On one host, whoever asks how a job stands must not wait until the processors are idle."""

STOP_GRACE_S: Final = 15.0  # beyond the workers' own deadline


def run_api(host: str, port: int) -> ExitCode:
    """
    Serve HTTP until the process is told to stop.

    Requests need no key only where no database is given and only this host can ask.

    Raises:
        CannotStartError: the message says what to change.
    """
    with reported():
        from api.app import create_app
        from api.server import build_server
        from tasks.broker import open_broker, ping
        from tasks.config import load_config
        from tasks.dispatch import Dispatcher
        from tasks.logs import configure_logging
        from tasks.stores import open_stores

        configure_logging()
        config = load_config()
        prepare_database(config)
        api_config = build_api_config(config, host)
        for number in (signal.SIGINT, signal.SIGTERM):
            # uvicorn raises the signal again when it has stopped: what is open must be closed then, too.
            signal.signal(number, _leave)
        with (
            open_broker(config) as url,
            closing(open_stores(config, num_threads=API_THREADS)) as stores,
            closing(Dispatcher(config, url)) as dispatcher,
            open_listener(host, port) as listener,
        ):
            app = create_app(
                api_config,
                stores.database,
                stores.blobs,
                notify_created=dispatcher.send_expand,
                notify_chat_created=dispatcher.send_fast_expand,
                notify_cancelled=lambda _job: dispatcher.send_sweep(),
                pings={"broker": partial(ping, url)},
            )
            server = build_server(app, api_config, host=host, port=port)
            settle()
            server.run(sockets=[listener])
    return ExitCode.DONE


def build_api_config(config: "Config", host: str) -> "ApiConfig":
    """
    What the API is told of the settings, when it listens on this address.

    Raises:
        BadSettingError, BadApiConfigError: there is no good pepper, or files of this host are open to
            another one.
    """
    from api.config import ApiConfig, ServedModel, is_loopback
    from tasks.config import DEFAULT_TENANT
    from tasks.errors import BadSettingError
    from tasks.stores import load_pepper

    if config.media_root is not None and not is_loopback(host):
        raise BadSettingError(
            "DARKROOM_MEDIA_ROOT opens files of this host, so the server listens on a loopback "
            "address only. Unset it, or use --host 127.0.0.1."
        )
    return ApiConfig(
        pepper=load_pepper(config),
        is_open=not config.database_url and is_loopback(host),
        open_tenant=DEFAULT_TENANT,
        models=tuple(ServedModel(name) for name in config.models),
        max_file_bytes=config.max_file_bytes,
        max_batch_bytes=config.max_batch_bytes,
        max_batch_lines=config.max_lines,
        max_body_bytes=config.max_body_bytes,
        max_held_bytes=config.max_held_bytes,
        body_timeout_s=config.body_timeout_s,
        max_open_items=config.max_open_items,
        max_open_bytes=config.max_open_bytes,
        batch_file_lifetime_s=config.batch_file_lifetime_s,
        chat_timeout_s=config.chat_timeout_s,
        metrics_from=config.metrics_from,
    )


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(ExitCode.DONE)


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """
    What is served, as vLLM's `serve` calls it.

    Attributes:
        model: a checkpoint's folder, a hub id, or the bundled model.
        served_model_name: what clients call it; None: `model` itself.
        limits: as `image=4`; None: what the settings say.
        max_model_len: in tokens; None: what the settings say, or the model allows.
        num_workers: processes that run the model, one a GPU where there are any.
        mm_processor_kwargs: as JSON. This and the three before it: see `LLM`.
    """

    model: str
    served_model_name: str | None = None
    limits: str | None = None
    max_model_len: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    num_workers: int = 1
    revision: str | None = None
    trust_remote_code: bool = False
    chat_template: str | None = None
    mm_processor_kwargs: str | None = None

    @property
    def name(self) -> str:
        return self.served_model_name or self.model


def run_up(options: ServeOptions, host: str, port: int) -> ExitCode:
    """
    Run a whole service until Ctrl-C.

    Raises:
        CannotStartError: the message says what to change.
    """
    read_object("--mm-processor-kwargs", options.mm_processor_kwargs)
    with reported():
        from tasks.broker import open_broker
        from tasks.config import load_config
        from tasks.logs import configure_logging

        config = load_config()
        models = describe_models(config, options)
        worker_envs = spread_workers(options.num_workers, options.device)
        open_listener(host, port).close()  # before anything else is started for nothing
        configure_logging()
        prepare_database(config)
        with open_broker(config) as url:
            env = {**os.environ, "DARKROOM_REDIS_URL": url, "DARKROOM_MODELS": models}
            for name in ("DARKROOM_REDIS_URL_FILE", "DARKROOM_MAX_MODEL_LEN"):
                env.pop(name, None)  # read by now, and said in another way
            group = Group(env)
            api_args = ("api", "--host", host, "--port", str(port))
            group.add(Member("the API", api_args, hurry=signal.SIGINT))  # uvicorn's word for now
            group.add(Member("the cpu worker", ("worker", "--cpu"), niceness=WORKER_NICENESS))
            for number, env in enumerate(worker_envs, 1):
                which = f" {number}" if len(worker_envs) > 1 else ""
                name = f"worker{which} of {options.name}"
                group.add(Member(name, worker_args(options), env, niceness=WORKER_NICENESS))
            print(
                f"darkroom: {options.name} at {show_url(host, port)}, data in {config.home}; "
                "Ctrl-C stops",
                flush=True,
            )
            return group.run(stop_within_s=config.drain_s + STOP_GRACE_S)


def describe_models(config: "Config", options: ServeOptions) -> str:
    """DARKROOM_MODELS with the served one in it, as the options say and else the settings."""
    from tasks.config import MediaLimits, parse_limits

    limits = config.limits_of(options.name)
    if options.limits is not None:
        try:
            limits = MediaLimits(**parse_limits(options.limits))
        except ValueError as error:
            raise CannotStartError(f"--limit-mm-per-prompt: {error}.") from error
    length = options.max_model_len or config.max_model_len_of(options.name)
    known = {name: settings.model_dump() for name, settings in config.models.items()}
    return json.dumps(known | {options.name: {**limits.model_dump(), "max_model_len": length}})


def worker_args(options: ServeOptions) -> tuple[str, ...]:
    words = ["worker", "--model", options.model, "--device", options.device]
    for option, value in (
        ("--served-model-name", options.served_model_name),
        ("--revision", options.revision),
        ("--chat-template", options.chat_template),
        ("--mm-processor-kwargs", options.mm_processor_kwargs),
    ):
        words += [] if value is None else [option, value]
    words += ["--trust-remote-code"] if options.trust_remote_code else []
    return (*words, "--dtype", options.dtype)


def spread_workers(num_workers: int, device: str) -> list[dict[str, str]]:
    """What each worker's environment has of its own: its GPU, or its share of the cores."""
    if num_workers == 1:
        return [{}]
    gpus = [] if device == "cpu" else _find_gpus()
    if gpus and num_workers > len(gpus):
        raise CannotStartError(
            f"--workers {num_workers} is more than the {len(gpus)} GPUs here, and a GPU has one."
        )
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:num_workers]]
    if "OMP_NUM_THREADS" in os.environ:
        return [{} for _ in range(num_workers)]
    share = max(1, (os.cpu_count() or 1) // num_workers)
    return [{"OMP_NUM_THREADS": str(share)} for _ in range(num_workers)]


def _find_gpus() -> list[str]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them. Asking torch would take seconds."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        program = shutil.which("nvidia-smi")
        if program is None:
            return []
        asked = subprocess.run(  # noqa: S603 - what is on the path
            [program, "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        )
        named = "" if asked.returncode else asked.stdout.replace("\n", ",")
    return [gpu.strip() for gpu in named.split(",") if gpu.strip()]


# Where it listens


def open_listener(host: str, port: int) -> socket.socket:
    """
    Raises:
        CannotStartError: the port is taken, or the address is none of this host.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family, backlog=BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise CannotStartError(
                f"Port {port} on {host} is taken. Stop what listens there, or give another --port."
            ) from error
        raise CannotStartError(
            f"Cannot listen on {host}, port {port}: {error.strerror}."
        ) from error


def show_url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
