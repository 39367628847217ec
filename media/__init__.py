"""
Bytes in, pictures out: decoding of images and video clips, and which frames of a clip to keep.

The room knows no queue, no database and no model. What it hands out, `RGBImage` and `Frames` in
`media.decoded`, is all that the engine sees of it.
"""
