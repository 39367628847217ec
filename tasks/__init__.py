"""Celery: when things run, what is tried again, and the worker process."""
