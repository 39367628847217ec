"""What an operator says about where media come from: a bad word stops the start and names its variable."""

import pytest

from media.errors import BucketNotAllowedError
from media.limits import IMAGE_LIMITS
from tasks.config import load_config
from tasks.errors import BadSettingError
from tasks.worker import open_fetch


@pytest.mark.parametrize(
    ("words", "variable"),
    [
        ({"media_s3_buckets": "photographs"}, "DARKROOM_MEDIA_S3_BUCKETS"),
        ({"media_s3_buckets": "s3://photographs/a-{tenant}"}, "DARKROOM_MEDIA_S3_BUCKETS"),
        (
            {"media_s3_buckets": "s3://photographs", "media_s3_profile": "missing"},
            "DARKROOM_MEDIA_S3_PROFILE",
        ),
        (
            {"media_s3_buckets": "s3://photographs", "media_s3_endpoint_url": "nowhere"},
            "DARKROOM_MEDIA_S3_ENDPOINT_URL",
        ),
    ],
    ids=["no bucket", "half a segment", "no profile", "no address"],
)
def test_bucket_that_cannot_be_stops_the_start(words: dict[str, str], variable: str) -> None:
    with pytest.raises(BadSettingError, match=variable), open_fetch(load_config(**words), {}):
        pass


def test_several_buckets_may_be_opened() -> None:
    config = load_config(media_s3_buckets="s3://photographs/{tenant}/, s3://public,")

    with open_fetch(config, {}) as fetch, pytest.raises(BucketNotAllowedError):
        fetch("s3://photographs/b/a.jpg", IMAGE_LIMITS, "a")
