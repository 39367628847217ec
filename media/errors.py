"""
Why media could not become pixels: one small tree, each class with a stable word as its code.

Every class answers two questions. Whose fault is it? Nearly always the sender's: the same bytes
fail again tomorrow, so the item fails at once. Does trying again help? Not with decoding, a pure
function of the bytes. With fetching it may: there each error says so itself. What can pass
otherwise (a full disk, a lost device) belongs to other rooms.

The texts go to clients as they are. They say what is wrong, where, and what to do, and hold no
path, no address and no word of a decoder's own message.
"""

import inspect
from collections.abc import Mapping
from enum import StrEnum
from typing import ClassVar


class Fault(StrEnum):
    """Who can put it right."""

    CLIENT = "client"
    OPERATOR = "operator"


class MediaError(ValueError):
    """The media could not be decoded. Check the file and send it again."""

    code: ClassVar[str] = "media_unreadable"
    fault: ClassVar[Fault] = Fault.CLIENT
    retryable: bool = False

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or inspect.cleandoc(self.__doc__ or self.code))


class ImageUnreadableError(MediaError):
    """Failed to load image: the bytes are damaged or not an image. Check the file and send it again."""

    code: ClassVar[str] = "image_unreadable"


class ImageTruncatedError(ImageUnreadableError):
    """Failed to load image: the data ends too early. Send the complete file."""

    code: ClassVar[str] = "image_truncated"


class ImageEmptyError(ImageUnreadableError):
    """Failed to load image: there is no picture in it, 0 bytes or 0 pixels. Send the complete file."""

    code: ClassVar[str] = "image_empty"


class ImageFormatNotSupportedError(MediaError):
    """Failed to load image: this format is not read here. Convert the image to JPEG or PNG."""

    code: ClassVar[str] = "image_format_not_supported"


class ImageValuesNotSupportedError(MediaError):
    """Failed to load image: the type or range of its values leaves the brightness open. Give uint8, 0 to 255."""

    code: ClassVar[str] = "image_values_not_supported"


class ImageTooLargeError(MediaError):
    """The image is too large. Scale it down before sending it."""

    code: ClassVar[str] = "image_too_large"


class ImageTooNarrowError(MediaError):
    """The image is too narrow for its length. Crop it or cut it into several images."""

    code: ClassVar[str] = "image_too_narrow"


class VideoUnreadableError(MediaError):
    """Failed to load video: the bytes are damaged or not a video. Check the file and send it again."""

    code: ClassVar[str] = "video_unreadable"


class VideoTruncatedError(VideoUnreadableError):
    """Failed to load video: the data ends too early. Send the complete file."""

    code: ClassVar[str] = "video_truncated"


class FramesDifferError(VideoUnreadableError):
    """Failed to load video: its frames differ in size. Scale all of them to one size."""

    code: ClassVar[str] = "frames_differ_in_size"


class VideoFormatNotSupportedError(MediaError):
    """Failed to load video: this format is not read here. Convert the clip to MP4 with H.264."""

    code: ClassVar[str] = "video_format_not_supported"


class VideoHasNoFramesError(MediaError):
    """The video has no frames to look at. Check that it has a picture track, and the times asked for."""

    code: ClassVar[str] = "video_has_no_frames"


class VideoTooLargeError(MediaError):
    """The video is too large. Cut it, scale it down, or ask for fewer frames."""

    code: ClassVar[str] = "video_too_large"


class VideoSupportMissingError(MediaError):
    """Video is not installed here. Run pip install -e '.[video]' in Darkroom's folder."""

    code: ClassVar[str] = "video_support_missing"
    fault: ClassVar[Fault] = Fault.OPERATOR


class BadFrameSamplingError(MediaError):
    """The choice of frames makes no sense. Give num_frames >= 1, fps > 0 and 0 <= start_s < end_s."""

    code: ClassVar[str] = "bad_frame_sampling"


class TooManyFramesError(MediaError):
    """
    More frames of a clip than may be looked at in one prompt.

    Args:
        limit: of one prompt.
        given: that were asked for.
    """

    code: ClassVar[str] = "too_many_frames"

    def __init__(self, message: str | None = None, *, limit: int = 0, given: int = 0) -> None:
        super().__init__(
            message
            or f"At most {limit} frame(s) of a clip may be looked at in one prompt, and this one asks "
            f"for {given}. Lower num_frames or fps; in a job, give segments or image_policy=sample or "
            "split."
        )


class BadSegmentsError(MediaError):
    """The clip cannot be cut so. Give segments seconds or count, and an overlap smaller than one of them."""

    code: ClassVar[str] = "bad_segments"


class TooManySegmentsError(MediaError):
    """The clip would be cut into too many segments. Give longer ones."""

    code: ClassVar[str] = "too_many_segments"


class MediaChangedError(MediaError):
    """Failed to fetch media from URL: it gives another clip or picture each time, so that its parts never fit together. Give an address whose content stays, or upload the file."""

    code: ClassVar[str] = "media_changed"


class BadDataUrlError(MediaError):
    """The data URL cannot be read. Its form is data:image/jpeg;base64,<data> with standard base64."""

    code: ClassVar[str] = "bad_data_url"


class DecoderFailedError(MediaError):
    """Decoding ended in a crash and was given up. Save the file again with another program and resend it."""

    code: ClassVar[str] = "media_decoder_failed"
    # A process that the system killed looks the same, so it may pass; callers bound their tries.
    retryable: bool = True


class DecodeTimeoutError(MediaError):
    """Decoding took too long and was given up. Scale the image down, or cut the video, and resend it."""

    code: ClassVar[str] = "media_decode_timeout"
    retryable: bool = True  # as above: the machine may have been busy


class DecodeMemoryError(MediaError):
    """Decoding needed more memory than one file may have and was given up. Save the file again as an ordinary JPEG or MP4."""

    code: ClassVar[str] = "media_needs_too_much_memory"


class DecodersAwayError(MediaError):
    """Decoder processes do not start here: see what stands in the log. Decoding in threads needs none."""

    code: ClassVar[str] = "decoders_away"
    fault: ClassVar[Fault] = Fault.OPERATOR
    retryable: bool = True  # the machine lacks something just now, and nobody saw the file


class FetchFailedError(MediaError):
    """Failed to fetch media from URL. Check that it opens without a login and send the item again."""

    code: ClassVar[str] = "image_fetch_failed"

    facts: Mapping[str, object] | None = None
    """The report of the fetch up to here, for the item's; the fetcher sets it."""

    retry_after_s: float | None = None
    """How long the server asks to wait before the next try, if it does; as it says, uncapped."""

    def __init__(self, message: str | None = None, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


class BadUrlError(FetchFailedError):
    """The URL is not one that is fetched. Its form is https://host/path, without login or spaces."""

    code: ClassVar[str] = "bad_url"


class HostNotAllowedError(FetchFailedError):
    """The host of the URL, or one it redirects to, may not be reached. Use a public host, or upload the file."""

    code: ClassVar[str] = "host_not_allowed"


class BucketNotAllowedError(FetchFailedError):
    """The object that s3:// names is in no bucket that is open to you. Ask the operator, or upload the file."""

    code: ClassVar[str] = "bucket_not_allowed"


class ObjectNotFoundError(FetchFailedError):
    """There is no such object in the bucket, or no such bucket. Check the s3:// reference."""

    code: ClassVar[str] = "object_not_found"


class ObjectDeniedError(FetchFailedError):
    """The bucket does not give this object to the service, or only to who pays for it. Ask the operator, or upload the file."""

    code: ClassVar[str] = "object_denied"


class ObjectArchivedError(FetchFailedError):
    """The object is archived and cannot be read at once. Restore it and send the item again, or upload the file."""

    code: ClassVar[str] = "object_archived"


class FileNotAllowedError(FetchFailedError):
    """The URL leads to no file that is open here. Give a plain file, no link, of the folder that is open, or upload it."""

    code: ClassVar[str] = "file_not_allowed"


class FileNotReadableError(FetchFailedError):
    """The file behind the URL is not there or cannot be read. Check its name and its rights."""

    code: ClassVar[str] = "file_not_readable"


class FetchTimeoutError(FetchFailedError):
    """The media behind the URL did not arrive in time. Send the item again, or upload the file."""

    code: ClassVar[str] = "fetch_timeout"


class HostPausedError(FetchFailedError):
    """The host of the URL has asked for a pause. The item is tried again when it is over."""

    code: ClassVar[str] = "host_paused"


class FetchTooLargeError(FetchFailedError):
    """The media behind the URL is too large. Scale it down, or cut it, before sending it."""

    code: ClassVar[str] = "fetch_too_large"
