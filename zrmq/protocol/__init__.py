"""Bytes to values and back: batches, log events, requests and replies, limits, tag filters. Pure: no I/O, no clock."""
