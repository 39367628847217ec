"""
`darkroom worker`: a process that serves one model, or the cpu queue, until it is told to stop.
"""

import os
from contextlib import closing

from cli.garbage import settle
from cli.service import prepare_database, read_object, reported
from tasks.stopping import leaving_at_signal


def run_worker(
    *,
    model: str | None,
    served_model_name: str | None,
    limits: str | None,
    max_model_len: int | None,
    device: str,
    dtype: str,
    revision: str | None,
    trust_remote_code: bool,
    chat_template: str | None,
    mm_processor_kwargs: str | None,
) -> int:
    """
    Start a worker; return the number that its process ends with.

    Args:
        model: None for a worker of the cpu queue.
        served_model_name: what jobs call it; None: `model` itself.
        limits, max_model_len: limits as `image=4`; None for what the settings say.
        mm_processor_kwargs: as JSON. This and the three before it: see `LLM`.

    Raises:
        CannotStartError: the message says what to change.
    """
    processor_kwargs = read_object("--mm-processor-kwargs", mm_processor_kwargs)
    with reported(), leaving_at_signal():
        from tasks.broker import open_broker
        from tasks.config import MediaLimits, load_config, parse_limits
        from tasks.engines import EngineOptions, load_engine
        from tasks.logs import configure_logging
        from tasks.worker import run_cpu_worker, run_gpu_worker

        configure_logging()
        env = dict(os.environ)
        config = load_config()
        prepare_database(config)
        with open_broker(config) as url:
            if model is None:
                settle()
                return run_cpu_worker(config, url, env=env)
            name = served_model_name or model
            chosen = (
                config.limits_of(name)
                if limits is None
                else MediaLimits.model_validate(parse_limits(limits))
            )
            config.refuse_other_limits(name, chosen)  # before the weights are loaded
            length = max_model_len or config.max_model_len_of(name)
            options = EngineOptions(
                model,
                chosen,
                length,
                device,
                dtype,
                num_media_processes=config.media_processes,
                image_formats=config.image_formats,
                max_image_pixels=config.max_image_pixels,
                draft_jpegs=config.draft_jpegs,
                quantization=config.quantization,
                kv_cache_dtype=config.kv_cache_dtype,
                enable_prefix_caching=config.enable_prefix_caching,
                revision=revision,
                trust_remote_code=trust_remote_code,
                chat_template=chat_template,
                mm_processor_kwargs=processor_kwargs,
            )
            with closing(load_engine(options)) as engine:
                settle()
                return run_gpu_worker(config, url, engine, name, env=env)
