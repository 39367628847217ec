"""
What is kept: all of the SQL, and blobs in a folder or a bucket.

The room knows neither the queue nor a model. Its functions take an open session of `storage.db`
and leave the transaction to the caller, so that several of them can be one commit.
"""
