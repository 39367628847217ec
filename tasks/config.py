"""
What an operator decides: the variables DARKROOM_*, read once at the edge of a process, then frozen.

`load_config` is called once by whatever starts a process, and its value is passed in from there on.
A value that makes no sense stops the start and names its variable.
"""

import json
import os
import re
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from storage import pepper
from storage.tenants import Caps
from tasks.errors import BadSettingError

PREFIX: Final = "DARKROOM_"
DEFAULT_TENANT: Final = "default"
"""Whose work it is where nobody says: an open server on loopback, a producer that names no tenant."""

SECRETS: Final = ("database_url", "redis_url", "pepper")
"""What holds a secret may also come from a file, such as a mounted one: DARKROOM_PEPPER_FILE, …"""

MEBIBYTE: Final = 1024 * 1024
DAY_S: Final = 24 * 3600

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=1, le=65_535)]
Network = IPv4Network | IPv6Network


class MediaLimits(BaseModel):
    """
    How many pictures and videos one prompt may hold.

    Args:
        frames: looked at of one clip, or of one part of it; None: as many as the engine takes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: int = Field(default=1, ge=0)
    video: int = Field(default=1, ge=0)
    frames: int | None = Field(default=None, ge=1)

    def lowered(self, caps: Caps) -> "MediaLimits":
        """The same under a tenant's caps, which never raise one."""
        frames = [limit for limit in (self.frames, caps.max_frames) if limit is not None]
        return MediaLimits(
            image=self.image if caps.max_images is None else min(self.image, caps.max_images),
            video=self.video if caps.max_videos is None else min(self.video, caps.max_videos),
            frames=min(frames, default=None),
        )

    def __str__(self) -> str:
        frames = "" if self.frames is None else f", frames={self.frames}"
        return f"image={self.image}, video={self.video}{frames}"


class ModelSettings(MediaLimits):
    """
    What is said about one model in DARKROOM_MODELS.

    Args:
        max_model_len: room for one prompt and its text, in tokens; None: what the model allows.
    """

    max_model_len: Count | None = None


class Config(BaseSettings):
    """
    The settings, by the names of their variables without the prefix.

    Args:
        home: where the embedded database, blobs and broker lie.
        database_url: sqlite:///PATH or postgresql://…; by default a file under `home`.
        blobs: a folder, or s3://bucket/prefix; by default a folder under `home`.
        redis_url: of a broker that is there; by default we start one of our own.
        media_s3_buckets: what items may name as s3://…: buckets or prefixes with commas between, where
            {tenant} is a segment that stands for the tenant's name; by default nothing.
        media_s3_profile: of AWS's shared files, whose keys read them; by default requests are not
            signed. The keys of the blobs are never used.
        media_s3_endpoint_url, media_s3_region: where those buckets are.
        media_allowed_hosts, media_allowed_networks: names that may lead to private addresses, and
            private networks that may be reached, as cdn.internal and 10.1.0.0/16; by default none.
        media_denied_networks: reached by nobody, though they are public.
        media_ports: that an address may name besides 80 and 443.
        media_host_connections, media_host_rate: fetches from one host by http, at a time and begun in a
            second, of all workers together where they share a broker.
        media_root: a folder whose files items may name as file://…; on one host without keys only.
        pepper: what API keys are hashed with, in hexadecimal digits, the same on every host; by
            default, without `database_url`, a file under `home`.
        metrics_from: networks that may read /metrics besides the host itself, as 10.0.0.0/8,fd00::/8.
        models: the models that are served, by name, as JSON: {"M": {"image": 4, "max_model_len": 4096}}.
        limit_mm_per_prompt: limits of every other model, as `image=4,video=1,frames=64` or as JSON.
        max_lines, max_batch_bytes: of the input of one job; more makes it `failed`.
        max_line_bytes: of one line; a longer one is refused alone.
        max_file_bytes: of one upload.
        max_body_bytes, max_held_bytes: of one JSON body, inline requests included, and of all that
            one API process holds at a time.
        body_timeout_s: how long the next piece of a body may take to come.
        chat_timeout_s: how long a chat completion may take, its time in the queue included.
        chat_lifetime_s: how long after its end a chat stays in the database.
        batch_file_lifetime_s: of uploads for jobs that do not say when they expire.
        max_open_items, max_open_bytes: what a tenant may have open at a time where its own row
            does not say; by default as much as there is.
        chunk_items: how many items one permit leases.
        chunks_in_flight: permits that a worker works on at a time; their items together should be
            twice what the engine runs at once, so that one's slow tail never leaves it idle.
        max_media_bytes: of lines, pictures and clips that a GPU worker holds at a time, as they came:
            fetched, or about to be, until the engine has answered.
        media_processes: processes in which a GPU worker decodes pictures and clips; by default one for
            each core that the worker leaves, and 0 decodes in its own threads.
        image_formats: TIFF, HEIC or both, which are not read otherwise.
        max_image_pixels: of one picture; a larger one fails before it is decompressed. By default 40 million.
        draft_jpegs: whether large JPEGs may be decoded at a fraction of their size: see `LLM`.
        quantization, kv_cache_dtype, enable_prefix_caching: of a GPU worker's engine: see `LLM`.
        commit_items, commit_s: results are committed in groups of so many, or after so long.
        stall_s: after which an engine that has prompts and gets on with none is taken for dead.
        lease_s, heartbeat_s: how long a claim lasts, and how often it is renewed.
        start_wait_s: how long a process that starts waits for a given broker to answer.
        drain_s: how long a worker that is told to stop goes on with what it has begun.
        sweep_s: how often the sweeper looks.
        send_timeout_s: how long a send to the broker may take before the sweeper has to do it.
        visibility_timeout_s: after which Redis hands out again what a cpu worker took and never
            acknowledged; three times the longest expansion.
        blob_grace_s: blobs that nothing needs are removed when they are so old. An upload must be over
            within that time.
        collect_s: how often blobs that nothing needs, and chats past their life, are looked for.
        ingest_idle_s: after which an entry of the stream is taken from a consumer that is silent.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    home: Path = Path("~/.darkroom")
    database_url: str = ""
    blobs: str = ""
    s3_endpoint_url: str | None = None
    s3_region: str | None = None
    s3_checksums: bool = True
    redis_url: str | None = None
    media_s3_buckets: Annotated[tuple[str, ...], NoDecode] = ()
    media_s3_profile: str | None = None
    media_s3_endpoint_url: str | None = None
    media_s3_region: str | None = None
    media_root: Path | None = None
    media_allowed_hosts: Annotated[tuple[str, ...], NoDecode] = ()
    media_allowed_networks: Annotated[tuple[Network, ...], NoDecode] = ()
    media_denied_networks: Annotated[tuple[Network, ...], NoDecode] = ()
    media_ports: Annotated[tuple[Port, ...], NoDecode] = ()
    media_host_connections: Count = 32
    media_host_rate: Count = 100
    pepper: SecretStr = SecretStr("")

    metrics_from: Annotated[tuple[Network, ...], NoDecode] = ()

    models: dict[str, ModelSettings] = Field(default_factory=dict)
    limit_mm_per_prompt: Annotated[MediaLimits, NoDecode] = MediaLimits()
    max_lines: Count = 50_000
    max_line_bytes: Count = 64 * MEBIBYTE
    max_batch_bytes: Count = 200 * MEBIBYTE
    max_file_bytes: Count = 512 * MEBIBYTE
    max_body_bytes: Count = 32 * MEBIBYTE
    max_held_bytes: Count = 256 * MEBIBYTE
    body_timeout_s: Seconds = 60.0
    chat_timeout_s: Seconds = 300.0
    chat_lifetime_s: int = Field(default=30 * DAY_S, ge=3600)
    batch_file_lifetime_s: int = Field(default=30 * DAY_S, ge=3600)
    max_open_items: Count | None = None
    max_open_bytes: Count | None = None

    chunk_items: Count = 64
    chunks_in_flight: Count = 3
    max_media_bytes: Count = 2048 * MEBIBYTE
    media_processes: int | None = Field(default=None, ge=0)
    image_formats: Annotated[tuple[str, ...], NoDecode] = ()
    max_image_pixels: Count | None = None
    draft_jpegs: bool = False
    quantization: Literal["fp8"] | None = None
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3"] = "auto"
    enable_prefix_caching: bool = False
    commit_items: Count = 64
    commit_s: Seconds = 0.2
    stall_s: Seconds = 600.0
    lease_s: Seconds = 60.0
    heartbeat_s: Seconds = 15.0
    max_attempts: Count = 3
    start_wait_s: Seconds = 30.0
    drain_s: Seconds = 30.0
    sweep_s: Seconds = 3.0
    send_timeout_s: Seconds = 0.2
    visibility_timeout_s: int = Field(default=3600, ge=60)
    blob_grace_s: float = Field(default=24 * 3600.0, ge=3600.0, allow_inf_nan=False)
    collect_s: Seconds = 3600.0
    ingest_idle_s: Seconds = 60.0

    @field_validator("home")
    @classmethod
    def _expand_home(cls, home: Path) -> Path:
        return home.expanduser().absolute()

    @field_validator("limit_mm_per_prompt", mode="before")
    @classmethod
    def _parse_limits(cls, given: object) -> object:
        return parse_limits(given) if isinstance(given, str) else given

    @field_validator(
        *("metrics_from", "media_s3_buckets", "media_allowed_hosts", "media_allowed_networks"),
        *("media_denied_networks", "media_ports"),
        mode="before",
    )
    @classmethod
    def _split_list(cls, given: object) -> object:
        return (
            [part.strip() for part in given.split(",") if part.strip()]
            if isinstance(given, str)
            else given
        )

    @field_validator("quantization", "kv_cache_dtype", mode="before")
    @classmethod
    def _empty_is_usual(cls, given: object, info: ValidationInfo) -> object:
        return given if given != "" else cls.model_fields[str(info.field_name)].default

    @field_validator("media_s3_profile", "media_s3_endpoint_url", "media_s3_region")
    @classmethod
    def _empty_is_unset(cls, text: str | None) -> str | None:
        return text or None

    @field_validator("image_formats", mode="before")
    @classmethod
    def _split_formats(cls, given: object) -> object:
        if not isinstance(given, str):
            return given
        return [part.strip().upper() for part in given.split(",") if part.strip()]

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, url: str | None) -> str | None:
        if url and urlsplit(url).scheme not in ("redis", "rediss", "redis+socket"):
            raise ValueError("give redis://HOST:PORT/0, rediss://… or redis+socket:///PATH")
        return url or None

    @field_validator("pepper")
    @classmethod
    def _check_pepper(cls, text: SecretStr) -> SecretStr:
        if text.get_secret_value():
            pepper.parse(text.get_secret_value())
        return text

    @field_validator("blobs")
    @classmethod
    def _check_blobs(cls, place: str) -> str:
        if "://" in place and not re.fullmatch(r"s3://[^/]+(/.*)?", place):
            raise ValueError("give a folder, or s3://BUCKET/PREFIX")
        return place

    @model_validator(mode="after")
    def _check_heartbeat(self) -> Self:
        if self.heartbeat_s > self.lease_s / 2:
            raise ValueError(
                f"{PREFIX}HEARTBEAT_S must be at most half of {PREFIX}LEASE_S: a beat that is "
                "late must not cost the lease"
            )
        return self

    @field_validator("media_allowed_hosts")
    @classmethod
    def _check_hosts(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        names = tuple(name.lower().removesuffix(".") for name in names)
        if not all(re.fullmatch(r"[a-z0-9_.-]+", name) for name in names):
            raise ValueError("give names of hosts, as cdn.internal, without ports or wildcards")
        return names

    @field_validator("media_root", mode="before")
    @classmethod
    def _no_folder_is_none(cls, given: object) -> object:
        return given or None  # an empty path would be the folder that we happen to be in

    @model_validator(mode="after")
    def _check_media_root(self) -> Self:
        if self.media_root is not None and self.database_url:
            raise ValueError(
                f"{PREFIX}MEDIA_ROOT opens files of this host, and {PREFIX}DATABASE_URL makes a "
                "service of many: unset one"
            )
        return self

    @model_validator(mode="after")
    def _check_bodies(self) -> Self:
        if self.max_body_bytes > self.max_held_bytes:
            raise ValueError(
                f"{PREFIX}MAX_BODY_BYTES must be at most {PREFIX}MAX_HELD_BYTES: no body of that "
                "size could ever be held"
            )
        return self

    @property
    def database(self) -> str:
        return self.database_url or f"sqlite:///{self.home / 'darkroom.sqlite3'}"

    @property
    def blob_place(self) -> str:
        return self.blobs or str(self.home / "blobs")

    @property
    def opened_schemes(self) -> frozenset[str]:
        """What items may name besides http, data URLs and uploads."""
        opened = {"s3": bool(self.media_s3_buckets), "file": self.media_root is not None}
        return frozenset(scheme for scheme, is_open in opened.items() if is_open)

    def refuse_other_limits(self, model: str, limits: MediaLimits) -> None:
        """
        Raises `BadSettingError` where DARKROOM_MODELS says something else of a model than its worker.
        """
        said = self.models.get(model)
        if said is not None and self.limits_of(model) != limits:
            raise BadSettingError(
                f"{PREFIX}MODELS says {self.limits_of(model)} of {model!r}, and this worker has "
                f"{limits}: correct the setting, or leave out --limit-mm-per-prompt."
            )

    def limits_of(self, model: str) -> MediaLimits:
        known = self.models.get(model, self.limit_mm_per_prompt)
        return MediaLimits(image=known.image, video=known.video, frames=known.frames)

    def max_model_len_of(self, model: str) -> int | None:
        """None: what the model allows."""
        known = self.models.get(model)
        return None if known is None else known.max_model_len


def load_config(**values: Any) -> Config:
    """
    Read the environment.

    Args:
        values: go before the environment: what was given on a command line.

    Raises:
        BadSettingError: a value makes no sense; the text names its variable.
    """
    names = {name: PREFIX + name.upper() for name in Config.model_fields}
    for name in SECRETS:
        if name not in values and (text := _read_secret(names[name])) is not None:
            values[name] = text
            names[name] += "_FILE"
    try:
        return Config(**values)
    except ValidationError as error:
        problems = (_describe(problem, names) for problem in error.errors())
        raise BadSettingError("; ".join(problems)) from error
    except SettingsError as error:  # JSON that cannot be parsed; pydantic names the field only
        found = re.search(r'field "(\w+)"', str(error))
        variable = names[found[1]] if found else "a variable"
        raise BadSettingError(f"{variable} is not readable: give JSON.") from error


def _read_secret(variable: str) -> str | None:
    """What the file holds that this variable's twin names; None where it names none."""
    path = os.environ.get(f"{variable}_FILE")
    if not path:
        return None
    if os.environ.get(variable):
        raise BadSettingError(f"{variable} and {variable}_FILE are both set: unset one.")
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise BadSettingError(f"{variable}_FILE: {path} cannot be read: {why}.") from error
    if not text:
        raise BadSettingError(f"{variable}_FILE: {path} is empty.")
    return text


def _describe(problem: Mapping[str, Any], names: Mapping[str, str]) -> str:
    # The value itself is left out: a URL may hold a password.
    text = str(problem["msg"]).removeprefix("Value error, ")
    place = [str(part) for part in problem["loc"]]
    if not place:
        return f"{text}."
    inside = f" ({'.'.join(place[1:])})" if place[1:] else ""
    return f"{names[place[0]]}{inside}: {text}."


def parse_limits(text: str) -> dict[str, int]:
    """
    Read `image=4,video=1,frames=64` or `{"image": 4}`, both of vLLM's forms of `--limit-mm-per-prompt`.

    Raises:
        ValueError: it is none of them.
    """
    pairs = _parse_json(text) if text.lstrip().startswith("{") else _parse_pairs(text)
    limits = {}
    for name, number in pairs:
        if name not in MediaLimits.model_fields or not re.fullmatch("[0-9]{1,6}", number):
            raise ValueError(
                "give image=N, video=N and frames=N, or some of them, with commas between"
            )
        limits[name] = int(number)
    return limits


def _parse_pairs(text: str) -> list[tuple[str, str]]:
    parts = [part.partition("=") for part in text.split(",") if part.strip()]
    return [(name.strip(), number.strip()) for name, _, number in parts]


def _parse_json(text: str) -> list[tuple[str, str]]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError('give JSON such as {"image": 4}, or image=4') from error
    return [(name, json.dumps(number)) for name, number in found.items()]
